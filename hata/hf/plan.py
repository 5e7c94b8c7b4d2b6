"""`LayerPlan`: what is fixed for one attached layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hata.encoder import Encoder
from hata.selection import Selection


class Placed:
    """A layer's projection and bias on one device, in one dtype."""

    __slots__ = ("bias", "projection")

    def __init__(self, projection: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.projection = projection  # [Hkv, D, r]
        self.bias = bias  # [Hkv, r]

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        # Read only: copies of a cache share it.
        return self


class LayerPlan:
    """The selection of a layer, its projection, and below which length it stays dense.

    Attributes:
        selection: The layer's policy.
        kv_heads: KV heads the projection is for.
        head_dim: Key size the projection is for.
        key_norms: Whether scores are weighted with key norms.
        dense_below: Visible keys at or below which a query attends to all of them: the selection's
            `min_length`, or as many keys as the budget covers anyway, whichever is more.
    """

    __slots__ = (
        "_bias",
        "_placed",
        "_projection",
        "dense_below",
        "head_dim",
        "key_norms",
        "kv_heads",
        "selection",
    )

    def __init__(self, encoder: Encoder, layer: int, selection: Selection) -> None:
        self.selection = selection
        # Torch has no view of NumPy's bfloat16.
        self._projection = encoder.projection(layer, selection.bits).astype(np.float32)
        bias = encoder.bias(layer, selection.bits)
        self._bias = None if bias is None else bias.astype(np.float32)
        self.kv_heads, self.head_dim, _ = self._projection.shape
        self.key_norms = encoder.key_norms
        self.dense_below = max(selection.min_length or 0, covered(selection))
        self._placed: dict[tuple[torch.device, torch.dtype], Placed] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlan:
        # Immutable, but for the memo of placements: copies of a model or a cache share it.
        return self

    def on(self, like: torch.Tensor) -> Placed:
        """The projection where `like` is, in its dtype."""
        key = (like.device, like.dtype)
        placed = self._placed.get(key)
        if placed is None:
            projection = torch.from_numpy(self._projection).to(like.device, like.dtype)
            bias = None
            if self._bias is not None:
                bias = torch.from_numpy(self._bias).to(like.device, like.dtype)
            if not torch.compiler.is_compiling():
                # A fixed address spares CUDA graphs a copy per step.
                torch._dynamo.mark_static_address(projection)
                if bias is not None:
                    torch._dynamo.mark_static_address(bias)
            placed = self._placed[key] = Placed(projection.contiguous(), bias)
        return placed


def covered(selection: Selection) -> int:
    """The longest context whose keys the budget takes all."""
    if selection.ratio is None or selection.ratio == 1.0:
        return selection.k
    return min(selection.k, max(1, selection.k_min, selection.sink + selection.recent))
