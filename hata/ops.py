"""The ops: the public contract of HATA.

Hash-aware top-k attention in three steps and as one call: hash queries and keys to a few bits,
find the keys whose hashes differ least, attend to those keys alone (HATA, arXiv 2506.02572).

Symbols used in every shape:

- `B`, `T`: batch rows; query tokens per row (1 in plain decode)
- `H`, `Hkv`, `G`: query heads, KV heads, `G = H / Hkv`
- `S`: slots in the key cache; row b holds `lengths[b] <= S` valid keys
- `D`, `Dv`: head size of q and keys; head size of values. Multiples of 16 up to 576
- `r`: bits of a code, a multiple of 32
- `k`: key budget: how many keys one KV head may attend to in one step

Arrays may be of torch, NumPy (bfloat16 as `ml_dtypes.bfloat16`), CuPy or JAX, one kind per call;
the same kind is returned (the plain class, where a subclass came in). Data is bfloat16, float16 or
float32 and accumulates in float32; float32 products are IEEE products, never TF32. Any strides will
do as long as the last dimension is dense; nothing is copied. Fast layout: the keys of a head
contiguous over S, rows 16-byte aligned. Tensors on torch's `meta` device are checked like others,
and give tensors there.

What a call writes into (`out`, `norms`, codes and norms of fresh keys) may share memory with no
other argument. Where one is dense, or both begin alike, that is a `HataShapeError`; of arrays that
lie between one another's rows it is not known. Under `torch.compile`, where code may work on
copies, it is not known at all; and torch refuses to compile a call that writes into part of a
buffer whose other parts are arguments of another dtype.

Visible keys: query t of row b sees the positions `[starts[b], lengths[b] - (T - 1 - t))`, so the
last query sees all keys of its row; n_t is their number. `lengths` and `starts` are int32 or int64,
`[B]` or 0-d, on the device of the data, and are never read by the host. A length over S, one of
either beyond int32 (kernels read the low half of an int64) or an index >= S breaks a precondition;
`HATA_CHECK=1` in the environment makes it a `HataShapeError`.

Errors common to all ops: `HataShapeError` (shape, stride, size), `HataDTypeError` (dtype, Python
type, mixed frameworks), `HataDeviceError` (arrays on several devices, or where the backend cannot
run), `HataAutogradError` (a gradient is required; there is no backward), `BackendUnavailable`.
"""

from __future__ import annotations

from typing import Any

from hata import dispatch
from hata.call import Encode, HammingTopK, HashAttend, SparseAttend
from hata.problem import OPS


def _run(kind: Any, fields: tuple) -> Any:
    """Run a call, as a custom op where torch has to see it."""
    if dispatch.is_traced(fields[0]):
        from hata import torch_ops

        return torch_ops.run(kind(*fields))
    return dispatch.run(kind, fields)


def encode(x: Any, projection: Any, bias: Any = None, *, out: Any = None, norms: Any = None) -> Any:
    """Hash vectors: the packed signs of their projections.

    Bit j of a vector's code is 1 iff `(x . projection + bias)_j > 0`; 0, -0 and NaN give 0. Bit j
    sits in byte `j // 8` at weight `2**(j % 8)`: `numpy.packbits(..., bitorder="little")`. Backends
    may differ only where `|value| <= D * 2**-23 * sum|x_i p_i|`. Within one backend a vector's code
    depends on that vector alone.

    Args:
        x: `[B, H', T, D]` vectors, H' a multiple of Hkv.
        projection: `[Hkv, D, r]`, in x's dtype or float32; head h uses projection
            `h // (H' / Hkv)`.
        bias: `[Hkv, r]`, in x's dtype or float32.
        out: `[B, H', T, r/8]` uint8 to write into; else it is allocated.
        norms: `[B, H', T]` float16, filled with the L2 norms: float32 sum, nearest float16,
            saturating at 65504, NaN as 0.

    Returns:
        codes: `[B, H', T, r/8]` uint8.

    Raises:
        HataShapeError, HataDTypeError, HataDeviceError, HataAutogradError, BackendUnavailable: see
            the module.

    Source: arXiv 2506.02572, section 3 (HashEncode).

    >>> x = numpy.float32([1, -1] * 8).reshape(1, 1, 1, 16)
    >>> identity = numpy.eye(16, 32, dtype=numpy.float32)[None]
    >>> encode(x, identity)[0, 0, 0]
    array([85, 85,  0,  0], dtype=uint8)
    """
    return _run(Encode, (x, projection, bias, out, norms))


