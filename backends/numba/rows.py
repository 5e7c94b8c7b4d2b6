"""Vector loops over rows of floats, in LLVM IR. Lengths are multiples of 16 elements."""

from llvmlite import ir
from numba import types

from .intrinsics import F32, F32X16, I16X16, I32, I32X16, I64, emitter, lanes

F32X32 = ir.VectorType(F32, 32)
ZEROS = lanes(F32X16, 0.0)


def _widener(name, bits_of):
    def emit(build, source, out, count):
        with build.sixteens(count) as offset:
            half = build.read(source, I16X16, build.lshr(offset, I64(1)))
            build.write(bits_of(build, build.zext(half, I32X16)), out, offset)

    return emitter(name=name)(emit)


# widen_*(source, out, count): to fp32
widen_float16 = _widener("widen_float16", lambda build, half: build.half_bits(half))
widen_bfloat16 = _widener("widen_bfloat16", lambda build, half: build.shl(half, lanes(I32X16, 16)))


@emitter()
def copy_float32(build, source, out, count):
    """Copy fp32 numbers."""
    with build.sixteens(count) as offset:
        build.write(build.read(source, I32X16, offset), out, offset)


@emitter()
def dot4(build, a, b, c, d, x, count, out):
    """The dot products of four rows with `x`, as four floats at `out`."""
    sums = [build.mutable(ZEROS) for _ in range(4)]
    with build.sixteens(count) as offset:
        factor = build.read(x, F32X16, offset)
        for row, total in zip((a, b, c, d), sums, strict=True):
            build.store(
                build.fma(build.read(row, F32X16, offset), factor, build.load(total)), total
            )
    for n, total in enumerate(sums):
        build.write(build.fold(build.load(total), build.fadd), out, 4 * n)


@emitter()
def accumulate4(build, out, a, b, c, d, weights, count):
    """Add four rows, times the four floats at `weights`, to the row at `out`."""
    weight = [build.repeat(build.read(weights, F32, 4 * n), 16) for n in range(4)]
    with build.sixteens(count) as offset:
        total = build.read(out, F32X16, offset)
        for row, factor in zip((a, b, c, d), weight, strict=True):
            total = build.fma(build.read(row, F32X16, offset), factor, total)
        build.write(total, out, offset)


def _row_operation(name, operation):
    def emit(build, row, count, number):
        numbers = build.repeat(number, 16)
        with build.sixteens(count) as offset:
            value = getattr(build, operation)(build.read(row, F32X16, offset), numbers)
            build.write(value, row, offset)

    return emitter(floats=("number",), name=name)(emit)


# scale_row(row, count, number), divide_row(row, count, number): in place
scale_row = _row_operation("scale_row", "fmul")
divide_row = _row_operation("divide_row", "fdiv")


@emitter(floats=("weight",))
def add_row(build, out, row, count, weight):
    """Add a row, times `weight`, to the row at `out`."""
    weights = build.repeat(weight, 16)
    with build.sixteens(count) as offset:
        value, total = build.read(row, F32X16, offset), build.read(out, F32X16, offset)
        build.write(build.fma(value, weights, total), out, offset)


@emitter(types.float32)
def sum_squares(build, row, count):
    """Sum of the squares of a row."""
    total = build.mutable(ZEROS)
    with build.sixteens(count) as offset:
        value = build.read(row, F32X16, offset)
        build.store(build.fma(value, value, build.load(total)), total)
    return build.fold(build.load(total), build.fadd)


@emitter()
def project4(build, rows, projection, stride, depth, out):
    """Project four contiguous rows of `depth` floats on 32 columns: `[4, 32]` floats at `out`.

    `projection` points to the first of the 32 columns; its rows are `stride` bytes apart. Each sum
    runs over `depth` in order, so it depends on its own row and column alone.
    """
    sums = [build.mutable(lanes(F32X32, 0.0)) for _ in range(4)]
    with build.loop(depth) as step:
        weights = build.read(projection, F32X32, build.mul(step.index, stride))
        spot = build.add(rows, build.shl(step.index, I64(2)))
        for n, total in enumerate(sums):
            value = build.read(spot, F32, build.mul(depth, I64(4 * n)))
            build.store(build.fma(build.repeat(value, 32), weights, build.load(total)), total)
    for n, total in enumerate(sums):
        build.write(build.load(total), out, 128 * n)


@emitter(types.int64)
def positive_bits(build, values, bias):
    """Bit n of 32: whether float n at `values`, plus float n at `bias`, is above zero."""
    value = build.fadd(build.read(values, F32X32), build.read(bias, F32X32))
    bits = build.fcmp_ordered(">", value, lanes(F32X32, 0.0))
    return build.zext(build.bitcast(bits, I32), I64)


@emitter(types.float32, floats=("shift",))
def exp_shifted(build, row, count, shift):
    """Replace each x of a row by exp(x - shift), x at most `shift`; return their sum.

    Within 2 ulp; results below the smallest normal number are zero; NaN stays NaN.
    """
    total, shifts = build.mutable(ZEROS), build.repeat(shift, 16)
    with build.sixteens(count) as offset:
        x = build.fsub(build.read(row, F32X16, offset), shifts)
        # adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
        magic = lanes(F32X16, 12582912.0)
        rounded = build.fma(x, lanes(F32X16, 1.4426950408889634), magic)
        whole = build.fsub(rounded, magic)
        part = build.fma(whole, lanes(F32X16, -0.693359375), x)
        part = build.fma(whole, lanes(F32X16, 2.12194440e-4), part)
        series = lanes(F32X16, 1 / 5040)
        for divisor in (720, 120, 24, 6, 2, 1, 1):
            series = build.fma(series, part, lanes(F32X16, 1 / divisor))
        exponent = build.add(build.bitcast(rounded, I32X16), lanes(I32X16, 127))
        power = build.bitcast(build.shl(exponent, lanes(I32X16, 23)), F32X16)
        small = build.fcmp_ordered("<", x, lanes(F32X16, -87.0))
        value = build.select(small, ZEROS, build.fmul(series, power))
        build.write(value, row, offset)
        build.store(build.fadd(build.load(total), value), total)
    return build.fold(build.load(total), build.fadd)


@emitter(types.float32)
def row_maximum(build, row, count):
    """Largest float of a row, NaN set aside; -inf if there is none."""

    def larger(a, b):
        return build.select(build.fcmp_ordered(">", b, a), b, a)

    largest = build.mutable(lanes(F32X16, float("-inf")))
    with build.sixteens(count) as offset:
        build.store(larger(build.load(largest), build.read(row, F32X16, offset)), largest)
    return build.fold(build.load(largest), larger)
