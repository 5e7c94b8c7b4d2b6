"""encode: packed sign bits of projected vectors, on a CPU (arXiv 2506.02572, section 3).

Bit j of a code is (x . projection[:, j] + bias[j]) > 0, at byte j // 8, weight 2^(j % 8).

Rows are widened to fp32 in blocks of `_BLOCK` and projected four at a time on 32 columns at a time,
so that 32 columns of the projection stay in the first-level cache for a whole block. Each sum runs
over the head size in order, with the same operations wherever the row stands: a code depends on
its vector alone. A projection that is not fp32 is widened once a thread and head.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hata.arrays import ITEMSIZE, Framework
from hata.problem import Problem

from .codes import clear
from .intrinsics import (
    BFLOAT16,
    DTYPE_CODES,
    FLOAT32,
    bits_float,
    float_bits,
    half_to_float,
    load_f32,
    load_i64,
    load_u16,
    store_16,
    store_32,
    store_64,
)
from .rows import copy_float32, positive_bits, project4, sum_squares, widen_bfloat16, widen_float16
from .schedule import (
    THREADS,
    Worker,
    address_of,
    carve,
    claim,
    control_words,
    device,
    draw,
    inlined,
    layout,
    record_view,
    workers,
)

TUNABLES = {"threads": THREADS, "block": (16, 64, 256)}
DEFAULTS = {"threads": "all", "block": 64}

# rows widened at a time
_BLOCK = 64

PROJECTION_FIELDS = ("projection", "projection_h", "projection_d", "projection_dtype",
                     "bias", "bias_h", "bias_dtype")  # fmt: skip
FIELDS = (
    "x", "x_b", "x_h", "x_t", "dtype", "batch", "heads", "tokens", "depth", "group", "bits",
    *PROJECTION_FIELDS,
    "out", "out_b", "out_h", "out_t", "norms", "norms_b", "norms_h", "norms_t",
    "block", "control", "scratch", "scratch_bytes",
)  # fmt: skip


@inlined
def widen(source: int, out: int, count: int, dtype: int) -> None:
    """Copy `count` numbers (a multiple of 16) to fp32."""
    if dtype == FLOAT32:
        copy_float32(source, out, count)
    elif dtype == BFLOAT16:
        widen_bfloat16(source, out, count)
    else:
        widen_float16(source, out, count)


@inlined
def load_number(address: int, index: int, dtype: int) -> np.float32:
    """Number `index` of a row of any data dtype, as fp32."""
    if dtype == FLOAT32:
        return load_f32(address + 4 * index)
    bits = load_u16(address + 2 * index)
    return bits_float(bits << 16) if dtype == BFLOAT16 else half_to_float(bits)


@inlined
def half_from_float(value: np.float32) -> int:
    """The 16 bits of the nearest fp16 number, ties to even; overflow gives infinity."""
    bits = float_bits(value)
    sign, bits = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if bits > 0x7F800000:
        return sign | 0x7E00
    if bits >= 0x477FF000:
        return sign | 0x7C00
    if bits < 0x38800000:
        # below 2^-14: adding 0.5 leaves the mantissa, rounded, in the low bits
        return sign | (float_bits(bits_float(bits) + np.float32(0.5)) - 0x3F000000)
    return sign | ((bits - (112 << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13)


@inlined
def code_scratch(depth: int, bits: int) -> int:
    """Bytes of scratch that `encode_rows` needs."""
    return 64 + 4 * (_BLOCK * depth + 128 + bits + depth * bits)


@device
def encode_rows(
    x: int, x_step: int, dtype: int, count: int, depth: int, bits: int,
    projection: int, projection_step: int, projection_dtype: int, bias: int, bias_dtype: int,
    out: int, out_step: int, norms: int, norms_step: int, scratch: int,
) -> None:  # fmt: skip
    """Encode `count` rows of one head. `bias` and `norms` may be 0. Steps are in bytes.

    The first words of scratch say which projection has been widened into it: its address (or 0),
    step and dtype, since two views may begin at one address.
    """
    rows = scratch + 64
    sums = rows + 4 * _BLOCK * depth
    offsets = sums + 512
    weights = offsets + 4 * bits
    if projection_dtype != FLOAT32:
        if (
            load_i64(scratch) != projection
            or load_i64(scratch + 8) != projection_step
            or load_i64(scratch + 16) != projection_dtype
        ):
            for d in range(depth):
                source = projection + d * projection_step
                widen(source, weights + 4 * d * bits, bits, projection_dtype)
            store_64(scratch, projection)
            store_64(scratch + 8, projection_step)
            store_64(scratch + 16, projection_dtype)
        projection, projection_step = weights, 4 * bits
    if bias != 0:
        widen(bias, offsets, bits, bias_dtype)
    else:
        clear(offsets, 4 * bits)
    for first in range(0, count, _BLOCK):
        size = min(count - first, _BLOCK)
        for n in range(size):
            row = rows + 4 * n * depth
            widen(x + (first + n) * x_step, row, depth, dtype)
            if norms != 0:
                norm = np.sqrt(sum_squares(row, depth))
                norm = min(norm, np.float32(65504)) if norm == norm else np.float32(0)
                store_16(norms + (first + n) * norms_step, half_from_float(norm))
        for n in range(size, (size + 3) // 4 * 4):
            copy_float32(rows, rows + 4 * n * depth, depth)
        for j in range(0, bits, 32):
            for n in range(0, size, 4):
                project4(rows + 4 * n * depth, projection + 4 * j, projection_step, depth, sums)
                for m in range(min(size - n, 4)):
                    word = positive_bits(sums + 128 * m, offsets + 4 * j)
                    store_32(out + (first + n + m) * out_step + j // 8, word)


def _make(revision: int) -> Any:
    def encode_worker(address):
        call = _view(address)
        if revision == 0:
            return
        scratch = claim(call.control, call.scratch, call.scratch_bytes)
        if scratch == 0:
            return
        blocks = (call.tokens + call.block - 1) // call.block
        while True:
            ticket = draw(call.control)
            if ticket >= call.batch * call.heads * blocks:
                return
            first = ticket % blocks * call.block
            head = ticket // blocks % call.heads
            row = ticket // blocks // call.heads
            kv_head = head // call.group
            norms = 0
            if call.norms != 0:
                norms = call.norms + row * call.norms_b + head * call.norms_h + first * call.norms_t
            encode_rows(
                call.x + row * call.x_b + head * call.x_h + first * call.x_t,
                call.x_t,
                call.dtype,
                min(call.block, call.tokens - first),
                call.depth,
                call.bits,
                call.projection + kv_head * call.projection_h,
                call.projection_d,
                call.projection_dtype,
                call.bias + kv_head * call.bias_h if call.bias != 0 else 0,
                call.bias_dtype,
                call.out + row * call.out_b + head * call.out_h + first * call.out_t,
                call.out_t,
                norms,
                call.norms_t,
                scratch,
            )

    return encode_worker


_view = record_view(FIELDS)
worker = Worker(_make)


def projection_values(fw: Any, projection: Any, dtype: str, bias: Any) -> tuple[int, ...]:
    """The values of `PROJECTION_FIELDS`, of a projection of a given dtype."""
    side = (*layout(fw, projection, ITEMSIZE[dtype]), DTYPE_CODES[dtype])
    if bias is None:
        return (*side, 0, 0, 0)
    dtype = fw.dtype(bias)
    return (*side, *layout(fw, bias, ITEMSIZE[dtype]), DTYPE_CODES[dtype])


def launch(
    problem: Problem, fw: Framework, x: Any, projection: Any, bias: Any, out: Any, norms: Any,
    config: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Run `hata.encode` with a configuration; returns the codes."""
    batch, heads, tokens, depth = fw.shape(x)
    kv_heads, _, bits = fw.shape(projection)
    if out is None:
        out = fw.empty((batch, heads, tokens, bits // 8), "uint8", x)
    if batch * heads * tokens == 0:
        return out
    threads = workers(config["threads"])
    scratch_bytes = code_scratch.py_func(depth, bits)
    hold, (scratch,) = carve(threads * scratch_bytes)
    control = control_words(0, threads)
    norm_layout = (0, 0, 0, 0)
    if norms is not None:
        norm_layout = (*layout(fw, norms, 2), 2 * fw.strides(norms)[2])
    worker.run(
        [
            *layout(fw, x, ITEMSIZE[problem.dtype]), DTYPE_CODES[problem.dtype],
            batch, heads, tokens, depth, heads // kv_heads, bits,
            *projection_values(fw, projection, problem.projection_dtype, bias),
            *layout(fw, out, 1), *norm_layout,
            config["block"], *address_of(control), scratch, scratch_bytes,
        ],
        threads,
    )  # fmt: skip
    del hold
    return out
