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

from typing import NamedTuple

import triton
import triton.language as tl

from hata.call import Encode
from hata.launches import LaunchList
from hata.problem import pow2

from .launch import Long, Pointer, group, launch
from .layout import (
    code_pointer,
    data_pointer,
    in_fp32,
    optional,
    strides,
    vector,
    words,
    words_of,
)
from .pieces import pack, store_words

# Data that are multiplied in fp32 go through ordinary arithmetic, in small blocks.
IEEE_ROWS = 16


@triton.jit
def _load_vectors(x, rows, mask, first, A: tl.constexpr):
    """`BLOCK_D` elements, from `first` on, of the vectors at `x + rows`."""
    depth = first + tl.arange(0, A.BLOCK_D)
    inside = mask[:, None] & (depth < A.D)[None, :]
    return tl.load(x + rows[:, None] + depth[None, :], mask=inside, other=0.0)


@triton.jit
def _load_weights(projection, step, columns, first, A: tl.constexpr):
    """The rows of a projection for these elements, and some of its columns."""
    depth = first + tl.arange(0, A.BLOCK_D)
    at = projection + depth[:, None] * step + columns[None, :]
    return tl.load(at, mask=(depth < A.D)[:, None], other=0.0)


@triton.jit
def _add_products(values, squares, vectors, weights, A: tl.constexpr):
    """Add what some elements of each vector give to its values and its sum of squares."""
    if A.NORMS:
        wide = vectors.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    if A.IEEE:
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
def project(x, rows, mask, weights, column, A: tl.constexpr, C: tl.constexpr):
    """Values before the sign [M, N] of the vectors at `x + rows`, and sums of their squares [M].

    `weights`: a head's projection and the step between its rows, its bias as `_load_bias` takes it.
    `A`: `arithmetic`, and whether there are sums of squares, which else are zeros.
    """
    projection, step, bias_x, bias_f, has_bias = weights
    columns = column + tl.arange(0, C.N)
    values = tl.zeros([C.M, C.N], tl.float32)
    squares = tl.zeros([C.M], tl.float32)
    if A.IEEE:
        for first in range(0, A.D, A.BLOCK_D):
            vectors = _load_vectors(x, rows, mask, first, A)
            products = _load_weights(projection, step, columns, first, A)
            values, squares = _add_products(values, squares, vectors, products, A)
    else:
        # Unrolled: few steps, and Triton 3.6 and 3.7 fail on two such loops in one kernel.
        for first in tl.static_range(0, A.D, A.BLOCK_D):
            vectors = _load_vectors(x, rows, mask, first, A)
            products = _load_weights(projection, step, columns, first, A)
            values, squares = _add_products(values, squares, vectors, products, A)
    return values + _load_bias(bias_x, bias_f, columns, has_bias), squares


@triton.jit
def norm_of(squares):
    """Nearest fp16 to the norm, saturating; NaN as 0."""
    norm = tl.sqrt_rn(squares)
    return tl.minimum(tl.where(norm == norm, norm, 0.0), 65504.0).to(tl.float16)


