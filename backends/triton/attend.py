"""Attention over gathered keys, in pieces: one split, its result, and the merge of splits.

The heads that share a selection are the rows of one tensor-core product, so a gathered key serves
all of them. A split runs the online softmax over its share of the positions and leaves a sum, a
maximum and an unnormalised output; they are merged in the order of the splits, so the bits of an
output depend on its own row alone.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hata.backend import Config
from hata.launches import NONE, Address, LaunchList
from hata.problem import pow2

from .launch import bind, launch
from .layout import POINTERS, in_fp32, optional
from .pieces import defer, wait_for_previous

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent, right to a few units in the last place."""
    # By exponentials, but for small numbers by a series: there the difference would cancel.
    size = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - size) / (1.0 + size)
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * square * (-1.0 / 3.0 + square * series)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def _capped(logits, scale, softcap):
    """Scaled and capped logits, in units of log 2; softcap 0 stands for none."""
    logits *= scale
    if softcap > 0:
        logits = softcap * _tanh(logits / softcap)
    return logits * LOG2E


@triton.jit
def _add_logits(logits, query, key, IEEE: tl.constexpr):
    if IEEE:
        wide = tl.trans(key.to(tl.float32))
        return tl.dot(query.to(tl.float32), wide, logits, input_precision="ieee")
    else:
        return tl.dot(query, tl.trans(key), logits)


