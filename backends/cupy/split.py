"""A selection in one launch, or split: `score.cu`, then one that takes what it left (`ranks.cu`).

Where it is split, blocks of a row do not meet to select, so a row's scan has as many blocks as
there is room for, and its keys to select by may be of any number. In between lie keys to select by
and histograms, in scratch of the call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.backend import Config
from hata.problem import Problem

from .device import Described, Kernel
from .plan import Plan
from .row import LAYOUT, Attending, Selecting, launch_rows, ring_of, row_stages
from .shapes import LEAST_KEYS, Shape

# Blocks that scan a row at most; tiles of such a block, and bytes of their histograms.
MOST_SCANNERS, MOST_TILES, MOST_TALLIES = 64, 8, 16 * 1024


class Split(NamedTuple):
    """The two launches of a split selection: `score`, and one that takes what it left.

    Attributes:
        parts, threads, resident, room: Of the blocks of a row in the first launch; see `Shape`.
        per: Tiles of such a part, of which each has a histogram.
        overlap: The second launch may start while the first one drains.
    """

    parts: int
    threads: int
    resident: int
    room: int
    per: int
    overlap: bool

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return self.parts * self.per


def split_of(
    device: Described, problem: Problem, config: Config, rows: int, parts: int, bins: int
) -> Split:
    """How rows are scanned that `parts` blocks each select from in the launch after."""
    threads = config["scan_threads"]
    resident = max(512 // threads, 1)
    room = (device.shared + 1024) // resident - 1024 - 2048
    scanners = config["scan_parts"] or max(device.sms * resident // max(rows, 1), 1)
    scanners = max(min(scanners, MOST_SCANNERS, problem.slots // LEAST_KEYS), 1)
    # A block of the second launch looks at whole tiles.
    per = min(-(-4 * parts // scanners), MOST_TILES) if parts > 1 else 1
    while per > 1 and per * bins * 4 > MOST_TALLIES:
        per //= 2
    return Split(scanners, threads, resident, room, per, device.architecture >= 90)


def launch_selection(
    plan: Plan,
    name: str,
    problem: Problem,
    config: Config,
    shape: Shape,
    near: int,
    rows: int,
    fields: dict[str, Any],
    selecting: Selecting,
    attending: Attending | None = None,
    more: dict[str, int] | None = None,
    overlap: bool = False,
) -> None:
    """Write a selection, and the attention after it, into a plan, and what they need of scratch.

    Split where that is asked for and one histogram is enough. `near`: about how many rows there
    are, for what must not depend on their number. `more`: further constants of the launch that
    scans. `overlap`: the first launch may start while the one before it drains.
    """
    rest = rows, fields, selecting, attending, more or {}, overlap
    if config["split"] and selecting.macros["ROUNDS"] == 1:
        split = split_of(plan.device, problem, config, near, shape.parts, selecting.bins)
        _launch_split(plan, name, problem, config, split, shape, *rest)
    else:
        launch_rows(plan, name, problem, config, shape, *rest)


def _launch_split(
    plan: Plan,
    name: str,
    problem: Problem,
    config: Config,
    split: Split,
    shape: Shape,
    rows: int,
    fields: dict[str, Any],
    selecting: Selecting,
    attending: Attending | None,
    more: dict[str, int],
    overlap: bool,
) -> None:
    slots = fields["slots"]
    # From the last multiple of 16 before the first visible key on, in whole tiles.
    fields["capacity"] = capacity = (-(-slots // 64) + 1) * 64
    fields["scores"] = plan.piece(rows * capacity * selecting.itemsize)
    narrow = -(-(problem.slots + 16) // split.tiles) + 64 < 2**16
    size = 2 if narrow else 4
    fields["tallies"] = plan.piece(rows * split.tiles * selecting.bins * size)
    counted = int(shape.joined == 2 and attending is not None)
    if counted:
        fields["arrivals"] = plan.piece(rows * 4)
    counters = -(-split.per * selecting.bins * 4 // 16) * 16
    reads = -(-problem.slots // (split.parts * split.threads * selecting.keys))
    scanned, ring = ring_of(selecting, split.threads, split.room - counters, reads)
    macros = {
        "PARTS": split.parts, "JOINED": 0, "THREADS": split.threads, **scanned,
        "FUSED": 0, "FRESH": 0, **more, "ROW_TILES": split.tiles, "PER": split.per,
        "NARROW": int(narrow),
        "SPILL": 1, "COUNTERS": counters, "EXCHANGE": 0, "QUERIES": 0,
        "RESIDENT": split.resident, "COUNTED": counted, "OVERLAP": int(split.overlap),
    }  # fmt: skip
    if attending is not None:
        macros |= {name: attending.macros[name] for name in ("D", "DATA", "ALIGNED")}
    kernel = Kernel("score", tuple(macros.items()), split.threads)
    plan.launch(kernel, rows * split.parts, counters + ring, fields, LAYOUT, overlap)

    exchange = queries = shared = listed = 0
    macros = {
        "PARTS": shape.parts, "JOINED": shape.joined if attending else 0,
        "THREADS": shape.threads, "ROUNDS": 1, "BINS": selecting.bins, "ROW_TILES": split.tiles,
        "NARROW": int(narrow), "SPLIT": 1, "RESIDENT": shape.resident,
        "OVERLAP": int(split.overlap),
    }  # fmt: skip
    if attending is not None:
        exchange, queries = -(-attending.area // 16) * 16, attending.queries
        shared = -(-max(attending.partials, selecting.bins * 4) // 16) * 16
        share = (-(-problem.k // shape.parts) + 15) * 4
        listed = exchange + queries + shared
        # Positions that find no room in shared memory lie in global memory.
        if listed + share <= shape.room:
            shared += share
        else:
            listed = 0
        if shape.joined == 2:
            fields["exchange"] = plan.piece(rows * shape.parts * exchange)
        shared = -(-shared // 16) * 16
        rings, size = row_stages(attending, config, exchange + queries + shared, shape.room)
        macros |= {**attending.macros, **rings}
        shared += size
    macros |= {"EXCHANGE": exchange, "QUERIES": queries, "LISTED": listed}
    cluster = shape.parts if macros["JOINED"] == 1 else 1
    kernel = Kernel(name, tuple(macros.items()), shape.threads, cluster)
    plan.launch(
        kernel, rows * shape.parts, exchange + queries + shared, fields, LAYOUT, split.overlap
    )