def hamming_topk(
    q_codes: Any,
    k_codes: Any,
    k: int,
    *,
    lengths: Any = None,
    starts: Any = None,
    ratio: float | None = None,
    k_min: int = 0,
    sink: int = 0,
    recent: int = 0,
    key_norms: Any = None,
    per_head: bool = False,
) -> Any:
    """Find the keys whose codes differ least from the query codes of their group.

    The distance of key s for a KV head is the sum, over the query codes of its group, of
    `popcount(q ^ k_s)`. The smallest wins, the lowest position among equals. With `key_norms` the
    score `(Gc * r - 2 * distance) * norm` (one rounded float32 product, Gc codes in the group)
    decides: the largest wins, -0 equals +0, NaN counts as 0, same rule for ties. The first `sink`
    and the last `recent` visible keys always win and count within the budget. A query that sees no
    more keys than its budget gets all of them. The same call gives the same indices on every
    backend and in every run, bit for bit.

    Args:
        q_codes: `[B, Hq, T, r/8]` uint8, Hq any multiple of Hkv.
        k_codes: `[B, Hkv, S, r/8]` uint8.
        k: Key budget, in keys.
        lengths: `[B]` or 0-d int, valid keys per row; `None`: S.
        starts: `[B]` or 0-d int, first visible key per row (left padding); `None`: 0.
        ratio: The budget of a query becomes `min(k, max(1, k_min, sink + recent,
            (n_t * R) >> 32))` with `R = round(ratio * 2**32)`.
        k_min: Fewest keys where a ratio is given.
        sink: First visible keys that always win.
        recent: Last visible keys that always win.
        key_norms: `[B, Hkv, S]` float16, as `encode(norms=)` fills them.
        per_head: Score and select for each query-code head by itself.

    Returns:
        indices: `[B, Hkv, T, k]` int32 positions on the S axis, ascending, padded with -1
            (`per_head`: `[B, Hq, T, k]`).

    Raises:
        HataShapeError: also for k < 1, `sink + recent > k`, ratio outside (0, 1].
        HataDTypeError, HataDeviceError, BackendUnavailable: see the module.

    Source: arXiv 2506.02572, Algorithm 3; the key-norm score is that of its released evaluation.

    >>> q = numpy.zeros((1, 1, 1, 4), numpy.uint8)
    >>> keys = numpy.uint8([7, 1, 0, 1]).reshape(1, 1, 4, 1).repeat(4, axis=3)
    >>> hamming_topk(q, keys, 2)[0, 0, 0]
    array([1, 2], dtype=int32)
    """
    fields = (
        q_codes, k_codes, lengths, starts, key_norms, k, ratio, k_min, sink, recent, per_head,
    )  # fmt: skip
    return _run(HammingTopK, fields)


