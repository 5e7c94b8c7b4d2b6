"""`attach`: hash attention in a transformers model, and back."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hata.encoder import Encoder
from hata.errors import AttachError
from hata.hf.attention import (
    NAME,
    LayerState,
    Step,
    eager_function,
    hash_attention_forward,
    hash_mask,
    shares_config,
    watch_masks,
)
from hata.hf.cache import HashDynamicLayer, HashStaticLayer
from hata.hf.padding import judge
from hata.hf.plan import LayerPlan
from hata.hf.policy import resolve
from hata.profile import Profile
from hata.selection import Selection
from hata.words import ranges

TESTED = ((5, 17), (5, 23))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_version_known = False


def attach(
    model: PreTrainedModel,
    encoder: Encoder | str | os.PathLike[str] = "random",
    *,
    profile: Profile | str | os.PathLike[str] | None = None,
    selection: Selection | Sequence[Selection | None] | None = None,
) -> Handle:
    """Let a model decode with hash attention.

    Afterwards plain `model.generate()` (and `model(...)`) attends, in every step of one token, to
    the keys whose codes are nearest to the query's, where the context is longer than the budget.
    Everything else runs the model's own attention: prefill and every step of several tokens, layers
    with a sliding window, masks with holes, training and any step that records gradients.

    Args:
        model: A decoder of transformers whose attention goes through its attention interface.
        encoder: Path of an encoder file, a `hata.Encoder`, or `"random"` for the untrained one.
        profile: Where selections are looked up: a path or a `hata.profile.Profile`; `None`: the
            profile in force. Kernel configurations always come from the profile in force, see
            `hata.use_profile`.
        selection: One `hata.Selection` for all layers, or one per layer with `None` for a dense
            one. Without it the profile's selections for this model count, else
            `DEFAULT_SELECTION` (with the bits of the encoder where one is given).

    Returns:
        A handle. `handle.detach()`, or leaving `with attach(model):`, undoes everything. A copy of
        an attached model (`copy.deepcopy`) is attached on its own; `detach(copied)` undoes that.

    Raises:
        AttachError: The model cannot be attached to, or already is.
        EncoderError: The encoder is another model's, damaged, or has too few bits.
        ProfileError: The profile cannot be read.

    Example:
        >>> import hata.hf
        >>> with hata.hf.attach(model, selection=hata.Selection(bits=128, k=512)):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    _check_version()
    decoder = _decoder(model)
    config = decoder.config.get_text_config()
    modules = _attention_modules(decoder)
    name = Path(str(getattr(model, "name_or_path", ""))).name
    policy = resolve(config, name, encoder, profile, selection)
    if policy.encoder.shape.head_dim % 16:
        raise AttachError(
            f"model: got {type(model).__name__} with head size {policy.encoder.shape.head_dim}, "
            "supported are the multiples of 16"
        )

    if model.dtype not in _DTYPES:
        raise AttachError(
            f"model: got {type(model).__name__} in {model.dtype}, supported are "
            f"{', '.join(map(str, _DTYPES))}; convert it with model.to(dtype)"
        )
    if config._attn_implementation == NAME and shares_config(decoder.config):
        raise AttachError(
            f"model: this {type(model).__name__} shares its configuration with a model that is "
            "attached already; load it with a configuration of its own"
        )
    original = config._attn_implementation
    # A model loaded under our name has none of its own; SDPA is what it would have got.
    original = "sdpa" if original in (None, NAME) else original
    hashable = hashable_layers(config)
    plans = [
        LayerPlan(policy.encoder, i, chosen) if chosen is not None and hashable[i] else None
        for i, chosen in enumerate(policy.selections)
    ]
    if not any(plans):
        warnings.warn(
            f"{type(model).__name__}: no layer will use hash attention; each is dense by its "
            "selection or has a sliding window. One selection for all layers leaves the first 2 "
            "dense; its dense_layers changes that",
            stacklevel=2,
        )
    step = Step()
    states = {}
    for module in modules:
        eager = eager_function(module)
        if original == "eager" and eager is None:
            raise AttachError(
                f"model: got {type(model).__name__} with eager attention, but the module of "
                f"{type(module).__name__} has no eager_attention_forward to fall back to; load it "
                'with attn_implementation="sdpa"'
            )
        index: Any = module.layer_idx
        plan = plans[index] if index < len(plans) else None
        states[module] = LayerState(step, index, plan, eager, original == "eager")
    return Handle(model, decoder, policy.encoder, plans, states, step, original, policy.source)


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention back, whoever holds its handle; else does nothing.

    Args:
        model: One that was attached, or a copy of one, which no handle was returned for.

    Raises:
        AttachError: It is no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(f"model: got {type(model).__name__}, expected a model of transformers")
    handle = vars(model.get_decoder()).get("_hata_handle")
    if handle is not None:
        handle.detach()


def hashable_layers(config: Any) -> list[bool]:
    """Which layers may be hashed: those whose cache keeps every key, without a window."""
    return [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]


