"""What the layers of an attached model really did: counted while they run, told on request.

A step of a layer is one call of its attention. It is counted where Python runs it: replays of a
CUDA graph and steps of a compiled model run no Python, so of those it is known that they were
captured or compiled, and not how often they ran.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

from hata.errors import AttachError
from hata.hf.reasons import AS_PLANNED
from hata.selection import Selection
from hata.words import ranges

# What a step did, unless it ran dense for one of `hata.hf.reasons`.
HASHED, CAPTURED = "hashed", "captured"
_EXPECTED = frozenset((HASHED, CAPTURED, *AS_PLANNED))
# Counts of several threads must not be lost.
_counting = threading.Lock()


@dataclass(frozen=True)
class LayerReport:
    """What one layer was planned to do, and did.

    Attributes:
        layer: Its number.
        selection: What it hashes with; `None` where it was planned dense.
        why: Why it was planned dense; `""` where it was not.
        hashed: Steps that ran hash attention.
        dense: Why steps ran dense -> how many.
        captured: Steps that were captured in a CUDA graph with hash attention in them.
        compiled: What was compiled: `"hashed"`, or why it is dense.
        replayed: How many of the hashed steps were run by a CUDA graph of ours.
    """

    layer: int
    selection: Selection | None
    why: str = ""
    hashed: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    captured: int = 0
    compiled: tuple[str, ...] = ()
    replayed: int = 0

    def __str__(self) -> str:
        if self.selection is None:
            return f"dense: {self.why}"
        told = [f"{self.hashed} steps hashed"]
        if self.replayed:
            told[0] += f" ({self.replayed} of them by CUDA graphs)"
        if self.dense:
            dense = [f"{count} {why}" for why, count in sorted(self.dense.items())]
            told.append(f"dense: {', '.join(dense)}")
        if self.captured:
            told.append(f"{self.captured} captured with hashing (replays are not counted)")
        if self.compiled:
            told.append(f"compiled: {', '.join(self.compiled)} (its steps are not counted)")
        return "; ".join(told)


@dataclass(frozen=True)
class Steps:
    """How the steps of one token ran whose caches are `DynamicCache`, on a GPU.

    Attributes:
        replayed: Steps that CUDA graphs ran.
        captured: Graphs that were captured.
        eager: Why other steps ran without -> how many.
    """

    replayed: int = 0
    captured: int = 0
    eager: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{self.replayed} steps by {self.captured} CUDA graphs"]
        told += [f"{count} without: {why}" for why, count in sorted(self.eager.items())]
        return "; ".join(told)


@dataclass(frozen=True)
class Report:
    """What every layer did; `print` it, or read `layers`.

    Attributes:
        model: Class of the model.
        layers: One per layer.
        steps: How steps of one token ran.
    """

    model: str
    layers: tuple[LayerReport, ...]
    steps: Steps = Steps()

    def __str__(self) -> str:
        """One line for all layers that say the same."""
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            alike.setdefault(str(layer), []).append(layer.layer)
        lines = [f"  layers {ranges(which)}: {told}" for told, which in alike.items()]
        if self.steps.replayed or self.steps.eager:
            lines.append(f"  decode: {self.steps}")
        return "\n".join(lines)


class ModelRecord:
    """What one attached model has said of itself, and whether it may go on.

    Attributes:
        model: Class of the model.
        strict: Whether a planned step that cannot be hashed is an error.
        met: Whether any planned attention was seen to run.
    """

    def __init__(self, model: str, strict: bool) -> None:
        self.model, self.strict, self.met = model, strict, False
        self._warned: set[str] = set()

    def __reduce__(self) -> Any:
        raise AttachError(
            f"model: this {self.model} is attached and cannot be pickled; detach it first, or save "
            "it with save_pretrained"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRecord:
        # A copy of a model speaks for itself, from the beginning.
        twin = memo[id(self)] = ModelRecord(self.model, self.strict)
        return twin

    def ran(self, layer: int, what: str) -> None:
        """Planned attention ran: hashed, or dense for a reason."""
        self.met = True
        if what not in _EXPECTED:
            self.complain(layer, what)

    def complain(self, layer: int, why: str) -> None:
        """Say, or raise where the attachment is strict, that a planned layer cannot be hashed.

        Once for each reason.
        """
        if why in self._warned and not self.strict:
            return
        self._warned.add(why)
        told = f"{self.model}: layer {layer} was to be hashed, but attends densely: {why}"
        if self.strict:
            raise AttachError(told)
        warnings.warn(f"{told}. handle.report() counts such steps", stacklevel=2)


class LayerRecord:
    """What one planned layer did, counted."""

    def __init__(self, model: ModelRecord, layer: int, selection: Selection | None) -> None:
        self._model, self._layer, self._selection = model, layer, selection
        self._steps: Counter[str] = Counter()
        self._compiled: set[str] = set()
        # See `_note_compiled`.
        torch._dynamo.assume_constant_result(_note_compiled)
        self._number = next(_numbers)
        _records[self._number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRecord:
        model = copy.deepcopy(self._model, memo)
        twin = memo[id(self)] = LayerRecord(model, self._layer, self._selection)
        return twin

    def ran(self, what: str, compiling: bool) -> None:
        """A step ran, or is compiled: `HASHED`, `CAPTURED`, or why it is dense."""
        if self._selection is None:
            # As was planned.
            if not compiling:
                self._model.met = True
            return
        if compiling:
            _note_compiled(self._number, what)
            return
        with _counting:
            self._steps[what] += 1
        self._model.ran(self._layer, what)

    def note_compiled(self, what: str) -> None:
        """Note, outside of what is compiled, what it does."""
        self._compiled.add(what)
        self._model.ran(self._layer, what)

    def report(self, graphed: int = 0, replayed: int = 0) -> LayerReport:
        """All of it, with steps of our own graphs: those that were to be, and were, replayed."""
        with _counting:
            dense = dict(self._steps)
        hashed, captured = dense.pop(HASHED, 0) + graphed, dense.pop(CAPTURED, 0)
        compiled = tuple(sorted(self._compiled))
        of_layer = self._layer, self._selection, ""
        return LayerReport(*of_layer, hashed, dense, captured, compiled, replayed)


# While torch.compile follows the code it runs a function for real only where it is marked and all
# arguments are numbers and strings, so records go by numbers there.
_numbers = itertools.count()
_records: WeakValueDictionary[int, LayerRecord] = WeakValueDictionary()


def _note_compiled(number: int, what: str) -> bool:
    record = _records.get(number)
    if record is not None:
        record.note_compiled(what)
    return True
