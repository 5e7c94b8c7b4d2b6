"""What the forward pass under way has brought, per thread.

A cache layer and the attention that follows it know nothing of one another, so the layer leaves
itself here when it is written to, and the attention of the module takes it up. Attention still
compares: it hashes only keys and values that are those of the layer it found. What is found here
can therefore be missing, and never be wrong, however forward passes of several threads, models or
generations come in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class ForwardPass:
    """What this thread's forward pass has brought so far.

    Attributes:
        layer: The cache layer with codes that was written to last, until an attention takes it.
        why: Why no layer of the pass has one, as far as the decoder's arguments tell.
        masked: Whether the decoder was given a mask.
        weights: Whether it is to return attention weights.
    """

    def __init__(self) -> None:
        self.layer: Any = None
        self.why: str | None = None
        # Outside of any decoder nothing is known, so masks are looked at.
        self.masked, self.weights = True, False
        # These two and `why`, of the pass that this one runs within.
        self._outer: Any = None
        # The mask that was seen last, and what was found of it.
        self._mask: Any = None
        self._found: dict[Any, Any] = {}

    def begin(self, masked: bool, weights: bool) -> None:
        """A decoder starts."""
        self._outer = (self.masked, self.weights, self.why, self._outer)
        self.masked, self.weights, self.why = masked, weights, None
        self._forget()

    def end(self) -> None:
        """It is done: no cache and no mask outlives its owner."""
        outer = self._outer or (True, False, None, None)
        self.masked, self.weights, self.why, self._outer = outer
        self._forget()

    def _forget(self) -> None:
        self.layer = self._mask = None
        self._found = {}

    def of_mask(self, find: Callable[..., Any], mask: torch.Tensor, *args: Any) -> Any:
        """`find(mask, *args)`, found once per mask."""
        if mask is not self._mask:
            self._mask, self._found = mask, {}
        if find not in self._found:
            self._found[find] = find(mask, *args)
        return self._found[find]


class _ThreadPass(threading.local, ForwardPass):
    """One per thread."""


of_thread = _ThreadPass()
# While torch.compile follows the code; it follows one thread at a time.
of_compiler = ForwardPass()


def current() -> ForwardPass:
    """The pass of this thread."""
    return of_compiler if torch.compiler.is_compiling() else of_thread
