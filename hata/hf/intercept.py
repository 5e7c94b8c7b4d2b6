"""Taking the attention call of chosen modules, while the model stays as it is.

An attention module of transformers asks an `AttentionInterface` for the function of its
implementation, and calls what it is given with itself as the first argument. While handlers are set
on modules, the interface objects that those modules ask are of a subclass, which hands out the same
function behind a look at the module: one with a handler is answered by the handler, any other by
the function. The model keeps its configuration, its masks and its implementation, whatever that is
and whoever changes it, and a handler can always run what the model would have run.

A change of the interface's class is also what torch.compile notices: graphs that were compiled
without handlers are not used with them, nor the other way round.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import modeling_utils
from transformers.modeling_utils import AttentionInterface

# What an attention module calls: `(module, query, key, value, mask, **more) -> (out, weights)`.
Function = Callable[..., tuple[Any, Any]]
# What answers in its place, `(function, module, args, kwargs)`: the function that would have been
# called, and with what: query, key, value and mask come first in `args`. A handler that wants
# nothing else calls `function(module, *args, **kwargs)`.
Handler = Callable[[Function, nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]
_TENSORS = ("query", "key", "value", "attention_mask")

_lock = threading.Lock()
# Who watches an interface object; those that are gone leave by themselves.
_watchers: dict[int, WeakSet[Interception]] = {}


class Interception:
    """Handlers on modules; `close` takes them off.

    A module has one handler at a time: a second one takes its place until it is closed.
    """

    def __init__(self, handlers: Mapping[nn.Module, Handler]) -> None:
        self._before = {module: handler_of(module) for module in handlers}
        self._handlers = dict(handlers)
        self._interfaces = _interfaces(handlers)
        for module, handler in handlers.items():
            vars(module)["_hata"] = handler
        self.watch()

    def watch(self) -> None:
        """Let the interfaces look at modules; also to be called for a copy."""
        with _lock:
            for interface in self._interfaces:
                watchers = _watchers.setdefault(id(interface), WeakSet())
                if not hasattr(interface, "watches"):
                    interface.__class__ = _watching(type(interface))
                watchers.add(self)

    def is_in_place(self) -> bool:
        """Whether these handlers are the ones that answer now."""
        return all(handler_of(one) == handler for one, handler in self._handlers.items())

    def close(self) -> None:
        """Take the handlers off; a second call does nothing."""
        others = {one for watchers in _watchers.values() for one in watchers if one is not self}
        for module, before in self._before.items():
            mine = self._handlers[module]
            if handler_of(module) == mine:
                vars(module).pop("_hata", None)
                if before is not None:
                    vars(module)["_hata"] = before
            for other in others:
                # One that was set after this one must not bring it back.
                if other._before.get(module) == mine:
                    other._before[module] = before
        self._before, self._handlers = {}, {}
        with _lock:
            for interface in self._interfaces:
                watchers = _watchers.get(id(interface), WeakSet())
                watchers.discard(self)
                if not watchers and hasattr(interface, "watches"):
                    interface.__class__ = interface.watches

    def __deepcopy__(self, memo: dict[int, Any]) -> Interception:
        # Part of the copy of a model: the modules are copied with it, interfaces are not.
        twin = memo[id(self)] = object.__new__(Interception)
        twin._before = {copy.deepcopy(module, memo): None for module in self._before}
        twin._handlers = {module: handler_of(module) for module in twin._before}
        twin._interfaces = self._interfaces
        twin.watch()
        return twin


def handler_of(module: nn.Module) -> Handler | None:
    """The handler that is set on a module."""
    return vars(module).get("_hata")


def calls_interface(module: nn.Module) -> bool:
    """Whether the code of a module, or of a class that it derives from, asks an interface."""
    return any(map(_asks_interface, type(module).__mro__))


def _answer(function: Function, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What an attention module is handed: its handler's answer, else the function's."""
    handler = getattr(module, "_hata", None)
    if handler is None:
        return function(module, *args, **kwargs)
    # Handlers look for tensors by position; some modules pass them by name.
    for name in _TENSORS[len(args) :]:
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    return handler(function, module, args, kwargs)


@functools.cache
def _watching(cls: type[AttentionInterface]) -> type[AttentionInterface]:
    """The class of an interface object that looks at modules, made of the one it had."""

    class Watching(cls):
        watches = cls

        def get_interface(self, attn_implementation: Any, default: Any) -> Function:
            """The function of an implementation, behind a look at the module that calls it."""
            return functools.partial(_answer, cls.get_interface(self, attn_implementation, default))

    return Watching


def _interfaces(modules: Iterable[nn.Module]) -> list[Any]:
    """The interface objects that the code of these modules can see."""
    found = {id(modeling_utils.ALL_ATTENTION_FUNCTIONS): modeling_utils.ALL_ATTENTION_FUNCTIONS}
    for cls in {cls for module in modules for cls in type(module).__mro__}:
        for value in vars(sys.modules.get(cls.__module__, nn)).values():
            if isinstance(value, AttentionInterface):
                found[id(value)] = value
    return list(found.values())


@functools.cache
def _asks_interface(cls: type) -> bool:
    try:
        return cls is not nn.Module and "get_interface" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False
