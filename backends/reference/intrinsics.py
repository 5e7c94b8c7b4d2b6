"""Machine-level pieces of the CPU kernels: raw memory, atomics and short vector loops.

The kernels see arrays as addresses and byte strides, so one compiled version serves every stride,
alignment, dtype and read-only flag. Loads and stores therefore assume no alignment. The vector
loops are written out in LLVM IR because their speed, and the order of their floating-point
operations, must not depend on what an optimiser makes of a scalar loop.

Lanes are counted in the order of memory, on little-endian machines.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
DTYPE_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
# 64-bit words in one step of `distance_run`
GROUP_WORDS = 32

_i1, _i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_f32 = ir.FloatType()
_f32x16 = ir.VectorType(_f32, 16)
_i32x16 = ir.VectorType(_i32, 16)


def _inline(returns: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Turn `emit(builder, *values)` into a function that numba inlines at each call."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *_: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = emit(builder, *values)
                return context.get_dummy_value() if result is None else result

            return returns(*arguments), generate

        # numba reads the number of parameters from the signature of the function it wraps
        names = ", ".join(f"a{n}" for n in range(len(arguments)))
        scope: dict[str, Any] = {"typed": typed}
        exec(f"def {emit.__name__}(context, {names}):\n    return typed(context, {names})", scope)
        function = scope[emit.__name__]
        function.__doc__ = emit.__doc__
        function.__module__ = __name__
        return intrinsic(function)

    return decorate


def _at(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    """Pointer to `kind` at a byte `address`, `offset` bytes on."""
    if offset is not None:
        address = builder.add(address, offset if hasattr(offset, "type") else _i64(offset))
    return builder.inttoptr(address, kind.as_pointer())


def _call(builder: Any, name: str, returns: Any, *values: Any) -> Any:
    kind = ir.FunctionType(returns, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _splat(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _broadcast(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _i32(0))
    order = ir.Constant(ir.VectorType(_i32, lanes), [_i32(0)] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def _lanes(builder: Any, vector: Any, order: list[int]) -> Any:
    undefined = ir.Constant(vector.type, ir.Undefined)
    mask = ir.Constant(ir.VectorType(_i32, len(order)), [_i32(lane) for lane in order])
    return builder.shuffle_vector(vector, undefined, mask)


def _variable(builder: Any, value: Any) -> Any:
    return cgutils.alloca_once_value(builder, value)


# ---- scalars in memory


def _loader(name: str, kind: ir.Type, returns: types.Type) -> Any:
    def emit(builder: Any, address: Any) -> Any:
        value = builder.load(_at(builder, address, kind), align=1)
        wide = isinstance(kind, ir.IntType) and kind.width < returns.bitwidth
        extend = builder.sext if getattr(returns, "signed", False) else builder.zext
        return extend(value, ir.IntType(returns.bitwidth)) if wide else value

    emit.__name__ = name
    return _inline(returns, types.int64)(emit)


def _storer(name: str, kind: ir.Type, takes: types.Type) -> Any:
    def emit(builder: Any, address: Any, value: Any) -> None:
        narrow = isinstance(kind, ir.IntType) and kind.width < takes.bitwidth
        value = builder.trunc(value, kind) if narrow else value
        builder.store(value, _at(builder, address, kind), align=1)

    emit.__name__ = name
    return _inline(types.void, types.int64, takes)(emit)


load_u8 = _loader("load_u8", _i8, types.uint64)
load_u16 = _loader("load_u16", _i16, types.uint64)
load_u32 = _loader("load_u32", _i32, types.uint64)
load_u64 = _loader("load_u64", _i64, types.uint64)
load_i32 = _loader("load_i32", _i32, types.int64)
load_i64 = _loader("load_i64", _i64, types.int64)
load_f32 = _loader("load_f32", _f32, types.float32)
store_u8 = _storer("store_u8", _i8, types.uint64)
store_u16 = _storer("store_u16", _i16, types.uint64)
store_u32 = _storer("store_u32", _i32, types.uint64)
store_u64 = _storer("store_u64", _i64, types.uint64)
store_i32 = _storer("store_i32", _i32, types.int64)
store_i64 = _storer("store_i64", _i64, types.int64)
store_f32 = _storer("store_f32", _f32, types.float32)


@_inline(types.uint64, types.uint64)
def popcount(builder: Any, word: Any) -> Any:
    """Set bits of a 64-bit word."""
    return builder.ctpop(word)


@_inline(types.int64, types.uint64)
def trailing_zeros(builder: Any, word: Any) -> Any:
    """Position of the lowest set bit (64 if there is none)."""
    return builder.cttz(word, _i1(0))


@_inline(types.uint32, types.float32)
def float_bits(builder: Any, value: Any) -> Any:
    return builder.bitcast(value, _i32)


@_inline(types.float32, types.uint32)
def bits_float(builder: Any, value: Any) -> Any:
    return builder.bitcast(value, _f32)


@_inline(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 shared by threads; the value before. Orders memory around it."""
    return builder.atomic_rmw("add", _at(builder, address, _i64), amount, "seq_cst")


