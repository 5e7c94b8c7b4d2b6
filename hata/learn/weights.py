"""A fingerprint of a model's folder: two models of one name and one size are not the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hata.errors import CaptureError

_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth"})
# Of a weight file, this many stretches of this many bytes are looked at, from its header to its
# end: a model of many gigabytes takes no time, and no layer is passed over.
_STRETCHES, _BYTES = 64, 4096


def fingerprint(model: Path) -> str:
    """Of the configuration, and of names, sizes and samples of the weight files.

    Raises:
        CaptureError: One cannot be read.
    """
    found = hashlib.sha256()
    try:
        files = sorted(path for path in model.iterdir() if path.suffix in _SUFFIXES)
        for path in [model / "config.json", *(path for path in files if path.is_file())]:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                # All of a small file; of a large one stretches, its end among them.
                if size <= _STRETCHES * _BYTES:
                    found.update(file.read())
                    continue
                for number in range(_STRETCHES):
                    file.seek(number * (size - _BYTES) // (_STRETCHES - 1))
                    found.update(file.read(_BYTES))
    except OSError as error:
        raise CaptureError(
            f"--model: {model} cannot be read ({error.strerror or error}); check the path"
        ) from None
    return found.hexdigest()[:16]
