"""hamming_topk: the keys whose codes differ least from a group of query codes, on a CPU.

Source: arXiv 2506.02572, section 3. Four phases, each cut into items that threads draw:

scan     The codes are streamed once, `chunk` keys an item. With g query codes in a group, the
         distance of key k is sum_i popcount(q_i ^ k). A full adder turns three codes a, b, c into
         two: bitwise, a + b + c = xor(a, b, c) + 2 * majority(a, b, c), and since both are
         self-dual the same holds after each is xored with k. So the group collapses, once, into a
         few weighted planes P_j (3 for four codes, 4 for eight) and distance = sum_j w_j *
         popcount(P_j ^ k), exactly. Scores (u16) and a histogram of the chunk go to scratch.
decide   The histograms of a row give the score of the last key that wins, how many ties with it
         win, and where the winners of each chunk go.
pack     Each chunk writes its winners in ascending order, the lowest positions among ties.

A row is one selection: (batch row, KV head, token) or, with `per_head`, one for each query head.
Its first `sink` and last `recent` keys win unscored; a row with no more keys than budget is not
scanned at all. With key norms the score is the fp32 product (g*r - 2*distance) * norm, mapped to
u32 so that smaller wins, and `decide` works through its bits in three histograms. Sums of distances
that need more than 16 bits take that way too. Nothing is as long as S but the scores, of which
only visible keys' are touched.
"""

from collections.abc import Mapping
from typing import Any

from hata.arrays import ITEMSIZE, Framework
from hata.backend import Budget
from hata.problem import Problem

from .intrinsics import fetch_add
from .scan import (
    MAX_NARROW,
    WIDE_BINS,
    chunks_of,
    longest,
    scan_chunk,
    select_scratch,
    select_view,
)
from .schedule import (
    COUNTERS,
    THREADS,
    Worker,
    address_of,
    carve,
    claim,
    control_words,
    draw,
    layout,
    wait,
    workers,
)
from .winners import decide, pack_chunk

TUNABLES = {
    "threads": THREADS,
    "variant": ("direct", "planes"),
    "chunk": (1024, 2048, 4096, 8192, 16384, 32768),
}
DEFAULTS = {"threads": "all", "variant": "planes", "chunk": 8192}


def _make(revision: int) -> Any:
    def hamming_topk_worker(address):
        call = select_view(address)
        if revision == 0:
            return
        scratch = claim(call.control, call.scratch, call.scratch_bytes)
        if scratch == 0:
            return
        width = (longest(call) + 63) // 64 * 64
        chunks = chunks_of(call, width)
        groups = call.batch * call.kv_heads
        rows = call.tokens * call.sets
        scans = groups * chunks
        decides = groups * rows if chunks > 0 else 0
        packs = groups * max(chunks, 1)
        scanned = call.control + COUNTERS
        decided = scanned + 8 * groups
        while True:
            ticket = draw(call.control)
            if ticket < scans:
                scan_chunk(call, ticket, chunks, width, scratch)
                fetch_add(scanned + 8 * (ticket // chunks), 1)
                continue
            ticket -= scans
            if ticket < decides:
                wait(call.control, scanned + 8 * (ticket // rows), chunks)
                decide(call, ticket, chunks, width, scratch)
                fetch_add(decided + 8 * (ticket // rows), 1)
                continue
            ticket -= decides
            if ticket >= packs:
                return
            if chunks > 0:
                wait(call.control, decided + 8 * (ticket // chunks), rows)
            pack_chunk(call, ticket, max(chunks, 1), width, 1)

    return hamming_topk_worker


worker = Worker(_make)


def _bounds(fw: Any, x: Any) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    size = ITEMSIZE[fw.dtype(x)]
    strides = fw.strides(x)
    return fw.pointer(x), size * strides[0] if strides else 0, size


def select_values(
    fw: Any, batch: int, kv_heads: int, tokens: int, slots: int, lengths: Any, starts: Any,
    budget: Any, dense_below: int, bits: int, members: int, sets: int, codes: Any,
    q_codes: tuple[int, ...], key_norms: Any, indices: tuple[int, ...], config: Any,
) -> tuple[Any, list[int]]:  # fmt: skip
    """The values of `FIELDS` but the last three, and what keeps their memory alive."""
    norms = (0, 0, 0, 0)
    if key_norms is not None:
        norms = (*layout(fw, key_norms, 2), 2 * fw.strides(key_norms)[2])
    most = members * bits
    wide = key_norms is not None or most > MAX_NARROW
    # whole vectors
    bins = WIDE_BINS if wide else (most + 16) // 16 * 16
    # a histogram should stay small beside the chunk it counts
    chunk = config["chunk"]
    while chunk < bins:
        chunk *= 2
    rows = batch * kv_heads * tokens * sets
    chunks = (slots + chunk - 1) // chunk + 1
    hold, (histograms, scores, verdicts) = carve(
        4 * rows * chunks * bins,
        (4 if wide else 2) * rows * (slots + 64),
        8 * rows * (1 + 3 * chunks),
    )
    return hold, [
        batch, kv_heads, tokens, slots, *_bounds(fw, lengths), *_bounds(fw, starts),
        *budget, dense_below, bits, members, sets, *layout(fw, codes, 1), *q_codes, *norms,
        *indices, int(config["variant"] == "planes"), chunk, int(wide), bins, histograms,
        scores, verdicts,
    ]  # fmt: skip


def launch(
    problem: Problem, fw: Framework, q_codes: Any, k_codes: Any, lengths: Any, starts: Any,
    budget: Budget, key_norms: Any, per_head: bool, config: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Run `hata.hamming_topk` with a configuration; returns the indices."""
    batch, heads, tokens, code_bytes = fw.shape(q_codes)
    kv_heads, slots = fw.shape(k_codes)[1:3]
    group = heads // kv_heads
    members, sets = (1, group) if per_head else (group, 1)
    indices = fw.empty((batch, kv_heads * sets, tokens, budget.k), "int32", q_codes)
    if batch * heads * tokens == 0:
        return indices
    threads = workers(config["threads"])
    scratch_bytes = select_scratch(8 * code_bytes, members, tokens * sets, config["chunk"])
    hold, (scratch,) = carve(threads * scratch_bytes)
    control = control_words(2 * batch * kv_heads, threads)
    keep, values = select_values(
        fw, batch, kv_heads, tokens, slots, lengths, starts, budget, 0, 8 * code_bytes, members,
        sets, k_codes, layout(fw, q_codes, 1), key_norms, layout(fw, indices, 4), config,
    )  # fmt: skip
    worker.run([*values, *address_of(control), scratch, scratch_bytes], threads)
    del hold, keep
    return indices
