"""The scan: one pass over the codes that leaves a key to select by per key, and histograms.

A row (of a query, or of the queries of a group) is cut in `parts` by its own length, whatever S is.
A part writes its keys to select by, adds to the row's histogram, and leaves its own, cumulated.
With key norms the key is 32 bits wide and is found digit by digit: `_refine_kernel` counts the
second and the third digit among keys that match so far.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005, SIM108 (jitted bodies: the compiler knows fewer forms than Python)

from typing import Any

import triton
import triton.language as tl

from hata.launches import LaunchList, row_step

from .counting import DIGIT, Counting, Rows, budget_scalars, shared_declaration, starts_early
from .distance import binary_distance, distance, lane_columns
from .launch import bind, launch
from .layout import code_pointer, code_steps, norm_steps, row_step_type, scanned_words, steps
from .pieces import (
    ALIGN,
    budget_of,
    columns_of,
    count_shared,
    find_bin,
    float_key,
    interleave,
    let_next_start,
    load_words,
    part_of,
    place_of,
    read_shared,
    shared_bins,
    visible,
    wait_for_previous,
)


@triton.jit
def _load_codes(
    base, first, high, codes_s, TILE: tl.constexpr, CHUNK: tl.constexpr, PER_VECTOR: tl.constexpr,
    UNIT: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """`CHUNK` words of each key in [first, first + TILE), from the one that `base` points to.

    Where codes are short and lie one after the other, a row holds `PER_VECTOR` of them: one vector.
    What is beyond `high` is undefined. `CLAMPED`: it is the last row again, and nothing is masked.
    """
    if CLAMPED:
        first = tl.minimum(first, high - 1)
    if PER_VECTOR > 1:
        # It is a multiple already; said like this, the compiler sees whole vectors.
        first = first // ALIGN * ALIGN
    hop = codes_s * PER_VECTOR
    row = tl.arange(0, TILE // PER_VECTOR)
    word = tl.arange(0, PER_VECTOR * CHUNK) * (4 // UNIT)
    base += (tl.zeros([], tl.int64) + first) * codes_s
    if CLAMPED:
        mask = None
        row = tl.minimum(row * hop, tl.minimum((high - 1 - first) // PER_VECTOR, TILE) * hop)
    else:
        mask = (row * PER_VECTOR < high - first)[:, None]
        row *= hop
    return load_words(base + row[:, None] + word[None, :], mask, UNIT)


@triton.jit
def _load_tile(
    base, first, high, codes_s, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PER_VECTOR: tl.constexpr, UNIT: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """All words of the keys of a tile, chunk by chunk."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        one = _load_codes(
            base + c * CHUNK * (4 // UNIT), first, high, codes_s, TILE, CHUNK, PER_VECTOR, UNIT,
            CLAMPED,
        )  # fmt: skip
        chunks = chunks + (one,)
    return chunks


