"""`Plan`: what one training is to do, written down so that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hata.errors import HataError
from hata.learn.hashattention import HashAttention
from hata.learn.hata_recipe import HataRecipe
from hata.learn.listwise import Listwise
from hata.learn.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Listwise(), HataRecipe(), HashAttention())
}
MARK = "plan.json"


class LearnError(HataError, ValueError):
    """A training cannot be started or resumed as asked."""


@dataclass(frozen=True)
class Capture:
    """What decides on what is captured.

    Attributes:
        model: Name of the model's folder.
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


def settings_of(recipe: Recipe) -> str:
    """A recipe's settings, in words."""
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)  # type: ignore[call-overload]


def prepare(folder: Path, plan: Plan | Capture, *, resume: bool, option: str) -> None:
    """Make a folder to work in, or take up the one that is there.

    Args:
        folder: For this plan alone.
        plan: What is done in it.
        resume: Go on with what lies there; else it is thrown away.
        option: What names the folder, for errors.

    Raises:
        LearnError: What lies there is of another plan, or of something else.
    """
    mark = folder / MARK
    if folder.exists() and not mark.is_file() and any(folder.iterdir()):
        raise LearnError(
            f"{option}: got {folder}, which holds files of something else; name another folder"
        )
    now = json.loads(json.dumps(dataclasses.asdict(plan)))
    if mark.is_file() and resume:
        differ = _differences(json.loads(mark.read_text()), now)
        if differ:
            raise LearnError(
                f"{option}: {folder} is of another training ({'; '.join(differ[:3])}); ask for the "
                "same, or name another folder"
            )
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    part = mark.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(now, indent=1))
    part.replace(mark)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value)
        elif old != value:
            found.append(f"{name}: {old!r} there, {value!r} asked")
    return found
