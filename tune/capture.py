"""What the layers of a model attend with: captured while it reads text, or synthetic.

The synthetic set: keys of a head are drawn around 48 centres whose frequencies fall off as 1/rank,
on an offset common to all; a query is a mixture of one earlier key, a centre and noise, so that a
few keys hold most of the mass and many hold a little each, as in trained models. There are no
positions in it, so nothing can be learned about `sink` and `recent`, and none are selected. Hashing
it is a little harder than hashing most layers of real models, so what it leads to is cautious.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hata.calibration import text as texts
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.profile import user_path
from tune.space import Layout

TOKENS = 4096
QUERIES = 256
_CENTRES = 48


class Probe(NamedTuple):
    """What one layer attends with, after rotary embedding, in float32.

    `q` holds the last queries of a few sequences, and `keys` all keys of these.
    """

    q: np.ndarray  # [sequences, H, Tq, D]
    keys: np.ndarray  # [sequences, Hkv, S, D]
    scale: float


@dataclass
class Captured:
    """Probes by layer, of sequences of `tokens`; and why the other layers stay dense."""

    probes: dict[int, Probe]
    tokens: int
    dense: dict[int, str] = field(default_factory=dict)


def load_layout(model: str) -> Layout:
    """The head layout of a model folder; raises `CaptureError` where no layer can be hashed."""
    from hata.calibration.hashable import check_config

    config = texts.load_config(model)
    try:
        shape = Encoder.random(config, 32).shape
    except ValueError as error:
        raise CaptureError(f"--model: {model}: {texts.first_line(error)}") from None
    check_config(config)
    text = config.get_text_config()
    dtype = str(getattr(text, "dtype", None) or "float32").removeprefix("torch.")
    dtype = dtype if dtype in ("float32", "float16", "bfloat16") else "float32"
    context = int(getattr(text, "max_position_embeddings", 0) or TOKENS)
    sizes = shape.num_layers, shape.heads, shape.kv_heads, shape.head_dim
    return Layout(user_path(model).resolve().name, shape.model_type, *sizes, dtype, context)


def token_sequences(model: str, text: str, count: int, longest: int) -> np.ndarray:
    """Token ids of `count` stretches of a text, spread over all of it, `[count, tokens]`."""
    tokens = min(TOKENS, longest)
    encode = texts.load_tokenizer(user_path(model))
    return texts.sequences(encode, text, count, tokens, min(texts.LEAST_TOKENS, tokens))


def capture(model: str, text: str, *, device: str, sequences: int) -> Captured:
    """Read stretches of text with the model of a folder; keep what every layer attends with."""
    import torch

    from hata.calibration import hashable, recorder

    layout = load_layout(model)
    ids = token_sequences(model, text, sequences, layout.context)
    rows: defaultdict[int, list[Probe]] = defaultdict(list)

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        if layer not in dense:
            last, keys = (x.float().cpu().numpy() for x in (query[:, :, -QUERIES:], key))
            rows[layer].append(Probe(last, keys, scale))

    language_model = recorder.load_model(user_path(model), device)
    dense = hashable.dense_layers(language_model)
    for row in ids:
        recorder.read(language_model, torch.from_numpy(row)[None], keep)
    probes = {}
    for layer, read in rows.items():
        queries, keys, scales = zip(*read, strict=True)
        probes[layer] = Probe(np.concatenate(queries), np.concatenate(keys), scales[-1])
    return Captured(probes, ids.shape[1], dense)


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
    q = np.stack(queries).reshape(sequences, kv_heads * group, QUERIES, size)
    probe = Probe(q, np.stack(keys).reshape(sequences, kv_heads, TOKENS, size), size**-0.5)
    return Captured({0: probe}, TOKENS)
