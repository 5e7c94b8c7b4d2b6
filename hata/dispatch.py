"""From a call to the backend that runs it: checked once per signature, then one look-up.

What decisions depend on (the choices in force; of each array its framework, shape, strides, dtype,
device and alignment; the numbers) is the signature of a call. What was found for one is remembered
as a `hata.call.Route`, so a call that looks like an earlier one costs one dictionary look-up, and a
comparison of addresses where it writes into its arguments.
"""

from __future__ import annotations

import numbers
import operator
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from typing import Any

from hata import checks, registry
from hata.arrays import framework
from hata.backend import override, setting
from hata.call import Route
from hata.meta import Meta

# A growing cache makes a new signature at every step; a memo is emptied when it is full.
_MEMO_LIMIT = 4096
_MOST_APART = 64
# Types of numbers that never change.
_PLAIN = frozenset({bool, float, int, type(None)})
_META = Meta()

_preparing: ContextVar[bool] = ContextVar("hata_prepare", default=False)
_within_custom_op: ContextVar[bool] = ContextVar("hata_within_custom_op", default=False)


def run(kind: Any, fields: tuple) -> Any:
    """Run a call as the caller wrote it: its class in `hata.call`, and its arrays and numbers.

    Raises:
        HataError: see `hata.ops`.
    """
    arrays, options = fields[: kind.ARRAYS], fields[kind.ARRAYS :]
    fw = framework(kind._fields[0], arrays[0])
    name, memo = registry.in_force()
    try:
        signatures, addresses = fw.signatures(arrays)
        key = (
            # True, 1 and 1.0 are equal, and not alike.
            kind, fw, name, override.get(), *map(type, options), options, *signatures,
        )  # fmt: skip
        # The layers of a model look alike: most often there is nothing to look up.
        last, route = memo.last
        if key != last:
            route = memo.routes.get(key)
            if route is not None:
                memo.last = key, route
    except (AttributeError, TypeError, RuntimeError, KeyError):
        # A number that cannot be a key. Or arrays of another kind, or none at all: the full check
        # says what is wrong.
        plain = as_python(options)
        if plain is not options:
            return run(kind, (*arrays, *plain))
        checks.check(kind(*fields))
        raise
    if route is None:
        plain = as_python(options)
        if plain is not options:
            return run(kind, (*arrays, *plain))
        route = checks.check(kind(*fields))
    if route.spans:
        _keep_apart(kind, route, addresses)
    if checks.reads_values():
        checks.values(kind(*fields), route)
    if route.backend is None:
        if not fw.foreign:
            _choose(route, arrays[0], name)
        if len(memo.routes) >= _MEMO_LIMIT:
            memo.routes.clear()
        memo.routes[key] = route
        memo.last = key, route
    if fw.foreign:
        return fw.call(run, kind, fields)
    call = kind.complete(arrays, route, addresses)
    backend: Any = route.backend
    if _preparing.get():
        backend.prepare(call)
        return None, None
    return getattr(backend, kind.OP)(call)


def as_python(options: tuple) -> tuple:
    """The same tuple, if it holds nothing that may change; else one of Python's own numbers."""
    if _PLAIN.issuperset(map(type, options)):
        return options
    found = []
    for x in options:
        if type(x) not in _PLAIN and not isinstance(x, (bool, float)):
            with suppress(TypeError):
                x = operator.index(x)
        if type(x) not in _PLAIN and isinstance(x, numbers.Real):
            x = float(x)
        found.append(x)
    same = all(new is old for new, old in zip(found, options, strict=True))
    return options if same else tuple(found)


def _choose(route: Route, first: Any, name: str) -> None:
    """Give a route its backend, by the name that its call found in force, and configuration."""
    if route.device == "meta":
        # There is nothing to compute, so no backend is asked whether it could.
        route.backend = _META
        return
    route.backend = registry.resolve(route.problem, route.fw, route.device, name)
    route.config = route.backend.config(route.problem)
    batch, _, tokens, _ = first.shape
    if 0 in (batch, tokens):
        route.backend = _META


def _keep_apart(kind: Any, route: Route, addresses: list[int]) -> None:
    """Raise where the call writes into memory of another argument; once for the same addresses."""
    key = tuple(addresses)
    if key not in route.apart:
        checks.apart(kind._fields, route.spans, addresses)
        if len(route.apart) >= _MOST_APART:
            route.apart.clear()
        route.apart.add(key)


def preparing() -> AbstractContextManager[None]:
    """Calls in this context compile and load what they need, and run nothing."""
    return setting(_preparing, True)


def within_custom_op() -> AbstractContextManager[None]:
    """Calls in this context run, whatever modes are active or threads are compiling."""
    return setting(_within_custom_op, True)


def is_traced(x: Any) -> bool:
    """Whether torch must see a call whose first array is `x` as a custom op.

    It must where the call is traced, a dispatch mode is active, or `x` is a fake or a wrapper; not
    where it comes from the custom op. A subclass without a dispatch of its own is a tensor like any
    other.
    """
    # Tensors alone have it. Dynamo follows this code, and must meet neither `sys.modules`, which
    # grows while it looks, nor the context variable.
    if not hasattr(x, "__torch_dispatch__"):
        return False
    import torch

    if torch.compiler.is_dynamo_compiling():
        return True
    plain = torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    if x.__class__.__torch_dispatch__ is plain and not torch._C._len_torch_dispatch_stack():
        return False
    return not _within_custom_op.get()
