"""encode: the packed signs of projected vectors (arXiv 2506.02572, section 3).

    code_j = 1  iff  (x . projection + bias)_j > 0,     bit j at byte j // 8, weight 2^(j % 8)

Vectors are the rows and bits the columns of one matrix product on the tensor cores; its
accumulators are compared with zero and packed, so nothing but codes is written. `_encode_kernel`
serves the op; the first launch of a decode step is in `encode_step`.

A vector's code must not depend on which kernel made it. Both take the sum over the head size in the
same order, in products of 16 elements; on Hopper the instructions for 16 rows and for 64 give the
same bits (2^24 values of each dtype and of three head sizes, and the conformance suite looks).
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import Encode
from hata.launches import LaunchList
from hata.problem import pow2

from .launch import bind, launch
from .layout import (
    POINTERS,
    code_pointer,
    data_pointer,
    in_fp32,
    norm_steps,
    optional,
    steps,
    vector,
    words,
    words_of,
)
from .pieces import pack, store_words

# Data that are multiplied in fp32 go through ordinary arithmetic, in small blocks.
IEEE_ROWS = 16


@triton.jit
def _load_vectors(x, rows, mask, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`BLOCK_D` elements, from `first` on, of the vectors at `x + rows`."""
    depth = first + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (depth < D)[None, :]
    return tl.load(x + rows[:, None] + depth[None, :], mask=inside, other=0.0)


