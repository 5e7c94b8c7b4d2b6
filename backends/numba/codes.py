"""Vector loops over codes, scores and histograms, in LLVM IR."""

from llvmlite import ir
from numba import types

from .intrinsics import F32X16, I16, I16X16, I32, I32X16, I64, emitter, lanes

# bits of code in one step of `distance_run`
GROUP_BITS = 2048
# bits of a code that it takes
RUN_BITS = (32, 64, 128, 256, 512)


@emitter()
def distance_run(build, bits, codes, groups, planes, count, out):
    """Weighted distances, as u16, of groups of GROUP_BITS // bits contiguous codes.

    A plane is 128 bytes: its code repeated to fill 64, then the log2 of its weight in each word of
    the next 64. Words have 64 bits, those of codes of 32 bits 32.
    """
    for size in RUN_BITS:
        with build.if_then(build.icmp_unsigned("==", bits, I64(size))):
            _distance_run(build, size, codes, groups, planes, count, out)


def _distance_run(build, bits, codes, groups, planes, count, out):
    word_bits, keys = min(bits, 64), GROUP_BITS // bits
    words = 512 // word_bits
    wide = ir.VectorType(ir.IntType(word_bits), words)
    with build.loop(groups) as group:
        base = build.add(codes, build.mul(group.index, I64(GROUP_BITS // 8)))
        code = [build.read(base, wide, 64 * n) for n in range(GROUP_BITS // 512)]
        sums = [build.mutable(lanes(wide, 0)) for _ in code]
        with build.loop(count) as plane:
            entry = build.add(planes, build.mul(plane.index, I64(128)))
            pattern, shift = build.read(entry, wide), build.read(entry, wide, 64)
            for word, total in zip(code, sums, strict=True):
                different = build.xor(word, pattern)
                ones = build.named(f"llvm.ctpop.v{words}i{word_bits}", wide, different)
                build.store(build.add(build.load(total), build.shl(ones, shift)), total)
        narrow = [build.trunc(build.load(total), ir.VectorType(I16, words)) for total in sums]
        while len(narrow) > 1:
            both = range(2 * narrow[0].type.count)
            pairs = zip(narrow[::2], narrow[1::2], strict=True)
            narrow = [build.pick(a, b, both) for a, b in pairs]
        total = narrow[0]
        # a code of several words: add neighbouring lanes
        while total.type.count > keys:
            half = total.type.count // 2
            pairs = build.bitcast(total, ir.VectorType(I32, half))
            high = build.lshr(pairs, lanes(pairs.type, 16))
            total = build.trunc(build.add(pairs, high), ir.VectorType(I16, half))
        build.write(total, out, build.mul(group.index, I64(2 * keys)))


@emitter()
def add_counts(build, out, source, count):
    """Add `count` u32 numbers, a multiple of 16, to those at `out`."""
    with build.sixteens(count) as offset:
        total, more = build.read(out, I32X16, offset), build.read(source, I32X16, offset)
        build.write(build.add(total, more), out, offset)


@emitter()
def order_products(build, distances, norms, most, out, count):
    """u32 sort keys, smaller for larger (most - 2 * distance) * norm: u16, fp16, `count` % 16 = 0.

    NaN and -0 count as 0.
    """
    number = lanes(I32X16, 0x7FFFFFFF)
    limit = build.repeat(build.trunc(most, I32), 16)
    with build.sixteens(count) as offset:
        distance, norm = (
            build.zext(build.read(halves, I16X16, build.lshr(offset, I64(1))), I32X16)
            for halves in (distances, norms)
        )
        agreement = build.sub(limit, build.shl(distance, lanes(I32X16, 1)))
        factor = build.bitcast(build.half_bits(norm), F32X16)
        score = build.fmul(build.sitofp(agreement, F32X16), factor)
        bits = build.bitcast(score, I32X16)
        negative = build.icmp_signed("<", bits, lanes(I32X16, 0))
        key = build.select(negative, bits, build.sub(number, bits))
        nonzero = build.fcmp_ordered("!=", score, lanes(F32X16, 0.0))
        build.write(build.select(nonzero, key, number), out, offset)


def _range_mask(name, kind):
    def emit(build, address, first, span):
        vector = build.read(address, ir.VectorType(kind, 64))
        offset = build.sub(vector, build.repeat(build.trunc(first, kind), 64))
        bound = build.repeat(build.trunc(span, kind), 64)
        return build.bitcast(build.icmp_unsigned("<=", offset, bound), I64)

    return emitter(types.int64, name=name)(emit)


# in_range(address, first, span): bit n of 64 is set if number n lies in [first, first + span].
in_range_u16 = _range_mask("in_range_u16", I16)
in_range_u32 = _range_mask("in_range_u32", I32)
