"""The ops as torch custom ops, with fakes: what `torch.compile` sees.

Eager calls do not come here (a custom op costs some 50 µs more a call). The schemas follow from the
fields of the calls. `hash_attend` and `encode` have a pure form and, with a trailing underscore,
one that writes in place: fresh codes and norms, `out` and `norms`. Importing this module registers
all of them under `torch.ops.hata`.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import _disable_current_modes

from hata import arguments, checks, dispatch
from hata.call import CALLS, Encode, HammingTopK, HashAttend, SparseAttend
from hata.errors import HataShapeError

# The schema's word for what a field is annotated with.
_WORDS: dict[Any, str] = {Any: "Tensor", Any | None: "Tensor?", int: "SymInt", bool: "bool"}
_WORDS[float | None] = "float?"


def _fake_results(call: Any) -> Any:
    like = call[0]
    made = [
        like.new_empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype)
        for _, shape, dtype in call.results()
    ]
    return tuple(made) if len(made) > 1 else made[0]


def _register(name: str, kind: Any, fields: tuple[str, ...], returns: str, *written: str) -> None:
    """Make calls with these fields a custom op, whose fakes are checked as far as it goes.

    Devices are not, and nothing is where a size is symbolic: a check would make it a constant.
    """

    def call_of(args: tuple[Any, ...]) -> Any:
        given = dict(zip(fields, args, strict=True))
        if given.get("fresh") and not written:
            raise HataShapeError(
                f"fresh: got {given['fresh']}, expected 0, since torch.ops.hata.{name} writes "
                f"nothing; call torch.ops.hata.{name}_ or hata.{name}"
            )
        if returns == _PAIR:
            # A schema has no result that may be missing.
            given["return_lse"] = True
        return kind(**given)

    def run(*args: Any) -> Any:
        call = call_of(args)
        with dispatch.within_custom_op():
            result = dispatch.run(kind, call[:-2])
        return result if returns != "()" else None

    def fake(*args: Any) -> Any:
        if not _is_symbolic(args):
            with _disable_current_modes():
                run(*map(_on_meta, args))
        return _fake_results(call_of(args)) if returns != "()" else None

    schema = _schema(kind, fields, written, returns)
    custom_op(f"hata::{name}", run, mutates_args=written, schema=schema).register_fake(fake)


def _schema(kind: Any, fields: tuple[str, ...], written: tuple[str, ...], returns: str) -> str:
    hints = get_type_hints(kind.__mro__[1])
    parts = []
    for i, name in enumerate(fields):
        word = _WORDS[hints[name]]
        if name in written:
            word = word.replace("Tensor", f"Tensor(a{i}!)")
        parts.append(f"{word} {name}")
    return f"({', '.join(parts)}) -> {returns}"


def _is_symbolic(args: tuple[Any, ...]) -> bool:
    sizes = [n for x in args if isinstance(x, Tensor) for n in (*x.shape, *x.stride())]
    return any(isinstance(n, (torch.SymInt, torch.SymFloat)) for n in (*sizes, *args))


def _on_meta(x: Any, requires_grad: bool = False) -> Any:
    if not isinstance(x, Tensor):
        return x
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return made.requires_grad_(requires_grad and x.requires_grad)


# What a schema would convert, or not take.
_CHECKED = (
    ("return_lse", arguments.flag),
    ("per_head", arguments.flag),
    ("fresh", arguments.count),
    ("dense_below", arguments.count),
)
# All fields but `return_lse`, which is no matter of the op, and what the call gets later.
_FIELDS = {
    kind: tuple(name for name in kind._fields[:-2] if name != "return_lse")
    for kind in CALLS.values()
}
_PAIR = "(Tensor, Tensor)"
_register("encode", Encode, ("x", "projection", "bias"), "Tensor")
_register("encode_", Encode, _FIELDS[Encode], "()", "out", "norms")
_register("hamming_topk", HammingTopK, _FIELDS[HammingTopK], "Tensor")
_register("sparse_attend", SparseAttend, _FIELDS[SparseAttend], _PAIR)
_register("hash_attend", HashAttend, _FIELDS[HashAttend], _PAIR)
_register("hash_attend_", HashAttend, _FIELDS[HashAttend], _PAIR, "key_codes", "key_norms")


def run(call: Any) -> Any:
    """A call as a custom op: one that writes where the call does."""
    ops, kind = torch.ops.hata, type(call)
    if not torch.compiler.is_dynamo_compiling() and not _is_symbolic(call):
        # A dispatch mode is active. Arguments are held against the contract and not the schema.
        call = kind(*call[: kind.ARRAYS], *dispatch.as_python(call[kind.ARRAYS : -2]))
        one_device = len({x.device for x in call if isinstance(x, Tensor)}) == 1
        with _disable_current_modes():
            checks.check(kind(*(_on_meta(x, True) for x in call)) if one_device else call)
    for name, check in _CHECKED:
        if name in kind._fields:
            call = call._replace(**{name: check(name, getattr(call, name))})
    if kind is Encode:
        x, projection, bias, out, norms = call[:5]
        if out is None and norms is None:
            return ops.encode(x, projection, bias)
        if out is None:
            out = _fake_results(call)
        ops.encode_(x, projection, bias, out, norms)
        return out
    op = kind.OP + ("_" if call.written() else "")
    return getattr(ops, op)(*(getattr(call, field) for field in _FIELDS[kind]))
