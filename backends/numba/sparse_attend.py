"""sparse_attend: attention over selected keys, on a CPU (arXiv 2506.02572, section 3).

logit = scale * q.k, then softcap * tanh(logit / softcap); out = softmax(logits) . values, with
`sink_logits` in the denominator; lse = log(sum of exp(logit)).

The keys of a selection are taken `tile` at a time, in order. A tile gathers each of its rows once
for all query heads of the group and leaves, per query, its largest logit, its sum of exponentials
and its weighted sum of values (fp32). Whoever finishes the last tile of a selection merges them in
the order of the tiles: the bits of a row depend on that row and on `tile` alone, not on threads.
Rows of fp16 and bf16 are widened four at a time; nothing but gathered rows is read.
"""

import math
import struct
from typing import Any

import numpy as np

from .conversion import load_number, narrow, widen
from .intrinsics import (
    FLOAT32,
    bits_float,
    clear,
    fetch_add,
    load_f32,
    load_i32,
    load_i64,
    prefetch,
    store_64,
    store_f32,
)
from .record import Part, Plan, View, views_of
from .rows import accumulate4, add_row, divide_row, dot4, exp_shifted, row_maximum, scale_row
from .schedule import COUNTERS, THREADS, Worker, claim, device, draw, inlined

TUNABLES = {"threads": THREADS, "tile": (64, 128, 256, 512, 1024)}
DEFAULTS = {"threads": "all", "tile": 256}

# rows ahead of the one in use that are asked for
_AHEAD = 8

ATTEND = Part(
    {
        "q": "bht", "keys": "bhs", "values": "bhs", "indices": "bht", "sink_logits": "",
        "out": "bht", "lse": "bht", "partials": "",
    },
    "batch index_heads kv_heads tokens slots k depth value_depth group scale_bits softcap_bits "
    "tile",
)  # fmt: skip
run_of, attend_of = views_of(ATTEND)

NEGATIVE_INFINITY = np.float32(-np.inf)


@inlined
def partial_bytes(group, value_depth) -> int:
    """Bytes of what one tile leaves: maximum and sum, and a row of values, for each query."""
    return group * (64 + 4 * value_depth)


def tile_scratch(tile: int, group: int, depth: int, value_depth: int) -> int:
    """Bytes of scratch that `attend_tile` needs."""
    padded = (tile + 15) // 16 * 16
    return 16 * (tile + 4) + 4 * group * (depth + padded) + 4 * 5 * max(depth, value_depth)


@inlined
def prefetch_row(address, size) -> None:
    """Ask for the cache lines of a row."""
    for line in range(0, size, 64):
        prefetch(address + line)


