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

from collections.abc import Mapping
from typing import Any

from hata.arrays import Framework
from hata.backend import Budget
from hata.problem import Problem

from .encode import PROJECTION_FIELDS, code_scratch, encode_rows, projection_values
from .hamming_topk import DEFAULTS as SELECT_DEFAULTS
from .hamming_topk import TUNABLES as SELECT_TUNABLES
from .hamming_topk import select_values
from .intrinsics import fetch_add
from .scan import FIELDS as SELECT_FIELDS
from .scan import (
    budget,
    chunks_of,
    longest,
    scan_chunk,
    select_scratch,
    select_view,
    valid,
    visible,
)
from .schedule import (
    COUNTERS,
    Worker,
    address_of,
    carve,
    claim,
    control_words,
    device,
    draw,
    inlined,
    layout,
    record_view,
    wait,
    workers,
)
from .sparse_attend import DEFAULTS as ATTEND_DEFAULTS
from .sparse_attend import FIELDS as ATTEND_FIELDS
from .sparse_attend import TUNABLES as ATTEND_TUNABLES
from .sparse_attend import (
    attend_tile,
    attend_values,
    attend_view,
    merge_tiles,
    partial_bytes,
    tile_scratch,
)
from .winners import decide, pack_chunk

TUNABLES = {**SELECT_TUNABLES, **ATTEND_TUNABLES}
DEFAULTS = {**SELECT_DEFAULTS, **ATTEND_DEFAULTS}

# fresh keys of one item
_FRESH_BLOCK = 64

# A record holds those of selection and attention, one after the other, before its own.
OWN_FIELDS = (
    "fresh", "hash_queries",
    *PROJECTION_FIELDS, *("query_" + name for name in PROJECTION_FIELDS),
)  # fmt: skip
own_view = record_view(OWN_FIELDS)
_ATTEND_AT = 8 * len(SELECT_FIELDS)
_OWN_AT = _ATTEND_AT + 8 * len(ATTEND_FIELDS)


@inlined
def taken(call: Any, row: int, token: int) -> tuple[int, int, int]:
    """How many keys a query attends to; the first, and 1, if it takes all that it sees, else 0."""
    low, seen = visible(call, row, token)
    take = budget(call, seen)
    if seen <= take or seen <= call.dense_below:
        return seen, low, 1
    return take, 0, 0


@device
def most_taken(call: Any) -> int:
    """Most keys that any query attends to."""
    most = 0
    for row in range(call.batch):
        for token in range(call.tokens):
            most = max(most, taken(call, row, token)[0])
    return most


@device
def encode_queries(call: Any, attend: Any, own: Any, group: int, scratch: int) -> None:
    """Write the codes of the queries of one row and KV head."""
    row, kv_head = group // call.kv_heads, group % call.kv_heads
    head = kv_head * call.members
    # the heads of a token, and not the tokens of a head, fill the blocks of four rows
    for token in range(call.tokens):
        encode_rows(
            attend.q + row * attend.q_b + head * attend.q_h + token * attend.q_t,
            attend.q_h,
            attend.dtype,
            call.members,
            attend.depth,
            call.bits,
            own.query_projection + kv_head * own.query_projection_h,
            own.query_projection_d,
            own.query_projection_dtype,
            own.query_bias + kv_head * own.query_bias_h if own.query_bias != 0 else 0,
            own.query_bias_dtype,
            call.q_codes + row * call.q_codes_b + head * call.q_codes_h + token * call.q_codes_t,
            call.q_codes_h,
            0,
            0,
            scratch,
        )


@device
def encode_fresh(call: Any, attend: Any, own: Any, group: int, block: int, scratch: int) -> None:
    """Write the codes and norms of a block of the last visible keys of one row and KV head."""
    row, kv_head = group // call.kv_heads, group % call.kv_heads
    low, high = valid(call, row)
    first = max(low, high - own.fresh) + block * _FRESH_BLOCK
    count = min(high - first, _FRESH_BLOCK)
    if count <= 0:
        return
    norms = 0
    if call.norms != 0:
        norms = call.norms + row * call.norms_b + kv_head * call.norms_h + first * call.norms_s
    encode_rows(
        attend.keys + row * attend.keys_b + kv_head * attend.keys_h + first * attend.keys_s,
        attend.keys_s,
        attend.dtype,
        count,
        attend.depth,
        call.bits,
        own.projection + kv_head * own.projection_h,
        own.projection_d,
        own.projection_dtype,
        own.bias + kv_head * own.bias_h if own.bias != 0 else 0,
        own.bias_dtype,
        call.codes + row * call.codes_b + kv_head * call.codes_h + first * call.codes_s,
        call.codes_s,
        norms,
        call.norms_s,
        scratch,
    )


