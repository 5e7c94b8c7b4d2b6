"""The scan of `hamming_topk`: what a query sees, its planes, and the scores of the keys."""

from typing import Any

import numpy as np

from .codes import (
    GROUP_BITS,
    add_counts,
    clear,
    distance_run_32,
    distance_run_64,
    distance_run_128,
    distance_run_256,
    distance_run_512,
    order_products,
)
from .intrinsics import (
    float_bits,
    half_to_float,
    load_i32,
    load_i64,
    load_u16,
    load_u32,
    popcount,
    store_16,
    store_32,
    store_64,
)
from .schedule import device, inlined, record_view

# keys scored at a time, so that codes and scores stay in the first-level cache
_TILE = 1024
# bins of the first histogram where scores are 32 bits wide: their top 11 bits
WIDE_BINS = 2048
MAX_NARROW = 65535

FIELDS = (
    "batch", "kv_heads", "tokens", "slots", "lengths", "lengths_step", "lengths_size",
    "starts", "starts_step", "starts_size",
    "k", "ratio", "k_min", "sink", "recent", "dense_below",
    "bits", "members", "sets", "codes", "codes_b", "codes_h", "codes_s",
    "q_codes", "q_codes_b", "q_codes_h", "q_codes_t", "norms", "norms_b", "norms_h", "norms_s",
    "indices", "indices_b", "indices_h", "indices_t",
    "merge", "chunk", "wide", "bins", "histograms", "scores", "verdicts",
    "control", "scratch", "scratch_bytes",
)  # fmt: skip


select_view = record_view(FIELDS)


@inlined
def bound(address: int, step: int, size: int, row: int, slots: int) -> int:
    """Entry `row` of `lengths` or `starts`, whatever it is, as a number from 0 to `slots`."""
    address += row * step
    return min(max(load_i32(address) if size == 4 else load_i64(address), 0), slots)


@device
def valid(call: Any, row: int) -> tuple[int, int]:
    """The first valid key of a row, and one past the last; none where they cross."""
    low, high = 0, call.slots
    if call.starts != 0:
        low = bound(call.starts, call.starts_step, call.starts_size, row, call.slots)
    if call.lengths != 0:
        high = bound(call.lengths, call.lengths_step, call.lengths_size, row, call.slots)
    return low, high


@device
def visible(call: Any, row: int, token: int) -> tuple[int, int]:
    """The first visible key of a query, and the number of visible keys."""
    low, high = valid(call, row)
    return low, max(high - (call.tokens - 1 - token) - low, 0)


@device
def budget(call: Any, count: int) -> int:
    """The budget of a query that sees `count` keys."""
    if call.ratio < 0:
        return call.k
    share = (count * call.ratio) >> 32
    return min(call.k, max(max(1, call.k_min), max(call.sink + call.recent, share)))


@device
def scored(call: Any, row: int, token: int) -> tuple[int, int]:
    """The keys [first, last) of a query that are scored: none if it takes all that it sees."""
    low, count = visible(call, row, token)
    if count <= budget(call, count) or count <= call.dense_below:
        return low, low
    return low + call.sink, low + count - call.recent


@device
def longest(call: Any) -> int:
    """Most keys that any query has to score."""
    most = 0
    for row in range(call.batch):
        for token in range(call.tokens):
            first, last = scored(call, row, token)
            most = max(most, last - first)
    return most


