"""`LayerPlan`: what is fixed for one attached layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import hata
from hata.encoder import Encoder
from hata.selection import Selection


class _Hash(NamedTuple):
    """How keys, or queries, are hashed: hidden layers, then a projection and a bias."""

    projection: torch.Tensor
    bias: torch.Tensor | None
    hidden: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """`hata.encoder.layer.features` in torch, in the dtype of x."""
        heads = self.projection.shape[0]
        if heads > x.shape[1]:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        for weight, bias in self.hidden:
            x = torch.nn.functional.silu(_affine(x, weight, bias))
        return x

    def signs(self, x: torch.Tensor) -> torch.Tensor:
        """The bits of vectors `[B, H', T, D]` as 1 and -1, `[B, max(H', C), T, r]`."""
        projected = _affine(self.features(x), self.projection, self.bias)
        return torch.where(projected > 0, 1.0, -1.0)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    repeats = x.shape[1] // weight.shape[0]
    x = x @ weight.repeat_interleave(repeats, dim=0)
    return x if bias is None else x + bias.repeat_interleave(repeats, dim=0)[:, None]


class Hasher:
    """How a layer hashes, on one device and in one dtype.

    Attributes:
        projection: Of keys, and of queries where those have none of their own, `[C, in, r]`.
        bias: `[C, r]`, or `None`.
        query_projection: Of queries, where `hash_attend` can hash them by itself; else `None`.
        query_bias: Its bias.
        key_heads: Codes of a key: one per KV head, or one per query head.
        plain_keys: Whether `hata.encode` alone hashes a key, so that `hash_attend` can.
        key_features: What `hata.encode` is given for keys.
        key_signs: The bits of keys `[B, Hkv, n, D]` as 1 and -1, `[B, C, n, r]`, in plain torch.
        query_signs: The same of queries `[B, H, T, D]`.
        attend_projection: What `hash_attend` is given as the projection, `[Hkv, D, r]`: where it
            hashes neither keys nor queries, numbers that it does not look at.
        attend_options: More of what it is given at every step.
    """

    def __init__(self, plan: LayerPlan, keys: _Hash, queries: _Hash | None) -> None:
        self.projection, self.bias, hidden = keys
        self.key_heads, _, bits = self.projection.shape
        self.plain_keys = not hidden and self.key_heads == plan.kv_heads
        self.attend_projection = self.projection
        if not self.plain_keys:
            shape = (plan.kv_heads, plan.head_dim, bits)
            self.attend_projection = self.projection.new_zeros(shape)
        self.query_projection = self.query_bias = self._queries = None
        if queries is not None:
            if queries.hidden or len(queries.projection) != plan.kv_heads:
                self._queries = queries
            else:
                self.query_projection, self.query_bias, _ = queries
        self.key_features, self.key_signs = keys.features, keys.signs
        self.query_signs = (queries or keys).signs
        self.attend_options = {
            "bias": self.bias if self.plain_keys else None,
            "query_projection": self.query_projection,
            "query_bias": self.query_bias,
            "dense_below": plan.dense_below,
            **plan.budget,
        }

    def encode_keys(self, keys: torch.Tensor, out: Any = None, norms: Any = None) -> torch.Tensor:
        """Codes `[B, C, n, r/8]` of keys `[B, Hkv, n, D]`."""
        features = self.key_features(keys.detach())
        return hata.encode(features, self.projection, self.bias, out=out, norms=norms)

    def query_codes(self, q: torch.Tensor) -> torch.Tensor | None:
        """Codes `[B, Hq, T, r/8]` of queries that `hash_attend` cannot hash, else `None`."""
        if self._queries is None:
            return None
        return hata.encode(self._queries.features(q), *self._queries[:2])

    def __deepcopy__(self, memo: dict[int, Any]) -> Hasher:
        # Read only: copies of a cache share it.
        return self


class LayerPlan:
    """The selection of a layer, how it hashes, and below which length it stays dense.

    Attributes:
        selection: What the layer attends to.
        budget: Options that `hamming_topk` and `hash_attend` take from it, beside k.
        kv_heads: KV heads the projection is for.
        head_dim: Key size the projection is for.
        key_norms: Whether scores are weighted with key norms.
        dense_below: Visible keys at or below which a query attends to all of them: the selection's
            `min_length`, or as many keys as the budget covers anyway, whichever is more; none where
            hashing is forced.
    """

    def __init__(
        self, encoder: Encoder, layer: int, selection: Selection, forced: bool = False
    ) -> None:
        self.selection = selection
        names = ("ratio", "k_min", "sink", "recent")
        self.budget = {name: getattr(selection, name) for name in names}
        bits = selection.bits
        queries = encoder.query(layer, bits)
        self._arrays = (
            (encoder.projection(layer, bits), encoder.bias(layer, bits), encoder.hidden[layer]),
            None if queries is None else (queries.projection, queries.bias, queries.hidden),
        )
        self.kv_heads, self.head_dim = encoder.shape.kv_heads, encoder.shape.head_dim
        self.key_norms = encoder.key_norms
        self.dense_below = 0 if forced else max(selection.min_length or 0, covered(selection))
        self._hashers: dict[tuple[torch.device, torch.dtype], Hasher] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlan:
        # Immutable, but for the memo of hashers: copies of a model or a cache share it.
        return self

    def on(self, like: torch.Tensor) -> Hasher:
        """How the layer hashes where `like` is, in its dtype."""
        key = (like.device, like.dtype)
        if key not in self._hashers:
            keys, queries = self._arrays
            self._hashers[key] = Hasher(
                self, _placed(keys, like), None if queries is None else _placed(queries, like)
            )
        return self._hashers[key]


def _placed(arrays: tuple[Any, Any, Any], like: torch.Tensor) -> _Hash:
    """Arrays as tensors where `like` is, in its dtype."""

    def place(array: np.ndarray) -> torch.Tensor:
        # Torch has no view of NumPy's bfloat16.
        found = torch.from_numpy(array.astype(np.float32)).to(like.device, like.dtype).contiguous()
        if not torch.compiler.is_compiling():
            # A fixed address spares CUDA graphs a copy per step.
            torch._dynamo.mark_static_address(found)
        return found

    projection, bias, hidden = arrays
    return _Hash(
        place(projection),
        None if bias is None else place(bias),
        tuple((place(weight), place(offset)) for weight, offset in hidden),
    )


def covered(selection: Selection) -> int:
    """The longest context whose keys the budget takes all."""
    if selection.ratio is None or selection.ratio == 1.0:
        return selection.k
    return min(selection.k, max(1, selection.k_min, selection.sink + selection.recent))
