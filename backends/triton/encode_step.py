"""The first launch of a decode step: queries and fresh keys are hashed together.

Codes and norms of the fresh keys are written in place. Codes of queries are never written: what the
scan reads are the weighted bit planes of each group (see `hamming_topk`), so those are made here,
and the step's counters are zeroed beside them.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any

import triton
import triton.language as tl

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem, pow2

from .encode import IEEE_ROWS, arithmetic, columns, norm_of, project
from .launch import bind
from .pieces import let_next_start, pack, store_planes, store_words, visible
from .plan import POINTERS, Plan, code_pointer, data_pointer, norm_steps, steps, vector, words


@triton.jit
def _step_kernel(
    q, keys, query_projection, projection, query_bias_x, query_bias_f, bias_x, bias_f,
    codes, norms, planes, counters, lengths, starts,
    rows, tokens, slots, kv_heads, group, fresh, query_tiles, key_tiles, length_step, start_step,
    query_has_bias, has_bias, has_norms, counters_row,
    q_b, q_h, q_t, keys_b, keys_h, keys_s, query_projection_h, query_projection_d,
    projection_h, projection_d, query_bias_h, bias_h,
    codes_b, codes_h, codes_s, norms_b, norms_h, norms_s,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_D: tl.constexpr, PLANES: tl.constexpr, COUNTERS: tl.constexpr,
    QUERY_BLOCK_D: tl.constexpr, QUERY_IEEE: tl.constexpr, IEEE: tl.constexpr,
    VECTOR: tl.constexpr, UNIT: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """`N` bits of one head: of the queries of some groups, or of some fresh keys.

    Vectors of all batch rows share a tile, so a projection is read once for all of them.
    """
    let_next_start(OVERLAPPED)
    program = tl.program_id(0)
    block = program % (R // N)
    jobs = query_tiles + key_tiles
    job = program // (R // N) % jobs
    head = program // (R // N) // jobs
    word = block * (N // 32) + tl.arange(0, N // 32)
    if job < query_tiles:
        GROUPS: tl.constexpr = M // MEMBERS
        # A group is a batch row and a token; its members are the heads that share `head`.
        of_row = job * GROUPS + tl.arange(0, M) // MEMBERS
        member = tl.arange(0, M) % MEMBERS
        mask = (of_row < rows) & (member < group)
        values, _ = project(
            q + head * group * q_h * VECTOR,
            ((of_row // tokens) * q_b + (of_row % tokens) * q_t + member * q_h) * VECTOR,
            mask,
            query_projection + head * query_projection_h * VECTOR,
            query_projection_d * VECTOR,
            query_bias_x + head * query_bias_h,
            query_bias_f + head * query_bias_h,
            query_has_bias,
            block * N,
            D, M, N, QUERY_BLOCK_D, QUERY_IEEE,
        )  # fmt: skip
        bits = ((values > 0) & mask[:, None]).to(tl.int32)
        counts = tl.sum(tl.reshape(bits, [GROUPS, MEMBERS, N]), axis=1)
        of_group = job * GROUPS + tl.arange(0, GROUPS)
        inside = of_group < rows
        batch = of_group // tokens
        target = (batch * kv_heads + head) * tokens + of_group % tokens
        store_planes(
            planes + target.to(tl.int64) * (PLANES * R // 32), counts, group, word, inside,
            R, GROUPS, N, PLANES,
        )  # fmt: skip
        at = counters + target.to(tl.int64) * counters_row
        for first in range(block * COUNTERS, counters_row, R // N * COUNTERS):
            counter = first + tl.arange(0, COUNTERS)
            tl.store(
                at[:, None] + counter[None, :],
                tl.zeros([GROUPS, COUNTERS], tl.int32),
                mask=inside[:, None] & (counter < counters_row)[None, :],
            )
    else:
        of_key = (job - query_tiles) * M + tl.arange(0, M)
        key_batch = (of_key // fresh).to(tl.int64)
        mask = of_key < rows // tokens * fresh
        start, stop = visible(
            lengths, starts, length_step, start_step, tl.where(mask, key_batch, 0), tokens - 1,
            tokens, slots,
        )  # fmt: skip
        position = stop - fresh + of_key % fresh
        mask &= (position >= start) & (position < stop)
        position = position.to(tl.int64)
        values, squares = project(
            keys + head * keys_h * VECTOR,
            (key_batch * keys_b + position * keys_s) * VECTOR,
            mask,
            projection + head * projection_h * VECTOR,
            projection_d * VECTOR,
            bias_x + head * bias_h,
            bias_f + head * bias_h,
            has_bias,
            block * N,
            D, M, N, BLOCK_D, IEEE,
        )  # fmt: skip
        code = key_batch * codes_b + head * codes_h + position * codes_s
        store_words(
            codes + code[:, None] + word[None, :] * (4 // UNIT),
            pack(values > 0, M, N),
            mask[:, None] & (word >= 0)[None, :],
            UNIT,
        )
        norm = norms + key_batch * norms_b + head * norms_h + position * norms_s
        tl.store(norm, norm_of(squares), mask=mask & (has_norms != 0) & (block == 0))


def write_step(
    plan: Plan,
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    projection: Any,
    bias: Any,
    query_projection: Any,
    query_bias: Any,
    codes: Any,
    norms: Any,
    planes: Any,
    counters: Any,
    spans: tuple[Any, ...],
    plane_count: int,
    encode_queries: bool,
    overlapped: bool,
    fresh: int,
    slots: int,
    counters_row: int,
) -> None:
    """Write the first launch of a decode step: queries, unless their codes are given, and keys."""
    batch, heads, tokens, _ = fw.shape(q)
    kv_heads, _, bits = fw.shape(projection)
    dtype = problem.dtype
    query_dtype = fw.dtype(query_projection)
    wide = vector(fw, q, keys, projection, query_projection)
    unit, together = words(fw, codes)
    constants = arithmetic(dtype, problem.projection_dtype, problem.head_dim)
    of_queries = arithmetic(dtype, query_dtype, problem.head_dim)
    members = pow2(heads // kv_heads)
    rows = max(IEEE_ROWS if constants["IEEE"] and of_queries["IEEE"] else 64, members)
    block = columns(bits, config["columns"])
    data, weights = data_pointer(dtype, wide), data_pointer(problem.projection_dtype, wide)
    query_weights = data_pointer(query_dtype, wide)
    kernel = bind(
        _step_kernel,
        (
            data, data, query_weights, weights, POINTERS[dtype], "*fp32", POINTERS[dtype], "*fp32",
            code_pointer(unit, together), "*fp16", "*i32", "*i32", "*i32", "*i32",
            *["i32"] * 14, *["i64"] * 18,
        ),
        {"R": bits, "M": rows, "N": block, "MEMBERS": members, "PLANES": plane_count,
         "COUNTERS": max(4096 // rows * members, 64),
         "QUERY_BLOCK_D": of_queries["BLOCK_D"], "QUERY_IEEE": of_queries["IEEE"],
         "VECTOR": wide, "UNIT": unit, "OVERLAPPED": overlapped, **constants},
        config["encode_warps"],
    )  # fmt: skip
    groups = batch * tokens
    query_tiles = -(-groups * members // rows) if encode_queries else 0
    key_tiles = -(-batch * fresh // rows)
    narrow_query, wide_query, query_has_bias = plan.optional(fw, query_bias, dtype)
    narrow_bias, wide_bias, has_bias = plan.optional(fw, bias, dtype)
    plan.launch(
        kernel,
        kv_heads * (query_tiles + key_tiles) * (bits // block),
        plan.address(q, data), plan.address(keys, data),
        plan.address(query_projection, query_weights), plan.address(projection, weights),
        narrow_query, wide_query, narrow_bias, wide_bias,
        plan.address(codes, code_pointer(unit, together)), plan.address(norms, "*fp16"),
        planes, counters, *spans[:2],
        groups, tokens, slots, kv_heads, heads // kv_heads, max(fresh, 1), query_tiles, key_tiles,
        *spans[2:], query_has_bias, has_bias, int(norms is not None), counters_row,
        *steps(fw, q, wide), *steps(fw, keys, wide),
        *steps(fw, query_projection, wide), *steps(fw, projection, wide),
        *(steps(fw, query_bias) or (0,)), *(steps(fw, bias) or (0,)),
        *steps(fw, codes, unit), *norm_steps(fw, norms),
    )  # fmt: skip