@device
def make_planes(call: Any, row: int, head: int, token: int, out: int, spare: int) -> int:
    """Write the weighted planes of a row's query codes; return their number.

    A plane takes `128` bytes where `distance_run` serves, else its code in 64-bit words and its
    weight's log2. `spare` has room for twice the codes, in 64-bit words.
    """
    bits, members = call.bits, call.members
    words = (bits + 63) // 64
    entry = plane_bytes(bits)
    level, carried = spare, spare + 8 * words * members
    for m in range(members):
        source = (
            call.q_codes + row * call.q_codes_b + (head * members + m) * call.q_codes_h
            + token * call.q_codes_t
        )  # fmt: skip
        for w in range(words):
            if 64 * w + 32 < bits:
                store_64(level + 8 * (m * words + w), load_i64(source + 8 * w))
            else:
                store_64(level + 8 * (m * words + w), load_u32(source + 8 * w))
    made, weight, left = 0, 0, members
    while left > 0:
        carries = 0
        while call.merge != 0 and left >= 3:
            a = level + 8 * words * (left - 3)
            for w in range(words):
                x, y, z = (
                    load_i64(a + 8 * w),
                    load_i64(a + 8 * (words + w)),
                    load_i64(a + 8 * (2 * words + w)),
                )
                store_64(a + 8 * w, x ^ y ^ z)
                store_64(carried + 8 * (carries * words + w), (x & y) | (z & (x ^ y)))
            left -= 2
            carries += 1
        for n in range(left):
            source = level + 8 * words * n
            for i in range(16 if entry == 128 else words):
                word = load_i64(source + 8 * (i % words))
                if bits == 32:
                    word |= word << 32
                if entry == 128 and i >= 8:
                    word = weight | weight << 32 if bits == 32 else weight
                store_64(out + 8 * i, word)
            if entry != 128:
                store_64(out + 8 * words, weight)
            out += entry
            made += 1
        level, carried = carried, level
        left = carries
        weight += 1
    return made


