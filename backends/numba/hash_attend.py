"""hash_attend: encode, select and attend as one parallel region, on a CPU (arXiv 2506.02572).

The phases are those of the three ops, on the same code, so that each gives the same bits as alone:

encode   queries of one KV head (a row of G * T vectors), or a block of its fresh keys, whose codes
         and norms are written in place;
scan, decide, pack   as in `hamming_topk`, for queries that do not take all that they see;
attend   tiles of the selection as in `sparse_attend`; of consecutive positions where a query takes
         all that it sees, with no list of them.

Items of a phase wait for the items of earlier phases that they read, no more: while the last head
is still scanned the first one already attends.
"""

from typing import Any

from . import hamming_topk, sparse_attend
from .encode import ENCODE, encode_part, encode_rows
from .hamming_topk import select_item, select_part
from .intrinsics import fetch_add
from .record import Plan, Views, views_of
from .scan import SELECT, extent, query, valid
from .schedule import COUNTERS, Worker, claim, device, draw, wait
from .sparse_attend import ATTEND, attend_part, attend_tile, merge_tiles, partial_bytes

TUNABLES = {**hamming_topk.TUNABLES, **sparse_attend.TUNABLES}
DEFAULTS = {**hamming_topk.DEFAULTS, **sparse_attend.DEFAULTS}

# fresh keys of one item
_FRESH_BLOCK = 64

run_of, select_of, attend_of, queries_of, fresh_of = views_of(SELECT, ATTEND, ENCODE, ENCODE)


@device
def encode_block(call, part, group, block, scratch) -> None:
    """Encode the queries of a row and KV head, if `block` is -1, or a block of its fresh keys.

    Keys get their norms too.
    """
    row, kv_head = group // call.kv_heads, group % call.kv_heads
    if block < 0:
        # The heads of a token, and not the tokens of a head, fill the blocks of four rows: the
        # axes are swapped.
        for token in range(call.tokens):
            first = kv_head * call.members
            encode_rows(part, row, token, kv_head, first, call.members, scratch)
        return
    low, high = valid(call, row)
    first = max(low, high - part.tokens) + block * _FRESH_BLOCK
    count = min(high - first, _FRESH_BLOCK)
    if count > 0:
        encode_rows(part, row, kv_head, kv_head, first, count, scratch)


def _make(revision: int) -> Any:
    def hash_attend_worker(address):
        run, call, attend = run_of(address), select_of(address), attend_of(address)
        queries, fresh = queries_of(address), fresh_of(address)
        scratch = claim(run, revision)
        width, most = extent(call)
        groups = call.batch * call.kv_heads
        tiles = max((most + attend.tile - 1) // attend.tile, 1)
        step = partial_bytes(attend.group, attend.value_depth)
        asks = 1 if queries.x != 0 and width > 0 else 0
        blocks = asks + (fresh.tokens + _FRESH_BLOCK - 1) // _FRESH_BLOCK
        encoded = run.control + COUNTERS
        packed, attended = encoded + 24 * groups, encoded + 32 * groups
        while scratch != 0:
            ticket = draw(run)
            if ticket < groups * blocks:
                group, block = ticket // blocks, ticket % blocks - asks
                encode_block(call, queries if block < 0 else fresh, group, block, scratch)
                fetch_add(encoded + 8 * group, 1)
                continue
            ticket -= groups * blocks
            ticket = select_item(run, call, ticket, width, blocks, 0, scratch + 64)
            if ticket < 0:
                continue
            rank, tile = ticket // tiles, ticket % tiles
            if rank >= groups * call.tokens:
                return
            group, token = rank // call.tokens, rank % call.tokens
            row, kv_head = group // call.kv_heads, group % call.kv_heads
            low, seen, count = query(call, row, token)
            mine = max((count + attend.tile - 1) // attend.tile, 1)
            if tile >= mine:
                continue
            start, indices = tile * attend.tile, 0
            if count < seen:
                wait(run, packed + 8 * group, (width + call.chunk - 1) // call.chunk)
                indices = (
                    call.indices + row * call.indices_b + kv_head * call.indices_h
                    + token * call.indices_t + 4 * start
                )  # fmt: skip
            partials = attend.partials + rank * tiles * step
            attend_tile(
                attend, row, kv_head, token, indices, low + start,
                min(attend.tile, count - start), partials + tile * step, scratch + 64,
            )  # fmt: skip
            if fetch_add(attended + 8 * rank, 1) == mine - 1:
                merge_tiles(attend, row, kv_head, token, partials, mine)

    return hash_attend_worker


worker = Worker(_make)


def plan(call: Any) -> Plan:
    """What calls of `hata.hash_attend` with this signature have in common."""
    made = Plan(call, worker)
    views = made.views
    batch, heads, tokens, _ = call.q.shape
    kv_heads, slots, width = call.key_codes.shape[1:]
    indices = made.piece(batch, kv_heads, tokens, call.k, dtype="int32")
    q_codes, key_codes = views["q_codes"], views["key_codes"]
    queries: Views = {}
    fresh: Views = {}
    if q_codes is None:
        q_codes = made.piece(batch, heads, tokens, width)
        queries = {
            "x": views["q"].swapped(), "projection": views["query_projection"],
            "bias": views["query_bias"], "out": q_codes.swapped(),
        }  # fmt: skip
    if call.fresh:
        fresh = {**views, "x": views["keys"], "out": key_codes, "norms": views["key_norms"]}
    arrays = {**views, "q_codes": q_codes, "k_codes": key_codes, "indices": indices}
    scratch = max(
        select_part(made, call, arrays, dense_below=call.dense_below),
        attend_part(made, call, indices, min(max(call.k, call.dense_below), slots)),
        encode_part(made, queries, tokens),
        encode_part(made, fresh, call.fresh),
    )
    return made.close(64 + scratch, counters=batch * kv_heads * (4 + tokens))
