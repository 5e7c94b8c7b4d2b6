"""The ops as torch custom ops, with fakes: what `torch.compile` sees.

Eager calls do not come here (a custom op costs some 50 µs more a call). `hash_attend` and `encode`
have a pure form and, with a trailing underscore, one that writes in place: fresh codes and norms,
`out` and `norms`. Importing this module registers all of them under `torch.ops.hata`.
"""

# No `from __future__ import annotations`: torch reads these signatures as its schemas.

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import _disable_current_modes

from hata import ops
from hata.errors import HataShapeError


@ops.within_custom_op()
def _encode(x: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
    return ops.encode(x, projection, bias)


def _fake_encode(x: Tensor, projection: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:3], projection.shape[2] // 8), dtype=torch.uint8)


@ops.within_custom_op()
def _encode_inplace(
    x: Tensor, projection: Tensor, bias: Tensor | None, out: Tensor, norms: Tensor | None
) -> None:
    ops.encode(x, projection, bias, out=out, norms=norms)


def _fake_encode_inplace(*_: object) -> None:
    pass


@ops.within_custom_op()
def _hamming_topk(
    q_codes: Tensor,
    k_codes: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    key_norms: Tensor | None,
    k: int,
    ratio: float | None,
    k_min: int,
    sink: int,
    recent: int,
    per_head: bool,
) -> Tensor:
    return ops.hamming_topk(
        q_codes,
        k_codes,
        k,
        lengths=lengths,
        starts=starts,
        ratio=ratio,
        k_min=k_min,
        sink=sink,
        recent=recent,
        key_norms=key_norms,
        per_head=per_head,
    )


def _fake_hamming_topk(q_codes: Tensor, k_codes: Tensor, *others: Any) -> Tensor:
    _, _, _, k, *_, per_head = others
    batch, heads, tokens, _ = q_codes.shape
    if not per_head:
        heads = k_codes.shape[1]
    return q_codes.new_empty((batch, heads, tokens, k), dtype=torch.int32)


def _fake_attention(q: Tensor, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], values.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@ops.within_custom_op()
def _sparse_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    sink_logits: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return ops.sparse_attend(
        q,
        keys,
        values,
        indices,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        return_lse=True,
    )


@ops.within_custom_op()
def _hash_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_codes: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    query_projection: Tensor | None,
    query_bias: Tensor | None,
    q_codes: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    key_norms: Tensor | None,
    sink_logits: Tensor | None,
    k: int,
    dense_below: int,
    ratio: float | None,
    k_min: int,
    sink: int,
    recent: int,
    scale: float | None,
    softcap: float | None,
    fresh: int,
) -> tuple[Tensor, Tensor]:
    return ops.hash_attend(
        q,
        keys,
        values,
        key_codes,
        projection,
        k,
        bias=bias,
        query_projection=query_projection,
        query_bias=query_bias,
        q_codes=q_codes,
        fresh=fresh,
        dense_below=dense_below,
        lengths=lengths,
        starts=starts,
        ratio=ratio,
        k_min=k_min,
        sink=sink,
        recent=recent,
        key_norms=key_norms,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        return_lse=True,
    )


@wraps(_hash_attend)
def _hash_attend_pure(*args: Any) -> tuple[Tensor, Tensor]:
    fresh = args[-1]
    if fresh:
        raise HataShapeError(
            f"fresh: got {fresh}, expected 0, since torch.ops.hata.hash_attend writes nothing; "
            "call torch.ops.hata.hash_attend_ or hata.hash_attend"
        )
    return _hash_attend(*args)


def _register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], *written: str
) -> None:
    """Make a function a custom op, whose fakes are checked as far as it goes.

    Devices are not, and nothing is where a size is symbolic: a check would make it a constant.
    """

    @wraps(fake)
    def checked(*args: Any) -> Any:
        sizes = [n for x in args if isinstance(x, Tensor) for n in (*x.shape, *x.stride())]
        if not any(isinstance(n, (torch.SymInt, torch.SymFloat)) for n in (*sizes, *args)):
            with _disable_current_modes():
                function(*map(_on_meta, args))
        return fake(*args)

    custom_op(f"hata::{name}", function, mutates_args=written).register_fake(checked)


def _on_meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


_register("encode", _encode, _fake_encode)
_register("encode_", _encode_inplace, _fake_encode_inplace, "out", "norms")
_register("hamming_topk", _hamming_topk, _fake_hamming_topk)
_register("sparse_attend", _sparse_attend, _fake_attention)
_register("hash_attend", _hash_attend_pure, _fake_attention)
_register("hash_attend_", _hash_attend, _fake_attention, "key_codes", "key_norms")


def encode(
    x: Tensor, projection: Tensor, bias: Tensor | None, out: Tensor | None, norms: Tensor | None
) -> Tensor:
    """`hata.encode` as a custom op."""
    if out is None and norms is None:
        return torch.ops.hata.encode(x, projection, bias)
    if out is None:
        out = x.new_empty((*x.shape[:3], projection.shape[2] // 8), dtype=torch.uint8)
    torch.ops.hata.encode_(x, projection, bias, out, norms)
    return out


def hamming_topk(*args: object) -> Tensor:
    """`hata.hamming_topk` as a custom op."""
    return torch.ops.hata.hamming_topk(*args)


def sparse_attend(*args: object, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """`hata.sparse_attend` as a custom op."""
    out, lse = torch.ops.hata.sparse_attend(*args)
    return (out, lse) if return_lse else out


def hash_attend(*args: object, fresh: int, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """`hata.hash_attend` as a custom op: the mutating one where there are fresh keys."""
    op = torch.ops.hata.hash_attend_ if fresh else torch.ops.hata.hash_attend
    out, lse = op(*args, fresh)
    return (out, lse) if return_lse else out
