"""encode: the packed signs of projected vectors (arXiv 2506.02572, section 3).

    code_j = 1  iff  (x . projection + bias)_j > 0,     bit j at byte j // 8, weight 2^(j % 8)

Vectors are the rows and bits the columns of one matrix product on the tensor cores; its
accumulators are compared with zero and packed, so nothing but codes is written. `_encode_kernel`
hashes many vectors per head (prefill). `_step_kernel` serves a decode step: the queries of a group
and the fresh keys in one launch. It writes codes of keys in place and, for queries, the weighted
bit planes that the scan reads (see `hamming_topk`); it also zeroes the step's counters.

A vector's code must not depend on which kernel made it. Both use `_project`: the same instruction
shape (at least 64 rows, so that Hopper takes the same matrix instruction in both) and the same
order of the sum over the head size.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import triton
import triton.language as tl

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem, pow2

from .launch import (
    POINTERS,
    Place,
    address,
    bind,
    code_pointer,
    data_pointer,
    in_fp32,
    norm_steps,
    optional,
    steps,
    vector,
    words,
)
from .pieces import let_next_start, pack, store_planes, store_words, visible

# Data that are multiplied in fp32 go through ordinary arithmetic, in small blocks.
IEEE_ROWS = 16


@triton.jit
def _add_products(
    values, squares, x, rows, mask, projection, projection_d, columns, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Add what `BLOCK_D` elements of each vector, from `first` on, give to both sums."""
    depth = first + tl.arange(0, BLOCK_D)
    inside = depth < D
    vectors = tl.load(
        x + rows[:, None] + depth[None, :], mask=mask[:, None] & inside[None, :], other=0.0
    )
    weights = tl.load(
        projection + depth[:, None] * projection_d + columns[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    wide = vectors.to(tl.float32)
    squares += tl.sum(wide * wide, axis=1)
    if IEEE:
        values = tl.dot(wide, weights.to(tl.float32), values, input_precision="ieee")
    else:
        values = tl.dot(vectors, weights, values)
    return values, squares


@triton.jit
def _project(
    x, rows, mask, projection, projection_d, bias_x, bias_f, has_bias, column,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Values before the sign [M, N] and sums of squares [M] of the vectors at `x + rows`."""
    columns = column + tl.arange(0, N)
    values = tl.zeros([M, N], tl.float32)
    squares = tl.zeros([M], tl.float32)
    if IEEE:
        for first in range(0, D, BLOCK_D):
            values, squares = _add_products(
                values, squares, x, rows, mask, projection, projection_d, columns, first,
                D, BLOCK_D, IEEE,
            )  # fmt: skip
    else:
        # Unrolled: few steps, and Triton 3.6 and 3.7 fail on two such loops in one kernel.
        for first in tl.static_range(0, D, BLOCK_D):
            values, squares = _add_products(
                values, squares, x, rows, mask, projection, projection_d, columns, first,
                D, BLOCK_D, IEEE,
            )  # fmt: skip
    # A bias comes in the dtype of x (1) or in float32 (2); the one that is not there is not read.
    bias = tl.load(bias_x + columns, mask=(columns >= 0) & (has_bias == 1), other=0.0)
    bias_wide = tl.load(bias_f + columns, mask=(columns >= 0) & (has_bias == 2), other=0.0)
    return values + (bias.to(tl.float32) + bias_wide)[None, :], squares


@triton.jit
def _norm(squares):
    """Nearest fp16 to the norm, saturating; NaN as 0."""
    norm = tl.sqrt_rn(squares)
    return tl.minimum(tl.where(norm == norm, norm, 0.0), 65504.0).to(tl.float16)


@triton.jit
def _encode_kernel(
    x, projection, bias_x, bias_f, out, norms,
    tokens, heads, group, tiles, has_bias, has_norms,
    x_b, x_h, x_t, projection_h, projection_d, bias_h,
    out_b, out_h, out_t, norms_b, norms_h, norms_t,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    IEEE: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % (R // N)
    tile = program // (R // N) % tiles
    row = program // (R // N) // tiles
    batch = (row // heads).to(tl.int64)
    head = row % heads
    token = tile * M + tl.arange(0, M)
    mask = token < tokens
    values, squares = _project(
        x + (batch * x_b + head * x_h) * VECTOR,
        token * (x_t * VECTOR),
        mask,
        projection + (head // group) * projection_h * VECTOR,
        projection_d * VECTOR,
        bias_x + (head // group) * bias_h,
        bias_f + (head // group) * bias_h,
        has_bias,
        block * N,
        D, M, N, BLOCK_D, IEEE,
    )  # fmt: skip
    words = pack(values > 0, M, N)
    word = block * (N // 32) + tl.arange(0, N // 32)
    store_words(
        out + batch * out_b + head * out_h + token[:, None] * out_t + word[None, :] * (4 // UNIT),
        words,
        mask[:, None] & (word >= 0)[None, :],
        UNIT,
    )
    target = norms + batch * norms_b + head * norms_h + token * norms_t
    tl.store(target, _norm(squares), mask=mask & (has_norms != 0) & (block == 0))


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
        values, _ = _project(
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
        values, squares = _project(
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
        tl.store(norm, _norm(squares), mask=mask & (has_norms != 0) & (block == 0))


def columns(bits: int, most: int) -> int:
    """Bits that one program makes: as many as divide all of them."""
    return next(n for n in (128, 64, 32) if n <= most and bits % n == 0)


def arithmetic(dtype: str, projection_dtype: str, head_dim: int) -> dict[str, int | bool]:
    """Constants that fix the arithmetic of a code, for every kernel that makes codes."""
    ieee = in_fp32(dtype) or projection_dtype == "float32"
    return {"D": head_dim, "BLOCK_D": 16 if ieee else min(pow2(head_dim), 128), "IEEE": ieee}


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    x: Any,
    projection: Any,
    bias: Any,
    out: Any,
    norms: Any,
) -> Any:
    """Launch `hata.encode`."""
    batch, heads, tokens, _ = fw.shape(x)
    kv_heads, _, bits = fw.shape(projection)
    if out is None:
        out = fw.empty((batch, heads, tokens, bits // 8), "uint8", x)
    if batch * tokens == 0:
        return out
    wide = vector(fw, x, projection)
    unit, together = words(fw, out)
    constants = arithmetic(problem.dtype, problem.projection_dtype, problem.head_dim)
    rows = IEEE_ROWS if constants["IEEE"] else config["rows"]
    block = columns(bits, 32 if constants["IEEE"] else 128)
    types = _encode_types(problem.dtype, problem.projection_dtype, wide, unit, together)
    kernel = bind(
        _encode_kernel,
        types,
        {"R": bits, "M": rows, "N": block, "VECTOR": wide, "UNIT": unit, **constants},
        config["encode_warps"],
    )
    tiles = -(-tokens // rows)
    narrow_bias, wide_bias, has_bias = optional(fw, bias, problem.dtype)
    arguments = (
        address(x, types[0]), address(projection, types[1]), narrow_bias, wide_bias,
        address(out, types[4]), address(norms, types[5]),
        tokens, heads, heads // kv_heads, tiles, has_bias, int(norms is not None),
        *steps(fw, x, wide), *steps(fw, projection, wide), *(steps(fw, bias) or (0,)),
        *steps(fw, out, unit), *norm_steps(fw, norms),
    )  # fmt: skip
    with Place(x) as place:
        kernel(
            batch * heads * tiles * (bits // block),
            place.device,
            place.stream,
            *arguments,
        )
    return out


def _encode_types(
    dtype: str, projection_dtype: str, wide: int, unit: int, together: int
) -> tuple[str, ...]:
    return (
        data_pointer(dtype, wide), data_pointer(projection_dtype, wide), POINTERS[dtype], "*fp32",
        code_pointer(unit, together), "*fp16", *["i32"] * 6, *["i64"] * 12,
    )  # fmt: skip


def launch_step(
    problem: Problem,
    config: Config,
    fw: Framework,
    place: Place,
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
    spans: tuple[Any, Any],
    span_steps: tuple[int, int],
    plane_count: int,
    encode_queries: bool,
    overlapped: bool,
    fresh: int,
    slots: int,
    counters_row: int,
) -> None:
    """Launch the first kernel of a decode step, for the queries, unless their codes are given, and `fresh` keys."""
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
    narrow_query, wide_query, query_has_bias = optional(fw, query_bias, dtype)
    narrow_bias, wide_bias, has_bias = optional(fw, bias, dtype)
    kernel(
        kv_heads * (query_tiles + key_tiles) * (bits // block), place.device, place.stream,
        address(q, data), address(keys, data),
        address(query_projection, query_weights), address(projection, weights),
        narrow_query, wide_query, narrow_bias, wide_bias,
        address(codes, code_pointer(unit, together)), address(norms, "*fp16"),
        planes, counters, *spans,
        groups, tokens, slots, kv_heads, heads // kv_heads, max(fresh, 1), query_tiles, key_tiles,
        *span_steps, query_has_bias, has_bias, int(norms is not None), counters_row,
        *steps(fw, q, wide), *steps(fw, keys, wide),
        *steps(fw, query_projection, wide), *steps(fw, projection, wide),
        *(steps(fw, query_bias) or (0,)), *(steps(fw, bias) or (0,)),
        *steps(fw, codes, unit), *norm_steps(fw, norms),
    )  # fmt: skip
