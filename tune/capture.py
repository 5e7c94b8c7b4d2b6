"""What the layers of a model attend with: captured while it reads text, or synthetic.

A *probe* holds the last queries of a few sequences and all their keys, after rotary embedding, for
one layer. It is captured by an attention function of our own, registered with transformers, that
keeps what it is given and then does what the model would have done.

The synthetic set: keys of a head are drawn around 48 centres whose frequencies fall off as 1/rank,
on an offset common to all; a query is a mixture of one earlier key, a centre and noise, so that a
few keys hold most of the mass and many hold a little each, as in trained models. There are no
positions in it, so nothing can be learned about `sink` and `recent`, and none are selected. Hashing
it is a little harder than hashing most layers of real models, so what it leads to is cautious.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hata.encoder import Encoder
from hata.errors import HataError
from hata.profile import user_path
from tune.space import Layout

TOKENS = 4096
LEAST_TOKENS = 1024
QUERIES = 256
# Text per token that is looked at, in characters; tokenizers of words need more than bytes do.
_CHARACTERS = 12
_CAPTURE = "hata_capture"
_CENTRES = 48


class CaptureError(HataError, ValueError):
    """The model or the text cannot be used to choose selections."""


@dataclass(frozen=True)
class Probe:
    """What one layer attends with.

    Attributes:
        q: `[sequences, H, Tq, D]` float32: the last queries of each sequence.
        keys: `[sequences, Hkv, S, D]` float32.
        scale: Factor of the logits.
    """

    q: np.ndarray
    keys: np.ndarray
    scale: float


@dataclass
class Captured:
    """Probes of a model, by layer; a layer that cannot be hashed has none.

    Attributes:
        probes: Layer -> probe.
        tokens: Length of the sequences.
        dense: Layer -> why it stays dense.
    """

    probes: dict[int, Probe]
    tokens: int
    dense: dict[int, str] = field(default_factory=dict)


def read_text(paths: Sequence[str]) -> str:
    """The text of files; a folder stands for the text files below it, in order of their names.

    Raises:
        CaptureError: one is missing or no text.
    """
    files: list[Path] = []
    for name in paths:
        path = user_path(name)
        if path.is_dir():
            suffixes = {".py", ".txt", ".md", ".rst", ".json", ".c", ".h", ".cpp", ".html", ".tex"}
            found = [p for p in sorted(path.rglob("*")) if p.suffix in suffixes and p.is_file()]
            if not found:
                raise CaptureError(f"--text: got folder {name} without text files; name files")
            files += found
        else:
            files.append(path)
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            if path in [user_path(name) for name in paths]:
                raise CaptureError(f"--text: {path} is not UTF-8 text; name text files") from None
        except OSError as error:
            raise CaptureError(
                f"--text: {path} cannot be read ({error.strerror or error}); check the path"
            ) from None
    return "\n".join(texts)


def load_layout(model: str) -> Layout:
    """Read the head layout of a model folder, and nothing else of it.

    Raises:
        CaptureError: it is no folder of a decoder model.
    """
    path = user_path(model)
    if not (path / "config.json").is_file():
        raise CaptureError(
            f"--model: got {model}, expected a folder with config.json; give the path of a model "
            "saved by transformers"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise CaptureError(
            f"--model: needs transformers ({error}); pip install 'hata-attention[hf]'"
        ) from None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        shape = Encoder.random(config, 32).shape
    except (OSError, ValueError, KeyError) as error:
        raise CaptureError(f"--model: {model}: {_first_line(error)}") from None
    text = config.get_text_config()
    dtype = str(getattr(text, "dtype", None) or "float32").removeprefix("torch.")
    return Layout(
        path.resolve().name,
        shape.model_type,
        shape.num_layers,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        dtype if dtype in ("float32", "float16", "bfloat16") else "float32",
        int(getattr(text, "max_position_embeddings", 0) or TOKENS),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def token_sequences(model: str, text: str, count: int, longest: int) -> np.ndarray:
    """Token ids of `count` stretches of a text, spread over all of it, `[count, tokens]`.

    Raises:
        CaptureError: the text is too short, or there is no tokenizer.
    """
    encode = _tokenizer(user_path(model))
    tokens = min(TOKENS, longest)
    window = tokens * _CHARACTERS
    starts = np.linspace(0, max(len(text) - window, 0), count).astype(int)
    found: list[list[int]] = []
    for start in dict.fromkeys(starts.tolist()):
        found.append(encode(text[start : start + window])[:tokens])
    length = max(map(len, found), default=0)
    if length < min(LEAST_TOKENS, tokens):
        raise CaptureError(
            f"--text: got {length} tokens, expected at least {min(LEAST_TOKENS, tokens)}, better "
            f"{tokens}; name more or longer files"
        )
    return np.array([ids for ids in found if len(ids) == length], np.int64)


def _tokenizer(path: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Tokenizers are of many makes, and each fails in its own way.
    except Exception as error:
        settings = path / "tokenizer_config.json"
        named = settings.read_text(encoding="utf-8") if settings.is_file() else ""
        if '"ByT5Tokenizer"' in named:
            return lambda text: [byte + 3 for byte in text.encode()]
        raise CaptureError(
            f"--model: {path} has no tokenizer that can be loaded ({_first_line(error)})"
        ) from None
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def capture(
    model: str,
    text: str,
    *,
    device: str,
    sequences: int,
    on_sequence: Callable[[int], None] = lambda _: None,
) -> Captured:
    """Read text with a model and keep the last queries and all keys of every layer.

    Args:
        model: Folder of a transformers model.
        text: What to read.
        device: Where to run it.
        sequences: Stretches of text.
        on_sequence: Called with how many are read.

    Raises:
        CaptureError: the model cannot be loaded or has no attention that can be seen.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    layout = load_layout(model)
    ids = token_sequences(model, text, sequences, layout.context)
    seen = _Recorder()
    _register(seen)
    try:
        language_model = AutoModelForCausalLM.from_pretrained(
            user_path(model),
            dtype=torch.float32 if device == "cpu" else "auto",
            attn_implementation=_CAPTURE,
            local_files_only=True,
        )
    # A model folder can be broken in ways only its own code knows.
    except Exception as error:
        raise CaptureError(f"--model: {model} cannot be loaded: {_first_line(error)}") from None
    body: Any = language_model
    body = body.to(device).eval().base_model
    with torch.inference_mode():
        for number, row in enumerate(ids):
            body(input_ids=torch.from_numpy(row)[None].to(device), use_cache=False)
            on_sequence(number + 1)
    if not seen.q and seen.refused:
        raise CaptureError(
            f"--model: no layer of {type(language_model).__name__} can be hashed: "
            f"{next(iter(seen.refused.values()))}"
        )
    if not seen.q:
        raise CaptureError(
            f"--model: {type(language_model).__name__} does not use the attention interface of "
            "transformers, so hash attention cannot run in it"
        )
    dense = {
        layer: seen.refused.get(layer, "it has no attention of its own")
        for layer in range(layout.layers)
        if layer not in seen.q
    }
    probes = {
        layer: Probe(
            np.concatenate(seen.q[layer]), np.concatenate(seen.keys[layer]), seen.scale[layer]
        )
        for layer in seen.q
    }
    return Captured(probes, ids.shape[1], dense)


