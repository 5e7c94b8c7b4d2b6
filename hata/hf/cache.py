"""Cache layers that carry the codes of their keys.

Two subclasses of transformers' own layers, with one protocol: keys are appended by `update`; for a
decode step over them `ready` gives the codes, and `attended` notes that it ran. Codes lag behind
keys and catch up when they are needed:

- a step of several tokens encodes its keys at once;
- the key of a decode step is left to `hata.hash_attend`, which encodes it on the way (`fresh`);
- keys that nobody encoded, because a step ran dense or the cache was filled before it came here,
  are encoded by the next step that needs them.

That they stay with their keys is the matter of `hata.hf.coded_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

import hata
from hata.hf import forward_pass, reasons
from hata.hf.coded_layer import CodedLayer, version_of
from hata.hf.growing import SLOTS, GrowingBuffer, capacity, outside_inference_mode
from hata.hf.layer_plan import LayerPlan, covered


class CannotCapture(Exception):
    """A step cannot be captured in a CUDA graph; the message says why."""


class HashDynamicLayer(CodedLayer, DynamicLayer):
    """A growing cache layer with codes.

    `keys` and `values` are views of larger buffers wherever no gradient is recorded
    (`hata.hf.growing`).

    Attributes:
        coded: How many of the first keys have codes.
    """

    _own = DynamicLayer
    coded = 0
    # The steps of the cache that a CUDA graph runs; None where no graph fits this layer as it is.
    step: Any = None  # hata.hf.cache_steps.CacheSteps
    _keys: Any = None
    _values: Any = None
    # Slots that there is room for codes of.
    _coded_room = 0
    _buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None

    # A graph writes keys without a word to this layer, which takes note of them when it is asked.

    @property
    def keys(self) -> Any:
        """Keys `[B, Hkv, n, D]`."""
        if self.step is not None:
            self.step.settle()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._leave_graph()
        self._keys = keys

    @property
    def values(self) -> Any:
        """Values `[B, Hkv, n, Dv]`."""
        if self.step is not None:
            self.step.settle()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._leave_graph()
        self._values = values

    def _leave_graph(self) -> None:
        if self.step is not None:
            self.step.close()
            self.step = None

    def room(self) -> dict[str, Any] | None:
        """Buffers with a slot behind all keys, as a layer of fixed size has them; None: not yet.

        Raises:
            CannotCapture: Such a layer would not attend to the same keys.
        """
        keys, values, hasher = self.keys, self.values, self.hasher
        plan: Any = self.plan
        if plan.selection is not None:
            if self.why is not None:
                raise CannotCapture(self.why)
            if hasher is None:
                return None
            of_query_heads = hasher.key_heads != plan.kv_heads
            if of_query_heads and plan.dense_below > covered(plan.selection):
                raise CannotCapture(reasons.MANY_CODES)
        if self._buffers is None or not self._untouched(compiling=False):
            return None
        wide = [one.behind(x) for one, x in zip(self._buffers, (keys, values), strict=True)]
        if wide[0] is None or wide[1] is None:
            return None
        found = {"keys": wide[0], "values": wide[1], "codes": None, "norms": None}
        if hasher is not None:
            self._encode_up_to(keys.shape[SLOTS], wide[0].shape[SLOTS])
            slots = slice(wide[0].shape[SLOTS])
            found["codes"] = self.codes[:, :, slots]
            found["norms"] = None if self.norms is None else self.norms[:, :, slots]
        return found

    def advance(self, count: int, by_us_alone: bool) -> None:
        """Take note of keys that a graph wrote, codes included, and of others that were changed."""
        if self._buffers is not None:
            keys, values = self._buffers
            self._keys, self._values = keys.advance(count), values.advance(count)
        self.coded = self._keys.shape[SLOTS] if self.hasher is not None else 0
        # Not `self.keys`, which would ask the graph again.
        self._coded_keys = self._keys if by_us_alone else None
        self._version = version_of(self._keys)

    def _copied(self, copy_of: Any) -> Any:
        step = self.step
        if step is not None:
            step.settle()
        # A graph is of this layer alone.
        self.step = None
        twin = super()._copied(copy_of)
        self.step = step
        return twin

    def __copy__(self) -> HashDynamicLayer:
        twin = super().__copy__()
        # Two layers must not write into the same buffers, nor into the same codes.
        twin._buffers = None
        with outside_inference_mode():
            twin._move_codes(torch.clone)
        return twin

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; keys of a step of several tokens are encoded."""
        compiling = torch.compiler.is_compiling()
        if not self._untouched(compiling):
            self._forget()
        # Where gradients are recorded, others may have kept what the buffers show.
        if not compiling and not torch.is_grad_enabled():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if self._buffers is None:
                self._buffers = (GrowingBuffer(), GrowingBuffer())
            keys, values = self._buffers
            self.keys = keys.append(self.keys, key_states)
            self.values = values.append(self.values, value_states)
        else:
            super().update(key_states, value_states, *args, **kwargs)
            self._buffers = None
        self._mark(compiling)
        if self.hasher is not None or (self.why is None and self._fits()):
            several = key_states.shape[SLOTS] > 1
            if several and self.keys.shape[SLOTS] > self.plan.dense_below:
                self._encode_up_to(self.keys.shape[SLOTS])
        (forward_pass.of_compiler if compiling else forward_pass.of_thread).layer = self
        return self.keys, self.values

    def _forget(self) -> None:
        """The keys are others than those that codes were made of."""
        self.coded = self._coded_room = 0
        self.hasher = self.codes = self.norms = self.why = None

    def _encode_up_to(self, length: int, slots: int = 0) -> None:
        """Encode the keys before `length` that have no code.

        There is room for as many codes as there are keys, or `slots`, afterwards.
        """
        total = self.keys.shape[SLOTS]
        if self._coded_room < max(total, slots):
            before = (self.codes, self.norms)
            self._coded_room = max(capacity(total), slots)
            self._make_codes(self._coded_room)
            for made, was in zip((self.codes, self.norms), before, strict=True):
                if self.coded and was is not None:
                    made[:, :, : self.coded] = was[:, :, : self.coded]
        if self.coded < length:
            new = slice(self.coded, length)
            norms = None if self.norms is None else self.norms[:, :, new]
            self.hasher.encode_keys(self.keys[:, :, new], self.codes[:, :, new], norms)
            self.coded = length

    def ready(self) -> tuple[Any, Any, int, Any]:
        """Codes, norms, how many keys `hash_attend` is to hash, and lengths, for a decode step."""
        length = self.keys.shape[SLOTS]
        # The newest key is left to `hash_attend` where it can hash it.
        fresh = int(self.hasher.plain_keys)
        if self.coded != length - fresh or length > self._coded_room:
            self.coded = min(self.coded, length - fresh)
            self._encode_up_to(length - fresh)
        codes = self.codes.narrow(SLOTS, 0, length)
        norms = None if self.norms is None else self.norms.narrow(SLOTS, 0, length)
        return codes, norms, fresh, None

    def attended(self) -> None:
        """The step ran: all keys have codes."""
        self.coded = self.keys.shape[SLOTS]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last keys, and forget their codes."""
        self._keep(super().crop, tokens_to_remove)
        self.coded = min(self.coded, self.get_seq_length())
        if not self.get_seq_length():
            # Without keys, transformers' own operations on rows do nothing: codes would move alone.
            self._forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        move = super().batch_repeat_interleave
        self._keep(move, repeats, codes=lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._keep(super().batch_select_indices, indices, codes=lambda x: x[indices, ...])

    def reset(self) -> None:
        """Forget everything."""
        if self._buffers is not None:
            # transformers may write zeros into what it takes to be its own.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        super().reset()
        self._forget()
        self._buffers = None

    def offload(self) -> None:
        """Move to host memory."""
        super().offload()
        self._buffers = None


class HashStaticLayer(CodedLayer, StaticLayer):
    """A preallocated cache layer with codes: nothing moves, and nothing is read by the host.

    Attributes:
        pending: Whether the key of the last decode step has no code yet.
    """

    _own = StaticLayer
    pending = False

    def __init__(self, plan: LayerPlan, filled: StaticLayer) -> None:
        super().__init__(plan, filled)
        if self.is_initialized:
            self._start()
            self._encode_all()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys, values, codes and norms."""
        with outside_inference_mode():
            super().lazy_initialization(key_states, value_states)
        self._start()

    def _start(self) -> None:
        self._mark(torch.compiler.is_compiling())
        if not self._fits():
            return
        plan = self.plan
        if self.hasher.key_heads != plan.kv_heads and plan.dense_below > covered(plan.selection):
            raise hata.AttachError(
                f"selection: got min_length {plan.dense_below} above k with an encoder that hashes "
                "keys once per query head, which a static cache cannot hold; use a dynamic cache, "
                "or leave min_length out"
            )
        self._make_codes(self.max_cache_len)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.codes)
            if self.norms is not None:
                torch._dynamo.mark_static_address(self.norms)

    def _encode_all(self) -> None:
        """Encode every slot: how many of them hold keys is known to the device alone."""
        if self.codes is not None:
            self._encode(torch.arange(self.max_cache_len, device=self.device), self.keys)
        self.pending = False
        self._mark(torch.compiler.is_compiling())

    def _encode(self, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Encode `keys` into `slots`."""
        norms = None
        if self.norms is not None:
            norms = self.norms.new_empty((*self.norms.shape[:SLOTS], keys.shape[SLOTS]))
        self.codes.index_copy_(SLOTS, slots, self.hasher.encode_keys(keys, norms=norms))
        if self.norms is not None:
            self.norms.index_copy_(SLOTS, slots, norms)

    def _catch_up(self) -> None:
        """Encode the key of the last decode step."""
        last = self.cumulative_length.reshape(1) - 1
        self._encode(last, self.keys.index_select(SLOTS, last))
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
        tokens = key_states.shape[SLOTS]
        if tokens == 1 and self.is_initialized and not compiling:
            # As transformers' own does, with three operations less: the slot is the length.
            slot = self.cumulative_length
            keys.index_copy_(SLOTS, slot, key_states)
            self.values.index_copy_(SLOTS, slot, value_states)
            slot.add_(1)
        else:
            super().update(key_states, value_states, *args, **kwargs)
        if version is None:
            self._mark(compiling)
        else:
            self._version = keys._version
        if self.codes is not None:
            self.pending = tokens == 1
            if tokens > 1:
                slots = torch.arange(tokens, device=self.device) + self.cumulative_length - tokens
                self._encode(slots, key_states.to(self.keys.dtype))
        (forward_pass.of_compiler if compiling else forward_pass.of_thread).layer = self
        return self.keys, self.values

    def ready(self) -> tuple[Any, Any, int, Any]:
        """See `HashDynamicLayer.ready`."""
        if self.pending and not self.hasher.plain_keys:
            self._catch_up()
        return self.codes, self.norms, int(self.pending), self.cumulative_length

    def attended(self) -> None:
        """The step ran: all keys have codes."""
        self.pending = False

    def reset(self) -> None:
        """Forget the keys, keep the buffers."""
        super().reset()
        self.pending = False


def write(keys: Any, values: Any, slot: Any, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write a key and a value into a slot of which the device knows the number."""
    keys.index_copy_(SLOTS, slot.reshape(1), key)
    values.index_copy_(SLOTS, slot.reshape(1), value)


class StepLayer(HashStaticLayer):
    """The buffers of a `HashDynamicLayer` in a step that a CUDA graph runs.

    Its length is that of the whole cache, in two tensors that no layer writes into.

    Attributes:
        before, after: Keys before the step and after it, 0-d int64 on the device.
    """

    def __init__(
        self, layer: HashDynamicLayer, room: dict[str, Any], before: Any, after: Any, starts: Any
    ) -> None:
        self.plan, self.hasher, self.why = layer.plan, layer.hasher, layer.why
        self.keys, self.values = room["keys"], room["values"]
        self.codes, self.norms = room["codes"], room["norms"]
        self.before, self.after, self.starts = before, after, starts
        self.device, self.dtype = self.keys.device, self.keys.dtype
        self.max_cache_len, self.is_initialized, self.left_padded = (
            self.keys.shape[SLOTS],
            True,
            True,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the key and the value of a step."""
        write(self.keys, self.values, self.before, key_states, value_states)
        forward_pass.of_thread.layer = self
        return self.keys, self.values

    def ready(self) -> tuple[Any, Any, int, Any]:
        """See `HashDynamicLayer.ready`."""
        fresh = self.codes is not None
        if fresh and not self.hasher.plain_keys:
            self._encode(
                self.before.reshape(1), self.keys.index_select(SLOTS, self.before.reshape(1))
            )
            fresh = False
        return self.codes, self.norms, int(fresh), self.after

    def get_seq_length(self) -> Any:
        """Keys before the step."""
        return self.before
