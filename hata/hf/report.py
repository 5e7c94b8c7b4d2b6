"""What the layers of an attached model really did: counted while they run, told on request.

A step of a layer is one call of its attention. It is counted where Python runs it: replays of a
CUDA graph and steps of a compiled model run no Python, so of those it is known that they were
captured or compiled, and not how often they ran.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from hata.errors import AttachError
from hata.selection import Selection
from hata.words import ranges

# Why a step ran dense, as users read it. These are as planned:
PREFILL = "several tokens (prefill)"
SHORT = "context within the budget"
TRAINING = "training"
# These are not, and are warned about:
NO_CACHE = "no cache; generate with use_cache=True"
GRADIENTS = "gradients are recorded; decode under torch.no_grad()"
HOLES = "a mask that hides more than left padding"
UNSEEN = (
    "a mask whose values were never looked at; run the prefill, or one step, outside of the "
    "compiled function, or leave the mask out"
)
MASK = "a mask of a kind that is not known (boolean, additive or [B, S] are)"
BIAS = "a mask that adds numbers to the logits"
WEIGHTS = "attention weights are asked for; leave output_attentions out"
NOT_CACHED = "keys and values that are not those of the layer's cache"
DTYPES = (
    "queries, keys and values of several dtypes, as autocast leaves them; load the model in one"
)
NEVER_CALLED = (
    "its attention never came through the attention interface; this release of transformers, or "
    "this model, works in a way that is not known"
)
OTHER_PLAN = "a cache layer of another attachment, or one that layers share"

_AS_PLANNED = (PREFILL, SHORT, TRAINING)
HASHED = "hashed"
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
    """

    layer: int
    selection: Selection | None
    why: str
    hashed: int
    dense: dict[str, int]
    captured: int
    compiled: tuple[str, ...]

    def __str__(self) -> str:
        if self.selection is None:
            return f"dense: {self.why}"
        told = [f"{self.hashed} steps hashed"]
        if self.dense:
            told.append(
                "dense: " + ", ".join(f"{count} {why}" for why, count in sorted(self.dense.items()))
            )
        if self.captured:
            told.append(f"{self.captured} captured with hashing (replays are not counted)")
        if self.compiled:
            told.append(f"compiled: {', '.join(self.compiled)} (its steps are not counted)")
        return "; ".join(told)


@dataclass(frozen=True)
class Report:
    """What every layer did; `print` it, or read `layers`.

    Attributes:
        model: Class of the model.
        layers: One per layer.
    """

    model: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        """One line for all layers that say the same."""
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            alike.setdefault(str(layer), []).append(layer.layer)
        return "\n".join(f"  layers {ranges(which)}: {told}" for told, which in alike.items())


class Record:
    """Counts of one attached model, and what it has warned of.

    Attributes:
        model: Class of the model.
        strict: Whether a planned step that cannot be hashed is an error.
        met: Whether any planned attention was seen to run.
    """

    def __init__(self, model: str, layers: int, strict: bool) -> None:
        self.model = model
        self.strict = strict
        self.met = False
        self._enter()
        self._counts: list[Counter[str]] = [Counter() for _ in range(layers)]
        self._hashed = [0] * layers
        self._captured = [0] * layers
        self._compiled: list[set[str]] = [set() for _ in range(layers)]
        self._warned: set[str] = set()

    def _enter(self) -> None:
        torch._dynamo.assume_constant_result(_note_compiled)
        self.number = next(_numbers)
        _records[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        # A copy of a model counts for itself, from the beginning.
        twin = memo[id(self)] = Record(self.model, len(self._hashed), self.strict)
        return twin

    def hashed(self, layer: int, captured: bool) -> None:
        """A step of this layer ran hash attention."""
        with _counting:
            (self._captured if captured else self._hashed)[layer] += 1
        self.met = True

    def dense(self, layer: int, why: str) -> None:
        """A step of this planned layer ran dense; warns the first time it is not as planned."""
        with _counting:
            self._counts[layer][why] += 1
        self.met = True
        if why not in _AS_PLANNED and (self.strict or why not in self._warned):
            self.complain(layer, why)

    def complain(self, layer: int, why: str) -> None:
        """Say, or raise where the attachment is strict, that a planned layer cannot be hashed."""
        self._warned.add(why)
        told = f"{self.model}: layer {layer} was to be hashed, but attends densely: {why}"
        if self.strict:
            raise AttachError(told)
        warnings.warn(f"{told}. handle.report() counts such steps", stacklevel=2)

    def compiled(self, layer: int, what: str) -> None:
        """This layer was compiled, hashed or dense."""
        self._compiled[layer].add(what)
        self.met = True
        if what not in (HASHED, *_AS_PLANNED) and (self.strict or what not in self._warned):
            self.complain(layer, what)

    def of(self, layer: int, selection: Selection | None, why: str) -> LayerReport:
        """What is known of a layer."""
        with _counting:
            return LayerReport(
                layer,
                selection,
                why,
                self._hashed[layer],
                dict(self._counts[layer]),
                self._captured[layer],
                tuple(sorted(self._compiled[layer])),
            )


class LayerRecord:
    """A record as one layer writes to it."""

    __slots__ = ("_layer", "record")

    def __init__(self, record: Record, layer: int) -> None:
        self.record = record
        self._layer = layer

    def hashed(self, query: torch.Tensor) -> None:
        """See `Record.hashed`."""
        captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
        self.record.hashed(self._layer, captured)

    def dense(self, why: str) -> None:
        """See `Record.dense`."""
        self.record.dense(self._layer, why)

    def compiled(self, what: str) -> None:
        """Note, while torch.compile follows the code, what it compiles."""
        _note_compiled(self.record.number, self._layer, what)


# While torch.compile follows the code it runs a function for real only where it is marked and all
# arguments are numbers and strings, so records go by numbers there.
_numbers = itertools.count()
_records: WeakValueDictionary[int, Record] = WeakValueDictionary()


def _note_compiled(number: int, layer: int, what: str) -> bool:
    record = _records.get(number)
    if record is not None:
        record.compiled(layer, what)
    return True
