"""The scan: one pass over the codes that leaves a score for every key, and histograms.

A row (of a query, or of the queries of a group) is cut in splits by its own length, whatever S is.
A split writes its scores, adds to the row's histogram, and leaves its own, cumulated.
With key norms the key is 32 bits wide and is found digit by digit: `_refine_kernel` counts the
second and the third digit among keys that match so far.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005, SIM108 (jitted bodies: the compiler knows fewer forms than Python)

from typing import Any

import triton
import triton.language as tl

from hata.launches import LaunchList

from .counting import DIGIT, Counting, Rows, budget_group, shared_declaration, starts_early
from .distance import binary_distance, distance, lane_columns
from .launch import Pointer, group, launch
from .layout import code_pointer, code_steps, narrow, scanned_words, spans, strides
from .pieces import (
    ALIGN,
    budget_of,
    columns_of,
    count_shared,
    find_bin,
    float_key,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    interleave,
    load_words,
    place_of,
    read_shared,
    shared_bins,
    split_range,
    visible,
)


@triton.jit
def _load_codes(base, first, high, step, C: tl.constexpr):
    """`CHUNK` words of each key in [first, first + TILE), from the one that `base` points to.

    Where codes are short and lie one after the other, a row holds `PER_VECTOR` of them: one vector.
    What is beyond `high` is undefined. `CLAMPED`: it is the last row again, and nothing is masked.
    """
    if C.CLAMPED:
        first = tl.minimum(first, high - 1)
    if C.PER_VECTOR > 1:
        # It is a multiple already; said like this, the compiler sees whole vectors.
        first = first // ALIGN * ALIGN
    hop = step * C.PER_VECTOR
    row = tl.arange(0, C.TILE // C.PER_VECTOR)
    word = tl.arange(0, C.PER_VECTOR * C.CHUNK) * (4 // C.UNIT)
    base += (tl.zeros([], tl.int64) + first) * step
    if C.CLAMPED:
        mask = None
        row = tl.minimum(row * hop, tl.minimum((high - 1 - first) // C.PER_VECTOR, C.TILE) * hop)
    else:
        mask = (row * C.PER_VECTOR < high - first)[:, None]
        row *= hop
    return load_words(base + row[:, None] + word[None, :], mask, C.UNIT)


@triton.jit
def _load_tile(base, first, high, step, C: tl.constexpr):
    """All words of the keys of a tile, chunk by chunk."""
    chunks = ()
    for c in tl.static_range(C.R // 32 // C.CHUNK):
        at = base + c * C.CHUNK * (4 // C.UNIT)
        chunks = chunks + (_load_codes(at, first, high, step, C),)
    return chunks


@triton.jit
def _scan_kernel(arrays, sizes, budget, strides, C: tl.constexpr):
    """Scores of one split of a row, and their histogram.

    `arrays`: codes, planes, norms, scores, counters, cumulated, lengths, starts. `sizes`: tokens,
    slots, fresh, steps of lengths and starts, scores_row, counters_row. `strides`: of codes, norms.
    """
    griddepcontrol_launch_dependents(C.PDL & C.EARLY)
    WORDS: tl.constexpr = C.R // 32
    CHUNKS: tl.constexpr = WORDS // C.CHUNK
    TILE: tl.constexpr = C.TILE
    split = tl.program_id(0) % C.NUM_SPLITS
    row = tl.program_id(0) // C.NUM_SPLITS
    batch, head, token = place_of(row, C.HEADS, sizes.tokens, C.SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(arrays, sizes, batch, token)
    low, high = split_range(start, stop, split, C.NUM_SPLITS, TILE)
    seen = stop - start
    if (low < high) & (seen > tl.maximum(budget_of(seen, budget), budget.dense_below)):
        base = arrays.codes + batch * strides.codes.b * C.VECTOR
        base += (head // C.SHARE) * strides.codes.h * C.VECTOR
        # Codes that share a vector follow one another.
        step = strides.codes.s * C.VECTOR if C.PER_VECTOR == 1 else C.CHUNK
        # The first tiles are in flight while the launch before still makes the planes.
        queue = ()
        for i in tl.static_range(C.PREFETCH):
            queue = queue + _load_tile(base, low + i * TILE, high, step, C)
        griddepcontrol_wait(C.PDL)
        if C.PDL:
            # Codes of fresh keys are made by that launch: read such a tile again.
            fresh_from = stop + (sizes.tokens - 1 - token) - sizes.fresh
            renewed = ()
            for i in tl.static_range(C.PREFETCH):
                tile = queue[i * CHUNKS : (i + 1) * CHUNKS]
                if low + (i + 1) * TILE > fresh_from:
                    tile = _load_tile(base, low + i * TILE, high, step, C)
                renewed = renewed + tile
            queue = renewed
        weighted = ()
        for i in tl.static_range(C.PLANES * WORDS):
            bits = tl.load(arrays.planes + row * (C.PLANES * WORDS) + i)
            weighted = weighted + (bits.to(tl.uint32, bitcast=True),)
        if C.BINARY_MMA:
            no_bits = ()
            for _ in tl.static_range(WORDS):
                no_bits = no_bits + (tl.zeros([], tl.uint32),)
            at_zero = distance(no_bits, weighted, WORDS, C.WEIGHTS, False) >> C.HALVE
            columns = lane_columns(weighted, C.PLANES, WORDS)
        if C.SHARED is None:
            bins = tl.zeros([C.BINS], tl.int32)
        else:
            bins = shared_bins(C.SHARED, C.BINS)
        # Keys that win unscored are not counted.
        counted_from = start + budget.sink
        countable = tl.maximum(tl.minimum(stop - budget.recent, high) - counted_from, 0)
        countable = countable.to(tl.uint32, bitcast=True)
        for first in range(low, high, TILE):
            queue = queue + _load_tile(base, first + C.PREFETCH * TILE, high, step, C)
            chunks, queue = queue[:CHUNKS], queue[CHUNKS:]
            words = ()
            for c in tl.static_range(CHUNKS):
                words = words + columns_of(chunks[c], TILE // C.PER_VECTOR, C.PER_VECTOR * C.CHUNK)
            distances = ()
            for i in tl.static_range(C.PER_VECTOR):
                mine = words[i * WORDS : (i + 1) * WORDS]
                if C.BINARY_MMA:
                    one = binary_distance(
                        mine, columns, at_zero, WORDS, C.WEIGHTS, C.GROUP, C.HALVE
                    )
                else:
                    one = distance(mine, weighted, WORDS, C.WEIGHTS, C.ADDERS) >> C.HALVE
                distances = distances + (one,)
            key = interleave(distances, TILE // C.PER_VECTOR, C.PER_VECTOR)
            place = tl.arange(0, TILE)
            if C.NORMS:
                norm = tl.load(
                    arrays.norms + batch * strides.norms.b + (head // C.SHARE) * strides.norms.h
                    + (first + place).to(tl.int64) * strides.norms.s,
                    mask=place < high - first,
                    other=0.0,
                )  # fmt: skip
                agreement = (C.GROUP * C.R - 2 * key).to(tl.float32)
                key = float_key(agreement * norm.to(tl.float32)).to(tl.int32, bitcast=True)
            stored = arrays.scores + row * sizes.scores_row * ALIGN + first
            key_type = arrays.scores.dtype.element_ty
            tl.store(stored + place, key.to(key_type), mask=place < high - first)
            digit = (key.to(tl.uint32, bitcast=True) >> C.DROP).to(tl.int32)
            # Unsigned, so that one comparison serves both ends.
            counted = (place + (first - counted_from)).to(tl.uint32, bitcast=True) < countable
            if C.SHARED is None:
                bins += tl.histogram(digit, C.BINS, mask=counted & (digit < C.BINS))
            else:
                count_shared(bins, digit, counted, C.BINS)
        if C.SHARED is not None:
            bins = read_shared(bins, C.BINS)
        griddepcontrol_launch_dependents(C.PDL & (not C.EARLY))
        at = tl.arange(0, C.BINS)
        # First what takes longest to arrive.
        counters = arrays.counters + row * sizes.counters_row
        tl.atomic_add(counters + at, bins, mask=bins > 0, sem="relaxed")
        line = arrays.cumulated + (row * C.NUM_SPLITS + split) * C.BINS
        tl.store(line + at, tl.cumsum(bins, axis=0))
    else:
        # Launches wait for one another in a chain, so no program may leave it.
        griddepcontrol_wait(C.PDL)


@triton.jit
def _refine_kernel(arrays, sizes, budget, C: tl.constexpr):
    """Count digit `ROUND` (from 1) of the keys that match all digits before.

    `arrays`: `Rows.pointers`, lengths, starts. `sizes`: heads, tokens, slots, steps of lengths and
    starts, scores_row, counters_row.
    """
    split = tl.program_id(0) % C.NUM_SPLITS
    row = tl.program_id(0) // C.NUM_SPLITS
    batch, _, token = place_of(row, sizes.heads, sizes.tokens, C.SINGLE)
    row = row.to(tl.int64)
    start, stop = visible(arrays, sizes, batch, token)
    low, high = split_range(start, stop, split, C.NUM_SPLITS, C.TILE)
    seen = stop - start
    selected = budget_of(seen, budget)
    griddepcontrol_wait(C.PDL)
    if (low < high) & (seen > tl.maximum(selected, budget.dense_below)):
        counters = arrays.counters + row * sizes.counters_row
        # Digits so far and how many keys are still to be found: state[row, ROUND] of this round.
        state = arrays.state + (row * 3 + C.ROUND) * 2
        prefix = tl.zeros([], tl.int32)
        need = selected - budget.sink - budget.recent
        if C.ROUND > 1:
            prefix = tl.load(state - 2)
            need = tl.load(state - 1)
        at = tl.arange(0, C.BINS)
        digit, need = find_bin(tl.load(counters + (C.ROUND - 1) * C.BINS + at), need)
        prefix = (prefix << C.DIGIT) | digit
        tl.store(state, prefix, mask=split == 0)
        tl.store(state + 1, need, mask=split == 0)
        matched = prefix.to(tl.uint32, bitcast=True)
        counted_from = start + budget.sink
        counted_to = tl.minimum(stop - budget.recent, high)
        smaller = tl.zeros([C.TILE], tl.int32)
        if C.SHARED is None:
            bins = tl.zeros([C.BINS], tl.int32)
        else:
            bins = shared_bins(C.SHARED, C.BINS)
        scores = arrays.scores + row * sizes.scores_row * ALIGN
        for first in range(low, high, C.TILE):
            position = first + tl.arange(0, C.TILE)
            counted = (position >= counted_from) & (position < counted_to)
            key = tl.load(scores + position, mask=position < high, other=0)
            key = key.to(tl.uint32, bitcast=True) >> C.DROP
            smaller += (counted & ((key >> C.DIGIT) < matched)).to(tl.int32)
            counted &= (key >> C.DIGIT) == matched
            digits = (key & (C.BINS - 1)).to(tl.int32)
            if C.SHARED is None:
                bins += tl.histogram(digits, C.BINS, mask=counted)
            else:
                count_shared(bins, digits, counted, C.BINS)
        if C.SHARED is not None:
            bins = read_shared(bins, C.BINS)
        tl.store(arrays.below + row * C.NUM_SPLITS + split, tl.sum(smaller))
        line = arrays.cumulated + (row * C.NUM_SPLITS + split) * C.BINS
        tl.store(line + at, tl.cumsum(bins, axis=0))
        tl.atomic_add(counters + C.ROUND * C.BINS + at, bins, mask=bins > 0, sem="relaxed")


def launch_scan(
    launches: LaunchList,
    call: Any,
    at: Rows,
    how: Counting,
    row_sizes: tuple[int, int, int],
    name: str,
    pdl: bool = False,
) -> None:
    """Write the scan of the codes of this name, and the rounds that refine its threshold.

    `row_sizes`: rows, heads that select, and splits of a row.
    """
    (rows, heads, num_splits), config, problem = row_sizes, call.config, call.problem
    codes = launches.views[name]
    assert codes is not None
    tokens, slots, bits = problem.tokens, codes.shape[2], problem.bits
    own = getattr(call, "q_codes", None) is None
    queries = (call.q.shape[1] if own else call.q_codes.shape[1]) // heads
    unit, together, per_vector = scanned_words(codes)
    code_strides = strides(codes, "bhs", code_steps(unit, together))
    # Words that one thread loads together: as many as are aligned and divide a code.
    count = bits // 32
    warps = min(config["scan_warps"], config["tile"] // 32)
    # A binary product takes two vectors of every lane, and one key of each.
    binary_mma = bool(config["binary_mma"]) and launches.gpu.has_binary_mma
    shared = {
        "TILE": config["tile"], "NUM_SPLITS": num_splits, "BINS": how.bins,
        "SHARED": shared_declaration(config, how.bins), "SINGLE": tokens == 1, "PDL": pdl,
    }  # fmt: skip
    constants = group(
        HEADS=heads, SHARE=heads // problem.kv_heads, R=bits, GROUP=queries, PLANES=how.planes,
        WEIGHTS=how.weights, CHUNK=min(count & -count, together), PER_VECTOR=per_vector,
        DROP=how.drop, HALVE=how.halve, NORMS=problem.norms, VECTOR=together, UNIT=unit,
        # Single heads take so few instructions a key that those of masks count.
        CLAMPED=queries == 1,
        PREFETCH=config["prefetch"], ADDERS=bool(config["adders"]),
        BINARY_MMA=binary_mma and config["tile"] >= 64 * warps * per_vector,
        EARLY=starts_early(config), **shared,
    )  # fmt: skip
    pointers, steps = spans(launches)
    own_sizes = {"scores_row": at.scores_row, "counters_row": at.counters_row}
    counted = at.pointers()
    groups = (
        group(
            codes=Pointer(launches.address(name), code_pointer(unit, together)),
            planes=Pointer(at.planes, "*i32:16"),
            norms=Pointer(launches.address("key_norms"), "*fp16"),
            scores=Pointer(at.scores, how.pointer),
            counters=counted["counters"],
            cumulated=counted["cumulated"],
            **pointers,
        ),
        group(tokens=tokens, slots=slots, fresh=getattr(call, "fresh", 0), **steps, **own_sizes),
        budget_group(call),
        group(
            codes=code_strides._replace(s=narrow(code_strides.s.value)),
            norms=strides(launches.views["key_norms"], "bhs"),
        ),
    )
    launch(launches, _scan_kernel, rows * num_splits, groups, constants, warps, pdl=pdl)
    for i in range(1, how.rounds):
        groups = (
            group(**counted, **pointers),
            group(heads=heads, tokens=tokens, slots=slots, **steps, **own_sizes),
            budget_group(call),
        )
        constants = group(ROUND=i, DROP=(2 - i) * DIGIT, DIGIT=DIGIT, **shared)
        launch(launches, _refine_kernel, rows * num_splits, groups, constants, warps, pdl=pdl)
