"""`Recipe`: how a layer is trained; what every recipe takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from hata.encoder import Hidden, QueryHash
from hata.encoder.orthogonal import round_to_bfloat16
from hata.learn.samples import LayerSamples


class Learned(NamedTuple):
    """A trained layer, as `hata.Encoder` holds it.

    Attributes:
        projection: Of keys, `[Hkv, in, r]`.
        bias: `[Hkv, r]`, or `None`.
        query: How queries are hashed, or `None` where like keys.
        hidden: Hidden layers of keys.
    """

    projection: np.ndarray
    bias: np.ndarray | None = None
    query: QueryHash | None = None
    hidden: tuple[Hidden, ...] = ()


# Called after each step with its number, its loss, and a function that exports the layer as it is.
# The loss stays on the device: reading it would make every step wait for the one before.
Watcher = Callable[[int, torch.Tensor, Callable[[], Learned]], None]


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
    ) -> Learned:
        """Train one layer.

        Args:
            samples: What was captured of it.
            bits: Bits of a code.
            steps: Optimiser steps.
            seed: The same seed, samples and device give the same weights.
            watch: Called after each step; to be called with the loss.
        """


def exported(x: torch.Tensor) -> np.ndarray:
    """A tensor as float32 that bfloat16 can hold, so that every dtype of a model hashes alike."""
    return round_to_bfloat16(x.detach().float().cpu().numpy())
