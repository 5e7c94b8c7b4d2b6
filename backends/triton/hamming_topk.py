"""hamming_topk: the keys whose codes differ least from a group's (arXiv 2506.02572, Algorithm 3).

    distance_s = sum over the codes q of a group of popcount(q ^ k_s)

Weighted planes. Let c_j be the number of queries that set bit j. A key with bit j clear differs
from c_j of them, one with it set from G - c_j. If weights w_i sum to G and planes P_i hold bits
with sum_i w_i P_ij = c_j, then distance_s = sum_i w_i popcount(P_i ^ k_s): exact, and with weights
1, 2, 4, ... and the rest of G it takes log2(G) + 1 popcounts a word instead of G.

Counting select. Distances are small integers (and of one parity if G is even, so half of them
serve), so a histogram gives the exact threshold. `_scan_kernel` streams the codes once: each row
(of a query, or of a group of queries) is cut in `parts` by its own length, whatever S is; a part
writes its keys to select by, adds to the row's histogram and leaves its own, cumulated. Then
`find_positions` needs no further pass: it reads the threshold off the histogram, sums the parts'
counts below and at it, and so knows where in the output each part's keys go.

With key norms the key to select by is the reversed bits of the float score: 32 bits, found digit by
digit; `_refine_kernel` counts the second and the third digit among keys that match so far.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hata.arrays import Framework
from hata.backend import Budget, Config
from hata.problem import Problem, pow2

from .launch import (
    INTERPRETED,
    Bound,
    Place,
    Scratch,
    address,
    bind,
    code_pointer,
    code_steps,
    norm_steps,
    row_step,
    steps,
    words,
)
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
    store_planes,
    visible,
    wait_for_previous,
    zero_counters,
)

# Counters of one histogram at most; more values than this are counted digit by digit.
MOST_BINS = 4096
DIGIT = 11
# Largest tile of stored keys; rows of them are read up to a tile beyond their end.
MOST_TILE = 8192


class Counting(NamedTuple):
    """How the keys to select by are counted.

    Attributes:
        rounds: Histograms one after the other (1, or 3 digits).
        bins: Counters of each; a single histogram may leave out the largest value.
        halve: 1 where keys are halved distances, since all have one parity.
        drop: Low bits of a key that the first histogram leaves out.
        planes: Weighted planes of a group.
    """

    rounds: int
    bins: int
    halve: int
    drop: int
    planes: int

    @property
    def itemsize(self) -> int:
        """Bytes of a stored key."""
        return 2 if self.rounds == 1 else 4

    @property
    def pointer(self) -> str:
        """Type of a pointer to stored keys; their rows are aligned."""
        return "*i16:16" if self.rounds == 1 else "*i32:16"


def counting(group: int, bits: int, norms: bool) -> Counting:
    """How to count keys for groups of `group` codes of `bits` bits."""
    halve = int(group % 2 == 0 and not norms)
    largest = group * bits >> halve
    planes = group.bit_length()
    if norms or largest > MOST_BINS:
        return Counting(3, 1 << DIGIT, halve, 2 * DIGIT, planes)
    return Counting(1, max(pow2(largest), 32), halve, 0, planes)


def shared_declaration(config: Config, bins: int) -> str | None:
    """PTX that declares counters in shared memory, or `None` to count by ballots."""
    if INTERPRETED or config["histogram"] == "ballot":
        return None
    return f"{{ .shared .align 16 .b32 hata_bins[{bins}]; mov.u32 $0, hata_bins; }}"


@triton.jit
def _planes_kernel(
    q_codes, planes, counters, heads, group, tokens, counters_row, q_b, q_h, q_t,
    R: tl.constexpr, MEMBERS: tl.constexpr, PLANES: tl.constexpr, COUNTERS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Planes of given query codes; zeroes the counters. One program a row and word."""
    program = tl.program_id(0)
    word = program % (R // 32)
    row = program // (R // 32)
    batch = (row // tokens // heads).to(tl.int64)
    head = row // tokens % heads
    token = row % tokens
    counts = tl.zeros([32], tl.int32)
    base = q_codes + batch * q_b + token * q_t + word * (4 // UNIT)
    for first in range(0, group, MEMBERS):
        member = first + tl.arange(0, MEMBERS)
        words = load_words(base + (head * group + member) * q_h, member < group, UNIT)
        bits = (words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
        counts += tl.sum(bits.to(tl.int32), axis=0)
    one = tl.arange(0, 1)
    target = planes + (row + one).to(tl.int64) * (PLANES * R // 32)
    store_planes(target, counts[None, :], group, word + one, one == 0, R, 1, 32, PLANES)
    zero_counters(counters, row, counters_row, word, R // 32, COUNTERS)


@triton.jit
def _load_codes(
    base, first, high, codes_s, TILE: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr
):
    """`CHUNK` words of each key in [first, first + TILE), from the one that `base` points to."""
    position = first + tl.arange(0, TILE)
    word = tl.arange(0, CHUNK) * (4 // UNIT)
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
    TILE: tl.constexpr, BINS: tl.constexpr, DROP: tl.constexpr, HALVE: tl.constexpr,
    NORMS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr, SHARED: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAPPED: tl.constexpr,
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
        if AHEAD:
            # The first tile is on its way while the launch before still makes the planes.
            following = _load_codes(base, low, high, codes_s * VECTOR, TILE, CHUNK, UNIT)
        wait_for_previous(OVERLAPPED)
        if AHEAD & OVERLAPPED:
            # Codes of fresh keys are made by that launch: read such a tile again.
            if low + TILE > stop + (tokens - 1 - token) - fresh:
                following = _load_codes(base, low, high, codes_s * VECTOR, TILE, CHUNK, UNIT)
        weighted = ()
        for i in tl.static_range(PLANES * CHUNKS):
            bits = tl.load(planes + row * (PLANES * R // 32) + i * CHUNK + tl.arange(0, CHUNK))
            weighted = weighted + (bits.to(tl.uint32, bitcast=True)[None, :],)
        if SHARED is None:
            bins = tl.zeros([BINS], tl.int32)
        else:
            bins = shared_bins(SHARED, BINS)
        for first in range(low, high, TILE):
            position = first + tl.arange(0, TILE)
            within = position < high
            distance = tl.zeros([TILE, CHUNK], tl.int32)
            for c in tl.static_range(CHUNKS):
                if AHEAD:
                    words = following
                    following = _load_codes(
                        base, first + TILE, high, codes_s * VECTOR, TILE, CHUNK, UNIT
                    )
                else:
                    words = _load_codes(
                        base + c * CHUNK * (4 // UNIT), first, high, codes_s * VECTOR,
                        TILE, CHUNK, UNIT,
                    )  # fmt: skip
                for i in tl.static_range(PLANES):
                    weight = (1 << i) if i < PLANES - 1 else GROUP - (1 << (PLANES - 1)) + 1
                    distance += popcount(words ^ weighted[i * CHUNKS + c]) * weight
            # A thread holds whole keys, so the sum leaves no copies that would be counted twice.
            key = tl.sum(distance, axis=1)
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
    k, ratio, least, sink, recent, scores_row, counters_row,
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
    everything = seen <= budget
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


class Rows(NamedTuple):
    """Where the scratch of a selection lies, in bytes from its start, and its row sizes."""

    planes: int
    counters: int
    scores: int
    cumulated: int
    state: int
    below: int
    scores_row: int
    counters_row: int


def lay_out(
    scratch: Scratch, how: Counting, rows: int, slots: int, bits: int, parts: int, tickets: int
) -> Rows:
    """Reserve the scratch of `rows` rows; `tickets` more counters a row are zeroed as well."""
    scores_row = -(-slots // 128)
    counters_row = how.rounds * how.bins + tickets
    return Rows(
        planes=scratch.piece(rows * how.planes * bits // 32),
        counters=scratch.piece(rows * counters_row),
        scores=scratch.piece(rows * scores_row * 128 + MOST_TILE, how.itemsize),
        cumulated=scratch.piece(rows * parts * how.bins),
        state=scratch.piece(rows * 6),
        below=scratch.piece(rows * parts),
        scores_row=scores_row,
        counters_row=counters_row,
    )


def bind_planes(how: Counting, bits: int, group: int, unit: int, together: int) -> Bound:
    """The launch that makes planes of given query codes and zeroes counters."""
    return bind(
        _planes_kernel,
        (code_pointer(unit, together), "*i32", "*i32", *["i32"] * 4, *["i64"] * 3),
        {"R": bits, "MEMBERS": min(pow2(group), 64), "PLANES": how.planes, "COUNTERS": 256,
         "UNIT": unit},
        1,
    )  # fmt: skip


def bind_scan(
    config: Config,
    how: Counting,
    bits: int,
    group: int,
    norms: bool,
    unit: int,
    together: int,
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
        {"R": bits, "GROUP": group, "PLANES": how.planes, "CHUNK": chunk,
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


def bind_select(config: Config, how: Counting, parts: int, overlapped: bool) -> Bound:
    """The launch that writes positions."""
    return bind(
        _select_kernel,
        (
            "*i32", how.pointer, "*i32", "*i32", "*i32", "*i32", "*i32", "*i32",
            *["i32"] * 7, "i64", *["i32"] * 5,
        ),
        {"ROUNDS": how.rounds, "DIGIT": DIGIT, "BINS": how.bins, "PARTS": parts,
         "PART_TILE": config["tile"], "TILE": config["select_tile"], "OVERLAPPED": overlapped},
        config["select_warps"],
        overlapped=overlapped,
    )  # fmt: skip


def budget_scalars(budget: Budget) -> tuple[int, ...]:
    """k, ratio, least, sink and recent as the kernels take them."""
    least = max(1, budget.k_min, budget.sink + budget.recent)
    return budget.k, budget.ratio, min(least, budget.k), budget.sink, budget.recent


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q_codes: Any,
    k_codes: Any,
    lengths: Any,
    starts: Any,
    budget: Budget,
    key_norms: Any,
    per_head: bool,
) -> Any:
    """Launch `hata.hamming_topk`: planes, scan, (refinement,) select."""
    batch, q_heads, tokens, _ = fw.shape(q_codes)
    _, kv_heads, slots, width = fw.shape(k_codes)
    heads = q_heads if per_head else kv_heads
    indices = fw.empty((batch, heads, tokens, budget.k), "int32", q_codes)
    rows = batch * heads * tokens
    if rows == 0:
        return indices
    bits, group = width * 8, q_heads // heads
    how = counting(group, bits, key_norms is not None)
    parts = min(config["parts"], pow2(-(-slots // config["tile"])))
    scratch = Scratch()
    at = lay_out(scratch, how, rows, slots, bits, parts, 0)
    memory = fw.empty((scratch.size,), "uint8", q_codes)
    q_unit, q_together = words(fw, q_codes)
    unit, together = words(fw, k_codes)
    planes = address(memory, "*i32", at.planes)
    counters = address(memory, "*i32", at.counters)
    scores = address(memory, how.pointer, at.scores)
    cumulated = address(memory, "*i32", at.cumulated)
    state = address(memory, "*i32", at.state)
    below = address(memory, "*i32", at.below)
    spans = address(lengths, "*i32"), address(starts, "*i32")
    span_steps = row_step(fw, lengths), row_step(fw, starts)
    limits = budget_scalars(budget)
    sizes = at.scores_row, at.counters_row
    scan, rounds = bind_scan(config, how, bits, group, key_norms is not None, unit, together, False)
    select = bind_select(config, how, parts, False)
    with Place(q_codes) as place:
        device, stream = place.device, place.stream
        bind_planes(how, bits, group, q_unit, q_together)(
            rows * (bits // 32), device, stream,
            address(q_codes, code_pointer(q_unit, q_together)), planes, counters,
            heads, group, tokens, at.counters_row, *steps(fw, q_codes, q_unit),
        )  # fmt: skip
        scan(
            rows * parts, device, stream,
            address(k_codes, code_pointer(unit, together)), planes,
            address(key_norms, "*fp16"), scores, counters, cumulated, *spans,
            heads, heads // kv_heads, tokens, slots, 0, parts, *span_steps, *limits, 0, *sizes,
            *steps(fw, k_codes, code_steps(unit, together)), *norm_steps(fw, key_norms),
        )  # fmt: skip
        for refine in rounds:
            refine(
                rows * parts, device, stream, scores, counters, cumulated, state, below, *spans,
                heads, tokens, slots, parts, *span_steps, *limits, 0, *sizes,
            )  # fmt: skip
        select(
            rows * parts, device, stream, address(indices, "*i32"), scores, counters, cumulated,
            state, below, *spans, heads, tokens, slots, parts, *span_steps, *limits,
            *sizes,
        )  # fmt: skip
    return indices
