"""`StepGraphs`: decode steps of an attached model from CUDA graphs.

A step of one token launches a thousand kernels of two microseconds each, which Python takes longer
to launch than the GPU to run. So the step of a cache is captured once, and every later step is one
launch. That is done for the cache that `generate` makes by itself, which stays what it is to
everybody else: a graph works on the room behind its keys (`hata.hf.cache_steps`). A cache that
outgrows its room, or that somebody changes, begins anew.

A step that no graph can run runs as it would without, and `handle.report()` says why.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hata.hf import masks, models, reasons
from hata.hf.cache import CannotCapture, HashDynamicLayer
from hata.hf.cache_steps import CacheSteps, NotNow, signature
from hata.hf.compiled_pieces import Pieces
from hata.hf.growing import outside_inference_mode
from hata.hf.layer_plan import DensePlan, LayerPlan

# What a step is given as tensors, one token a row.
_TENSORS = ("input_ids", "position_ids")
# A cache that is changed as often as this between two steps is not followed any further.
_CHANGES = 4
# What is compiled and captured is shared by all threads.
_capturing = threading.Lock()


_logger = logging.getLogger("hata.hf")


# Tests put a CPU in its place.
KINDS = ("cuda",)


@dataclass
class _Followed:
    """What is known of a cache.

    Attributes:
        steps: Its steps, if there was room for any.
        why: Why no graph is made for it, if so.
        changes: How often in a row it was changed before a step was replayed.
        failures: How often its first step failed.
    """

    steps: CacheSteps | None = None
    why: str | None = None
    changes: int = 0
    failures: int = 0


class StepGraphs:
    """The graphs of an attached model.

    Attributes:
        ran: Steps over the room of a cache, replayed ones included.
        replayed: Steps that graphs ran.
        captured: Graphs that were captured.
        eager: Why other steps of one token ran without -> how many.
    """

    def __init__(
        self,
        model: Any,
        modules: Sequence[nn.Module],
        plans: Sequence[LayerPlan | DensePlan | str],
        is_in_place: Callable[[], bool],
    ) -> None:
        """`is_in_place`: whether the handlers of the attachment are those that answer."""
        self._plans, self._is_in_place = tuple(plans), is_in_place
        others = (f"layer {i}: {why}" for i, why in enumerate(plans) if isinstance(why, str))
        self._why = next(others, None)
        self._name = models.cache_argument(model)
        self._pieces = Pieces(model.get_decoder(), modules)
        self._weights = list(model.parameters())
        # Where somebody most likely waits for a module to run.
        self._watched = [*modules, *_parents(model, modules)]
        self._caches: WeakKeyDictionary[Any, _Followed] = WeakKeyDictionary()
        self.ran = self.replayed = self.captured = 0
        self.eager: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        # Of the copy of a model, which has no caches yet.
        twin = memo[id(self)] = copy.copy(self)
        for name in ("_pieces", "_weights", "_watched", "_is_in_place"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._caches, twin.eager = WeakKeyDictionary(), Counter()
        twin.ran = twin.replayed = twin.captured = 0
        return twin

    def answer(self, model: Any, own: Callable[..., Any], given: dict[str, Any]) -> Any:
        """The output of a forward pass if it is a step that a graph can run, else `None`."""
        cache, tokens = models.cache_among(given), given.get("input_ids")
        if type(cache) is not DynamicCache or tokens is None or not cache.layers:
            return None
        followed = self._caches.setdefault(cache, _Followed())
        if tokens.shape[1] != 1 or tokens.device.type not in KINDS:
            followed.changes = 0
            return None
        why = followed.why or self._why or self._why_not(model, cache, given)
        if why is None:
            try:
                return self._run(followed, model, cache, own, given)
            except NotNow as error:
                why = str(error)
            except CannotCapture as error:
                why = followed.why = str(error)
            # If the step itself is at fault, it says so once more.
            except Exception as error:
                why, steps = _told(error), followed.steps
                followed.failures += 1
                if followed.failures > 1 or (steps is not None and steps.warm):
                    followed.why = why
            if followed.steps is not None:
                followed.steps.close()
                followed.steps = None
        self.eager[why] += 1
        return None

    def _why_not(self, model: Any, cache: Any, given: dict[str, Any]) -> str | None:
        """Why this very step cannot be one of a graph, if so."""
        if model.training:
            return reasons.TRAINING
        if torch.is_grad_enabled():
            return reasons.GRADIENTS
        if torch.is_autocast_enabled(given["input_ids"].device.type):
            return reasons.DTYPES
        for name in ("output_attentions", "output_hidden_states"):
            if given.get(name) or getattr(model.config, name, False):
                return reasons.MORE_OUTPUTS
        if given.get("return_dict") is False:
            return reasons.NO_OUTPUT
        if not self._is_in_place():
            return reasons.OTHERS
        if getattr(cache, "offloading", False):
            return reasons.OFFLOADED
        mine = (
            type(layer) is HashDynamicLayer and layer.plan is plan
            for layer, plan in zip(cache.layers, self._plans, strict=False)
        )
        if len(cache.layers) != len(self._plans) or not all(mine):
            return reasons.FIRST
        return None

    def _count_hooks(self) -> int:
        """Hooks where most are set: new ones make the steps of a cache begin anew."""
        return sum(map(len, _GLOBAL_HOOKS)) + sum(
            len(x._forward_hooks) + len(x._forward_pre_hooks) for x in self._watched
        )

    def _run(
        self,
        followed: _Followed,
        model: Any,
        cache: Any,
        own: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Any:
        mask = kwargs.get("attention_mask")
        inputs = {name: kwargs[name] for name in _TENSORS if kwargs.get(name) is not None}
        left = {*_TENSORS, "attention_mask", self._name, "past_key_values"}
        options = {name: x for name, x in kwargs.items() if name not in left and x is not None}
        for name, x in options.items():
            if not isinstance(x, (bool, int, float, str)):
                raise NotNow(f"an argument of a step that is not known: {name}")
        steps, layers = followed.steps, cache.layers
        kind = None if mask is None else (type(mask), mask.shape[:-1], mask.dtype)
        # What a graph would not notice: it calls no hooks, and reads weights where they were.
        unseen = self._count_hooks(), [x.data_ptr() for x in self._weights]
        given = signature(inputs), options, kind, unseen
        if steps is None or not steps.fit(layers, given):
            followed.changes = followed.changes + 1 if steps and not steps.replayed else 0
            if followed.changes >= _CHANGES:
                raise CannotCapture(reasons.CHANGES)
            if any(map(_has_hooks, model.modules())) or any(map(len, _GLOBAL_HOOKS)):
                raise NotNow(reasons.HOOKS)
            starts = _starts(mask, layers[0].total() + 1, "position_ids" in inputs)
            steps = followed.steps = CacheSteps(layers, starts, given)
        if steps.captured:
            output = steps.run(own, self._name, inputs, mask)
        else:
            output = self._first(steps, own, inputs, mask)
            self.captured += steps.captured
        self.ran += 1
        self.replayed += steps.captured
        return type(output)(**{name: _kept(x, cache) for name, x in output.items()})

    def _first(
        self, steps: CacheSteps, own: Callable[..., Any], inputs: dict[str, Any], mask: Any
    ) -> Any:
        """A step that is not replayed yet, with pieces compiled if that can be."""
        given = own, self._name, inputs, mask
        with _capturing:
            if self._pieces.work:
                try:
                    with self._pieces.compiled():
                        return steps.run(*given)
                except CannotCapture:
                    raise
                except Exception as error:
                    # Such as no compiler, if it is not the step that is at fault. A graph gains
                    # nearly as much without them.
                    output = steps.run(*given)
                    self._pieces.work = False
                    _logger.info("pieces of the model are not compiled: %s", error)
                    return output
            return steps.run(*given)


def _kept(x: Any, cache: Any) -> Any:
    """What is given out of an output that is written over, with the cache of the caller."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, (tuple, list)):
        return type(x)(_kept(one, cache) for one in x)
    return cache if isinstance(x, Cache) else x


