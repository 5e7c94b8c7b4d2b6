"""Cache layers that carry the codes of their keys.

Two subclasses of transformers' own layers, with one protocol: keys are appended by `update`, and
`attend` runs one decode step over them. Codes lag behind keys and catch up when they are needed:

- a step of several tokens encodes its keys at once;
- the key of a decode step is left to `hata.hash_attend`, which encodes it on the way (`fresh`);
- keys that nobody encoded, because a step ran dense or the cache was filled before it came here,
  are encoded by the next step that needs them.

Codes count only for the tensor of keys that they were made of: keys that somebody else has put in
its place, or has written into, are noticed by identity and version counter, and encoded anew. So
codes can be missing but never wrong, and every operation on a cache (crop, reorder, repeat, select,
reset, offload) only has to keep the codes of the keys it keeps. What torch.compile or a CUDA graph
writes is not followed: keys that are written into between two such steps are not noticed.

A layer that is pickled becomes transformers' own, with its keys and values alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

import hata
from hata.hf import passes
from hata.hf.plan import LayerPlan, covered

# The last dimension of codes is bytes; norms have none, so slots are dimension 2 of everything.
SLOTS = 2
# What layers of transformers keep, over all tested releases.
DYNAMIC = ("keys", "values", "is_initialized", "dtype", "device")
STATIC = (
    *DYNAMIC,
    "max_cache_len",
    "cumulative_length",
    "batch_size",
    "num_heads",
    "k_head_dim",
    "v_head_dim",
)


class _Coded:
    """What both layers share: the plan, the buffers of codes and norms, one attention call."""

    plan: LayerPlan
    # These three are None until keys are there.
    placed: Any = None  # Placed
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
    # The keys that the codes are of, and how often they had been written into.
    _coded_keys: Any = None
    _version: int | None = None
    keys: Any
    values: Any
    is_initialized: bool

    def _fits(self, keys: torch.Tensor) -> bool:
        """Put the projection where the keys are; whether they are what it was made for."""
        plan = self.plan
        if keys.shape[1] != plan.kv_heads or keys.shape[3] != plan.head_dim:
            self.why = (
                f"its cache holds {keys.shape[1]} heads of size {keys.shape[3]}, where the encoder "
                f"has {plan.kv_heads} of size {plan.head_dim} (latent attention, or an encoder of "
                "another model)"
            )
            return False
        self.placed = plan.on(keys)
        return True

    def _mark(self, compiling: bool) -> None:
        """From here on, codes are of the keys as they are now."""
        keys = self._coded_keys = self.keys
        self._version = None if compiling else _version_of(keys)

    def _untouched(self, compiling: bool) -> bool:
        """Whether the keys are those that were marked."""
        keys = self.keys
        if keys is not self._coded_keys:
            return False
        return compiling or self._version is None or self._version == _version_of(keys)

    def _keep(self, operation: Any, *args: Any) -> None:
        """Do what moves keys and codes alike, without losing the codes."""
        untouched = self._untouched(compiling=False)
        with _versioned():
            operation(*args)
        if untouched:
            self._mark(compiling=False)

    def _copied(self, copy_of: Any) -> Any:
        """A copy, with every attribute that this layer has copied by a function."""
        twin = type(self).__new__(type(self))
        vars(twin).update({name: copy_of(value) for name, value in vars(self).items()})
        if self._untouched(compiling=False):
            twin._mark(compiling=False)
        else:
            twin._coded_keys = None
        return twin

    def _state(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What pickle keeps of this layer: what transformers' own has, without room to grow."""
        state = {name: getattr(self, name) for name in names if hasattr(self, name)}
        for name in ("keys", "values"):
            if isinstance(state[name], torch.Tensor):
                state[name] = state[name].clone(memory_format=torch.contiguous_format)
        return state

    def _buffers(self, keys: torch.Tensor, slots: int) -> None:
        """Allocate codes and norms for `slots` keys."""
        shape = (keys.shape[0], self.placed.key_heads, slots)
        width = self.plan.selection.bits // 8
        with _outside_inference_mode():
            self.codes = torch.zeros((*shape, width), dtype=torch.uint8, device=keys.device)
            if self.plan.key_norms:
                self.norms = torch.zeros(shape, dtype=torch.float16, device=keys.device)

    def _on_rows(self, operation: Any) -> None:
        """Apply an operation on batch rows to codes and norms."""
        with _versioned():
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
        q_codes = placed.query_codes(query)
        if placed.key_heads != self.plan.kv_heads:
            # One key code per query head: no fused op knows those, the three steps do.
            indices = hata.hamming_topk(
                q_codes,
                codes,
                selection.k,
                lengths=lengths,
                starts=starts,
                ratio=selection.ratio,
                k_min=selection.k_min,
                sink=selection.sink,
                recent=selection.recent,
                key_norms=norms,
            )
            return hata.sparse_attend(
                query,
                self.keys,
                self.values,
                indices,
                scale=scale,
                softcap=softcap,
                sink_logits=sink_logits,
            )
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
            lengths=lengths,
            starts=starts,
            ratio=selection.ratio,
            k_min=selection.k_min,
            sink=selection.sink,
            recent=selection.recent,
            key_norms=norms,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )


