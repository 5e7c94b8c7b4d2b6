"""Selections: the policies of models, as records and as fields of a profile.

They say which keys a model's layers may attend to, and are bound to no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from hata import arguments
from hata.profile.fields import items, optional, real, record, sparse, whole, word
from hata.profile.text import Node, fail
from hata.selection import Selection


@dataclass(frozen=True)
class ModelKey:
    """The model that selections belong to.

    Attributes:
        name: What people call it: the last part of its path or hub id.
        model_type: `config.model_type` of transformers, such as `"llama"`.
        layers: Hidden layers.
        heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: Head size of q and k.
    """

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class EncoderKey:
    """The encoder that selections were chosen with.

    Attributes:
        name: `"random"`, or the encoder's file name.
        bits: Bits of its codes.
        seed: Seed of a random encoder.
    """

    name: str
    bits: int
    seed: int | None = None


@dataclass(frozen=True)
class Quality:
    """Share of the attention mass of exact top-k at the same budget, in [0, 1].

    Attributes:
        required: What the search had to keep.
        achieved: What the selections keep.
    """

    required: float
    achieved: float


@dataclass(frozen=True)
class SelectionSet:
    """The policy of a model.

    Attributes:
        model: Whose policy it is.
        encoder: With which encoder it was chosen.
        source: `"measured"` on the model's own q and k, or `"synthetic"`.
        quality: What was asked for and what was reached.
        layers: One `Selection` for all layers, or one a layer with `None` for a dense layer.
    """

    model: ModelKey
    encoder: EncoderKey
    source: str
    quality: Quality
    layers: Selection | tuple[Selection | None, ...]

    @property
    def by_layer(self) -> tuple[Selection | None, ...]:
        """The selection of each layer."""
        if isinstance(self.layers, Selection):
            return (self.layers,) * self.model.layers
        return self.layers


def policy_of(model: ModelKey, known: Sequence[SelectionSet]) -> SelectionSet | None:
    """See `Profile.selection_for`."""
    sizes = replace(model, name="")
    like = [one for one in known if one.source == "measured"]
    ranked = (
        *(one for one in known if one.model == model),
        *(one for one in like if replace(one.model, name="") == sizes),
        *(one for one in known if one.source == "synthetic"),
    )
    return next(iter(ranked), None)


def _model(
    name: str, model_type: str, layers: int, heads: int, kv_heads: int, head_dim: int
) -> ModelKey:
    arguments.multiple("heads", heads, kv_heads)
    return ModelKey(name, model_type, layers, heads, kv_heads, head_dim)


_count, _size, _share = whole(0, 1 << 31), whole(0, 1 << 20), real(0, 1)
_most = whole(1, 1 << 20)
_selection = record(
    Selection,
    bits=whole(32, 1 << 16, 32),
    k=whole(1, 1 << 31),
    ratio=optional(_share),
    k_min=_count,
    sink=_count,
    recent=_count,
    dense_layers=_size,
    min_length=optional(whole(0, 1 << 40)),
)
_by_layer = items(optional(_selection))
_set = record(
    SelectionSet,
    model=record(_model, layers=_most, heads=_most, kv_heads=_most, head_dim=_most),
    encoder=record(EncoderKey, bits=whole(32, 1 << 16, 32), seed=optional(whole(0, 1 << 53))),
    source=word(("measured", "synthetic")),
    quality=record(Quality, required=_share, achieved=_share),
    layers=lambda node, where: (_by_layer if node.kind == "list" else _selection)(node, where),
)


def read(node: Node, where: str) -> tuple[SelectionSet, ...]:
    """The policies of a profile, no two of one model.

    Raises:
        ProfileError: with file and line, for what is none.
    """
    found = items(_set)(node, where)
    for i, (one, at) in enumerate(zip(found, node.items, strict=True)):
        if any(one.model == other.model for other in found[:i]):
            fail(at, f"model {one.model.name!r} stands twice; remove one")
        layers = one.by_layer
        if len(layers) != one.model.layers:
            fail(
                at,
                f"layers: got {len(layers)}, expected {one.model.layers}, one a layer; or one "
                "selection without the list",
            )
        bits = max((layer.bits for layer in layers if layer is not None), default=0)
        if bits > one.encoder.bits:
            fail(at, f"layers: got {bits} bits, expected at most the encoder's {one.encoder.bits}")
    return found


def tree(known: Sequence[SelectionSet]) -> list[dict[str, Any]]:
    """What is written of policies: by model, without what is default."""
    return [
        {
            "model": asdict(one.model),
            "encoder": sparse(one.encoder),
            "source": one.source,
            "quality": asdict(one.quality),
            "layers": sparse(one.layers)
            if isinstance(one.layers, Selection)
            else [layer and sparse(layer) for layer in one.layers],
        }
        for one in sorted(known, key=lambda one: astuple(one.model))
    ]
