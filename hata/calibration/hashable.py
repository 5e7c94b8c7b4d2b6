"""Which layers of a model can be hashed.

`hata.hf.attach` is asked, and what it says or does is told, so that nothing is learned or measured
that could not be attached, and the reasons are the same everywhere.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hata.hf
from hata.calibration.text import first_line
from hata.errors import AttachError, CaptureError, EncoderError
from hata.hf.layer_report import LayerReport
from hata.hf.models import cache_among, cache_argument, is_tested
from hata.hf.reasons import NEVER_CALLED, NOT_CACHED, PREFILL, SHORT
from hata.selection import Selection

# A budget of one key, so that the third token is hashed in every layer that can be.
_EVERY = Selection(bits=32, k=1, dense_layers=0)


def check_config(config: Any) -> None:
    """Raise `CaptureError` where a configuration alone tells that no layer can be hashed.

    Args:
        config: Of a decoder. A model is made of it that has no weights.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            made = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    # Configurations can be wrong in ways only the model's own code knows.
    except Exception as error:
        raise CaptureError(
            f"--model: no model can be made of its config.json: {first_line(error)}"
        ) from None
    dense_layers(made)


def dense_layers(model: Any) -> dict[int, str]:
    """Layers that cannot be hashed, and why, as attaching the model and reading three tokens shows.

    Args:
        model: A loaded one; not attached.

    Raises:
        CaptureError: No layer can be hashed, the model cannot be attached to, or it cannot read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = _attached(model)
    dense = {layer: why for layer, why in layers.items() if why}
    if len(dense) == len(layers):
        raise CaptureError(
            f"--model: no layer of {type(model).__name__} can be hashed: "
            f"{'; '.join(dict.fromkeys(dense.values()))}"
        )
    return dense


def _attached(model: Any) -> dict[int, str]:
    """Every layer, and why it is dense, if it is; one without weights is not tried."""
    try:
        with hata.hf.attach(model, selection=_EVERY, check=False) as handle:
            if model.device.type == "meta":
                return {layer.layer: layer.why for layer in handle.report().layers}
            _read(model)
            layers = {layer.layer: _why(layer) for layer in handle.report().layers}
        if not is_tested(model.config) and not all(layers.values()):
            hata.hf.check_model(model, handle.encoder)
        return layers
    except (AttachError, EncoderError) as error:
        raise CaptureError(f"--model: {first_line(error).removeprefix('model: ')}") from None
    # Models fail in ways only their own code knows, where sizes do not fit one another.
    except Exception as error:
        raise CaptureError(
            f"--model: {type(model).__name__} cannot read with its cache ({first_line(error)}); "
            "check its config.json and weights"
        ) from error


def _read(model: Any) -> None:
    """Two tokens at once, then one more."""
    ids = torch.zeros((1, 3), dtype=torch.int64, device=model.device)
    decoder = model.base_model
    with torch.no_grad():
        cache = cache_among(decoder(input_ids=ids[:, :2], use_cache=True))
        decoder(input_ids=ids[:, 2:], use_cache=True, **{cache_argument(decoder): cache})


def _why(layer: LayerReport) -> str:
    if layer.why or layer.hashed:
        return layer.why
    if not layer.dense:
        return NEVER_CALLED
    return next((why for why in layer.dense if why not in (PREFILL, SHORT)), NOT_CACHED)
