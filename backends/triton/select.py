"""From counts to positions: the threshold of a row, and where each part's keys go.

No further pass is needed to know where a selected key belongs: the row's histogram gives the
threshold and how many keys at it win, and the parts' cumulated histograms give the counts below
and at the threshold before each part. Ranks count selected keys in ascending order of position.

Stored keys are compared two to a 32-bit word: with the top bit of either half set, a difference
that leaves the bit set says that the half was not smaller. A thread makes one mask of the 8 keys of
a vector, two bits a key; all else is work on masks, which give up their few bits one by one.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from typing import Any

import triton
import triton.language as tl

from hata.arrays import ITEMSIZE
from hata.launches import NONE, Address, LaunchList, row_step

from .counting import DIGIT, Counting, Rows, budget_scalars, starts_early
from .launch import bind, launch
from .layout import data_pointer, row_step_type, steps, vector
from .pieces import (
    ALIGN,
    budget_of,
    fetch_rows,
    find_bin,
    keep_order,
    let_next_start,
    part_of,
    place_of,
    popcount,
    visible,
    wait_for_previous,
)

# The upper bit of each key's two.
_UPPER = tl.constexpr(0xAAAA)
# The sign bits of two packed keys.
_TOPS = tl.constexpr(0x80008000)


@triton.jit
def _locate(
    histogram, cumulated, state, below, start, stop, budget, sink, recent, part,
    ROUNDS: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr, PARTS: tl.constexpr,
    PART_TILE: tl.constexpr,
):  # fmt: skip
    """Threshold of a row and what lies before a part; all are the row's own.

    Returns:
        `threshold`, `ties` (how many keys at the threshold win), and how many keys before the part
        win for sure, and are at the threshold.
    """
    prefix = tl.zeros([], tl.int32)
    need = budget - sink - recent
    if ROUNDS > 1:
        prefix = tl.load(state + (ROUNDS - 1) * 2)
        need = tl.load(state + (ROUNDS - 1) * 2 + 1)
    digit, ties = find_bin(histogram, need)
    threshold = ((prefix << DIGIT) | digit).to(tl.uint32, bitcast=True)
    other = tl.arange(0, PARTS)
    low, high = part_of(start, stop, other, PARTS, PART_TILE)
    earlier = (other < part) & (low < high)
    low = tl.maximum(low, start)
    forced = tl.maximum(tl.minimum(high, start + sink) - low, 0)
    forced += tl.maximum(high - tl.maximum(low, stop - recent), 0)
    line = cumulated + other * BINS + digit
    smaller = tl.load(line - 1, mask=earlier & (digit > 0), other=0)
    upto = tl.load(line, mask=earlier & (digit < BINS), other=0)
    # Above the counted bins there is one value more.
    upto = tl.where(digit == BINS, high - low - forced, upto)
    equal = tl.sum(tl.where(earlier, upto - smaller, 0))
    if ROUNDS > 1:
        smaller += tl.load(below + other, mask=earlier, other=0)
    return threshold, ties, tl.sum(tl.where(earlier, smaller + forced, 0)), equal


@triton.jit
def _bits_below(count):
    """Masks of 8 keys with those below `count` set; none below 0, all above 7."""
    return (1 << (2 * tl.minimum(tl.maximum(count, 0), 8))) - 1


@triton.jit
def _load_keys(scores, unit, high, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    """Words of the stored keys of a tile: two keys to a word, or one with several rounds.

    Rows are padded by a tile, so that no key needs a mask of its own.
    """
    PACKED: tl.constexpr = 2 if ROUNDS == 1 else 1
    vector = tl.arange(0, TILE // 8)
    word = tl.arange(0, 8 // PACKED)
    at = unit * (ALIGN // PACKED) + (vector * (8 // PACKED))[:, None] + word[None, :]
    words = tl.load(scores + at, mask=unit * ALIGN < high, other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def _compare(words, threshold, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    """Masks of the 8 keys of each vector: those below the threshold, and those at it."""
    if ROUNDS == 1:
        tops = tl.full([1, 1], _TOPS, tl.uint32)
        pair = threshold * 0x10001
        raised = words | tops
        reached = raised - pair
        exceeded = reached - 0x10001
        # Bits 31 and 15 of the first, 30 and 14 of the second; then four adjacent bits a word.
        both = (reached & tops) | ((exceeded & tops) >> 1)
        both = both >> 14
        four = ((both | (both >> 14)) & 15).to(tl.int32)
        shifted = four << (4 * tl.arange(0, 4))[None, :]
        mask = tl.sum(shifted, axis=1)
        return ~mask & _UPPER, mask & ~(mask << 1) & _UPPER
    else:
        weight = (2 << (2 * tl.arange(0, 8)))[None, :]
        smaller = tl.sum(tl.where(words < threshold, weight, 0), axis=1)
        return smaller, tl.sum(tl.where(words == threshold, weight, 0), axis=1)


@triton.jit
def _select_kernel(
    out, scores, counters, cumulated, state, below, lengths, starts, keys,
    tokens, slots, length_step, start_step, k, scores_row, ratio, least, sink, recent, dense_below,
    keys_b, keys_h, keys_s,
    HEADS: tl.constexpr, ROUNDS: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr,
    PARTS: tl.constexpr, PART_TILE: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr,
    VECTOR: tl.constexpr, KEY_BYTES: tl.constexpr, SINGLE: tl.constexpr, EARLY: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Positions of one row, ascending, and with `PAD` then -1; one program a part.

    Without `PAD` nothing is written for a row whose visible keys are all taken. With `KEY_BYTES`,
    selected rows of `keys`, of so many bytes, are asked for on the way, so that the attention finds
    them in the second-level cache.
    """
    let_next_start(OVERLAPPED & EARLY)
    part = tl.program_id(0) % PARTS
    row = tl.program_id(0) // PARTS
    batch, head, token = place_of(row, HEADS, tokens, SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    seen = stop - start
    budget = budget_of(seen, k, ratio, least)
    everything = seen <= tl.maximum(budget, dense_below)
    if KEY_BYTES > 0:
        keys += (batch * keys_b + head * keys_h) * VECTOR
    low, high = part_of(start, stop, part, PARTS, PART_TILE)
    out += row * k
    if PAD:
        # Ranks that hold no key, and all ranks where every visible key is selected.
        taken = tl.minimum(seen, budget)
        first = 0 if everything else taken
        share = tl.cdiv(k - first, PARTS)
        for at in range(first + part * share, tl.minimum(first + part * share + share, k), TILE):
            rank = at + tl.arange(0, TILE)
            mask = rank < tl.minimum(first + part * share + share, k)
            tl.store(out + rank, tl.where(rank < taken, start + rank, -1), mask=mask)
    if (low < high) & (everything == 0):
        PACKED: tl.constexpr = 2 if ROUNDS == 1 else 1
        scores += row * scores_row * (ALIGN // PACKED)
        # In units of aligned positions, so that keys are loaded in whole vectors.
        unit = low // ALIGN
        bins = counters + (row * ROUNDS + ROUNDS - 1) * BINS + tl.arange(0, BINS)
        # As late as it can: what stands behind a wait is computed behind it.
        wait_for_previous(OVERLAPPED)
        histogram = tl.load(bins)
        # The first tile is on its way while the threshold is found.
        words = _load_keys(scores, unit, high, TILE, ROUNDS)
        keep_order()
        threshold, ties, smaller_before, equal_before = _locate(
            histogram, cumulated + row * PARTS * BINS, state + row * 6,
            below + row * PARTS, start, stop, budget, sink, recent, part,
            ROUNDS, DIGIT, BINS, PARTS, PART_TILE,
        )  # fmt: skip
        let_next_start(OVERLAPPED & (not EARLY))
        vector = tl.arange(0, TILE // 8)
        for unit in range(low // ALIGN, tl.cdiv(high, ALIGN), TILE // ALIGN):
            winners, equals = _compare(words, threshold, TILE, ROUNDS)
            words = _load_keys(scores, unit + TILE // ALIGN, high, TILE, ROUNDS)
            origin = unit * ALIGN + vector * 8
            first = unit * ALIGN
            if (first < start + sink) | (first + TILE > tl.minimum(stop - recent, high)):
                # Only tiles at the ends hold keys that are not seen or win unscored.
                unseen = _bits_below(start - origin)
                seen_here = _bits_below(high - origin) & ~unseen & _UPPER
                forced = _bits_below(start + sink - origin) | ~_bits_below(stop - recent - origin)
                winners = (winners | forced) & seen_here
                equals = equals & seen_here & ~forced
            # Both counts in one scan: they stay below 2^15 within a tile.
            counts = popcount(winners.to(tl.uint32)) | (popcount(equals.to(tl.uint32)) << 16)
            scanned = tl.cumsum(counts, axis=0)
            earlier = scanned - counts
            equal_rank = equal_before + (earlier >> 16)
            rank = smaller_before + (earlier & 0xFFFF) + tl.minimum(equal_rank, ties)
            left = winners | tl.where(equal_rank < ties, equals, 0)
            for _ in range(0, tl.max(popcount(left.to(tl.uint32)))):
                lowest = left & -left
                is_equal = ((equals & lowest) != 0).to(tl.int32)
                chosen = (left != 0) & ((is_equal == 0) | (equal_rank < ties))
                place = popcount((lowest - 1).to(tl.uint32)) >> 1
                position = origin + place
                tl.store(out + rank, position, mask=chosen)
                if KEY_BYTES > 0:
                    key_row = keys + (position * keys_s).to(tl.int64) * VECTOR
                    fetch_rows(key_row, chosen.to(tl.int32), KEY_BYTES)
                rank += chosen.to(tl.int32)
                equal_rank += is_equal
                left = left & (left - 1)
            total = tl.sum(counts)
            smaller_before += total & 0xFFFF
            equal_before += total >> 16
    else:
        wait_for_previous(OVERLAPPED)


def launch_select(
    launches: LaunchList,
    call: Any,
    at: Rows,
    how: Counting,
    sizes: tuple[int, int, int],
    positions: Address,
    overlapped: bool = False,
) -> None:
    """Write the launch that writes positions.

    `sizes`: rows, heads that select, and parts of a row. A decode step pads nothing, and may ask
    for selected keys, so that the attention finds them in the second-level cache.
    """
    (rows, heads, parts), config, problem = sizes, call.config, call.problem
    keys = launches.views.get("keys")
    pointer, step, wide, size = "*i32", "i32", 1, 0
    key_strides: tuple[int, ...] = (0, 0, 0)
    if keys is not None:
        wide = vector(*(launches.views[name] for name in ("q", "keys", "values")))
        key_strides = steps(keys, wide)
        pointer = data_pointer(problem.dtype, wide)
        step = row_step_type(key_strides[2], keys.shape[2])
        size = problem.head_dim * ITEMSIZE[problem.dtype] * bool(config["fetch"])
    kernel = bind(
        _select_kernel,
        ("*i32", *["*i32:16"] * 3, *["*i32"] * 4, pointer, *["i32"] * 6, "i64", *["i32"] * 4,
         "i64", "i64", step),
        {"HEADS": heads, "ROUNDS": how.rounds, "DIGIT": DIGIT, "BINS": how.bins, "PARTS": parts,
         "PART_TILE": config["tile"], "TILE": config["select_tile"], "PAD": keys is None,
         "VECTOR": wide, "KEY_BYTES": size, "EARLY": starts_early(config),
         "SINGLE": problem.tokens == 1, "OVERLAPPED": overlapped},
        config["select_warps"],
        overlapped=overlapped,
    )  # fmt: skip
    arrays = (
        positions, at.scores, at.counters, at.cumulated, at.state, at.below,
        launches.address("lengths"), launches.address("starts"),
        NONE if keys is None else launches.address("keys"),
    )  # fmt: skip
    k, *limits = budget_scalars(call.budget)
    launch(
        launches, kernel, rows * parts, arrays, problem.tokens, call[1].shape[2],
        row_step(launches.views["lengths"]), row_step(launches.views["starts"]), k, at.scores_row,
        *limits, getattr(call, "dense_below", 0), *key_strides,
    )  # fmt: skip
