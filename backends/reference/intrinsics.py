"""Machine-level pieces of the CPU kernels: raw memory, bits, atomics, and how to write more.

The kernels see arrays as addresses and byte strides, so one compiled version serves every stride,
alignment, dtype and read-only flag. Loads and stores therefore assume no alignment.

`emitter` makes a function for kernels out of LLVM IR. Besides the pieces here, `codes` and `rows`
use it for vector loops, whose speed, and the order of whose floating-point operations, must not
depend on what an optimiser makes of a scalar loop. Lanes are counted in the order of memory, on
little-endian machines.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
DTYPE_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
F32X16 = ir.VectorType(F32, 16)
I32X16 = ir.VectorType(I32, 16)


def emitter(returns: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
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


def pointer_to(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    """Pointer to `kind` at a byte `address`, `offset` bytes on."""
    if offset is not None:
        address = builder.add(address, offset if hasattr(offset, "type") else I64(offset))
    return builder.inttoptr(address, kind.as_pointer())


def call_named(builder: Any, name: str, returns: Any, *values: Any) -> Any:
    """Call a function, such as an LLVM intrinsic, by its name."""
    kind = ir.FunctionType(returns, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def constant_lanes(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector with the same constant in every lane."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def repeat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with a value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    order = ir.Constant(ir.VectorType(I32, lanes), [I32(0)] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def take_lanes(builder: Any, vector: Any, order: list[int]) -> Any:
    """The lanes of a vector that `order` names, in that order."""
    undefined = ir.Constant(vector.type, ir.Undefined)
    mask = ir.Constant(ir.VectorType(I32, len(order)), [I32(lane) for lane in order])
    return builder.shuffle_vector(vector, undefined, mask)


def mutable(builder: Any, value: Any) -> Any:
    """A place for a value that a loop changes."""
    return cgutils.alloca_once_value(builder, value)


# ---- scalars in memory


def _loader(name: str, kind: ir.Type, returns: types.Type, signed: bool = False) -> Any:
    def emit(builder: Any, address: Any) -> Any:
        value = builder.load(pointer_to(builder, address, kind), align=1)
        if isinstance(kind, ir.IntType) and kind.width < 64:
            return (builder.sext if signed else builder.zext)(value, I64)
        return value

    emit.__name__ = name
    return emitter(returns, types.int64)(emit)


def _storer(name: str, kind: ir.Type, takes: types.Type) -> Any:
    def emit(builder: Any, address: Any, value: Any) -> None:
        if isinstance(kind, ir.IntType) and kind.width < 64:
            value = builder.trunc(value, kind)
        builder.store(value, pointer_to(builder, address, kind), align=1)

    emit.__name__ = name
    return emitter(types.void, types.int64, takes)(emit)


load_u16 = _loader("load_u16", I16, types.int64)
load_u32 = _loader("load_u32", I32, types.int64)
load_i64 = _loader("load_i64", I64, types.int64)
load_i32 = _loader("load_i32", I32, types.int64, signed=True)
load_f32 = _loader("load_f32", F32, types.float32)
store_16 = _storer("store_16", I16, types.int64)
store_32 = _storer("store_32", I32, types.int64)
store_64 = _storer("store_64", I64, types.int64)
store_f32 = _storer("store_f32", F32, types.float32)


@emitter(types.int64, types.int64)
def popcount(builder: Any, word: Any) -> Any:
    """Set bits of a 64-bit word."""
    return builder.ctpop(word)


@emitter(types.int64, types.int64)
def trailing_zeros(builder: Any, word: Any) -> Any:
    """Position of the lowest set bit (64 if there is none)."""
    return builder.cttz(word, I1(0))


@emitter(types.int64, types.float32)
def float_bits(builder: Any, value: Any) -> Any:
    """The 32 bits of an fp32 number."""
    return builder.zext(builder.bitcast(value, I32), I64)


@emitter(types.float32, types.int64)
def bits_float(builder: Any, value: Any) -> Any:
    """The fp32 number of 32 bits."""
    return builder.bitcast(builder.trunc(value, I32), F32)


@emitter(types.float64, types.int64)
def bits_double(builder: Any, value: Any) -> Any:
    """The fp64 number of 64 bits."""
    return builder.bitcast(value, ir.DoubleType())


@emitter(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 shared by threads; the value before. Orders memory around it."""
    return builder.atomic_rmw("add", pointer_to(builder, address, I64), amount, "seq_cst")


@emitter(types.int64, types.int64)
def load_acquire(builder: Any, address: Any) -> Any:
    """Load an int64 shared by threads, before all that follows."""
    return builder.load_atomic(pointer_to(builder, address, I64), "acquire", 8)


@emitter(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Hint that the cache line at `address` will be read soon. Any address is harmless."""
    pointer = pointer_to(builder, address, I8)
    call_named(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


@emitter(types.int64, types.int64, types.int64)
def call_address(builder: Any, function: Any, argument: Any) -> Any:
    """Call the C function `int f(int64)` at an address; the result of a void one is undefined."""
    kind = ir.FunctionType(I32, [I64])
    return builder.sext(
        builder.call(builder.inttoptr(function, kind.as_pointer()), [argument]), I64
    )


def blocks_of_16(builder: Any, count: Any) -> Any:
    """Loop over `count` elements, a multiple of 16, sixteen at a time."""
    return cgutils.for_range(builder, builder.lshr(count, I64(4)))


def half_bits(builder: Any, half: Any) -> Any:
    """fp32 bits of fp16 numbers, both as 32-bit lanes, with no need for hardware conversion."""
    kind = half.type

    def constant(value: int) -> Any:
        return constant_lanes(kind, value) if isinstance(kind, ir.VectorType) else kind(value)

    floating = ir.VectorType(F32, kind.count) if isinstance(kind, ir.VectorType) else F32
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


@emitter(types.float32, types.int64)
def half_to_float(builder: Any, half: Any) -> Any:
    """The fp32 value of 16 bits of fp16."""
    return builder.bitcast(half_bits(builder, builder.trunc(half, I32)), F32)
