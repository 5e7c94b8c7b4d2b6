"""Seeing the queries and keys of a model, after rotary embedding, while it reads text.

The call of each layer's attention is taken (`hata.hf.intercept`): a visitor is shown what it was
given, then the model's own function runs. The model keeps its attention and its masks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hata.calibration.text import first_line
from hata.errors import AttachError, CaptureError
from hata.hf import models
from hata.hf.intercept import Function, Interception

# Layer, q `[B, H, T, D]`, keys `[B, Hkv, T, D]`, scale of the logits.
Visitor = Callable[[int, torch.Tensor, torch.Tensor, float], None]


def load_model(
    model: str | Path, device: str, dtype: str | None = None, *, config: Any = None
) -> Any:
    """A model as it is, in evaluation mode.

    Args:
        model: Its folder; where `config` is given, only a name for errors.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or `"spread"`: over all GPUs, by accelerate.
        dtype: Of its weights; unless given float32 on a CPU, elsewhere its own.
        config: Make a model of random weights of this configuration instead.

    Raises:
        CaptureError: It cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spread = device == "spread"
    try:
        if config is not None:
            with torch.device("meta" if spread else device):
                return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(model).expanduser(),
            dtype=dtype or ("float32" if device == "cpu" else "auto"),
            local_files_only=True,
            **({"device_map": "auto"} if spread else {}),
        )
        return (loaded if spread else loaded.to(device)).eval()
    # A model folder can be broken in ways only its own code knows.
    except Exception as error:
        why = first_line(error)
        if config is None and not (Path(model).expanduser() / "config.json").is_file():
            why = "it is no folder with config.json, nor the name of a model in transformers' cache"
        raise CaptureError(f"--model: {model} cannot be loaded: {why}") from None


def read(model: Any, ids: torch.Tensor, visit: Visitor) -> None:
    """Let a model read one batch, without a cache and without its output layer.

    Args:
        model: Of `load_model`.
        ids: `[B, T]`.
        visit: Is shown every layer.

    Raises:
        CaptureError: It has no attention that can be seen.
    """

    def attend(
        own: Function, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        query, key = args[:2]
        if query.shape[2] == key.shape[2]:
            scaling = kwargs.get("scaling")
            scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
            visit(module.layer_idx, query, key, scale)
        return own(module, *args, **kwargs)

    try:
        found = models.attention_modules(models.inside(model).get_decoder())
    except AttachError as error:
        raise CaptureError(f"--{error}") from None
    taken = Interception({module: attend for modules in found.values() for module in modules})
    try:
        with torch.inference_mode():
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        taken.close()
