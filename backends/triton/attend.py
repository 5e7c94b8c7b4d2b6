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

from hata.arrays import Framework
from hata.problem import Problem, pow2

from .launch import Bound, bind
from .pieces import wait_for_previous
from .plan import POINTERS, in_fp32

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(logits, scale, softcap):
    """Scaled and capped logits, in units of log 2; softcap 0 stands for none."""
    logits *= scale
    if softcap > 0:
        size = tl.exp(-2.0 * tl.abs(logits) / softcap)
        capped = softcap * (1.0 - size) / (1.0 + size)
        logits = tl.where(logits < 0, -capped, capped)
    return logits * LOG2E


@triton.jit
def _add_logits(logits, query, key, IEEE: tl.constexpr):
    if IEEE:
        wide = tl.trans(key.to(tl.float32))
        return tl.dot(query.to(tl.float32), wide, logits, input_precision="ieee")
    else:
        return tl.dot(query, tl.trans(key), logits)


@triton.jit
def attend_positions(
    q, keys, values, positions, first, end, contiguous, origin, slots, scale, softcap, members,
    q_h, keys_s, values_s, column,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Online softmax of up to M heads at `q` over `positions[first:end]`, or origin + rank.

    Where launches overlap, it waits for the positions, with the queries on their way.

    Returns:
        `acc` [M, BLOCK_V] unnormalised, `most` [M] (largest logit in units of log 2), `total` [M],
        and whether there was any key.
    """
    member = tl.arange(0, M)
    lanes = tl.arange(0, BLOCK_V) + column
    depth = tl.arange(0, BLOCK_D)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    found = tl.zeros([N], tl.int32)
    q += member[:, None] * (q_h * VECTOR) + depth[None, :]
    if BLOCK_D >= D:
        query = tl.load(q, mask=(member < members)[:, None] & (depth < D)[None, :], other=0.0)
    wait_for_previous(OVERLAPPED)
    for at in tl.range(first, end, N, num_stages=STAGES):
        rank = at + tl.arange(0, N)
        inside = rank < end
        position = tl.load(positions + rank, mask=inside & (contiguous == 0), other=-1)
        position = tl.where(inside & (contiguous != 0), origin + rank, position)
        inside = (position >= 0) & (position < slots)
        found |= inside.to(tl.int32)
        position = position.to(tl.int64)
        logits = tl.zeros([M, N], tl.float32)
        key_rows = keys + position[:, None] * (keys_s * VECTOR) + depth[None, :]
        value_rows = values + position[:, None] * (values_s * VECTOR) + lanes[None, :]
        value_mask = inside[:, None] & (lanes < DV)[None, :]
        if BLOCK_D >= D:
            # Both rows of a position are on their way before either is used.
            key = tl.load(key_rows, mask=inside[:, None] & (depth < D)[None, :], other=0.0)
            value = tl.load(value_rows, mask=value_mask, other=0.0)
            logits = _add_logits(logits, query, key, IEEE)
        else:
            for i in tl.static_range(0, D, BLOCK_D):
                mask = (i + depth < D)[None, :]
                query = tl.load(q + i, mask=(member < members)[:, None] & mask, other=0.0)
                key = tl.load(key_rows + i, mask=inside[:, None] & mask, other=0.0)
                logits = _add_logits(logits, query, key, IEEE)
            value = tl.load(value_rows, mask=value_mask, other=0.0)
        logits = tl.where(inside[None, :], _capped(logits, scale, softcap), float("-inf"))
        grown = tl.maximum(most, tl.max(logits, axis=1))
        # All logits -inf so far: any finite reference gives weights of zero, not NaN.
        reference = tl.where(grown == float("-inf"), 0.0, grown)
        weights = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(most - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        acc *= shrink[:, None]
        if IEEE:
            acc = tl.dot(weights, value.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(value.dtype), value, acc)
        most = grown
    return acc, most, total, tl.max(found)


@triton.jit
def store_result(
    out, lse, sinks_x, sinks_f, row, head, mask, acc, most, total, found, column,
    has_sinks, has_lse, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Join the sinks, normalise and store: `row` [M] are rows of `out`, `head` [M] their heads.

    Heads that found no key (`found` [M or 1, 1] is 0) get zeros and -inf, whatever their sinks are.
    """
    lanes = column + tl.arange(0, BLOCK_V)
    # Sink logits come in the dtype of q (1) or in float32 (2).
    nothing = float("-inf")
    narrow = tl.load(sinks_x + head, mask=mask & (has_sinks == 1), other=nothing).to(tl.float32)
    wide = tl.load(sinks_f + head, mask=mask & (has_sinks == 2), other=nothing)
    sink = tl.where(has_sinks == 1, narrow, wide) * LOG2E
    grown = tl.maximum(most, sink)
    reference = tl.where(grown == nothing, 0.0, grown)
    shrink = tl.exp2(most - reference)
    total = total * shrink + tl.exp2(sink - reference)
    scaled = tl.where(found != 0, acc * (shrink / total)[:, None], 0.0)
    tl.store(
        out + row[:, None] * DV + lanes[None, :],
        scaled.to(out.dtype.element_ty),
        mask=mask[:, None] & (lanes < DV)[None, :],
    )
    joined = tl.where(found != 0, ((reference + tl.log2(total)) * LN2)[:, None], nothing)
    tl.store(lse + row[:, None], joined, mask=mask[:, None] & (has_lse != 0))


@triton.jit
def merge_heads(
    out, lse, sinks_x, sinks_f, partial, stats, row, head, members, step, splits, used, column,
    has_sinks, has_lse,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the splits of up to HEADS heads, in the order of the splits, and store them.

    The first head is `head`, its row of `out` is `row`; the others' rows are `step` apart.
    """
    nothing = float("-inf")
    member = tl.arange(0, HEADS)
    mask = member < members
    rows = (row + member * step).to(tl.int64)
    lanes = column + tl.arange(0, BLOCK_V)
    most = tl.full([HEADS], nothing, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_V], tl.float32)
    for at in range(0, used, BLOCK_S):
        split = at + tl.arange(0, BLOCK_S)
        inside = mask[:, None] & (split < used)[None, :]
        line = rows[:, None] * splits + split[None, :]
        # Written by other programs of this launch: read from the cache that all of them share.
        pieces = tl.load(
            partial + line[:, :, None] * DV + lanes[None, None, :],
            mask=inside[:, :, None] & (lanes < DV)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        peaks = tl.load(stats + line * 3, mask=inside, other=nothing, cache_modifier=".cg")
        sums = tl.load(stats + line * 3 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        any_key = tl.load(stats + line * 3 + 2, mask=inside, other=0.0, cache_modifier=".cg")
        grown = tl.maximum(most, tl.max(peaks, axis=1))
        # All logits -inf so far: any finite reference gives weights of zero, not NaN.
        reference = tl.where(grown == nothing, 0.0, grown)
        weights = tl.exp2(peaks - reference[:, None])
        shrink = tl.exp2(most - reference)
        total = total * shrink + tl.sum(weights * sums, axis=1)
        # What a share without keys left is undefined.
        pieces = tl.where((any_key > 0)[:, :, None], pieces, 0.0)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * pieces, axis=1)
        found = tl.maximum(found, tl.max(any_key, axis=1))
        most = grown
    store_result(
        out, lse, sinks_x, sinks_f, rows, head + member, mask, acc, most, total, found[:, None],
        column, has_sinks, has_lse, DV, BLOCK_V,
    )  # fmt: skip


@triton.jit
def finish_split(
    out, lse, sinks_x, sinks_f, partial, stats, ticket, row, head, members, step,
    acc, most, total, found, split, splits, used, column, has_sinks, has_lse,
    DV: tl.constexpr, M: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Store a split's share of a group whose first head is `head`, at `row`, others `step` on.

    `FUSED`: the last of the `used` splits, by a ticket, merges them; else another launch does.
    """
    member = tl.arange(0, M)
    mask = member < members
    rows = (row + member * step).to(tl.int64)
    if used == 1:
        store_result(
            out, lse, sinks_x, sinks_f, rows, head + member, mask, acc, most, total,
            tl.zeros([1, 1], tl.int32) + found, column, has_sinks, has_lse, DV, BLOCK_V,
        )  # fmt: skip
    else:
        lanes = column + tl.arange(0, BLOCK_V)
        line = rows * splits + split
        tl.store(
            partial + line[:, None] * DV + lanes[None, :],
            acc,
            mask=mask[:, None] & (lanes < DV)[None, :],
        )
        tl.store(stats + line * 3, most, mask=mask)
        tl.store(stats + line * 3 + 1, total, mask=mask)
        tl.store(stats + line * 3 + 2, tl.zeros([M], tl.float32) + found, mask=mask)
        if FUSED:
            # Every thread has stored before the one that takes the ticket releases it.
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1, sem="acq_rel") == used - 1:
                for i in range(0, members, HEADS):
                    merge_heads(
                        out, lse, sinks_x, sinks_f, partial, stats, row + i * step, head + i,
                        members - i, step, splits, used, column, has_sinks, has_lse,
                        DV, BLOCK_V, HEADS, BLOCK_S,
                    )  # fmt: skip


@triton.jit
def _merge_kernel(
    out, lse, sinks_x, sinks_f, partial, stats, heads, tokens, splits,
    has_sinks, has_lse,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One program a head of one query."""
    row = tl.program_id(0) // COLUMNS
    head = row // tokens % heads
    wait_for_previous(OVERLAPPED)
    merge_heads(
        out, lse, sinks_x, sinks_f, partial, stats, row, head, 1, 0,
        splits, splits, tl.program_id(0) % COLUMNS * BLOCK_V, has_sinks, has_lse,
        DV, BLOCK_V, 1, BLOCK_S,
    )  # fmt: skip


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


def merging(members: int, block_v: int, splits: int) -> dict[str, int]:
    """Heads and splits that a merge holds at once."""
    heads = min(pow2(members), max(8192 // block_v, 1))
    return {"HEADS": heads, "BLOCK_S": min(max(8192 // block_v // heads, 1), pow2(splits))}


def result_types(dtype: str) -> tuple[str, ...]:
    """Types of `out`, `lse`, sinks (twice), partial outputs and statistics."""
    return POINTERS[dtype] + ":16", "*fp32", POINTERS[dtype], "*fp32", "*fp32:16", "*fp32"


def bind_merge(
    dtype: str, lanes: int, block_v: int, columns: int, splits: int, overlapped: bool
) -> Bound:
    """The launch that merges splits."""
    return bind(
        _merge_kernel,
        (*result_types(dtype), *["i32"] * 5),
        {"DV": lanes, "BLOCK_V": block_v, "BLOCK_S": merging(1, block_v, splits)["BLOCK_S"],
         "COLUMNS": columns, "OVERLAPPED": overlapped},
        4,
        overlapped=overlapped,
    )  # fmt: skip


def nothing(fw: Framework, q: Any, problem: Problem, return_lse: bool) -> tuple[Any, Any]:
    """The result of a call without queries."""
    batch, heads, tokens, _ = fw.shape(q)
    out = fw.empty((batch, heads, tokens, problem.value_dim), problem.dtype, q)
    return out, fw.empty((batch, heads, tokens), "float32", q) if return_lse else None