class Handle:
    """An attachment; undo it with `detach()` or by leaving its `with` block.

    Attributes:
        selections: One per layer; `None` for a dense layer.
        encoder: The encoder in use.
        source: Where the selections come from, for people.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        encoder: Encoder,
        plans: list[LayerPlan | None],
        states: dict[nn.Module, LayerState],
        step: Step,
        original: str,
        source: str,
    ) -> None:
        self.encoder = encoder
        self.source = source
        self.selections = tuple(plan and plan.selection for plan in plans)
        self._name = type(model).__name__
        self._decoder = decoder
        self._plans = plans
        self._first = next((i for i, plan in enumerate(plans) if plan is not None), None)
        self._step = step
        self._original = original
        self._modules = list(states)
        self._arguments = list(inspect.signature(decoder.forward).parameters)
        self._attached = True
        self._hooks: list[Any] = []
        try:
            vars(decoder)["_hata_handle"] = self
            for module, state in states.items():
                vars(module)["_hata"] = state
            watch_masks(decoder.config, step)
            decoder.set_attn_implementation(NAME)
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, always_call=True),
            ]
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give the model its own attention back; a second call does nothing.

        Caches that were used meanwhile stay valid, for this model and for a later attachment.
        """
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        self._step.clear()
        for module in self._modules:
            module.__dict__.pop("_hata", None)
        self._decoder.__dict__.pop("_hata_handle", None)
        self._decoder.set_attn_implementation(self._original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        # Part of the copy of a model: all that belongs to the copy is copied with it, but for the
        # watch on masks, which goes by the configuration.
        twin = memo[id(self)] = object.__new__(Handle)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        if twin._attached:
            watch_masks(copy.deepcopy(self._decoder.config, memo), twin._step)
        return twin

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        hashed = [chosen for chosen in self.selections if chosen is not None]
        dense = [str(i) for i, chosen in enumerate(self.selections) if chosen is None]
        left = f" (dense: {', '.join(dense)})" if hashed and dense else ""
        state = "attached" if self._attached else "detached"
        return (
            f"<hata.hf.Handle {state} {self._name}: {len(hashed)} of {len(self.selections)} layers "
            f"hashed{left}, {self.encoder!r}, selections ({self.source})>"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        for chosen in dict.fromkeys(self.selections):
            layers = [i for i, other in enumerate(self.selections) if other == chosen]
            lines.append(f"  layers {ranges(layers)}: {'dense' if chosen is None else chosen}")
        return "\n".join(lines)

    def _before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder: look at the cache and the mask of this pass."""
        if args:
            kwargs = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if cache is None:
            use = kwargs.get("use_cache")
            use = decoder.config.use_cache if use is None else use
            if not use or decoder.training or self._first is None:
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        if not isinstance(cache, Cache) or self._first is None:
            return None
        self._take_over(cache)
        self._step.layers = cache.layers
        lead = cache.layers[self._first] if self._first < len(cache.layers) else None
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if isinstance(lead, (HashDynamicLayer, HashStaticLayer)) and inputs is not None:
            self._step.left_padded = judge(
                lead, kwargs.get("attention_mask"), inputs.shape[1], self._step.planned
            )
        return (), kwargs

    def _after(self, decoder: Any, args: Any, output: Any) -> None:
        """Forward hook of the decoder, also after an exception."""
        self._step.clear()

    def _take_over(self, cache: Cache) -> None:
        """Give the cache layers that carry codes, in place; what they hold stays theirs."""
        layers: list[Any] = cache.layers
        if cache.layer_class_to_replicate is DynamicLayer:
            # This cache makes its layers as they are first used.
            while len(layers) < len(self._plans):
                layers.append(DynamicLayer())
        for i, plan in enumerate(self._plans):
            if plan is None or i >= len(layers):
                continue
            layer = layers[i]
            kind = type(layer)
            if kind is DynamicLayer or (kind is HashDynamicLayer and layer.plan is not plan):
                layers[i] = HashDynamicLayer(plan, layer)
            elif kind is StaticLayer or (kind is HashStaticLayer and layer.plan is not plan):
                layers[i] = HashStaticLayer(plan, layer)


def _check_version() -> None:
    global _version_known
    if _version_known:
        return
    _version_known = True
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED)
        warnings.warn(
            f"transformers {transformers.__version__} is outside the range hata is tested with, "
            f"{low} to {high}",
            stacklevel=3,
        )


def _decoder(model: Any) -> PreTrainedModel:
    """The decoder inside a model; raises `AttachError` where there is none we can work with."""
    supported = (
        "expected a decoder-only model of transformers whose attention goes through "
        "AttentionInterface, such as Llama, Qwen2, Qwen3 or Mistral"
    )
    kind = type(model).__name__
    if AttentionInterface._global_mapping.get(NAME) is not hash_attention_forward:
        raise AttachError(
            f'attention: the name "{NAME}" is not ours in AttentionInterface; something else was '
            "registered under it; call hata.hf.attention.register()"
        )
    if AttentionMaskInterface._global_mapping.get(NAME) is not hash_mask:
        raise AttachError(
            f'attention mask: no function of ours is registered as "{NAME}" in '
            "AttentionMaskInterface, so padding would be attended to; call "
            "hata.hf.attention.register()"
        )
    if not isinstance(model, PreTrainedModel):
        raise AttachError(f"model: got {kind}, {supported}")
    if model.config.is_encoder_decoder:
        raise AttachError(f"model: got {kind}, an encoder-decoder model, {supported}")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not decoder._can_set_attn_implementation():
        raise AttachError(f"model: got {kind}, {supported}")
    if "_hata_handle" in decoder.__dict__:
        raise AttachError(
            f"model: this {kind} is already attached; call detach() on the handle that attach "
            "returned, or hata.hf.detach(model), first"
        )
    return decoder


def _attention_modules(decoder: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules, one per layer that has one."""
    modules = [
        module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "Attention" in type(module).__name__
        and "Cross" not in type(module).__name__
        and "ALL_ATTENTION_FUNCTIONS" in _source(type(module))
    ]
    if not modules:
        raise AttachError(
            f"model: got {type(decoder).__name__}, in which no module was found that calls the "
            "attention interface; this architecture is not supported"
        )
    return modules


def _source(cls: type) -> str:
    """The source of a class and of those of its bases that define an attention."""
    sources = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        try:
            sources.append(inspect.getsource(base))
        except (OSError, TypeError):
            continue
    return "\n".join(sources)
