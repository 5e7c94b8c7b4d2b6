"""What is fixed for one attached layer: a `LayerPlan` if it hashes, a `DensePlan` if not."""

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
        key_heads: Codes of a key: one per KV head, or one per query head.
        plain_keys: Whether `hata.encode` alone hashes a key, so that `hash_attend` can.
        key_signs: The bits of keys `[B, Hkv, n, D]` as 1 and -1, `[B, C, n, r]`, in plain torch.
        query_signs: The same of queries `[B, H, T, D]`.
        attend_options: What `hash_attend` is given at every step.
    """

    def __init__(self, plan: LayerPlan, keys: _Hash, queries: _Hash | None) -> None:
        self._keys, self.key_signs, self.query_signs = keys, keys.signs, (queries or keys).signs
        self.key_heads, _, bits = keys.projection.shape
        self.plain_keys = not keys.hidden and self.key_heads == plan.kv_heads
        # Of keys and of queries, where `hash_attend` can hash them by itself.
        projection, bias, query_projection, query_bias = keys.projection, keys.bias, None, None
        if not self.plain_keys:
            # Numbers that it does not look at.
            projection, bias = projection.new_zeros((plan.kv_heads, plan.head_dim, bits)), None
        self._queries = queries
        if queries and not queries.hidden and len(queries.projection) == plan.kv_heads:
            query_projection, query_bias, _ = queries
            self._queries = None
        self.attend_options = {
            "projection": projection,
            "bias": bias,
            "query_projection": query_projection,
            "query_bias": query_bias,
            "dense_below": plan.dense_below,
            **plan.budget,
        }

    def encode_keys(self, keys: torch.Tensor, out: Any = None, norms: Any = None) -> torch.Tensor:
        """Codes `[B, C, n, r/8]` of keys `[B, Hkv, n, D]`."""
        projection, bias, _ = self._keys
        return hata.encode(
            self._keys.features(keys.detach()), projection, bias, out=out, norms=norms
        )

    def query_codes(self, q: torch.Tensor) -> torch.Tensor | None:
        """Codes `[B, Hq, T, r/8]` of queries that `hash_attend` cannot hash, else `None`."""
        if self._queries is None:
            return None
        projection, bias, _ = self._queries
        return hata.encode(self._queries.features(q), projection, bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hasher:
        # Read only: copies of a cache share it.
        return self


class LayerPlan:
    """The selection of a layer, how it hashes, and below which length it stays dense.

    Attributes:
        selection: What the layer attends to.
        budget: Options that `hamming_topk` and `hash_attend` take from it.
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
        names = ("k", "ratio", "k_min", "sink", "recent")
        self.budget = {name: getattr(selection, name) for name in names}
        bits, hidden = selection.bits, encoder.hidden[layer]
        self._keys = encoder.projection(layer, bits), encoder.bias(layer, bits), hidden
        own = encoder.query(layer, bits)
        self._queries = None if own is None else (own.projection, own.bias, own.hidden)
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
            queries = None if self._queries is None else _placed(self._queries, like)
            self._hashers[key] = Hasher(self, _placed(self._keys, like), queries)
        return self._hashers[key]


class DensePlan:
    """A layer that attends to all keys of a cache with room, by the kernels of hashed layers.

    Those read a cache as it lies: no head is repeated, and how many slots hold keys is told on the
    device. Where a cache has no room, the model's own function attends.

    Attributes:
        why: Why the layer is dense.
    """

    selection = None
    # In a cache without room, all lengths are.
    dense_below = 2**31 - 1
    # As the problems that are tuned; no code is looked at.
    _BITS, _K = 128, 512

    def __init__(self, why: str) -> None:
        self.why = why
        self._blanks: dict[torch.device, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DensePlan:
        return self

    def on(self, like: torch.Tensor) -> torch.Tensor:
        """The code of every key, where `like` is."""
        found = self._blanks.get(like.device)
        if found is None:
            found = torch.zeros((1, 1, 1, self._BITS // 8), dtype=torch.uint8, device=like.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(found)
                self._blanks[like.device] = found
        return found

    def options(self, keys: torch.Tensor) -> dict[str, Any]:
        """What `hash_attend` is given beside queries, keys and values."""
        codes = self.on(keys).expand(*keys.shape[:3], -1)
        more = {"projection": None, "q_codes": codes[:, :, :1]}
        return {"key_codes": codes, **more, "k": self._K, "dense_below": self.dense_below}


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
    hidden = tuple((place(weight), place(offset)) for weight, offset in hidden)
    return _Hash(place(projection), None if bias is None else place(bias), hidden)


def covered(selection: Selection) -> int:
    """The longest context whose keys the budget takes all."""
    if selection.ratio is None or selection.ratio == 1.0:
        return selection.k
    return min(selection.k, max(1, selection.k_min, selection.sink + selection.recent))
