"""Machine-level pieces of the CPU kernels: raw memory, bits, atomics, and how to write more.

The kernels see arrays as addresses and byte strides, so one compiled version serves every stride,
alignment, dtype and read-only flag. Loads and stores therefore assume no alignment.

`emitter` makes a function for kernels out of LLVM IR. Besides the pieces here, `codes` and `rows`
use it for vector loops, whose speed, and the order of whose floating-point operations, must not
depend on what an optimiser makes of a scalar loop. Lanes are counted in the order of memory, on
little-endian machines.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")
FLOAT32, FLOAT16, BFLOAT16, INT32 = range(4)

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
F32X16, I16X16, I32X16 = (ir.VectorType(kind, 16) for kind in (F32, I16, I32))


class Builder:
    """LLVM's builder of instructions, and what it lacks. Addresses and offsets count bytes."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def pointer(self, address: Any, kind: Any, offset: Any = 0) -> Any:
        """Pointer to `kind` at an address, `offset` on."""
        address = self.add(address, I64(offset) if isinstance(offset, int) else offset)
        return self.inttoptr(address, kind.as_pointer())

    def read(self, address: Any, kind: Any, offset: Any = 0) -> Any:
        """The `kind` at an address."""
        return self.load(self.pointer(address, kind, offset), align=1)

    def write(self, value: Any, address: Any, offset: Any = 0) -> None:
        """Write a value to an address."""
        self.store(value, self.pointer(address, value.type, offset), align=1)

    def mutable(self, value: Any) -> Any:
        """A place to load and store a value that a loop changes, and what it is at first."""
        return cgutils.alloca_once_value(self._builder, value)

    def named(self, name: str, returns: Any, *values: Any) -> Any:
        """Call a function, such as an LLVM intrinsic, by its name."""
        kind = ir.FunctionType(returns, [value.type for value in values])
        return self.call(cgutils.get_or_insert_function(self.module, kind, name), values)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c in every lane, rounded once where the machine can."""
        return self.named(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def repeat(self, value: Any, lanes: int) -> Any:
        """A vector with a value in every lane."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.insert_element(undefined, value, I32(0))
        return self.pick(first, undefined, [0] * lanes)

    def pick(self, a: Any, b: Any, order: Any) -> Any:
        """The lanes of two vectors that `order` names, in that order."""
        lanes = [I32(lane) for lane in order]
        kind = ir.VectorType(I32, len(lanes))
        return self.shuffle_vector(a, b, ir.Constant(kind, lanes))

    def fold(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """All lanes combined into one, halves with one another."""
        while (half := vector.type.count // 2) > 0:
            low = self.pick(vector, vector, range(half))
            vector = combine(low, self.pick(vector, vector, range(half, 2 * half)))
        return self.extract_element(vector, I32(0))

    def loop(self, count: Any) -> Any:
        """A loop over `step.index` below `count`: `with build.loop(count) as step`."""
        return cgutils.for_range(self._builder, count)

    @contextmanager
    def sixteens(self, count: Any) -> Iterator[Any]:
        """Loop over `count` 32-bit elements, a multiple of 16, sixteen at a time: their offset."""
        with self.loop(self.lshr(count, I64(4))) as block:
            # Known to lose no bit, so that half of it is another shift.
            yield self.shl(block.index, I64(6), flags=("nuw", "nsw"))

    def half_bits(self, half: Any) -> Any:
        """fp32 bits of fp16 numbers, both in 32 bits, with no need for hardware conversion."""
        kind = half.type
        floating = ir.VectorType(F32, kind.count) if isinstance(kind, ir.VectorType) else F32
        magnitude = self.shl(self.and_(half, lanes(kind, 0x7FFF)), lanes(kind, 13))
        normal = self.add(magnitude, lanes(kind, 112 << 23))
        special = self.add(magnitude, lanes(kind, 224 << 23))
        # a subnormal is its mantissa times 2^-24: put it under the exponent of 2^-14, take that off
        offset = lanes(kind, 113 << 23)
        raised = self.bitcast(self.add(magnitude, offset), floating)
        subnormal = self.bitcast(self.fsub(raised, self.bitcast(offset, floating)), kind)
        exponent = self.and_(half, lanes(kind, 0x7C00))
        zero = self.icmp_unsigned("==", exponent, lanes(kind, 0))
        full = self.icmp_unsigned("==", exponent, lanes(kind, 0x7C00))
        bits = self.select(full, special, self.select(zero, subnormal, normal))
        return self.or_(bits, self.shl(self.and_(half, lanes(kind, 0x8000)), lanes(kind, 16)))


def lanes(kind: Any, value: float) -> ir.Constant:
    """A constant, in every lane where `kind` is a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def emitter(
    returns: Any = types.void, floats: tuple[str, ...] = (), name: str = ""
) -> Callable[[Callable[..., Any]], Any]:
    """Turn `emit(builder, *values)` into a function that numba inlines at each call.

    Its parameters are int64, those named in `floats` fp32.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        names = list(inspect.signature(emit).parameters)[1:]
        takes = [types.float32 if name in floats else types.int64 for name in names]

        def typed(typing_context: Any, *_: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = emit(Builder(builder), *values)
                return context.get_dummy_value() if result is None else result

            return returns(*takes), generate

        # numba reads the number of parameters from the signature of the function it wraps
        called, listed = name or emit.__name__, ", ".join(names)
        scope: dict[str, Any] = {"typed": typed}
        exec(f"def {called}(context, {listed}):\n    return typed(context, {listed})", scope)
        function = scope[called]
        function.__module__ = __name__
        return intrinsic(function)

    return decorate


# ---- scalars in memory


def _loader(name: str, kind: ir.Type, returns: types.Type, signed: bool = False) -> Any:
    def emit(build, address):
        value = build.read(address, kind)
        if isinstance(kind, ir.IntType) and kind.width < 64:
            return (build.sext if signed else build.zext)(value, I64)
        return value

    return emitter(returns, name=name)(emit)


def _storer(name: str, kind: ir.Type, floats: tuple[str, ...] = ()) -> Any:
    def emit(build, address, value):
        if isinstance(kind, ir.IntType) and kind.width < 64:
            value = build.trunc(value, kind)
        build.write(value, address)

    return emitter(floats=floats, name=name)(emit)


load_u16 = _loader("load_u16", I16, types.int64)
load_u32 = _loader("load_u32", I32, types.int64)
load_i64 = _loader("load_i64", I64, types.int64)
load_i32 = _loader("load_i32", I32, types.int64, signed=True)
load_f32 = _loader("load_f32", F32, types.float32)
store_16 = _storer("store_16", I16)
store_32 = _storer("store_32", I32)
store_64 = _storer("store_64", I64)
store_f32 = _storer("store_f32", F32, ("value",))


@emitter()
def increment(build, address):
    """Add 1 to a u32."""
    build.write(build.add(build.read(address, I32), I32(1)), address)


@emitter()
def clear(build, address, size):
    """Set `size` bytes to zero."""
    pointer = build.pointer(address, I8)
    build.named("llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), size, I1(0))


@emitter()
def prefetch(build, address):
    """Hint that the cache line at `address` will be read soon. Any address is harmless."""
    pointer = build.pointer(address, I8)
    build.named("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


@emitter(types.int64)
def popcount(build, word):
    """Set bits of a 64-bit word."""
    return build.ctpop(word)


@emitter(types.int64)
def trailing_zeros(build, word):
    """Position of the lowest set bit (64 if there is none)."""
    return build.cttz(word, I1(0))


@emitter(types.int64, floats=("value",))
def float_bits(build, value):
    """The 32 bits of an fp32 number."""
    return build.zext(build.bitcast(value, I32), I64)


@emitter(types.float32)
def bits_float(build, value):
    """The fp32 number of 32 bits."""
    return build.bitcast(build.trunc(value, I32), F32)


@emitter(types.float32)
def half_to_float(build, half):
    """The fp32 value of 16 bits of fp16."""
    return build.bitcast(build.half_bits(build.trunc(half, I32)), F32)


@emitter(types.int64)
def fetch_add(build, address, amount):
    """Add to an int64 shared by threads; the value before. Orders memory around it."""
    return build.atomic_rmw("add", build.pointer(address, I64), amount, "seq_cst")


@emitter(types.int64)
def load_acquire(build, address):
    """Load an int64 shared by threads, before all that follows."""
    return build.load_atomic(build.pointer(address, I64), "acquire", 8)


@emitter(types.int64)
def call_address(build, function, argument):
    """Call the C function `int f(int64)` at an address; the result of a void one is undefined."""
    kind = ir.FunctionType(I32, [I64])
    return build.sext(build.call(build.inttoptr(function, kind.as_pointer()), [argument]), I64)
