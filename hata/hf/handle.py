"""`Handle`: an attachment in force, and the hooks that it lives by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from hata.encoder import Encoder
from hata.hf import forward_pass, models, reasons
from hata.hf.attention import HashedAttention
from hata.hf.cache import HashDynamicLayer, HashStaticLayer, StepLayer
from hata.hf.intercept import Interception
from hata.hf.layer_plan import DensePlan, LayerPlan
from hata.hf.layer_report import LayerRecord, LayerReport, ModelRecord, Report, Steps
from hata.hf.masks import is_known, is_left_padding
from hata.hf.step_graph import Forward, StepGraphs
from hata.words import ranges

_PREPARE = "prepare_inputs_for_generation"
# What takes the place of a cache layer.
_CODED: dict[type, Any] = {
    **dict.fromkeys((DynamicLayer, HashDynamicLayer), HashDynamicLayer),
    **dict.fromkeys((StaticLayer, HashStaticLayer), HashStaticLayer),
    StepLayer: StepLayer,
}


class Handle(AbstractContextManager["Handle"]):
    """An attachment; undo it with `detach()` or by leaving its `with` block.

    Attributes:
        selections: One per layer; `None` for a layer that is planned dense.
        encoder: The encoder in use.
        source: Where the selections come from, for people.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[int, Sequence[nn.Module]],
        encoder: Encoder,
        layers: Sequence[LayerPlan | DensePlan | str],
        strict: bool,
        source: str,
        graphs: bool,
    ) -> None:
        """Attach; each of `layers` is a plan, or why the model's own attention runs it."""
        self._record = ModelRecord(type(model).__name__, strict)
        self.selections = tuple(getattr(layer, "selection", None) for layer in layers)
        self.encoder, self.source = encoder, source
        self._model, self._decoder = model, model.get_decoder()
        self._layers = tuple(layers)
        self._plans = [(i, plan) for i, plan in enumerate(layers) if not isinstance(plan, str)]
        self._records = {i: LayerRecord(self._record, i, plan.selection) for i, plan in self._plans}
        self._arguments = list(inspect.signature(self._decoder.forward).parameters)
        self._attached = True
        self._interception = Interception(
            {
                module: HashedAttention(plan, self._records[i]).answer
                for i, plan in self._plans
                for module in modules[i]
            }
        )
        vars(self._decoder)["_hata_handle"] = self
        self._hooks: list[Any] = []
        if self._plans:
            self._hooks = [
                self._decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                self._decoder.register_forward_hook(self._after, always_call=True),
            ]
            if hasattr(model, _PREPARE):
                vars(model)[_PREPARE] = _Prepare(self, model)
        every = [module for _, found in sorted(modules.items()) for module in found]
        self._graphs = StepGraphs(model, every, layers, self.is_in_place)
        if graphs and self._plans and model is not self._decoder:
            vars(model)["forward"] = Forward(self._graphs, model)

    def detach(self) -> None:
        """Give the model its own attention back; a second call does nothing.

        Caches that were used meanwhile stay valid, for this model and for a later attachment.
        """
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        self._interception.close()
        vars(self._decoder).pop("_hata_handle", None)
        for name, kind in ((_PREPARE, _Prepare), ("forward", Forward)):
            mine = vars(self._model).get(name)
            if isinstance(mine, kind):
                del vars(self._model)[name]
                if mine.before is not None:
                    vars(self._model)[name] = mine.before

    def is_in_place(self) -> bool:
        """Whether its handlers are the ones that answer now."""
        return self._attached and self._interception.is_in_place()

    def report(self) -> Report:
        """What every layer did since it was attached, counted where Python ran it."""
        graphs = self._graphs
        layers = [
            self._records[i].report(graphs.ran, graphs.replayed)
            if isinstance(plan, LayerPlan)
            else LayerReport(i, None, plan if isinstance(plan, str) else plan.why)
            for i, plan in enumerate(self._layers)
        ]
        steps = Steps(graphs.replayed, graphs.captured, dict(graphs.eager))
        return Report(self._record.model, tuple(layers), steps)

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self._attached else "detached"
        dense = [str(i) for i, chosen in enumerate(self.selections) if chosen is None]
        layers = len(self.selections)
        left = f" (dense: {', '.join(dense)})" if 0 < len(dense) < layers else ""
        return (
            f"<hata.hf.Handle {state} {self._record.model}: {layers - len(dense)} of {layers} "
            f"layers planned to hash{left}, {self.encoder!r}, selections ({self.source})>"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        for chosen in dict.fromkeys(self.selections):
            layers = [i for i, other in enumerate(self.selections) if other == chosen]
            lines.append(f"  layers {ranges(layers)}: {'dense' if chosen is None else chosen}")
        lines += ["so far:", str(self.report())]
        return "\n".join(lines)

    def _before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: look at the arguments of this pass; change none."""
        if args:
            kwargs = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        weights = kwargs.get("output_attentions")
        if weights is None:
            weights = getattr(decoder.config, "output_attentions", False)
        step = forward_pass.current()
        step.begin(kwargs.get("attention_mask") is not None, bool(weights))
        cache = models.cache_among(kwargs)
        if cache is not None:
            if torch.compiler.is_compiling():
                from torch._dynamo.comptime import comptime

                comptime(_take_over_now)
            step.why = self._take_over(cache)
        elif kwargs.get("use_cache", decoder.config.use_cache) is False:
            step.why = reasons.NO_CACHE

    def _after(self, decoder: Any, args: Any, output: Any) -> None:
        """Forward hook of the decoder, also after an exception."""
        forward_pass.current().end()
        if self._record.met or output is None or torch.compiler.is_compiling():
            return
        if self._interception.is_in_place():
            self._record.complain(self._plans[0][0], reasons.NEVER_CALLED)

    def prepared(self, made: dict[str, Any]) -> None:
        """Look at the inputs that were made for a step.

        A compiled step cannot look at the values of its mask, and would compile the taking over of
        its cache as well.
        """
        cache = models.cache_among(made)
        if cache is None or not getattr(cache, "is_compileable", False):
            return
        self._take_over(cache)
        mask = made.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        inputs = made.get("input_ids")
        inputs = made.get("inputs_embeds") if inputs is None else inputs
        layers = [cache.layers[i] for i, _ in self._plans if i < len(cache.layers)]
        layers = [layer for layer in layers if isinstance(layer, HashStaticLayer)]
        if not layers or inputs is None or not is_known(mask):
            return
        tokens = inputs.shape[1]
        if tokens > 1 or layers[0].left_padded is None:
            found = is_left_padding(mask, layers[0].total() + tokens)
            for layer in layers:
                setattr(layer, "foreseen" if tokens > 1 else "left_padded", found)

    def _take_over(self, cache: Cache) -> str | None:
        """Give the cache layers that carry codes, in place; why it cannot be done for all."""
        if not hasattr(cache, "layers"):
            return f"a cache of another kind: {type(cache).__name__}"
        if getattr(cache, "offloading", False):
            return "an offloaded cache"
        why = None
        layers: list[Any] = cache.layers
        if cache.layer_class_to_replicate is DynamicLayer:
            # This cache makes its layers as they are first used.
            while len(layers) <= self._plans[-1][0]:
                layers.append(DynamicLayer())
        for i, plan in self._plans:
            layer: Any = layers[i] if i < len(layers) else None
            coded = _CODED.get(type(layer))
            if coded is None:
                why = f"a cache layer of another kind: {type(layer).__name__}"
            elif type(layer) is not coded or layer.plan is not plan:
                layers[i] = coded(plan, layer)
        return why


class _Prepare:
    """`prepare_inputs_for_generation` of an attached model: where masks of compiled steps are made.

    It has the signature of the model's own, which transformers looks at.
    """

    def __init__(self, handle: Handle, model: Any) -> None:
        self._handle = handle
        # One that somebody has set on this very model.
        self.before = vars(model).get(_PREPARE)
        self._own = model.prepare_inputs_for_generation
        self.__signature__ = inspect.signature(self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = self._own(*args, **kwargs)
        self._handle.prepared(made)
        return made


def _take_over_now(context: Any) -> None:
    """Take a cache over while torch.compile follows the code, and not in what it compiles.

    Else the first step would be a graph of its own, which makes all codes.
    """
    handle, cache = (
        context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
        for name in ("self", "cache")
    )
    handle.value._take_over(cache.value)
