"""From counts to positions: the threshold of a row, and where each part's keys go.

No further pass is needed to know where a selected key belongs: the row's histogram gives the
threshold and how many keys at it win, and the parts' cumulated histograms give the counts below
and at the threshold before each part. Ranks count selected keys in ascending order of position.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.backend import Config

from .counting import DIGIT, Counting
from .launch import Bound, bind
from .pieces import (
    ALIGN,
    budget_of,
    find_bin,
    part_of,
    popcount,
    visible,
    wait_for_previous,
)


@triton.jit
def locate(
    counters, cumulated, state, below, start, stop, budget, sink, recent, parts,
    ROUNDS: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr, PARTS: tl.constexpr,
    PART_TILE: tl.constexpr,
):  # fmt: skip
    """Threshold of a row and what its parts hold; pointers are the row's own.

    Returns:
        `threshold`, `ties` (how many keys at the threshold win) and [PARTS] packed counts of keys
        up to each part's end: below the threshold in the low half, at it in the high half.
    """
    prefix = tl.zeros([], tl.int32)
    need = budget - sink - recent
    if ROUNDS > 1:
        prefix = tl.load(state + (ROUNDS - 1) * 2)
        need = tl.load(state + (ROUNDS - 1) * 2 + 1)
    digit, ties = find_bin(counters + (ROUNDS - 1) * BINS, need, BINS)
    threshold = ((prefix << DIGIT) | digit).to(tl.uint32, bitcast=True)
    part = tl.arange(0, PARTS)
    low, high = part_of(start, stop, part, parts, PART_TILE)
    active = (part < parts) & (low < high)
    low = tl.maximum(low, start)
    forced = tl.maximum(tl.minimum(high, start + sink) - low, 0)
    forced += tl.maximum(high - tl.maximum(low, stop - recent), 0)
    line = cumulated + part * BINS + digit
    smaller = tl.load(line - 1, mask=active & (digit > 0), other=0)
    upto = tl.load(line, mask=active & (digit < BINS), other=0)
    upto = tl.where(active & (digit == BINS), high - low - forced, upto)
    both = (upto - smaller).to(tl.int64) << 32
    if ROUNDS > 1:
        smaller += tl.load(below + part, mask=active, other=0)
    both = tl.cumsum(tl.where(active, both + smaller + forced, 0), axis=0)
    return threshold, ties, both


@triton.jit
def ranks_of(both, ties):
    """How many keys are selected where `both` packs the counts below and at the threshold."""
    return (both & 0xFFFFFFFF).to(tl.int32) + tl.minimum((both >> 32).to(tl.int32), ties)


@triton.jit
def bits_below(count):
    """Masks of 8 bits with the lowest `count` set; none below 0, all above 7."""
    return (1 << tl.minimum(tl.maximum(count, 0), 8)) - 1


@triton.jit
def write_positions(
    out, first_rank, end_rank, scores, low, high, before, threshold, ties, start, stop, sink,
    recent, ROUNDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the positions in [low, high) of selected keys with ranks in [first_rank, end_rank).

    Ranks count selected keys in ascending order of position; `before` packs the counts before
    `low`. A thread compares the 8 keys of one vector and makes masks of them; all else is work on
    masks, which give up their few bits one by one.
    """
    # Counted in units of aligned positions, so that keys are loaded in whole vectors.
    unit = low // ALIGN
    vector = tl.arange(0, TILE // 8)
    bit = tl.arange(0, 8)
    weight = (1 << bit)[None, :]
    while unit * ALIGN < high:
        origin = unit * ALIGN + vector * 8
        # Scores are padded by a tile, so that no key needs a mask of its own.
        key = tl.load(scores + origin[:, None] + bit[None, :])
        if ROUNDS > 1:
            key = key.to(tl.uint32, bitcast=True)
        else:
            key = key.to(tl.int32).to(tl.uint32, bitcast=True)
        winners = tl.sum(tl.where(key < threshold, weight, 0), axis=1)
        equals = tl.sum(tl.where(key == threshold, weight, 0), axis=1)
        if (unit * ALIGN < start + sink) | (unit * ALIGN + TILE > tl.minimum(stop - recent, high)):
            # Only tiles at the ends hold keys that are not seen or win unscored.
            seen = bits_below(high - origin) & (255 - bits_below(start - origin))
            forced = bits_below(start + sink - origin) | (255 - bits_below(stop - recent - origin))
            winners = (winners | forced) & seen
            equals = equals & seen & (255 - forced)
        # Both counts in one scan: they stay below 2^15 within a tile.
        counts = popcount(winners.to(tl.uint32)) | (popcount(equals.to(tl.uint32)) << 16)
        scanned = tl.cumsum(counts, axis=0)
        earlier = scanned - counts
        equal_rank = (before >> 32).to(tl.int32) + (earlier >> 16)
        rank = (before & 0xFFFFFFFF).to(tl.int32) + (earlier & 0xFFFF)
        rank += tl.minimum(equal_rank, ties)
        left = winners | tl.where(equal_rank < ties, equals, 0)
        for _ in range(0, tl.max(popcount(left.to(tl.uint32)))):
            lowest = left & -left
            is_equal = ((equals & lowest) != 0).to(tl.int32)
            chosen = (left != 0) & ((is_equal == 0) | (equal_rank < ties))
            tl.store(
                out + rank,
                origin + popcount((lowest - 1).to(tl.uint32)),
                mask=chosen & (rank >= first_rank) & (rank < end_rank),
            )
            rank += chosen.to(tl.int32)
            equal_rank += is_equal
            left = left & (left - 1)
        unit += TILE // ALIGN
        if unit * ALIGN < high:
            total = tl.max(scanned)
            before += (total & 0xFFFF).to(tl.int64) | ((total >> 16).to(tl.int64) << 32)
            if ranks_of(before, ties) >= end_rank:
                unit = tl.cdiv(high, ALIGN)


@triton.jit
def find_positions(
    out, first_rank, end_rank, scores, counters, cumulated, state, below,
    start, stop, budget, sink, recent, parts,
    ROUNDS: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr, PARTS: tl.constexpr,
    PART_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the positions of a row's selected keys of ranks [first_rank, end_rank) to `out`."""
    threshold, ties, both = locate(
        counters, cumulated, state, below, start, stop, budget, sink, recent, parts,
        ROUNDS, DIGIT, BINS, PARTS, PART_TILE,
    )  # fmt: skip
    # Parts that end before the first rank: how many, and their counts.
    done = (tl.arange(0, PARTS) < parts) & (ranks_of(both, ties) <= first_rank)
    current = tl.sum(done.to(tl.int32))
    before = tl.max(tl.where(done, both, 0))
    low, _ = part_of(start, stop, current, parts, PART_TILE)
    write_positions(
        out, first_rank, end_rank, scores, low, stop, before, threshold, ties, start, stop, sink,
        recent, ROUNDS, TILE,
    )  # fmt: skip


@triton.jit
def _select_kernel(
    out, scores, counters, cumulated, state, below, lengths, starts,
    heads, tokens, slots, parts, length_step, start_step,
    k, ratio, least, sink, recent, dense_below, scores_row, counters_row,
    ROUNDS: tl.constexpr, DIGIT: tl.constexpr, BINS: tl.constexpr, PARTS: tl.constexpr,
    PART_TILE: tl.constexpr, TILE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Positions of one row, ascending, then -1; one program a part."""
    wait_for_previous(OVERLAPPED)
    program = tl.program_id(0)
    part = program % parts
    row = (program // parts).to(tl.int64)
    token = (row % tokens).to(tl.int32)
    batch = row // tokens // heads
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    seen = stop - start
    budget = budget_of(seen, k, ratio, least)
    everything = seen <= tl.maximum(budget, dense_below)
    taken = tl.minimum(seen, budget)
    # Ranks that hold no key, and all ranks where every visible key is selected.
    first = 0 if everything else taken
    share = tl.cdiv(k - first, parts)
    for at in range(first + part * share, tl.minimum(first + part * share + share, k), TILE):
        rank = at + tl.arange(0, TILE)
        mask = rank < tl.minimum(first + part * share + share, k)
        tl.store(out + row * k + rank, tl.where(rank < taken, start + rank, -1), mask=mask)
    low, high = part_of(start, stop, part, parts, PART_TILE)
    if (low < high) & (everything == 0):
        threshold, ties, both = locate(
            counters + row * counters_row, cumulated + row * parts * BINS, state + row * 6,
            below + row * parts, start, stop, budget, sink, recent, parts,
            ROUNDS, DIGIT, BINS, PARTS, PART_TILE,
        )  # fmt: skip
        before = tl.sum(tl.where(tl.arange(0, PARTS) == part - 1, both, 0))
        write_positions(
            out + row * k, 0, taken, scores + row * scores_row * ALIGN, low, high, before,
            threshold, ties, start, stop, sink, recent, ROUNDS, TILE,
        )  # fmt: skip


def bind_select(config: Config, how: Counting, parts: int, overlapped: bool) -> Bound:
    """The launch that writes positions."""
    return bind(
        _select_kernel,
        (
            "*i32", how.pointer, "*i32", "*i32", "*i32", "*i32", "*i32", "*i32",
            *["i32"] * 7, "i64", *["i32"] * 6,
        ),
        {"ROUNDS": how.rounds, "DIGIT": DIGIT, "BINS": how.bins, "PARTS": parts,
         "PART_TILE": config["tile"], "TILE": config["select_tile"], "OVERLAPPED": overlapped},
        config["select_warps"],
        overlapped=overlapped,
    )  # fmt: skip
