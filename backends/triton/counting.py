"""How scores are counted to find a threshold, and the scratch that it takes.

Plain arithmetic on sizes: the kernels are in `scan` and `select`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.backend import Config
from hata.launches import Address, LaunchList
from hata.problem import pow2

from .launch import INTERPRETED, Long, Pointer, group

# Counters of one histogram at most; more values than this are counted digit by digit.
MOST_BINS = 4096
DIGIT = 11
# Largest tile of scores; rows of them are read up to a tile beyond their end.
MOST_TILE = 8192


class Counting(NamedTuple):
    """How scores are counted.

    Attributes:
        rounds: Histograms one after the other (1, or 3 digits).
        bins: Counters of each; a single histogram may leave out the largest value.
        halve: 1 where keys are halved distances, since all have one parity.
        drop: Low bits of a key that the first histogram leaves out.
        planes: Weighted planes of a group.
        weights: How many of them weigh 2^i, one or two, at bits 2i and 2i + 1.
    """

    rounds: int
    bins: int
    halve: int
    drop: int
    planes: int
    weights: int

    @property
    def itemsize(self) -> int:
        """Bytes of a stored score."""
        return 2 if self.rounds == 1 else 4

    @property
    def pointer(self) -> str:
        """Type of a pointer to scores; their rows are aligned."""
        return "*i16:16" if self.rounds == 1 else "*i32:16"


def counting(group: int, bits: int, norms: bool) -> Counting:
    """How to count keys for groups of `group` codes of `bits` bits."""
    halve = int(group % 2 == 0 and not norms)
    largest = group * bits >> halve
    planes = weights = 0
    left, level = group, 0
    while left:
        # As `pieces.add_up` has it: one or two words stay, of the others three make a carry.
        stay = 2 - left % 2
        planes, weights = planes + stay, weights | stay << 2 * level
        left, level = (left - stay) // 2, level + 1
    if norms or largest > MOST_BINS:
        return Counting(3, 1 << DIGIT, halve, 2 * DIGIT, planes, weights)
    return Counting(1, max(pow2(largest), 32), halve, 0, planes, weights)


def shared_declaration(config: Config, bins: int) -> str | None:
    """PTX that declares counters in shared memory, or `None` to count by ballots."""
    if INTERPRETED or config["histogram"] == "ballot":
        return None
    return f"{{ .shared .align 16 .b32 hata_bins[{bins + 4}]; mov.u32 $0, hata_bins; }}"


def starts_early(config: Config) -> bool:
    """Whether the launches of a step start as soon as the one before has started, to wait."""
    return config.get("early") == "all"


class Rows(NamedTuple):
    """The workspace of a selection, in pieces, and the sizes of rows in two of them."""

    planes: Address
    counters: Address
    scores: Address
    cumulated: Address
    state: Address
    below: Address
    scores_row: int
    counters_row: int

    def pointers(self) -> dict[str, Pointer]:
        """What the search for positions reads; scores come in 32-bit words."""
        return {
            "scores": Pointer(self.scores, "*i32:16"),
            "counters": Pointer(self.counters, "*i32:16"),
            "cumulated": Pointer(self.cumulated, "*i32:16"),
            "state": Pointer(self.state, "*i32"),
            "below": Pointer(self.below, "*i32"),
        }


def num_splits_of(config: Config, slots: int) -> int:
    """Splits of a row: no more than a cache of `slots` keys has tiles."""
    return max(min(config["num_splits"], pow2(-(-slots // config["tile"]))), 1)


def lay_out(launches: LaunchList, how: Counting, rows: int, call: Any, num_splits: int) -> Rows:
    """Reserve the workspace of the selection of `rows` rows."""
    scores_row = -(-call[1].shape[2] // 128)
    counters_row = how.rounds * how.bins
    return Rows(
        planes=launches.piece(rows * how.planes * call.problem.bits // 32),
        counters=launches.piece(rows * counters_row),
        scores=launches.piece(rows * scores_row * 128 + MOST_TILE, how.itemsize),
        cumulated=launches.piece(rows * num_splits * how.bins),
        state=launches.piece(rows * 6),
        below=launches.piece(rows * num_splits),
        scores_row=scores_row,
        counters_row=counters_row,
    )


def budget_group(call: Any) -> Any:
    """The budget of a call as kernels take it."""
    budget = call.budget
    return group(
        k=budget.k, ratio=Long(budget.ratio), least=budget.least, sink=budget.sink,
        recent=budget.recent, dense_below=getattr(call, "dense_below", 0),
    )  # fmt: skip
