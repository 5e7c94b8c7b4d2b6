"""`GrowingBuffer`: keys or values of a growing cache, in memory with room for more.

transformers' own layer copies all keys and values at every step, which alone costs as much as dense
attention over them. A buffer is longer than what it holds; what is handed out are views of it. It
is written to only behind what the caller holds, and only where nobody else can hold what was handed
out before: what others keep of it is never written over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# The last dimension of codes is bytes; norms have none, so slots are dimension 2 of everything.
SLOTS = 2


class GrowingBuffer:
    """A buffer with room to grow into, and how much of it was ever handed out."""

    def __init__(self) -> None:
        self._buffer: Any = None
        # The view that was returned last.
        self._last: Any = None
        # Slots that were handed out, and that there are.
        self._shown = self._slots = 0
        # Of the view and of the buffer.
        self._shape: list[int] = []
        self._strides: tuple[int, ...] = ()

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A view of `held` and `new`, one behind the other along the slots."""
        count = self._shown
        if held is not self._last:
            count = held.shape[SLOTS] if held.dim() == 4 else 0
            # Nor do we hold it any more.
            self._last = None
            if not count or not self._continues(held, count):
                self._slots = 0
        total = count + new.shape[SLOTS]
        if total > self._slots:
            self._slots = capacity(total)
            like = held if count else new
            self._shape = [*new.shape[:2], self._slots, new.shape[3]]
            with outside_inference_mode():
                self._buffer = torch.empty(self._shape, dtype=like.dtype, device=like.device)
            self._strides = self._buffer.stride()
            if count:
                self._buffer.narrow(SLOTS, 0, count).copy_(held)
        buffer = self._buffer
        if buffer.dtype != new.dtype:
            # As under autocast for a while: transformers' own promotes.
            self._slots, self._last = 0, None
            return torch.cat([held, new], dim=SLOTS)
        buffer[:, :, count:total] = new
        self._shown = self._shape[SLOTS] = total
        # As `narrow`, in half the time.
        self._last = buffer.as_strided(self._shape, self._strides)
        return self._last

    def behind(self, held: torch.Tensor) -> torch.Tensor | None:
        """The whole buffer, where `held` was returned last and a slot behind it is free."""
        free = held is self._last and self._shown < self._slots
        return self._buffer if free else None

    def advance(self, count: int) -> torch.Tensor:
        """The view that holds `count` more keys, which somebody wrote behind the last one."""
        self._shown = self._shape[SLOTS] = self._shown + count
        self._last = self._buffer.as_strided(self._shape, self._strides)
        return self._last

    def _continues(self, held: torch.Tensor, count: int) -> bool:
        """Whether `held` is the beginning of the buffer, and nobody holds what follows."""
        buffer = self._buffer
        return (
            buffer is not None
            and held.shape[:2] == buffer.shape[:2]
            and held.data_ptr() == buffer.data_ptr()
            and held.stride() == buffer.stride()
            and (count == self._shown or _holders(buffer) <= _OWN_HOLDERS)
        )


# Up to here buffers are doubled. What is longer costs too much memory for that.
_DOUBLED = 1 << 14


def capacity(length: int) -> int:
    """Slots to reserve for `length` keys, so that copies amortise: a power of two, or 1/8 more."""
    if length < _DOUBLED:
        return max(256, 1 << length.bit_length())
    return -(-(length + length // 8) // 64) * 64


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Tensors that are made here count their versions, and may be written to in any mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _no_grad_alone()


@contextmanager
def _no_grad_alone() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of this one."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _own_holders() -> int:
    """What `_holders` says where only a buffer and a layer's view of it are there."""
    buffer = torch.empty(2)
    view = buffer[:1]
    return _holders(buffer if view.numel() else view)


_OWN_HOLDERS = _own_holders()
