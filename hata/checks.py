"""The checks of every call, made once per signature.

Each function takes an op's arguments, raises what `hata.ops` documents, and returns
`(framework, problem, device)`. What a check depends on (shapes, strides, dtypes, devices,
alignment, flags) is its signature; a signature that passed is remembered, so a repeated call costs
one dictionary look-up, and a comparison of addresses where the call writes into its arguments.
Values on a device are never read, except under `HATA_CHECK=1`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from hata.arguments import (
    Arrays,
    bits_of,
    code_width,
    equal,
    extent,
    head_dim,
    multiple,
)
from hata.arrays import Framework, framework
from hata.backend import Budget
from hata.errors import HataDTypeError, HataError, HataShapeError
from hata.problem import Problem, pow2

Checked = tuple[Framework, Problem, str]

DATA = ("float32", "float16", "bfloat16")
_LENGTHS = ("int32", "int64")
# What HATA_CHECK may say.
_SWITCH = {"1": True, "true": True, "yes": True, "on": True}
_SWITCH |= {"0": False, "false": False, "no": False, "off": False}
# A growing cache makes a new signature at every step; the memo is emptied when it is full.
_MEMO_LIMIT = 4096
_memo: dict[tuple, tuple[Checked, tuple[_Span, ...]]] = {}


class _Span(NamedTuple):
    """What an array takes up in memory, but for where it begins."""

    argument: int
    size: int
    dense: bool
    written: bool


def _memoised(
    named: tuple, scalars: tuple, check: Callable[[], Checked], written: tuple[str, ...] = ()
) -> Checked:
    fw = framework(*named[0])
    try:
        key = (
            fw.name,
            *scalars,
            *[None if x is None else fw.signature(x) for _, x in named],
        )
        entry = _memo.get(key)
    except (AttributeError, TypeError, RuntimeError, KeyError):
        # Arrays of another kind, or none at all: the full check says what is wrong.
        check()
        raise
    if entry is None:
        found = check()
        # Tensors on meta have no memory.
        entry = found, () if found[2] == "meta" else _spans(fw, named, written)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = entry
    found, spans = entry
    if spans:
        _apart(fw, spans, named)
    return found


def _spans(fw: Framework, named: tuple, written: tuple[str, ...]) -> tuple[_Span, ...]:
    """Spans of all arrays, those first that are written; none where none is."""
    spans = [
        _Span(i, *extent(fw, x), name in written)
        for i, (name, x) in enumerate(named)
        if x is not None and 0 not in fw.shape(x)
    ]
    spans.sort(key=lambda span: not span.written)
    return tuple(spans) if spans and spans[0].written else ()


def _apart(fw: Framework, spans: tuple[_Span, ...], named: tuple) -> None:
    """Raise where an array that is written surely shares memory with another one.

    Arrays that are interleaved, such as the keys and codes of one buffer, lie within one another's
    bounds too; only a dense one, or a common first element, shows that memory is shared.
    """
    starts = [fw.pointer(named[span.argument][1]) for span in spans]
    for i, span in enumerate(spans):
        if not span.written:
            return
        start = starts[i]
        end = start + span.size
        for j in range(i + 1, len(spans)):
            other = spans[j]
            begin = starts[j]
            stop = begin + other.size
            if (
                begin < end
                and start < stop
                and (
                    begin == start
                    or (span.dense and (start < begin or stop <= end))
                    or (other.dense and (begin < start or end <= stop))
                )
            ):
                name, shared = named[span.argument][0], named[other.argument][0]
                raise HataShapeError(
                    f"{name}: got memory that {shared} lies in too, expected memory of its own, "
                    "since the call writes there; pass a copy"
                )


def _lengths(arrays: Arrays, batch: int, lengths: Any, starts: Any) -> None:
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is None:
            continue
        if isinstance(x, (int, float)):
            raise HataDTypeError(
                f"{name}: got a Python number, expected an int32 or int64 array, [B] or 0-d, on "
                "the device of the other arguments"
            )
        shape = arrays.take(name, x, _LENGTHS, (0, 1))
        if shape not in ((), (batch,)):
            raise HataShapeError(
                f"{name}: got shape {list(shape)}, expected [{batch}] (one per batch row) or a "
                "0-d array"
            )


def encode(x: Any, projection: Any, bias: Any, out: Any, norms: Any) -> Checked:
    """Check the arguments of `hata.encode`."""
    named = (
        ("x", x),
        ("projection", projection),
        ("bias", bias),
        ("out", out),
        ("norms", norms),
    )

    def check() -> Checked:
        arrays = Arrays("x", x)
        b, h, t, d = arrays.take("x", x, DATA, 4)
        kv_heads, bits = _projection(arrays, "projection", projection, "bias", bias, "x", x, d)
        multiple("x", h, kv_heads)
        head_dim("x", d)
        for name, y, dtype, shape in (
            ("out", out, "uint8", (b, h, t, bits // 8)),
            ("norms", norms, "float16", (b, h, t)),
        ):
            if y is None:
                continue
            equal(name, arrays.take(name, y, (dtype,), len(shape)), shape, "x and projection")
            arrays.writable(name, y)
        fw = arrays.fw
        problem = Problem(
            op="encode",
            device=arrays.device.partition(":")[0],
            dtype=fw.dtype(x),
            projection_dtype=fw.dtype(projection),
            batch=pow2(b),
            heads=h,
            kv_heads=kv_heads,
            head_dim=d,
            bits=bits,
            tokens=pow2(t),
            norms=norms is not None,
            aligned=arrays.aligned(x),
            wide=arrays.wide,
        )
        return fw, problem, arrays.device

    return _memoised(named, ("encode",), check, ("out", "norms"))


def _projection(
    arrays: Arrays,
    name: str,
    projection: Any,
    bias_name: str,
    bias: Any,
    like_name: str,
    like: Any,
    head_dim: int,
) -> tuple[int, int]:
    dtype = arrays.fw.dtype(like)
    allowed = tuple(dict.fromkeys((dtype, "float32")))
    kv_heads, d, bits = arrays.take(name, projection, allowed, 3)
    if d != head_dim:
        raise HataShapeError(
            f"{name}: got shape {[kv_heads, d, bits]} ([Hkv, D, r]), but {like_name} has head "
            f"size D = {head_dim}"
        )
    bits_of(name, bits)
    if bias is not None:
        equal(bias_name, arrays.take(bias_name, bias, allowed, 2), (kv_heads, bits), name)
    return kv_heads, bits


def hamming_topk(
    q_codes: Any,
    k_codes: Any,
    budget: Budget,
    lengths: Any,
    starts: Any,
    key_norms: Any,
    per_head: bool,
) -> Checked:
    """Check the arguments of `hata.hamming_topk`."""
    named = (
        ("q_codes", q_codes),
        ("k_codes", k_codes),
        ("lengths", lengths),
        ("starts", starts),
        ("key_norms", key_norms),
    )

    def check() -> Checked:
        arrays = Arrays("q_codes", q_codes)
        q_shape = arrays.take("q_codes", q_codes, ("uint8",), 4)
        k_shape = arrays.take("k_codes", k_codes, ("uint8",), 4)
        b, h, t, width = q_shape
        bits = width * 8
        bits_of("q_codes", bits)
        code_width("k_codes", k_shape, bits, "q_codes")
        kv_heads, s = k_shape[1], k_shape[2]
        _batch("k_codes", k_shape[0], b, "q_codes")
        multiple("q_codes", h, kv_heads)
        _slots("k_codes", s)
        _norms(arrays, key_norms, (b, kv_heads, s))
        _lengths(arrays, b, lengths, starts)
        problem = Problem(
            op="hamming_topk",
            device=arrays.device.partition(":")[0],
            dtype="uint8",
            batch=pow2(b),
            heads=h,
            kv_heads=kv_heads,
            bits=bits,
            k=budget.k,
            tokens=t,
            slots=pow2(s),
            norms=key_norms is not None,
            per_head=per_head,
            aligned=arrays.aligned(k_codes),
            wide=arrays.wide,
        )
        return arrays.fw, problem, arrays.device

    return _memoised(named, ("hamming_topk", budget.k, per_head), check)


def _batch(name: str, got: int, expected: int, like: str) -> None:
    if got != expected:
        raise HataShapeError(f"{name}: got batch {got}, but {like} has batch {expected}")


def _slots(name: str, slots: int) -> None:
    if slots >= 2**31:
        raise HataShapeError(f"{name}: got {slots} slots, expected less than 2**31")


def _norms(arrays: Arrays, key_norms: Any, shape: tuple[int, int, int]) -> None:
    if key_norms is not None:
        got = arrays.take("key_norms", key_norms, ("float16",), 3)
        equal("key_norms", got, shape, "[B, Hkv, S] of the key codes")


def _attention(
    arrays: Arrays, q: Any, keys: Any, values: Any, sink_logits: Any
) -> tuple[int, int, int, int, int, int, int]:
    b, h, t, d = arrays.take("q", q, DATA, 4)
    same = (arrays.fw.dtype(q),)
    k_shape = arrays.take("keys", keys, same, 4)
    v_shape = arrays.take("values", values, same, 4)
    _, kv_heads, s, _ = k_shape
    equal("keys", k_shape, (b, kv_heads, s, d), "batch and head size of q")
    equal("values", v_shape, (b, kv_heads, s, v_shape[3]), "batch, KV heads and slots of keys")
    multiple("q", h, kv_heads)
    head_dim("q", d)
    head_dim("values", v_shape[3])
    _slots("keys", s)
    if sink_logits is not None:
        allowed = tuple(dict.fromkeys((*same, "float32")))
        equal(
            "sink_logits", arrays.take("sink_logits", sink_logits, allowed, 1), (h,), "heads of q"
        )
    return b, h, kv_heads, t, s, d, v_shape[3]


def sparse_attend(q: Any, keys: Any, values: Any, indices: Any, sink_logits: Any) -> Checked:
    """Check the arguments of `hata.sparse_attend`."""
    named = (
        ("q", q),
        ("keys", keys),
        ("values", values),
        ("indices", indices),
        ("sink_logits", sink_logits),
    )

    def check() -> Checked:
        arrays = Arrays("q", q)
        b, h, kv_heads, t, s, d, dv = _attention(arrays, q, keys, values, sink_logits)
        shape = arrays.take("indices", indices, ("int32",), 4)
        if shape[:3] not in ((b, kv_heads, t), (b, h, t)):
            raise HataShapeError(
                f"indices: got shape {list(shape)}, expected [{b}, {kv_heads}, {t}, k] (one "
                f"selection per KV head) or [{b}, {h}, {t}, k] (one per query head)"
            )
        problem = Problem(
            op="sparse_attend",
            device=arrays.device.partition(":")[0],
            dtype=arrays.fw.dtype(q),
            batch=pow2(b),
            heads=h,
            kv_heads=kv_heads,
            head_dim=d,
            value_dim=dv,
            k=shape[3],
            tokens=t,
            slots=pow2(s),
            per_head=shape[1] != kv_heads,
            aligned=arrays.aligned(keys) and arrays.aligned(values),
            wide=arrays.wide,
        )
        return arrays.fw, problem, arrays.device

    return _memoised(named, ("sparse_attend",), check)


def hash_attend(
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
    lengths: Any,
    starts: Any,
    budget: Budget,
    key_norms: Any,
    sink_logits: Any,
) -> Checked:
    """Check the arguments of `hata.hash_attend`."""
    named = (
        ("q", q),
        ("keys", keys),
        ("values", values),
        ("key_codes", key_codes),
        ("projection", projection),
        ("bias", bias),
        ("query_projection", query_projection),
        ("query_bias", query_bias),
        ("q_codes", q_codes),
        ("lengths", lengths),
        ("starts", starts),
        ("key_norms", key_norms),
        ("sink_logits", sink_logits),
    )

    def check() -> Checked:
        arrays = Arrays("q", q)
        b, h, kv_heads, t, s, d, dv = _attention(arrays, q, keys, values, sink_logits)
        source = "projection"
        if projection is None:
            _nothing_encoded(q_codes, fresh, bias, query_projection, query_bias)
            source = "q_codes"
            bits = arrays.take("q_codes", q_codes, ("uint8",), 4)[3] * 8
            bits_of("q_codes", bits)
        else:
            heads, bits = _projection(arrays, "projection", projection, "bias", bias, "q", q, d)
            _heads("projection", heads, kv_heads)
        if query_projection is not None:
            heads, query_bits = _projection(
                arrays, "query_projection", query_projection, "query_bias", query_bias, "q", q, d
            )
            _heads("query_projection", heads, kv_heads)
            if query_bits != bits:
                raise HataShapeError(
                    f"query_projection: got {query_bits} bits, but projection has {bits}"
                )
        elif query_bias is not None:
            allowed = tuple(dict.fromkeys((arrays.fw.dtype(q), "float32")))
            got = arrays.take("query_bias", query_bias, allowed, 2)
            equal("query_bias", got, (kv_heads, bits), "projection")
        code_shape = arrays.take("key_codes", key_codes, ("uint8",), 4)
        code_width("key_codes", code_shape, bits, source)
        equal("key_codes", code_shape, (b, kv_heads, s, bits // 8), f"keys and {source}")
        _norms(arrays, key_norms, (b, kv_heads, s))
        if q_codes is not None:
            got = arrays.take("q_codes", q_codes, ("uint8",), 4)
            code_width("q_codes", got, bits, "projection")
            multiple("q_codes", got[1], kv_heads)
            equal("q_codes", got, (b, got[1], t, bits // 8), "batch and tokens of q")
        if fresh:
            arrays.writable("key_codes", key_codes)
            if key_norms is not None:
                arrays.writable("key_norms", key_norms)
        _lengths(arrays, b, lengths, starts)
        problem = Problem(
            op="hash_attend",
            device=arrays.device.partition(":")[0],
            dtype=arrays.fw.dtype(q),
            projection_dtype=arrays.fw.dtype(q if projection is None else projection),
            batch=pow2(b),
            heads=h,
            kv_heads=kv_heads,
            head_dim=d,
            value_dim=dv,
            bits=bits,
            k=budget.k,
            tokens=t,
            slots=pow2(s),
            norms=key_norms is not None,
            aligned=all(map(arrays.aligned, (keys, values, key_codes))),
            wide=arrays.wide,
        )
        return arrays.fw, problem, arrays.device

    written = ("key_codes", "key_norms") if fresh else ()
    return _memoised(named, ("hash_attend", budget.k, bool(fresh)), check, written)


def _nothing_encoded(
    q_codes: Any, fresh: int, bias: Any, query_projection: Any, query_bias: Any
) -> None:
    """Check that a call without a projection needs none."""
    need = None
    if fresh:
        need = f"{fresh} fresh keys are to be encoded; pass one, or fresh=0"
    elif q_codes is None:
        need = "q is to be encoded; pass one, or q_codes"
    if need is not None:
        raise HataDTypeError(f"projection: got None, expected an array [Hkv, D, r], since {need}")
    for name, x in (
        ("bias", bias),
        ("query_projection", query_projection),
        ("query_bias", query_bias),
    ):
        if x is not None:
            raise HataDTypeError(
                f"{name}: got an array, expected None, since nothing is encoded where projection "
                f"is None; leave {name} out, or pass a projection"
            )


def _heads(name: str, heads: int, kv_heads: int) -> None:
    if heads != kv_heads:
        raise HataShapeError(f"{name}: got {heads} KV heads, but keys have {kv_heads}")


def reads_values() -> bool:
    """Whether `HATA_CHECK` asks to read values.

    Raises:
        HataError: it says neither yes nor no.
    """
    word = os.environ.get("HATA_CHECK")
    if not word:
        return False
    found = _SWITCH.get(word.strip().lower())
    if found is None:
        raise HataError(
            f"HATA_CHECK: got {word!r}, expected one of {', '.join(_SWITCH)}; correct or unset it"
        )
    return found


def values(device: str, slots: int, lengths: Any, starts: Any, indices: Any = None) -> None:
    """Under `HATA_CHECK=1`: read lengths, starts and indices back and check them.

    On `meta` there is nothing to read.

    Raises:
        HataShapeError: a length or start outside [0, S], an index >= S; the message names the row.
        HataError: `HATA_CHECK` says neither yes nor no.
    """
    if not reads_values() or device == "meta":
        return
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is None:
            continue
        entries = x.tolist()
        for row, value in enumerate(entries if isinstance(entries, list) else [entries]):
            if not 0 <= value <= slots:
                raise HataShapeError(f"{name}: got {value} in row {row}, expected 0 to S = {slots}")
    if indices is not None and 0 not in indices.shape:
        rows = indices.reshape(indices.shape[0], -1)
        for row in range(rows.shape[0]):
            largest = int(rows[row].max())
            if largest >= slots:
                raise HataShapeError(
                    f"indices: got {largest} in row {row}, expected less than S = {slots}"
                )