@_inline(types.int64, types.int64)
def load_acquire(builder: Any, address: Any) -> Any:
    return builder.load_atomic(_at(builder, address, _i64), "acquire", 8)


@_inline(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Hint that the cache line at `address` will be read soon. Any address is harmless."""
    pointer = _at(builder, address, _i8)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _i32(0), _i32(3), _i32(1))


@_inline(types.void, types.int64, types.int64)
def call_address(builder: Any, function: Any, argument: Any) -> None:
    """Call the C function `void f(int64)` at an address."""
    kind = ir.FunctionType(ir.VoidType(), [_i64])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [argument])


# ---- codes


def _distance_run(words: int) -> Any:
    def emit(builder: Any, codes: Any, groups: Any, planes: Any, count: Any, out: Any) -> None:
        keys = GROUP_WORDS // words
        wide = ir.VectorType(_i64, 8)
        with cgutils.for_range(builder, groups) as group:
            base = builder.add(codes, builder.mul(group.index, _i64(GROUP_WORDS * 8)))
            code = [
                builder.load(_at(builder, base, wide, 64 * n), align=1)
                for n in range(GROUP_WORDS // 8)
            ]
            sums = [_variable(builder, _splat(wide, 0)) for _ in code]
            with cgutils.for_range(builder, count) as plane:
                entry = builder.add(planes, builder.mul(plane.index, _i64(128)))
                pattern = builder.load(_at(builder, entry, wide), align=1)
                shift = builder.load(_at(builder, entry, wide, 64), align=1)
                for word, total in zip(code, sums, strict=True):
                    ones = _call(builder, "llvm.ctpop.v8i64", wide, builder.xor(word, pattern))
                    builder.store(
                        builder.add(builder.load(total), builder.shl(ones, shift)), total
                    )
            narrow = [builder.trunc(builder.load(s), ir.VectorType(_i16, 8)) for s in sums]
            while len(narrow) > 1:
                narrow = [
                    builder.shuffle_vector(
                        a,
                        b,
                        ir.Constant(
                            ir.VectorType(_i32, 2 * a.type.count),
                            [_i32(n) for n in range(2 * a.type.count)],
                        ),
                    )
                    for a, b in zip(narrow[::2], narrow[1::2], strict=True)
                ]
            total, lanes = narrow[0], GROUP_WORDS
            while lanes > keys:
                lanes //= 2
                pairs = builder.bitcast(total, ir.VectorType(_i32, lanes))
                high = builder.lshr(pairs, _splat(pairs.type, 16))
                total = builder.trunc(builder.add(pairs, high), ir.VectorType(_i16, lanes))
            spot = builder.add(out, builder.mul(group.index, _i64(2 * keys)))
            builder.store(total, _at(builder, spot, total.type), align=1)

    emit.__name__ = f"distance_run_{words}"
    return _inline(types.void, *(types.int64,) * 5)(emit)


# distance_run_W(codes, groups, planes, count, out): weighted distances, as u16, of `groups` groups
# of GROUP_WORDS // W contiguous codes of W 64-bit words. A plane is 16 words: its code repeated to
# fill eight, then its weight's log2 in each of eight.
distance_run_1 = _distance_run(1)
distance_run_2 = _distance_run(2)
distance_run_4 = _distance_run(4)
distance_run_8 = _distance_run(8)


def _compare_mask(name: str, kind: ir.IntType, lanes: int, predicate: str) -> Any:
    def emit(builder: Any, address: Any, limit: Any) -> Any:
        vector = builder.load(_at(builder, address, ir.VectorType(kind, lanes)), align=1)
        bound = _broadcast(builder, builder.trunc(limit, kind), lanes)
        mask = builder.bitcast(
            builder.icmp_unsigned(predicate, vector, bound), ir.IntType(lanes)
        )
        return mask if lanes == 64 else builder.zext(mask, _i64)

    emit.__name__ = name
    return _inline(types.uint64, types.int64, types.uint64)(emit)


# Which of 64 consecutive numbers are at most / equal to a limit: bit n for number n.
at_most_u16 = _compare_mask("at_most_u16", _i16, 64, "<=")
at_most_u32 = _compare_mask("at_most_u32", _i32, 64, "<=")


# ---- floating-point rows. Lengths are multiples of 16 elements.


def _blocks(builder: Any, count: Any) -> Any:
    return cgutils.for_range(builder, builder.lshr(count, _i64(4)))


@_inline(types.void, types.int64, types.int64, types.int64)
def widen_bfloat16(builder: Any, source: Any, out: Any, count: Any) -> None:
    with _blocks(builder, count) as block:
        address = builder.add(source, builder.shl(block.index, _i64(5)))
        half = builder.load(_at(builder, address, ir.VectorType(_i16, 16)), align=1)
        bits = builder.shl(builder.zext(half, _i32x16), _splat(_i32x16, 16))
        spot = builder.add(out, builder.shl(block.index, _i64(6)))
        builder.store(bits, _at(builder, spot, _i32x16), align=1)


def _half_bits(builder: Any, half: Any) -> Any:
    """fp32 bits of fp16 numbers, both as 32-bit lanes, with no need for hardware conversion."""
    kind = half.type

    def constant(value: int) -> Any:
        return _splat(kind, value) if isinstance(kind, ir.VectorType) else kind(value)

    floating = ir.VectorType(_f32, kind.count) if isinstance(kind, ir.VectorType) else _f32
    magnitude = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
    normal = builder.add(magnitude, constant(112 << 23))
    special = builder.add(magnitude, constant(224 << 23))
    # a subnormal is its mantissa times 2^-24: put it under the exponent of 2^-14, take that off
    offset = constant(113 << 23)
    subnormal = builder.bitcast(
        builder.fsub(
            builder.bitcast(builder.add(magnitude, offset), floating),
            builder.bitcast(offset, floating),
        ),
        kind,
    )
    exponent = builder.and_(half, constant(0x7C00))
    bits = builder.select(
        builder.icmp_unsigned("==", exponent, constant(0x7C00)),
        special,
        builder.select(builder.icmp_unsigned("==", exponent, constant(0)), subnormal, normal),
    )
    return builder.or_(bits, builder.shl(builder.and_(half, constant(0x8000)), constant(16)))


@_inline(types.float32, types.uint64)
def half_to_float(builder: Any, half: Any) -> Any:
    """The fp32 value of 16 bits of fp16."""
    return builder.bitcast(_half_bits(builder, builder.trunc(half, _i32)), _f32)


@_inline(types.void, types.int64, types.int64, types.int64)
def widen_float16(builder: Any, source: Any, out: Any, count: Any) -> None:
    with _blocks(builder, count) as block:
        address = builder.add(source, builder.shl(block.index, _i64(5)))
        half = builder.load(_at(builder, address, ir.VectorType(_i16, 16)), align=1)
        bits = _half_bits(builder, builder.zext(half, _i32x16))
        spot = builder.add(out, builder.shl(block.index, _i64(6)))
        builder.store(bits, _at(builder, spot, _i32x16), align=1)


@_inline(types.void, types.int64, types.int64, types.int64)
def copy_float32(builder: Any, source: Any, out: Any, count: Any) -> None:
    with _blocks(builder, count) as block:
        offset = builder.shl(block.index, _i64(6))
        row = builder.load(_at(builder, source, _i32x16, offset), align=1)
        builder.store(row, _at(builder, out, _i32x16, offset), align=1)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        vector = builder.fadd(_lanes(builder, vector, low), _lanes(builder, vector, high))
    return builder.extract_element(vector, _i32(0))


@_inline(types.void, *(types.int64,) * 7)
def dot4(builder: Any, a: Any, b: Any, c: Any, d: Any, x: Any, count: Any, out: Any) -> None:
    """The dot products of four rows with `x`, as four floats at `out`."""
    sums = [_variable(builder, _splat(_f32x16, 0.0)) for _ in range(4)]
    with _blocks(builder, count) as block:
        offset = builder.shl(block.index, _i64(6))
        factor = builder.load(_at(builder, x, _f32x16, offset), align=1)
        for row, total in zip((a, b, c, d), sums, strict=True):
            value = builder.load(_at(builder, row, _f32x16, offset), align=1)
            added = _call(
                builder, "llvm.fmuladd.v16f32", _f32x16, value, factor, builder.load(total)
            )
            builder.store(added, total)
    for n, total in enumerate(sums):
        builder.store(
            _sum_lanes(builder, builder.load(total)), _at(builder, out, _f32, 4 * n), align=1
        )


@_inline(types.void, *(types.int64,) * 7)
def accumulate4(
    builder: Any, out: Any, a: Any, b: Any, c: Any, d: Any, weights: Any, count: Any
) -> None:
    """Add four rows, times the four floats at `weights`, to the row at `out`."""
    weight = [
        _broadcast(builder, builder.load(_at(builder, weights, _f32, 4 * n), align=1), 16)
        for n in range(4)
    ]
    with _blocks(builder, count) as block:
        offset = builder.shl(block.index, _i64(6))
        pointer = _at(builder, out, _f32x16, offset)
        total = builder.load(pointer, align=1)
        for row, factor in zip((a, b, c, d), weight, strict=True):
            value = builder.load(_at(builder, row, _f32x16, offset), align=1)
            total = _call(builder, "llvm.fmuladd.v16f32", _f32x16, value, factor, total)
        builder.store(total, pointer, align=1)


@_inline(types.float32, types.int64, types.int64)
def sum_squares(builder: Any, row: Any, count: Any) -> Any:
    total = _variable(builder, _splat(_f32x16, 0.0))
    with _blocks(builder, count) as block:
        offset = builder.shl(block.index, _i64(6))
        value = builder.load(_at(builder, row, _f32x16, offset), align=1)
        added = _call(builder, "llvm.fmuladd.v16f32", _f32x16, value, value, builder.load(total))
        builder.store(added, total)
    return _sum_lanes(builder, builder.load(total))


@_inline(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
def project4(
    builder: Any, rows: Any, projection: Any, stride: Any, depth: Any, out: Any
) -> None:
    """Project four contiguous rows of `depth` floats on 32 columns: `[4, 32]` floats at `out`.

    `projection` points to the first of the 32 columns; its rows are `stride` bytes apart. Each sum
    runs over `depth` in order, so it depends on its own row and column alone.
    """
    kind = ir.VectorType(_f32, 32)
    sums = [_variable(builder, _splat(kind, 0.0)) for _ in range(4)]
    with cgutils.for_range(builder, depth) as step:
        line = builder.add(projection, builder.mul(step.index, stride))
        weights = builder.load(_at(builder, line, kind), align=1)
        spot = builder.add(rows, builder.shl(step.index, _i64(2)))
        for n, total in enumerate(sums):
            address = builder.add(spot, builder.mul(depth, _i64(4 * n)))
            value = builder.load(_at(builder, address, _f32), align=1)
            added = _call(
                builder,
                "llvm.fmuladd.v32f32",
                kind,
                _broadcast(builder, value, 32),
                weights,
                builder.load(total),
            )
            builder.store(added, total)
    for n, total in enumerate(sums):
        builder.store(builder.load(total), _at(builder, out, kind, 128 * n), align=1)


@_inline(types.uint64, types.int64, types.int64)
def positive_bits(builder: Any, values: Any, bias: Any) -> Any:
    """Bit n of 32: whether float n at `values`, plus float n at `bias`, is above zero."""
    kind = ir.VectorType(_f32, 32)
    value = builder.fadd(
        builder.load(_at(builder, values, kind), align=1),
        builder.load(_at(builder, bias, kind), align=1),
    )
    bits = builder.fcmp_ordered(">", value, _splat(kind, 0.0))
    return builder.zext(builder.bitcast(bits, _i32), _i64)


@_inline(types.float32, types.int64, types.int64, types.float32)
def exp_shifted(builder: Any, row: Any, count: Any, shift: Any) -> Any:
    """Replace each x of a row by exp(x - shift), x at most `shift`; return their sum.

    Within 2 ulp; results below the smallest normal number are zero; NaN stays NaN.
    """
    total = _variable(builder, _splat(_f32x16, 0.0))
    shifts = _broadcast(builder, shift, 16)

    def number(value: float) -> Any:
        return _splat(_f32x16, value)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return _call(builder, "llvm.fmuladd.v16f32", _f32x16, a, b, c)

    with _blocks(builder, count) as block:
        pointer = _at(builder, row, _f32x16, builder.shl(block.index, _i64(6)))
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
            builder.add(builder.bitcast(rounded, _i32x16), _splat(_i32x16, 127)),
            _splat(_i32x16, 23),
        )
        value = builder.fmul(series, builder.bitcast(power, _f32x16))
        small = builder.fcmp_ordered("<", x, number(-87.0))
        value = builder.select(small, number(0.0), value)
        builder.store(value, pointer, align=1)
        builder.store(builder.fadd(builder.load(total), value), total)
    return _sum_lanes(builder, builder.load(total))


@_inline(types.float32, types.int64, types.int64)
def row_maximum(builder: Any, row: Any, count: Any) -> Any:
    """Largest float of a row, NaN set aside; -inf if there is none."""
    largest = _variable(builder, _splat(_f32x16, float("-inf")))
    with _blocks(builder, count) as block:
        offset = builder.shl(block.index, _i64(6))
        value = builder.load(_at(builder, row, _f32x16, offset), align=1)
        above = builder.fcmp_ordered(">", value, builder.load(largest))
        builder.store(builder.select(above, value, builder.load(largest)), largest)
    vector, lanes = builder.load(largest), 16
    while lanes > 1:
        lanes //= 2
        low = _lanes(builder, vector, list(range(lanes)))
        high = _lanes(builder, vector, list(range(lanes, 2 * lanes)))
        vector = builder.select(builder.fcmp_ordered(">", high, low), high, low)
    return builder.extract_element(vector, _i32(0))
