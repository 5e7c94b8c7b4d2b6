"""`ModelShape`: the sizes of a model, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hata.errors import EncoderError
from hata.words import clipped

MOST_TEXT = 100
# More than any model has, and few enough that a hostile configuration costs nothing.
_MOST = {"num_layers": 10_000, "heads": 10_000, "kv_heads": 10_000, "head_dim": 65_536}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an encoder must agree with a model on.

    Attributes:
        model_type: `config.model_type`; `""` where the configuration has none.
        num_layers: Decoder layers.
        heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: Size of a query or key vector.

    Raises:
        EncoderError: A number is none, below 1 or beyond any model's; the query heads are no
            multiple of the KV heads; or the model type is no name.
    """

    model_type: str
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not whole(value) or not 1 <= value <= most:
                raise EncoderError(
                    f"config: got {name} = {short(value)}, expected a whole number from 1 to "
                    f"{most}; pass a decoder's configuration, or an object with num_hidden_layers, "
                    "num_attention_heads, num_key_value_heads and head_dim"
                )
        if self.heads % self.kv_heads:
            raise EncoderError(
                f"config: got heads = {self.heads} and kv_heads = {self.kv_heads}, expected a "
                "multiple of the KV heads; pass the configuration of the model itself"
            )
        if self.model_type != "" and not one_line(self.model_type):
            raise EncoderError(
                f"config: got model_type = {short(self.model_type)}, expected a name of at most "
                f"{MOST_TEXT} printable characters"
            )

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read a Hugging Face configuration, or any object or mapping with its attributes.

        Where layers differ, as in Gemma 4, the sizes are those of its full-attention layers.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text, "is_heterogeneous", False) is True:
            text = _FullAttention(text)

        def read(*names: str) -> Any:
            for name in names:
                value = text.get(name) if isinstance(text, Mapping) else getattr(text, name, None)
                if value is not None:
                    return value
            return None

        heads = read("num_attention_heads", "n_head", "heads")
        kv_heads = read("num_key_value_heads", "kv_heads")
        found = {
            "num_layers": read("num_hidden_layers", "n_layer", "num_layers"),
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            # The key of a latent-attention model is longer than its `head_dim`.
            "head_dim": read("qk_head_dim", "head_dim"),
        }
        hidden = read("hidden_size", "n_embd")
        if found["head_dim"] is None and whole(hidden) and whole(heads) and heads:
            found["head_dim"] = hidden // heads
        model_type = read("model_type")
        return cls("" if model_type is None else model_type, **found)

    def differences(self, other: ModelShape) -> list[str]:
        """`"name a against b"` for every field that differs; an unknown model type fits all."""
        return [
            f"{f.name} {getattr(self, f.name)!r} against {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
            and not (f.name == "model_type" and "" in (self.model_type, other.model_type))
        ]


class _FullAttention:
    """The configuration of a model whose layers differ, as its full-attention layers see it."""

    def __init__(self, config: Any) -> None:
        kinds = getattr(config, "layer_types", None) or ()
        chosen = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self._config = config
        self._layers = [config.per_layer_config[i] for i in chosen or range(len(kinds) or 1)]

    def __getattr__(self, name: str) -> Any:
        found = {getattr(layer, name, None) for layer in self._layers}
        if len(found) > 1:
            raise EncoderError(
                f"config: got layers of full attention that differ in {name}: "
                f"{', '.join(map(short, sorted(found, key=repr)))}; expected one size for all"
            )
        return found.pop()


def one_line(text: Any) -> bool:
    """Whether it is a text that fits a line of a message."""
    return isinstance(text, str) and 0 < len(text) <= MOST_TEXT and text.isprintable()


def whole(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    """What an error shows of a value that may be anything: one line, not too long."""
    plain = value is None or isinstance(value, str | int | float)
    return clipped(f"{value!a}" if plain else f"a {type(value).__name__}")