@triton.jit
def _load_weights(projection, projection_d, columns, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a projection for these elements, and some of its columns."""
    depth = first + tl.arange(0, BLOCK_D)
    at = projection + depth[:, None] * projection_d + columns[None, :]
    return tl.load(at, mask=(depth < D)[:, None], other=0.0)


@triton.jit
def _add_products(values, squares, vectors, weights, IEEE: tl.constexpr, NORMS: tl.constexpr):
    """Add what some elements of each vector give to its values and its sum of squares."""
    if NORMS:
        wide = vectors.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    if IEEE:
        wide = vectors.to(tl.float32)
        values = tl.dot(wide, weights.to(tl.float32), values, input_precision="ieee")
    else:
        values = tl.dot(vectors, weights, values)
    return values, squares


@triton.jit
def _load_bias(bias_x, bias_f, columns, has_bias):
    """A bias, in the dtype of x (1) or in float32 (2); the one that is not there is not read."""
    bias = tl.load(bias_x + columns, mask=(columns >= 0) & (has_bias == 1), other=0.0)
    wide = tl.load(bias_f + columns, mask=(columns >= 0) & (has_bias == 2), other=0.0)
    return (bias.to(tl.float32) + wide)[None, :]


@triton.jit
def project(
    x, rows, mask, projection, projection_d, bias_x, bias_f, has_bias, column,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, IEEE: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """Values before the sign [M, N] of the vectors at `x + rows`, and sums of their squares [M].

    The sums are zeros without `NORMS`.
    """
    columns = column + tl.arange(0, N)
    values = tl.zeros([M, N], tl.float32)
    squares = tl.zeros([M], tl.float32)
    if IEEE:
        for first in range(0, D, BLOCK_D):
            vectors = _load_vectors(x, rows, mask, first, D, BLOCK_D)
            weights = _load_weights(projection, projection_d, columns, first, D, BLOCK_D)
            values, squares = _add_products(values, squares, vectors, weights, IEEE, NORMS)
    else:
        # Unrolled: few steps, and Triton 3.6 and 3.7 fail on two such loops in one kernel.
        for first in tl.static_range(0, D, BLOCK_D):
            vectors = _load_vectors(x, rows, mask, first, D, BLOCK_D)
            weights = _load_weights(projection, projection_d, columns, first, D, BLOCK_D)
            values, squares = _add_products(values, squares, vectors, weights, IEEE, NORMS)
    return values + _load_bias(bias_x, bias_f, columns, has_bias), squares


@triton.jit
def norm_of(squares):
    """Nearest fp16 to the norm, saturating; NaN as 0."""
    norm = tl.sqrt_rn(squares)
    return tl.minimum(tl.where(norm == norm, norm, 0.0), 65504.0).to(tl.float16)


@triton.jit
def _encode_kernel(
    x, projection, bias_x, bias_f, out, norms,
    tokens, heads, group, shares, has_bias,
    x_b, x_h, x_t, projection_h, projection_d, bias_h,
    out_b, out_h, out_t, norms_b, norms_h, norms_t,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOOPS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr, VECTOR: tl.constexpr,
    NORMS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`N` bits of `LOOPS` tiles of `M` vectors of one head."""
    program = tl.program_id(0)
    block = program % (R // N)
    share = program // (R // N) % shares
    row = program // (R // N) // shares
    batch = (row // heads).to(tl.int64)
    head = row % heads
    word = block * (N // 32) + tl.arange(0, N // 32)
    columns = block * N + tl.arange(0, N)
    x += (batch * x_b + head * x_h) * VECTOR
    projection += (head // group) * projection_h * VECTOR
    bias_x += (head // group) * bias_h
    bias_f += (head // group) * bias_h
    out += batch * out_b + head * out_h
    norms += batch * norms_b + head * norms_h
    if LOOPS > 1:
        weights = _load_weights(projection, projection_d * VECTOR, columns, 0, D, BLOCK_D)
        bias = _load_bias(bias_x, bias_f, columns, has_bias)
    for i in tl.range(0, LOOPS, num_stages=STAGES):
        token = (share * LOOPS + i) * M + tl.arange(0, M)
        mask = token < tokens
        rows = token * (x_t * VECTOR)
        if LOOPS > 1:
            vectors = _load_vectors(x, rows, mask, 0, D, BLOCK_D)
            values = tl.zeros([M, N], tl.float32)
            squares = tl.zeros([M], tl.float32)
            values, squares = _add_products(values, squares, vectors, weights, IEEE, NORMS)
            values += bias
        else:
            values, squares = project(
                x, rows, mask, projection, projection_d * VECTOR, bias_x, bias_f, has_bias,
                block * N, D, M, N, BLOCK_D, IEEE, NORMS,
            )  # fmt: skip
        store_words(
            out + token[:, None] * out_t + word[None, :] * (4 // UNIT),
            pack(values > 0, M, N),
            mask[:, None] & (word >= 0)[None, :],
            UNIT,
        )
        if NORMS:
            tl.store(norms + token * norms_t, norm_of(squares), mask=mask & (block == 0))


def columns(bits: int, most: int) -> int:
    """Bits that one program makes: as many as divide all of them."""
    return next(n for n in (128, 64, 32) if n <= most and bits % n == 0)


def arithmetic(dtype: str, projection_dtype: str, head_dim: int) -> dict[str, int | bool]:
    """Constants that fix the arithmetic of a code, for every kernel that makes codes."""
    ieee = in_fp32(dtype) or projection_dtype == "float32"
    return {"D": head_dim, "BLOCK_D": 16 if ieee else min(pow2(head_dim), 128), "IEEE": ieee}


def write(launches: LaunchList, call: Encode) -> None:
    """Write the launch of `hata.encode`."""
    views, problem, config = launches.views, call.problem, call.config
    x, projection, out = views["x"], views["projection"], views["out"]
    batch, heads, tokens, _ = call.x.shape
    kv_heads, bits, dtype = problem.kv_heads, problem.bits, problem.dtype
    wide = vector(x, projection)
    if out is None:
        codes, (unit, together) = launches.output("codes"), words_of(bits)
        code_strides = (heads * tokens * bits // 32, tokens * bits // 32, bits // 32)
    else:
        codes, (unit, together) = launches.address("out"), words(out)
        code_strides = steps(out, unit)
    constants = arithmetic(dtype, problem.projection_dtype, problem.head_dim)
    rows = IEEE_ROWS if constants["IEEE"] else config["rows"]
    block = columns(bits, 32 if constants["IEEE"] else 128)
    # Where a projection fits one block, a program keeps it for several tiles of vectors.
    loops = config["loops"] if constants["BLOCK_D"] >= problem.head_dim else 1
    data, weights = data_pointer(dtype, wide), data_pointer(problem.projection_dtype, wide)
    kernel = bind(
        _encode_kernel,
        (
            data, weights, POINTERS[dtype], "*fp32", code_pointer(unit, together), "*fp16",
            *["i32"] * 5, *["i64"] * 12,
        ),
        {"R": bits, "M": rows, "N": block, "LOOPS": loops, "STAGES": config["stages"],
         "NORMS": problem.norms, "VECTOR": wide, "UNIT": unit, **constants},
        config["encode_warps"],
        config["stages"],
    )  # fmt: skip
    shares = -(-tokens // (rows * loops))
    narrow_bias, wide_bias, has_bias = optional(launches, "bias", dtype)
    arrays = (
        launches.address("x"), launches.address("projection"), narrow_bias, wide_bias, codes,
        launches.address("norms"),
    )  # fmt: skip
    launch(
        launches, kernel, batch * heads * shares * (bits // block), arrays,
        tokens, heads, heads // kv_heads, shares, has_bias,
        *steps(x, wide), *steps(projection, wide), *(steps(views["bias"]) or (0,)),
        *code_strides, *norm_steps(views["norms"]),
    )  # fmt: skip
