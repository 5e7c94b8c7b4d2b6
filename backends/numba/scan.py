"""The scan of `hamming_topk`: what a query sees, its planes, and the scores of the keys."""

import numpy as np

from .codes import GROUP_BITS, RUN_BITS, add_counts, distance_run, order_products
from .intrinsics import (
    INT32,
    clear,
    float_bits,
    half_to_float,
    increment,
    load_i32,
    load_i64,
    load_u16,
    load_u32,
    popcount,
    store_16,
    store_32,
    store_64,
)
from .record import Part
from .schedule import device, inlined

# keys scored at a time, so that codes and scores stay in the first-level cache
_TILE = 1024
# bins of the first histogram where scores are 32 bits wide: their top 11 bits
WIDE_BINS = 2048
MAX_NARROW = 65535

SELECT = Part(
    {
        "lengths": "b", "starts": "b", "q_codes": "bht", "k_codes": "bhs", "key_norms": "bhs",
        "indices": "bht", "histograms": "", "scores": "", "verdicts": "",
    },
    "batch kv_heads tokens slots k ratio k_min sink recent dense_below bits members sets merge "
    "chunk wide bins",
)  # fmt: skip


@inlined
def bound(address, dtype, slots) -> int:
    """An entry of `lengths` or `starts`, whatever it is, as a number from 0 to `slots`."""
    return min(max(load_i32(address) if dtype == INT32 else load_i64(address), 0), slots)


@device
def valid(call, row) -> tuple[int, int]:
    """The first valid key of a row, and one past the last; none where they cross."""
    low, high = 0, call.slots
    if call.starts != 0:
        low = bound(call.starts + row * call.starts_b, call.starts_dtype, call.slots)
    if call.lengths != 0:
        high = bound(call.lengths + row * call.lengths_b, call.lengths_dtype, call.slots)
    return low, high


@device
def query(call, row, token) -> tuple[int, int, int]:
    """The first visible key of a query, how many it sees, and how many it attends to."""
    low, high = valid(call, row)
    seen = max(high - (call.tokens - 1 - token) - low, 0)
    take = call.k
    if call.ratio >= 0:
        least = max(max(1, call.k_min), call.sink + call.recent)
        take = min(take, max(least, (seen * call.ratio) >> 32))
    return low, seen, seen if seen <= max(take, call.dense_below) else take


@device
def scored(call, row, token) -> tuple[int, int]:
    """The keys [first, last) of a query that are scored: none if it takes all that it sees."""
    low, seen, take = query(call, row, token)
    if take == seen:
        return low, low
    return low + call.sink, low + seen - call.recent


@device
def extent(call) -> tuple[int, int]:
    """Most keys that any query has to score, in whole vectors, and most that any takes."""
    width, most = 0, 0
    for row in range(call.batch):
        for token in range(call.tokens):
            _, seen, take = query(call, row, token)
            if take < seen:
                width = max(width, seen - call.sink - call.recent)
            most = max(most, take)
    return (width + 63) // 64 * 64, most


