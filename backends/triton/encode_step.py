"""The first launch of a decode step: queries and fresh keys are hashed together.

Codes and norms of the fresh keys are written in place. Codes of queries are never written: what the
scan reads are the weighted bit planes of each group (see `hamming_topk`), so those are made here,
and the step's counters are zeroed beside them.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import HashAttend
from hata.launches import LaunchList, row_step
from hata.problem import pow2

from .counting import Rows
from .encode import arithmetic, columns, norm_of, project
from .launch import bind, launch
from .layout import POINTERS, code_pointer, data_pointer, norm_steps, optional, steps, vector, words
from .pieces import columns_of, let_next_start, pack, store_planes, store_words, visible


@triton.jit
def _step_kernel(
    lengths, starts, projection, keys, query_projection, q,
    codes, planes, counters, norms, query_bias_x, query_bias_f, bias_x, bias_f,
    length_step, start_step, rows, tokens, slots, fresh, query_tiles, jobs, shares,
    query_has_bias, has_bias, counters_row,
    projection_h, projection_d, keys_b, keys_h, keys_s,
    query_projection_h, query_projection_d, q_b, q_h, q_t,
    codes_b, codes_h, codes_s, norms_b, norms_h, norms_s, query_bias_h, bias_h,
    KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, PLANES: tl.constexpr, COUNTERS: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERY_BLOCK_D: tl.constexpr, QUERY_IEEE: tl.constexpr,
    IEEE: tl.constexpr, NORMS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
    SINGLE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """`N` bits of one head: of the queries of some groups, or of some fresh keys.

    Vectors of many batch rows share a tile, so a projection is read once for all of them. Arguments
    come by lines of 64 bytes, so those stand together that are asked for together.
    """
    let_next_start(OVERLAPPED)
    block = tl.program_id(0) % (R // N)
    rest = tl.program_id(0) // (R // N)
    job = rest // KV_HEADS
    head = rest - job * KV_HEADS
    word = block * (N // 32) + tl.arange(0, N // 32)
    # First what takes longest: lengths come before the keys that they say the place of.
    if (job >= query_tiles) & (job < jobs):
        # A tile holds the one fresh key of many batch rows, or many fresh keys of one batch row.
        tile = job - query_tiles
        if fresh == 1:
            batch = tile * M + tl.arange(0, M)
            index = tl.zeros([M], tl.int32)
        else:
            batch = tile // shares + tl.zeros([M], tl.int32)
            index = tile % shares * M + tl.arange(0, M)
        mask = (batch * tokens < rows) & (index < fresh)
        batch = tl.where(mask, batch, 0)
        start, stop = visible(
            lengths, starts, length_step, start_step, batch, tokens - 1, tokens, slots
        )
        position = stop - fresh + index
        mask &= (position >= start) & (position < stop)
        position = position.to(tl.int64)
        values, squares = project(
            keys + head * keys_h * VECTOR,
            (batch * keys_b + position * keys_s) * VECTOR,
            mask,
            projection + head * projection_h * VECTOR,
            projection_d * VECTOR,
            bias_x + head * bias_h,
            bias_f + head * bias_h,
            has_bias,
            block * N,
            D, M, N, BLOCK_D, IEEE, NORMS,
        )  # fmt: skip
        code = batch * codes_b + head * codes_h + position * codes_s
        store_words(
            codes + code[:, None] + word[None, :] * (4 // UNIT),
            pack(values > 0, M, N),
            mask[:, None] & (word >= 0)[None, :],
            UNIT,
        )
        if NORMS:
            norm = norms + batch * norms_b + head * norms_h + position * norms_s
            tl.store(norm, norm_of(squares), mask=mask & (block == 0))
    elif job == jobs:
        # One program a head and block beyond the tiles zeroes a share of all counters.
        size = (tl.zeros([], tl.int64) + counters_row) * rows * KV_HEADS
        share = (head * (R // N) + block).to(tl.int64)
        for first in range(share * COUNTERS, size, KV_HEADS * (R // N) * COUNTERS):
            at = first + tl.arange(0, COUNTERS)
            tl.store(counters + at, tl.zeros([COUNTERS], tl.int32), mask=at < size)
    else:
        GROUPS: tl.constexpr = M // MEMBERS
        # A group is a batch row and a token; its members are the heads that share `head`.
        of_row = job * GROUPS + tl.arange(0, M) // MEMBERS
        member = tl.arange(0, M) % MEMBERS
        mask = (of_row < rows) & (member < GROUP)
        offset = member * q_h
        if SINGLE:
            offset += of_row * q_b
        else:
            offset += (of_row // tokens) * q_b + (of_row % tokens) * q_t
        values, _ = project(
            q + head * GROUP * q_h * VECTOR,
            offset * VECTOR,
            mask,
            query_projection + head * query_projection_h * VECTOR,
            query_projection_d * VECTOR,
            query_bias_x + head * query_bias_h,
            query_bias_f + head * query_bias_h,
            query_has_bias,
            block * N,
            D, M, N, QUERY_BLOCK_D, QUERY_IEEE, False,
        )  # fmt: skip
        words = tl.reshape(pack(values > 0, M, N), [GROUPS, MEMBERS, N // 32])
        words = tl.reshape(tl.permute(words, (0, 2, 1)), [GROUPS * (N // 32), MEMBERS])
        words = columns_of(words, GROUPS * (N // 32), MEMBERS)
        of_group = job * GROUPS + tl.arange(0, GROUPS)
        inside = of_group < rows
        if SINGLE:
            target = of_group * KV_HEADS + head
        else:
            target = ((of_group // tokens) * KV_HEADS + head) * tokens + of_group % tokens
        at = planes + (target.to(tl.int64) * (PLANES * R // 32))[:, None] + word[None, :]
        store_planes(
            tl.reshape(at, [GROUPS * (N // 32)]),
            words[:GROUP],
            tl.reshape(inside[:, None] & (word >= 0)[None, :], [GROUPS * (N // 32)]),
            R // 32,
        )


def write_step(
    launches: LaunchList, call: HashAttend, at: Rows, plane_count: int, overlapped: bool
) -> None:
    """Write the first launch of a decode step: queries, unless their codes are given, and keys."""
    views, problem = launches.views, call.problem
    batch, heads, tokens, _ = call.q.shape
    kv_heads, bits, dtype = problem.kv_heads, problem.bits, problem.dtype
    encode_queries, fresh = views["q_codes"] is None, call.fresh
    q, keys, codes, norms = (views[name] for name in ("q", "keys", "key_codes", "key_norms"))
    projection, query_projection = views["projection"], views["query_projection"]
    assert codes is not None
    assert query_projection is not None
    query_dtype = query_projection.dtype
    wide = vector(q, keys, projection, query_projection)
    unit, together = words(codes)
    constants = arithmetic(dtype, problem.projection_dtype, problem.head_dim)
    of_queries = arithmetic(dtype, query_dtype, problem.head_dim)
    members = pow2(heads // kv_heads)
    # 16 rows make the codes that 64 make where both come from the same kind of matrix unit; sm_100
    # to sm_110 have one of its own for 64 rows. Ordinary arithmetic does not care.
    apart = launches.gpu.sm // 10 in (10, 11)
    apart = apart and not (constants["IEEE"] and of_queries["IEEE"])
    rows = max(64 if apart else 16, members)
    block = columns(bits, call.config["columns"])
    data, weights = data_pointer(dtype, wide), data_pointer(problem.projection_dtype, wide)
    query_weights = data_pointer(query_dtype, wide)
    kernel = bind(
        _step_kernel,
        (
            "*i32", "*i32", weights, data, query_weights, data,
            code_pointer(unit, together), "*i32", "*i32", "*fp16", *[POINTERS[dtype], "*fp32"] * 2,
            *["i32"] * 12, *["i64"] * 18,
        ),
        {"KV_HEADS": kv_heads, "R": bits, "M": rows, "N": block, "GROUP": heads // kv_heads,
         "MEMBERS": members, "PLANES": plane_count, "COUNTERS": 1024,
         "QUERY_BLOCK_D": of_queries["BLOCK_D"], "QUERY_IEEE": of_queries["IEEE"],
         "NORMS": problem.norms, "VECTOR": wide, "UNIT": unit, "SINGLE": tokens == 1,
         "OVERLAPPED": overlapped, **constants},
        call.config["encode_warps"],
    )  # fmt: skip
    groups = batch * tokens
    query_tiles = -(-groups * members // rows) if encode_queries else 0
    # Tiles of fresh keys: of many batch rows where each brings one, else so many a batch row.
    shares = -(-fresh // rows)
    key_tiles = -(-batch // rows) if fresh == 1 else batch * shares
    narrow_query, wide_query, query_has_bias = optional(launches, "query_bias", dtype)
    narrow_bias, wide_bias, has_bias = optional(launches, "bias", dtype)
    arrays = [
        launches.address(name)
        for name in ("lengths", "starts", "projection", "keys", "query_projection", "q")
    ]
    arrays += [
        launches.address("key_codes"), at.planes, at.counters, launches.address("key_norms"),
        narrow_query, wide_query, narrow_bias, wide_bias,
    ]  # fmt: skip
    launch(
        launches, kernel,
        # Whoever makes the planes zeroes the counters.
        kv_heads * (query_tiles + key_tiles + int(encode_queries)) * (bits // block), arrays,
        row_step(views["lengths"]), row_step(views["starts"]), groups, tokens, call.keys.shape[2],
        fresh, query_tiles, query_tiles + key_tiles, max(shares, 1), query_has_bias, has_bias,
        at.counters_row,
        *steps(projection, wide), *steps(keys, wide), *steps(query_projection, wide),
        *steps(q, wide), *steps(codes, unit), *norm_steps(norms),
        *(steps(views["query_bias"]) or (0,)), *(steps(views["bias"]) or (0,)),
    )  # fmt: skip
