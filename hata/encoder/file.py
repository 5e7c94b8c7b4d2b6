"""Encoder files as bytes: reading, naming the tensors of a layer, writing whole or not at all.

`hata.encoder` describes the format. Files are safetensors, which hold numbers and strings only:
nothing in one is ever executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hata.encoder.layer import Hidden, LayerHash, QueryHash
from hata.errors import EncoderError
from hata.files import swap
from hata.words import clipped

FORMAT = "hata.encoder/1"
FORMAT_2 = "hata.encoder/2"
_PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
# More hidden layers than anybody trains, and few enough that a hostile file costs nothing.
_MOST_HIDDEN = 16
_NAME = re.compile(
    r"layers\.(0|[1-9]\d{0,5})\."
    r"(?:(projection|bias|query_projection|query_bias)"
    r"|(query_hidden|hidden)\.(\d|1[0-5])\.(weight|bias))"
)


def user_path(given: Any) -> Path:
    """A path as a user writes it, `~` included.

    Raises:
        EncoderError: it is no path at all, or names a home that does not exist.
    """
    try:
        if given == "":
            raise ValueError("it is empty")
        return Path(given).expanduser()
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"path: got {given!r} ({error}), expected the path of a safetensors file"
        ) from None


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of an encoder file.

    Raises:
        EncoderError: The file is absent, a pickle, truncated or of another format.
    """
    if path.suffix.lower() in _PICKLES:
        raise EncoderError(
            f"encoder: got {path}, a pickle, which can run code when it is read; expected a "
            f"safetensors file; HATA's weights are converted with: hata convert {path.parent} "
            "--config MODEL --out encoder.safetensors"
        )
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise EncoderError(
            f"encoder: got {path}, which is not a file; expected a safetensors file, or "
            '"random" for the untrained encoder'
        )
    return read_tensors(path, (FORMAT, FORMAT_2))


def read_tensors(
    path: Path, formats: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of a safetensors file.

    Raises:
        EncoderError: It is damaged, or of none of the formats, where some are named.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            found = header.get("format", "none")
            if formats and found not in formats:
                raise EncoderError(
                    f"encoder: got {path} of format {clipped(repr(found))}, expected "
                    f"{' or '.join(map(repr, formats))}; write one with Encoder.save"
                )
            names = list(file.keys())
            if any(file.get_slice(name).get_dtype() == "BF16" for name in names):
                # It teaches NumPy that dtype.
                import ml_dtypes  # noqa: F401
            tensors = {name: file.get_tensor(name) for name in names}
    except ImportError as error:
        raise EncoderError(
            f"encoder: got {path} in bfloat16, which takes ml_dtypes to read ({error}); "
            "pip install ml_dtypes"
        ) from error
    # A dtype that NumPy has not is an AttributeError.
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"encoder: got {path}, which cannot be read as safetensors ({error}); expected a "
            "whole file of known dtypes; fetch or write it again"
        ) from error
    return header, tensors


def assembled(
    path: Path, tensors: Mapping[str, np.ndarray], num_layers: int, *, more: bool
) -> list[LayerHash]:
    """The parts of every layer, by the names of their tensors in the file at `path`.

    Only where there may be `more` has a layer query projections and hidden layers.

    Raises:
        EncoderError: A name is unknown, a hidden layer lacks its bias, or a query its projection.
    """
    known = ("projection", "bias")
    for name in sorted(tensors):
        match = _NAME.fullmatch(name)
        if not match or int(match[1]) >= num_layers or not (more or match[2] in known):
            raise EncoderError(
                f"encoder: got {path} with tensors [{clipped(repr(name))}], expected "
                f"layers.N.projection and layers.N.bias with N below {num_layers}"
                + (", query_projection, query_bias, hidden and query_hidden" if more else "")
            )

    def part(layer: int, name: str) -> np.ndarray | None:
        return tensors.get(f"layers.{layer}.{name}")

    def hidden(layer: int, side: str) -> tuple[Hidden, ...]:
        found = []
        for number in range(_MOST_HIDDEN):
            pair = [part(layer, f"{side}.{number}.{one}") for one in ("weight", "bias")]
            if pair[0] is not None and pair[1] is not None and number == len(found):
                found.append(Hidden(pair[0], pair[1]))
            elif any(one is not None for one in pair):
                raise EncoderError(
                    f"encoder: got {path} with half of layers.{layer}.{side}.{number}, or one "
                    "after a gap; expected a weight and a bias each, numbered from 0; fetch or "
                    "write it again"
                )
        return tuple(found)

    def query(layer: int) -> QueryHash | None:
        projection, bias = part(layer, "query_projection"), part(layer, "query_bias")
        before = hidden(layer, "query_hidden")
        if projection is not None:
            return QueryHash(projection, bias, before)
        if bias is not None or before:
            raise EncoderError(
                f"encoder: got {path} with parts of layers.{layer}.query_projection but not that; "
                "fetch or write it again"
            )
        return None

    return [
        LayerHash(part(i, "projection"), part(i, "bias"), query(i), hidden(i, "hidden"))
        for i in range(num_layers)
    ]


def flattened(layers: Iterable[LayerHash]) -> dict[str, np.ndarray]:
    """The tensors of all layers, by name: the inverse of `assembled`."""
    tensors: dict[str, np.ndarray | None] = {}
    for layer, (projection, bias, query, hidden) in enumerate(layers):
        sides = [("", projection, bias, hidden)]
        if query is not None:
            sides.append(("query_", query.projection, query.bias, query.hidden))
        for side, projection, bias, hidden in sides:
            name = f"layers.{layer}.{side}"
            tensors |= {f"{name}projection": projection, f"{name}bias": bias}
            for number, one in enumerate(hidden):
                for part, array in one._asdict().items():
                    tensors[f"{name}hidden.{number}.{part}"] = array
    return {name: np.ascontiguousarray(x) for name, x in tensors.items() if x is not None}


def write(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """Write a file, whole or not at all; equal tensors and headers are equal files.

    Raises:
        OSError: It is a folder's, or cannot be written to.
        ValueError: The name holds a NUL.
    """
    from safetensors.numpy import save

    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    swap(path, _ordered(save(dict(tensors), metadata=dict(header))))


def _ordered(raw: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with sorted names, and the data, which stays as it is.

    The library writes the metadata in an order that differs from run to run.
    """
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    # The data starts at a multiple of 8, as the library has it.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(raw)[end:]
