"""`hata convert`: encoders that others trained, as safetensors files.

Read here: HATA's weights, a folder with one tensor `[Hkv, D, r]` per hashed layer in
`hash_weight_layer_{layer:02d}.pt`. Layers without a file are dense. Pickles are opened by torch's
restricted reader, which runs no code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hata.encoder import Encoder, ModelShape
from hata.errors import EncoderError

_LAYER = re.compile(r"hash_weight_layer_(\d+)\.pt")


def convert(source: str | Path, config: str | Path) -> Encoder:
    """Make an encoder of HATA's per-layer weights.

    Args:
        source: Folder of `hash_weight_layer_{layer}.pt` files.
        config: The model's `config.json`, or the folder it is in.

    Raises:
        EncoderError: A file is absent, holds anything but one tensor, or does not fit the model.
    """
    source = Path(source)
    shape = ModelShape.of(_config(Path(config)))
    files = {
        int(match[1]): path
        for path in sorted(source.glob("*.pt"))
        if (match := _LAYER.fullmatch(path.name))
    }
    if not files:
        raise EncoderError(
            f"source: got {source}, which holds no hash_weight_layer_N.pt; expected a folder of "
            "HATA's weights"
        )
    if max(files) >= shape.num_layers:
        raise EncoderError(
            f"source: got weights of layer {max(files)}, but the model has {shape.num_layers} "
            "layers; pass the config of the model they were trained for"
        )
    projections: list[Any] = [None] * shape.num_layers
    for layer, path in files.items():
        projections[layer] = _tensor(path)
    bits = next(p.shape[-1] for p in projections if p is not None)
    made = {"recipe": "hata", "source": source.resolve().name}
    return Encoder(shape, bits, tuple(projections), made=made)


def _config(path: Path) -> SimpleNamespace:
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"config: got {path} ({error}), expected a model's config.json"
        ) from error
    return SimpleNamespace(**found.get("text_config", found))


def _tensor(path: Path) -> Any:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # Whatever a damaged or hostile pickle makes the reader raise, the file is refused.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EncoderError(
            f"source: got {path}, which cannot be read as one tensor ({reason}); expected a file "
            "that torch.save wrote of a tensor [Hkv, D, r]"
        ) from error
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        raise EncoderError(
            f"source: got {path} with {type(found).__name__} "
            f"{list(getattr(found, 'shape', []))}, expected a tensor [Hkv, D, r]"
        )
    return found.float().numpy()
