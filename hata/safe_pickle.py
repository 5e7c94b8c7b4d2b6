"""Pickles of plain data: dictionaries, lists, numbers, strings, NumPy arrays and torch tensors.

A pickle is a program that may name any function to call. This reader knows the few that rebuild
arrays and tensors, and refuses all others before anything is called.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

# A file of the largest published weights is some 160 MB.
_MOST_BYTES = 2 << 30


class UnsafePickle(ValueError):
    """A pickle asks for something that could run code, or is too large."""


def load_plain(path: Path) -> Any:
    """Read a pickle of plain data.

    Raises:
        UnsafePickle: It names anything else, or is over 2 GiB.
        Exception: It is damaged; of any kind.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise UnsafePickle(f"of {size} bytes, expected at most {_MOST_BYTES}; it is something else")
    with path.open("rb") as file:
        return _Plain(file).load()


class _Plain(pickle.Unpickler):
    """Finds the names that plain data needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        found = _known().get((module, name))
        if found is None:
            raise UnsafePickle(
                f"a pickle that asks for {module}.{name}, which could run code; expected nothing "
                "but dictionaries, lists, arrays and tensors; do not load it by other means unless "
                "you trust who made it"
            )
        return found


def _known() -> dict[tuple[str, str], Any]:
    """What may be named: how NumPy and torch rebuild their arrays."""
    from numpy._core import multiarray, numeric
    from torch import _utils

    rebuilt: Any = vars(multiarray)["_reconstruct"]
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): _load_storage,
    }
    for home in ("numpy._core", "numpy.core"):
        known[f"{home}.multiarray", "_reconstruct"] = rebuilt
        known[f"{home}.numeric", "_frombuffer"] = vars(numeric)["_frombuffer"]
    return known


def _load_storage(data: bytes) -> Any:
    """What torch's own function does, which reads a pickle inside the pickle, but restricted."""
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
