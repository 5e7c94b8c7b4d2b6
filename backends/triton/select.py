"""From counts to positions: the threshold of a row, and where each split's keys go.

No further pass is needed to know where a selected key belongs: the row's histogram gives the
threshold and how many keys at it win, and the splits' cumulated histograms give the counts below
and at the threshold before each split. Ranks count selected keys in ascending order of position.

Scores are compared two to a 32-bit word: with the top bit of either half set, a difference
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
from hata.launches import NONE, Address, LaunchList

from .counting import DIGIT, Counting, Rows, budget_group, starts_early
from .launch import Pointer, group, launch
from .layout import cache_strides, data_pointer, spans, strides, vector
from .pieces import (
    ALIGN,
    at_head,
    budget_of,
    find_bin,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    keep_order,
    place_of,
    popcount,
    prefetch_rows,
    split_range,
    visible,
)

# The upper bit of each key's two.
_UPPER = tl.constexpr(0xAAAA)
# The sign bits of two packed keys.
_TOPS = tl.constexpr(0x80008000)


@triton.jit
def _locate(histogram, arrays, row, split, span, need, budget, C: tl.constexpr):
    """Threshold of a row and what lies before a split.

    `span`: first visible position of the row and the one after the last. `need`: how many scored
    keys it selects.

    Returns:
        `threshold`, `ties` (how many keys at the threshold win), and how many keys before the split
        win for sure, and are at the threshold.
    """
    start, stop = span
    prefix = tl.zeros([], tl.int32)
    if C.ROUNDS > 1:
        state = arrays.state + row * 6
        prefix = tl.load(state + (C.ROUNDS - 1) * 2)
        need = tl.load(state + (C.ROUNDS - 1) * 2 + 1)
    digit, ties = find_bin(histogram, need)
    threshold = ((prefix << C.DIGIT) | digit).to(tl.uint32, bitcast=True)
    other = tl.arange(0, C.NUM_SPLITS)
    low, high = split_range(start, stop, other, C.NUM_SPLITS, C.SPLIT_TILE)
    earlier = (other < split) & (low < high)
    low = tl.maximum(low, start)
    forced = tl.maximum(tl.minimum(high, start + budget.sink) - low, 0)
    forced += tl.maximum(high - tl.maximum(low, stop - budget.recent), 0)
    line = arrays.cumulated + row * C.NUM_SPLITS * C.BINS + other * C.BINS + digit
    smaller = tl.load(line - 1, mask=earlier & (digit > 0), other=0)
    upto = tl.load(line, mask=earlier & (digit < C.BINS), other=0)
    # Above the counted bins there is one value more.
    upto = tl.where(digit == C.BINS, high - low - forced, upto)
    equal = tl.sum(tl.where(earlier, upto - smaller, 0))
    if C.ROUNDS > 1:
        smaller += tl.load(arrays.below + row * C.NUM_SPLITS + other, mask=earlier, other=0)
    return threshold, ties, tl.sum(tl.where(earlier, smaller + forced, 0)), equal


@triton.jit
def _bits_below(count):
    """Masks of 8 keys with those below `count` set; none below 0, all above 7."""
    return (1 << (2 * tl.minimum(tl.maximum(count, 0), 8))) - 1


@triton.jit
def _load_keys(scores, unit, high, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    """Words of the scores of a tile: two scores to a word, or one with several rounds.

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
def _select_kernel(arrays, sizes, budget, strides, C: tl.constexpr):
    """Positions of one row, ascending, and with `PAD` then -1; one program a split.

    Without `PAD` nothing is written for a row whose visible keys are all taken. With `KEY_BYTES`,
    selected rows of keys, of so many bytes, are prefetched on the way, so that the attention finds
    them in the second-level cache.

    `arrays`: positions, `Rows.pointers`, lengths, starts, key_cache. `sizes`: tokens, slots,
    steps of lengths and starts, scores_row. `strides`: of keys.
    """
    griddepcontrol_launch_dependents(C.PDL & C.EARLY)
    TILE: tl.constexpr = C.TILE
    split = tl.program_id(0) % C.NUM_SPLITS
    row = tl.program_id(0) // C.NUM_SPLITS
    batch, head, token = place_of(row, C.HEADS, sizes.tokens, C.SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(arrays, sizes, batch, token)
    seen = stop - start
    selected = budget_of(seen, budget)
    everything = seen <= tl.maximum(selected, budget.dense_below)
    keys = arrays.key_cache
    if C.KEY_BYTES > 0:
        keys += at_head(strides, batch, head) * C.VECTOR
    low, high = split_range(start, stop, split, C.NUM_SPLITS, C.SPLIT_TILE)
    out = arrays.positions + row * budget.k
    if C.PAD:
        # Ranks that hold no key, and all ranks where every visible key is selected.
        taken = tl.minimum(seen, selected)
        first = 0 if everything else taken
        share = tl.cdiv(budget.k - first, C.NUM_SPLITS)
        end = tl.minimum(first + split * share + share, budget.k)
        for at in range(first + split * share, end, TILE):
            rank = at + tl.arange(0, TILE)
            tl.store(out + rank, tl.where(rank < taken, start + rank, -1), mask=rank < end)
    if (low < high) & (everything == 0):
        PACKED: tl.constexpr = 2 if C.ROUNDS == 1 else 1
        scores = arrays.scores + row * sizes.scores_row * (ALIGN // PACKED)
        # In units of aligned positions, so that keys are loaded in whole vectors.
        unit = low // ALIGN
        bins = arrays.counters + (row * C.ROUNDS + C.ROUNDS - 1) * C.BINS + tl.arange(0, C.BINS)
        # As late as it can: what stands behind a wait is computed behind it.
        griddepcontrol_wait(C.PDL)
        histogram = tl.load(bins)
        # The first tile is in flight while the threshold is found.
        words = _load_keys(scores, unit, high, TILE, C.ROUNDS)
        keep_order()
        need = selected - budget.sink - budget.recent
        threshold, ties, smaller_before, equal_before = _locate(
            histogram, arrays, row, split, (start, stop), need, budget, C
        )
        griddepcontrol_launch_dependents(C.PDL & (not C.EARLY))
        vector = tl.arange(0, TILE // 8)
        for unit in range(low // ALIGN, tl.cdiv(high, ALIGN), TILE // ALIGN):
            winners, equals = _compare(words, threshold, TILE, C.ROUNDS)
            words = _load_keys(scores, unit + TILE // ALIGN, high, TILE, C.ROUNDS)
            origin = unit * ALIGN + vector * 8
            first = unit * ALIGN
            if (first < start + budget.sink) | (
                first + TILE > tl.minimum(stop - budget.recent, high)
            ):
                # Only tiles at the ends hold keys that are not seen or win unscored.
                unseen = _bits_below(start - origin)
                seen_here = _bits_below(high - origin) & ~unseen & _UPPER
                forced = _bits_below(start + budget.sink - origin)
                forced |= ~_bits_below(stop - budget.recent - origin)
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
                if C.KEY_BYTES > 0:
                    key_row = keys + (position * strides.s).to(tl.int64) * C.VECTOR
                    prefetch_rows(key_row, chosen.to(tl.int32), C.KEY_BYTES)
                rank += chosen.to(tl.int32)
                equal_rank += is_equal
                left = left & (left - 1)
            total = tl.sum(counts)
            smaller_before += total & 0xFFFF
            equal_before += total >> 16
    else:
        griddepcontrol_wait(C.PDL)


def launch_select(
    launches: LaunchList,
    call: Any,
    at: Rows,
    how: Counting,
    row_sizes: tuple[int, int, int],
    positions: Address,
    pdl: bool = False,
) -> None:
    """Write the launch that writes positions.

    `row_sizes`: rows, heads that select, and splits of a row. A decode step pads nothing, and may
    prefetch selected keys, so that the attention finds them in the second-level cache.
    """
    (rows, heads, num_splits), config, problem = row_sizes, call.config, call.problem
    keys, key_bytes, wide = launches.views.get("keys"), 0, 1
    key_pointer, key_strides = Pointer(NONE, "*i32"), strides(None, "bhs")
    if keys is not None:
        wide = vector(*(launches.views[name] for name in ("q", "keys", "values")))
        key_strides = cache_strides(keys, wide)
        key_pointer = Pointer(launches.address("keys"), data_pointer(problem.dtype, wide))
        if config["prefetch_keys"]:
            key_bytes = problem.head_dim * ITEMSIZE[problem.dtype]
    constants = group(
        HEADS=heads, ROUNDS=how.rounds, DIGIT=DIGIT, BINS=how.bins, NUM_SPLITS=num_splits,
        SPLIT_TILE=config["tile"], TILE=config["select_tile"], PAD=keys is None, VECTOR=wide,
        KEY_BYTES=key_bytes, EARLY=starts_early(config), SINGLE=problem.tokens == 1, PDL=pdl,
    )  # fmt: skip
    pointers, steps = spans(launches)
    groups = (
        group(
            positions=Pointer(positions, "*i32"), **at.pointers(), **pointers, key_cache=key_pointer
        ),
        group(tokens=problem.tokens, slots=call[1].shape[2], **steps, scores_row=at.scores_row),
        budget_group(call),
        key_strides,
    )
    grid = rows * num_splits
    launch(launches, _select_kernel, grid, groups, constants, config["select_warps"], pdl=pdl)
