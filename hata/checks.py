"""The checks of every call: what `hata.ops` documents is raised here.

`check` looks at a call as the caller wrote it and says what it poses: a `Route`, with the
framework, the problem, and the numbers completed. `hata.dispatch` remembers it for calls that look
alike. Only what may differ between those is looked at in every call: whether an array that is
written lies apart from all others (`apart`), and under `HATA_CHECK=1` values on the device
(`values`), which are never read otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from hata import arguments
from hata.arguments import Arrays
from hata.call import Budget, Route
from hata.errors import HataDTypeError, HataError, HataShapeError
from hata.problem import OPS, Problem, pow2

DATA = ("float32", "float16", "bfloat16")
_LENGTHS = ("int32", "int64")
# Arrays that kernels read row by row.
_IN_ROWS = frozenset(("x", "keys", "values", "k_codes", "key_codes"))
# What HATA_CHECK may say.
_SWITCH = {"1": True, "true": True, "yes": True, "on": True}
_SWITCH |= {"0": False, "false": False, "no": False, "off": False}
# Every call asks for it, and a look-up in `os.environ` itself costs more than all other checks:
# below it is a plain dictionary of encoded names.
_environment: Any = getattr(os.environ, "_data", os.environ)
_CHECK: Any = "HATA_CHECK" if _environment is os.environ else os.environ.encodekey("HATA_CHECK")
# Of calls without a budget.
_NONE = Budget(0)


def check(call: Any) -> Route:
    """Check a call as the caller wrote it.

    Raises:
        HataShapeError, HataDTypeError, HataDeviceError, HataAutogradError: see `hata.ops`.
    """
    arrays = Arrays(call)
    options, budget, fields = _CHECKS[call.OP](arrays, call)
    given = frozenset(name for name, x in call.arrays().items() if x is not None)
    # Whatever the op, the first array says for how many rows, heads and tokens it is.
    batch, heads, tokens, _ = arrays.fw.shape(call[0])
    problem = Problem(
        op=call.OP,
        device=arrays.device.partition(":")[0],
        dtype=arrays.dtype(call._fields[0]),
        batch=pow2(batch),
        heads=heads,
        tokens=pow2(tokens) if call.OP == "encode" else tokens,
        norms=not given.isdisjoint(("norms", "key_norms")),
        aligned=arrays.aligned(*_IN_ROWS.intersection(given)),
        wide=arrays.wide,
        **fields,
    )
    route = Route(arrays.fw, problem, arrays.device, options, budget, given)
    # Tensors on meta have no memory.
    if arrays.device != "meta":
        route.spans = _spans(arrays.fw, call)
    return route


# The numbers of a call, completed; its budget; and what the op says of the problem.
Found = tuple[tuple, Budget, dict[str, Any]]


def _encode(arrays: Arrays, call: Any) -> Found:
    b, h, t, d = arrays.take("x", DATA, 4)
    kv_heads, bits = _projection(arrays, "projection", "bias", "x", d)
    arguments.multiple("x", h, kv_heads)
    arguments.head_dim("x", d)
    why = "x and projection"
    arrays.expect("out", ("uint8",), (b, h, t, bits // 8), why)
    arrays.expect("norms", ("float16",), (b, h, t), why)
    dtype = arrays.dtype("projection")
    fields = {"projection_dtype": dtype, "kv_heads": kv_heads, "head_dim": d, "bits": bits}
    return (), _NONE, fields


def _hamming_topk(arrays: Arrays, call: Any) -> Found:
    per_head = arguments.flag("per_head", call.per_head)
    budget = arguments.budget(call)
    b, h, _, width = arrays.take("q_codes", ("uint8",), 4)
    k_shape = arrays.take("k_codes", ("uint8",), 4)
    bits = width * 8
    arguments.bits_of("q_codes", bits)
    arguments.code_width("k_codes", k_shape, bits, "q_codes")
    _, kv_heads, s, _ = k_shape
    if k_shape[0] != b:
        raise HataShapeError(f"k_codes: got batch {k_shape[0]}, but q_codes has batch {b}")
    arguments.multiple("q_codes", h, kv_heads)
    _slots("k_codes", s)
    _norms_and_lengths(arrays, b, kv_heads, s)
    fields = {"kv_heads": kv_heads, "bits": bits, "slots": pow2(s)}
    fields |= {"k": budget.k, "per_head": per_head}
    # The result has as many columns as k, whatever S is.
    budget = _clipped(budget, s, budget.k)
    return (*_of_budget(call, budget), per_head), budget, fields


def _sparse_attend(arrays: Arrays, call: Any) -> Found:
    fields = _attention(arrays)
    b, h, t, _ = arrays.fw.shape(call.q)
    kv_heads = fields["kv_heads"]
    shape = arrays.take("indices", ("int32",), 4)
    if shape[:3] not in ((b, kv_heads, t), (b, h, t)):
        raise HataShapeError(
            f"indices: got shape {list(shape)}, expected [{b}, {kv_heads}, {t}, k] (one "
            f"selection per KV head) or [{b}, {h}, {t}, k] (one per query head)"
        )
    fields |= {"k": shape[3], "per_head": shape[1] != kv_heads}
    return _of_logits(call, fields["head_dim"]), _NONE, fields


def _hash_attend(arrays: Arrays, call: Any) -> Found:
    fresh = arguments.count("fresh", call.fresh)
    dense_below = arguments.count("dense_below", call.dense_below)
    budget = arguments.budget(call)
    fields = _attention(arrays)
    b, _, t, d = arrays.fw.shape(call.q)
    s, kv_heads = arrays.fw.shape(call.keys)[2], fields["kv_heads"]
    if arrays.given("projection"):
        source = "projection"
        _, bits = _projection(arrays, "projection", "bias", "q", d, kv_heads)
    else:
        source = "q_codes"
        _nothing_encoded(call)
        bits = arrays.take("q_codes", ("uint8",), 4)[3] * 8
        arguments.bits_of("q_codes", bits)
    if arrays.given("query_projection"):
        named = "query_projection", "query_bias"
        _, query_bits = _projection(arrays, *named, "q", d, kv_heads)
        if query_bits != bits:
            raise HataShapeError(
                f"query_projection: got {query_bits} bits, but projection has {bits}"
            )
    else:
        arrays.expect("query_bias", _like(arrays, "q"), (kv_heads, bits), "projection")
    code_shape = arrays.take("key_codes", ("uint8",), 4)
    arguments.code_width("key_codes", code_shape, bits, source)
    codes = b, kv_heads, s, bits // 8
    arrays.expect("key_codes", ("uint8",), codes, f"keys and {source}")
    if arrays.given("q_codes"):
        got = arrays.take("q_codes", ("uint8",), 4)
        arguments.code_width("q_codes", got, bits, "projection")
        arguments.multiple("q_codes", got[1], kv_heads)
        query_codes = b, got[1], t, bits // 8
        arrays.expect("q_codes", ("uint8",), query_codes, "batch and tokens of q")
    _norms_and_lengths(arrays, b, kv_heads, s)
    dtype = arrays.dtype("projection" if source == "projection" else "q")
    fields |= {"projection_dtype": dtype, "bits": bits, "k": budget.k}
    # A budget of more keys than there are slots is one of all of them.
    budget = _clipped(budget, s, max(min(budget.k, s), 1))
    scale, softcap, return_lse = _of_logits(call, d)
    _, *numbers = _of_budget(call, budget)
    options = budget.k, min(dense_below, s), *numbers, scale, softcap, min(fresh, s), return_lse
    return options, budget, fields


_CHECKS = dict(zip(OPS, (_encode, _hamming_topk, _sparse_attend, _hash_attend), strict=True))


def _clipped(budget: Budget, slots: int, k: int) -> Budget:
    """The same budget in numbers that are no larger than they need to be."""
    _, ratio, k_min, sink, recent = budget
    least = budget.least
    return Budget(k, ratio, min(max(k_min, least), k), min(sink, slots), min(recent, slots))


def _of_budget(call: Any, budget: Budget) -> tuple:
    """k, ratio, k_min, sink and recent."""
    return budget.k, call.ratio, *budget[2:]


def _of_logits(call: Any, head_dim: int) -> tuple:
    """Scale, softcap and return_lse."""
    scale = head_dim**-0.5 if call.scale is None else arguments.real("scale", call.scale)
    return scale, arguments.softcap(call.softcap), arguments.flag("return_lse", call.return_lse)


def _like(arrays: Arrays, name: str) -> tuple[str, ...]:
    """What weights may be in beside data: its dtype, or float32."""
    return tuple(dict.fromkeys((arrays.dtype(name), "float32")))


def _projection(
    arrays: Arrays, name: str, bias: str, like: str, head_dim: int, kv_heads: int | None = None
) -> tuple[int, int]:
    """Check a projection and its bias; its KV heads, which are `kv_heads` if given, and bits."""
    allowed = _like(arrays, like)
    heads, d, bits = arrays.take(name, allowed, 3)
    if d != head_dim:
        raise HataShapeError(
            f"{name}: got shape {[heads, d, bits]} ([Hkv, D, r]), but {like} has head size D = "
            f"{head_dim}"
        )
    arguments.bits_of(name, bits)
    arrays.expect(bias, allowed, (heads, bits), name)
    if kv_heads not in (None, heads):
        raise HataShapeError(f"{name}: got {heads} KV heads, but keys have {kv_heads}")
    return heads, bits


def _slots(name: str, slots: int) -> None:
    if slots >= 2**31:
        raise HataShapeError(f"{name}: got {slots} slots, expected less than 2**31")


def _norms_and_lengths(arrays: Arrays, batch: int, kv_heads: int, slots: int) -> None:
    shape = batch, kv_heads, slots
    arrays.expect("key_norms", ("float16",), shape, "[B, Hkv, S] of the key codes")
    for name in ("lengths", "starts"):
        if not arrays.given(name):
            continue
        if isinstance(getattr(arrays.call, name), (int, float)):
            raise HataDTypeError(
                f"{name}: got a Python number, expected an int32 or int64 array, [B] or 0-d, on "
                "the device of the other arguments"
            )
        got = arrays.take(name, _LENGTHS, 0, 1)
        if got not in ((), (batch,)):
            raise HataShapeError(
                f"{name}: got shape {list(got)}, expected [{batch}] (one per batch row) or a 0-d "
                "array"
            )


def _attention(arrays: Arrays) -> dict[str, Any]:
    """Check q, keys, values and sink logits; what they say of the problem."""
    b, h, _, d = arrays.take("q", DATA, 4)
    same = (arrays.dtype("q"),)
    _, kv_heads, s, _ = arrays.take("keys", same, 4)
    value_dim = arrays.take("values", same, 4)[3]
    arrays.expect("keys", same, (b, kv_heads, s, d), "batch and head size of q")
    shape = b, kv_heads, s, value_dim
    arrays.expect("values", same, shape, "batch, KV heads and slots of keys")
    arguments.multiple("q", h, kv_heads)
    arguments.head_dim("q", d)
    arguments.head_dim("values", value_dim)
    _slots("keys", s)
    arrays.expect("sink_logits", _like(arrays, "q"), (h,), "heads of q")
    return {"kv_heads": kv_heads, "head_dim": d, "value_dim": value_dim, "slots": pow2(s)}


def _nothing_encoded(call: Any) -> None:
    """Check that a call without a projection needs none."""
    if call.fresh or call.q_codes is None:
        need = "q is to be encoded; pass one, or q_codes"
        if call.fresh:
            need = f"{call.fresh} fresh keys are to be encoded; pass one, or fresh=0"
        raise HataDTypeError(f"projection: got None, expected an array [Hkv, D, r], since {need}")
    for name in ("bias", "query_projection", "query_bias"):
        if getattr(call, name) is not None:
            raise HataDTypeError(
                f"{name}: got an array, expected None, since nothing is encoded where projection "
                f"is None; leave {name} out, or pass a projection"
            )


class _Span(NamedTuple):
    """What an array takes up in memory, but for where it begins."""

    argument: int
    size: int
    dense: bool
    written: bool


def _spans(fw: Any, call: Any) -> tuple[_Span, ...]:
    """Spans of all arrays, those first that are written; none where none is."""
    written = call.written()
    spans = [
        _Span(i, *arguments.extent(fw, x), name in written)
        for i, (name, x) in enumerate(call.arrays().items())
        if x is not None and 0 not in fw.shape(x)
    ]
    spans.sort(key=lambda span: not span.written)
    return tuple(spans) if spans and spans[0].written else ()


def apart(names: Sequence[str], spans: tuple[_Span, ...], addresses: Sequence[int]) -> None:
    """Raise where an array that is written surely shares memory with another one.

    Arrays that are interleaved, such as the keys and codes of one buffer, lie within one another's
    bounds too; only a dense one, or a common first element, shows that memory is shared.

    Raises:
        HataShapeError: it does.
    """
    for i, span in enumerate(spans):
        if not span.written:
            return
        start = addresses[span.argument]
        end = start + span.size
        for other in spans[i + 1 :]:
            begin = addresses[other.argument]
            stop = begin + other.size
            if begin >= end or start >= stop:
                continue
            within = span.dense and (start < begin or stop <= end)
            around = other.dense and (begin < start or end <= stop)
            if begin == start or within or around:
                name, shared = names[span.argument], names[other.argument]
                raise HataShapeError(
                    f"{name}: got memory that {shared} lies in too, expected memory of its own, "
                    "since the call writes there; pass a copy"
                )


def reads_values() -> bool:
    """Whether `HATA_CHECK` asks to read values.

    Raises:
        HataError: it says neither yes nor no.
    """
    word = _environment.get(_CHECK)
    if not word:
        return False
    word = os.fsdecode(word)
    found = _SWITCH.get(word.strip().lower())
    if found is None:
        raise HataError(
            f"HATA_CHECK: got {word!r}, expected one of {', '.join(_SWITCH)}; correct or unset it"
        )
    return found


def values(call: Any, route: Route) -> None:
    """Read lengths, starts and indices back, as `HATA_CHECK=1` asks, and check them.

    Raises:
        HataShapeError: a length or start outside [0, S], an index >= S; the message names the row.
    """
    if route.device == "meta":
        return
    arrays = call.arrays()
    keys = arrays.get("keys", arrays.get("k_codes"))
    if keys is None:
        return
    slots = keys.shape[2]
    for name in ("lengths", "starts"):
        x = arrays.get(name)
        if x is None:
            continue
        entries = x.tolist()
        for row, value in enumerate(entries if isinstance(entries, list) else [entries]):
            if not 0 <= value <= slots:
                raise HataShapeError(f"{name}: got {value} in row {row}, expected 0 to S = {slots}")
    indices = arrays.get("indices")
    if indices is not None and 0 not in indices.shape:
        rows = indices.reshape(indices.shape[0], -1)
        for row in range(rows.shape[0]):
            largest = int(rows[row].max())
            if largest >= slots:
                raise HataShapeError(
                    f"indices: got {largest} in row {row}, expected less than S = {slots}"
                )