@device
def attend_tile(call, row, index_head, token, indices, first, count, partial, scratch) -> None:
    """Attend the queries of one selection to `count` of its keys.

    The keys are those at `indices`, or, where that is 0, the positions from `first` on.
    """
    group, depth, value_depth, dtype = call.group, call.depth, call.value_depth, call.q_dtype
    kv_head = index_head // (call.index_heads // call.kv_heads)
    keys = call.keys + row * call.keys_b + kv_head * call.keys_h
    values = call.values + row * call.values_b + kv_head * call.values_h
    padded = (call.tile + 15) // 16 * 16
    key_rows = scratch
    value_rows = key_rows + 8 * (call.tile + 4)
    queries = value_rows + 8 * (call.tile + 4)
    logits = queries + 4 * group * depth
    wide = logits + 4 * group * padded
    zeros = wide + 16 * max(depth, value_depth)
    size = 0
    for n in range(count):
        position = first + n if indices == 0 else load_i32(indices + 4 * n)
        if position >= 0 and position < call.slots:
            store_64(key_rows + 8 * size, keys + position * call.keys_s)
            store_64(value_rows + 8 * size, values + position * call.values_s)
            size += 1
    for n in range(size, (size + 3) // 4 * 4):
        # the logits of these are dropped, and their values are zeros
        store_64(key_rows + 8 * n, load_i64(key_rows))
    item_size = 4 if dtype == FLOAT32 else 2
    key_bytes, value_bytes = depth * item_size, value_depth * item_size
    for g in range(group):
        head = index_head * group + g
        source = call.q + row * call.q_b + head * call.q_h + token * call.q_t
        widen(source, queries + 4 * g * depth, depth, dtype)
    for n in range(0, size, 4):
        for ahead in range(n + _AHEAD, min(n + _AHEAD + 4, size)):
            prefetch_row(load_i64(key_rows + 8 * ahead), key_bytes)
        for ahead in range(max(n + _AHEAD, size), n + _AHEAD + 4):
            if ahead - size < min(size, _AHEAD):
                prefetch_row(load_i64(value_rows + 8 * (ahead - size)), value_bytes)
        a, b, c, d = four_rows(key_rows + 8 * n, wide, depth, dtype)
        for g in range(group):
            dot4(a, b, c, d, queries + 4 * g * depth, depth, logits + 4 * (g * padded + n))
    scale, softcap = bits_float(call.scale_bits), bits_float(call.softcap_bits)
    full = (size + 15) // 16 * 16
    for g in range(group):
        line = logits + 4 * g * padded
        scale_row(line, full, scale)
        if softcap > 0:
            for n in range(size):
                logit = load_f32(line + 4 * n) / softcap
                store_f32(line + 4 * n, softcap * np.float32(math.tanh(logit)))
        for n in range(size, full):
            store_f32(line + 4 * n, NEGATIVE_INFINITY)
        most = row_maximum(line, full)
        shift = most if most > NEGATIVE_INFINITY else np.float32(0)
        total = exp_shifted(line, full, shift)
        mine = partial + g * (64 + 4 * value_depth)
        store_f32(mine, most)
        store_f32(mine + 4, total)
        store_64(mine + 16, size)
        clear(mine + 64, 4 * value_depth)
    clear(zeros, 4 * value_depth)
    for n in range(size, (size + 3) // 4 * 4):
        store_64(value_rows + 8 * n, zeros)
    for n in range(0, size, 4):
        for ahead in range(n + _AHEAD, min(n + _AHEAD + 4, size)):
            prefetch_row(load_i64(value_rows + 8 * ahead), value_bytes)
        a, b, c, d = four_rows(value_rows + 8 * n, wide, value_depth, dtype)
        for g in range(group):
            mine = partial + g * (64 + 4 * value_depth) + 64
            accumulate4(mine, a, b, c, d, logits + 4 * (g * padded + n), value_depth)


@inlined
def four_rows(table, wide, count, dtype) -> tuple[int, int, int, int]:
    """Addresses of four rows as fp32: where they lie, or widened."""
    a, b = load_i64(table), load_i64(table + 8)
    c, d = load_i64(table + 16), load_i64(table + 24)
    if dtype == FLOAT32:
        return a, b, c, d
    step = 4 * count
    widen(a, wide, count, dtype)
    widen(b, wide + step, count, dtype)
    widen(c, wide + 2 * step, count, dtype)
    widen(d, wide + 3 * step, count, dtype)
    return wide, wide + step, wide + 2 * step, wide + 3 * step


@device
def merge_tiles(call, row, index_head, token, partials, tiles) -> None:
    """Merge the tiles of one selection, in order, and write its rows of `out` and `lse`."""
    group, value_depth = call.group, call.value_depth
    step = partial_bytes(group, value_depth)
    for g in range(group):
        head = index_head * group + g
        mine = partials + g * (64 + 4 * value_depth)
        most, total, seen = NEGATIVE_INFINITY, np.float32(0), 0
        for n in range(tiles):
            most = max(most, load_f32(mine + n * step))
            seen += load_i64(mine + n * step + 16)
        sink = NEGATIVE_INFINITY
        if call.sink_logits != 0:
            sink = load_number(call.sink_logits, head, call.sink_logits_dtype)
            if not sink <= most:
                most = sink
        if call.sink_logits != 0 and sink != NEGATIVE_INFINITY:
            total = np.float32(math.exp(sink - most))
        # the sum of values grows in the row of the first tile
        sums = mine + 64
        for n in range(tiles):
            # a tile whose logits are all -inf weighs nothing beside another
            factor = np.float32(math.exp(load_f32(mine + n * step) - most))
            total += load_f32(mine + n * step + 4) * factor
            if n == 0:
                scale_row(sums, value_depth, factor)
            else:
                add_row(sums, sums + n * step, value_depth, factor)
        out = call.out + row * call.out_b + head * call.out_h + token * call.out_t
        if seen > 0:
            divide_row(sums, value_depth, total)
        else:
            clear(sums, 4 * value_depth)
        narrow(sums, out, value_depth, call.q_dtype)
        if call.lse != 0:
            lse = NEGATIVE_INFINITY
            if seen > 0 and most != NEGATIVE_INFINITY:
                lse = most + np.float32(math.log(total))
            at = row * call.lse_b + head * call.lse_h + token * call.lse_t
            store_f32(call.lse + at, lse)


def _make(revision: int) -> Any:
    def sparse_attend_worker(address):
        run, call = run_of(address), attend_of(address)
        scratch = claim(run, revision)
        tiles = max((call.k + call.tile - 1) // call.tile, 1)
        step = partial_bytes(call.group, call.value_depth)
        while scratch != 0:
            ticket = draw(run)
            rank, tile = ticket // tiles, ticket % tiles
            if rank >= call.batch * call.index_heads * call.tokens:
                return
            token = rank % call.tokens
            head = rank // call.tokens % call.index_heads
            row = rank // call.tokens // call.index_heads
            partials = call.partials + rank * tiles * step
            start = tile * call.tile
            indices = (
                call.indices + row * call.indices_b + head * call.indices_h
                + token * call.indices_t + 4 * start
            )  # fmt: skip
            count = min(call.tile, call.k - start)
            partial = partials + tile * step
            attend_tile(call, row, head, token, indices, 0, count, partial, scratch)
            if fetch_add(run.control + COUNTERS + 8 * rank, 1) == tiles - 1:
                merge_tiles(call, row, head, token, partials, tiles)

    return sparse_attend_worker


worker = Worker(_make)


def _bits(value: float) -> int:
    """The bits of a number as fp32."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def attend_part(made: Plan, call: Any, indices: View, most: int) -> int:
    """Add `ATTEND` to a plan; returns the bytes of a thread's scratch.

    `most` bounds the keys that a query attends to.
    """
    batch, heads, tokens, depth = call.q.shape
    _, kv_heads, slots, value_depth = call.values.shape
    (_, index_heads, _, k), tile = indices.shape, call.config["tile"]
    group = heads // index_heads
    tiles = max((most + tile - 1) // tile, 1)
    partials = batch * index_heads * tokens * tiles * partial_bytes.py_func(group, value_depth)
    arrays = {
        "indices": indices,
        "out": made.output("out"),
        "lse": made.output("lse") if call.return_lse else None,
        "partials": made.piece(partials),
    }
    made.part(
        ATTEND, {**made.views, **arrays}, batch=batch, index_heads=index_heads, kv_heads=kv_heads,
        tokens=tokens, slots=slots, k=k, depth=depth, value_depth=value_depth, group=group,
        scale_bits=_bits(call.scale), softcap_bits=_bits(call.softcap or 0.0), tile=tile,
    )  # fmt: skip
    return tile_scratch(tile, group, depth, value_depth)


def plan(call: Any) -> Plan:
    """What calls of `hata.sparse_attend` with this signature have in common."""
    made = Plan(call, worker)
    batch, heads, tokens, k = call.indices.shape
    scratch = attend_part(made, call, made.views["indices"], k)
    return made.close(scratch + 64, counters=batch * heads * tokens)
