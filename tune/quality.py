"""How much attention a selection keeps.

A *probe* is what one layer attends with: the last queries of a few sequences and all their keys,
after rotary embedding. It is captured from a model that reads real text, or, where there is no
model, drawn from the synthetic set below. For a probe and a selection the *retained mass* is the
share of the softmax mass of a GQA group, summed over its query heads, that lies on the keys which
`hata.hamming_topk` selects; *quality* is that mass over the one that exact top-k (on the sum over
the group of q.k) keeps with the same budget.

The synthetic set: keys of a head are drawn around 48 centres whose sizes fall off as 1/rank, on an
offset common to all; a query is a mixture of its predecessor's target key, a centre and noise, so
that a few keys hold most of the mass and many hold a little each, as in trained models. There are
no positions in it, so nothing can be learned about `sink` and `recent` and none are selected.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hata
from hata import registry
from hata.backend import Backend, use_config
from hata.encoder import Encoder
from hata.errors import HataError
from hata.problem import Problem
from hata.selection import Selection
from tune.measure import Arrays
from tune.space import Layout

TOKENS = 4096
LEAST_TOKENS = 1024
QUERIES = 256
# Budgets as shares of the context, 1/64 being what HATA uses for long ones.
SHARES = (64, 32, 16, 8, 4)
# Pairs of sink and recent; each must leave half of the budget to the hash.
GUARDS = ((0, 0), (4, 28), (4, 60))
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


@dataclass(frozen=True, slots=True)
class Point:
    """A selection at the captured length, and what it keeps.

    Attributes:
        bits: Bits of a code.
        k: Budget, in keys.
        sink: First keys always taken.
        recent: Last keys always taken.
        kept: Retained mass.
        exact: What exact top-k retains with the same budget.
    """

    bits: int
    k: int
    sink: int
    recent: int
    kept: float
    exact: float

    @property
    def quality(self) -> float:
        """Retained mass over that of exact top-k."""
        return self.kept / self.exact if self.exact else 1.0


def read_text(paths: Sequence[str]) -> str:
    """The text of files; a folder stands for the text files below it, in order of their names.

    Raises:
        CaptureError: one is missing or no text.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
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
            if path in [Path(name).expanduser() for name in paths]:
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
    path = Path(model).expanduser()
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
        shape = hata.Encoder.random(config, 32).shape
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
    encode = _tokenizer(Path(model).expanduser())
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
            Path(model).expanduser(),
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
        common = 0.5 * key[target] + 0.5 * centres[rng.choice(_CENTRES, QUERIES, p=shares)]
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


class Gauge:
    """Measures what selections keep on one probe."""

    def __init__(
        self, backend: Backend, device: str, probe: Probe, encoder: Encoder, layer: int
    ) -> None:
        self._backend = backend
        self._arrays = Arrays(backend, device, "float32")
        self._device = device
        self._encoder, self._layer = encoder, layer
        self._probe = probe
        self._mass, self._exact = _masses(probe)
        self._codes: dict[int, tuple[Any, Any, Any]] = {}

    def point(self, bits: int, k: int, sink: int, recent: int) -> Point:
        """What one selection keeps."""
        if bits not in self._codes:
            self._codes[bits] = self._encode(bits)
        q_codes, k_codes, norms = self._codes[bits]
        with self._configured("hamming_topk", bits):
            indices = self._arrays.read(
                hata.hamming_topk(q_codes, k_codes, k, sink=sink, recent=recent, key_norms=norms)
            )
        kept = np.take_along_axis(self._mass, np.maximum(indices, 0).astype(np.int64), axis=-1)
        retained = float(np.where(indices >= 0, kept, 0).sum(-1).mean())
        return Point(bits, k, sink, recent, retained, float(self._exact[k - 1]))

    def _encode(self, bits: int) -> tuple[Any, Any, Any]:
        heads = self._probe.keys.shape[1]
        projection = self._encoder.projection(self._layer, bits).astype(np.float32)[:heads]
        bias = self._encoder.bias(self._layer, bits)
        make = self._arrays.make
        projected = make(projection)
        offset = None if bias is None else make(bias.astype(np.float32)[:heads])
        norms = None
        if self._encoder.key_norms:
            norms = make(np.empty(self._probe.keys.shape[:3], np.float16))
        with self._configured("encode", bits):
            q_codes = hata.encode(make(self._probe.q), projected, offset)
            k_codes = hata.encode(make(self._probe.keys), projected, offset, norms=norms)
        return q_codes, k_codes, norms

    @contextmanager
    def _configured(self, op: str, bits: int) -> Iterator[None]:
        """This backend with its defaults, whatever profile is in force."""
        batch, heads, tokens, size = self._probe.q.shape
        problem = Problem(
            op=op,
            device=self._device,
            dtype="float32" if op == "encode" else "uint8",
            heads=heads,
            kv_heads=self._probe.keys.shape[1],
            head_dim=size if op == "encode" else 0,
            bits=bits,
            batch=batch,
            tokens=tokens,
            slots=0 if op == "encode" else self._probe.keys.shape[2],
            norms=self._encoder.key_norms,
        )
        name = self._backend.name
        with registry.use_backend(name), use_config(name, op, self._backend.default(problem)):
            yield


