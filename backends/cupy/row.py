"""The argument and the constants that the kernels of a row share; see `row.cuh`.

Plain arithmetic on sizes: which variant of a kernel a call takes, and how much memory of what kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.launches import Address, LaunchList, View, row_step
from hata.problem import pow2

from .compiler import layout
from .device import Kernel, launch
from .shapes import Shape, capacity_of, counting

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
DATA = {"float32": 0, "float16": 1, "bfloat16": 2}
# Bytes of a line of shared memory.
LINE = 128
# Words in which a thread marks keys that may be selected, at most.
MOST_MASKS = 5
# Bytes of positions that a block keeps at most.
MOST_LISTED = 16 * 1024
# `struct Params` of row.cuh.
LAYOUT = layout("row.cuh")


class Selecting(NamedTuple):
    """The scan and the selection of a kernel: constants, counters and their sums, and sizes."""

    constants: dict[str, int]
    bins: int
    sums: int
    itemsize: int
    keys: int
    vectors: int
    prefetch: int

    @property
    def fixed(self) -> int:
        """Bytes of shared memory that it needs at least, whatever the shape of the rows."""
        return lines(4 * self.sums) + lines(4 * self.bins) + LINE


def selecting(launches: LaunchList, call: Any, name: str, group: int) -> Selecting:
    """Which scan of the codes of this name a call takes, for groups of so many query codes."""
    codes, bits, norms = launches.views[name], call.problem.bits, call.problem.norms
    assert codes is not None
    # Where there are binary tensor cores that and.
    binary = call.config["binary_mma"] and 80 <= launches.gpu.architecture <= 90
    how = counting(group, bits, norms)
    width = bits // 8
    unit, keys = next((n for n in (16, 4) if width % n == 0 and codes.in_units_of(n)), 1), 1
    slots = codes.shape[2]
    if (
        width in (4, 8)
        and codes.alignment == 0
        and all(stride % 16 == 0 for stride in codes.strides[:2])
        and codes.strides[2] == width
        and slots * width % 16 == 0
    ):
        unit, keys = 16, 16 // width
    constants = {
        "BITS": bits, "CODE_GROUP": group, "KEY_NORMS": norms, "DIGITS": how.rounds,
        "BINS": how.bins, "HALVE": bool(how.halve), "LOAD_BYTES": unit, "VECTOR_KEYS": keys,
    }  # fmt: skip
    # Planes in two's complement of what a bit of a key adds to its distance.
    planes = (group >> how.halve).bit_length() + 1
    wide = planes > 4 or bits == 256
    binary = binary and unit == 16 and not norms and how.rounds == 1
    binary = binary and (planes <= 8 if bits in (128, 256) else bits == 64 and not wide)
    constants |= {
        "BINARY_MMA": binary, "WIDE": wide, "MMA_PLANES": planes, "PLANES": group.bit_length(),
    }  # fmt: skip
    vectors = keys * width // 16 if unit == 16 else 0
    sums = how.rounds * (how.bins + 8)
    return Selecting(
        constants, how.rounds * how.bins, sums, how.itemsize, keys, vectors, call.config["prefetch"]
    )


class Attending(NamedTuple):
    """The attention of a kernel: constants, and bytes of shared memory."""

    constants: dict[str, int]
    area: int
    left: int
    queries: int
    partials: int
    rings: int


def attending(
    launches: LaunchList,
    call: Any,
    shape: Shape,
    members: int,
    ringed: int,
    selected: Selecting | None = None,
    weights: int = 0,
) -> Attending:
    """Which attention a call takes, for `members` heads that share keys.

    Where there is room, `ringed` warps of a block attend, with some stages of keys and values on
    their way to shared memory; else all do, with plain loads. What can be copied so are rows that
    are whole vectors of 16 bytes (`aligned`) and less than 2**31 elements apart (`near`). Of the
    same kernel, `selected` comes before, with `weights` bytes of a projection.
    """
    problem, stages = call.problem, call.config["stages"]
    rows = [view for name in ("keys", "values") if (view := launches.views[name])]
    q = launches.views["q"]
    aligned = q is not None and all(x.in_units_of(16) for x in (q, *rows))
    # Steps between tokens, and places of tokens in vectors of 8 elements, take 32 bits.
    near = all(0 <= x.strides[2] < 2**31 and x.shape[2] * x.strides[2] < 2**35 for x in rows)
    sums, counters = (4 * selected.sums, 4 * selected.bins + weights) if selected else (0, 0)
    lanes = 64 if problem.value_dim <= 64 else 128
    chunks = 0 if problem.dtype == "float32" else -(-problem.head_dim // 32)
    if not (aligned and near and chunks):
        stages = 0
    for warps, most in ((ringed, stages), (shape.threads // 32, 0)):
        heads = min(members, 16 if chunks else 8)
        while True:
            area = 0
            if shape.sync == 1:
                # A slice of every split, and the maxima and sums of all.
                slice_ = -(-heads * lanes // shape.num_splits // 32) * 32
                area = shape.num_splits * (slice_ + 2 * heads) * 4
            queries = -(-heads // 8) * chunks * 512
            partials = lines(warps * heads * (lanes + 6) * 4)
            left = shape.room - (area + sums + 3 * LINE + queries)
            if heads == 1 or left >= max(partials, counters):
                break
            heads = -(-heads // 2)
        # Of all these warps, 16 keys and values each.
        stage = warps * (64 * chunks + 2 * lanes) * 16
        stages = min((left - partials - MOST_LISTED) // stage, most)
        # One stage hides nothing that plain loads do not.
        if stages > 1:
            break
    else:
        stages = 0
    constants = {
        "HEAD_DIM": problem.head_dim, "VALUE_DIM": problem.value_dim, "GROUP": members,
        "PASS_HEADS": heads, "PASS_DIM": lanes, "DTYPE": DATA[problem.dtype], "ALIGNED": aligned,
        "SOFTCAP": call.softcap is not None, "OFFSETS_32BIT": near, "ATTEND_WARPS": warps,
        "STAGES": stages,
    }  # fmt: skip
    passes = -(-members // heads) * -(-problem.value_dim // lanes)
    left = passes * heads * (lanes + 2) * 4
    return Attending(constants, area, left, queries, partials, stages * stage)


def budget_fields(call: Any) -> dict[str, int]:
    """The budget as the kernels take it."""
    return {**call.budget._asdict(), "least": call.budget.least}


def steps(name: str, x: View | None, axes: int = 3) -> dict[str, int]:
    """Strides of an array as fields of an argument."""
    if x is None:
        return {}
    return {f"{name}_{axis}": x.strides[axis] for axis in range(axes)}


def span_fields(launches: LaunchList) -> dict[str, Address | int]:
    """Lengths and starts as fields of an argument."""
    return {
        "lengths": launches.address("lengths"),
        "starts": launches.address("starts"),
        "length_step": row_step(launches.views["lengths"]),
        "start_step": row_step(launches.views["starts"]),
    }


def kind(x: View | None, dtype: str) -> int:
    """A bias or sink logits: absent (0), in the dtype of the data (1), or float32 (2)."""
    return 0 if x is None else 1 if x.dtype == dtype else 2


def attention_fields(launches: LaunchList, call: Any) -> dict[str, Any]:
    """What every attention takes: its arrays, their strides, its results and numbers."""
    views = launches.views
    fields: dict[str, Any] = {
        "out": launches.output("out"),
        "sinks": launches.address("sink_logits"),
        "sinks_kind": kind(views["sink_logits"], call.problem.dtype),
        "tokens": call.q.shape[2],
        "slots": call.keys.shape[2],
        "scale": call.scale,
        "softcap": call.softcap or 0.0,
    }
    if call.return_lse:
        fields["lse"] = launches.output("lse")
    for name in ("q", "keys", "values"):
        fields |= {name: launches.address(name), **steps(name, views[name])}
    return fields


def ring_of(selecting: Selecting, threads: int, room: int) -> tuple[dict[str, int], int]:
    """The scan in `room` bytes: constants, and bytes of its ring.

    Without room for a ring, codes are read when they are needed.
    """
    slot = threads * selecting.vectors * 16
    prefetch = selecting.prefetch if slot else 1
    while prefetch > 1 and (prefetch + 1) * slot > room:
        prefetch //= 2
    ring, constants = (prefetch + 1) * slot, selecting.constants
    if ring > room:
        constants, ring = {**constants, "LOAD_BYTES": min(constants["LOAD_BYTES"], 4)}, 0
        constants |= {"VECTOR_KEYS": 1, "BINARY_MMA": False}
    return {**constants, "PREFETCH": prefetch, "RING_BYTES": ring}, ring


def lines(size: int) -> int:
    """Bytes of whole lines of shared memory that hold `size` bytes."""
    return -(-size // LINE) * LINE


def list_size(k: int, num_splits: int) -> int:
    """Bytes of the positions that a block attends to: for all budgets of one kind.

    That is a share in whole tiles of 16, and what `max_local` of attend.cuh allows beside it.
    """
    share = -(-(-(-pow2(k) // num_splits) + 15) // 16) * 16
    return -(-(share + share // 2 + 64) // 4) * 16


def launch_rows(
    launches: LaunchList,
    call: Any,
    shape: Shape,
    rows: int,
    fields: dict[str, Any],
    selecting: Selecting | None = None,
    attending: Attending | None = None,
    step: tuple[dict[str, int], bool, int] = ({}, False, 0),
) -> None:
    """Write the launch of a kernel that works on rows, and what it needs of a workspace.

    `step`: of a decode step, more constants, whether it starts while the launch before drains, and
    bytes of a projection that lie where the scores will be.
    """
    more, pdl, weights = step
    constants = {
        "NUM_SPLITS": shape.num_splits,
        "SYNC": shape.sync,
        "THREADS": shape.threads,
        **more,
    }
    # What is compiled goes by the bucket of the slots: a cache that grows takes the same kernel.
    capacity, most = capacity_of(shape, fields["slots"]), capacity_of(shape, call.problem.slots)
    narrow = most < 2**16
    exchange = queries = shared = listed = area = seen = counters = 0
    if attending is not None:
        constants |= attending.constants
        exchange, queries = attending.area, attending.queries
        shared = attending.partials + attending.rings
    if selecting is not None:
        sums, counters = lines(selecting.sums * (2 if narrow else 4)), lines(selecting.bins * 4)
        exchange, area = max(exchange, sums), sums
    exchange = lines(exchange)
    if attending is not None:
        positions = list_size(fields["k"], shape.num_splits)
        needed = exchange + positions + queries + max(shared, counters + weights) + 2 * LINE
        if positions <= MOST_LISTED and needed <= shape.room:
            listed = max(exchange, LINE)
            exchange = lines(listed + positions)
        constants["STAGES_AT"] = exchange + queries + attending.partials
    if selecting is not None:
        fixed, keys = exchange + queries + counters, most * selecting.itemsize
        # Reading ahead gives way first.
        scanned, ring = ring_of(selecting, shape.threads, shape.room - fixed - max(keys, weights))
        spill = fixed + ring + keys > shape.room or ring == 0 < selecting.vectors
        if spill:
            scanned, ring = ring_of(selecting, shape.threads, shape.room - fixed - weights)
        constants |= {
            **scanned, "SPILL": spill, "COUNTS_16BIT": narrow, "HISTOGRAM_BYTES": counters,
            "MASKS": min(-(-(most // shape.threads + 32) // 32), MOST_MASKS),
        }  # fmt: skip
        fields["capacity"] = shape.num_splits * capacity if spill else capacity
        if spill:
            size = rows * shape.num_splits * capacity
            fields["scores"] = launches.piece(size, selecting.itemsize)
            capacity = 0
        shared = max(shared, counters + ring + max(capacity * selecting.itemsize, weights))
    cooperative = shape.sync == 2
    if cooperative:
        seen = lines(area + (attending.left if attending else 0))
        fields["exchange"] = launches.piece(rows * shape.num_splits * seen, 1)
        fields["arrivals"] = launches.piece(rows)
    constants |= {
        "EXCHANGE_BYTES": exchange, "MERGE_AT": area, "WORKSPACE_BYTES": seen,
        "QUERY_BYTES": queries, "POSITIONS_AT": listed, "BLOCKS_PER_SM": shape.resident,
        "PDL": pdl and not cooperative,
    }  # fmt: skip
    cluster = shape.num_splits if shape.sync == 1 else 1
    kernel = Kernel(call.OP, tuple(constants.items()), shape.threads, cluster, cooperative)
    size, pdl = exchange + queries + shared, pdl and not cooperative
    launch(launches, kernel, rows * shape.num_splits, size, fields, LAYOUT, pdl)