@device
def make_planes(call, row, head, token, out, spare) -> int:
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
                x, y = load_i64(a + 8 * w), load_i64(a + 8 * (words + w))
                z = load_i64(a + 8 * (2 * words + w))
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
def plane_bytes(bits) -> int:
    """Bytes of one plane."""
    return 128 if bits in RUN_BITS else 8 * ((bits + 63) // 64 + 1)


@device
def one_distance(codes, bits, planes, count) -> int:
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
def distances(codes, count, bits, planes, made, out) -> None:
    """Distances, as u16, of `count` contiguous codes."""
    done = 0
    if plane_bytes(bits) == 128:
        keys = GROUP_BITS // bits
        done = count // keys * keys
        distance_run(bits, codes, count // keys, planes, made, out)
    for s in range(done, count):
        store_16(out + 2 * s, one_distance(codes + s * (bits // 8), bits, planes, made))


@inlined
def order(score) -> int:
    """A u32 that is smaller for a larger score; NaN counts as 0 and -0 as 0."""
    if not (score < 0 or score > 0):
        return 0x7FFFFFFF
    bits = float_bits(score)
    return bits if bits >> 31 else 0x7FFFFFFF - bits


@device
def scan_chunk(call, item, chunks, width, scratch) -> None:
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
    codes = call.k_codes + row * call.k_codes_b + head * call.k_codes_h
    last = first
    for n in range(count):
        token, at = n // call.sets, planes + n * planes_each
        mine = scored(call, row, token)
        if mine[1] > max(mine[0], first):
            last = max(last, min(mine[1], first + call.chunk))
            made = make_planes(call, row, head * call.sets + n % call.sets, token, at + 8, spare)
            store_64(at, made)
    for start in range(first, last, _TILE):
        size = min(last - start, _TILE)
        source = codes + start * call.k_codes_s
        if call.k_codes_s != code_bytes:
            for s in range(size):
                for i in range(0, code_bytes, 4):
                    store_32(packed + s * code_bytes + i, load_u32(source + s * call.k_codes_s + i))
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
                distances(source, keys, bits, at + 8, made, call.scores + 2 * offset)
                continue
            norms = call.key_norms
            if norms != 0:
                norms += row * call.key_norms_b + head * call.key_norms_h + start * call.key_norms_s
            score_wide(call, source, keys, at + 8, made, norms, tile, call.scores + 4 * offset)
    for n in range(count):
        mine = scored(call, row, n // call.sets)
        keys = min(last, mine[1]) - first
        if mine[0] == mine[1] or keys <= 0:
            continue
        histogram = call.histograms + ((base + n) * chunks + chunk) * call.bins * 4
        offset = (base + n) * width + first - mine[0]
        if call.wide == 0:
            count_scores(call.scores + 2 * offset, keys, histogram, call.bins, scratch)
        else:
            clear(histogram, 4 * call.bins)
            for s in range(offset, offset + keys):
                increment(histogram + 4 * (load_u32(call.scores + 4 * s) >> 21))


@device
def count_scores(scores, count, histogram, bins, scratch) -> None:
    """Count u16 scores, in four histograms: equal neighbours would wait for one another."""
    step = 4 * bins
    clear(scratch, 4 * step)
    whole = count // 4 * 4
    for s in range(0, whole, 4):
        four = load_i64(scores + 2 * s)
        for n in range(4):
            increment(scratch + n * step + 4 * ((four >> (16 * n)) & 0xFFFF))
    for s in range(whole, count):
        increment(scratch + 4 * load_u16(scores + 2 * s))
    clear(histogram, step)
    for n in range(4):
        add_counts(histogram, scratch + n * step, bins)


@device
def score_wide(call, codes, count, planes, made, norms, tile, out) -> None:
    """Scores as u32, smaller better: distances, or products with norms."""
    most = call.members * call.bits
    narrow = most <= MAX_NARROW
    if narrow:
        distances(codes, count, call.bits, planes, made, tile)
    done = 0
    if narrow and norms != 0 and call.key_norms_s == 2:
        done = count // 16 * 16
        order_products(tile, norms, most, out, done)
    for s in range(done, count):
        if narrow:
            distance = load_u16(tile + 2 * s)
        else:
            distance = one_distance(codes + s * (call.bits // 8), call.bits, planes, made)
        if norms != 0:
            norm = half_to_float(load_u16(norms + s * call.key_norms_s))
            distance = order(np.float32(most - 2 * distance) * norm)
        store_32(out + 4 * s, distance)


def select_scratch(bits: int, members: int, rows: int, chunk: int) -> int:
    """Bytes of a thread's scratch: a tile, its codes, planes and histograms."""
    planes = 8 + members * plane_bytes.py_func(bits)
    codes = members * (bits + 63) // 64 * 16 + 64
    bins = max(WIDE_BINS, members * bits + 16)
    return max(2 * _TILE + _TILE * bits // 8 + rows * planes + codes, 16 * bins) + 64
