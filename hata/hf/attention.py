"""`HashedAttention`: what answers the attention call of one planned layer.

A decode step runs `hata.hash_attend` where the layer has codes and nothing speaks against it; every
other step runs the function that the model would have run. Which of the two is decided from what
the host knows: shapes, types, and whether the mask hides left padding at most (`hata.hf.masks`).
Keys and values that are not the ones that our cache layer holds (another cache, a cache shared
between layers, latent attention) are always attended to densely, so codes are never matched with
keys they were not made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hata
from hata.hf import forward_pass, masks, reasons
from hata.hf.cache import CannotCapture, HashStaticLayer, StepLayer
from hata.hf.forward_pass import ForwardPass
from hata.hf.intercept import Function
from hata.hf.layer_plan import DensePlan, LayerPlan
from hata.hf.layer_report import CAPTURED, HASHED, LayerRecord

# Arguments of attention functions that change nothing of a decode step, or that our ops know.
# With any other that is given a value, the model's own function runs.
_NAMES = """
cache_position dropout is_causal logits_to_keep num_items_in_batch output_hidden_states
output_router_logits position_embeddings position_ids return_dict s_aux scaling softcap use_cache
"""
_KNOWN = frozenset(_NAMES.split())


class HashedAttention:
    """What one planned layer attends with; `answer` is its handler, see `hata.hf.intercept`."""

    def __init__(self, plan: LayerPlan | DensePlan, record: LayerRecord) -> None:
        self._record, self._plan = record, plan
        self._done = HASHED if plan.selection else reasons.DENSE
        # The function that was found to be known last.
        self._known: Function | None = None

    def answer(
        self, own: Function, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Attention of `query [B, H, T, D]` -> `([B, T, H, Dv], None)`, or what `own` returns."""
        compiling = torch.compiler.is_compiling()
        step = forward_pass.of_compiler if compiling else forward_pass.of_thread
        layer, step.layer = step.layer, None
        if len(args) != 4:
            why = "arguments of its attention that are not known"
        elif module.training:
            why = reasons.TRAINING
        elif args[0].shape[2] != 1:
            why = self._why_several(step, layer, args)
        else:
            why = self._why_dense(step, layer, args)
            why = why or self._why_unknown(own, module, kwargs, compiling)
        if why is not None and type(layer) is StepLayer:
            raise CannotCapture(why)
        if why is not None:
            self._record.ran(why, compiling)
            return own(module, *args, **kwargs)
        query, _, _, mask = args
        starts = layer.starts
        if mask is not None and step.masked:
            starts = step.of_mask(masks.first_visible, mask)
        logits = {"scale": kwargs.get("scaling")}
        # SDPA knows neither of these, nor does a model that runs it: earlier releases ignore them.
        if own is not sdpa_attention_forward:
            sinks = kwargs.get("s_aux")
            logits["sink_logits"] = None if sinks is None else sinks.detach()
            logits["softcap"] = kwargs.get("softcap")
        out = _attend(layer, query, starts, **logits)
        if type(layer) is StepLayer:
            # Its steps are counted where they run.
            return out.transpose(1, 2).contiguous(), None
        captured = not compiling and query.is_cuda and torch.cuda.is_current_stream_capturing()
        self._record.ran(CAPTURED if captured else self._done, compiling)
        return out.transpose(1, 2).contiguous(), None

    def _why_dense(self, step: ForwardPass, layer: Any, args: tuple[Any, ...]) -> str | None:
        """Why a step of one token runs dense, as far as its tensors tell; `None` for hashing."""
        plan = self._plan
        query, key, value, mask = args
        if not isinstance(layer, HashStaticLayer) and key.shape[2] <= plan.dense_below:
            return reasons.SHORT
        if layer is None:
            return step.why or reasons.NOT_CACHED
        if layer.plan is not plan:
            return reasons.OTHER_PLAN
        if layer.why is not None:
            return layer.why
        if layer.keys is not key or layer.values is not value:
            return reasons.NOT_CACHED
        if not query.dtype == key.dtype == value.dtype:
            return reasons.DTYPES
        if torch.is_grad_enabled() and any(given.requires_grad for given in (query, key, value)):
            return reasons.GRADIENTS
        if step.weights:
            return reasons.WEIGHTS
        if mask is None or type(layer) is StepLayer:
            return None
        return _why_masked(step, layer, mask)

    def _why_several(self, step: ForwardPass, layer: Any, args: tuple[Any, ...]) -> str:
        """Why a step of several tokens runs dense; looks at its mask, for the steps that follow."""
        _, key, _, mask = args
        if layer is None:
            lost = step.why == reasons.NO_CACHE and key.shape[2] > self._plan.dense_below
            return reasons.NO_CACHE if lost else reasons.PREFILL
        if mask is None:
            layer.left_padded = True
        elif torch.compiler.is_compiling():
            # Its values cannot be read; they may have been where it was made.
            layer.left_padded, layer.foreseen = layer.foreseen, None
        else:
            layer.left_padded = layer.only_hides = None
            _why_masked(step, layer, mask)
        return reasons.PREFILL

    def _why_unknown(
        self, own: Function, module: nn.Module, kwargs: dict[str, Any], compiling: bool
    ) -> str | None:
        """Why a call may ask for more than attention, as far as its function and options tell."""
        for name, given in kwargs.items():
            if name not in _KNOWN and given is not None and given is not False:
                return f"an argument of its attention that is not known: {name}"
        if compiling or own is not self._known:
            home = getattr(getattr(own, "func", own), "__module__", None) or ""
            if not home.startswith("transformers.") and home != type(module).__module__:
                return f"an attention function of its own: {getattr(own, '__qualname__', own)}"
            if not compiling:
                self._known = own
        return None


