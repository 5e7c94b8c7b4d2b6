"""A HATA backend in plain NumPy: slow, short, and a place to start from.

Calls arrive checked against the contract in `hata.ops`, with defaults filled in; what is left is
the arithmetic. `hash_attend` is inherited: it runs the three ops below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hata.backend import Backend
from hata.call import Encode, HammingTopK, SparseAttend, visible
from hata.problem import Problem


class PlainBackend(Backend):
    """Plain NumPy on the CPU, one query at a time."""

    name = "plain"
    frameworks = frozenset({"numpy"})

    def unsupported(self, problem: Problem) -> list[str]:
        """Say what cannot run. This limit is only here to show where limits go."""
        if problem.bits > 256:
            return [f"codes of {problem.bits} bits; at most 256 are supported"]
        return []

    @np.errstate(all="ignore")
    def encode(self, call: Encode) -> Any:
        """Project, take the signs, pack them."""
        group = call.x.shape[1] // call.projection.shape[0]
        weights = call.projection.astype("f4").repeat(group, axis=0)  # [H', D, r]
        values, squares = np.float32(0), np.float32(0)
        # One dimension at a time: a matrix product may round a vector differently beside others.
        for d in range(weights.shape[1]):
            column = call.x[..., d].astype("f4")
            values = values + column[..., None] * weights[:, None, d]
            squares = squares + column * column
        if call.norms is not None:
            call.norms[...] = np.nan_to_num(np.minimum(np.sqrt(squares), 65504.0))
        if call.bias is not None:
            values = values + call.bias.astype("f4").repeat(group, axis=0)[:, None]
        codes = np.packbits(values > 0, axis=-1, bitorder="little")
        out = codes if call.out is None else call.out
        out[...] = codes
        return out

    @np.errstate(all="ignore")
    def hamming_topk(self, call: HammingTopK) -> Any:
        """Sort the keys that each query sees, its first and last ones before all others."""
        (batch, heads, tokens, _), kv_heads = call.q_codes.shape, call.k_codes.shape[1]
        rows = heads if call.per_head else kv_heads
        indices = np.full((batch, rows, tokens, call.k), -1, np.int32)
        for b, t, start, stop in visible(call):
            position = np.arange(stop - start)
            free = (position >= call.sink) & (position < len(position) - call.recent)
            for row in range(rows):
                seen = b, row * kv_heads // rows, slice(start, stop)
                queries = call.q_codes[b, row * heads // rows : (row + 1) * heads // rows, t]
                different = queries[:, None] ^ call.k_codes[seen]
                cost = np.bitwise_count(different).sum(axis=(0, 2), dtype=np.float32)
                if call.key_norms is not None:
                    cost = (2 * cost - 8 * queries.size) * call.key_norms[seen].astype("f4")
                    cost[np.isnan(cost)] = 0.0
                # Among equals, -0 and +0 too, the lowest position wins: the sort is stable.
                chosen = np.sort(np.lexsort((cost, free))[: call.budget.of(len(position))])
                indices[b, row, t, : len(chosen)] = start + chosen
        return indices

    @np.errstate(all="ignore")
    def sparse_attend(self, call: SparseAttend) -> tuple[Any, Any]:
        """Softmax over the rows that the indices name."""
        lse = np.full(call.q.shape[:3], -np.inf, np.float32)
        out = np.zeros((*lse.shape, call.values.shape[3]), call.q.dtype)
        for b, h, t in np.ndindex(lse.shape):
            indices = call.indices[b, h * call.indices.shape[1] // lse.shape[1], t]
            row = b, h * call.keys.shape[1] // lse.shape[1], indices[indices >= 0]
            if len(row[2]) == 0:
                continue
            logits = call.scale * (call.keys[row].astype("f4") @ call.q[b, h, t].astype("f4"))
            if call.softcap is not None:
                logits = call.softcap * np.tanh(logits / call.softcap)
            sink = np.float32(-np.inf if call.sink_logits is None else call.sink_logits[h])
            largest = np.maximum(logits.max(), sink)
            weights = np.exp(logits - largest)
            total = weights.sum() + np.exp(sink - largest)
            out[b, h, t] = (weights / total) @ call.values[row].astype("f4")
            lse[b, h, t] = largest if largest == -np.inf else largest + np.log(total)
        return out, lse
