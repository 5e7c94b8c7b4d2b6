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

from typing import Any

from .intrinsics import fetch_add
from .record import Plan, Views, views_of
from .scan import MAX_NARROW, SELECT, WIDE_BINS, extent, scan_chunk, select_scratch
from .schedule import COUNTERS, THREADS, Worker, claim, draw, pasted, wait
from .winners import decide, pack_chunk, verdict_words

TUNABLES = {
    "threads": THREADS,
    "variant": ("direct", "planes"),
    "chunk": (1024, 2048, 4096, 8192, 16384, 32768),
}
DEFAULTS = {"threads": "all", "variant": "planes", "chunk": 8192}

run_of, select_of = views_of(SELECT)


@pasted
def select_item(run, call, ticket, width, blocks, lists, scratch) -> int:
    """Do an item of the selection; returns the ticket less all items, below 0 if it was one.

    Of the four counters of each group (a row of a KV head) the first shows how many blocks are
    encoded that it waits for, the last how many chunks are packed. With `lists` rows that take all
    they see are listed too.
    """
    chunks = (width + call.chunk - 1) // call.chunk
    groups, rows = call.batch * call.kv_heads, call.tokens * call.sets
    decides = groups * rows if chunks > 0 else 0
    packs = max(chunks, lists)
    encoded = run.control + COUNTERS
    scanned, decided, packed = encoded + 8 * groups, encoded + 16 * groups, encoded + 24 * groups
    if ticket < groups * chunks:
        group = ticket // chunks
        wait(run, encoded + 8 * group, blocks)
        scan_chunk(call, ticket, chunks, width, scratch)
        fetch_add(scanned + 8 * group, 1)
        return -1
    ticket -= groups * chunks
    if ticket < decides:
        group = ticket // rows
        wait(run, scanned + 8 * group, chunks)
        decide(call, ticket, chunks, width, scratch)
        fetch_add(decided + 8 * group, 1)
        return -1
    ticket -= decides
    if ticket < groups * packs:
        group = ticket // packs
        wait(run, decided + 8 * group, rows if chunks > 0 else 0)
        pack_chunk(call, ticket, packs, width, lists)
        fetch_add(packed + 8 * group, 1)
        return -1
    return ticket - groups * packs


def _make(revision: int) -> Any:
    def hamming_topk_worker(address):
        run, call = run_of(address), select_of(address)
        scratch = claim(run, revision)
        width = extent(call)[0]
        while scratch != 0 and select_item(run, call, draw(run), width, 0, 1, scratch) < 0:
            pass

    return hamming_topk_worker


worker = Worker(_make)


def select_part(made: Plan, call: Any, arrays: Views, sets: int = 1, dense_below: int = 0) -> int:
    """Add `SELECT` to a plan; returns the bytes of a thread's scratch.

    `sets` is the number of selections of a KV head, each by as many of its query codes.
    """
    batch, code_heads, tokens, width = arrays["q_codes"].shape
    kv_heads, slots = arrays["k_codes"].shape[1:3]
    members, bits = code_heads // kv_heads // sets, 8 * width
    wide = call.key_norms is not None or members * bits > MAX_NARROW
    # whole vectors
    bins = WIDE_BINS if wide else (members * bits + 16) // 16 * 16
    # a histogram should stay small beside the chunk it counts
    chunk = call.config["chunk"]
    while chunk < bins:
        chunk *= 2
    rows = batch * kv_heads * tokens * sets
    chunks = (slots + chunk - 1) // chunk + 1
    pieces = {
        "histograms": made.piece(4 * rows * chunks * bins),
        "scores": made.piece((4 if wide else 2) * rows * (slots + 64)),
        "verdicts": made.piece(8 * rows * verdict_words.py_func(chunks)),
    }
    made.part(
        SELECT, {**arrays, **pieces}, **call.budget._asdict(), batch=batch, kv_heads=kv_heads,
        tokens=tokens, slots=slots, dense_below=dense_below, bits=bits, members=members, sets=sets,
        merge=call.config["variant"] == "planes", chunk=chunk, wide=wide, bins=bins,
    )  # fmt: skip
    return select_scratch(bits, members, tokens * sets, call.config["chunk"])


def plan(call: Any) -> Plan:
    """What calls of `hata.hamming_topk` with this signature have in common."""
    made = Plan(call, worker)
    batch, heads = call.q_codes.shape[:2]
    kv_heads = call.k_codes.shape[1]
    arrays = {**made.views, "indices": made.output("indices")}
    scratch = select_part(made, call, arrays, heads // kv_heads if call.per_head else 1)
    return made.close(scratch, counters=4 * batch * kv_heads)