def _attend(layer: Any, query: torch.Tensor, starts: Any, **logits: Any) -> torch.Tensor:
    """Attention of one query per row over a cache layer, `[B, H, 1, D]` -> `[B, H, 1, Dv]`."""
    plan, hasher, keys, values = layer.plan, layer.hasher, layer.keys, layer.values
    codes, norms, fresh, lengths = layer.ready()
    if plan.selection is None:
        seen = {"lengths": lengths, "starts": starts}
        return hata.hash_attend(query, keys, values, **plan.options(keys), **seen, **logits)
    q_codes = hasher.query_codes(query)
    seen = {"lengths": lengths, "starts": starts, "key_norms": norms}
    if hasher.key_heads == plan.kv_heads:
        more = {"q_codes": q_codes, "fresh": fresh, **hasher.attend_options, **seen, **logits}
        out = hata.hash_attend(query, keys, values, codes, **more)
    else:
        # One key code per query head: no fused op knows those, the three steps do.
        indices = hata.hamming_topk(q_codes, codes, **seen, **plan.budget)
        out = hata.sparse_attend(query, keys, values, indices, **logits)
    layer.attended()
    return out


def _why_masked(step: ForwardPass, layer: Any, mask: Any) -> str | None:
    """Why a mask keeps a decode step dense, if it does; looks at it where it can be read."""
    if not masks.is_known(mask):
        return reasons.MASK
    # On a CPU every step looks; elsewhere one that comes with several tokens, or the first.
    look = masks.can_look(mask)
    always = look and mask.device.type == "cpu"
    if mask.dim() == 4 and mask.dtype != torch.bool:
        if always or (look and layer.only_hides is None):
            layer.only_hides = step.of_mask(masks.only_hides, mask)
        if not layer.only_hides:
            return reasons.UNSEEN if layer.only_hides is None else reasons.BIAS
    if always or (look and layer.left_padded is None):
        layer.left_padded = step.of_mask(masks.is_left_padding, mask, layer.total())
    if layer.left_padded is None and step.masked:
        return reasons.UNSEEN
    return reasons.HOLES if layer.left_padded is False else None
