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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hata.calibration import hashable, recorder
from hata.calibration.text import first_line
from hata.errors import CaptureError
from hata.hf.models import NO_ATTENTION

# Queries before this position see too few keys to choose among.
FIRST_QUERY = 256


def positions(
    tokens: int, count: int, seed: int, sequence: int, asked: np.ndarray | None = None
) -> np.ndarray:
    """Which queries of a sequence are kept: `count` of them, ascending, int64.

    Fewer where the sequence is short; of the positions `asked`, as many as make a quarter, the rest
    drawn from all.
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
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        return {int(layer): str(why) for layer, why in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(note, error) from None


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
    queries: int,
    seed: int = 0,
    asked: Sequence[np.ndarray] = (),
    on_sequence: Callable[[int], None] = lambda _: None,
) -> None:
    """Read sequences and keep what the layers attend with.

    Args:
        model: Of `hata.calibration.recorder.load_model`.
        ids: All sequences, `[n, T]` token ids.
        folder: Where to write.
        sequences: Which of them to read.
        layers: Which layers to keep.
        queries: Queries kept of a sequence.
        seed: Of the positions.
        asked: For each of the first sequences, the positions to keep before others.
        on_sequence: Called with the number of each sequence that is done.

    Raises:
        CaptureError: No layer can be hashed, one attends with nothing to learn from, or files
            cannot be written.
    """
    wanted = set(layers)
    dense = hashable.dense_layers(model)

    def read(sequence: int) -> None:
        first = asked[sequence] if sequence < len(asked) else None
        where = torch.from_numpy(positions(ids.shape[1], queries, seed, sequence, first))
        seen: set[int] = set()

        def keep(layer: int, q: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
            if layer not in wanted or layer in dense:
                return
            seen.add(layer)
            kept = q[0, :, where.to(q.device)]  # [H, n, D]
            _check(layer, kept, keys[0])
            tensors = {
                "positions": where,
                "q": kept.cpu().contiguous(),
                "keys": keys[0].cpu().contiguous(),  # [Hkv, T, D]
            }
            with _written(file_of(folder, layer, sequence)) as part:
                save_file(tensors, part, metadata={"scale": repr(scale)})

        recorder.read(model, torch.from_numpy(ids[sequence])[None], keep)
        absent = {layer: dense.get(layer, NO_ATTENTION) for layer in sorted(wanted - seen)}
        if not seen:
            why = next(iter(absent.values()), "none was asked for")
            raise CaptureError(
                f"--layers: got none of {type(model).__name__} that can be hashed: {why}; name "
                "others"
            )
        # Written last: it says that all files of this sequence are whole. What other layers were
        # found to be stays known.
        with _written(_note(folder, sequence)) as part:
            part.write_text(json.dumps(refused(folder, sequence) | absent))

    for sequence in sequences:
        read(sequence)
        on_sequence(sequence)


def _check(layer: int, q: torch.Tensor, keys: torch.Tensor) -> None:
    """Raise `CaptureError` unless q `[H, n, D]` and keys `[Hkv, T, D]` are to be learned from."""
    heads = keys.shape[0]
    if q.shape[0] % heads:
        raise CaptureError(
            f"--model: layer {layer} has {q.shape[0]} heads for {heads} KV heads, expected a "
            "multiple; leave it out with --layers"
        )
    for name, x in (("queries", q), ("keys", keys)):
        # Per KV head: one that is empty spoils the layer.
        most = x.unflatten(0, (heads, -1)).abs().amax((1, 2, 3))
        if most.isfinite().all() and most.all():
            continue
        zero = f"all zero in KV head {int(most.argmin())}"
        what = zero if most.isfinite().all() else "NaN or infinite"
        raise CaptureError(
            f"--model: layer {layer} attends with {name} that are {what}, expected finite "
            "numbers that are not all zero; check the weights, or leave it out with --layers"
        )


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes its own once it is whole."""
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        why = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise CaptureError(
            f"{path} cannot be written ({why}); free space, then go on with --resume"
        ) from None


def _damaged(path: Path, error: Exception) -> CaptureError:
    return CaptureError(
        f"{path} is damaged ({first_line(error)}); delete it, then go on with --resume"
    )


def load(
    folder: Path, layer: int, sequence: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """One file: positions `[n]` on the CPU, q `[Hkv, G, n, D]`, keys `[Hkv, T, D]`, scale."""
    path = file_of(folder, layer, sequence)
    try:
        with safe_open(path, framework="pt") as file:
            scale = float(file.metadata()["scale"])
            where, q, keys = (file.get_tensor(name) for name in ("positions", "q", "keys"))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None
    q = q.to(device).float().unflatten(0, (keys.shape[0], -1))
    return where, q, keys.to(device).float(), scale
