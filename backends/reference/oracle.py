"""The four ops in NumPy and float64: slow, short, and what every backend is checked against.

The contract is that of `hata.ops`, on NumPy arrays. Selection is exact, so it must be equal bit for
bit; attention comes back in float64, to be compared within a tolerance; bits of a code may differ
where the projected value is within `margin` of zero (see `project`). Nothing here is used by, or
uses, the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Projected(NamedTuple):
    """Projected vectors, and how far from zero a value must be for its sign to be certain."""

    value: np.ndarray
    margin: np.ndarray


def project(x: np.ndarray, projection: np.ndarray, bias: np.ndarray | None = None) -> Projected:
    """x . projection + bias in float64, and the contract's margin for fp32 sums.

    Returns:
        `value` and `margin`, both `[B, H', T, r]`. Where |value| <= margin a bit may be either.
    """
    group = x.shape[1] // projection.shape[0]
    x64 = x.astype(np.float64)
    weights = np.repeat(projection.astype(np.float64), group, axis=0)
    with np.errstate(all="ignore"):
        value = x64 @ weights
        size = np.abs(x64) @ np.abs(weights)
        if bias is not None:
            offset = np.repeat(bias.astype(np.float64), group, axis=0)[:, None, :]
            value = value + offset
            size = size + np.abs(offset)
    return Projected(value, x.shape[-1] * 2.0**-23 * size)


def encode(
    x: np.ndarray,
    projection: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    norms: np.ndarray | None = None,
) -> np.ndarray:
    """`hata.encode`: bit j is set where the projected value is above zero."""
    with np.errstate(invalid="ignore"):
        bits = project(x, projection, bias).value > 0
    codes = np.packbits(bits, axis=-1, bitorder="little")
    if norms is not None:
        norms[...] = norms_of(x)
    if out is None:
        return codes
    out[...] = codes
    return out


def norms_of(x: np.ndarray) -> np.ndarray:
    """L2 norms in fp16, at most 65504, NaN as 0."""
    with np.errstate(all="ignore"):
        exact = np.sqrt((x.astype(np.float64) ** 2).sum(axis=-1))
    return np.where(np.isnan(exact), 0.0, np.minimum(exact, 65504.0)).astype(np.float16)


def visible(
    batch: int, tokens: int, slots: int, lengths: Any = None, starts: Any = None
) -> np.ndarray:
    """First and one past the last visible key of every query, `[B, T, 2]`; empty if they meet."""
    last = np.broadcast_to(np.asarray(slots if lengths is None else lengths), (batch,))
    first = np.broadcast_to(np.asarray(0 if starts is None else starts), (batch,))
    spans = np.zeros((batch, tokens, 2), np.int64)
    for b in range(batch):
        for t in range(tokens):
            low = max(int(first[b]), 0)
            high = min(int(last[b]), slots) - (tokens - 1 - t)
            spans[b, t] = low, max(high, low)
    return spans


def budget_of(count: int, k: int, ratio: float | None, k_min: int, forced: int) -> int:
    """Keys that a query takes which sees `count` of them (it may exceed `count`)."""
    if ratio is None:
        return k
    return min(k, max(1, k_min, forced, (count * round(ratio * 2**32)) >> 32))


def distances(q_codes: np.ndarray, k_codes: np.ndarray) -> np.ndarray:
    """Sum over the query codes `[g, r/8]` of the bits in which each key `[S, r/8]` differs."""
    different = np.unpackbits(np.bitwise_xor(q_codes[:, None, :], k_codes[None, :, :]), axis=-1)
    return different.sum(axis=(0, 2), dtype=np.int64)


def select(
    q_codes: np.ndarray,
    k_codes: np.ndarray,
    norms: np.ndarray | None,
    budget: int,
    sink: int,
    recent: int,
) -> np.ndarray:
    """Positions, ascending, of the keys that win among `k_codes`, all of them visible."""
    count = len(k_codes)
    if count <= budget:
        return np.arange(count)
    distance = distances(q_codes, k_codes)
    if norms is None:
        cost = distance.astype(np.float64)
    else:
        agreement = q_codes.shape[0] * q_codes.shape[1] * 8 - 2 * distance
        with np.errstate(all="ignore"):
            score = agreement.astype(np.float32) * norms.astype(np.float32)
        score[np.isnan(score)] = 0
        # adding zero turns -0 into +0
        cost = -(score.astype(np.float64) + 0.0) + 0.0
    cost[:sink] = -np.inf
    cost[count - recent :] = -np.inf
    forced = np.zeros(count, bool)
    forced[:sink] = True
    forced[count - recent :] = True
    order = np.lexsort((np.arange(count), cost, ~forced))
    return np.sort(order[:budget])


def hamming_topk(
    q_codes: np.ndarray,
    k_codes: np.ndarray,
    k: int,
    *,
    lengths: Any = None,
    starts: Any = None,
    ratio: float | None = None,
    k_min: int = 0,
    sink: int = 0,
    recent: int = 0,
    key_norms: np.ndarray | None = None,
    per_head: bool = False,
) -> np.ndarray:
    """`hata.hamming_topk`, by sorting."""
    batch, heads, tokens, _ = q_codes.shape
    kv_heads, slots = k_codes.shape[1:3]
    group = heads // kv_heads
    members = 1 if per_head else group
    indices = np.full((batch, heads // members, tokens, k), -1, np.int32)
    spans = visible(batch, tokens, slots, lengths, starts)
    for b, selection, t in np.ndindex(indices.shape[:3]):
        low, high = spans[b, t]
        kv_head = selection * members // group
        queries = q_codes[b, selection * members : (selection + 1) * members, t]
        norms = None if key_norms is None else key_norms[b, kv_head, low:high]
        take = budget_of(int(high - low), k, ratio, k_min, sink + recent)
        chosen = select(queries, k_codes[b, kv_head, low:high], norms, take, sink, recent)
        indices[b, selection, t, : len(chosen)] = low + chosen
    return indices


def attend_row(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    softcap: float | None,
    sink_logit: float | None,
) -> tuple[np.ndarray, float]:
    """Attention of one query to all of `keys`; zeros and -inf if there are none."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1]), -np.inf
    with np.errstate(all="ignore"):
        logits = scale * (keys.astype(np.float64) @ q.astype(np.float64))
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        joined = logits if sink_logit is None else np.append(logits, np.float64(sink_logit))
        most = joined.max()
        total = np.exp(joined - most).sum()
        out = np.exp(logits - most) @ values.astype(np.float64) / total
        lse = most + np.log(total) if most > -np.inf else most
    return out, lse


