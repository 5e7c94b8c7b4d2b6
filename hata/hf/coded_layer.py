"""`CodedLayer`: codes that stay with their keys; what both layers of `hata.hf.cache` share.

Codes count only for the tensor of keys that they were made of: keys that somebody else has put in
its place, or has written into, are noticed by identity and version counter, and encoded anew. So
codes can be missing but never wrong, and every operation on a cache (crop, reorder, repeat, select,
reset, offload) only has to keep the codes of the keys it keeps. What torch.compile or a CUDA graph
writes is not followed: keys that are written into between two such steps are not noticed.

A layer that is pickled becomes transformers' own, with its keys and values alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from hata.hf.growing import outside_inference_mode
from hata.hf.layer_plan import DensePlan, LayerPlan

# What layers of transformers keep, over all tested releases.
DYNAMIC = ("keys", "values", "is_initialized", "dtype", "device")
STATIC = (
    *DYNAMIC,
    *("max_cache_len", "cumulative_length", "batch_size", "num_heads", "k_head_dim", "v_head_dim"),
)


class CodedLayer(CacheLayerMixin):
    """A cache layer with codes of its keys; goes on where a layer of transformers stands."""

    # The class that it takes the place of.
    _own: type[DynamicLayer | StaticLayer]
    # These three are None until keys are there.
    hasher: Any = None  # Hasher
    codes: Any = None  # [B, Hkv or H, slots, r/8] uint8
    norms: Any = None  # [B, Hkv or H, slots] float16; None as well where scores have no norms
    # Why its keys cannot be hashed, as far as they themselves tell.
    why: str | None = None
    # Whether the masks of this cache hide left padding at most; None: nobody looked yet.
    left_padded: bool | None = None
    # The same, found where a mask was made for a compiled step of several tokens.
    foreseen: bool | None = None
    # Whether its additive masks hide keys and do nothing else; None: none was looked at.
    only_hides: bool | None = None
    # First visible keys of the rows, where a step knows them without a mask.
    starts: Any = None
    # The keys that the codes are of, and how often they had been written into.
    _coded_keys: Any = None
    _version: int | None = None
    keys: Any
    values: Any
    device: Any

    def __init__(self, plan: LayerPlan | DensePlan, filled: Any) -> None:
        # Not those of transformers: all that they make comes from `filled`.
        # `vars(self)` would make every later look at an attribute slower.
        for name, value in _kept(filled).items():
            setattr(self, name, value)
        self.plan: Any = plan

    def __copy__(self) -> Any:
        return self._copied(lambda value: value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self._copied(lambda value: copy.deepcopy(value, memo))
        return twin

    def _copied(self, copy_of: Any) -> Any:
        """A copy, with every attribute that this layer has copied by a function."""
        twin = type(self).__new__(type(self))
        vars(twin).update({name: copy_of(value) for name, value in vars(self).items()})
        if self._untouched(compiling=False):
            twin._mark(compiling=False)
        else:
            twin._coded_keys = None
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = _kept(self)
        for name in ("keys", "values"):
            if isinstance(state[name], torch.Tensor):
                # Without the room to grow that it may be a view of.
                state[name] = state[name].clone(memory_format=torch.contiguous_format)
        return self._own, (self.max_cache_len,) if isinstance(self, StaticLayer) else (), state

    def total(self) -> int:
        """Keys so far; read from the device where the layer is static."""
        return int(self.get_seq_length())

    def _fits(self) -> bool:
        """Put the projection where the keys are; whether they are what it was made for."""
        plan, keys = self.plan, self.keys
        if plan.selection is None:
            # No keys are.
            plan.on(keys)
            return False
        if keys.shape[1] != plan.kv_heads or keys.shape[3] != plan.head_dim:
            self.why = (
                f"its cache holds {keys.shape[1]} heads of size {keys.shape[3]}, where the encoder "
                f"has {plan.kv_heads} of size {plan.head_dim} (latent attention, or an encoder of "
                "another model)"
            )
            return False
        self.hasher = plan.on(keys)
        return True

    def _mark(self, compiling: bool) -> None:
        """From here on, codes are of the keys as they are now."""
        keys = self._coded_keys = self.keys
        self._version = None if compiling else version_of(keys)

    def _untouched(self, compiling: bool) -> bool:
        """Whether the keys are those that were marked."""
        keys = self.keys
        if keys is not self._coded_keys:
            return False
        return compiling or self._version is None or self._version == version_of(keys)

    def _keep(self, own: Any, *args: Any, codes: Any = None) -> None:
        """Do with keys what `own` does, and alike with codes, without losing those."""
        untouched = self._untouched(compiling=False)
        with outside_inference_mode():
            own(*args)
            if codes is not None:
                self._move_codes(codes)
        if untouched:
            self._mark(compiling=False)

    def _move_codes(self, operation: Any) -> None:
        if self.codes is not None:
            self.codes = operation(self.codes)
        if self.norms is not None:
            self.norms = operation(self.norms)

    def _make_codes(self, slots: int) -> None:
        """Allocate codes and norms for `slots` keys."""
        keys = self.keys
        shape = (keys.shape[0], self.hasher.key_heads, slots)
        width = self.plan.selection.bits // 8
        with outside_inference_mode():
            self.codes = torch.zeros((*shape, width), dtype=torch.uint8, device=keys.device)
            if self.plan.key_norms:
                self.norms = torch.zeros(shape, dtype=torch.float16, device=keys.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        move = super().reorder_cache
        self._keep(move, beam_idx, codes=lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget the keys, and what was found of their masks."""
        super().reset()
        self.left_padded = self.foreseen = None
        self._mark(compiling=False)

    def offload(self) -> None:
        """Move to host memory."""
        self._keep(super().offload, codes=lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device."""
        self._keep(super().prefetch, codes=lambda x: x.to(self.device, non_blocking=True))


def version_of(tensor: Any) -> int | None:
    """How often a tensor was written into, where that is counted."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _kept(layer: Any) -> dict[str, Any]:
    """What a layer has of all that those of transformers keep."""
    return {name: getattr(layer, name) for name in STATIC if hasattr(layer, name)}
