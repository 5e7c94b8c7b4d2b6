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

Pickles are opened by readers that run no code (`hata.encoder.pickles`, torch's restricted one).
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hata.encoder import Encoder, Hidden, ModelShape, QueryHash
from hata.encoder.encoder import of_layers
from hata.encoder.layer import LayerHash
from hata.encoder.pickles import UnsafePickle, array, load_plain, shown
from hata.errors import EncoderError

_LAYER = re.compile(r"hash_weight_layer_([0-9]+)\.pt")
_PART = re.compile(
    r"(?:.*\.)?([^.]+)\.learning_to_hash_transformation_([qk])\.([^.]+)\.([^.]+)\.(weight|bias)"
)
_SIDES = {"q": "query", "k": "key"}
_EXPECTED = "a folder of HATA's weights, or a .pt or .pkl file of HashAttention's"

# More layers than an encoder file may hold are of no use.
_MOST_NETWORK = 17

# A network: weights `[H, in, out]` and biases `[H, out]`, from the first layer to the last.
Network = list[Hidden]


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
    try:
        folder, file = source.is_dir(), source.is_file()
        reason = "is neither a file nor a folder" if source.exists() else "does not exist"
    # A name that is too long, or with a NUL; a folder that may not be looked into.
    except (OSError, ValueError) as error:
        folder, file, reason = False, False, f"cannot be looked at ({error})"
    if not folder and not file:
        raise EncoderError(f"source: got {source}, which {reason}; expected {_EXPECTED}")
    if folder:
        encoder = _hata(source, shape)
    else:
        pickled = source.suffix.lower() in (".pkl", ".pickle")
        encoder = _networks(source, shape, (_of_pickle if pickled else _of_state)(source))
    _check_zeros(source, encoder)
    return encoder


def _hata(source: Path, shape: ModelShape) -> Encoder:
    files: dict[int, Path] = {}
    for path in sorted(source.glob("*.pt")):
        if match := _LAYER.fullmatch(path.name):
            layer = _number(match[1], f"source: got {path} of ")
            if layer in files:
                raise EncoderError(
                    f"source: got {source} with both {files[layer].name} and {path.name}, expected "
                    "one file per layer; delete the wrong one"
                )
            files[layer] = path
    if not files:
        raise EncoderError(
            f"source: got {source}, which holds no hash_weight_layer_N.pt; expected {_EXPECTED}"
        )
    _check_layer(max(files), shape)
    projections = {layer: _tensor(path) for layer, path in files.items()}
    bits = next(iter(projections.values())).shape[-1]
    made = {"recipe": "hata", "source": source.resolve().name}
    every = tuple(projections.get(layer) for layer in range(shape.num_layers))
    return Encoder(shape, bits, every, made=made)


def _networks(source: Path, shape: ModelShape, layers: dict[int, dict[str, Network]]) -> Encoder:
    """An encoder of HashAttention's networks, `layer -> {"query": ..., "key": ...}`."""
    if not layers:
        raise EncoderError(
            f"source: got {source}, which holds no network of HashAttention's; expected names such "
            "as 0.learning_to_hash_transformation_q.0.0.weight"
        )
    _check_layer(max(layers), shape)
    found = [LayerHash(None)] * shape.num_layers
    bits = 0
    for layer, sides in layers.items():
        if missing := {"query", "key"} - {side for side, network in sides.items() if network}:
            raise EncoderError(
                f"source: got {source} without the {missing.pop()} networks of layer {layer}; "
                "the file is damaged, fetch it again"
            )
        for side, network in sides.items():
            for weight, bias in network:
                if weight.ndim != 3 or bias.shape != (weight.shape[0], weight.shape[2]):
                    raise EncoderError(
                        f"source: got {source} in which the {side} networks of layer {layer} have "
                        f"weights of shape {weight.shape} and biases of shape {bias.shape}, "
                        "expected (heads, in, out) and (heads, out)"
                    )
        *hidden, (projection, bias) = _shared(sides["key"], shape)
        *before, last = sides["query"]
        query = QueryHash(*last, hidden=tuple(before))
        found[layer] = LayerHash(projection, bias, query, tuple(hidden))
        bits = bits or projection.shape[-1]
    made = {"recipe": "hashattention", "source": source.resolve().name}
    return of_layers(shape, bits, found, made=made)


def _shared(network: Network, shape: ModelShape) -> Network:
    """The network of one head per group, where all of a group are equal."""
    group = shape.heads // shape.kv_heads
    for one in itertools.chain.from_iterable(network):
        if len(one) != shape.heads:
            return network
        cut = one.reshape(shape.kv_heads, group, *one.shape[1:])
        if not (cut == cut[:, :1]).all():
            return network
    return [Hidden(weight[::group], bias[::group]) for weight, bias in network]


def _of_state(path: Path) -> dict[int, dict[str, Network]]:
    """The networks of a state dictionary."""
    found = _load(path, "a state dictionary of tensors")
    # {(layer, side): {(number of the network layer, weight or bias): {head: array}}}
    parts: dict[tuple[int, str], dict[tuple[int, str], dict[int, np.ndarray]]] = {}
    for name, tensor in found.items() if isinstance(found, dict) else ():
        match = _PART.fullmatch(name) if isinstance(name, str) else None
        if not match:
            continue
        what = f"source: got {path} with {shown(name)}, of "
        layer, head, number = (_number(match[i], what) for i in (1, 3, 4))
        side, part = _SIDES[match[2]], match[5]
        heads = parts.setdefault((layer, side), {}).setdefault((number, part), {})
        if head in heads:
            raise EncoderError(
                f"source: got {path} with {shown(name)} twice, under another prefix or number; "
                "expected one model's networks"
            )
        heads[head] = _floats(tensor, f"{path} with {shown(name)}")
    layers: dict[int, dict[str, Network]] = {}
    for (layer, side), named in sorted(parts.items()):
        try:
            layers.setdefault(layer, {})[side] = _stacked(named)
        except ValueError as error:
            raise EncoderError(
                f"source: got {path} in which the {side} networks of layer {layer} are not whole, "
                f"or not alike ({error}); the file is damaged, fetch it again"
            ) from error
    return layers


def _stacked(named: dict[tuple[int, str], dict[int, np.ndarray]]) -> Network:
    """The network of all heads, of its parts by number and name, and each by head.

    Raises:
        ValueError: A head, a layer or a part is missing, or shapes differ.
    """
    numbers = sorted({number for number, _ in named})
    # Between two layers stands an activation, which has no weights but counts.
    if numbers != list(range(0, 2 * len(numbers), 2)):
        raise ValueError(f"got network layers {numbers[:20]}, expected 0, 2, 4 and so on")
    count = len(next(iter(named.values())))

    def stacked(number: int, part: str) -> np.ndarray:
        heads = named.get((number, part), {})
        if sorted(heads) != list(range(count)):
            raise ValueError(
                f"{number}.{part} of heads {sorted(heads)[:20]}, expected {count} from 0"
            )
        return np.stack([heads[head].T for head in range(count)])

    return [Hidden(stacked(number, "weight"), stacked(number, "bias")) for number in numbers]


def _of_pickle(path: Path) -> dict[int, dict[str, Network]]:
    """The networks of a pickle of arrays."""
    try:
        found = load_plain(path)
        if not isinstance(found, dict):
            raise TypeError(f"got {type(found).__name__}, expected a dictionary of layers")
        layers: dict[int, dict[str, Network]] = {}
        for name, parts in found.items():
            layer = _number(name, "got a layer of ")
            if layer in layers:
                raise ValueError(f"got layer {layer} twice")
            layers[layer] = {side: _sides(parts, side) for side in _SIDES.values()}
        return layers
    except UnsafePickle as error:
        raise EncoderError(f"source: got {path}, {error}") from error
    # Whatever is in a damaged file, it is not what was asked for.
    except Exception as error:
        raise EncoderError(
            f"source: got {path}, which cannot be read as HashAttention's weights "
            f"({type(error).__name__}: {shown(error)}); expected a pickle of a dictionary of layers"
        ) from error


def _sides(parts: Any, side: str) -> Network:
    """The network of one side of a pickled layer."""
    if not isinstance(parts, dict):
        raise TypeError(f"got a layer of type {type(parts).__name__}, expected a dictionary")
    weights, biases = parts[f"{side}_matrix"], parts[f"{side}_bias"]
    for found in (weights, biases):
        if not isinstance(found, list | tuple) or len(found) > _MOST_NETWORK:
            raise TypeError(f"got no list of at most {_MOST_NETWORK} arrays")
    return [Hidden(array(w), array(b)) for w, b in zip(weights, biases, strict=True)]


def _number(name: Any, what: str = "") -> int:
    """The number of a layer or a head, a whole number or the digits of one.

    Raises:
        EncoderError: It is anything else; `what` stands before it.
    """
    if isinstance(name, str) and re.fullmatch("[0-9]{1,6}", name):
        return int(name)
    if type(name) is int and 0 <= name < 1_000_000:
        return name
    found = shown(name) if isinstance(name, str | int | float) else type(name).__name__
    raise EncoderError(f"{what}number {found}, expected a whole number from 0 to 999999")


def _floats(tensor: Any, what: str) -> np.ndarray:
    """The numbers of a torch tensor as float32; `what` names it in errors."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise EncoderError(f"source: got {what} of {type(tensor).__name__}, expected a tensor")
    kinds = {
        "on the meta device, without numbers": tensor.is_meta,
        "sparse": tensor.layout != torch.strided,
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    for kind, found in kinds.items():
        if found:
            raise EncoderError(
                f"source: got {what}, a tensor that is {kind}; expected a plain one of real numbers"
            )
    try:
        # One that repeats its numbers could be of any size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("it repeats its numbers")
        return tensor.detach().resolve_neg().float().numpy()
    except Exception as error:
        raise EncoderError(
            f"source: got {what}, a tensor whose numbers cannot be read "
            f"({type(error).__name__}: {shown(error)}); expected a plain one of real numbers"
        ) from error


def _check_zeros(source: Path, encoder: Encoder) -> None:
    """Raise `EncoderError` where a head's projection is all zeros."""
    for layer, (projection, query) in enumerate(
        zip(encoder.projections, encoder.queries, strict=True)
    ):
        sides = {"projection": projection, "query projection": query and query.projection}
        for name, found in sides.items():
            if found is not None and not found.any(axis=(1, 2)).all():
                raise EncoderError(
                    f"source: got {source} whose {name} of layer {layer} is all zeros for a head, "
                    "so that all codes would be equal; expected trained weights"
                )


def _check_layer(last: int, shape: ModelShape) -> None:
    if last >= shape.num_layers:
        raise EncoderError(
            f"source: got weights of layer {last}, but the model has {shape.num_layers} "
            "layers; pass the config of the model they were trained for"
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError("which is not a file")
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("text_config", found) if isinstance(found, dict) else found
        if not isinstance(found, dict):
            raise ValueError(f"it, or its text_config, is {type(found).__name__}, no object")
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(
            f"config: got {path} ({error}), expected a model's config.json"
        ) from error
    return found


def _load(path: Path, expected: str) -> Any:
    """What torch saved, read without running code."""
    try:
        import torch
    except ImportError:
        raise EncoderError(
            f"source: got {path}, which torch wrote and alone can read, but torch is not "
            "installed; pip install 'hata-attention[learn]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    # Whatever a damaged or hostile pickle makes the reader raise, the file is refused. What torch
    # says then is not repeated, since it tells how to load the file nevertheless.
    except Exception as error:
        reason = "it is damaged, or asks for something that could run code"
        if isinstance(error, OSError) and error.filename is not None:
            reason = str(error)
        raise EncoderError(
            f"source: got {path}, which cannot be read as {expected} ({reason}); expected a file "
            f"that torch.save wrote of {expected}; do not load it by other means unless you trust "
            "who made it"
        ) from error


def _tensor(path: Path) -> np.ndarray:
    found = _floats(_load(path, "one tensor [Hkv, D, r]"), str(path))
    if found.ndim != 3:
        raise EncoderError(
            f"source: got {path} with a tensor {list(found.shape)}, expected one [Hkv, D, r]"
        )
    return found
