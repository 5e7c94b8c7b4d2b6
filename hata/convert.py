"""`hata convert`: encoders that others trained, as safetensors files.

Read here are

- HATA's weights: a folder with one tensor `[Hkv, D, r]` per hashed layer in
  `hash_weight_layer_{layer:02d}.pt`; layers without a file are dense;
- HashAttention's state dictionaries (`.pt`): networks of queries and of keys per query head, named
  `{layer}.learning_to_hash_transformation_{q or k}.{head}.{0, 2, 4}.{weight or bias}`, with weights
  `[out, in]`;
- the same networks as a pickle (`.pkl`) of `{layer: {query_matrix, query_bias, key_matrix,
  key_bias}}`, each a list with one array per network layer, `[H, in, out]` and `[H, out]`.

Where the networks of the keys of a group are equal, as in a model with one KV head per query head
they trivially are, keys are hashed once; else once per query head.

Pickles are opened by readers that run no code (`hata.safe_pickle`, torch's restricted one).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hata.encoder import Encoder, Hidden, ModelShape, QueryHash
from hata.errors import EncoderError
from hata.safe_pickle import UnsafePickle, load_plain

_LAYER = re.compile(r"hash_weight_layer_(\d+)\.pt")
_PART = re.compile(
    r"(?:.*\.)?(\d+)\.learning_to_hash_transformation_([qk])\.(\d+)\.(\d+)\.(weight|bias)"
)
_SIDES = {"q": "query", "k": "key"}

# A network: weights `[H, in, out]` and biases `[H, out]`, from the first layer to the last.
Network = list[tuple[np.ndarray, np.ndarray]]


def convert(source: str | Path, config: str | Path) -> Encoder:
    """Make an encoder of published weights.

    Args:
        source: Folder of HATA's `hash_weight_layer_{layer}.pt` files, or HashAttention's file.
        config: The model's `config.json`, or the folder it is in.

    Raises:
        EncoderError: A file is absent, holds anything else, would run code, or does not fit the
            model.
    """
    source = Path(source)
    shape = ModelShape.of(_config(Path(config)))
    if source.suffix.lower() in (".pkl", ".pickle"):
        return _networks(source, shape, _of_pickle(source))
    if source.is_file():
        return _networks(source, shape, _of_state(source))
    return _hata(source, shape)


def _hata(source: Path, shape: ModelShape) -> Encoder:
    files = {
        int(match[1]): path
        for path in sorted(source.glob("*.pt"))
        if (match := _LAYER.fullmatch(path.name))
    }
    if not files:
        raise EncoderError(
            f"source: got {source}, which holds no hash_weight_layer_N.pt; expected a folder of "
            "HATA's weights, or a .pt or .pkl file of HashAttention's"
        )
    _check_layer(max(files), shape)
    projections: list[Any] = [None] * shape.num_layers
    for layer, path in files.items():
        projections[layer] = _tensor(path)
    bits = next(p.shape[-1] for p in projections if p is not None)
    made = {"recipe": "hata", "source": source.resolve().name}
    return Encoder(shape, bits, tuple(projections), made=made)


def _networks(source: Path, shape: ModelShape, layers: dict[int, dict[str, Network]]) -> Encoder:
    """An encoder of HashAttention's networks, `layer -> {"query": ..., "key": ...}`."""
    if not layers:
        raise EncoderError(
            f"source: got {source}, which holds no network of HashAttention's; expected names such "
            "as 0.learning_to_hash_transformation_q.0.0.weight"
        )
    _check_layer(max(layers), shape)
    count = shape.num_layers
    projections: list[Any] = [None] * count
    biases, queries = list(projections), list(projections)
    hidden: list[tuple[Hidden, ...]] = [()] * count
    for layer, sides in layers.items():
        if missing := {"query", "key"} - {side for side, network in sides.items() if network}:
            raise EncoderError(
                f"source: got {source} without the {missing.pop()} networks of layer {layer}; "
                "the file is damaged, fetch it again"
            )
        keys = _shared(sides["key"], shape)
        projections[layer], biases[layer] = keys[-1]
        hidden[layer] = tuple(Hidden(*one) for one in keys[:-1])
        *before, last = sides["query"]
        queries[layer] = QueryHash(*last, hidden=tuple(Hidden(*one) for one in before))
    bits = next(p.shape[-1] for p in projections if p is not None)
    made = {"recipe": "hashattention", "source": source.resolve().name}
    return Encoder(
        shape,
        bits,
        tuple(projections),
        tuple(biases),
        made=made,
        queries=tuple(queries),
        hidden=tuple(hidden),
    )


