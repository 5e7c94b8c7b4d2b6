"""Vector loops over rows of floats, in LLVM IR. Lengths are multiples of 16 elements."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .intrinsics import (
    F32,
    F32X16,
    I16,
    I32,
    I32X16,
    I64,
    blocks_of_16,
    call_named,
    constant_lanes,
    emitter,
    half_bits,
    mutable,
    pointer_to,
    repeat,
    take_lanes,
)


@emitter(types.void, types.int64, types.int64, types.int64)
def widen_bfloat16(builder: Any, source: Any, out: Any, count: Any) -> None:
    """Convert bf16 to fp32."""
    with blocks_of_16(builder, count) as block:
        address = builder.add(source, builder.shl(block.index, I64(5)))
        half = builder.load(pointer_to(builder, address, ir.VectorType(I16, 16)), align=1)
        bits = builder.shl(builder.zext(half, I32X16), constant_lanes(I32X16, 16))
        spot = builder.add(out, builder.shl(block.index, I64(6)))
        builder.store(bits, pointer_to(builder, spot, I32X16), align=1)


@emitter(types.void, types.int64, types.int64, types.int64)
def widen_float16(builder: Any, source: Any, out: Any, count: Any) -> None:
    """Convert fp16 to fp32."""
    with blocks_of_16(builder, count) as block:
        address = builder.add(source, builder.shl(block.index, I64(5)))
        half = builder.load(pointer_to(builder, address, ir.VectorType(I16, 16)), align=1)
        bits = half_bits(builder, builder.zext(half, I32X16))
        spot = builder.add(out, builder.shl(block.index, I64(6)))
        builder.store(bits, pointer_to(builder, spot, I32X16), align=1)


@emitter(types.void, types.int64, types.int64, types.int64)
def copy_float32(builder: Any, source: Any, out: Any, count: Any) -> None:
    """Copy fp32 numbers."""
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        row = builder.load(pointer_to(builder, source, I32X16, offset), align=1)
        builder.store(row, pointer_to(builder, out, I32X16, offset), align=1)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        vector = builder.fadd(take_lanes(builder, vector, low), take_lanes(builder, vector, high))
    return builder.extract_element(vector, I32(0))


@emitter(types.void, *(types.int64,) * 7)
def dot4(builder: Any, a: Any, b: Any, c: Any, d: Any, x: Any, count: Any, out: Any) -> None:
    """The dot products of four rows with `x`, as four floats at `out`."""
    sums = [mutable(builder, constant_lanes(F32X16, 0.0)) for _ in range(4)]
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        factor = builder.load(pointer_to(builder, x, F32X16, offset), align=1)
        for row, total in zip((a, b, c, d), sums, strict=True):
            value = builder.load(pointer_to(builder, row, F32X16, offset), align=1)
            added = call_named(
                builder, "llvm.fmuladd.v16f32", F32X16, value, factor, builder.load(total)
            )
            builder.store(added, total)
    for n, total in enumerate(sums):
        builder.store(
            _sum_lanes(builder, builder.load(total)), pointer_to(builder, out, F32, 4 * n), align=1
        )


@emitter(types.void, *(types.int64,) * 7)
def accumulate4(
    builder: Any, out: Any, a: Any, b: Any, c: Any, d: Any, weights: Any, count: Any
) -> None:
    """Add four rows, times the four floats at `weights`, to the row at `out`."""
    weight = [
        repeat(builder, builder.load(pointer_to(builder, weights, F32, 4 * n), align=1), 16)
        for n in range(4)
    ]
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        pointer = pointer_to(builder, out, F32X16, offset)
        total = builder.load(pointer, align=1)
        for row, factor in zip((a, b, c, d), weight, strict=True):
            value = builder.load(pointer_to(builder, row, F32X16, offset), align=1)
            total = call_named(builder, "llvm.fmuladd.v16f32", F32X16, value, factor, total)
        builder.store(total, pointer, align=1)


def _row_operation(name: str, operation: str) -> Any:
    def emit(builder: Any, row: Any, count: Any, number: Any) -> None:
        numbers = repeat(builder, number, 16)
        with blocks_of_16(builder, count) as block:
            pointer = pointer_to(builder, row, F32X16, builder.shl(block.index, I64(6)))
            value = getattr(builder, operation)(builder.load(pointer, align=1), numbers)
            builder.store(value, pointer, align=1)

    emit.__name__ = name
    return emitter(types.void, types.int64, types.int64, types.float32)(emit)


# scale_row(row, count, number), divide_row(row, count, number): in place
scale_row = _row_operation("scale_row", "fmul")
divide_row = _row_operation("divide_row", "fdiv")


@emitter(types.void, types.int64, types.int64, types.int64, types.float32)
def add_row(builder: Any, out: Any, row: Any, count: Any, weight: Any) -> None:
    """Add a row, times `weight`, to the row at `out`."""
    weights = repeat(builder, weight, 16)
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        pointer = pointer_to(builder, out, F32X16, offset)
        value = builder.load(pointer_to(builder, row, F32X16, offset), align=1)
        total = builder.load(pointer, align=1)
        builder.store(
            call_named(builder, "llvm.fmuladd.v16f32", F32X16, value, weights, total),
            pointer,
            align=1,
        )


@emitter(types.float32, types.int64, types.int64)
def sum_squares(builder: Any, row: Any, count: Any) -> Any:
    """Sum of the squares of a row."""
    total = mutable(builder, constant_lanes(F32X16, 0.0))
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        value = builder.load(pointer_to(builder, row, F32X16, offset), align=1)
        added = call_named(
            builder, "llvm.fmuladd.v16f32", F32X16, value, value, builder.load(total)
        )
        builder.store(added, total)
    return _sum_lanes(builder, builder.load(total))


@emitter(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
def project4(builder: Any, rows: Any, projection: Any, stride: Any, depth: Any, out: Any) -> None:
    """Project four contiguous rows of `depth` floats on 32 columns: `[4, 32]` floats at `out`.

    `projection` points to the first of the 32 columns; its rows are `stride` bytes apart. Each sum
    runs over `depth` in order, so it depends on its own row and column alone.
    """
    kind = ir.VectorType(F32, 32)
    sums = [mutable(builder, constant_lanes(kind, 0.0)) for _ in range(4)]
    with cgutils.for_range(builder, depth) as step:
        line = builder.add(projection, builder.mul(step.index, stride))
        weights = builder.load(pointer_to(builder, line, kind), align=1)
        spot = builder.add(rows, builder.shl(step.index, I64(2)))
        for n, total in enumerate(sums):
            address = builder.add(spot, builder.mul(depth, I64(4 * n)))
            value = builder.load(pointer_to(builder, address, F32), align=1)
            added = call_named(
                builder,
                "llvm.fmuladd.v32f32",
                kind,
                repeat(builder, value, 32),
                weights,
                builder.load(total),
            )
            builder.store(added, total)
    for n, total in enumerate(sums):
        builder.store(builder.load(total), pointer_to(builder, out, kind, 128 * n), align=1)


@emitter(types.int64, types.int64, types.int64)
def positive_bits(builder: Any, values: Any, bias: Any) -> Any:
    """Bit n of 32: whether float n at `values`, plus float n at `bias`, is above zero."""
    kind = ir.VectorType(F32, 32)
    value = builder.fadd(
        builder.load(pointer_to(builder, values, kind), align=1),
        builder.load(pointer_to(builder, bias, kind), align=1),
    )
    bits = builder.fcmp_ordered(">", value, constant_lanes(kind, 0.0))
    return builder.zext(builder.bitcast(bits, I32), I64)


@emitter(types.float32, types.int64, types.int64, types.float32)
def exp_shifted(builder: Any, row: Any, count: Any, shift: Any) -> Any:
    """Replace each x of a row by exp(x - shift), x at most `shift`; return their sum.

    Within 2 ulp; results below the smallest normal number are zero; NaN stays NaN.
    """
    total = mutable(builder, constant_lanes(F32X16, 0.0))
    shifts = repeat(builder, shift, 16)

    def number(value: float) -> Any:
        return constant_lanes(F32X16, value)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return call_named(builder, "llvm.fmuladd.v16f32", F32X16, a, b, c)

    with blocks_of_16(builder, count) as block:
        pointer = pointer_to(builder, row, F32X16, builder.shl(block.index, I64(6)))
        x = builder.fsub(builder.load(pointer, align=1), shifts)
        # adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
        magic = number(12582912.0)
        rounded = fma(x, number(1.4426950408889634), magic)
        whole = builder.fsub(rounded, magic)
        part = fma(whole, number(-0.693359375), x)
        part = fma(whole, number(2.12194440e-4), part)
        series = number(1 / 5040)
        for divisor in (720, 120, 24, 6, 2, 1, 1):
            series = fma(series, part, number(1 / divisor))
        power = builder.shl(
            builder.add(builder.bitcast(rounded, I32X16), constant_lanes(I32X16, 127)),
            constant_lanes(I32X16, 23),
        )
        value = builder.fmul(series, builder.bitcast(power, F32X16))
        small = builder.fcmp_ordered("<", x, number(-87.0))
        value = builder.select(small, number(0.0), value)
        builder.store(value, pointer, align=1)
        builder.store(builder.fadd(builder.load(total), value), total)
    return _sum_lanes(builder, builder.load(total))


@emitter(types.float32, types.int64, types.int64)
def row_maximum(builder: Any, row: Any, count: Any) -> Any:
    """Largest float of a row, NaN set aside; -inf if there is none."""
    largest = mutable(builder, constant_lanes(F32X16, float("-inf")))
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        value = builder.load(pointer_to(builder, row, F32X16, offset), align=1)
        above = builder.fcmp_ordered(">", value, builder.load(largest))
        builder.store(builder.select(above, value, builder.load(largest)), largest)
    vector, lanes = builder.load(largest), 16
    while lanes > 1:
        lanes //= 2
        low = take_lanes(builder, vector, list(range(lanes)))
        high = take_lanes(builder, vector, list(range(lanes, 2 * lanes)))
        vector = builder.select(builder.fcmp_ordered(">", high, low), high, low)
    return builder.extract_element(vector, I32(0))
