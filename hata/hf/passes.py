"""What the forward pass under way has brought, per thread.

A cache layer and the attention that follows it know nothing of one another, so the layer leaves
itself here when it is written to, and the attention of the module takes it up. Attention still
compares: it hashes only keys and values that are those of the layer it found. What is found here
can therefore be missing, and never be wrong, however forward passes of several threads, models or
generations come in between.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from hata.hf.padding import is_left_padding, only_hides, visible


class Pass:
    """What this thread's forward pass has brought so far.

    Attributes:
        layer: The cache layer with codes that was written to last, until an attention takes it.
        why: Why no layer of the pass has one, as far as the decoder's arguments tell.
        masked: Whether the decoder was given a mask.
        weights: Whether it is to return attention weights.
        outer: These two and `why`, of the pass that this one runs within.
        mask: The mask that the next three are about.
        left: Whether it hides left padding at most; `None`: not looked at.
        hides: Whether it hides keys and does nothing else; `None`: not looked at.
        starts: First visible key per row, `[B]` or 0-d int64 on the device.
    """

    def __init__(self) -> None:
        self.layer: Any = None
        self.why: str | None = None
        # Outside of any decoder nothing is known, so masks are looked at.
        self.masked, self.weights = True, False
        self.outer: Any = None
        self._about(None)

    def begin(self, masked: bool, weights: bool) -> None:
        """A decoder starts."""
        self.outer = (self.masked, self.weights, self.why, self.outer)
        self.layer = self.why = None
        self.masked, self.weights = masked, weights
        self._about(None)

    def end(self) -> None:
        """It is done: no cache and no mask outlives its owner."""
        self.layer = None
        self.masked, self.weights, self.why, self.outer = self.outer or (True, False, None, None)
        self._about(None)

    def hides_left_padding_alone(self, mask: torch.Tensor, total: int) -> bool:
        """`is_left_padding`, read once per mask."""
        self._about(mask)
        if self.left is None:
            self.left = is_left_padding(mask, total)
        return self.left

    def only_hides(self, mask: torch.Tensor) -> bool:
        """`only_hides` of an additive mask, read once per mask."""
        self._about(mask)
        if self.hides is None:
            self.hides = only_hides(mask)
        return self.hides

    def first_visible(self, mask: torch.Tensor) -> torch.Tensor:
        """`starts` for `hash_attend`, made once per mask; it must hide left padding alone."""
        self._about(mask)
        if self.starts is None:
            starts = visible(mask).to(torch.uint8).argmax(-1)
            # One row of a mask may stand for all rows of the batch.
            self.starts = starts.reshape(()) if starts.size(0) == 1 else starts
        return self.starts

    def _about(self, mask: torch.Tensor | None) -> None:
        if mask is None or self.mask is not mask:
            self.mask = mask
            self.left: bool | None = None
            self.hides: bool | None = None
            self.starts: torch.Tensor | None = None


class _ThreadPass(threading.local, Pass):
    """One per thread."""


of_thread = _ThreadPass()
# While torch.compile follows the code; it follows one thread at a time.
of_compiler = Pass()


def current() -> Pass:
    """The pass of this thread."""
    return of_compiler if torch.compiler.is_compiling() else of_thread