@triton.jit
def _attend_tile(
    acc, most, total, query, q, keys, values, positions, at, end, contiguous, origin, slots, scale,
    softcap, members, keys_s, values_s, column,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    CHECKED: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over `positions[at:at + N]`; `WAITS`: for them, first.

    Returns:
        `acc`, `most` and `total` as `attend_positions` does, and which positions are slots [N].
    """
    member = tl.arange(0, M)
    lanes = tl.arange(0, BLOCK_V) + column
    depth = tl.arange(0, BLOCK_D)
    rank = at + tl.arange(0, N)
    inside = rank < end
    wait_for_previous(WAITS)
    position = tl.load(positions + rank, mask=inside & (contiguous == 0), other=-1)
    position = tl.where(inside & (contiguous != 0), origin + rank, position)
    if CHECKED:
        inside = (position >= 0) & (position < slots)
    logits = tl.zeros([M, N], tl.float32)
    # Products are as wide as steps are.
    key_rows = keys + (position * keys_s).to(tl.int64)[:, None] * VECTOR + depth[None, :]
    value_rows = values + (position * values_s).to(tl.int64)[:, None] * VECTOR + lanes[None, :]
    value_mask = inside[:, None]
    if DV % BLOCK_V != 0:
        value_mask = value_mask & (lanes < DV)[None, :]
    if BLOCK_D >= D:
        # Both rows of a position are on their way before either is used.
        key_mask = inside[:, None]
        if BLOCK_D > D:
            key_mask = key_mask & (depth < D)[None, :]
        key = tl.load(key_rows, mask=key_mask, other=0.0)
        value = tl.load(value_rows, mask=value_mask, other=0.0)
        if STAGES < 2:
            key = defer(key)
        logits = _add_logits(logits, query, key, IEEE)
    else:
        for i in tl.static_range(0, D, BLOCK_D):
            mask = (i + depth < D)[None, :]
            query = tl.load(q + i, mask=(member < members)[:, None] & mask, other=0.0)
            key = tl.load(key_rows + i, mask=inside[:, None] & mask, other=0.0)
            logits = _add_logits(logits, query, key, IEEE)
        value = tl.load(value_rows, mask=value_mask, other=0.0)
    logits = tl.where(inside[None, :], _capped(logits, scale, softcap), float("-inf"))
    grown = tl.max(logits, axis=1)
    if STAGES > 0:
        grown = tl.maximum(most, grown)
    # All logits -inf so far: any finite reference gives weights of zero, not NaN.
    reference = tl.where(grown == float("-inf"), 0.0, grown)
    weights = tl.exp2(logits - reference[:, None])
    if STAGES == 0:
        # Nothing came before.
        total = tl.sum(weights, axis=1)
    else:
        shrink = tl.exp2(most - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        acc *= shrink[:, None]
    if STAGES < 2:
        value = defer(value)
    if IEEE:
        acc = tl.dot(weights, value.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, grown, total, inside


@triton.jit
def attend_positions(
    q, keys, values, positions, first, end, contiguous, origin, slots, scale, softcap, members,
    q_h, keys_s, values_s, column,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    CHECKED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Online softmax of up to M heads at `q` over `positions[first:end]`, or origin + rank.

    Where launches overlap, it waits for the positions, with the queries on their way: as late as it
    can, since what stands behind a wait is computed behind it. `CHECKED`:
    positions may be negative, or otherwise no slots, and are then skipped. `STAGES` 0: there are no
    more than `N` of them, and no loop.

    Returns:
        `acc` [M, BLOCK_V] unnormalised, `most` [M] (largest logit in units of log 2), `total` [M],
        and whether there was any key.
    """
    member = tl.arange(0, M)
    depth = tl.arange(0, BLOCK_D)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    found = tl.zeros([N], tl.int32)
    q += member[:, None] * (q_h * VECTOR) + depth[None, :]
    query = 0.0
    if BLOCK_D >= D:
        query = tl.load(q, mask=(member < members)[:, None] & (depth < D)[None, :], other=0.0)
    # Where tiles are pipelined, nothing may stand between their loads.
    WAITS: tl.constexpr = OVERLAPPED and STAGES < 2
    wait_for_previous(OVERLAPPED and STAGES > 1)
    if STAGES == 0:
        acc, most, total, inside = _attend_tile(
            acc, most, total, query, q, keys, values, positions, first, end, contiguous, origin,
            slots, scale, softcap, members, keys_s, values_s, column,
            D, DV, M, N, BLOCK_D, BLOCK_V, IEEE, VECTOR, STAGES, CHECKED, WAITS,
        )  # fmt: skip
        found = inside.to(tl.int32)
    else:
        for at in tl.range(first, end, N, num_stages=STAGES):
            acc, most, total, inside = _attend_tile(
                acc, most, total, query, q, keys, values, positions, at, end, contiguous, origin,
                slots, scale, softcap, members, keys_s, values_s, column,
                D, DV, M, N, BLOCK_D, BLOCK_V, IEEE, VECTOR, STAGES, CHECKED, WAITS,
            )  # fmt: skip
            if CHECKED:
                found |= inside.to(tl.int32)
        # Launches wait for one another in a chain, which an empty share must not leave.
        wait_for_previous(WAITS)
    any_key = (first < end).to(tl.int32)
    if CHECKED:
        any_key = tl.max(found)
    return acc, most, total, any_key


@triton.jit
def _load_sinks(sinks_x, sinks_f, head, mask, has_sinks):
    """Sink logits in units of log 2: in the dtype of q (1), in float32 (2), or -inf for none."""
    nothing = float("-inf")
    narrow = tl.load(sinks_x + head, mask=mask & (has_sinks == 1), other=nothing).to(tl.float32)
    wide = tl.load(sinks_f + head, mask=mask & (has_sinks == 2), other=nothing)
    return tl.where(has_sinks == 1, narrow, wide) * LOG2E


@triton.jit
def _join_sinks(most, total, sink):
    """Factor to scale outputs by, and natural log of the sum of weights, with sinks in it."""
    grown = tl.maximum(most, sink)
    reference = tl.where(grown == float("-inf"), 0.0, grown)
    shrink = tl.exp2(most - reference)
    total = total * shrink + tl.exp2(sink - reference)
    return shrink / total, (reference + tl.log2(total)) * LN2


@triton.jit
def finish_split(
    out, lse, sinks_x, sinks_f, partial, peaks, sums, row, head, members, step,
    acc, most, total, found, split, splits, column, has_sinks, has_lse,
    DV: tl.constexpr, M: tl.constexpr, BLOCK_V: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Store a split's share of a group whose first head is `head`, at `row`, others `step` on.

    Of several splits, each leaves its output, its maximum and its sum, which is -1 where it has no
    key. A split that is `ALONE` leaves the result: zeros and -inf without a key, whatever the sinks
    are.
    """
    member = tl.arange(0, M)
    mask = member < members
    rows = (row + member * step).to(tl.int64)
    lanes = column + tl.arange(0, BLOCK_V)
    wide_mask = mask[:, None] & (lanes < DV)[None, :]
    if ALONE:
        sink = _load_sinks(sinks_x, sinks_f, head + member, mask, has_sinks)
        factor, log = _join_sinks(most, total, sink)
        scaled = tl.where(found != 0, acc * factor[:, None], 0.0)
        at = out + rows[:, None] * DV + lanes[None, :]
        tl.store(at, scaled.to(out.dtype.element_ty), mask=wide_mask)
        tl.store(lse + rows, tl.where(found != 0, log, float("-inf")), mask=mask & (has_lse != 0))
    else:
        line = rows * splits + split
        tl.store(partial + line[:, None] * DV + lanes[None, :], acc, mask=wide_mask & (found != 0))
        tl.store(peaks + line, most, mask=mask)
        tl.store(sums + line, tl.where(found != 0, total, -1.0), mask=mask)


@triton.jit
def _merge_kernel(
    out, lse, sinks_x, sinks_f, partial, peaks, sums, heads, tokens, has_sinks, has_lse,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one query, in their order."""
    row = tl.program_id(0) // COLUMNS
    lanes = tl.program_id(0) % COLUMNS * BLOCK_V + tl.arange(0, BLOCK_V)
    sink = _load_sinks(sinks_x, sinks_f, row // tokens % heads, True, has_sinks)
    split = tl.arange(0, SPLITS)
    first = row.to(tl.int64) * SPLITS
    pieces = partial + first * DV + (split * DV)[:, None] + lanes[None, :]
    wait_for_previous(OVERLAPPED)
    if DV % BLOCK_V == 0:
        pieces = tl.load(pieces)
    else:
        pieces = tl.load(pieces, mask=(lanes < DV)[None, :], other=0.0)
    peak, total = tl.load(peaks + first + split), tl.load(sums + first + split)
    # What a share without keys left is undefined.
    empty = total < 0
    most = tl.max(peak)
    # All logits -inf: any finite reference gives weights of zero, not NaN.
    reference = tl.where(most == float("-inf"), 0.0, most)
    weights = tl.where(empty, 0.0, tl.exp2(peak - reference))
    acc = tl.sum(weights[:, None] * tl.where(empty[:, None], 0.0, pieces), axis=0)
    found = tl.max((empty == 0).to(tl.int32))
    factor, log = _join_sinks(most, tl.sum(tl.where(empty, 0.0, weights * total)), sink)
    scaled = tl.where(found != 0, acc * factor, 0.0)
    tl.store(out + row.to(tl.int64) * DV + lanes, scaled.to(out.dtype.element_ty), mask=lanes < DV)
    first_column = tl.program_id(0) % COLUMNS == 0
    log = tl.where(found != 0, log, float("-inf"))
    tl.store(lse + row, log, mask=(has_lse != 0) & first_column)


def tiling(
    dtype: str, head_dim: int, value_dim: int, members: int, keys: int
) -> dict[str, int | bool]:
    """Tile sizes of the attention of `members` heads that share a selection."""
    ieee = in_fp32(dtype)
    depth, lanes = pow2(head_dim), pow2(value_dim)
    block_v = min(lanes, 128 if ieee else 512)
    return {
        "D": head_dim,
        "DV": value_dim,
        "M": min(max(pow2(members), 16), 64),
        "N": keys,
        "BLOCK_D": min(depth, 32) if ieee else depth if depth <= 256 else 128,
        "BLOCK_V": block_v,
        "IEEE": ieee,
    }


def shares_of(config: Config, keys: int) -> tuple[int, int]:
    """Shares of up to so many selected keys, and the stages of the loop over one (0: no loop)."""
    shares = min(config["splits"], pow2(max(-(-keys // config["keys"]), 1)))
    stages = config["stages"]
    return shares, max(stages, 1) if keys > shares * config["keys"] else stages


def result_types(dtype: str) -> tuple[str, ...]:
    """Types of `out`, `lse`, sinks (twice), and what splits leave: outputs, maxima and sums."""
    return POINTERS[dtype] + ":16", "*fp32", POINTERS[dtype], "*fp32", *["*fp32:16"] * 3


class Results(NamedTuple):
    """Where the attention of a call leaves what it finds: arguments of kernels, and flags."""

    addresses: tuple[Address, ...]
    has_sinks: int
    has_lse: int


def results_of(launches: LaunchList, call: Any, splits: int) -> Results:
    """Outputs, lse, sinks (twice), and what splits leave: outputs, maxima and sums."""
    batch, heads, tokens, _ = call.q.shape
    out = launches.output("out")
    lse = launches.output("lse") if call.return_lse else NONE
    narrow, wide, has_sinks = optional(launches, "sink_logits", call.problem.dtype)
    lines = batch * heads * tokens * splits if splits > 1 else 0
    left = (launches.piece(lines * size) for size in (call.problem.value_dim, 1, 1))
    return Results((out, lse, narrow, wide, *left), has_sinks, int(call.return_lse))


def launch_merge(
    launches: LaunchList, call: Any, results: Results, splits: int, overlapped: bool
) -> None:
    """Write the launch that merges splits, where there are several."""
    if splits == 1:
        return
    batch, heads, tokens, _ = call.q.shape
    lanes = call.problem.value_dim
    # As much as one warp holds well.
    block_v = min(max(1024 // splits, 16), pow2(lanes))
    columns = -(-lanes // block_v)
    kernel = bind(
        _merge_kernel,
        (*result_types(call.problem.dtype), *["i32"] * 4),
        {"DV": lanes, "SPLITS": splits, "BLOCK_V": block_v, "COLUMNS": columns,
         "OVERLAPPED": overlapped},
        1,
        overlapped=overlapped,
    )  # fmt: skip
    launch(
        launches, kernel, batch * heads * tokens * columns, results.addresses, heads, tokens,
        results.has_sinks, results.has_lse,
    )  # fmt: skip