@triton.jit
def _encode_kernel(arrays, sizes, strides, C: tl.constexpr):
    """`N` bits of `LOOPS` tiles of `M` vectors of one head.

    `arrays`: x, projection, bias_x, bias_f, codes, norms. `sizes`: tokens, heads, group (heads a
    projection), shares (programs a head and block), has_bias. `strides`: of x, projection, bias,
    codes, norms.
    """
    BLOCKS: tl.constexpr = C.R // C.N
    program = tl.program_id(0)
    block = program % BLOCKS
    share = program // BLOCKS % sizes.shares
    row = program // BLOCKS // sizes.shares
    batch = (row // sizes.heads).to(tl.int64)
    head = row % sizes.heads
    weights_of = head // sizes.group
    word = block * (C.N // 32) + tl.arange(0, C.N // 32)
    columns = block * C.N + tl.arange(0, C.N)
    x = arrays.x + (batch * strides.x.b + head * strides.x.h) * C.VECTOR
    projection = arrays.projection + weights_of * strides.projection.h * C.VECTOR
    step = strides.projection.d * C.VECTOR
    bias_x = arrays.bias_x + weights_of * strides.bias.h
    bias_f = arrays.bias_f + weights_of * strides.bias.h
    codes = arrays.codes + batch * strides.codes.b + head * strides.codes.h
    norms = arrays.norms + batch * strides.norms.b + head * strides.norms.h
    if C.LOOPS > 1:
        weights = _load_weights(projection, step, columns, 0, C.A)
        bias = _load_bias(bias_x, bias_f, columns, sizes.has_bias)
    for i in tl.range(0, C.LOOPS, num_stages=C.STAGES):
        token = (share * C.LOOPS + i) * C.M + tl.arange(0, C.M)
        mask = token < sizes.tokens
        rows = token * (strides.x.t * C.VECTOR)
        if C.LOOPS > 1:
            vectors = _load_vectors(x, rows, mask, 0, C.A)
            values = tl.zeros([C.M, C.N], tl.float32)
            squares = tl.zeros([C.M], tl.float32)
            values, squares = _add_products(values, squares, vectors, weights, C.A)
            values += bias
        else:
            head_weights = (projection, step, bias_x, bias_f, sizes.has_bias)
            values, squares = project(x, rows, mask, head_weights, block * C.N, C.A, C)
        store_words(
            codes + token[:, None] * strides.codes.t + word[None, :] * (4 // C.UNIT),
            pack(values > 0, C.M, C.N),
            mask[:, None] & (word >= 0)[None, :],
            C.UNIT,
        )
        if C.A.NORMS:
            tl.store(norms + token * strides.norms.t, norm_of(squares), mask=mask & (block == 0))


def columns(bits: int, most: int) -> int:
    """Bits that one program makes: as many as divide all of them."""
    return next(n for n in (128, 64, 32) if n <= most and bits % n == 0)


class Arithmetic(NamedTuple):
    """What fixes the arithmetic of a code, for every kernel that makes codes; constants of them."""

    D: int
    BLOCK_D: int
    IEEE: bool
    NORMS: bool


def arithmetic(dtype: str, projection_dtype: str, head_dim: int, norms: bool) -> Arithmetic:
    """The arithmetic of codes of vectors and a projection of these dtypes."""
    ieee = in_fp32(dtype) or projection_dtype == "float32"
    return Arithmetic(head_dim, 16 if ieee else min(pow2(head_dim), 128), ieee, norms)


def write(launches: LaunchList, call: Encode) -> None:
    """Write the launch of `hata.encode`."""
    views, problem, config = launches.views, call.problem, call.config
    x, projection, out = views["x"], views["projection"], views["out"]
    batch, heads, tokens, _ = call.x.shape
    bits, dtype = problem.bits, problem.dtype
    wide = vector(x, projection)
    if out is None:
        codes, (unit, together) = launches.output("codes"), words_of(bits)
        words_row = bits // 32
        code_strides = group(
            b=Long(heads * tokens * words_row), h=Long(tokens * words_row), t=Long(words_row)
        )
    else:
        codes, (unit, together) = launches.address("out"), words(out)
        code_strides = strides(out, "bht", unit)
    fixed = arithmetic(dtype, problem.projection_dtype, problem.head_dim, problem.norms)
    # Where a projection fits one block, a program keeps it for several tiles of vectors.
    constants = group(
        R=bits, M=IEEE_ROWS if fixed.IEEE else config["rows"],
        N=columns(bits, 32 if fixed.IEEE else 128),
        LOOPS=config["loops"] if problem.head_dim <= fixed.BLOCK_D else 1,
        STAGES=config["stages"], VECTOR=wide, UNIT=unit, A=fixed,
    )  # fmt: skip
    shares = -(-tokens // (constants.M * constants.LOOPS))
    bias_x, bias_f, has_bias = optional(launches, "bias", dtype)
    weights = data_pointer(problem.projection_dtype, wide)
    groups = (
        group(
            x=Pointer(launches.address("x"), data_pointer(dtype, wide)),
            projection=Pointer(launches.address("projection"), weights),
            bias_x=bias_x,
            bias_f=bias_f,
            codes=Pointer(codes, code_pointer(unit, together)),
            norms=Pointer(launches.address("norms"), "*fp16"),
        ),
        group(
            tokens=tokens, heads=heads, group=heads // problem.kv_heads, shares=shares,
            has_bias=has_bias,
        ),
        group(
            x=strides(x, "bht", wide), projection=strides(projection, "hd", wide),
            bias=strides(views["bias"], "h"), codes=code_strides,
            norms=strides(views["norms"], "bht"),
        ),
    )  # fmt: skip
    grid = batch * heads * shares * (bits // constants.N)
    stages = config["stages"]
    launch(launches, _encode_kernel, grid, groups, constants, config["encode_warps"], stages)