def _make(revision: int) -> Any:
    def hash_attend_worker(address):
        call = select_view(address)
        attend = attend_view(address + _ATTEND_AT)
        own = own_view(address + _OWN_AT)
        if revision == 0:
            return
        scratch = claim(call.control, call.scratch, call.scratch_bytes)
        if scratch == 0:
            return
        width = (longest(call) + 63) // 64 * 64
        chunks = chunks_of(call, width)
        tokens = call.tokens
        groups = call.batch * call.kv_heads
        tiles = max((most_taken(call) + attend.tile - 1) // attend.tile, 1)
        step = partial_bytes(attend.group, attend.value_depth)
        asks = 1 if own.hash_queries != 0 and chunks > 0 else 0
        blocks = asks + (min(own.fresh, call.slots) + _FRESH_BLOCK - 1) // _FRESH_BLOCK
        encodes, scans = groups * blocks, groups * chunks
        decides = groups * tokens if chunks > 0 else 0
        encoded = call.control + COUNTERS
        scanned = encoded + 8 * groups
        decided = scanned + 8 * groups
        packed = decided + 8 * groups
        attended = packed + 8 * groups
        while True:
            ticket = draw(call.control)
            if ticket < encodes:
                group, block = ticket // blocks, ticket % blocks
                if block < asks:
                    encode_queries(call, attend, own, group, scratch)
                else:
                    encode_fresh(call, attend, own, group, block - asks, scratch)
                fetch_add(encoded + 8 * group, 1)
                continue
            ticket -= encodes
            if ticket < scans:
                wait(call.control, encoded + 8 * (ticket // chunks), blocks)
                scan_chunk(call, ticket, chunks, width, scratch + 64)
                fetch_add(scanned + 8 * (ticket // chunks), 1)
                continue
            ticket -= scans
            if ticket < decides:
                wait(call.control, scanned + 8 * (ticket // tokens), chunks)
                decide(call, ticket, chunks, width, scratch + 64)
                fetch_add(decided + 8 * (ticket // tokens), 1)
                continue
            ticket -= decides
            if ticket < scans:
                wait(call.control, decided + 8 * (ticket // chunks), tokens)
                pack_chunk(call, ticket, chunks, width, 0)
                fetch_add(packed + 8 * (ticket // chunks), 1)
                continue
            ticket -= scans
            rank, tile = ticket // tiles, ticket % tiles
            if rank >= groups * tokens:
                return
            group, token = rank // tokens, rank % tokens
            row, kv_head = group // call.kv_heads, group % call.kv_heads
            count, low, everything = taken(call, row, token)
            mine = max((count + attend.tile - 1) // attend.tile, 1)
            if tile >= mine:
                continue
            start = tile * attend.tile
            indices = 0
            if everything == 0:
                wait(call.control, packed + 8 * group, chunks)
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


def launch(
    problem: Problem, fw: Framework, q: Any, keys: Any, values: Any, key_codes: Any,
    projection: Any, bias: Any, query_projection: Any, query_bias: Any, q_codes: Any, fresh: int,
    dense_below: int, lengths: Any, starts: Any, budget: Budget, key_norms: Any, scale: float,
    softcap: float | None, sink_logits: Any, return_lse: bool, config: Mapping[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """Run `hata.hash_attend` with a configuration; returns `(out, lse)`."""
    batch, heads, tokens, depth = fw.shape(q)
    kv_heads, slots = fw.shape(keys)[1:3]
    bits = fw.shape(projection)[2]
    own = q_codes is None
    code_heads = heads if own else fw.shape(q_codes)[1]
    threads = workers(config["threads"])
    k = min(budget.k, slots)
    scratch_bytes = 64 + max(
        code_scratch.py_func(depth, bits),
        select_scratch(bits, code_heads // kv_heads, tokens, config["chunk"]),
        tile_scratch.py_func(config["tile"], heads // kv_heads, depth, fw.shape(values)[3]),
    )
    most = min(max(k, dense_below), slots)
    code_bytes = bits // 8
    hold, (scratch, indices, codes) = carve(
        threads * scratch_bytes,
        4 * batch * kv_heads * tokens * k,
        batch * heads * tokens * code_bytes if own else 0,
    )
    control = control_words(batch * kv_heads * (4 + tokens), threads)
    if own:
        query_codes = (codes, heads * tokens * code_bytes, tokens * code_bytes, code_bytes)
    else:
        query_codes = layout(fw, q_codes, 1)
    at = (indices, 4 * kv_heads * tokens * k, 4 * tokens * k, 4 * k)
    keep, select = select_values(
        fw, batch, kv_heads, tokens, slots, lengths, starts, budget._replace(k=k), dense_below,
        bits, code_heads // kv_heads, 1, key_codes, query_codes, key_norms, at, config,
    )  # fmt: skip
    out, lse, held, attend = attend_values(
        problem, fw, q, keys, values, scale, softcap, sink_logits, return_lse, kv_heads, k, at,
        most, config,
    )  # fmt: skip
    running = (*address_of(control), scratch, scratch_bytes)
    dtype = problem.projection_dtype
    key_side = projection_values(fw, projection, dtype, bias)
    query_dtype = dtype if query_projection is projection else fw.dtype(query_projection)
    query_side = projection_values(fw, query_projection, query_dtype, query_bias)
    if batch * heads * tokens:
        worker.run(
            [*select, *running, *attend, *running, fresh, int(own), *key_side, *query_side],
            threads,
        )
    del hold, keep, held
    return out, lse
