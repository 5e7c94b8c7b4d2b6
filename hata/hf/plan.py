"""`LayerPlan`: what is fixed for one attached layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import hata
from hata.encoder import Encoder
from hata.selection import Selection


class Placed:
    """How a layer hashes, on one device and in one dtype.

    Attributes:
        projection: Of keys, and of queries where those have none of their own, `[C, in, r]`.
        bias: `[C, r]`, or `None`.
        query_projection: Of queries, where `hash_attend` can hash them by itself; else `None`.
        query_bias: Its bias.
        key_heads: Codes of a key: one per KV head, or one per query head.
        plain_keys: Whether `hata.encode` alone hashes a key, so that `hash_attend` can.
        given: What `hash_attend` is given as the projection, `[Hkv, D, r]`: where it hashes neither
            keys nor queries, numbers that it does not look at.
    """

    __slots__ = (
        "_hidden",
        "_query",
        "bias",
        "given",
        "key_heads",
        "plain_keys",
        "projection",
        "query_bias",
        "query_projection",
    )

    def __init__(self, keys: _Side, query: _Side | None, kv_heads: int, head_dim: int) -> None:
        self.projection, self.bias, self._hidden = keys
        self.key_heads = self.projection.shape[0]
        self.plain_keys = not self._hidden and self.key_heads == kv_heads
        self.given = self.projection
        if not self.plain_keys:
            bits = self.projection.shape[2]
            self.given = self.projection.new_zeros((kv_heads, head_dim, bits))
        direct = query is not None and not query.hidden and len(query.projection) == kv_heads
        self.query_projection = query.projection if query is not None and direct else None
        self.query_bias = query.bias if query is not None and direct else None
        self._query = None if direct else query

    def key_features(self, keys: torch.Tensor) -> torch.Tensor:
        """What `hata.encode` is given for keys `[B, Hkv, n, D]`."""
        return keys if self.plain_keys else _features(keys, self._hidden, self.key_heads)

    def query_codes(self, q: torch.Tensor) -> torch.Tensor | None:
        """Codes `[B, Hq, T, r/8]` of queries that `hash_attend` cannot hash, else `None`."""
        if self._query is None:
            return None
        projection, bias, hidden = self._query
        return hata.encode(_features(q, hidden, len(projection)), projection, bias)

    def key_signs(self, keys: torch.Tensor) -> torch.Tensor:
        """The bits of keys `[B, Hkv, n, D]` as 1 and -1, `[B, C, n, r]`, in plain torch."""
        return _signs(self.key_features(keys), self.projection, self.bias)

    def query_signs(self, q: torch.Tensor) -> torch.Tensor:
        """The bits of queries `[B, H, T, D]` as 1 and -1, `[B, Hq, T, r]`, in plain torch."""
        if self._query is not None:
            projection, bias, hidden = self._query
            return _signs(_features(q, hidden, len(projection)), projection, bias)
        if self.query_projection is not None:
            return _signs(q, self.query_projection, self.query_bias)
        return _signs(q, self.projection, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        # Read only: copies of a cache share it.
        return self


class _Side(NamedTuple):
    """Projection, bias and hidden layers of keys or of queries."""

    projection: torch.Tensor
    bias: torch.Tensor | None
    hidden: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def _features(
    x: torch.Tensor, hidden: tuple[tuple[torch.Tensor, torch.Tensor], ...], heads: int
) -> torch.Tensor:
    """`hata.encoder_layer.features` in torch, in the dtype of x."""
    if heads > x.shape[1]:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    for weight, bias in hidden:
        repeats = x.shape[1] // heads
        x = x @ weight.repeat_interleave(repeats, dim=0)
        x = torch.nn.functional.silu(x + bias.repeat_interleave(repeats, dim=0)[:, None])
    return x


def _signs(x: torch.Tensor, projection: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    repeats = x.shape[1] // len(projection)
    projected = x @ projection.repeat_interleave(repeats, dim=0)
    if bias is not None:
        projected = projected + bias.repeat_interleave(repeats, dim=0)[:, None]
    return torch.where(projected > 0, 1.0, -1.0)


class LayerPlan:
    """The selection of a layer, how it hashes, and below which length it stays dense.

    Attributes:
        selection: The layer's policy.
        kv_heads: KV heads the projection is for.
        head_dim: Key size the projection is for.
        key_norms: Whether scores are weighted with key norms.
        dense_below: Visible keys at or below which a query attends to all of them: the selection's
            `min_length`, or as many keys as the budget covers anyway, whichever is more; none where
            hashing is forced.
    """

    __slots__ = (
        "_arrays",
        "_placed",
        "dense_below",
        "head_dim",
        "key_norms",
        "kv_heads",
        "selection",
    )

    def __init__(
        self, encoder: Encoder, layer: int, selection: Selection, forced: bool = False
    ) -> None:
        self.selection = selection
        bits = selection.bits
        keys = (encoder.projection(layer, bits), encoder.bias(layer, bits), encoder.hidden[layer])
        query = encoder.query(layer, bits)
        asked = None if query is None else (query.projection, query.bias, query.hidden)
        self._arrays = (keys, asked)
        self.kv_heads, self.head_dim = encoder.shape.kv_heads, encoder.shape.head_dim
        self.key_norms = encoder.key_norms
        self.dense_below = 0 if forced else max(selection.min_length or 0, covered(selection))
        self._placed: dict[tuple[torch.device, torch.dtype], Placed] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlan:
        # Immutable, but for the memo of placements: copies of a model or a cache share it.
        return self

    def on(self, like: torch.Tensor) -> Placed:
        """How the layer hashes where `like` is, in its dtype."""
        key = (like.device, like.dtype)
        placed = self._placed.get(key)
        if placed is None:
            sides = [None if side is None else _side(side, like) for side in self._arrays]
            assert sides[0] is not None
            placed = self._placed[key] = Placed(sides[0], sides[1], self.kv_heads, self.head_dim)
        return placed


def _side(arrays: tuple[Any, Any, Any], like: torch.Tensor) -> _Side:
    """Arrays as tensors where `like` is, in its dtype."""

    def place(array: np.ndarray) -> torch.Tensor:
        # Torch has no view of NumPy's bfloat16.
        found = torch.from_numpy(array.astype(np.float32)).to(like.device, like.dtype).contiguous()
        if not torch.compiler.is_compiling():
            # A fixed address spares CUDA graphs a copy per step.
            torch._dynamo.mark_static_address(found)
        return found

    projection, bias, hidden = arrays
    return _Side(
        place(projection),
        None if bias is None else place(bias),
        tuple((place(weight), place(offset)) for weight, offset in hidden),
    )


def covered(selection: Selection) -> int:
    """The longest context whose keys the budget takes all."""
    if selection.ratio is None or selection.ratio == 1.0:
        return selection.k
    return min(selection.k, max(1, selection.k_min, selection.sink + selection.recent))
