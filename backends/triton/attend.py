"""Attention over gathered keys, in pieces: one split, its result, and the merge of splits.

The heads that share a selection are the rows of one tensor-core product, so a gathered key serves
all of them. A split runs the online softmax over its share of the positions and leaves a sum, a
maximum and an unnormalised output; they are merged in the order of the splits, so the bits of an
output depend on its own row alone.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any

import triton
import triton.language as tl

from hata.backend import Config
from hata.launches import NONE, LaunchList
from hata.problem import Problem, pow2

from .launch import Pointer, group, launch
from .layout import POINTERS, in_fp32, optional
from .pieces import defer, griddepcontrol_wait

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
def _attend_tile(state, query, rows, at, span, members, column, sizes, strides, C: tl.constexpr):
    """One step of the online softmax: N positions from rank `at` on.

    Arguments are those of `attend_positions`; `state` is `(acc, m_i, l_i)`.

    Returns:
        `acc`, `m_i` and `l_i` as `attend_positions` does, and which positions are slots [N].
    """
    acc, m_i, l_i = state
    q, keys, values, positions = rows
    _, end, contiguous, origin = span
    member = tl.arange(0, C.M)
    lanes = tl.arange(0, C.BLOCK_V) + column
    depth = tl.arange(0, C.BLOCK_D)
    rank = at + tl.arange(0, C.N)
    inside = rank < end
    # Where tiles are pipelined, nothing may stand between their loads.
    griddepcontrol_wait(C.WAITS and C.STAGES < 2)
    position = tl.load(positions + rank, mask=inside & (contiguous == 0), other=-1)
    position = tl.where(inside & (contiguous != 0), origin + rank, position)
    if C.CHECKED:
        inside = (position >= 0) & (position < sizes.slots)
    logits = tl.zeros([C.M, C.N], tl.float32)
    # Products are as wide as strides are.
    key_rows = (
        keys + (position * strides.key_cache.s).to(tl.int64)[:, None] * C.VECTOR + depth[None, :]
    )
    value_rows = (
        values
        + (position * strides.value_cache.s).to(tl.int64)[:, None] * C.VECTOR
        + lanes[None, :]
    )
    value_mask = inside[:, None]
    if C.DV % C.BLOCK_V != 0:
        value_mask = value_mask & (lanes < C.DV)[None, :]
    if C.BLOCK_D >= C.D:
        # Both rows of a position are in flight before either is used.
        key_mask = inside[:, None]
        if C.BLOCK_D > C.D:
            key_mask = key_mask & (depth < C.D)[None, :]
        key = tl.load(key_rows, mask=key_mask, other=0.0)
        value = tl.load(value_rows, mask=value_mask, other=0.0)
        if C.STAGES < 2:
            key = defer(key)
        logits = _add_logits(logits, query, key, C.IEEE)
    else:
        for i in tl.static_range(0, C.D, C.BLOCK_D):
            mask = (i + depth < C.D)[None, :]
            query = tl.load(q + i, mask=(member < members)[:, None] & mask, other=0.0)
            key = tl.load(key_rows + i, mask=inside[:, None] & mask, other=0.0)
            logits = _add_logits(logits, query, key, C.IEEE)
        value = tl.load(value_rows, mask=value_mask, other=0.0)
    logits = _capped(logits, sizes.scale, sizes.softcap)
    logits = tl.where(inside[None, :], logits, float("-inf"))
    m_ij = tl.max(logits, axis=1)
    if C.STAGES > 0:
        m_ij = tl.maximum(m_i, m_ij)
    # All logits -inf so far: any finite reference gives weights of zero, not NaN.
    reference = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    p = tl.exp2(logits - reference[:, None])
    if C.STAGES == 0:
        # Nothing came before.
        l_i = tl.sum(p, axis=1)
    else:
        alpha = tl.exp2(m_i - reference)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc *= alpha[:, None]
    if C.STAGES < 2:
        value = defer(value)
    if C.IEEE:
        acc = tl.dot(p, value.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(p.to(value.dtype), value, acc)
    return acc, m_ij, l_i, inside


@triton.jit
def attend_positions(rows, span, members, column, sizes, strides, C: tl.constexpr):
    """Online softmax of up to M heads over the positions of a split.

    `rows`: pointers to the first head's query, to the head's keys and values, and to positions.
    `span`: first and last rank (exclusive); whether positions are `origin + rank`; `origin`.
    With `WAITS` it waits for the launch before, as late as it can: what stands behind a wait is
    computed behind it. `CHECKED`: positions may be negative, or otherwise no slots, and are then
    skipped. `STAGES` 0: there are no more than `N` of them, and no loop.

    Returns:
        `acc` [M, BLOCK_V] unnormalised, `m_i` [M] (largest logit in units of log 2), `l_i` [M], and
        whether there was any key.
    """
    q, keys, values, positions = rows
    first, end, _, _ = span
    member = tl.arange(0, C.M)
    depth = tl.arange(0, C.BLOCK_D)
    m_i = tl.full([C.M], float("-inf"), tl.float32)
    l_i = tl.zeros([C.M], tl.float32)
    acc = tl.zeros([C.M, C.BLOCK_V], tl.float32)
    found = tl.zeros([C.N], tl.int32)
    q += member[:, None] * (strides.q.h * C.VECTOR) + depth[None, :]
    query = 0.0
    if C.BLOCK_D >= C.D:
        query = tl.load(q, mask=(member < members)[:, None] & (depth < C.D)[None, :], other=0.0)
    griddepcontrol_wait(C.WAITS and C.STAGES > 1)
    if C.STAGES == 0:
        acc, m_i, l_i, inside = _attend_tile(
            (acc, m_i, l_i), query, (q, keys, values, positions), first, span, members, column,
            sizes, strides, C,
        )  # fmt: skip
        found = inside.to(tl.int32)
    else:
        for at in tl.range(first, end, C.N, num_stages=C.STAGES):
            acc, m_i, l_i, inside = _attend_tile(
                (acc, m_i, l_i), query, (q, keys, values, positions), at, span, members, column,
                sizes, strides, C,
            )  # fmt: skip
            if C.CHECKED:
                found |= inside.to(tl.int32)
        # Launches wait for one another in a chain, which an empty split must not leave.
        griddepcontrol_wait(C.WAITS and C.STAGES < 2)
    any_key = (first < end).to(tl.int32)
    if C.CHECKED:
        any_key = tl.max(found)
    return acc, m_i, l_i, any_key


@triton.jit
def _load_sinks(arrays, sizes, head, mask):
    """Sink logits in units of log 2: in the dtype of q (1), in float32 (2), or -inf for none."""
    nothing = float("-inf")
    narrow = tl.load(arrays.sinks_x + head, mask=mask & (sizes.has_sinks == 1), other=nothing)
    wide = tl.load(arrays.sinks_f + head, mask=mask & (sizes.has_sinks == 2), other=nothing)
    return tl.where(sizes.has_sinks == 1, narrow.to(tl.float32), wide) * LOG2E


@triton.jit
def _join_sinks(m_i, l_i, sink):
    """Factor to scale outputs by, and natural log of the sum of weights, with sinks in it."""
    joined = tl.maximum(m_i, sink)
    reference = tl.where(joined == float("-inf"), 0.0, joined)
    alpha = tl.exp2(m_i - reference)
    l_i = l_i * alpha + tl.exp2(sink - reference)
    return alpha / l_i, (reference + tl.log2(l_i)) * LN2


@triton.jit
def finish_split(state, place, arrays, sizes, C: tl.constexpr):
    """Store a split's share of a group of heads.

    `state` is what `attend_positions` returns; `place`: the first head's row of the output (others
    follow `tokens` rows apart), that head, how many there are, the split, the number of splits, and
    the first column. Of several splits, each leaves its output, its maximum and its sum, which is
    -1 where it has no key. A split that is `ALONE` leaves the result: zeros and -inf without a key,
    whatever the sinks are.
    """
    acc, m_i, l_i, found = state
    row, head, members, split, splits, column = place
    member = tl.arange(0, C.M)
    mask = member < members
    rows = (row + member * sizes.tokens).to(tl.int64)
    lanes = column + tl.arange(0, C.BLOCK_V)
    wide_mask = mask[:, None] & (lanes < C.DV)[None, :]
    if C.ALONE:
        sink = _load_sinks(arrays, sizes, head + member, mask)
        factor, log = _join_sinks(m_i, l_i, sink)
        scaled = tl.where(found != 0, acc * factor[:, None], 0.0)
        at = arrays.out + rows[:, None] * C.DV + lanes[None, :]
        tl.store(at, scaled.to(arrays.out.dtype.element_ty), mask=wide_mask)
        log = tl.where(found != 0, log, float("-inf"))
        tl.store(arrays.lse + rows, log, mask=mask & (sizes.has_lse != 0))
    else:
        line = rows * splits + split
        at = arrays.acc_splits + line[:, None] * C.DV + lanes[None, :]
        tl.store(at, acc, mask=wide_mask & (found != 0))
        tl.store(arrays.m_splits + line, m_i, mask=mask)
        tl.store(arrays.l_splits + line, tl.where(found != 0, l_i, -1.0), mask=mask)


@triton.jit
def _merge_kernel(arrays, sizes, C: tl.constexpr):
    """Merge the splits of one head of one query, in their order.

    `arrays`: results (`results_of`). `sizes`: heads, tokens, has_sinks, has_lse.
    """
    row = tl.program_id(0) // C.COLUMNS
    lanes = tl.program_id(0) % C.COLUMNS * C.BLOCK_V + tl.arange(0, C.BLOCK_V)
    sink = _load_sinks(arrays, sizes, row // sizes.tokens % sizes.heads, True)
    split = tl.arange(0, C.SPLITS)
    first = row.to(tl.int64) * C.SPLITS
    acc = arrays.acc_splits + first * C.DV + (split * C.DV)[:, None] + lanes[None, :]
    griddepcontrol_wait(C.PDL)
    if C.DV % C.BLOCK_V == 0:
        acc = tl.load(acc)
    else:
        acc = tl.load(acc, mask=(lanes < C.DV)[None, :], other=0.0)
    m_i, l_i = tl.load(arrays.m_splits + first + split), tl.load(arrays.l_splits + first + split)
    # What a split without keys left is undefined.
    empty = l_i < 0
    m_all = tl.max(m_i)
    # All logits -inf: any finite reference gives weights of zero, not NaN.
    reference = tl.where(m_all == float("-inf"), 0.0, m_all)
    alpha = tl.where(empty, 0.0, tl.exp2(m_i - reference))
    acc = tl.sum(alpha[:, None] * tl.where(empty[:, None], 0.0, acc), axis=0)
    found = tl.max((empty == 0).to(tl.int32))
    factor, log = _join_sinks(m_all, tl.sum(tl.where(empty, 0.0, alpha * l_i)), sink)
    scaled = tl.where(found != 0, acc * factor, 0.0)
    at = arrays.out + row.to(tl.int64) * C.DV + lanes
    tl.store(at, scaled.to(arrays.out.dtype.element_ty), mask=lanes < C.DV)
    first_column = tl.program_id(0) % C.COLUMNS == 0
    log = tl.where(found != 0, log, float("-inf"))
    tl.store(arrays.lse + row, log, mask=(sizes.has_lse != 0) & first_column)


def tiling(problem: Problem, members: int, config: Config, keys: int) -> dict[str, int | bool]:
    """Constants of the attention of `members` heads that share a selection of up to `keys` keys."""
    ieee = in_fp32(problem.dtype)
    depth, lanes = pow2(problem.head_dim), pow2(problem.value_dim)
    block_v = min(lanes, 128 if ieee else 512)
    rows = min(max(pow2(members), 16), 64)
    splits, stages = splits_of(config, keys)
    return {
        "D": problem.head_dim,
        "DV": problem.value_dim,
        "M": rows,
        "N": config["keys"],
        "BLOCK_D": min(depth, 32) if ieee else depth if depth <= 256 else 128,
        "BLOCK_V": block_v,
        "COLUMNS": -(-problem.value_dim // block_v),
        "BLOCKS": -(-members // rows),
        "STAGES": stages,
        "ALONE": splits == 1,
        "IEEE": ieee,
        "SINGLE": problem.tokens == 1,
    }


def splits_of(config: Config, keys: int) -> tuple[int, int]:
    """Splits of up to so many selected keys, and the stages of the loop over one (0: no loop)."""
    splits = min(config["attend_splits"], pow2(max(-(-keys // config["keys"]), 1)))
    stages = config["stages"]
    return splits, max(stages, 1) if keys > splits * config["keys"] else stages


def results_of(
    launches: LaunchList, call: Any, splits: int
) -> tuple[dict[str, Pointer], dict[str, int]]:
    """What the attention writes and the sinks, as arrays, and flags of what there is."""
    dtype, (batch, heads, tokens, _) = call.problem.dtype, call.q.shape
    sinks_x, sinks_f, has_sinks = optional(launches, "sink_logits", dtype)
    lines = batch * heads * tokens * splits if splits > 1 else 0
    arrays = {
        "out": Pointer(launches.output("out"), POINTERS[dtype] + ":16"),
        "lse": Pointer(launches.output("lse") if call.return_lse else NONE, "*fp32"),
        "sinks_x": sinks_x,
        "sinks_f": sinks_f,
        "acc_splits": Pointer(launches.piece(lines * call.problem.value_dim), "*fp32:16"),
        "m_splits": Pointer(launches.piece(lines), "*fp32:16"),
        "l_splits": Pointer(launches.piece(lines), "*fp32:16"),
    }
    return arrays, {"has_sinks": has_sinks, "has_lse": int(call.return_lse)}


def launch_merge(
    launches: LaunchList,
    call: Any,
    results: tuple[dict[str, Pointer], dict[str, int]],
    splits: int,
    pdl: bool,
) -> None:
    """Write the launch that merges splits, where there are several."""
    if splits == 1:
        return
    batch, heads, tokens, _ = call.q.shape
    lanes, (arrays, flags) = call.problem.value_dim, results
    # As much as one warp holds well.
    block_v = min(max(1024 // splits, 16), pow2(lanes))
    columns = -(-lanes // block_v)
    constants = group(DV=lanes, SPLITS=splits, BLOCK_V=block_v, COLUMNS=columns, PDL=pdl)
    groups = group(**arrays), group(heads=heads, tokens=tokens, **flags)
    grid = batch * heads * tokens * columns
    launch(launches, _merge_kernel, grid, groups, constants, 1, pdl=pdl)