def sparse_attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: np.ndarray | None = None,
    return_lse: bool = False,
) -> Any:
    """`hata.sparse_attend`, in float64."""
    batch, heads, tokens, depth = q.shape
    kv_heads, slots = keys.shape[1:3]
    factor = depth**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, tokens, values.shape[-1]))
    lse = np.zeros((batch, heads, tokens))
    for b, h, t in np.ndindex(lse.shape):
        kv_head = h * kv_heads // heads
        chosen = indices[b, h * indices.shape[1] // heads, t]
        chosen = chosen[(chosen >= 0) & (chosen < slots)]
        out[b, h, t], lse[b, h, t] = attend_row(
            q[b, h, t],
            keys[b, kv_head, chosen],
            values[b, kv_head, chosen],
            factor,
            softcap,
            None if sink_logits is None else float(sink_logits[h]),
        )
    return (out, lse) if return_lse else out


def hash_attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    key_codes: np.ndarray,
    projection: np.ndarray,
    k: int,
    *,
    bias: np.ndarray | None = None,
    query_projection: np.ndarray | None = None,
    query_bias: np.ndarray | None = None,
    q_codes: np.ndarray | None = None,
    fresh: int = 0,
    dense_below: int = 0,
    lengths: Any = None,
    starts: Any = None,
    ratio: float | None = None,
    k_min: int = 0,
    sink: int = 0,
    recent: int = 0,
    key_norms: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: np.ndarray | None = None,
    return_lse: bool = False,
) -> Any:
    """`hata.hash_attend`: the composition; writes the codes and norms of fresh keys in place."""
    batch, _, tokens, _ = q.shape
    slots = keys.shape[2]
    spans = visible(batch, tokens, slots, lengths, starts)
    for b in range(batch):
        low, high = spans[b, -1]
        new = slice(max(low, high - fresh), high)
        key_codes[b : b + 1, :, new] = encode(keys[b : b + 1, :, new], projection, bias)
        if key_norms is not None:
            key_norms[b : b + 1, :, new] = norms_of(keys[b : b + 1, :, new])
    if q_codes is None:
        query_projection = projection if query_projection is None else query_projection
        q_codes = encode(q, query_projection, bias if query_bias is None else query_bias)
    indices = hamming_topk(
        q_codes, key_codes, k, lengths=lengths, starts=starts, ratio=ratio, k_min=k_min, sink=sink,
        recent=recent, key_norms=key_norms,
    )  # fmt: skip
    indices = np.pad(indices, ((0, 0), (0, 0), (0, 0), (0, max(dense_below - k, 0))))
    indices[..., k:] = -1
    for b, t in np.ndindex(batch, tokens):
        low, high = spans[b, t]
        if high - low <= dense_below:
            indices[b, :, t] = -1
            indices[b, :, t, : high - low] = np.arange(low, high)
    return sparse_attend(
        q, keys, values, indices, scale=scale, softcap=softcap, sink_logits=sink_logits,
        return_lse=return_lse,
    )  # fmt: skip
