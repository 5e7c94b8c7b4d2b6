"""`HashedAttention`: what answers the attention call of one planned layer.

A decode step runs `hata.hash_attend` where the layer has codes and nothing speaks against it; every
other step runs the function that the model would have run. Which of the two is decided from what
the host knows: shapes, types, and whether the mask hides left padding at most (`hata.hf.padding`).
Keys and values that are not the ones that our cache layer holds (another cache, a cache shared
between layers, latent attention) are always attended to densely, so codes are never matched with
keys they were not made of.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hata.errors import AttachError
from hata.hf import passes, report
from hata.hf.cache import HashStaticLayer
from hata.hf.intercept import Function
from hata.hf.padding import can_look, is_known
from hata.hf.plan import LayerPlan
from hata.hf.report import LayerRecord

# Arguments of attention functions that change nothing of a decode step, or that our ops know.
# With any other that is given a value, the model's own function runs.
_KNOWN = frozenset(
    (
        "cache_position",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "s_aux",
        "scaling",
        "softcap",
        "use_cache",
    )
)


class HashedAttention:
    """What one planned layer attends with; `answer` is its handler, see `hata.hf.intercept`."""

    __slots__ = ("_known", "_plan", "_record")

    def __init__(self, plan: LayerPlan, record: LayerRecord) -> None:
        self._plan = plan
        self._record = record
        # The function that was found to be known last.
        self._known: Function | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HashedAttention:
        twin = memo[id(self)] = HashedAttention(self._plan, copy.deepcopy(self._record, memo))
        return twin

    def __reduce__(self) -> Any:
        raise AttachError(
            "model: it is attached and cannot be pickled; detach it first, or save it with "
            "save_pretrained"
        )

    def answer(
        self, own: Function, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Attention of `query [B, H, T, D]` -> `([B, T, H, Dv], None)`, or what `own` returns."""
        compiling = torch.compiler.is_compiling()
        step = passes.of_compiler if compiling else passes.of_thread
        layer, step.layer = step.layer, None
        if len(args) != 4:
            why = "arguments of its attention that are not known"
        elif args[0].size(2) != 1:
            why = self._why_several(step, layer, module, args)
        else:
            why = self._why_dense(step, layer, module, args)
            if why is None:
                why = self._why_unknown(own, module, kwargs, compiling)
        if why is not None:
            (self._record.compiled if compiling else self._record.dense)(why)
            return own(module, *args, **kwargs)
        query, _, _, mask = args
        starts = None if mask is None or not step.masked else step.first_visible(mask)
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if own is sdpa_attention_forward:
            # It knows neither, and so does a model that runs it: earlier releases ignore them.
            softcap = sinks = None
        if sinks is not None:
            sinks = sinks.detach()
        out = layer.attend(query, starts, kwargs.get("scaling"), softcap, sinks)
        if compiling:
            self._record.compiled(report.HASHED)
        else:
            self._record.hashed(query)
        return out.transpose(1, 2).contiguous(), None

    def _why_dense(
        self, step: passes.Pass, layer: Any, module: nn.Module, args: tuple[Any, ...]
    ) -> str | None:
        """Why a step of one token runs dense, as far as its tensors tell; `None` for hashing."""
        plan = self._plan
        query, key, value, mask = args
        if module.training:
            return report.TRAINING
        if type(layer) is not HashStaticLayer and key.size(2) <= plan.dense_below:
            return report.SHORT
        if layer is None:
            return step.why or report.NOT_CACHED
        if layer.plan is not plan:
            return report.OTHER_PLAN
        if layer.why is not None:
            return layer.why
        if layer.keys is not key or layer.values is not value:
            return report.NOT_CACHED
        dtype = query.dtype
        if key.dtype != dtype or value.dtype != dtype:
            return report.DTYPES
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
        ):
            return report.GRADIENTS
        if step.weights:
            return report.WEIGHTS
        return None if mask is None else _why_masked(step, layer, mask)

    def _why_several(
        self, step: passes.Pass, layer: Any, module: nn.Module, args: tuple[Any, ...]
    ) -> str:
        """Why a step of several tokens runs dense; looks at its mask, for the steps that follow."""
        _, key, _, mask = args
        if module.training:
            return report.TRAINING
        if layer is None:
            lost = step.why == report.NO_CACHE and key.size(2) > self._plan.dense_below
            return report.NO_CACHE if lost else report.PREFILL
        if mask is None:
            layer.left_padded = True
        elif torch.compiler.is_compiling():
            # Its values cannot be read; they may have been where it was made.
            layer.left_padded, layer.foreseen = layer.foreseen, None
        else:
            layer.left_padded = layer.only_hides = None
            _why_masked(step, layer, mask)
        return report.PREFILL

    def _why_unknown(
        self, own: Function, module: nn.Module, kwargs: dict[str, Any], compiling: bool
    ) -> str | None:
        """Why a call may ask for more than attention, as far as its function and options tell."""
        for name, given in kwargs.items():
            if name not in _KNOWN and given is not None and given is not False:
                return f"an argument of its attention that is not known: {name}"
        if own is self._known and not compiling:
            return None
        home = getattr(getattr(own, "func", own), "__module__", None) or ""
        if not home.startswith("transformers.") and home != type(module).__module__:
            return f"an attention function of its own: {getattr(own, '__qualname__', own)}"
        if not compiling:
            self._known = own
        return None


def _why_masked(step: passes.Pass, layer: Any, mask: Any) -> str | None:
    """Why a mask keeps a decode step dense, if it does; looks at it where it can be read."""
    if not is_known(mask):
        return report.MASK
    # On a CPU every step looks; elsewhere one that comes with several tokens, or the first.
    look = can_look(mask)
    always = look and mask.device.type == "cpu"
    if mask.dim() == 4 and mask.dtype != torch.bool:
        if always or (look and layer.only_hides is None):
            layer.only_hides = step.only_hides(mask)
        if not layer.only_hides:
            return report.UNSEEN if layer.only_hides is None else report.BIAS
    if always or (look and layer.left_padded is None):
        layer.left_padded = step.hides_left_padding_alone(mask, layer.total())
    if layer.left_padded is None and step.masked:
        return report.UNSEEN
    return report.HOLES if layer.left_padded is False else None
