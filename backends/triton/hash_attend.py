"""hash_attend: one decode step in five short launches (arXiv 2506.02572, Algorithm 3).

1. `encode_step._step_kernel`: codes of the fresh keys in place, bit planes of the queries, zeroed
   counters.
2. `scan._scan_kernel`: the keys to select by and their histogram, one pass over the codes. (With
   key norms two short launches refine the threshold.)
3. `select._select_kernel`: the positions of a row's selected keys, in ascending order.
4. `_hash_attend_kernel`: each program takes an equal share of a row's *selected* keys, whichever
   parts they lie in, and attends to them.
5. `attend._merge_kernel`: the shares of a row, in their order.

From sm_90 on, every launch after the first starts while the one before it drains, reads what does
not depend on it, and then waits. A launch costs some 0.7 us in a graph, less than the shared work
of a fused kernel did; see docs/perf/triton.md.

A query that sees no more keys than its budget, or than `dense_below`, takes all of them: nothing is
scored for it, and the attention walks its keys in place. Which regime holds is decided on the
device, so one captured graph serves both.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any

import triton
import triton.language as tl

from hata.arrays import ITEMSIZE, Framework
from hata.backend import Budget, Config
from hata.problem import Problem

from .attend import (
    attend_positions,
    bind_merge,
    finish_split,
    nothing,
    result_types,
    room_for_splits,
    shares_of,
    tiling,
)
from .counting import budget_scalars, counting, lay_out, parts_of
from .encode_step import write_step
from .hamming_topk import bind_planes
from .launch import bind, multiplies_bits, overlaps
from .pieces import budget_of, let_next_start, place_of, visible
from .plan import (
    Plan,
    Scratch,
    code_pointer,
    code_steps,
    data_pointer,
    norm_steps,
    planned,
    row_step,
    row_step_type,
    scanned_words,
    steps,
    vector,
    words,
)
from .scan import bind_scan
from .select import Fetched, bind_select


@triton.jit
def _hash_attend_kernel(
    q, keys, values, out, lse, sinks_x, sinks_f, partial, peaks, sums, positions, lengths, starts,
    kv_heads, members, tokens, slots, log_splits, length_step, start_step,
    k, ratio, least, dense_below, scale, softcap, has_sinks, has_lse,
    q_b, q_h, q_t, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr, SINGLE: tl.constexpr,
    EARLY: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAPPED & EARLY)
    splits = 1 << log_splits
    split = tl.program_id(0) & (splits - 1)
    rest = tl.program_id(0) >> log_splits
    column = rest % COLUMNS * BLOCK_V
    block = rest // COLUMNS % BLOCKS
    row = rest // COLUMNS // BLOCKS
    batch, kv_head, token = place_of(row, kv_heads, tokens, SINGLE)
    head = kv_head * members + block * M
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    seen = stop - start
    budget = budget_of(seen, k, ratio, least)
    everything = seen <= tl.maximum(budget, dense_below)
    taken = seen if everything else budget
    size = tl.maximum(tl.cdiv((taken + splits - 1) >> log_splits, N) * N, N)
    first = split * size
    acc, most, total, found = attend_positions(
        q + (batch * q_b + head * q_h + token * q_t) * VECTOR,
        keys + (batch * keys_b + kv_head * keys_h) * VECTOR,
        values + (batch * values_b + kv_head * values_h) * VECTOR,
        positions + row.to(tl.int64) * k, first, tl.minimum(first + size, taken),
        everything.to(tl.int32), start, slots, scale, softcap,
        members - block * M, q_h, keys_s, values_s, column,
        D, DV, M, N, BLOCK_D, BLOCK_V, IEEE, VECTOR, STAGES, False, OVERLAPPED,
    )  # fmt: skip
    let_next_start(OVERLAPPED & (not EARLY))
    finish_split(
        out, lse, sinks_x, sinks_f, partial, peaks, sums,
        (batch * kv_heads * members + head) * tokens + token, head,
        tl.minimum(members - block * M, M), tokens, acc, most, total, found,
        split, splits, column, has_sinks, has_lse, DV, M, BLOCK_V, ALONE,
    )  # fmt: skip


def write_hash_attend(
    plan: Plan,
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    key_codes: Any,
    projection: Any,
    bias: Any,
    query_projection: Any,
    query_bias: Any,
    q_codes: Any,
    lengths: Any,
    starts: Any,
    key_norms: Any,
    sink_logits: Any,
    fresh: int,
    dense_below: int,
    budget: Budget,
    scale: float,
    softcap: float | None,
    return_lse: bool,
) -> None:
    """Write the launches of a decode step into a plan."""
    batch, heads, tokens, depth = fw.shape(q)
    _, kv_heads, slots, lanes = fw.shape(values)
    bits = fw.shape(projection)[2]
    dtype = problem.dtype
    out = plan.output((batch, heads, tokens, lanes), dtype)
    lse = plan.output((batch, heads, tokens), "float32") if return_lse else None
    rows, members = batch * kv_heads * tokens, heads // kv_heads
    group = members if q_codes is None else fw.shape(q_codes)[1] // kv_heads
    fresh, dense_below = min(fresh, slots), min(dense_below, slots)
    # A budget of more keys than there are slots is one of all of them, and costs no more.
    budget = budget._replace(k=max(min(budget.k, slots), 1))
    overlapped, early = overlaps(bool(config["overlap"]), q), config["early"]

    how = counting(group, bits, key_norms is not None)
    sizes = tiling(dtype, depth, lanes, members, config["keys"])
    parts = parts_of(config, slots)
    most = min(max(budget.k, dense_below), max(slots, 1))
    splits, stages = shares_of(config, most)
    single = tokens == 1
    columns, blocks = -(-lanes // sizes["BLOCK_V"]), -(-members // sizes["M"])
    scratch = Scratch()
    at = lay_out(scratch, how, rows, slots, bits, parts)
    positions_at = scratch.piece(rows * budget.k)
    left_at = room_for_splits(scratch, batch * heads * tokens, splits, lanes)
    memory = plan.output((scratch.size,), "uint8")

    wide = vector(fw, q, keys, values)
    unit, together, per_vector = scanned_words(fw, key_codes)
    code_strides = steps(fw, key_codes, code_steps(unit, together))
    planes, counters, scores, cumulated, state, below = at.references(plan, memory, how)
    words_of_scores = plan.address(memory, "*i32:16", at.scores)
    positions = plan.address(memory, "*i32", positions_at)
    spans = plan.address(lengths, "*i32"), plan.address(starts, "*i32")
    span_steps = row_step(fw, lengths), row_step(fw, starts)
    limits = budget_scalars(budget)
    row_sizes = at.scores_row, at.counters_row
    scan, rounds = bind_scan(
        config,
        how,
        bits,
        group,
        kv_heads,
        1,
        key_norms is not None,
        parts,
        single,
        unit,
        together,
        per_vector,
        code_strides[2],
        multiplies_bits(config["binary"], q),
        overlapped,
        early == "all",
    )
    data, result = data_pointer(dtype, wide), result_types(dtype)
    key_strides, value_strides = steps(fw, keys, wide), steps(fw, values, wide)
    key_step = row_step_type(key_strides[2], slots)
    fetched = Fetched(data, key_step, wide, depth * ITEMSIZE[dtype] * bool(config["fetch"]))
    attend = bind(
        _hash_attend_kernel,
        (
            data, data, data, *result, "*i32", "*i32", "*i32",
            *["i32"] * 8, "i64", "i32", "i32", "fp32", "fp32", "i32", "i32", *["i64"] * 5,
            key_step, "i64", "i64", row_step_type(value_strides[2], slots),
        ),
        {**sizes, "VECTOR": wide, "COLUMNS": columns, "BLOCKS": blocks,
         "STAGES": stages, "ALONE": splits == 1, "SINGLE": single, "EARLY": early != "none",
         "OVERLAPPED": overlapped},
        config["warps"],
        max(stages, 1),
        overlapped,
    )  # fmt: skip
    narrow_sinks, wide_sinks, has_sinks = plan.optional(fw, sink_logits, dtype)
    results = (
        plan.address(out, result[0]), plan.address(lse, "*fp32"), narrow_sinks, wide_sinks,
        *(plan.address(memory, "*fp32", offset) for offset in left_at),
    )  # fmt: skip
    if q_codes is not None:
        q_unit, q_together = words(fw, q_codes)
        plan.launch(
            bind_planes(how, bits, group, q_unit, q_together),
            rows * (bits // 32),
            plan.address(q_codes, code_pointer(q_unit, q_together)), planes, counters,
            kv_heads, tokens, at.counters_row, *steps(fw, q_codes, q_unit),
        )  # fmt: skip
    if q_codes is None or fresh:
        write_step(
            plan, problem, config, fw, q, keys, projection, bias, query_projection, query_bias,
            key_codes, key_norms, planes, counters, (*spans, *span_steps), how.planes,
            q_codes is None, overlapped, fresh, slots, at.counters_row,
        )  # fmt: skip
    plan.launch(
        scan,
        rows * parts,
        plan.address(key_codes, code_pointer(unit, together)), planes,
        plan.address(key_norms, "*fp16"), scores, counters, cumulated, *spans,
        tokens, slots, fresh, *span_steps, *limits, dense_below, *row_sizes,
        *code_strides, *norm_steps(fw, key_norms),
    )  # fmt: skip
    for refine in rounds:
        plan.launch(
            refine,
            rows * parts,
            scores, counters, cumulated, state, below, *spans,
            kv_heads, tokens, slots, *span_steps, *limits, dense_below, *row_sizes,
        )  # fmt: skip
    plan.launch(
        bind_select(
            config, how, kv_heads, parts, single, False, overlapped, early == "all", fetched
        ),
        rows * parts,
        positions, words_of_scores, counters, cumulated, state, below, *spans,
        plan.address(keys, data), tokens, slots, *span_steps, limits[0], at.scores_row, *limits[1:],
        dense_below, *key_strides,
    )  # fmt: skip
    plan.launch(
        attend,
        rows * blocks * columns * splits,
        plan.address(q, data), plan.address(keys, data), plan.address(values, data), *results,
        positions, *spans,
        kv_heads, members, tokens, slots, splits.bit_length() - 1, *span_steps,
        *limits[:3], dense_below, scale, softcap or 0.0, has_sinks,
        int(return_lse),
        *steps(fw, q, wide), *key_strides, *value_strides,
    )  # fmt: skip
    if splits > 1:
        merge, merge_columns = bind_merge(dtype, lanes, splits, overlapped)
        plan.launch(
            merge,
            batch * heads * tokens * merge_columns,
            *results, heads, tokens, has_sinks, int(return_lse),
        )  # fmt: skip


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    key_codes: Any,
    projection: Any,
    bias: Any,
    query_projection: Any,
    query_bias: Any,
    q_codes: Any,
    fresh: int,
    dense_below: int,
    lengths: Any,
    starts: Any,
    budget: Budget,
    key_norms: Any,
    scale: float,
    softcap: float | None,
    sink_logits: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """Launch `hata.hash_attend`."""
    batch, _, tokens, _ = fw.shape(q)
    if batch * tokens == 0:
        return nothing(fw, q, problem, return_lse)
    arrays = (
        q, keys, values, key_codes, projection, bias, query_projection, query_bias, q_codes,
        lengths, starts, key_norms, sink_logits,
    )  # fmt: skip
    options = fresh, dense_below, budget, scale, softcap, return_lse
    made = planned(write_hash_attend, problem, config, fw, arrays, *options)
    return made[0], made[1] if return_lse else None