@triton.jit
def _scan_kernel(
    codes, planes, norms, scores, counters, cumulated, lengths, starts,
    tokens, slots, fresh, length_step, start_step,
    k, ratio, least, sink, recent, dense_below, scores_row, counters_row,
    codes_b, codes_h, codes_s, norms_b, norms_h, norms_s,
    HEADS: tl.constexpr, SHARE: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    PLANES: tl.constexpr, WEIGHTS: tl.constexpr, CHUNK: tl.constexpr, PER_VECTOR: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, DROP: tl.constexpr,
    HALVE: tl.constexpr, NORMS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, ADDERS: tl.constexpr, BINARY: tl.constexpr,
    SINGLE: tl.constexpr, EARLY: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAPPED & EARLY)
    WORDS: tl.constexpr = R // 32
    CHUNKS: tl.constexpr = WORDS // CHUNK
    # Single heads take so few instructions a key that those of masks count.
    CLAMPED: tl.constexpr = GROUP == 1
    part = tl.program_id(0) % PARTS
    row = tl.program_id(0) // PARTS
    batch, head, token = place_of(row, HEADS, tokens, SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    low, high = part_of(start, stop, part, PARTS, TILE)
    seen = stop - start
    if (low < high) & (seen > tl.maximum(budget_of(seen, k, ratio, least), dense_below)):
        base = codes + batch * codes_b * VECTOR + (head // SHARE) * codes_h * VECTOR
        # Codes that share a vector follow one another.
        step = codes_s * VECTOR if PER_VECTOR == 1 else CHUNK
        # The first tiles are on their way while the launch before still makes the planes.
        queue = ()
        for i in tl.static_range(AHEAD):
            queue = queue + _load_tile(
                base, low + i * TILE, high, step, TILE, CHUNK, CHUNKS, PER_VECTOR, UNIT, CLAMPED
            )
        wait_for_previous(OVERLAPPED)
        if OVERLAPPED:
            # Codes of fresh keys are made by that launch: read such a tile again.
            fresh_from = stop + (tokens - 1 - token) - fresh
            renewed = ()
            for i in tl.static_range(AHEAD):
                tile = queue[i * CHUNKS : (i + 1) * CHUNKS]
                if low + (i + 1) * TILE > fresh_from:
                    tile = _load_tile(
                        base, low + i * TILE, high, step, TILE, CHUNK, CHUNKS, PER_VECTOR, UNIT,
                        CLAMPED,
                    )  # fmt: skip
                renewed = renewed + tile
            queue = renewed
        weighted = ()
        for i in tl.static_range(PLANES * WORDS):
            bits = tl.load(planes + row * (PLANES * WORDS) + i)
            weighted = weighted + (bits.to(tl.uint32, bitcast=True),)
        if BINARY:
            no_bits = ()
            for _ in tl.static_range(WORDS):
                no_bits = no_bits + (tl.zeros([], tl.uint32),)
            at_zero = distance(no_bits, weighted, WORDS, WEIGHTS, False) >> HALVE
            columns = lane_columns(weighted, PLANES, WORDS)
        if SHARED is None:
            bins = tl.zeros([BINS], tl.int32)
        else:
            bins = shared_bins(SHARED, BINS)
        # Keys that win unscored are not counted.
        counted_from = start + sink
        countable = tl.maximum(tl.minimum(stop - recent, high) - counted_from, 0)
        countable = countable.to(tl.uint32, bitcast=True)
        for first in range(low, high, TILE):
            queue = queue + _load_tile(
                base, first + AHEAD * TILE, high, step, TILE, CHUNK, CHUNKS, PER_VECTOR, UNIT,
                CLAMPED,
            )  # fmt: skip
            chunks, queue = queue[:CHUNKS], queue[CHUNKS:]
            words = ()
            for c in tl.static_range(CHUNKS):
                words = words + columns_of(chunks[c], TILE // PER_VECTOR, PER_VECTOR * CHUNK)
            distances = ()
            for i in tl.static_range(PER_VECTOR):
                mine = words[i * WORDS : (i + 1) * WORDS]
                if BINARY:
                    one = binary_distance(mine, columns, at_zero, WORDS, WEIGHTS, GROUP, HALVE)
                else:
                    one = distance(mine, weighted, WORDS, WEIGHTS, ADDERS) >> HALVE
                distances = distances + (one,)
            key = interleave(distances, TILE // PER_VECTOR, PER_VECTOR)
            place = tl.arange(0, TILE)
            if NORMS:
                norm = tl.load(
                    norms + batch * norms_b + (head // SHARE) * norms_h
                    + (first + place).to(tl.int64) * norms_s,
                    mask=place < high - first,
                    other=0.0,
                )  # fmt: skip
                agreement = (GROUP * R - 2 * key).to(tl.float32)
                key = float_key(agreement * norm.to(tl.float32)).to(tl.int32, bitcast=True)
            stored = scores + row * scores_row * ALIGN + first
            tl.store(stored + place, key.to(scores.dtype.element_ty), mask=place < high - first)
            digit = (key.to(tl.uint32, bitcast=True) >> DROP).to(tl.int32)
            # Unsigned, so that one comparison serves both ends.
            counted = (place + (first - counted_from)).to(tl.uint32, bitcast=True) < countable
            if SHARED is None:
                bins += tl.histogram(digit, BINS, mask=counted & (digit < BINS))
            else:
                count_shared(bins, digit, counted, BINS)
        if SHARED is not None:
            bins = read_shared(bins, BINS)
        let_next_start(OVERLAPPED & (not EARLY))
        at = tl.arange(0, BINS)
        # First what takes longest to arrive.
        tl.atomic_add(counters + row * counters_row + at, bins, mask=bins > 0, sem="relaxed")
        tl.store(cumulated + (row * PARTS + part) * BINS + at, tl.cumsum(bins, axis=0))
    else:
        # Launches wait for one another in a chain, so no program may leave it.
        wait_for_previous(OVERLAPPED)


@triton.jit
def _refine_kernel(
    scores, counters, cumulated, state, below, lengths, starts,
    heads, tokens, slots, length_step, start_step,
    k, ratio, least, sink, recent, dense_below, scores_row, counters_row,
    ROUND: tl.constexpr, DROP: tl.constexpr, DIGIT: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, BINS: tl.constexpr, SHARED: tl.constexpr, SINGLE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Count digit `ROUND` (from 1) of the keys that match all digits before."""
    part = tl.program_id(0) % PARTS
    row = tl.program_id(0) // PARTS
    batch, _, token = place_of(row, heads, tokens, SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(lengths, starts, length_step, start_step, batch, token, tokens, slots)
    low, high = part_of(start, stop, part, PARTS, TILE)
    seen = stop - start
    budget = budget_of(seen, k, ratio, least)
    wait_for_previous(OVERLAPPED)
    if (low < high) & (seen > tl.maximum(budget, dense_below)):
        bins_row = counters + row * counters_row
        # Digits so far and how many keys are still to be found: state[row, ROUND] of this round.
        prefix = tl.zeros([], tl.int32)
        need = budget - sink - recent
        if ROUND > 1:
            prefix = tl.load(state + (row * 3 + ROUND - 1) * 2)
            need = tl.load(state + (row * 3 + ROUND - 1) * 2 + 1)
        digit, need = find_bin(tl.load(bins_row + (ROUND - 1) * BINS + tl.arange(0, BINS)), need)
        prefix = (prefix << DIGIT) | digit
        tl.store(state + (row * 3 + ROUND) * 2, prefix, mask=part == 0)
        tl.store(state + (row * 3 + ROUND) * 2 + 1, need, mask=part == 0)
        matched = prefix.to(tl.uint32, bitcast=True)
        counted_from = start + sink
        counted_to = tl.minimum(stop - recent, high)
        smaller = tl.zeros([TILE], tl.int32)
        if SHARED is None:
            bins = tl.zeros([BINS], tl.int32)
        else:
            bins = shared_bins(SHARED, BINS)
        for first in range(low, high, TILE):
            position = first + tl.arange(0, TILE)
            counted = (position >= counted_from) & (position < counted_to)
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
                count_shared(bins, digits, counted, BINS)
        if SHARED is not None:
            bins = read_shared(bins, BINS)
        at = tl.arange(0, BINS)
        tl.store(below + row * PARTS + part, tl.sum(smaller))
        tl.store(cumulated + (row * PARTS + part) * BINS + at, tl.cumsum(bins, axis=0))
        tl.atomic_add(bins_row + ROUND * BINS + at, bins, mask=bins > 0, sem="relaxed")


def launch_scan(
    launches: LaunchList,
    call: Any,
    at: Rows,
    how: Counting,
    sizes: tuple[int, int, int],
    name: str,
    overlapped: bool = False,
) -> None:
    """Write the scan of the codes of this name, and the rounds that refine its threshold.

    `sizes`: rows, heads that select, and parts of a row.
    """
    (rows, heads, parts), config, problem = sizes, call.config, call.problem
    codes, norms = launches.views[name], launches.views["key_norms"]
    assert codes is not None
    tokens, slots, bits = problem.tokens, codes.shape[2], problem.bits
    own = getattr(call, "q_codes", None) is None
    group = (call.q.shape[1] if own else call.q_codes.shape[1]) // heads
    fresh, dense_below = getattr(call, "fresh", 0), getattr(call, "dense_below", 0)
    unit, together, per_vector = scanned_words(codes)
    code_strides = steps(codes, code_steps(unit, together))
    shared = shared_declaration(config, how.bins)
    # Words that one thread loads together: as many as are aligned and divide a code.
    count = bits // 32
    chunk = min(count & -count, together)
    warps = min(config["scan_warps"], config["tile"] // 32)
    # A binary product takes two vectors of every lane, and one key of each.
    binary = bool(config["binary"]) and launches.gpu.multiplies_bits
    binary = binary and config["tile"] >= 64 * warps * per_vector
    constants = {
        "TILE": config["tile"], "PARTS": parts, "BINS": how.bins, "SHARED": shared,
        "SINGLE": tokens == 1, "OVERLAPPED": overlapped,
    }  # fmt: skip
    scan = bind(
        _scan_kernel,
        (
            code_pointer(unit, together), "*i32:16", "*fp16", how.pointer, "*i32", "*i32:16",
            "*i32", "*i32", *["i32"] * 6, "i64", *["i32"] * 6,
            "i64", "i64", row_step_type(code_strides[2]), *["i64"] * 3,
        ),
        {"HEADS": heads, "SHARE": heads // problem.kv_heads, "R": bits, "GROUP": group,
         "PLANES": how.planes, "WEIGHTS": how.weights, "CHUNK": chunk, "PER_VECTOR": per_vector,
         "DROP": how.drop, "HALVE": how.halve, "NORMS": problem.norms, "VECTOR": together,
         "UNIT": unit, "AHEAD": config["ahead"], "ADDERS": bool(config["adders"]),
         "BINARY": binary, "EARLY": starts_early(config), **constants},
        warps,
        overlapped=overlapped,
    )  # fmt: skip
    spans = launches.address("lengths"), launches.address("starts")
    span_steps = row_step(launches.views["lengths"]), row_step(launches.views["starts"])
    limits = (*span_steps, *budget_scalars(call.budget), dense_below)
    row_sizes = at.scores_row, at.counters_row
    arrays = (
        launches.address(name), at.planes, launches.address("key_norms"), at.scores, at.counters,
        at.cumulated, *spans,
    )  # fmt: skip
    launch(
        launches, scan, rows * parts, arrays, tokens, slots, fresh, *limits, *row_sizes,
        *code_strides, *norm_steps(norms),
    )  # fmt: skip
    for i in range(1, how.rounds):
        refine = bind(
            _refine_kernel,
            (
                how.pointer, "*i32", "*i32:16", "*i32", "*i32", "*i32", "*i32",
                *["i32"] * 6, "i64", *["i32"] * 6,
            ),
            {"ROUND": i, "DROP": (2 - i) * DIGIT, "DIGIT": DIGIT, **constants},
            warps,
            overlapped=overlapped,
        )  # fmt: skip
        arrays = at.scores, at.counters, at.cumulated, at.state, at.below, *spans
        launch(launches, refine, rows * parts, arrays, heads, tokens, slots, *limits, *row_sizes)
