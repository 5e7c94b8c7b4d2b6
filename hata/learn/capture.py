"""Capture: what every layer attends with, written to disk while a model reads.

One file per layer and sequence, `layer_003/sequence_002.safetensors`, written as soon as the layer
has run, so that memory holds the model, one forward pass and the copy of one layer, however many
layers and sequences there are. Of the queries a sample is kept; keys are all kept.

Positions of queries are drawn once per sequence, the same for all layers, so that a capture that
was cut off goes on as it began.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hata.learn import recorder
from hata.learn.text import CaptureError

# Queries before this position see too few keys to choose among.
FIRST_QUERY = 256
QUERIES = 4096


def positions(
    tokens: int, count: int, seed: int, sequence: int, asked: np.ndarray | None = None
) -> np.ndarray:
    """Which queries of a sequence are kept: `count` of them, ascending, int64.

    Args:
        tokens: Length of the sequence.
        count: How many; fewer where the sequence is short.
        seed: Of the choice.
        sequence: Its number.
        asked: Positions of which as many are kept as make a quarter; the rest is drawn from all.
    """
    first = min(FIRST_QUERY, tokens // 2)
    rng = np.random.default_rng((seed, sequence))
    chances = rng.random(tokens)
    chances[:first] = -1
    if asked is not None and len(asked):
        sure = asked[asked >= first]
        chances[rng.permutation(sure)[: count // 4]] += 1
    return np.sort(np.argsort(-chances)[: min(count, tokens - first)])


def file_of(folder: Path, layer: int, sequence: int) -> Path:
    """Where a layer's queries and keys of a sequence lie."""
    return folder / f"layer_{layer:03d}" / f"sequence_{sequence:03d}.safetensors"


def refused(folder: Path, sequence: int) -> dict[int, str]:
    """Layers that could not be captured of a sequence, and why; none where it was not read."""
    note = _note(folder, sequence)
    found = json.loads(note.read_text()) if note.is_file() else {}
    return {int(layer): why for layer, why in found.items()}


def is_whole(folder: Path, sequence: int, layers: Sequence[int]) -> bool:
    """Whether all that can be captured of a sequence lies there for these layers."""
    known = refused(folder, sequence)
    return _note(folder, sequence).is_file() and all(
        layer in known or file_of(folder, layer, sequence).is_file() for layer in layers
    )


def _note(folder: Path, sequence: int) -> Path:
    return folder / f"sequence_{sequence:03d}.json"


def capture(
    model: Any,
    ids: np.ndarray,
    folder: Path,
    *,
    sequences: Sequence[int],
    layers: Sequence[int],
    queries: int = QUERIES,
    seed: int = 0,
    asked: Sequence[np.ndarray] = (),
    on_sequence: Callable[[int], None] = lambda _: None,
) -> None:
    """Read sequences and keep what the layers attend with.

    Args:
        model: Of `hata.learn.recorder.load_model`.
        ids: All sequences, `[n, T]` token ids.
        folder: Where to write.
        sequences: Which of them to read.
        layers: Which layers to keep.
        queries: Queries kept of a sequence.
        seed: Of the positions.
        asked: For each of the first sequences, the positions to keep before others.
        on_sequence: Called with the number of each sequence that is done.

    Raises:
        CaptureError: No layer was shown.
    """
    wanted = set(layers)
    for sequence in sequences:
        first = asked[sequence] if sequence < len(asked) else None
        where = torch.from_numpy(positions(ids.shape[1], queries, seed, sequence, first))
        seen: set[int] = set()

        def keep(
            layer: int,
            q: torch.Tensor,
            keys: torch.Tensor,
            scale: float,
            sequence: int = sequence,
            where: torch.Tensor = where,
            seen: set[int] = seen,
        ) -> None:
            if layer not in wanted:
                return
            seen.add(layer)
            tensors = {
                "positions": where,
                "q": q[0, :, where.to(q.device)].cpu().contiguous(),  # [H, n, D]
                "keys": keys[0].cpu().contiguous(),  # [Hkv, T, D]
            }
            path = file_of(folder, layer, sequence)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            save_file(tensors, part, metadata={"scale": repr(scale)})
            part.replace(path)

        shown = recorder.Recorder(keep)
        recorder.read(model, torch.from_numpy(ids[sequence])[None], shown)
        absent = {
            layer: shown.refused.get(layer, "it has no attention of its own")
            for layer in sorted(wanted - seen)
        }
        if not seen:
            why = next(iter(absent.values()), "none was asked for")
            raise CaptureError(
                f"--model: no layer of {type(model).__name__} can be hashed: {why}; expected a "
                "decoder whose attention goes through the attention interface of transformers"
            )
        # Written last: it says that all files of this sequence are whole. What other layers were
        # found to be stays known.
        note = _note(folder, sequence)
        part = note.with_suffix(f".part{os.getpid()}")
        part.write_text(json.dumps(refused(folder, sequence) | absent))
        part.replace(note)
        on_sequence(sequence)


def load(
    folder: Path, layer: int, sequence: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """One file: positions `[n]` on the CPU, q `[Hkv, G, n, D]`, keys `[Hkv, T, D]`, scale."""
    with safe_open(file_of(folder, layer, sequence), framework="pt") as file:
        scale = float(file.metadata()["scale"])
        where, q, keys = (file.get_tensor(name) for name in ("positions", "q", "keys"))
    q = q.to(device).float().unflatten(0, (keys.shape[0], -1))
    return where, q, keys.to(device).float(), scale
