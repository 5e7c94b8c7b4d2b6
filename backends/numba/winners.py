"""The selection of `hamming_topk`: from scores and histograms to the positions of the winners.

A row's verdict is the last winning score, then for each chunk its first output slot, the number of
ties it may take, and its number of winners.
"""

from .codes import add_counts, in_range_u16, in_range_u32
from .intrinsics import (
    clear,
    increment,
    load_i64,
    load_u16,
    load_u32,
    popcount,
    store_32,
    store_64,
    trailing_zeros,
)
from .scan import query, scored
from .schedule import device, inlined


@inlined
def verdict_words(chunks) -> int:
    """Words of one row's verdict."""
    return 1 + 3 * chunks


@device
def decide(call, item, chunks, width, scratch) -> None:
    """Find the last winning score of a row, and what each chunk contributes."""
    token = item % (call.tokens * call.sets) // call.sets
    row = item // (call.tokens * call.sets) // call.kv_heads
    first, last = scored(call, row, token)
    if first == last:
        return
    size = last - first
    used = (size + call.chunk - 1) // call.chunk
    want = query(call, row, token)[2] - call.sink - call.recent
    histograms = call.histograms + item * chunks * call.bins * 4
    verdict = call.verdicts + 8 * item * verdict_words(chunks)
    bins, merged = call.bins, scratch
    clear(merged, 4 * bins)
    for c in range(used):
        add_counts(merged, histograms + 4 * c * bins, bins)
    limit, below = cross(merged, want)
    scores = call.scores + 4 * item * width
    if call.wide != 0:
        # the top 11 bits are known; then the next 11, then the last 10
        want -= below
        limit, below = refine(scores, size, limit << 21, 1 << 21, 10, want, merged)
        want -= below
        limit, below = refine(scores, size, limit, 1 << 10, 0, want, merged)
    ties = max(want - below, 0)
    store_64(verdict, limit)
    slot = call.sink
    for c in range(used):
        less, equal = 0, 0
        if call.wide == 0:
            source = histograms + 4 * c * bins
            for i in range(limit):
                less += load_u32(source + 4 * i)
            equal = load_u32(source + 4 * limit)
        else:
            for s in range(c * call.chunk, min(size, (c + 1) * call.chunk), 64):
                inside = -1 if size - s >= 64 else (1 << (size - s)) - 1
                level = in_range_u32(scores + 4 * s, limit, 0) & inside
                equal += popcount(level)
                less += popcount(in_range_u32(scores + 4 * s, 0, limit) & inside & ~level)
        equal = min(equal, ties)
        ties -= equal
        entry = verdict + 8 * (1 + 3 * c)
        store_64(entry, slot)
        store_64(entry + 8, equal)
        store_64(entry + 16, less + equal)
        slot += less + equal


@inlined
def cross(histogram, want) -> tuple[int, int]:
    """The bin in which the count reaches `want`, and the count below it."""
    place, below = 0, 0
    while below + load_u32(histogram + 4 * place) < want:
        below += load_u32(histogram + 4 * place)
        place += 1
    return place, below


@device
def refine(scores, size, base, span, shift, want, histogram) -> tuple[int, int]:
    """Of the scores in [base, base + span), find the bin of 2^shift that holds the `want`-th.

    Returns where that bin starts, and how many scores of the range lie below it.
    """
    clear(histogram, 4 * (span >> shift))
    for start in range(0, size, 64):
        found = in_range_u32(scores + 4 * start, base, span - 1)
        if size - start < 64:
            found &= (1 << (size - start)) - 1
        while found != 0:
            score = load_u32(scores + 4 * (start + trailing_zeros(found)))
            found &= found - 1
            increment(histogram + 4 * ((score - base) >> shift))
    place, below = cross(histogram, want)
    return base + (place << shift), below


@device
def pack_chunk(call, item, chunks, width, lists) -> None:
    """Write the winners of one chunk for all rows of a KV head.

    `lists` is 0 where rows that take all they see need no list of them.
    """
    chunk = item % chunks
    head = item // chunks % call.kv_heads
    row = item // chunks // call.kv_heads
    count = call.tokens * call.sets
    for n in range(count):
        token = n // call.sets
        rank = (row * call.kv_heads + head) * count + n
        out = (
            call.indices + row * call.indices_b + (head * call.sets + n % call.sets)
            * call.indices_h + token * call.indices_t
        )  # fmt: skip
        first, last = scored(call, row, token)
        low, seen, take = query(call, row, token)
        if take == seen and lists == 0:
            continue
        if chunk == 0:
            # Those that win unscored, and the padding.
            for s in range(seen if take == seen else call.sink):
                store_32(out + 4 * s, low + s)
            for s in range(call.recent if take < seen else 0):
                store_32(out + 4 * (take - call.recent + s), last + s)
            for s in range(take, call.k):
                store_32(out + 4 * s, -1)
        start = chunk * call.chunk
        size = min(last - first - start, call.chunk)
        if size <= 0:
            continue
        verdict = call.verdicts + 8 * rank * verdict_words(chunks)
        entry = verdict + 8 * (1 + 3 * chunk)
        limit, slot = load_i64(verdict), out + 4 * load_i64(entry)
        ties, winners = load_i64(entry + 8), load_i64(entry + 16)
        at, position = rank * width + start, first + start
        if call.wide == 0:
            pack_narrow(call.scores + 2 * at, size, limit, ties, winners, position, slot)
        else:
            pack_wide(call.scores + 4 * at, size, limit, ties, winners, position, slot)


def _packer(in_range, load, item_size):
    @device
    def pack(scores, size, limit, ties, winners, position, out) -> None:
        end = out + 4 * winners
        start = 0
        while out < end:
            at = scores + item_size * start
            found = in_range(at, 0, limit)
            if size - start < 64:
                found &= (1 << (size - start)) - 1
            while found != 0:
                s = trailing_zeros(found)
                found &= found - 1
                if load(at + item_size * s) == limit:
                    if ties == 0:
                        continue
                    ties -= 1
                store_32(out, position + start + s)
                out += 4
            start += 64

    return pack


# pack(scores, size, limit, ties, winners, position, out) writes the positions of u16 or u32 scores
# below `limit` and of the first `ties` equal to it, of `winners` in all.
pack_narrow = _packer(in_range_u16, load_u16, 2)
pack_wide = _packer(in_range_u32, load_u32, 4)
