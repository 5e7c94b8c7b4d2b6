"""Vector loops over codes, scores and histograms, in LLVM IR."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .intrinsics import (
    F32X16,
    I1,
    I8,
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
)

# bits of code in one step of `distance_run`
GROUP_BITS = 2048


def _distance_run(bits: int) -> Any:
    # codes of 32 bits are words of 32 bits
    word_bits = min(bits, 64)

    def emit(builder: Any, codes: Any, groups: Any, planes: Any, count: Any, out: Any) -> None:
        keys = GROUP_BITS // bits
        ctpop = f"llvm.ctpop.v{512 // word_bits}i{word_bits}"
        lanes = 512 // word_bits
        wide = ir.VectorType(ir.IntType(word_bits), lanes)
        with cgutils.for_range(builder, groups) as group:
            base = builder.add(codes, builder.mul(group.index, I64(GROUP_BITS // 8)))
            code = [
                builder.load(pointer_to(builder, base, wide, 64 * n), align=1)
                for n in range(GROUP_BITS // 512)
            ]
            sums = [mutable(builder, constant_lanes(wide, 0)) for _ in code]
            with cgutils.for_range(builder, count) as plane:
                entry = builder.add(planes, builder.mul(plane.index, I64(128)))
                pattern = builder.load(pointer_to(builder, entry, wide), align=1)
                shift = builder.load(pointer_to(builder, entry, wide, 64), align=1)
                for word, total in zip(code, sums, strict=True):
                    ones = call_named(builder, ctpop, wide, builder.xor(word, pattern))
                    builder.store(builder.add(builder.load(total), builder.shl(ones, shift)), total)
            narrow = [builder.trunc(builder.load(s), ir.VectorType(I16, lanes)) for s in sums]
            while len(narrow) > 1:
                narrow = [
                    builder.shuffle_vector(
                        a,
                        b,
                        ir.Constant(
                            ir.VectorType(I32, 2 * a.type.count),
                            [I32(n) for n in range(2 * a.type.count)],
                        ),
                    )
                    for a, b in zip(narrow[::2], narrow[1::2], strict=True)
                ]
            total = narrow[0]
            # a code of several words: add neighbouring lanes
            while total.type.count > keys:
                half = total.type.count // 2
                pairs = builder.bitcast(total, ir.VectorType(I32, half))
                high = builder.lshr(pairs, constant_lanes(pairs.type, 16))
                total = builder.trunc(builder.add(pairs, high), ir.VectorType(I16, half))
            spot = builder.add(out, builder.mul(group.index, I64(2 * keys)))
            builder.store(total, pointer_to(builder, spot, total.type), align=1)

    emit.__name__ = f"distance_run_{bits}"
    return emitter(types.void, *(types.int64,) * 5)(emit)


# distance_run_r(codes, groups, planes, count, out): weighted distances, as u16, of `groups` groups
# of GROUP_BITS // r contiguous codes of r bits. A plane is 128 bytes: its code repeated to fill 64,
# then the log2 of its weight in each word of the next 64.
distance_run_32 = _distance_run(32)
distance_run_64 = _distance_run(64)
distance_run_128 = _distance_run(128)
distance_run_256 = _distance_run(256)
distance_run_512 = _distance_run(512)


@emitter(types.void, types.int64, types.int64)
def clear(builder: Any, address: Any, size: Any) -> None:
    """Set `size` bytes to zero."""
    pointer = pointer_to(builder, address, I8)
    call_named(builder, "llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), size, I1(0))


@emitter(types.void, types.int64, types.int64, types.int64)
def add_counts(builder: Any, out: Any, source: Any, count: Any) -> None:
    """Add `count` u32 numbers, a multiple of 16, to those at `out`."""
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(6))
        pointer = pointer_to(builder, out, I32X16, offset)
        more = builder.load(pointer_to(builder, source, I32X16, offset), align=1)
        builder.store(builder.add(builder.load(pointer, align=1), more), pointer, align=1)


@emitter(types.void, *(types.int64,) * 5)
def order_products(
    builder: Any, distances: Any, norms: Any, most: Any, out: Any, count: Any
) -> None:
    """u32 sort keys, smaller for larger (most - 2 * distance) * norm: u16, fp16, `count` % 16 = 0.

    NaN and -0 count as 0.
    """
    number = constant_lanes(I32X16, 0x7FFFFFFF)
    limit = repeat(builder, builder.trunc(most, I32), 16)
    half = ir.VectorType(I16, 16)
    with blocks_of_16(builder, count) as block:
        offset = builder.shl(block.index, I64(5))
        distance = builder.zext(
            builder.load(pointer_to(builder, distances, half, offset), align=1), I32X16
        )
        norm = builder.zext(builder.load(pointer_to(builder, norms, half, offset), align=1), I32X16)
        agreement = builder.sub(limit, builder.shl(distance, constant_lanes(I32X16, 1)))
        score = builder.fmul(
            builder.sitofp(agreement, F32X16), builder.bitcast(half_bits(builder, norm), F32X16)
        )
        bits = builder.bitcast(score, I32X16)
        negative = builder.icmp_signed("<", bits, constant_lanes(I32X16, 0))
        key = builder.select(negative, bits, builder.sub(number, bits))
        nonzero = builder.fcmp_ordered("!=", score, constant_lanes(F32X16, 0.0))
        key = builder.select(nonzero, key, number)
        spot = pointer_to(builder, out, I32X16, builder.shl(block.index, I64(6)))
        builder.store(key, spot, align=1)


def _range_mask(name: str, kind: ir.IntType) -> Any:
    def emit(builder: Any, address: Any, first: Any, span: Any) -> Any:
        vector = builder.load(pointer_to(builder, address, ir.VectorType(kind, 64)), align=1)
        offset = builder.sub(vector, repeat(builder, builder.trunc(first, kind), 64))
        bound = repeat(builder, builder.trunc(span, kind), 64)
        return builder.bitcast(builder.icmp_unsigned("<=", offset, bound), I64)

    emit.__name__ = name
    return emitter(types.int64, types.int64, types.int64, types.int64)(emit)


# in_range(address, first, span): bit n of 64 is set if number n lies in [first, first + span].
in_range_u16 = _range_mask("in_range_u16", I16)
in_range_u32 = _range_mask("in_range_u32", I32)
