"""`Plan`: what one training is to do, written down so that it can be resumed; and its defaults.

Loads no framework.
"""

from __future__ import annotations

from dataclasses import dataclass

# Recipes, and the bits of their codes unless others are asked for.
BITS = {"listwise": 256, "hata": 128, "hashattention": 32}
TOKENS = 16384
SEQUENCES = 16
# Two CPU cores learn a small model's encoder with these in a quarter of an hour.
CPU_SEQUENCES, CPU_KEYS, CPU_STEPS = 6, 4096, 2500
# Tokens per assignment that is asked back.
RECALL = 384


@dataclass(frozen=True)
class Capture:
    """What decides on what is captured.

    Attributes:
        model: Name of the model's folder.
        weights: Fingerprint of what lies in it, see `hata.learn.weights`.
        shape: Its sizes, in words.
        text: Fingerprint of the tokens that are read.
        sequences: Sequences that are read.
        tokens: Length of a sequence.
        queries: Queries kept of a sequence.
        recall: Assignments in a sequence that it asks back.
        seed: Of their positions.
        device: Kind of the device.
    """

    model: str
    weights: str
    shape: str
    text: str
    sequences: int
    tokens: int
    queries: int
    recall: int
    seed: int
    device: str


@dataclass(frozen=True)
class Plan:
    """What decides on the result of a training; all of it must be equal to resume.

    Attributes:
        capture: What it learns from; the last sequence is held out to judge by.
        layers: The layers to train.
        recipe: Name of the recipe.
        settings: Its settings, in words.
        bits: Bits of a code.
        steps: Optimiser steps of a layer.
        seed: Of the weights and the batches.
    """

    capture: Capture
    layers: tuple[int, ...]
    recipe: str
    settings: str
    bits: int
    steps: int
    seed: int
