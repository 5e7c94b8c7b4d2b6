"""Cache layers that carry the codes of their keys.

Two subclasses of transformers' own layers, with one protocol: keys are appended by `update`, and
`attend` runs one decode step over them. Codes lag behind keys and catch up when they are needed:

- a step of several tokens encodes its keys at once;
- the key of a decode step is left to `hata.hash_attend`, which encodes it on the way (`fresh`);
- keys that nobody encoded, because a step ran dense or the cache was filled before it came here,
  are encoded by the next step that needs them.

So codes can be missing but never wrong, and every operation on a cache (crop, reorder, repeat,
select, reset, offload) only has to keep the codes of the keys it keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

import hata
from hata.hf.plan import LayerPlan, Placed, covered

# The last dimension of codes is bytes; norms have none, so slots are dimension 2 of everything.
SLOTS = 2


class _Coded:
    """What both layers share: the plan, the buffers of codes and norms, one attention call."""

    plan: LayerPlan
    # These three are None until keys are there.
    placed: Any = None  # Placed
    codes: Any = None  # [B, Hkv or H, slots, r/8] uint8
    norms: Any = None  # [B, Hkv or H, slots] float16; None as well where scores have no norms
    # Whether the mask of this cache hides left padding at most; None: nobody looked yet.
    left_padded: bool | None = None
    keys: Any
    values: Any

    def _place(self, keys: torch.Tensor) -> Placed:
        """Put the projection where the keys are; they must be what it was made for."""
        plan = self.plan
        if keys.shape[1] != plan.kv_heads or keys.shape[3] != plan.head_dim:
            raise hata.EncoderError(
                f"encoder: has {plan.kv_heads} KV heads of size {plan.head_dim}, but the keys of "
                f"the model have {keys.shape[1]} of size {keys.shape[3]}; use an encoder made for "
                "this model"
            )
        self.placed = plan.on(keys)
        return self.placed

    def _buffers(self, keys: torch.Tensor, slots: int) -> None:
        """Allocate codes and norms for `slots` keys."""
        shape = (keys.shape[0], self.placed.key_heads, slots)
        width = self.plan.selection.bits // 8
        self.codes = torch.zeros((*shape, width), dtype=torch.uint8, device=keys.device)
        if self.plan.key_norms:
            self.norms = torch.zeros(shape, dtype=torch.float16, device=keys.device)

    def _on_rows(self, operation: Any) -> None:
        """Apply an operation on batch rows to codes and norms."""
        if self.codes is not None:
            self.codes = operation(self.codes)
        if self.norms is not None:
            self.norms = operation(self.norms)

    def _on_device(self, device: Any) -> None:
        self._on_rows(lambda x: x.to(device, non_blocking=True))

    def _attend(
        self,
        query: torch.Tensor,
        codes: torch.Tensor,
        norms: torch.Tensor | None,
        fresh: int,
        lengths: torch.Tensor | None,
        starts: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        selection, placed = self.plan.selection, self.placed
        budget = {
            "lengths": lengths,
            "starts": starts,
            "ratio": selection.ratio,
            "k_min": selection.k_min,
            "sink": selection.sink,
            "recent": selection.recent,
            "key_norms": norms,
        }
        rest = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        q_codes = placed.query_codes(query)
        if placed.key_heads != self.plan.kv_heads:
            # One key code per query head: no fused op knows those, the three steps do.
            indices = hata.hamming_topk(q_codes, codes, selection.k, **budget)
            return hata.sparse_attend(query, self.keys, self.values, indices, **rest)
        return hata.hash_attend(
            query,
            self.keys,
            self.values,
            codes,
            placed.given,
            selection.k,
            bias=placed.bias if placed.plain_keys else None,
            query_projection=placed.query_projection,
            query_bias=placed.query_bias,
            q_codes=q_codes,
            fresh=fresh,
            dense_below=self.plan.dense_below,
            **budget,
            **rest,
        )


class HashDynamicLayer(_Coded, DynamicLayer):
    """A growing cache layer with codes.

    transformers' own layer copies all keys and values at every step, which alone costs as much as
    dense attention over them. This one keeps room to grow into: `keys` and `values` are views of
    larger buffers wherever no gradient is recorded.

    Attributes:
        coded: How many of the first keys have codes.
    """

    def __init__(self, plan: LayerPlan, filled: DynamicLayer | None = None) -> None:
        super().__init__()
        if filled is not None:
            vars(self).update(vars(filled))
        self.plan = plan
        # Codes of another plan are of no use; the keys are encoded when they are needed.
        self.placed = self.codes = self.norms = None
        self.coded = 0
        self._key_room: torch.Tensor | None = None
        self._value_room: torch.Tensor | None = None

    def __copy__(self) -> HashDynamicLayer:
        # Two layers must not grow into the same room.
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        copied._key_room = copied._value_room = None
        copied._on_rows(torch.clone)
        return copied

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; keys of a step of several tokens are encoded."""
        recorded = key_states.requires_grad or value_states.requires_grad
        if not torch.compiler.is_compiling() and not (recorded and torch.is_grad_enabled()):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._key_room, self.keys = _append(self._key_room, self.keys, key_states)
            self._value_room, self.values = _append(self._value_room, self.values, value_states)
        else:
            super().update(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        if key_states.shape[-2] > 1 and length > self.plan.dense_below:
            self._encode_up_to(length)
        return self.keys, self.values

    def _encode_up_to(self, length: int) -> None:
        """Make room for all codes, and encode the keys before `length` that have none."""
        total = self.keys.shape[SLOTS]
        placed = self.placed or self._place(self.keys)
        codes: Any = self.codes
        norms: Any = self.norms
        if codes is None or codes.shape[SLOTS] < total or _sealed(codes):
            self._buffers(self.keys, _capacity(total))
            if codes is not None:
                self.codes[:, :, : self.coded] = codes[:, :, : self.coded]
                if norms is not None:
                    self.norms[:, :, : self.coded] = norms[:, :, : self.coded]
            codes, norms = self.codes, self.norms
        if self.coded < length:
            new = slice(self.coded, length)
            hata.encode(
                placed.key_features(self.keys[:, :, new].detach()),
                placed.projection,
                placed.bias,
                out=codes[:, :, new],
                norms=None if norms is None else norms[:, :, new],
            )
            self.coded = length

    def attend(
        self,
        query: torch.Tensor,
        starts: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hash attention of one query per row, `[B, H, 1, D]` -> `[B, H, 1, Dv]`."""
        length = self.keys.shape[SLOTS]
        # The newest key is left to `hash_attend` where it can hash it.
        fresh = int((self.placed or self._place(self.keys)).plain_keys)
        self.coded = min(self.coded, length - fresh)
        self._encode_up_to(length - fresh)
        out = self._attend(
            query,
            self.codes[:, :, :length],
            None if self.norms is None else self.norms[:, :, :length],
            fresh,
            None,
            starts,
            scale,
            softcap,
            sink_logits,
        )
        self.coded = length
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last keys, and forget their codes."""
        super().crop(tokens_to_remove)
        self.coded = min(self.coded, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x[indices, ...])
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.coded = 0
        self.codes = self.norms = self._key_room = self._value_room = None
        self.left_padded = None

    def offload(self) -> None:
        """Move to host memory."""
        super().offload()
        self._key_room = self._value_room = None
        self._on_device("cpu")

    def prefetch(self) -> None:
        """Move back to the device."""
        super().prefetch()
        if self.is_initialized:
            self._on_device(self.device)


class HashStaticLayer(_Coded, StaticLayer):
    """A preallocated cache layer with codes: nothing moves, and nothing is read by the host.

    Attributes:
        pending: Whether the key of the last decode step has no code yet.
    """

    def __init__(self, plan: LayerPlan, filled: StaticLayer) -> None:
        super().__init__(filled.max_cache_len)
        vars(self).update(vars(filled))
        self.plan = plan
        self.placed = self.codes = self.norms = None
        self.pending = False
        if self.is_initialized:
            # How many slots hold keys is known to the device alone, so all are encoded.
            self._start()
            self._write(torch.arange(self.max_cache_len, device=self.device), self.keys)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys, values, codes and norms."""
        super().lazy_initialization(key_states, value_states)
        self._start()

    def _start(self) -> None:
        placed, plan = self._place(self.keys), self.plan
        if placed.key_heads != plan.kv_heads and plan.dense_below > covered(plan.selection):
            raise hata.AttachError(
                f"selection: got min_length {plan.dense_below} above k with an encoder that hashes "
                "keys once per query head, which a static cache cannot hold; use a dynamic cache, "
                "or leave min_length out"
            )
        self._buffers(self.keys, self.max_cache_len)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.codes)
            if self.norms is not None:
                torch._dynamo.mark_static_address(self.norms)

    def _write(self, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Encode `keys` into `slots`."""
        keys = self.placed.key_features(keys.detach())
        if self.norms is None:
            codes = hata.encode(keys, self.placed.projection, self.placed.bias)
        else:
            norms = torch.empty(keys.shape[:3], dtype=torch.float16, device=keys.device)
            codes = hata.encode(keys, self.placed.projection, self.placed.bias, norms=norms)
            self.norms.index_copy_(SLOTS, slots, norms)
        self.codes.index_copy_(SLOTS, slots, codes)

    def _catch_up(self) -> None:
        """Encode the key of the last decode step."""
        last = self.cumulative_length.reshape(1) - 1
        self._write(last, self.keys.index_select(SLOTS, last))
        self.pending = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values; keys of a step of several tokens are encoded."""
        if self.pending:
            # The last decode step ran dense: its key is encoded now.
            self._catch_up()
        super().update(key_states, value_states, *args, **kwargs)
        tokens = key_states.shape[-2]
        if tokens > 1:
            slots = torch.arange(tokens, device=self.device) + (self.cumulative_length - tokens)
            self._write(slots, key_states.to(self.keys.dtype))
        else:
            self.pending = True
        return self.keys, self.values

    def attend(
        self,
        query: torch.Tensor,
        starts: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hash attention of one query per row, `[B, H, 1, D]` -> `[B, H, 1, Dv]`."""
        if self.pending and not self.placed.plain_keys:
            self._catch_up()
        out = self._attend(
            query,
            self.codes,
            self.norms,
            int(self.pending),
            self.cumulative_length,
            starts,
            scale,
            softcap,
            sink_logits,
        )
        self.pending = False
        return out

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        if self.is_initialized:
            self._on_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget the keys, keep the buffers."""
        super().reset()
        self.pending = False
        self.left_padded = None

    def offload(self) -> None:
        """Move to host memory."""
        super().offload()
        if self.is_initialized:
            self._on_device("cpu")

    def prefetch(self) -> None:
        """Move back to the device."""
        super().prefetch()
        if self.is_initialized:
            self._on_device(self.device)


def _capacity(length: int) -> int:
    """Slots to reserve for `length` keys: an eighth more, so that copies amortise."""
    return -(-(length + max(64, length // 8)) // 64) * 64


def _sealed(buffer: torch.Tensor) -> bool:
    """Whether a buffer was made in inference mode and may not be written to any more."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def _append(
    room: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append `new` to `held` along the slots; returns the buffer and the view of what it holds.

    `room` is written to only where `held` is still the view of it that was returned last.
    """
    count = held.shape[SLOTS] if held.dim() == 4 else 0
    total = count + new.shape[SLOTS]
    if (
        room is None
        or room.shape[SLOTS] < total
        or room.shape[0] != new.shape[0]
        or _sealed(room)
        or (count and (held.data_ptr() != room.data_ptr() or held.stride() != room.stride()))
    ):
        room = (held if count else new).new_empty((*new.shape[:2], _capacity(total), new.shape[3]))
        if count:
            room[:, :, :count] = held
    room[:, :, count:total] = new
    return room, room[:, :, :total]
