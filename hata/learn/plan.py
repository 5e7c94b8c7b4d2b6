"""`Plan`: what one training is to do, written down so that it can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

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
class Plan:
    """What decides on the result of a training; all of it must be equal to resume.

    Attributes:
        model: Name of the model's folder.
        shape: Its sizes, in words.
        text: Fingerprint of the tokens that are read.
        recipe: Name of the recipe.
        settings: Its settings, in words.
        bits: Bits of a code.
        steps: Optimiser steps of a layer.
        layers: The layers to train.
        sequences: Sequences to learn from; one more is held out to judge by.
        tokens: Length of a sequence.
        queries: Queries kept of a sequence.
        seed: Of the positions, the weights and the batches.
        device: Kind of the device.
    """

    model: str
    shape: str
    text: str
    recipe: str
    settings: str
    bits: int
    steps: int
    layers: tuple[int, ...]
    sequences: int
    tokens: int
    queries: int
    seed: int
    device: str

    def digest(self) -> str:
        """A fingerprint of all of it."""
        words = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:16]


def settings_of(recipe: Recipe) -> str:
    """A recipe's settings, in words."""
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)  # type: ignore[call-overload]


def prepare(folder: Path, plan: Plan, *, resume: bool) -> None:
    """Make the working folder, or take up the one that is there.

    Args:
        folder: Of this training alone.
        plan: What it is to do.
        resume: Go on with what lies there; else it is thrown away.

    Raises:
        LearnError: What lies there is of another plan, or no working folder at all.
    """
    mark = folder / MARK
    if folder.exists() and not mark.is_file() and any(folder.iterdir()):
        raise LearnError(
            f"--work: got {folder}, which holds files of something else; name another folder"
        )
    if mark.is_file() and resume:
        before = json.loads(mark.read_text())
        now = json.loads(json.dumps(dataclasses.asdict(plan)))
        if differ := [name for name in now if now[name] != before.get(name)]:
            told = "; ".join(
                f"{name}: {before.get(name)!r} there, {now[name]!r} asked" for name in differ[:3]
            )
            raise LearnError(
                f"--resume: {folder} is of another training ({told}); ask for the same, or leave "
                "--resume out to start anew"
            )
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    part = mark.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(dataclasses.asdict(plan), indent=1))
    part.replace(mark)
