"""sparse_attend: attention over given positions (arXiv 2506.02572, section 3).

    logit = scale * q . k, softcap * tanh(logit / softcap),  softmax over the given positions

A row's positions are cut in `splits`, one program each; a second launch merges them. The pieces are
in `attend`.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any

import triton
import triton.language as tl

from hata.arrays import Framework
from hata.backend import Config
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
from .launch import bind, overlaps
from .pieces import let_next_start, place_of
from .plan import Plan, Scratch, data_pointer, planned, row_step_type, steps, vector


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


def write_sparse_attend(
    plan: Plan,
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    indices: Any,
    sink_logits: Any,
    scale: float,
    softcap: float | None,
    return_lse: bool,
) -> None:
    """Write the splits, and where there are several, their merge into a plan."""
    batch, heads, tokens, depth = fw.shape(q)
    _, kv_heads, slots, lanes = fw.shape(values)
    index_heads, k = fw.shape(indices)[1], fw.shape(indices)[3]
    out = plan.output((batch, heads, tokens, lanes), problem.dtype)
    lse = plan.output((batch, heads, tokens), "float32") if return_lse else None
    members = heads // index_heads
    wide = vector(fw, q, keys, values)
    sizes = tiling(problem.dtype, depth, lanes, members, config["keys"])
    splits, stages = shares_of(config, k)
    overlapped = overlaps(bool(config["overlap"]), q)
    columns, blocks = -(-lanes // sizes["BLOCK_V"]), -(-members // sizes["M"])
    scratch = Scratch()
    left_at = room_for_splits(scratch, batch * heads * tokens, splits, lanes)
    memory = plan.output((scratch.size,), "uint8")
    data = data_pointer(problem.dtype, wide)
    result = result_types(problem.dtype)
    key_strides, value_strides = steps(fw, keys, wide), steps(fw, values, wide)
    attend = bind(
        _attend_kernel,
        (
            data, data, data, "*i32", *result,
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
    narrow_sinks, wide_sinks, has_sinks = plan.optional(fw, sink_logits, problem.dtype)
    results = (
        plan.address(out, result[0]), plan.address(lse, "*fp32"), narrow_sinks, wide_sinks,
        *(plan.address(memory, "*fp32", offset) for offset in left_at),
    )  # fmt: skip
    given = has_sinks, int(return_lse)
    plan.launch(
        attend,
        batch * index_heads * tokens * blocks * columns * splits,
        plan.address(q, data), plan.address(keys, data), plan.address(values, data),
        plan.address(indices, "*i32"), *results,
        index_heads, members, index_heads // kv_heads, tokens, slots, k,
        splits.bit_length() - 1, scale, softcap or 0.0, *given,
        *steps(fw, q, wide), *key_strides, *value_strides, *steps(fw, indices),
    )  # fmt: skip
    if splits > 1:
        merge, merge_columns = bind_merge(problem.dtype, lanes, splits, overlapped)
        plan.launch(
            merge,
            batch * heads * tokens * merge_columns,
            *results, heads, tokens, *given,
        )  # fmt: skip


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    indices: Any,
    scale: float,
    softcap: float | None,
    sink_logits: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """Launch `hata.sparse_attend`."""
    batch, _, tokens, _ = fw.shape(q)
    if batch * tokens == 0:
        return nothing(fw, q, problem, return_lse)
    made = planned(
        write_sparse_attend, problem, config, fw, (q, keys, values, indices, sink_logits),
        scale, softcap, return_lse,
    )  # fmt: skip
    return made[0], made[1] if return_lse else None