def sparse_attend(
    q: Any,
    keys: Any,
    values: Any,
    indices: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attend to selected keys alone.

    `logit = scale * q . k`, then `softcap * tanh(logit / softcap)` where a soft cap is given;
    softmax over the selected keys, and over `sink_logits`, which join the denominator unscaled and
    uncapped. A query without keys gives zeros and an lse of -inf. Negative indices are skipped
    wherever they stand; a slot that is not selected never reaches the result, not even a NaN in it.

    Args:
        q: `[B, H, T, D]`.
        keys: `[B, Hkv, S, D]`, in q's dtype.
        values: `[B, Hkv, S, Dv]`, in q's dtype.
        indices: `[B, Hkv, T, k]` int32, or `[B, H, T, k]` for one selection per query head.
        scale: Factor of the logits, finite in float32; `None`: `D**-0.5`.
        softcap: Soft cap of the logits, a positive normal float32, or `None`.
        sink_logits: `[H]`, in q's dtype or float32.
        return_lse: Also return the natural log of the softmax denominator.

    Returns:
        out: `[B, H, T, Dv]` in q's dtype; with `return_lse` the pair `(out, lse)`, lse
            `[B, H, T]` float32.

    Raises:
        HataShapeError, HataDTypeError, HataDeviceError, HataAutogradError, BackendUnavailable: see
            the module.

    Source: arXiv 2506.02572, section 3 (sparse attention over gathered keys).

    >>> q, kv = numpy.zeros((1, 1, 1, 16), numpy.float32), numpy.ones((1, 1, 3, 16), numpy.float32)
    >>> sparse_attend(q, kv, kv, numpy.int32([[[[0, 2, -1]]]])).sum()
    np.float32(16.0)
    """
    fields = q, keys, values, indices, sink_logits, scale, softcap, return_lse
    out, lse = _run(SparseAttend, fields)
    return (out, lse) if return_lse else out


def hash_attend(
    q: Any,
    keys: Any,
    values: Any,
    key_codes: Any,
    projection: Any,
    k: int,
    *,
    bias: Any = None,
    query_projection: Any = None,
    query_bias: Any = None,
    q_codes: Any = None,
    fresh: int = 0,
    dense_below: int = 0,
    lengths: Any = None,
    starts: Any = None,
    ratio: float | None = None,
    k_min: int = 0,
    sink: int = 0,
    recent: int = 0,
    key_norms: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    return_lse: bool = False,
) -> Any:
    """One decode step of hash attention: `encode`, `hamming_topk` and `sparse_attend` in one call.

    Equals the three ops in sequence, in as few launches as the backend can.

    Args:
        q: `[B, H, T, D]`.
        keys: `[B, Hkv, S, D]`, in q's dtype.
        values: `[B, Hkv, S, Dv]`, in q's dtype.
        key_codes: `[B, Hkv, S, r/8]` uint8.
        projection: `[Hkv, D, r]`, in q's dtype or float32, for keys (and for queries, unless
            `query_projection` is given). `None` where nothing is encoded: with `q_codes`, without
            `fresh`, `bias`, `query_projection` and `query_bias`.
        k: Key budget, in keys.
        bias: `[Hkv, r]`, in q's dtype or float32.
        query_projection: `[Hkv, D, r]` for queries; `None`: `projection`.
        query_bias: `[Hkv, r]` for queries; `None`: `bias`.
        q_codes: `[B, Hq, T, r/8]` uint8, scored instead of encoding q; Hq any multiple of Hkv.
        fresh: The last `fresh` visible keys of each row, already in `keys`, have no code yet: they
            are encoded and their codes (and norms) written into `key_codes` (and `key_norms`) in
            place. Nothing else is written.
        dense_below: A query that sees at most this many keys attends to all of them (codes are
            still written), so that one captured graph can hold both regimes.
        lengths: `[B]` or 0-d int, valid keys per row; `None`: S.
        starts: `[B]` or 0-d int, first visible key per row; `None`: 0.
        ratio: As in `hamming_topk`.
        k_min: As in `hamming_topk`.
        sink: As in `hamming_topk`.
        recent: As in `hamming_topk`.
        key_norms: `[B, Hkv, S]` float16; the score becomes that of `hamming_topk` with norms.
        scale: As in `sparse_attend`.
        softcap: As in `sparse_attend`.
        sink_logits: `[H]`, as in `sparse_attend`.
        return_lse: Also return the lse.

    Returns:
        out: `[B, H, T, Dv]` in q's dtype; with `return_lse` the pair `(out, lse)`, lse
            `[B, H, T]` float32.

    Raises:
        HataDTypeError: also where `fresh` asks to write into a read-only or JAX array, and where
            `projection` is `None` although something is to be encoded.
        HataShapeError: also where it asks to write into overlapping elements.
        HataDeviceError, HataAutogradError, BackendUnavailable: see the module.

    Source: arXiv 2506.02572, Algorithm 3.

    >>> one = numpy.ones((1, 1, 3, 16), numpy.float32)
    >>> projection = numpy.eye(16, 32, dtype=numpy.float32)[None]
    >>> codes = numpy.zeros((1, 1, 3, 4), numpy.uint8)
    >>> hash_attend(one[:, :, :1], one, one, codes, projection, 2, fresh=3).sum()
    np.float32(16.0)
    """
    fields = (
        q, keys, values, key_codes, projection, bias, query_projection, query_bias, q_codes,
        lengths, starts, key_norms, sink_logits, k, dense_below, ratio, k_min, sink, recent, scale,
        softcap, fresh, return_lse,
    )  # fmt: skip
    out, lse = _run(HashAttend, fields)
    return (out, lse) if return_lse else out


def prepare(op: str, *args: Any, **kwargs: Any) -> None:
    """Compile and load what a call needs, so that the call itself can be captured or timed.

    Nothing is written into the arguments.

    Args:
        op: `"encode"`, `"hamming_topk"`, `"sparse_attend"` or `"hash_attend"`.
        *args: The arguments of the op.
        **kwargs: The keyword arguments of the op.

    Raises:
        ValueError: `op` is no op. Else what the op itself raises for these arguments.

    >>> x, projection = numpy.ones((1, 1, 1, 16), numpy.float32), numpy.ones((1, 16, 32), "float32")
    >>> prepare("encode", x, projection)
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(map(repr, OPS))}")
    # Nothing is computed, so no dispatch mode needs to see it.
    with dispatch.preparing(), dispatch.within_custom_op():
        globals()[op](*args, **kwargs)
