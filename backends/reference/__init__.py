"""The reference: the ops in plain NumPy and float64, slow, short, and obviously right.

Other backends are held against it: selections bit for bit, codes but for bits whose value is within
float32's rounding of zero, attention within a tolerance. `encode`, `hamming_topk` and
`sparse_attend` take NumPy arrays as the ops of `hata.ops` do, and give attention in float64;
`ReferenceBackend` rounds it to the dtypes of the contract.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np

from hata.backend import Backend
from hata.call import Budget, Encode, HammingTopK, SparseAttend, visible
from hata.problem import Problem


def encode(x: Any, projection: Any, bias: Any = None, *, out: Any = None, norms: Any = None) -> Any:
    """`hata.encode`: bit j is set where the projected value is above zero."""
    group = x.shape[1] // projection.shape[0]
    wide = np.ascontiguousarray(x, np.float64)
    weights = projection.astype(np.float64).repeat(group, axis=0)[:, None]  # [H', 1, D, r]
    with np.errstate(all="ignore"):
        # Each vector by itself, [1, D] times [D, r], so that it is rounded alike in any company.
        value = (wide[..., None, :] @ weights)[..., 0, :]
        if bias is not None:
            value += bias.astype(np.float64).repeat(group, axis=0)[:, None]
        if norms is not None:
            size = np.sqrt((wide * wide).sum(axis=-1))
            norms[...] = np.where(np.isnan(size), 0.0, np.minimum(size, 65504.0))
        # A NaN is not above zero.
        codes = np.packbits(value > 0, axis=-1, bitorder="little")
    if out is None:
        return codes
    out[...] = codes
    return out


def hamming_topk(q_codes: Any, k_codes: Any, k: int, **options: Any) -> Any:
    """`hata.hamming_topk`, by sorting."""
    return _hamming_topk(HammingTopK(q_codes, k_codes, k=k, **options))


def _hamming_topk(call: HammingTopK) -> Any:
    ratio = -1 if call.ratio is None else round(call.ratio * 2**32)
    budget = Budget(call.k, ratio, call.k_min, call.sink, call.recent)
    (batch, heads, tokens, _), kv_heads = call.q_codes.shape, call.k_codes.shape[1]
    rows = heads if call.per_head else kv_heads
    indices = np.full((batch, rows, tokens, call.k), -1, np.int32)
    for b, t, start, stop in visible(call):
        for row in range(rows):
            kv_head = row * kv_heads // rows
            q_codes = call.q_codes[b, row * heads // rows : (row + 1) * heads // rows, t]
            k_codes = call.k_codes[b, kv_head, start:stop]
            norms = None if call.key_norms is None else call.key_norms[b, kv_head, start:stop]
            chosen = _select(q_codes, k_codes, norms, budget)
            indices[b, row, t, : len(chosen)] = start + chosen
    return indices


def _select(q_codes: Any, k_codes: Any, norms: Any, budget: Budget) -> Any:
    """Positions, ascending, of the keys that a group of query codes takes of those it sees."""
    distance = np.bitwise_count(q_codes[:, None] ^ k_codes).sum(axis=(0, 2), dtype=np.int64)
    cost = distance
    if norms is not None:
        agreement = (8 * q_codes.size - 2 * distance).astype(np.float32)
        with np.errstate(all="ignore"):
            cost = -(agreement * norms.astype(np.float32))
        cost[np.isnan(cost)] = 0.0
    position = np.arange(len(k_codes))
    # The first and the last ones win; then the cheapest, -0 being equal to +0; then the lowest.
    free = (position >= budget.sink) & (position < len(k_codes) - budget.recent)
    order = np.lexsort((position, cost, free))
    return np.sort(order[: budget.of(len(k_codes))])


def sparse_attend(
    q: Any, keys: Any, values: Any, indices: Any, *, scale: float | None = None,
    softcap: float | None = None, sink_logits: Any = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`hata.sparse_attend`, in float64."""
    batch, heads, tokens, depth = q.shape
    kv_heads, slots = keys.shape[1:3]
    factor = depth**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, tokens, values.shape[3]))
    lse = np.full((batch, heads, tokens), -np.inf)
    for b, h, t in np.ndindex(lse.shape):
        chosen = indices[b, h * indices.shape[1] // heads, t]
        chosen = chosen[(chosen >= 0) & (chosen < slots)]
        if len(chosen) == 0:
            continue
        row = b, h * kv_heads // heads, chosen
        with np.errstate(all="ignore"):
            logits = factor * (keys[row].astype(np.float64) @ q[b, h, t].astype(np.float64))
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            sink = -np.inf if sink_logits is None else float(sink_logits[h])
            largest = np.maximum(logits.max(), sink)
            weights = np.exp(logits - largest)
            total = weights.sum() + np.exp(sink - largest)
            out[b, h, t] = weights @ values[row].astype(np.float64) / total
            lse[b, h, t] = largest + np.log(total) if largest > -np.inf else largest
    return (out, lse) if return_lse else out


class ReferenceBackend(Backend):
    """The reference on a CPU, for calls that nothing faster can run and for comparison."""

    name = "reference"

    def unsupported(self, problem: Problem) -> list[str]:
        """Say what NumPy lacks."""
        wanted = "bfloat16" in (problem.dtype, problem.projection_dtype)
        if wanted and importlib.util.find_spec("ml_dtypes") is None:
            return ["NumPy has no bfloat16 without ml_dtypes; pip install ml_dtypes"]
        return []

    def encode(self, call: Encode) -> Any:
        """Run `hata.encode`."""
        arrays = {name: _as_numpy(x) for name, x in call.arrays().items()}
        codes = encode(**arrays)
        return self._rounded(call, codes)[0] if call.out is None else call.out

    def hamming_topk(self, call: HammingTopK) -> Any:
        """Run `hata.hamming_topk`."""
        arrays = {name: _as_numpy(x) for name, x in call.arrays().items()}
        return self._rounded(call, _hamming_topk(call._replace(**arrays)))[0]

    def sparse_attend(self, call: SparseAttend) -> tuple[Any, Any]:
        """Run `hata.sparse_attend`."""
        arrays = {name: _as_numpy(x) for name, x in call.arrays().items()}
        exact = sparse_attend(**arrays, scale=call.scale, softcap=call.softcap, return_lse=True)
        return self._rounded(call, *exact)

    def _rounded(self, call: Any, *exact: np.ndarray) -> tuple[Any, ...]:
        """Results in the caller's framework and the dtypes of the contract."""
        made = []
        for (_, shape, dtype), result in zip(call.results(), exact, strict=True):
            made.append(call.fw.empty(shape, dtype or call.problem.dtype, call[0]))
            with np.errstate(all="ignore"):
                _as_numpy(made[-1])[...] = result
        return tuple(made)


def _as_numpy(x: Any) -> Any:
    """The memory of a tensor as a NumPy array."""
    if x is None or isinstance(x, np.ndarray):
        return x
    x = x.detach()
    if str(x.dtype) != "torch.bfloat16":
        return x.numpy()
    import ml_dtypes

    return x.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