@inlined
def plane_bytes(bits: int) -> int:
    """Bytes of one plane."""
    if bits == 32 or bits == 64 or bits == 128 or bits == 256 or bits == 512:
        return 128
    return 8 * ((bits + 63) // 64 + 1)


@device
def one_distance(codes: int, bits: int, planes: int, count: int) -> int:
    """The distance of one key."""
    entry = plane_bytes(bits)
    words = (bits + 63) // 64
    weight_at = 64 if entry == 128 else 8 * words
    total = 0
    for n in range(count):
        plane = planes + n * entry
        ones = 0
        for w in range(bits // 64):
            ones += popcount(load_i64(codes + 8 * w) ^ load_i64(plane + 8 * w))
        if bits % 64 != 0:
            last = 8 * (words - 1)
            ones += popcount(load_u32(codes + last) ^ load_u32(plane + last))
        total += ones << (load_u32(plane + weight_at))
    return total


@device
def distances(codes: int, count: int, bits: int, planes: int, made: int, out: int) -> None:
    """Distances, as u16, of `count` contiguous codes."""
    done = 0
    if plane_bytes(bits) == 128:
        keys = GROUP_BITS // bits
        groups = count // keys
        done = groups * keys
        if bits == 128:
            distance_run_128(codes, groups, planes, made, out)
        elif bits == 64:
            distance_run_64(codes, groups, planes, made, out)
        elif bits == 256:
            distance_run_256(codes, groups, planes, made, out)
        elif bits == 32:
            distance_run_32(codes, groups, planes, made, out)
        else:
            distance_run_512(codes, groups, planes, made, out)
    for s in range(done, count):
        store_16(out + 2 * s, one_distance(codes + s * (bits // 8), bits, planes, made))


@inlined
def order(score: np.float32) -> int:
    """A u32 that is smaller for a larger score; NaN counts as 0 and -0 as 0."""
    if not (score < 0 or score > 0):
        return 0x7FFFFFFF
    bits = float_bits(score)
    return bits if bits >> 31 else 0x7FFFFFFF - bits


@device
def scan_chunk(call: Any, item: int, chunks: int, width: int, scratch: int) -> None:
    """Score one chunk of one KV head for all its rows."""
    chunk = item % chunks
    head = item // chunks % call.kv_heads
    row = item // chunks // call.kv_heads
    bits, code_bytes = call.bits, call.bits // 8
    count = call.tokens * call.sets
    first = scored(call, row, call.tokens - 1)[0] + chunk * call.chunk
    base = (row * call.kv_heads + head) * count
    planes_each = 8 + call.members * plane_bytes(bits)
    tile = scratch
    packed = tile + 2 * _TILE
    planes = packed + _TILE * code_bytes
    spare = planes + count * planes_each
    codes = call.codes + row * call.codes_b + head * call.codes_h
    last = first
    for n in range(count):
        token = n // call.sets
        mine = scored(call, row, token)
        if mine[1] > max(mine[0], first):
            last = max(last, min(mine[1], first + call.chunk))
            at = planes + n * planes_each
            made = make_planes(call, row, head * call.sets + n % call.sets, token, at + 8, spare)
            store_64(at, made)
            if call.wide != 0:
                histogram = call.histograms + ((base + n) * chunks + chunk) * call.bins * 4
                clear(histogram, 4 * call.bins)
    for start in range(first, last, _TILE):
        size = min(last - start, _TILE)
        source = codes + start * call.codes_s
        if call.codes_s != code_bytes:
            for s in range(size):
                for i in range(0, code_bytes, 4):
                    store_32(packed + s * code_bytes + i, load_u32(source + s * call.codes_s + i))
            source = packed
        for n in range(count):
            mine = scored(call, row, n // call.sets)
            keys = min(size, mine[1] - start)
            if mine[0] == mine[1] or keys <= 0:
                continue
            at = planes + n * planes_each
            made = load_i64(at)
            offset = (base + n) * width + start - mine[0]
            if call.wide == 0:
                out = call.scores + 2 * offset
                distances(source, keys, bits, at + 8, made, out)
            else:
                out = call.scores + 4 * offset
                norms = 0
                if call.norms != 0:
                    norms = call.norms + row * call.norms_b + head * call.norms_h
                    norms += start * call.norms_s
                score_wide(call, source, keys, at + 8, made, norms, tile, out)
                histogram = call.histograms + ((base + n) * chunks + chunk) * call.bins * 4
                for s in range(keys):
                    spot = histogram + 4 * (load_u32(out + 4 * s) >> 21)
                    store_32(spot, load_u32(spot) + 1)
    if call.wide == 0:
        for n in range(count):
            mine = scored(call, row, n // call.sets)
            keys = min(last, mine[1]) - first
            if mine[0] < mine[1] and keys > 0:
                histogram = call.histograms + ((base + n) * chunks + chunk) * call.bins * 4
                scores = call.scores + 2 * ((base + n) * width + first - mine[0])
                count_scores(scores, keys, histogram, call.bins, scratch)


@device
def count_scores(scores: int, count: int, histogram: int, bins: int, scratch: int) -> None:
    """Count u16 scores, in four histograms: equal neighbours would wait for one another."""
    step = 4 * bins
    clear(scratch, 4 * step)
    whole = count // 4 * 4
    for s in range(0, whole, 4):
        four = load_i64(scores + 2 * s)
        a = scratch + 4 * (four & 0xFFFF)
        b = scratch + step + 4 * ((four >> 16) & 0xFFFF)
        c = scratch + 2 * step + 4 * ((four >> 32) & 0xFFFF)
        d = scratch + 3 * step + 4 * ((four >> 48) & 0xFFFF)
        store_32(a, load_u32(a) + 1)
        store_32(b, load_u32(b) + 1)
        store_32(c, load_u32(c) + 1)
        store_32(d, load_u32(d) + 1)
    for s in range(whole, count):
        spot = scratch + 4 * load_u16(scores + 2 * s)
        store_32(spot, load_u32(spot) + 1)
    clear(histogram, step)
    for n in range(4):
        add_counts(histogram, scratch + n * step, bins)


@device
def score_wide(
    call: Any, codes: int, count: int, planes: int, made: int, norms: int, tile: int, out: int
) -> None:
    """Scores as u32, smaller better: distances, or products with norms."""
    most = call.members * call.bits
    narrow = most <= MAX_NARROW
    if narrow:
        distances(codes, count, call.bits, planes, made, tile)
    done = 0
    if narrow and norms != 0 and call.norms_s == 2:
        done = count // 16 * 16
        order_products(tile, norms, most, out, done)
    for s in range(done, count):
        if narrow:
            distance = load_u16(tile + 2 * s)
        else:
            distance = one_distance(codes + s * (call.bits // 8), call.bits, planes, made)
        if norms != 0:
            norm = half_to_float(load_u16(norms + s * call.norms_s))
            distance = order(np.float32(most - 2 * distance) * norm)
        store_32(out + 4 * s, distance)


@inlined
def chunks_of(call: Any, width: int) -> int:
    """Chunks that the longest row is cut into."""
    return (width + call.chunk - 1) // call.chunk


def select_scratch(bits: int, members: int, rows: int, chunk: int) -> int:
    """Bytes of a thread's scratch: a tile, its codes, planes and histograms."""
    planes = 8 + members * plane_bytes.py_func(bits)
    codes = members * (bits + 63) // 64 * 16 + 64
    bins = max(WIDE_BINS, members * bits + 16)
    return max(2 * _TILE + _TILE * bits // 8 + rows * planes + codes, 16 * bins) + 64
