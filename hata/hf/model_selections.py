"""Which encoder and which selections an attached model gets.

The first of these that is there decides on the selections: what the caller passed, what a profile
holds for the model (the one passed, else the one in force), the default.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hata import registry
from hata.encoder import Encoder, ModelShape
from hata.errors import AttachError, EncoderError
from hata.profile import ModelKey, Profile, SelectionSet
from hata.selection import Selection

# 256 bits are for random projections; an encoder file brings its own number. A sixteenth of the
# context, up to the 2048 keys that the paper attends to at 128K tokens (arXiv 2506.02572, RULER).
DEFAULT_SELECTION = Selection(bits=256, k=2048, ratio=1 / 16, k_min=128, sink=4, recent=16)

# As callers give them: an encoder's path or `"random"`, a profile's path or `None` for the one in
# force, one selection for all layers or one a layer.
EncoderLike = Encoder | str | os.PathLike[str]
ProfileLike = Profile | str | os.PathLike[str] | None
SelectionLike = Selection | Sequence[Selection | None]


def resolve(
    config: Any,
    name: str,
    encoder: EncoderLike,
    profile: ProfileLike,
    selection: SelectionLike | str | None,
) -> tuple[Encoder, tuple[Selection | None, ...], str]:
    """The encoder, a selection per layer (`None`: dense), and where those come from, for people.

    `name` is what people call the model; the rest as in `hata.hf.attach`.

    Raises:
        EncoderError: The encoder cannot be read, is another model's, or has fewer bits than the
            selections ask for.
        AttachError: The selections do not fit the model.
        ProfileError: The profile cannot be read.
    """
    shape = ModelShape.of(config)
    loaded = load_encoder(encoder)
    if loaded is not None:
        loaded.check(config)
    found, source = None, "selection="
    if selection is None:
        selection = (None,) * shape.num_layers
    elif isinstance(selection, str):
        if selection != "auto":
            raise AttachError(
                f'selection: got {selection!r}, expected "auto", a hata.Selection, a list, or None'
            )
        found, source = _of_profile(shape, name, profile)
        bits = DEFAULT_SELECTION.bits if loaded is None else loaded.bits
        selection = replace(DEFAULT_SELECTION, bits=bits) if found is None else found.layers
    layers = _per_layer(selection, shape, loaded)
    if loaded is None:
        bits = max((layer.bits for layer in layers if layer), default=DEFAULT_SELECTION.bits)
        seed = found.encoder.seed if found is not None and found.encoder.name == "random" else 0
        loaded = Encoder.random(config, bits, seed or 0)
    elif found is not None and found.source == "synthetic":
        # Chosen for no encoder in particular, so they may be met with fewer bits.
        layers = tuple(
            layer and replace(layer, bits=min(layer.bits, loaded.bits)) for layer in layers
        )
    elif found is not None:
        _warn_of_another_encoder(found, encoder, loaded, source)
    return loaded, layers, source


def load_encoder(encoder: EncoderLike) -> Encoder | None:
    """The encoder that is given or named; `None` for the random one, which a model must size."""
    if isinstance(encoder, Encoder):
        return encoder
    if not isinstance(encoder, (str, os.PathLike)):
        raise EncoderError(
            f'encoder: got {type(encoder).__name__}, expected a path, a hata.Encoder or "random"'
        )
    return None if encoder == "random" else Encoder.load(encoder)


def _warn_of_another_encoder(
    found: SelectionSet, given: EncoderLike, loaded: Encoder, source: str
) -> None:
    """Selections keep what they promise with the codes that they were chosen with."""
    random = loaded.made.get("recipe") == "random"
    name = "random" if random else "" if isinstance(given, Encoder) else Path(given).name
    # An encoder that is no file has no name to go by.
    if found.encoder.name != name if name else found.encoder.name == "random":
        warnings.warn(
            f"{source}: its selections were chosen with encoder {found.encoder.name}, not with "
            f"{name or 'this one'}; choose them anew with: python -m tune --model PATH --encoder "
            "FILE --text FILE",
            stacklevel=5,
        )


def _of_profile(
    shape: ModelShape, name: str, profile: ProfileLike
) -> tuple[SelectionSet | None, str]:
    """What a profile holds for the model, and what people call that."""
    if profile is None:
        profile = registry.profile_in_force()
    elif not isinstance(profile, Profile):
        profile = Profile.load(profile)
    sizes = (shape.num_layers, shape.heads, shape.kv_heads, shape.head_dim)
    key = ModelKey(name, shape.model_type, *sizes)
    found = None if profile is None else profile.selection_for(key)
    if profile is None or found is None:
        return None, "default"
    synthetic, layers = found.source == "synthetic", found.layers
    if synthetic and not isinstance(layers, Selection) and len(layers) != shape.num_layers:
        return None, "default"
    source, called = f"profile {profile.label}", name or shape.model_type
    if synthetic:
        why = f"are synthetic, chosen without a model; quality on {called} is unknown"
        fix = "choose them on real text"
    elif found.model.name != name:
        why = f"were chosen on {found.model.name}, a model of the same sizes as {called}"
        fix = "choose them on this model"
    else:
        return found, source
    command = "python -m tune --model PATH --text FILE"
    warnings.warn(f"{source}: its selections {why}; {fix} with: {command}", stacklevel=5)
    return found, source


def _per_layer(
    given: SelectionLike, shape: ModelShape, encoder: Encoder | None
) -> tuple[Selection | None, ...]:
    """One selection per layer; one for all leaves its first layers and the encoder's dense."""
    if isinstance(given, Selection):
        first, others = given.dense_layers, encoder.dense_layers if encoder else ()
        dense = (i < first or i in others for i in range(shape.num_layers))
        return tuple(None if one else given for one in dense)
    layers = tuple(given) if isinstance(given, Sequence) else (given,)
    for layer in layers:
        if layer is not None and not isinstance(layer, Selection):
            raise AttachError(
                f"selection: got {type(layer).__name__}, expected a hata.Selection, or a list of "
                "one per layer with None for a dense layer"
            )
    if len(layers) != shape.num_layers:
        raise AttachError(
            f"selection: got {len(layers)} layers, expected {shape.num_layers}, one per layer of "
            "the model; or pass one hata.Selection for all"
        )
    return layers
