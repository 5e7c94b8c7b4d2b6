"""A HATA backend in plain NumPy: slow, short, and a place to start from.

It shows all that a backend has to do. Arguments of the launchers arrive checked against the
contract in `hata.ops`; what is left is the arithmetic. Outputs are allocated with `fw.empty`.
JAX callers come through here too: on the CPU their arrays arrive as NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from hata.arrays import Framework
from hata.backend import Backend, Budget
from hata.problem import Problem

LARGEST_FLOAT16 = 65504.0
MOST_BITS = 256


class PlainBackend(Backend):
    """Plain NumPy on the CPU, one query at a time."""

    name: ClassVar[str] = "plain"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "bfloat16"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"numpy"})

    def unsupported(self, problem: Problem) -> list[str]:
        """Say what cannot run. This limit is only here to show where limits go."""
        if problem.bits > MOST_BITS:
            return [f"codes of {problem.bits} bits; at most {MOST_BITS} are supported"]
        return []

    def launch_encode(
        self,
        problem: Problem,
        fw: Framework,
        x: Any,
        projection: Any,
        bias: Any,
        out: Any,
        norms: Any,
    ) -> Any:
        """Project, take the signs, pack them."""
        group = x.shape[1] // projection.shape[0]
        weights = projection.astype(np.float32).repeat(group, axis=0)  # [H', D, r]
        values = np.zeros((*x.shape[:3], projection.shape[2]), np.float32)
        squares = np.zeros(x.shape[:3], np.float32)
        with np.errstate(all="ignore"):
            # One dimension after the other, in this order for every vector: a matrix product would
            # round differently for another number of vectors, and so could flip a bit.
            for d in range(x.shape[3]):
                column = x[..., d].astype(np.float32)
                values += column[..., None] * weights[:, None, d]
                squares += column * column
            if bias is not None:
                values += bias.astype(np.float32).repeat(group, axis=0)[:, None]
            if norms is not None:
                lengths = np.minimum(np.sqrt(squares), LARGEST_FLOAT16)
                norms[...] = np.where(np.isnan(lengths), 0.0, lengths)
        if out is None:
            out = fw.empty((*x.shape[:3], projection.shape[2] // 8), "uint8", x)
        out[...] = np.packbits(values > 0, axis=-1, bitorder="little")
        return out

    def launch_hamming_topk(
        self,
        problem: Problem,
        fw: Framework,
        q_codes: Any,
        k_codes: Any,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        per_head: bool,
    ) -> Any:
        """Select for each query, and pad with -1."""
        batch, heads, tokens, _ = q_codes.shape
        rows = heads if per_head else k_codes.shape[1]
        indices = fw.empty((batch, rows, tokens, budget.k), "int32", q_codes)
        indices.fill(-1)
        for b, t, first, last in _queries(batch, tokens, k_codes.shape[2], lengths, starts):
            for row in range(rows):
                head = row * k_codes.shape[1] // rows
                codes = q_codes[b, row * heads // rows : (row + 1) * heads // rows, t]
                norms = None if key_norms is None else key_norms[b, head, first:last]
                chosen = _select(codes, k_codes[b, head, first:last], norms, budget)
                indices[b, row, t, : len(chosen)] = chosen + first
        return indices

    def launch_sparse_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        indices: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Attend to the rows that the indices name."""
        batch, heads, tokens, _ = q.shape
        out, lse = _outputs(fw, q, values)
        for b, h, t in np.ndindex(batch, heads, tokens):
            chosen = indices[b, h * indices.shape[1] // heads, t]
            attended = _attend(
                q, keys, values, (b, h, t), chosen[chosen >= 0], scale, softcap, sink_logits
            )
            out[b, h, t], lse[b, h, t] = attended
        return out, lse

    def launch_hash_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        key_codes: Any,
        projection: Any,
        bias: Any,
        query_projection: Any,
        query_bias: Any,
        q_codes: Any,
        fresh: int,
        dense_below: int,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Encode what has no code yet, then select and attend query by query."""
        batch, heads, tokens, _ = q.shape
        kv_heads, slots = keys.shape[1:3]
        if q_codes is None:
            q_codes = self.launch_encode(problem, fw, q, query_projection, query_bias, None, None)
        if fresh:
            for b, _, first, last in _queries(batch, 1, slots, lengths, starts):
                new = np.s_[b : b + 1, :, max(first, last - fresh) : last]
                norms = None if key_norms is None else key_norms[new]
                self.launch_encode(problem, fw, keys[new], projection, bias, key_codes[new], norms)
        out, lse = _outputs(fw, q, values)
        for b, t, first, last in _queries(batch, tokens, slots, lengths, starts):
            for head in range(kv_heads):
                chosen = np.arange(last - first)
                if last - first > dense_below:
                    group = q_codes.shape[1] // kv_heads
                    codes = q_codes[b, head * group : (head + 1) * group, t]
                    norms = None if key_norms is None else key_norms[b, head, first:last]
                    chosen = _select(codes, key_codes[b, head, first:last], norms, budget)
                for h in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
                    out[b, h, t], lse[b, h, t] = _attend(
                        q, keys, values, (b, h, t), chosen + first, scale, softcap, sink_logits
                    )
        return out, lse


def _queries(
    batch: int, tokens: int, slots: int, lengths: Any, starts: Any
) -> Iterator[tuple[int, int, int, int]]:
    """Row, token, first visible key and the one after the last, for every query."""
    ends = np.broadcast_to(slots if lengths is None else lengths, batch)
    begins = np.broadcast_to(0 if starts is None else starts, batch)
    for b, t in np.ndindex(batch, tokens):
        first = int(begins[b])
        yield b, t, first, max(first, int(ends[b]) - (tokens - 1 - t))


def _select(q_codes: Any, k_codes: Any, key_norms: Any, budget: Budget) -> Any:
    """Positions, ascending, of the keys that a group of query codes attends to."""
    visible = len(k_codes)
    size = budget.of(visible)
    if visible <= size:
        return np.arange(visible)
    distances = np.bitwise_count(q_codes[:, None] ^ k_codes).sum(axis=(0, 2), dtype=np.int64)
    if key_norms is None:
        cost = distances.astype(np.float32)
    else:
        scores = (q_codes.size * 8 - 2 * distances).astype(np.float32)
        with np.errstate(invalid="ignore"):
            cost = -(scores * key_norms.astype(np.float32))
        cost[np.isnan(cost)] = 0.0
    position = np.arange(visible)
    free = (position >= budget.sink) & (position < visible - budget.recent)
    # Sink and recent keys first, then by cost, then by position: the sort is stable.
    return np.sort(np.lexsort((cost, free))[:size])


def _attend(
    q: Any,
    keys: Any,
    values: Any,
    query: tuple[int, int, int],
    chosen: Any,
    scale: float,
    softcap: float | None,
    sink_logits: Any,
) -> tuple[Any, Any]:
    """Output and log of the denominator of one query over the chosen keys."""
    b, h, t = query
    head = h * keys.shape[1] // q.shape[1]
    if len(chosen) == 0:
        return 0.0, -np.inf
    # Only gathered rows are widened.
    with np.errstate(all="ignore"):
        logits = keys[b, head, chosen].astype(np.float32) @ q[b, h, t].astype(np.float32)
        logits = logits * np.float32(scale)
        if softcap is not None:
            logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
        sink = -np.inf if sink_logits is None else np.float32(sink_logits[h])
        largest = np.maximum(logits.max(), sink)
        weights = np.exp(logits - largest)
        total = weights.sum() + np.exp(sink - largest)
        out = (weights / total) @ values[b, head, chosen].astype(np.float32)
        return out.astype(q.dtype), largest + np.log(total)


def _outputs(fw: Framework, q: Any, values: Any) -> tuple[Any, Any]:
    out = fw.empty((*q.shape[:3], values.shape[3]), fw.dtype(q), q)
    return out, fw.empty(q.shape[:3], "float32", q)