def _shared(network: Network, shape: ModelShape) -> Network:
    """The network of one head per group, where all of a group are equal."""
    group = shape.heads // shape.kv_heads
    for arrays in network:
        for array in arrays:
            if len(array) != shape.heads:
                return network
            cut = array.reshape(shape.kv_heads, group, *array.shape[1:])
            if not (cut == cut[:, :1]).all():
                return network
    return [(weight[::group], bias[::group]) for weight, bias in network]


def _of_state(path: Path) -> dict[int, dict[str, Network]]:
    """The networks of a state dictionary."""
    import torch

    found = _load(path, "a state dictionary of tensors")
    parts: dict[tuple[int, str, int, int, str], Any] = {}
    for name, tensor in found.items() if isinstance(found, dict) else ():
        match = _PART.fullmatch(str(name))
        if match and isinstance(tensor, torch.Tensor):
            layer, side, head, number, part = match.groups()
            key = (int(layer), _SIDES[side], int(head), int(number), part)
            parts[key] = tensor.float().numpy()
    layers: dict[int, dict[str, Network]] = {}
    for layer, side in sorted({key[:2] for key in parts}):
        heads = sorted({key[2] for key in parts if key[:2] == (layer, side)})
        numbers = sorted({key[3] for key in parts if key[:2] == (layer, side)})
        try:
            layers.setdefault(layer, {})[side] = [
                (
                    np.stack([parts[layer, side, head, n, "weight"].T for head in heads]),
                    np.stack([parts[layer, side, head, n, "bias"] for head in heads]),
                )
                for n in numbers
            ]
        except (KeyError, ValueError) as error:
            raise EncoderError(
                f"source: got {path} in which the {side} networks of layer {layer} are not whole, "
                f"or not alike ({error}); the file is damaged, fetch it again"
            ) from error
    return layers


def _of_pickle(path: Path) -> dict[int, dict[str, Network]]:
    """The networks of a pickle of arrays."""
    try:
        found = load_plain(path)
        return {
            int(layer): {
                side: [
                    (_array(weight), _array(bias))
                    for weight, bias in zip(
                        parts[f"{side}_matrix"], parts[f"{side}_bias"], strict=True
                    )
                ]
                for side in _SIDES.values()
            }
            for layer, parts in found.items()
        }
    except UnsafePickle as error:
        raise EncoderError(f"source: got {path}, {error}") from error
    # Whatever is in a damaged file, it is not what was asked for.
    except Exception as error:
        raise EncoderError(
            f"source: got {path}, which cannot be read as HashAttention's weights "
            f"({type(error).__name__}: {error}); expected a pickle of a dictionary of layers"
        ) from error


def _array(x: Any) -> np.ndarray:
    """An array of numbers as float32, a tensor as well."""
    return np.asarray(x.float() if hasattr(x, "requires_grad") else x, np.float32)


def _check_layer(last: int, shape: ModelShape) -> None:
    if last >= shape.num_layers:
        raise EncoderError(
            f"source: got weights of layer {last}, but the model has {shape.num_layers} "
            "layers; pass the config of the model they were trained for"
        )


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


def _load(path: Path, expected: str) -> Any:
    """What torch saved, read without running code."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Whatever a damaged or hostile pickle makes the reader raise, the file is refused.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EncoderError(
            f"source: got {path}, which cannot be read as {expected} ({reason}); expected a file "
            f"that torch.save wrote of {expected}"
        ) from error


def _tensor(path: Path) -> Any:
    import torch

    found = _load(path, "one tensor [Hkv, D, r]")
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        raise EncoderError(
            f"source: got {path} with {type(found).__name__} "
            f"{list(getattr(found, 'shape', []))}, expected a tensor [Hkv, D, r]"
        )
    return found.float().numpy()