class _Recorder:
    """An attention function that keeps what it is given."""

    def __init__(self) -> None:
        self.q: dict[int, list[np.ndarray]] = {}
        self.keys: dict[int, list[np.ndarray]] = {}
        self.scale: dict[int, float] = {}
        self.refused: dict[int, str] = {}

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        layer = module.layer_idx
        if kwargs.get("sliding_window") is not None:
            self.refused[layer] = "it attends to a sliding window"
        elif query.shape[2] == key.shape[2]:
            last = query[:, :, -QUERIES:]
            self.q.setdefault(layer, []).append(last.float().cpu().numpy())
            self.keys.setdefault(layer, []).append(key.float().cpu().numpy())
            self.scale[layer] = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        attend = sdpa_attention_forward
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            # SDPA would leave both out; the model's own function wants a mask to add.
            attend = sys.modules[type(module).__module__].eager_attention_forward
            if attention_mask is None:
                attention_mask = query.new_ones((1, 1, query.shape[2], key.shape[2])).tril() > 0
            if not attention_mask.is_floating_point():
                attention_mask = (~attention_mask).to(query.dtype) * -1e30
        return attend(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )


def _register(recorder: _Recorder) -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_CAPTURE, recorder)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)


def synthetic(layout: Layout, *, sequences: int = 2, seed: int = 0) -> Captured:
    """The synthetic set for a head layout: one probe, of at most two KV heads."""
    rng = np.random.default_rng(seed)
    kv_heads = min(layout.kv_heads, 2)
    group, size = layout.heads // layout.kv_heads, layout.head_dim

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    rank = 1.0 / np.arange(1, _CENTRES + 1)
    shares = rank / rank.sum()
    keys, queries = [], []
    for _ in range(sequences * kv_heads):
        offset, centres = 0.7 * normal(size), normal(_CENTRES, size)
        which = rng.choice(_CENTRES, TOKENS, p=shares)
        key = offset + 0.8 * centres[which] + 0.7 * normal(TOKENS, size)
        target = rng.integers(0, TOKENS - QUERIES, QUERIES)
        common = 0.9 * key[target] + 0.6 * centres[rng.choice(_CENTRES, QUERIES, p=shares)]
        keys.append(key)
        queries.append(np.stack([common + 0.6 * normal(QUERIES, size) for _ in range(group)]))
    return Captured(
        {
            0: Probe(
                np.stack(queries).reshape(sequences, kv_heads * group, QUERIES, size),
                np.stack(keys).reshape(sequences, kv_heads, TOKENS, size),
                size**-0.5,
            )
        },
        TOKENS,
    )
