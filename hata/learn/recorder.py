"""Seeing the queries and keys of a model, after rotary embedding, while it reads text.

transformers hands them to its attention function, so ours is one that shows them to a visitor and
then does what the model would have done. No weight and no module is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from hata.learn.text import CaptureError, first_line

_NAME = "hata_capture"

# Layer, q `[B, H, T, D]`, keys `[B, Hkv, T, D]`, scale of the logits.
Visitor = Callable[[int, torch.Tensor, torch.Tensor, float], None]


class Recorder:
    """An attention function that shows what it is given.

    Attributes:
        visit: Called for every layer of every forward pass.
        refused: Layer -> why it was not shown.
    """

    def __init__(self, visit: Visitor) -> None:
        self.visit = visit
        self.refused: dict[int, str] = {}

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """transformers' attention signature."""
        layer = module.layer_idx
        if kwargs.get("sliding_window") is not None:
            self.refused[layer] = "it attends to a sliding window"
        elif query.shape[2] == key.shape[2]:
            scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
            self.visit(layer, query, key, scale)
        attend = sdpa_attention_forward
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            # SDPA would leave both out; the model's own function wants a mask to add.
            attend = sys.modules[type(module).__module__].eager_attention_forward
            if attention_mask is None:
                attention_mask = query.new_ones((1, 1, query.shape[2], key.shape[2])).tril() > 0
            if not attention_mask.is_floating_point():
                attention_mask = (~attention_mask).to(query.dtype) * -1e30
        return attend(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )


def load_model(model: str | Path, device: str, config: Any = None) -> Any:
    """A model that shows its queries and keys, in evaluation mode.

    Args:
        model: Its folder; where `config` is given, only a name for errors.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or `"spread"`: over all GPUs, by accelerate.
        config: Make a model of random weights of this configuration instead.

    Raises:
        CaptureError: It cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register(_NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    try:
        if config is not None:
            with torch.device("meta" if device == "spread" else device):
                made = AutoModelForCausalLM.from_config(
                    config, dtype=config.dtype, attn_implementation=_NAME
                )
            return made.eval()
        spread = {"device_map": "auto"} if device == "spread" else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(model).expanduser(),
            dtype=dtype,
            attn_implementation=_NAME,
            local_files_only=True,
            **spread,
        )
        return (loaded if spread else loaded.to(device)).eval()
    # A model folder can be broken in ways only its own code knows.
    except Exception as error:
        raise CaptureError(f"--model: {model} cannot be loaded: {first_line(error)}") from None


def read(model: Any, ids: torch.Tensor, recorder: Recorder) -> None:
    """Let a model of `load_model` read one batch, without a cache and without its output layer.

    Args:
        model: The model.
        ids: `[B, T]`.
        recorder: Is shown every layer.
    """
    AttentionInterface.register(_NAME, recorder)
    try:
        with torch.inference_mode():
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        AttentionInterface.register(_NAME, sdpa_attention_forward)


def cached_otherwise(model: Any) -> dict[int, str]:
    """Layers whose cache holds no keys as they are attended to, and why, by reading two tokens.

    Multi-head latent attention caches what keys are made of. Decoding hashes what is in the cache,
    so an encoder of such keys could never be used.

    Raises:
        CaptureError: The model cannot read.
    """
    shown: dict[int, tuple[int, int]] = {}

    def keep(layer: int, q: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        shown[layer] = (keys.shape[1], keys.shape[3])

    AttentionInterface.register(_NAME, Recorder(keep))
    try:
        with torch.inference_mode():
            ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
            cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    # Models fail in ways only their own code knows, where sizes do not fit one another.
    except Exception as error:
        raise CaptureError(
            f"--model: {type(model).__name__} cannot read with its cache ({first_line(error)}); "
            "check its config.json and weights"
        ) from error
    finally:
        AttentionInterface.register(_NAME, sdpa_attention_forward)
    layers = getattr(cache, "layers", [])
    found = {}
    for layer, (heads, size) in shown.items():
        cached = getattr(layers[layer], "keys", None) if layer < len(layers) else None
        if isinstance(cached, torch.Tensor) and cached.dim() == 4:
            there = (cached.shape[1], cached.shape[3])
            if there != (heads, size):
                found[layer] = (
                    f"its cache holds {there[0]} heads of size {there[1]}, but it attends to keys "
                    f"of {heads} heads of size {size} (latent attention)"
                )
    return found
