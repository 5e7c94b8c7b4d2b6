"""`Encoder`: a model's projections, as an object that checks itself."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hata.encoder import file as encoder_file
from hata.encoder.file import FORMAT, FORMAT_2, assembled, flattened
from hata.encoder.layer import (
    Hidden,
    LayerHash,
    QueryHash,
    check_bits,
    check_side,
    hidden_layers,
    need_array,
)
from hata.encoder.orthogonal import orthogonal
from hata.encoder.shape import MOST_TEXT, ModelShape, one_line, short, whole
from hata.errors import EncoderError
from hata.words import clipped

_Part = TypeVar("_Part")


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model's projections and what they were made for.

    Attributes:
        shape: The model they fit.
        bits: Bits of a code, r; a multiple of 32.
        projections: One per layer, `[kv_heads, head_dim, bits]`; `None` where the layer is dense.
            Those of an encoder that hashes keys once per query head have `heads` of them, and
            after hidden layers it is their width that goes in.
        biases: One per layer, `[kv_heads, bits]`, or `None` where a layer has none.
        key_norms: Whether scores are weighted with the norms of the keys.
        made: How it was made: strings and numbers only.
        queries: One per layer: how queries are hashed, or `None` where like keys.
        hidden: One per layer: the hidden layers of keys, from first to last; mostly none.

    Raises:
        EncoderError: An argument is of another kind, or they do not fit one another.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, head_dim=16)
        >>> Encoder.random(config, bits=64).projection(1, bits=32).shape
        (4, 16, 32)
    """

    shape: ModelShape
    bits: int
    projections: tuple[np.ndarray | None, ...]
    biases: tuple[np.ndarray | None, ...] = ()
    key_norms: bool = False
    made: Mapping[str, Any] = field(default_factory=dict)
    queries: tuple[QueryHash | None, ...] = ()
    hidden: tuple[tuple[Hidden, ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.shape, ModelShape):
            raise EncoderError(
                f"shape: got {short(self.shape)}, expected a ModelShape; make one with "
                "ModelShape.of(config)"
            )
        count = self.shape.num_layers
        absent = {"biases": (None,) * count, "queries": (None,) * count, "hidden": ((),) * count}
        found: dict[str, Any] = {}
        for name in ("projections", *absent):
            try:
                found[name] = tuple(getattr(self, name)) or absent.get(name, ())
            except TypeError:
                raise EncoderError(
                    f"{name}: got {short(getattr(self, name))}, expected a list of one per layer "
                    "of the model"
                ) from None
            if len(found[name]) != count:
                raise EncoderError(
                    f"{name}: got {len(found[name])} layers, expected {count}, one per layer of "
                    "the model; put None for a dense layer"
                )
        found["hidden"] = tuple(
            hidden_layers(f"layers.{i}.hidden", one) for i, one in enumerate(found["hidden"])
        )
        if not isinstance(self.key_norms, bool):
            raise EncoderError(f"key_norms: got {short(self.key_norms)}, expected True or False")
        _check_made(self.made)
        found |= {"bits": check_bits(self.bits), "made": dict(self.made)}
        for name, value in found.items():
            object.__setattr__(self, name, value)
        for layer, one in enumerate(self._layers()):
            self._check_layer(f"layers.{layer}.", one)

    def _layers(self) -> list[LayerHash]:
        layers = zip(self.projections, self.biases, self.queries, self.hidden, strict=True)
        return [LayerHash(*one) for one in layers]

    def _check_layer(self, name: str, layer: LayerHash) -> None:
        shape = self.shape
        projection, bias, query, hidden = layer
        for part, array in (("projection", projection), ("bias", bias)):
            if array is not None:
                need_array(f"{name}{part}", array)
        if query is not None and not isinstance(query, QueryHash):
            raise EncoderError(f"{name}query: got {short(query)}, expected a QueryHash or None")
        if projection is None:
            if bias is not None:
                raise EncoderError(
                    f"{name}bias: got a bias but no projection, expected both or neither"
                )
            if query is not None or hidden:
                raise EncoderError(
                    f"{name}projection: got none, but a query projection or hidden layers; "
                    "expected all of them or none"
                )
            return
        heads = shape.kv_heads
        # Only an array of three dimensions can say how many heads it has.
        if query is not None and projection.ndim == 3 and len(projection) == shape.heads:
            heads = shape.heads
        check_side(name, projection, bias, hidden, heads, shape.head_dim, self.bits)
        if query is None:
            if hidden:
                raise EncoderError(
                    f"{name}hidden: got hidden layers for keys alone; expected a query projection "
                    "beside them"
                )
            return
        if hidden and self.key_norms:
            raise EncoderError(
                f"{name}hidden: got hidden layers and key norms, expected one of both; a norm "
                "behind hidden layers is not that of a key"
            )
        codes = len(query.projection) if query.projection.ndim == 3 else 0
        if codes < 1 or codes % heads:
            raise EncoderError(
                f"{name}query_projection: got shape {query.projection.shape}, expected a multiple "
                f"of {heads} heads"
            )
        if shape.heads % codes and codes % shape.heads:
            raise EncoderError(
                f"{name}query_projection: got {codes} heads for {shape.heads} query heads, "
                "expected a divisor or a multiple of them"
            )
        side = query.projection, query.bias, query.hidden
        check_side(f"{name}query_", *side, codes, shape.head_dim, self.bits)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that have no projection."""
        return tuple(i for i, projection in enumerate(self.projections) if projection is None)

    @classmethod
    def random(
        cls, config: Any, bits: int = 256, seed: int = 0, *, key_norms: bool = False
    ) -> Encoder:
        """The untrained default: random orthogonal projections.

        The columns come in blocks of `head_dim`, each an orthonormalised Gaussian matrix, so
        that no two bits of a block ask the same question. Every (layer, head, block) has its own
        PCG64 stream and the result is rounded to bfloat16 (kept in float32): the same bytes on
        every machine, in every dtype of a model, and `random(config, 128)` is the first half of
        `random(config, 256)`.

        Args:
            config: A model's configuration, see `ModelShape.of`.
            bits: Bits of a code; a multiple of 32.
            seed: Another seed gives other projections.
            key_norms: Weight scores with the norms of the keys.

        Raises:
            EncoderError: The configuration lacks a number, bits is not a multiple of 32, or seed
                is no whole number of 0 or more.
        """
        shape = ModelShape.of(config)
        bits = check_bits(bits)
        seed = _index("seed", seed)
        if seed < 0:
            raise EncoderError(f"seed: got {seed}, expected 0 or more")
        projections = orthogonal(shape, bits, seed)
        made = {"recipe": "random", "seed": seed, "blocks": "orthogonal"}
        return cls(shape, bits, projections, key_norms=key_norms, made=made)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Encoder:
        """Read an encoder file; `~` in its path is the home folder.

        Raises:
            EncoderError: The file is absent, a pickle, truncated, of another format, or does not
                hold what its metadata says.
        """
        file = encoder_file.user_path(path)
        header, tensors = encoder_file.read(file)
        return _assemble(file, header, tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all: a temporary file beside it, then a rename.

        Equal encoders are equal files. `~` in the path is the home folder.

        Raises:
            EncoderError: The name does not end in .safetensors, or cannot be written to.
        """
        file = encoder_file.user_path(path)
        if file.suffix.lower() != ".safetensors":
            raise EncoderError(
                f"path: got {file}, expected a name that ends in .safetensors; rename it"
            )
        more = any(query is not None for query in self.queries)
        header = {
            "format": FORMAT_2 if more else FORMAT,
            **{f.name: str(getattr(self.shape, f.name)) for f in fields(self.shape)},
            "bits": str(self.bits),
            "key_norms": "true" if self.key_norms else "false",
            "dense_layers": json.dumps(list(self.dense_layers)),
            "made": json.dumps(dict(self.made), sort_keys=True),
        }
        if more:
            header["activation"] = "silu"
        try:
            encoder_file.write(file, flattened(self._layers()), header)
        # A NUL in the name is a ValueError.
        except (OSError, ValueError) as error:
            raise EncoderError(
                f"path: got {file}, which cannot be written ({error}); expected the "
                "name of a file, in a folder with room that you may write to"
            ) from error

    def check(self, config: Any) -> None:
        """Raise `EncoderError`, naming both sides, unless this encoder was made for `config`."""
        differences = self.shape.differences(ModelShape.of(config))
        if differences:
            raise EncoderError(
                "encoder: does not fit the model (encoder against model): "
                + "; ".join(differences)
                + '; load the encoder of this model, or use "random"'
            )

    def projection(self, layer: int, bits: int | None = None) -> np.ndarray:
        """The projection of a layer, `[kv_heads, head_dim, bits]`: its first `bits` columns.

        Raises:
            EncoderError: The layer is dense or absent, or the encoder has fewer bits.
        """
        projection = self._of(self.projections, layer)
        if projection is None:
            raise EncoderError(
                f"layer: got {layer}, which this encoder leaves dense; expected one with a "
                "projection; select None for that layer"
            )
        return projection[..., : self._width(bits)]

    def bias(self, layer: int, bits: int | None = None) -> np.ndarray | None:
        """The bias of a layer, `[kv_heads, bits]`, or `None` where it has none."""
        bias = self._of(self.biases, layer)
        return None if bias is None else bias[..., : self._width(bits)]

    def query(self, layer: int, bits: int | None = None) -> QueryHash | None:
        """How a layer's queries are hashed, or `None` where like its keys."""
        query = self._of(self.queries, layer)
        if query is None:
            return None
        width = self._width(bits)
        bias = None if query.bias is None else query.bias[..., :width]
        return QueryHash(query.projection[..., :width], bias, query.hidden)

    def _of(self, arrays: tuple[_Part, ...], layer: int) -> _Part:
        layer = _index("layer", layer)
        if not 0 <= layer < len(arrays):
            raise EncoderError(f"layer: got {layer}, expected 0 to {len(arrays) - 1}")
        return arrays[layer]

    def _width(self, bits: int | None) -> int:
        if bits is None:
            return self.bits
        bits = check_bits(bits)
        if bits > self.bits:
            raise EncoderError(
                f"bits: got {bits}, expected at most {self.bits}, the bits of this encoder; "
                "select fewer bits or use an encoder with more"
            )
        return bits

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        # Nothing here changes, so a copied model may share it.
        return self

    def __repr__(self) -> str:
        shape = self.shape
        return (
            f"Encoder({self.made.get('recipe', 'unknown')!r}, model_type={shape.model_type!r}, "
            f"layers={shape.num_layers}, heads={shape.heads}/{shape.kv_heads}, "
            f"head_dim={shape.head_dim}, bits={self.bits}, key_norms={self.key_norms})"
        )


def of_layers(
    shape: ModelShape,
    bits: int,
    layers: Iterable[LayerHash],
    *,
    made: Mapping[str, Any],
    key_norms: bool = False,
) -> Encoder:
    """The encoder of these layers."""
    projections, biases, queries, hidden = zip(*layers, strict=True)
    return Encoder(shape, bits, projections, biases, key_norms, made, queries, hidden)


def _count(text: str) -> int:
    """A count as it is written: `int` takes signs, spaces, underscores and other scripts too."""
    if not re.fullmatch("[1-9][0-9]{0,9}", text):
        raise ValueError(f"{short(text)} is no count")
    return int(text)


def _assemble(path: Path, header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> Encoder:
    """Build an encoder of a file's parts; every disagreement is an `EncoderError`."""
    try:
        shape = ModelShape(
            header["model_type"],
            *(_count(header[name]) for name in ("num_layers", "heads", "kv_heads", "head_dim")),
        )
        bits = _count(header["bits"])
        key_norms = {"true": True, "false": False}[header["key_norms"]]
        dense = json.loads(header["dense_layers"])
        made = json.loads(header["made"])
        if not isinstance(made, dict):
            raise ValueError("made is no object")
        if not isinstance(dense, list) or not all(map(whole, dense)):
            raise ValueError("dense_layers is no list of numbers")
        _check_made(made)
        if header["format"] == FORMAT_2 and header["activation"] != "silu":
            raise ValueError(f"activation {header['activation']!r}")
        # Before anything is as long as the number of layers: each is either here or in the list.
        if not 0 < shape.num_layers <= len(tensors) + len(dense):
            raise ValueError(f"num_layers {shape.num_layers} for {len(tensors)} tensors")
    except (KeyError, ValueError, RecursionError) as error:
        raise EncoderError(
            f"encoder: got {path} with metadata that is absent or malformed "
            f"({clipped(repr(error))}), expected that of {header['format']}; write it again with "
            "Encoder.save"
        ) from error
    layers = assembled(path, tensors, shape.num_layers, more=header["format"] == FORMAT_2)
    absent = [i for i, layer in enumerate(layers) if layer.projection is None]
    if absent != dense:
        raise EncoderError(
            f"encoder: got {path} that declares the dense layers {clipped(repr(dense))} but has no "
            f"projection for {clipped(repr(absent))}; the file is damaged, fetch or write it again"
        )
    return of_layers(shape, bits, layers, key_norms=key_norms, made=made)


def _check_made(made: Mapping[str, Any]) -> None:
    """Raise `EncoderError` unless it can be written, and readers can show what is in it."""
    if not isinstance(made, Mapping):
        raise EncoderError(f"made: got {short(made)}, expected names and values")
    try:
        json.dumps(dict(made), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncoderError(
            f"made: got what cannot be written as JSON ({error}), expected strings and numbers"
        ) from None
    if "recipe" in made and not one_line(made["recipe"]):
        raise EncoderError(
            f"made: got the recipe {short(made['recipe'])}, expected a text of 1 to {MOST_TEXT} "
            "printable characters"
        )
    if "settings" in made and not isinstance(made["settings"], Mapping):
        raise EncoderError(
            f"made: got settings of type {type(made['settings']).__name__}, expected names and "
            "values"
        )


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise EncoderError(f"{name}: got {short(value)}, expected a whole number") from None