def _parents(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [one for one in model.modules() if {*one.children()} & {*modules}]


_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a module to run, whom a graph would not call."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    known = ("hata.", "transformers.")
    return any(not (getattr(one, "__module__", None) or "").startswith(known) for one in hooks)


def _told(error: Exception) -> str:
    """Why a capture failed, in one line."""
    return f"capture fails: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"


def _starts(mask: Any, total: int, has_positions: bool) -> torch.Tensor | None:
    """Where the first visible keys of a step are kept, if it has a mask; reads it."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise CannotCapture(reasons.MASK)
    if not masks.is_left_padding(mask, total):
        raise CannotCapture(reasons.HOLES)
    if not has_positions and bool((mask[:, 0] == 0).any()):
        # Some models count positions by their mask, which a graph does not give them.
        raise CannotCapture(reasons.POSITIONS)
    with outside_inference_mode():
        return masks.first_visible(mask).clone()


class Forward:
    """`forward` of an attached model: a graph's answer where there is one, else its own.

    It has the signature of the model's own, which transformers looks at.
    """

    def __init__(self, graphs: StepGraphs, model: Any) -> None:
        self._graphs, self._model = graphs, model
        # One that somebody has set on this very model.
        self.before = vars(model).get("forward")
        self._own = model.forward
        self.__signature__ = inspect.signature(self._own)
        self._names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of a forward pass."""
        if not torch.compiler.is_compiling():
            given = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
            output = self._graphs.answer(self._model, self._own, given)
            if output is not None:
                return output
        return self._own(*args, **kwargs)
