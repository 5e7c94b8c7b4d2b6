"""The scan: one pass over the codes that leaves a key to select by per key, and histograms.

A row (of a query, or of the queries of a group) is cut in `parts` by its own length, whatever S is.
A part writes its keys to select by, adds to the row's histogram, and leaves its own, cumulated.
With key norms the key is 32 bits wide and is found digit by digit: `_refine_kernel` counts the
second and the third digit among keys that match so far.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005, SIM102, SIM108 (jitted bodies: the compiler knows fewer forms than Python)

import triton
import triton.language as tl

from hata.backend import Config

from .counting import DIGIT, Counting, shared_declaration
from .launch import Bound, bind
from .pieces import (
    ALIGN,
    budget_of,
    count_shared,
    find_bin,
    float_key,
    is_forced,
    let_next_start,
    load_words,
    part_of,
    popcount,
    read_shared,
    shared_bins,
    visible,
    wait_for_previous,
)
from .plan import code_pointer


@triton.jit
def _load_codes(
    base, first, high, codes_s, TILE: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """`CHUNK` words of each key in [first, first + TILE), from the one that `base` points to.

    Where codes are short and lie one after the other, a row holds `KEYS` of them: one vector.
    """
    if KEYS > 1:
        # It is a multiple already; said like this, the compiler sees whole vectors.
        first = first // ALIGN * ALIGN
    position = first + tl.arange(0, TILE // KEYS) * KEYS
    word = tl.arange(0, KEYS * CHUNK) * (4 // UNIT)
    return load_words(
        base + position.to(tl.int64)[:, None] * codes_s + word[None, :],
        (position < high)[:, None],
        UNIT,
    )


@triton.jit
def _scan_kernel(
    codes, planes, norms, scores, counters, cumulated, lengths, starts,
    heads, share, tokens, slots, fresh, parts, length_step, start_step,
    k, ratio, least, sink, recent, dense_below, scores_row, counters_row,
    codes_b, codes_h, codes_s, norms_b, norms_h, norms_s,
    R: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, DROP: tl.constexpr,
    HALVE: tl.constexpr, NORMS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = R // 32 // CHUNK
    program = tl.program_id(0)
    token = program % tokens
    part = program // tokens % parts
    head = program // tokens // parts % heads
    batch = (program // tokens // parts // heads).to(tl.int64)
    row = ((batch * heads + head) * tokens + token).to(tl.int64)
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    low, high = part_of(start, stop, part, parts, TILE)
    seen = stop - start
    if (low < high) & (seen > tl.maximum(budget_of(seen, k, ratio, least), dense_below)):
        base = codes + batch * codes_b * VECTOR + (head // share) * codes_h * VECTOR
        # Codes that share a vector follow one another.
        step = codes_s * VECTOR if KEYS == 1 else CHUNK
        if AHEAD:
            # The first tile is on its way while the launch before still makes the planes.
            following = _load_codes(base, low, high, step, TILE, CHUNK, KEYS, UNIT)
        wait_for_previous(OVERLAPPED)
        if AHEAD & OVERLAPPED:
            # Codes of fresh keys are made by that launch: read such a tile again.
            if low + TILE > stop + (tokens - 1 - token) - fresh:
                following = _load_codes(base, low, high, step, TILE, CHUNK, KEYS, UNIT)
        weighted = ()
        for i in tl.static_range(PLANES * CHUNKS):
            word = tl.arange(0, KEYS * CHUNK) % CHUNK
            bits = tl.load(planes + row * (PLANES * R // 32) + i * CHUNK + word)
            weighted = weighted + (bits.to(tl.uint32, bitcast=True)[None, :],)
        if SHARED is None:
            bins = tl.zeros([BINS], tl.int32)
        else:
            bins = shared_bins(SHARED, BINS)
        for first in range(low, high, TILE):
            position = first + tl.arange(0, TILE)
            within = position < high
            distance = tl.zeros([TILE // KEYS, KEYS * CHUNK], tl.int32)
            for c in tl.static_range(CHUNKS):
                if AHEAD:
                    words = following
                    following = _load_codes(base, first + TILE, high, step, TILE, CHUNK, KEYS, UNIT)
                else:
                    words = _load_codes(
                        base + c * CHUNK * (4 // UNIT), first, high, step,
                        TILE, CHUNK, KEYS, UNIT,
                    )  # fmt: skip
                for i in tl.static_range(PLANES):
                    weight = (1 << i) if i < PLANES - 1 else GROUP - (1 << (PLANES - 1)) + 1
                    distance += popcount(words ^ weighted[i * CHUNKS + c]) * weight
            # A thread holds whole keys, so the sum leaves no copies that would be counted twice.
            if KEYS == 1:
                key = tl.sum(distance, axis=1)
            else:
                apart = tl.sum(tl.reshape(distance, [TILE // KEYS, KEYS, CHUNK]), axis=2)
                key = tl.reshape(apart, [TILE])
            if NORMS:
                norm = tl.load(
                    norms + batch * norms_b + (head // share) * norms_h
                    + position.to(tl.int64) * norms_s,
                    mask=within,
                    other=0.0,
                )  # fmt: skip
                agreement = (GROUP * R - 2 * key).to(tl.float32)
                key = float_key(agreement * norm.to(tl.float32)).to(tl.int32, bitcast=True)
            else:
                key = key >> HALVE
            tl.store(
                scores + row * scores_row * ALIGN + position,
                key.to(scores.dtype.element_ty),
                mask=within,
            )
            digit = (key.to(tl.uint32, bitcast=True) >> DROP).to(tl.int32)
            counted = within & (position >= start) & (digit < BINS)
            counted &= ~is_forced(position, start, stop, sink, recent)
            if SHARED is None:
                bins += tl.histogram(digit, BINS, mask=counted)
            else:
                count_shared(bins, digit, counted)
        if SHARED is not None:
            bins = read_shared(bins, BINS)
        let_next_start(OVERLAPPED)
        at = tl.arange(0, BINS)
        tl.store(cumulated + (row * parts + part) * BINS + at, tl.cumsum(bins, axis=0))
        tl.atomic_add(counters + row * counters_row + at, bins, mask=bins > 0, sem="relaxed")
    else:
        # Launches wait for one another in a chain, so no program may leave it.
        wait_for_previous(OVERLAPPED)


@triton.jit
def _refine_kernel(
    scores, counters, cumulated, state, below, lengths, starts,
    heads, tokens, slots, parts, length_step, start_step,
    k, ratio, least, sink, recent, dense_below, scores_row, counters_row,
    ROUND: tl.constexpr, DROP: tl.constexpr, DIGIT: tl.constexpr,
    TILE: tl.constexpr, BINS: tl.constexpr, SHARED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Count digit `ROUND` (from 1) of the keys that match all digits before."""
    wait_for_previous(OVERLAPPED)
    program = tl.program_id(0)
    token = program % tokens
    part = program // tokens % parts
    head = program // tokens // parts % heads
    batch = (program // tokens // parts // heads).to(tl.int64)
    row = ((batch * heads + head) * tokens + token).to(tl.int64)
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    low, high = part_of(start, stop, part, parts, TILE)
    seen = stop - start
    budget = budget_of(seen, k, ratio, least)
    if (low < high) & (seen > tl.maximum(budget, dense_below)):
        bins_row = counters + row * counters_row
        # Digits so far and how many keys are still to be found: state[row, ROUND] of this round.
        prefix = tl.zeros([], tl.int32)
        need = budget - sink - recent
        if ROUND > 1:
            prefix = tl.load(state + (row * 3 + ROUND - 1) * 2)
            need = tl.load(state + (row * 3 + ROUND - 1) * 2 + 1)
        digit, need = find_bin(bins_row + (ROUND - 1) * BINS, need, BINS)
        prefix = (prefix << DIGIT) | digit
        tl.store(state + (row * 3 + ROUND) * 2, prefix, mask=part == 0)
        tl.store(state + (row * 3 + ROUND) * 2 + 1, need, mask=part == 0)
        matched = prefix.to(tl.uint32, bitcast=True)
        smaller = tl.zeros([TILE], tl.int32)
        if SHARED is None:
            bins = tl.zeros([BINS], tl.int32)
        else:
            bins = shared_bins(SHARED, BINS)
        for first in range(low, high, TILE):
            position = first + tl.arange(0, TILE)
            counted = (position < high) & (position >= start)
            counted &= ~is_forced(position, start, stop, sink, recent)
            key = tl.load(
                scores + row * scores_row * ALIGN + position, mask=position < high, other=0
            )
            key = key.to(tl.uint32, bitcast=True) >> DROP
            smaller += (counted & ((key >> DIGIT) < matched)).to(tl.int32)
            counted &= (key >> DIGIT) == matched
            digits = (key & (BINS - 1)).to(tl.int32)
            if SHARED is None:
                bins += tl.histogram(digits, BINS, mask=counted)
            else:
                count_shared(bins, digits, counted)
        if SHARED is not None:
            bins = read_shared(bins, BINS)
        at = tl.arange(0, BINS)
        tl.store(below + row * parts + part, tl.sum(smaller))
        tl.store(cumulated + (row * parts + part) * BINS + at, tl.cumsum(bins, axis=0))
        tl.atomic_add(bins_row + ROUND * BINS + at, bins, mask=bins > 0, sem="relaxed")


def bind_scan(
    config: Config,
    how: Counting,
    bits: int,
    group: int,
    norms: bool,
    unit: int,
    together: int,
    keys: int,
    overlapped: bool,
) -> tuple[Bound, list[Bound]]:
    """The scan, and the rounds that refine its threshold."""
    shared = shared_declaration(config, how.bins)
    # Words that one thread loads together: as many as are aligned and divide a code.
    count = bits // 32
    chunk = min(count & -count, together)
    warps = min(config["scan_warps"], config["tile"] // 32)
    scan = bind(
        _scan_kernel,
        (
            code_pointer(unit, together), "*i32:16", "*fp16", how.pointer, "*i32", "*i32:16",
            "*i32", "*i32", *["i32"] * 9, "i64", *["i32"] * 6, *["i64"] * 6,
        ),
        {"R": bits, "GROUP": group, "PLANES": how.planes, "CHUNK": chunk, "KEYS": keys,
         "TILE": config["tile"], "BINS": how.bins, "DROP": how.drop, "HALVE": how.halve,
         "NORMS": norms, "VECTOR": together, "UNIT": unit, "SHARED": shared,
         "AHEAD": bool(config["ahead"]) and chunk == count,
         "OVERLAPPED": overlapped},
        warps,
        overlapped=overlapped,
    )  # fmt: skip
    rounds = [
        bind(
            _refine_kernel,
            (
                how.pointer, "*i32", "*i32:16", "*i32", "*i32", "*i32", "*i32",
                *["i32"] * 7, "i64", *["i32"] * 6,
            ),
            {"ROUND": i, "DROP": (2 - i) * DIGIT, "DIGIT": DIGIT, "TILE": config["tile"],
             "BINS": how.bins, "SHARED": shared, "OVERLAPPED": overlapped},
            warps,
            overlapped=overlapped,
        )
        for i in range(1, how.rounds)
    ]  # fmt: skip
    return scan, rounds
