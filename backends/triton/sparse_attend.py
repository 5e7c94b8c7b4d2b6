"""sparse_attend: attention over given positions (arXiv 2506.02572, section 3).

    logit = scale * q . k, softcap * tanh(logit / softcap),  softmax over the given positions

A row's positions are cut in `splits`, one program each; a second launch merges them. The pieces are
in `attend`.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import SparseAttend
from hata.launches import LaunchList

from .attend import (
    attend_positions,
    finish_split,
    launch_merge,
    result_types,
    results_of,
    shares_of,
    tiling,
)
from .launch import bind, launch
from .layout import data_pointer, row_step_type, steps, vector
from .pieces import let_next_start, place_of


@triton.jit
def _attend_kernel(
    q, keys, values, indices, out, lse, sinks_x, sinks_f, partial, peaks, sums,
    index_heads, members, share, tokens, slots, k, log_splits,
    scale, softcap, has_sinks, has_lse,
    q_b, q_h, q_t, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    indices_b, indices_h, indices_t,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr, SINGLE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """A split of the positions of one row, for up to M of the heads that share them."""
    splits = 1 << log_splits
    split = tl.program_id(0) & (splits - 1)
    rest = tl.program_id(0) >> log_splits
    column = rest % COLUMNS * BLOCK_V
    block = rest // COLUMNS % BLOCKS
    row = rest // COLUMNS // BLOCKS
    batch, index_head, token = place_of(row, index_heads, tokens, SINGLE)
    head = index_head * members + block * M
    size = tl.cdiv((k + splits - 1) >> log_splits, N) * N
    acc, most, total, found = attend_positions(
        q + (batch * q_b + head * q_h + token * q_t) * VECTOR,
        keys + (batch * keys_b + (index_head // share) * keys_h) * VECTOR,
        values + (batch * values_b + (index_head // share) * values_h) * VECTOR,
        indices + batch * indices_b + index_head * indices_h + token * indices_t,
        split * size, tl.minimum(split * size + size, k), 0, 0, slots, scale, softcap,
        members - block * M, q_h, keys_s, values_s, column,
        D, DV, M, N, BLOCK_D, BLOCK_V, IEEE, VECTOR, STAGES, True, False,
    )  # fmt: skip
    let_next_start(OVERLAPPED)
    finish_split(
        out, lse, sinks_x, sinks_f, partial, peaks, sums,
        (batch * index_heads * members + head) * tokens + token, head,
        tl.minimum(members - block * M, M), tokens, acc, most, total, found,
        split, splits, column, has_sinks, has_lse, DV, M, BLOCK_V, ALONE,
    )  # fmt: skip


def write(launches: LaunchList, call: SparseAttend) -> None:
    """Write the splits, and where there are several, their merge."""
    views, problem, config = launches.views, call.problem, call.config
    batch, heads, tokens, depth = call.q.shape
    kv_heads, slots, lanes = problem.kv_heads, call.keys.shape[2], problem.value_dim
    index_heads, k = call.indices.shape[1], call.indices.shape[3]
    members = heads // index_heads
    wide = vector(views["q"], views["keys"], views["values"])
    sizes = tiling(problem.dtype, depth, lanes, members, config["keys"])
    splits, stages = shares_of(config, k)
    overlapped = bool(config["overlap"]) and launches.gpu.overlaps
    columns, blocks = -(-lanes // sizes["BLOCK_V"]), -(-members // sizes["M"])
    data = data_pointer(problem.dtype, wide)
    key_strides, value_strides = steps(views["keys"], wide), steps(views["values"], wide)
    results = results_of(launches, call, splits)
    attend = bind(
        _attend_kernel,
        (
            data, data, data, "*i32", *result_types(problem.dtype),
            *["i32"] * 7, "fp32", "fp32", "i32", "i32", *["i64"] * 5,
            row_step_type(key_strides[2], slots), "i64", "i64",
            row_step_type(value_strides[2], slots),
            *["i64"] * 3,
        ),
        {**sizes, "VECTOR": wide, "COLUMNS": columns, "BLOCKS": blocks,
         "STAGES": stages, "ALONE": splits == 1, "SINGLE": tokens == 1,
         "OVERLAPPED": overlapped},
        config["warps"],
        max(stages, 1),
    )  # fmt: skip
    arrays = [launches.address(name) for name in ("q", "keys", "values", "indices")]
    launch(
        launches, attend, batch * index_heads * tokens * blocks * columns * splits,
        (*arrays, *results.addresses),
        index_heads, members, index_heads // kv_heads, tokens, slots, k,
        splits.bit_length() - 1, call.scale, call.softcap or 0.0, *results[1:],
        *steps(views["q"], wide), *key_strides, *value_strides, *steps(views["indices"]),
    )  # fmt: skip
    launch_merge(launches, call, results, splits, overlapped)
