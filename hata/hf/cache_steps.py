"""`CacheSteps`: the steps of one cache over the room behind its keys, from a CUDA graph.

The first step runs as it is, the second is captured, from then on they are replayed. The layers of
the cache take note of what was written when somebody asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from hata.hf import masks, reasons
from hata.hf.cache import CannotCapture, HashDynamicLayer, StepLayer
from hata.hf.growing import SLOTS, outside_inference_mode


class NotNow(Exception):
    """This very step runs without a graph; the message says why."""


class CacheSteps:
    """The steps of one cache over one room.

    Attributes:
        warm: Whether one of them ran.
        captured: Whether a graph runs them.
        replayed: How many a graph has run.
    """

    def __init__(
        self,
        layers: Sequence[HashDynamicLayer],
        starts: torch.Tensor | None,
        given: tuple[Any, ...],
    ) -> None:
        """`given`: what is the same for all steps: sorts of inputs, options, places of weights."""
        self._given = given
        if len({layer.keys.shape[SLOTS] for layer in layers}) > 1:
            raise CannotCapture(reasons.LENGTHS)
        rooms = [room for layer in layers if (room := layer.room()) is not None]
        if len(rooms) < len(layers):
            raise NotNow(reasons.NO_ROOM)
        keys = layers[0].keys
        length, slots = keys.shape[SLOTS], min(room["keys"].shape[SLOTS] for room in rooms)
        self._left, self._ahead, self.replayed = slots - length, 0, 0
        with outside_inference_mode():
            # Keys before the step and after it. The graph counts both up.
            self._counts = torch.tensor([length, length + 1], device=keys.device)
        self._starts = starts
        made = [
            StepLayer(layer, room, self._counts[0], self._counts[1], starts)
            for layer, room in zip(layers, rooms, strict=True)
        ]
        self._cache: Any = Cache(layers=list(made))
        self._layers = [ref(layer) for layer in layers]
        self._buffers = [x for layer in made for x in (layer.keys, layer.values)]
        # How often the keys and values had been written into after the last step.
        self._versions = self._written()
        self._inputs: dict[str, torch.Tensor] = {}
        self.warm = False
        self._graph: Any = None
        for layer in layers:
            layer.step = self

    @property
    def captured(self) -> bool:
        """Whether a graph runs them."""
        return self._graph is not None

    def fit(self, layers: Sequence[Any], given: tuple[Any, ...]) -> bool:
        """Whether the next step of a cache is one of these."""
        return (
            self._left > 0
            and all(getattr(layer, "step", None) is self for layer in layers)
            and given == self._given
            and self._versions == self._written()
        )

    def run(
        self, forward: Callable[..., Any], name: str, inputs: dict[str, Any], mask: Any
    ) -> ModelOutput:
        """The output of the next step; a graph writes over it with the one after that."""

        def step() -> Any:
            cache = {name: self._cache}
            output = forward(**self._inputs, **self._given[1], **cache)
            self._counts.add_(1)
            return output

        if self._starts is not None:
            # Its left edge may move.
            self._starts.copy_(masks.first_visible(mask))
        if not self.warm:
            with outside_inference_mode():
                self._inputs = {name: x.clone() for name, x in inputs.items()}
            output = step()
            if not isinstance(output, ModelOutput):
                raise CannotCapture(reasons.NO_OUTPUT)
            self.warm = True
        else:
            for key, x in inputs.items():
                self._inputs[key].copy_(x)
            if self._graph is None:
                self._graph = capture(step, self._counts.device)
            output = self._graph.replay()
            self.replayed += 1
        self._versions = self._written()
        self._left -= 1
        self._ahead += 1
        return output

    def close(self) -> None:
        """No step follows: somebody takes a layer elsewhere. What they ran over is let go."""
        self.settle()
        self._left, self._buffers, self._inputs = 0, [], {}
        self._cache = self._graph = None

    def _written(self) -> list[int]:
        return [x._version for x in self._buffers]

    def settle(self) -> None:
        """Let the layers take note of the keys that were written."""
        ahead, self._ahead = self._ahead, 0
        by_us_alone = self._versions == self._written()
        for layer in (found() for found in self._layers if ahead):
            if layer is not None and layer.step is self:
                layer.advance(ahead, by_us_alone)


def signature(inputs: Mapping[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """What must be the same of the inputs of all steps."""
    return [(name, x.shape, x.dtype, x.device) for name, x in inputs.items()]


class _Graph:
    """A step that was captured in a CUDA graph."""

    def __init__(self, step: Callable[[], Any], device: torch.device) -> None:
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        graph = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        with torch.cuda.device(device), graph:
            self._output = step()

    def replay(self) -> Any:
        """Run the step; its output is written over by the next one."""
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output


# Tests without a GPU put another in its place.
capture: Callable[[Callable[[], Any], torch.device], Any] = _Graph
