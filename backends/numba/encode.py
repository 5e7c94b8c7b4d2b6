"""encode: packed sign bits of projected vectors, on a CPU (arXiv 2506.02572, section 3).

Bit j of a code is (x . projection[:, j] + bias[j]) > 0, at byte j // 8, weight 2^(j % 8).

Rows are widened to fp32 in blocks of `_BLOCK` and projected four at a time on 32 columns at a time,
so that 32 columns of the projection stay in the first-level cache for a whole block. Each sum runs
over the head size in order, with the same operations wherever the row stands: a code depends on
its vector alone. A projection that is not fp32 is widened once a thread and head.
"""

from typing import Any

import numpy as np

from .conversion import half_bits, widen
from .intrinsics import FLOAT32, clear, load_i64, store_16, store_32, store_64
from .record import Part, Plan, Views, views_of
from .rows import copy_float32, positive_bits, project4, sum_squares
from .schedule import THREADS, Worker, claim, device, draw

TUNABLES = {"threads": THREADS, "block": (16, 64, 256)}
DEFAULTS = {"threads": "all", "block": 64}

# rows widened at a time
_BLOCK = 64

ENCODE = Part(
    {"x": "bht", "projection": "hd", "bias": "h", "out": "bht", "norms": "bht"},
    "batch heads tokens depth bits group block",
)
run_of, encode_of = views_of(ENCODE)


def code_scratch(depth: int, bits: int) -> int:
    """Bytes of scratch that `encode_rows` needs."""
    return 64 + 4 * (_BLOCK * depth + 128 + bits + depth * bits)


@device
def encode_rows(call, row, head, kv_head, first, count, scratch) -> None:
    """Encode `count` vectors of one head from `first` on, with the projection of a KV head.

    The first words of scratch say which projection has been widened into it: its address (or 0),
    step and dtype, since two views may begin at one address.
    """
    depth, bits, dtype, x_step, out_step = call.depth, call.bits, call.x_dtype, call.x_t, call.out_t
    x = call.x + row * call.x_b + head * call.x_h + first * x_step
    out = call.out + row * call.out_b + head * call.out_h + first * out_step
    norms = call.norms
    if norms != 0:
        norms += row * call.norms_b + head * call.norms_h + first * call.norms_t
    projection = call.projection + kv_head * call.projection_h
    projection_step, projection_dtype = call.projection_d, call.projection_dtype
    rows = scratch + 64
    sums = rows + 4 * _BLOCK * depth
    offsets = sums + 512
    weights = offsets + 4 * bits
    if projection_dtype != FLOAT32:
        if (
            load_i64(scratch) != projection
            or load_i64(scratch + 8) != projection_step
            or load_i64(scratch + 16) != projection_dtype
        ):
            for d in range(depth):
                source = projection + d * projection_step
                widen(source, weights + 4 * d * bits, bits, projection_dtype)
            store_64(scratch, projection)
            store_64(scratch + 8, projection_step)
            store_64(scratch + 16, projection_dtype)
        projection, projection_step = weights, 4 * bits
    if call.bias != 0:
        widen(call.bias + kv_head * call.bias_h, offsets, bits, call.bias_dtype)
    else:
        clear(offsets, 4 * bits)
    for start in range(0, count, _BLOCK):
        size = min(count - start, _BLOCK)
        for n in range(size):
            vector = rows + 4 * n * depth
            widen(x + (start + n) * x_step, vector, depth, dtype)
            if norms != 0:
                norm = np.sqrt(sum_squares(vector, depth))
                norm = min(norm, np.float32(65504)) if norm == norm else np.float32(0)
                store_16(norms + (start + n) * call.norms_t, half_bits(norm))
        for n in range(size, (size + 3) // 4 * 4):
            copy_float32(rows, rows + 4 * n * depth, depth)
        for j in range(0, bits, 32):
            for n in range(0, size, 4):
                project4(rows + 4 * n * depth, projection + 4 * j, projection_step, depth, sums)
                for m in range(min(size - n, 4)):
                    word = positive_bits(sums + 128 * m, offsets + 4 * j)
                    store_32(out + (start + n + m) * out_step + j // 8, word)


def _make(revision: int) -> Any:
    def encode_worker(address):
        run, call = run_of(address), encode_of(address)
        scratch = claim(run, revision)
        blocks = (call.tokens + call.block - 1) // call.block
        while scratch != 0:
            ticket = draw(run)
            if ticket >= call.batch * call.heads * blocks:
                return
            first = ticket % blocks * call.block
            head = ticket // blocks % call.heads
            row = ticket // blocks // call.heads
            count = min(call.block, call.tokens - first)
            encode_rows(call, row, head, head // call.group, first, count, scratch)

    return encode_worker


worker = Worker(_make)


def encode_part(made: Plan, arrays: Views, tokens: int, block: int = 0) -> int:
    """Add `ENCODE` to a plan, where something is encoded; returns `code_scratch`."""
    x, projection = arrays.get("x"), arrays.get("projection")
    batch, heads, _, depth = x.shape if x else (0, 0, 0, 0)
    kv_heads, _, bits = projection.shape if projection else (1, 0, 0)
    sizes = {"batch": batch, "heads": heads, "depth": depth, "group": heads // kv_heads}
    made.part(ENCODE, arrays, **sizes, tokens=tokens, bits=bits, block=block)
    return code_scratch(depth, bits)


def plan(call: Any) -> Plan:
    """What calls of `hata.encode` with this signature have in common."""
    made = Plan(call, worker)
    out = made.views["out"] or made.output("codes")
    scratch = encode_part(made, {**made.views, "out": out}, call.x.shape[2], call.config["block"])
    return made.close(scratch, counters=0)
