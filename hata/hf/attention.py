"""The attention function and the mask function that transformers calls under the name `hata`.

A decode step runs `hata.hash_attend` on a layer that has codes; every other step runs what the
model would run without us. Which of the two is decided from what the host knows: shapes, types,
and whether the mask hides left padding at most (`hata.hf.padding`). A key tensor that is not the
one our cache layer holds (another cache, a cache shared between layers, an offloaded one) is always
dense, so codes are never matched with keys they were not made of.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hata.errors import AttachError
from hata.hf.cache import HashDynamicLayer, HashStaticLayer
from hata.hf.padding import is_left_padding
from hata.hf.plan import LayerPlan

# Names with `flash`, `sdpa` or a slash take other paths inside transformers.
NAME = "hata"

# Arguments that change what a layer attends to in ways no op of ours knows.
_FOREIGN = ("sliding_window", "position_bias", "indices", "block_indices", "cache")


class Step:
    """What the forward pass under way brings; one per attached model, shared by its layers.

    Attributes:
        layers: The cache's layers, or `None` outside a forward pass or without a cache.
        left_padded: Whether this step's mask hides left padding at most.
        planned: The same, found where the mask of a compiled prefill was made.
        mask: The mask that `starts` was made of.
        starts: First visible key per row, `[B]` int64 on the device; made once per pass.
    """

    __slots__ = ("__weakref__", "layers", "left_padded", "mask", "planned", "starts")

    def __init__(self) -> None:
        self.planned = False
        self.clear()

    def clear(self) -> None:
        """Forget the pass, so that no cache outlives its owner."""
        self.layers: list[Any] | None = None
        self.left_padded = False
        self.mask: torch.Tensor | None = None
        self.starts: torch.Tensor | None = None

    def first_visible(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """`starts` for `hash_attend`, from a mask `[B, 1, 1, S]` with left padding at most."""
        if mask is not None and self.mask is not mask:
            self.mask = mask
            self.starts = mask[:, 0, -1].to(torch.uint8).argmax(-1)
        return None if mask is None else self.starts


class LayerState:
    """What an attention module is given: the pass under way, its plan, its dense attention.

    Attributes:
        step: The pass under way.
        index: The layer's place in the cache.
        plan: `None` where the layer stays dense.
        eager: The model's own eager attention function, if its module has one.
        prefers_eager: Whether the model ran it before it was attached.
    """

    __slots__ = ("eager", "index", "plan", "prefers_eager", "step")

    def __init__(
        self,
        step: Step,
        index: int,
        plan: LayerPlan | None,
        eager: Callable[..., Any] | None,
        prefers_eager: bool,
    ) -> None:
        self.step = step
        self.index = index
        self.plan = plan
        self.eager = eager
        self.prefers_eager = prefers_eager


# Which pass a configuration's masks belong to; configurations cannot be hashed.
_steps: WeakValueDictionary[int, Step] = WeakValueDictionary()


def watch_masks(config: Any, step: Step) -> None:
    """Let masks that are made for `config` tell `step` what they hide."""
    _steps[id(config)] = step


def shares_config(config: Any) -> bool:
    """Whether masks of this configuration are watched already."""
    return id(config) in _steps


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function beside a module's class, or beside a class it derives from."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def hash_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention signature: `query [B, H, T, D]` -> `([B, T, H, Dv], None)`."""
    state = getattr(module, "_hata", None)
    if state is None:
        # A model that shares its configuration with an attached one, or was loaded under our name.
        warnings.warn(
            f'attn_implementation: "{NAME}" on a {type(module).__name__} that nothing is attached '
            "to; it runs dense attention; call hata.hf.attach(model), or give the model a "
            "configuration of its own",
            stacklevel=2,
        )
        state = LayerState(Step(), 0, None, eager_function(module), False)
    layer = _hashed_layer(state, query, key, attention_mask, dropout, kwargs)
    if layer is None:
        return _dense(state, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    sinks = kwargs.get("s_aux")
    out = layer.attend(
        query,
        state.step.first_visible(attention_mask),
        scaling,
        kwargs.get("softcap"),
        None if sinks is None else sinks.detach(),
    )
    return out.transpose(1, 2).contiguous(), None


def _hashed_layer(
    state: LayerState,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> HashDynamicLayer | HashStaticLayer | None:
    """The cache layer to attend with, or `None` for a dense step."""
    step, plan = state.step, state.plan
    if plan is None or step.layers is None or query.shape[2] != 1 or dropout:
        return None
    layer = step.layers[state.index] if state.index < len(step.layers) else None
    if not isinstance(layer, (HashDynamicLayer, HashStaticLayer)):
        return None
    if layer.plan is not plan or layer.keys is not key or query.dtype != key.dtype:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return None
    for name in _FOREIGN:
        if kwargs.get(name) is not None:
            return None
    if mask is not None and not (
        step.left_padded and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
    ):
        return None
    if isinstance(layer, HashDynamicLayer) and key.shape[2] <= plan.dense_below:
        return None
    return layer


def _dense(
    state: LayerState,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention: SDPA, or its eager function where SDPA would leave things out."""
    capped = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if not (state.prefers_eager or capped):
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if state.eager is None:
        raise AttachError(
            f"model: {type(module).__name__} uses a soft cap or attention sinks, but its module "
            "has no eager_attention_forward for dense steps; this model cannot be attached to"
        )
    mask = _additive(mask, query, key)
    return state.eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _additive(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The float mask that eager functions add to their logits."""
    tokens, slots = query.shape[2], key.shape[2]
    if mask is None:
        if tokens == 1:
            return None
        # The mask is left out only where query t sees the first t + 1 keys.
        mask = torch.ones((1, 1, tokens, slots), dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def hash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask signature: the boolean mask of SDPA, `[B, 1, T, S]` or `None`.

    Without a mask function under our name, transformers would pass no mask at all and padding
    would be attended to.
    """
    step = _steps.get(id(kwargs.get("config")))
    if step is not None and q_length > 1 and not torch.compiler.is_compiling():
        # With a static cache, masks are made outside a forward pass that may be compiled whole
        # and then cannot look at them.
        step.planned = attention_mask is None or is_left_padding(
            attention_mask, attention_mask.shape[-1]
        )
    return sdpa_mask(
        batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs
    )


def register() -> None:
    """Make both functions known to transformers."""
    AttentionInterface.register(NAME, hash_attention_forward)
    AttentionMaskInterface.register(NAME, hash_mask)


register()
