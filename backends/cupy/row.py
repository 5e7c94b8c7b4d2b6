"""The argument and the constants that the kernels of a row share; see `row.cu`.

Plain arithmetic on sizes: which variant of a kernel a call takes, and how much memory of what kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.backend import Budget, Config
from hata.problem import Problem

from .driver import Described, Kernel
from .plan import Address, Plan, View, row_step

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
DATA = {"float32": 0, "float16": 1, "bfloat16": 2}
# Counters of one histogram at most; more values than this are found digit by digit.
MOST_BINS = 4608
DIGIT_BINS = 2048
# Words in which a thread marks keys that may be selected, at most.
MOST_MASKS = 5
# Parts of a row that are chosen by themselves: at most so many, and of so many keys at least.
MOST_PARTS, LEAST_KEYS = 16, 512
# Keys of a part from which on it pays to use every multiprocessor, whatever the barriers cost.
LONG_PART = 48 * 1024
_CODES = ("q_codes", "codes", "norms", "q", "keys", "values")
# `struct Params` of row.cu.
LAYOUT = {
    **dict.fromkeys(
        (
            *_CODES, "sinks", "query_projection", "query_bias", "projection", "bias", "out", "lse",
            "positions", "lengths", "starts", "exchange", "scores", "arrivals",
        ),
        "P",
    ),
    **{f"{name}_{axis}": "q" for name in _CODES for axis in (0, 1, 2)},
    **dict.fromkeys(
        (
            "positions_0", "positions_1", "positions_2", "ratio", "query_projection_0",
            "query_projection_1", "query_bias_0", "projection_0", "projection_1", "bias_0",
        ),
        "q",
    ),
    **dict.fromkeys(
        (
            "heads", "share", "tokens", "slots", "length_step", "start_step", "k", "least", "sink",
            "recent", "dense_below", "capacity", "sinks_kind", "query_bias_kind", "bias_kind",
        ),
        "i",
    ),
    "scale": "f",
    "softcap": "f",
}  # fmt: skip


class Counting(NamedTuple):
    """How the keys to select by are counted.

    Attributes:
        rounds: Histograms one after the other (1, or 3 digits).
        bins: Counters of each.
        halve: 1 where keys are halved distances, since all have one parity.
        itemsize: Bytes of a key.
    """

    rounds: int
    bins: int
    halve: int
    itemsize: int


def counting(group: int, bits: int, norms: bool) -> Counting:
    """How to count keys for groups of `group` codes of `bits` bits."""
    halve = int(group % 2 == 0 and not norms)
    # 0 stands for keys that win anyway, and distances begin at 1.
    bins = -(-((group * bits >> halve) + 2) // 4) * 4
    if norms or bins > MOST_BINS:
        return Counting(3, DIGIT_BINS, halve, 4)
    return Counting(1, bins, halve, 2)


class Shape(NamedTuple):
    """How the blocks of a row share its work.

    Attributes:
        parts: Blocks a row.
        joined: How they meet: 0 alone, 1 as a cluster, 2 by counters; see row.cu.
        threads: Threads a block.
        resident: Blocks that a multiprocessor holds at once.
        room: Bytes of shared memory that each of them may have.
    """

    parts: int
    joined: int
    threads: int
    resident: int
    room: int


def shape_of(device: Described, problem: Problem, config: Config, rows: int) -> Shape:
    """The shape of a problem's rows on a device, of which there are about `rows`."""
    threads = config["threads"]
    resident = max(512 // threads, 1)
    parts, counted = config["parts"], config["joined"] == "counters"
    if not parts:
        parts, counted = _parts(device, problem, rows, resident, counted)
    # An explicit number of parts may be a cluster that fits nowhere.
    whole = parts <= device.clusters and (parts == 1 or device.at_once(parts, resident) > 0)
    joined = 0 if parts == 1 else 2 if counted or not whole else 1
    # A block's own kilobyte, and what kernels declare statically.
    room = (device.shared + 1024) // resident - 1024 - 2048
    return Shape(parts, joined, threads, resident, room)


def _parts(
    device: Described, problem: Problem, rows: int, resident: int, counted: bool
) -> tuple[int, bool]:
    """Most parts with which all rows find room at the same time, and none is too small.

    Returns:
        `(parts, counted)`: also whether they meet by counters. Clusters leave multiprocessors idle
        that do not make a whole one; with very long parts that costs more than counters do.
    """
    keys, least = (problem.k, 64) if problem.op == "sparse_attend" else (problem.slots, LEAST_KEYS)
    most = min(MOST_PARTS, keys // least)
    free = max(min(most, device.sms * resident // max(rows, 1)), 1)
    if counted or device.clusters == 1:
        return free, True
    clusters = next((n for n in range(most, 1, -1) if device.at_once(n, resident) >= rows), 1)
    if keys // clusters > LONG_PART and 2 * free >= 3 * clusters:
        return free, True
    return clusters, False


def capacity_of(shape: Shape, slots: int) -> int:
    """Keys to select by that a part has room for, whatever the lengths are."""
    return -(-max(slots, 1) // shape.parts // 64) * 64


class Selecting(NamedTuple):
    """The scan and the selection of a kernel: constants, and bytes of shared memory."""

    macros: dict[str, int]
    bins: int
    itemsize: int
    vectors: int
    ahead: int


def selecting(group: int, bits: int, codes: View, norms: bool, ahead: int) -> Selecting:
    """Which scan a call takes."""
    how = counting(group, bits, norms)
    width = bits // 8
    unit = next(
        (n for n in (16, 4) if width % n == 0 and codes.in_units_of(n, 1)),
        1,
    )
    keys = 1
    slots = codes.shape[2]
    if (
        width in (4, 8)
        and codes.alignment == 0
        and all(stride % 16 == 0 for stride in codes.strides[:2])
        and codes.strides[2] == width
        and slots * width % 16 == 0
    ):
        unit, keys = 16, 16 // width
    macros = {
        "R": bits, "GROUP": group, "PLANES": group.bit_length(), "NORMS": int(norms),
        "ROUNDS": how.rounds, "BINS": how.bins, "HALVE": how.halve, "UNIT": unit, "KEYS": keys,
    }  # fmt: skip
    vectors = keys * width // 16 if unit == 16 else 0
    return Selecting(macros, how.rounds * how.bins, how.itemsize, vectors, ahead)


class Attending(NamedTuple):
    """The attention of a kernel: constants, and bytes of shared memory."""

    macros: dict[str, int]
    area: int
    queries: int
    partials: int


def attending(
    shape: Shape, problem: Problem, members: int, aligned: bool, softcap: bool, seen: int = 0
) -> Attending:
    """Which attention a call takes, beside an exchange area of `seen` bytes."""
    lanes = 64 if problem.value_dim <= 64 else 128
    chunks = 0 if problem.dtype == "float32" else -(-problem.head_dim // 32)
    heads = min(members, 16 if chunks else 8)
    while True:
        area = 0 if shape.parts == 1 else (heads * lanes + 2 * heads + 1) * 4
        queries = -(-heads // 8) * chunks * 512
        partials = shape.threads // 32 * heads * (lanes + 6) * 4
        if heads == 1 or max(area, seen) + 16 + queries + partials <= shape.room:
            break
        heads = -(-heads // 2)
    macros = {
        "D": problem.head_dim, "DV": problem.value_dim, "G": members, "HEADS": heads,
        "LANES": lanes, "DATA": DATA[problem.dtype], "ALIGNED": int(aligned),
        "SOFTCAP": int(softcap),
    }  # fmt: skip
    return Attending(macros, area, queries, partials)


def budget_fields(budget: Budget, slots: int) -> dict[str, int]:
    """k, ratio, least, sink and recent as the kernels take them."""
    least = max(1, budget.k_min, budget.sink + budget.recent)
    return {
        "k": budget.k,
        "ratio": budget.ratio,
        "least": min(least, budget.k),
        "sink": min(budget.sink, slots),
        "recent": min(budget.recent, slots),
    }


def steps(name: str, x: View | None, axes: int = 3) -> dict[str, int]:
    """Strides of an array as fields of an argument."""
    if x is None:
        return {}
    return {f"{name}_{axis}": x.strides[axis] for axis in range(axes)}


def span_fields(plan: Plan, lengths: View | None, starts: View | None) -> dict[str, Address | int]:
    """Lengths and starts as fields of an argument."""
    return {
        "lengths": plan.address(lengths),
        "starts": plan.address(starts),
        "length_step": row_step(lengths),
        "start_step": row_step(starts),
    }


def launch_rows(
    plan: Plan,
    name: str,
    problem: Problem,
    shape: Shape,
    rows: int,
    fields: dict[str, Any],
    selecting: Selecting | None = None,
    attending: Attending | None = None,
    more: dict[str, int] | None = None,
    overlap: bool = False,
) -> None:
    """Write the launch of a kernel that works on rows into a plan, and what it needs of scratch."""
    macros = {
        "PARTS": shape.parts,
        "JOINED": shape.joined,
        "THREADS": shape.threads,
        **(more or {}),
    }
    exchange = queries = shared = 0
    if attending is not None:
        macros |= attending.macros
        exchange, queries, shared = attending.area, attending.queries, attending.partials
    if selecting is not None:
        capacity = fields["capacity"] = capacity_of(shape, fields["slots"])
        # By the bucket of the slots, so that a cache that grows takes the same kernel.
        most = capacity_of(shape, problem.slots)
        narrow = most < 2**16
        exchange = max(exchange, selecting.bins * (2 if narrow else 4))
        counters = -(-selecting.bins * 4 // 16) * 16
        fixed, keys = exchange + 16 + queries + counters, most * selecting.itemsize
        # Reading ahead gives way first.
        ahead = selecting.ahead if selecting.vectors else 1
        slot = shape.threads * selecting.vectors * 16
        while ahead > 1 and fixed + keys + (ahead + 1) * slot > shape.room:
            ahead //= 2
        ring = (ahead + 1) * slot
        spill = fixed + ring + keys > shape.room
        scanned = selecting.macros
        if spill and fixed + ring > shape.room:
            # Not even so: codes are read when they are needed.
            scanned, ring, ahead = {**scanned, "UNIT": min(scanned["UNIT"], 4), "KEYS": 1}, 0, 1
        macros |= {
            **scanned, "SPILL": int(spill), "NARROW": int(narrow), "COUNTERS": counters,
            "AHEAD": ahead, "RING": ring,
            "MASKS": min(-(-(most // shape.threads + 32) // 32), MOST_MASKS),
        }  # fmt: skip
        if spill:
            fields["scores"] = plan.piece(rows * shape.parts * capacity * selecting.itemsize)
            capacity = 0
        shared = max(shared, counters + ring + capacity * selecting.itemsize)
    exchange = -(-exchange // 16) * 16
    if shape.joined == 2:
        fields["exchange"] = plan.piece(rows * shape.parts * exchange)
        fields["arrivals"] = arrivals = plan.piece(rows * 4)
        plan.zero(arrivals, rows)
    macros |= {
        "EXCHANGE": exchange, "QUERIES": queries, "RESIDENT": shape.resident,
        "OVERLAP": int(overlap),
    }  # fmt: skip
    cluster = shape.parts if shape.joined == 1 else 1
    kernel = Kernel(name, tuple(macros.items()), shape.threads, cluster)
    plan.launch(kernel, rows * shape.parts, exchange + queries + shared, fields, LAYOUT, overlap)