class HashDynamicLayer(_Coded, DynamicLayer):
    """A growing cache layer with codes.

    transformers' own layer copies all keys and values at every step, which alone costs as much as
    dense attention over them. This one keeps room to grow into: `keys` and `values` are views of
    larger buffers wherever no gradient is recorded. What anybody else may still hold of them is not
    written over.

    Attributes:
        coded: How many of the first keys have codes.
    """

    def __init__(self, plan: LayerPlan, filled: DynamicLayer | None = None) -> None:
        super().__init__()
        if filled is not None:
            _take(self, filled, DYNAMIC)
        self.plan = plan
        self.coded = 0
        # Slots that there is room for codes of.
        self._coded_room = 0
        self._rooms: tuple[_Room, _Room] | None = None

    def __copy__(self) -> HashDynamicLayer:
        twin = self._copied(lambda value: value)
        # Two layers must not write into the same room, nor into the same codes.
        twin._rooms = None
        twin._on_rows(torch.clone)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> HashDynamicLayer:
        twin = memo[id(self)] = self._copied(lambda value: copy.deepcopy(value, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return DynamicLayer, (), self._state(DYNAMIC)

    def total(self) -> int:
        """Keys so far."""
        return self.get_seq_length()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; keys of a step of several tokens are encoded."""
        compiling = torch.compiler.is_compiling()
        if self.keys is not self._coded_keys or not self._untouched(compiling):
            self._forget()
        # Where gradients are recorded, others may have kept what the room shows.
        if not compiling and not torch.is_grad_enabled():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            rooms = self._rooms or (_Room(), _Room())
            self.keys = rooms[0].append(self.keys, key_states)
            self.values = rooms[1].append(self.values, value_states)
            self._rooms = rooms
        else:
            super().update(key_states, value_states, *args, **kwargs)
            self._rooms = None
        self._mark(compiling)
        if self.placed is not None or (self.why is None and self._fits(self.keys)):
            several = key_states.size(SLOTS) > 1
            if several and self.keys.size(SLOTS) > self.plan.dense_below:
                self._encode_up_to(self.keys.size(SLOTS))
        (passes.of_compiler if compiling else passes.of_thread).layer = self
        return self.keys, self.values

    def _forget(self) -> None:
        """The keys are others than those that codes were made of."""
        self.coded = self._coded_room = 0
        self.placed = self.codes = self.norms = self.why = None

    def _encode_up_to(self, length: int) -> None:
        """Make room for all codes, and encode the keys before `length` that have none."""
        total = self.keys.shape[SLOTS]
        codes: Any = self.codes
        norms: Any = self.norms
        if codes is None or codes.shape[SLOTS] < total:
            before = (codes, norms)
            self._coded_room = _capacity(total)
            self._buffers(self.keys, self._coded_room)
            codes, norms = self.codes, self.norms
            for made, was in zip((codes, norms), before, strict=True):
                if self.coded and was is not None:
                    made[:, :, : self.coded] = was[:, :, : self.coded]
        if self.coded < length:
            new = slice(self.coded, length)
            hata.encode(
                self.placed.key_features(self.keys[:, :, new].detach()),
                self.placed.projection,
                self.placed.bias,
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
        length = self.keys.size(SLOTS)
        # The newest key is left to `hash_attend` where it can hash it.
        fresh = int(self.placed.plain_keys)
        if self.coded != length - fresh or length > self._coded_room:
            self.coded = min(self.coded, length - fresh)
            self._encode_up_to(length - fresh)
        out = self._attend(
            query,
            self.codes.narrow(SLOTS, 0, length),
            None if self.norms is None else self.norms.narrow(SLOTS, 0, length),
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
        self._keep(super().crop, tokens_to_remove)
        self.coded = min(self.coded, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        self._keep(super().reorder_cache, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x.repeat_interleave(repeats, dim=0))
        self._keep(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        if self.get_seq_length() > 0:
            self._on_rows(lambda x: x[indices, ...])
        self._keep(super().batch_select_indices, indices)

    def reset(self) -> None:
        """Forget everything."""
        if self._rooms is not None:
            # transformers may write zeros into what it takes to be its own.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        super().reset()
        self._forget()
        self._rooms = None
        self.left_padded = self.foreseen = None
        self._mark(compiling=False)

    def offload(self) -> None:
        """Move to host memory."""
        self._keep(super().offload)
        self._rooms = None
        self._on_device("cpu")

    def prefetch(self) -> None:
        """Move back to the device."""
        self._keep(super().prefetch)
        if self.is_initialized:
            self._on_device(self.device)


class HashStaticLayer(_Coded, StaticLayer):
    """A preallocated cache layer with codes: nothing moves, and nothing is read by the host.

    Attributes:
        pending: Whether the key of the last decode step has no code yet.
    """

    def __init__(self, plan: LayerPlan, filled: StaticLayer) -> None:
        super().__init__(filled.max_cache_len)
        _take(self, filled, STATIC)
        self.plan = plan
        self.pending = False
        if self.is_initialized:
            self._start()
            self._encode_all()

    def __copy__(self) -> HashStaticLayer:
        # As transformers' own: keys, values and with them codes are shared.
        return self._copied(lambda value: value)

    def __deepcopy__(self, memo: dict[int, Any]) -> HashStaticLayer:
        twin = memo[id(self)] = self._copied(lambda value: copy.deepcopy(value, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return StaticLayer, (self.max_cache_len,), self._state(STATIC)

    def total(self) -> int:
        """Keys so far; reads it from the device."""
        return int(self.cumulative_length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys, values, codes and norms."""
        with _outside_inference_mode():
            super().lazy_initialization(key_states, value_states)
        self._start()

    def _start(self) -> None:
        self._mark(torch.compiler.is_compiling())
        if not self._fits(self.keys):
            return
        plan = self.plan
        if self.placed.key_heads != plan.kv_heads and plan.dense_below > covered(plan.selection):
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

    def _encode_all(self) -> None:
        """Encode every slot: how many of them hold keys is known to the device alone."""
        if self.codes is not None:
            self._write(torch.arange(self.max_cache_len, device=self.device), self.keys)
        self.pending = False
        self._mark(torch.compiler.is_compiling())

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
        compiling = torch.compiler.is_compiling()
        keys = self.keys
        # What is compiled must not depend on how often keys were written into.
        version = None if compiling else self._version
        # As `_untouched` and `_mark`, which would take a call each.
        if keys is not self._coded_keys or (version is not None and version != keys._version):
            self._encode_all()
        if self.pending:
            # The last decode step ran dense: its key is encoded now.
            self._catch_up()
        tokens = key_states.size(SLOTS)
        if tokens == 1 and self.is_initialized and not compiling:
            # As transformers' own does, with two operations less: the slot is the length.
            slot = self.cumulative_length.reshape(1)
            keys.index_copy_(SLOTS, slot, key_states)
            self.values.index_copy_(SLOTS, slot, value_states)
            self.cumulative_length.add_(1)
        else:
            super().update(key_states, value_states, *args, **kwargs)
        if version is None:
            self._mark(compiling)
        else:
            self._version = keys._version
        if self.codes is None:
            pass
        elif tokens > 1:
            slots = torch.arange(tokens, device=self.device) + (self.cumulative_length - tokens)
            self._write(slots, key_states.to(self.keys.dtype))
        else:
            self.pending = True
        (passes.of_compiler if compiling else passes.of_thread).layer = self
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
        self._keep(super().reorder_cache, beam_idx)

    def reset(self) -> None:
        """Forget the keys, keep the buffers."""
        super().reset()
        self.pending = False
        self.left_padded = self.foreseen = None
        if self.is_initialized:
            self._mark(compiling=False)

    def offload(self) -> None:
        """Move to host memory."""
        self._keep(super().offload)
        if self.is_initialized:
            self._on_device("cpu")

    def prefetch(self) -> None:
        """Move back to the device."""
        self._keep(super().prefetch)
        if self.is_initialized:
            self._on_device(self.device)


class _Room:
    """A buffer with room to grow into, and how much of it was ever shown."""

    __slots__ = ("buffer", "last", "shown", "slots")

    def __init__(self) -> None:
        self.buffer: Any = None
        # The view that was returned last.
        self.last: Any = None
        self.shown = self.slots = 0

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Append along the slots; returns a view of all.

        The buffer is written to only behind what `held` shows of it, and where nobody else can hold
        what was shown of it before.
        """
        count = self.shown
        if held is not self.last:
            count = held.size(SLOTS) if held.dim() == 4 else 0
            # Nor do we hold it any more.
            self.last = None
            if not count or not self._can_go_on(held, count):
                self.slots = 0
        more = new.size(SLOTS)
        total = count + more
        if total > self.slots:
            self._make(held, new, count, total)
        buffer = self.buffer
        if buffer.dtype != new.dtype:
            # As under autocast for a while: transformers' own promotes.
            self.slots, self.last = 0, None
            return torch.cat([held, new], dim=SLOTS)
        buffer.narrow(SLOTS, count, more).copy_(new)
        self.shown = total
        self.last = buffer.narrow(SLOTS, 0, total)
        return self.last

    def _can_go_on(self, held: torch.Tensor, count: int) -> bool:
        """Whether `held` is the beginning of the buffer, and nobody holds what follows."""
        buffer = self.buffer
        return (
            buffer is not None
            and held.shape[:2] == buffer.shape[:2]
            and held.data_ptr() == buffer.data_ptr()
            and held.stride() == buffer.stride()
            and (count == self.shown or _holders(buffer) <= _OWN_HOLDERS)
        )

    def _make(self, held: torch.Tensor, new: torch.Tensor, count: int, total: int) -> None:
        like = held if count else new
        self.slots = _capacity(total)
        # Made where versions are counted, and may be written to whatever mode comes later.
        with _versioned():
            self.buffer = torch.empty(
                (*new.shape[:2], self.slots, new.shape[3]), dtype=like.dtype, device=like.device
            )
        if count:
            self.buffer.narrow(SLOTS, 0, count).copy_(held)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Room:
        twin = memo[id(self)] = _Room()
        twin.buffer, twin.last = copy.deepcopy((self.buffer, self.last), memo)
        twin.shown, twin.slots = self.shown, self.slots
        return twin


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of this one."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _own_holders() -> int:
    """What `_holders` says where only a buffer and a layer's view of it are there."""
    buffer = torch.empty(2)
    view = buffer[:1]
    return _holders(buffer if view.numel() else view)


def _version_of(tensor: Any) -> int | None:
    """How often a tensor was written into, where that is counted."""
    return None if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def _versioned() -> Iterator[None]:
    """Tensors that are made here count their versions, and may be written to in any mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _outside_inference_mode() -> Any:
    return nullcontext() if torch.compiler.is_compiling() else _versioned()


def _take(layer: Any, filled: Any, names: tuple[str, ...]) -> None:
    """Let a layer go on where another stands."""
    for name in names:
        if hasattr(filled, name):
            setattr(layer, name, getattr(filled, name))


def _capacity(length: int) -> int:
    """Slots to reserve for `length` keys: an eighth more, so that copies amortise."""
    return -(-(length + max(64, length // 8)) // 64) * 64


_OWN_HOLDERS = _own_holders()
