"""`Recipe`: how a layer is trained; what every recipe takes and gives."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from hata.encoder.layer import LayerHash
from hata.encoder.orthogonal import round_to_bfloat16
from hata.learn.samples import LayerSamples

# Called after each step with its number, its loss, and a function that exports the layer as it is.
# The loss stays on the device: reading it would make every step wait for the one before.
Watcher = Callable[[int, torch.Tensor, Callable[[], LayerHash]], None]


class Recipe(ABC):
    """A way to train the encoder of one layer.

    Attributes:
        name: What the command line calls it.
        steps: Optimiser steps of a layer, unless told otherwise.
        nested: Whether the first 32, 64, ... bits of a code are trained to be used alone.
        recall: Whether it learns from text that asks assignments back, see `hata.learn.recall`.
        least_tokens: Length of a sequence from which there is something to learn.
    """

    # Not a setting, so encoders do not tell it.
    least_tokens: ClassVar[int] = 64

    name: str
    steps: int
    nested: bool = False
    recall: bool = False

    @abstractmethod
    def train(
        self, samples: LayerSamples, bits: int, steps: int, seed: int, watch: Watcher
    ) -> LayerHash:
        """Train one layer.

        Args:
            samples: What was captured of it.
            bits: Bits of a code.
            steps: Optimiser steps.
            seed: The same seed, samples and device give the same weights.
            watch: Called after each step.
        """

    def settings(self) -> str:
        """Its settings, in words."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)  # type: ignore[call-overload]


def minimised(
    loss: Callable[[int], torch.Tensor],
    optimiser: torch.optim.Optimizer,
    steps: int,
    watch: Watcher,
    export: Callable[[], LayerHash],
) -> LayerHash:
    """Take the steps that lower the loss of each, and export the layer."""
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        found = loss(step)
        found.backward()
        optimiser.step()
        watch(step, found.detach(), export)
    return export()


def exported(x: torch.Tensor) -> np.ndarray:
    """A tensor as float32 that bfloat16 can hold, so that every dtype of a model hashes alike."""
    return round_to_bfloat16(x.detach().float().cpu().numpy())