def _masses(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Softmax mass of each group on each key, and what exact top-k retains for k = 1, 2, ...

    Returns:
        `mass [sequences, Hkv, Tq, S]`, each row adding up to 1, and `exact [S]`.
    """
    count, heads, queries, size = probe.q.shape
    kv_heads, slots = probe.keys.shape[1:3]
    group = heads // kv_heads
    mass = np.empty((count, kv_heads, queries, slots), np.float32)
    exact = np.zeros(slots)
    hidden = np.arange(slots) > np.arange(slots - queries, slots)[:, None]
    for b in range(count):
        for h in range(kv_heads):
            q = probe.q[b, h * group : (h + 1) * group].reshape(group * queries, size)
            logits = (q @ probe.keys[b, h].T).reshape(group, queries, slots)
            total = logits.sum(0)
            total[hidden] = -np.inf
            logits *= probe.scale
            logits[:, hidden] = -np.inf
            logits -= logits.max(-1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(-1, keepdims=True)
            mass[b, h] = logits.mean(0)
            order = np.argsort(-total, axis=-1)
            exact += np.cumsum(np.take_along_axis(mass[b, h], order, -1), -1).mean(0)
    return mass, exact / (count * kv_heads)


def budgets(tokens: int) -> list[int]:
    """Budgets of the grid for a context."""
    return [max(tokens // share, 16) for share in SHARES]


def grid(gauge: Gauge, bits: int, tokens: int, guards: Sequence[tuple[int, int]]) -> list[Point]:
    """Every budget and guard of the grid with one number of bits."""
    return [
        gauge.point(bits, k, sink, recent)
        for k in budgets(tokens)
        for sink, recent in guards
        if 2 * (sink + recent) <= k
    ]


def choose(
    points: Sequence[Point], us: Mapping[tuple[int, int], float], required: float, noise: float
) -> Point | None:
    """The fastest point that keeps `required` of what exact top-k keeps at its budget.

    Time depends on bits and budget alone; of points that are equally fast, within `noise`, the one
    that keeps most is taken.

    Returns:
        The point, or `None` where no point keeps enough.
    """
    able = [point for point in points if point.quality >= required]
    if not able:
        return None
    fastest = min(us[point.bits, point.k] for point in able)
    equal = [point for point in able if us[point.bits, point.k] <= fastest * (1 + noise)]
    return max(equal, key=lambda point: (point.kept, -point.bits, -point.k))


def selection_of(point: Point, tokens: int, context: int, dense_layers: int = 0) -> Selection:
    """The policy that a point stands for, for contexts of any length.

    The budget that was measured is the least one; a context longer than the captured one gets the
    same share of its keys.
    """
    ratio = point.k / tokens
    return Selection(
        bits=point.bits,
        k=max(math.ceil(ratio * max(context, tokens)), point.k),
        ratio=ratio,
        k_min=point.k,
        sink=point.sink,
        recent=point.recent,
        dense_layers=dense_layers,
    )
