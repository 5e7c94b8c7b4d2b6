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

import triton
import triton.language as tl

from hata.call import HashAttend
from hata.launches import LaunchList, row_step

from .attend import (
    attend_positions,
    finish_split,
    launch_merge,
    result_types,
    results_of,
    shares_of,
    tiling,
)
from .counting import budget_scalars, counting, lay_out, parts_of
from .encode_step import write_step
from .hamming_topk import launch_planes
from .launch import bind, launch
from .layout import data_pointer, row_step_type, steps, vector
from .pieces import budget_of, let_next_start, place_of, visible
from .scan import launch_scan
from .select import launch_select


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


def write(launches: LaunchList, call: HashAttend) -> None:
    """Write the launches of a decode step."""
    views, problem, config = launches.views, call.problem, call.config
    batch, heads, tokens, depth = call.q.shape
    kv_heads, slots, lanes = problem.kv_heads, call.keys.shape[2], problem.value_dim
    rows, members = batch * kv_heads * tokens, heads // kv_heads
    given, early = views["q_codes"], config["early"]
    overlapped = bool(config["overlap"]) and launches.gpu.overlaps
    group = members if given is None else given.shape[1] // kv_heads
    how = counting(group, problem.bits, problem.norms)
    parts = parts_of(config, slots)
    splits, stages = shares_of(config, max(call.k, call.dense_below))
    at = lay_out(launches, how, rows, call, parts)
    positions = launches.piece(rows * call.k)
    results = results_of(launches, call, splits)

    if given is not None:
        launch_planes(launches, call, at, how, kv_heads)
    if given is None or call.fresh:
        write_step(launches, call, at, how.planes, overlapped)
    row_sizes = rows, kv_heads, parts
    launch_scan(launches, call, at, how, row_sizes, "key_codes", overlapped)
    launch_select(launches, call, at, how, row_sizes, positions, overlapped)

    wide = vector(views["q"], views["keys"], views["values"])
    sizes = tiling(problem.dtype, depth, lanes, members, config["keys"])
    columns, blocks = -(-lanes // sizes["BLOCK_V"]), -(-members // sizes["M"])
    data = data_pointer(problem.dtype, wide)
    key_strides, value_strides = steps(views["keys"], wide), steps(views["values"], wide)
    attend = bind(
        _hash_attend_kernel,
        (
            data, data, data, *result_types(problem.dtype), "*i32", "*i32", "*i32",
            *["i32"] * 8, "i64", "i32", "i32", "fp32", "fp32", "i32", "i32", *["i64"] * 5,
            row_step_type(key_strides[2], slots), "i64", "i64",
            row_step_type(value_strides[2], slots),
        ),
        {**sizes, "VECTOR": wide, "COLUMNS": columns, "BLOCKS": blocks,
         "STAGES": stages, "ALONE": splits == 1, "SINGLE": tokens == 1, "EARLY": early != "none",
         "OVERLAPPED": overlapped},
        config["warps"],
        max(stages, 1),
        overlapped,
    )  # fmt: skip
    arrays = [launches.address(name) for name in ("q", "keys", "values")]
    arrays += [*results.addresses, positions]
    arrays += [launches.address(name) for name in ("lengths", "starts")]
    launch(
        launches, attend, rows * blocks * columns * splits, arrays,
        kv_heads, members, tokens, slots, splits.bit_length() - 1,
        row_step(views["lengths"]), row_step(views["starts"]), *budget_scalars(call.budget)[:3],
        call.dense_below, call.scale, call.softcap or 0.0, *results[1:],
        *steps(views["q"], wide), *key_strides, *value_strides,
    )  # fmt: skip
    launch_merge(launches, call, results, splits, overlapped)
