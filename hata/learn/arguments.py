"""What `hata learn` is asked for, checked before anything is read, trained or written."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from hata.calibration.options import check_bits, check_least, context_of
from hata.calibration.progress import blank_figure
from hata.calibration.text import first_line
from hata.encoder import ModelShape
from hata.errors import CaptureError, HataError, LearnError
from hata.learn.folders import CAPTURE, work_of
from hata.learn.plan import BITS, CPU_KEYS, CPU_SEQUENCES, CPU_STEPS, SEQUENCES, TOKENS
from hata.learn.recipe import Recipe
from hata.learn.recipes import RECIPES
from hata.profile import user_path

# Seeds of layers are made of it, and torch takes 64 bits.
MOST_SEED = 2**32 - 1
_LEAST = {"sequences": 1, "tokens": 1, "queries": 1, "steps": 1, "recall": 0, "seed": 0}


class Places(NamedTuple):
    """Where a training writes.

    Attributes:
        out: The encoder.
        image: The plot.
        work: Working folder.
        store: Folder of what is captured.
        shared: Whether that one is named, and so is kept.
    """

    out: Path
    image: Path
    work: Path
    store: Path
    shared: bool


def check_numbers(options: argparse.Namespace) -> None:
    """Raise `LearnError` for a number out of its range."""
    check_least(options, _LEAST)
    if options.seed > MOST_SEED:
        raise LearnError(f"--seed: got {options.seed}, expected {MOST_SEED} or less")
    if options.bits is not None:
        check_bits(options.bits)


def places_of(options: argparse.Namespace) -> Places:
    """Where to write, tried as far as that is possible before the training.

    Raises:
        LearnError: A place is missing, cannot be written to, or would be deleted with another.
    """
    if options.out is None:
        raise LearnError("--out: got none, expected the name of the encoder to write")
    out = user_path(options.out)
    if out.suffix != ".safetensors":
        raise LearnError(f"--out: got {out}, expected a name that ends in .safetensors")
    work = work_of(options)
    image = user_path(options.plot) if options.plot else out.with_suffix(".png")
    store = user_path(options.capture) if options.capture else work / CAPTURE
    for option, path in (("--out", out), ("--plot", image)):
        if _within(option, path, work):
            raise LearnError(
                f"{option}: got {path}, which lies inside the working folder {work} and would be "
                "in its way; name a place outside, or another --work"
            )
    if options.capture and (_within("--capture", store, work) or _within("--work", work, store)):
        raise LearnError(
            f"--capture: got {store} with the working folder {work}, expected that neither lies "
            "inside the other; name another folder"
        )
    if options.plot:
        _check_image(image)
    _check_file("--out", out)
    _check_file("--plot", image)
    return Places(out, image, work, store, bool(options.capture))


def _within(option: str, path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise LearnError(f"{option}: {path} cannot be used ({error}); name another") from None


def _check_file(option: str, path: Path) -> None:
    """Raise `LearnError` unless a file can be written there; makes its folder."""
    try:
        if path.is_dir():
            raise LearnError(f"{option}: got {path}, which is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LearnError(
            f"{option}: {path} cannot be written ({error.strerror or error}); name another place"
        ) from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise LearnError(f"{option}: {path.parent} cannot be written to; name another place")


def _check_image(path: Path) -> None:
    figure = blank_figure(1, 1)
    # Without matplotlib there is no plot, which is said at the end.
    if figure is None:
        return
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise LearnError(
            f"--plot: got {path}, expected a name that ends in one of {', '.join(known)}"
        )


def shape_of(config: Any, codes: int | None) -> ModelShape:
    """The sizes of a model, among whose query heads the codes of a KV head share out.

    Raises:
        CaptureError: Its configuration names none that fit one another.
        LearnError: The codes do not.
    """
    try:
        shape = ModelShape.of(config)
    except HataError as error:
        raise CaptureError(f"--model: {error}") from None
    # Fields of wrong types fail in as many ways as there are configurations.
    except Exception as error:
        raise CaptureError(
            f"--model: its config.json has no usable sizes ({first_line(error)}); expected that of "
            "a decoder"
        ) from None
    group = shape.heads // shape.kv_heads
    if codes is not None and codes % group:
        raise LearnError(
            f"--query-codes: got {codes}, expected a multiple of {group}, the query heads of a KV "
            "head"
        )
    return shape


def tokens_of(options: argparse.Namespace, config: Any, recipe: Recipe) -> int:
    """Length of a sequence: what is asked, else the model's context up to `TOKENS`.

    Raises:
        LearnError: The model cannot read as many, or the recipe not learn from as few.
    """
    context = context_of(config)
    tokens = options.tokens or min(TOKENS, context or TOKENS)
    if context is not None and tokens > context:
        raise LearnError(
            f"--tokens: got {tokens}, but the model reads up to {context} "
            "(max_position_embeddings); ask for fewer"
        )
    if tokens < recipe.least_tokens:
        raise LearnError(
            f"--tokens: got {tokens}, expected {recipe.least_tokens} or more for recipe "
            f"{recipe.name}"
        )
    return tokens


def recipe_of(options: argparse.Namespace) -> tuple[Recipe, int]:
    """The recipe with its settings, and the bits of a code."""
    recipe: Any = RECIPES[options.recipe]
    if options.recipe == "listwise" and options.device == "cpu":
        recipe = dataclasses.replace(recipe, keys=CPU_KEYS, steps=CPU_STEPS)
    if options.no_nested:
        if options.recipe != "listwise":
            raise LearnError(
                f"--no-nested: got it for recipe {options.recipe}, whose codes are never nested; "
                "leave it out, or use recipe listwise"
            )
        recipe = dataclasses.replace(recipe, nested=False)
    for name in ("query_codes", "keys"):
        value = getattr(options, name)
        if value is None:
            continue
        if options.recipe != "listwise" or value < 1:
            raise LearnError(
                f"--{name.replace('_', '-')}: got {value} for recipe {options.recipe}, expected a "
                "positive number with recipe listwise"
            )
        recipe = dataclasses.replace(recipe, **{name: value})
    return recipe, BITS[options.recipe] if options.bits is None else options.bits


def sequences_of(options: argparse.Namespace) -> int:
    """How many to learn from."""
    if options.sequences is not None:
        return options.sequences
    return CPU_SEQUENCES if options.device == "cpu" else SEQUENCES


def parse_layers(words: str | None, count: int) -> tuple[int, ...]:
    """`"0,2-4"` -> `(0, 2, 3, 4)`; without words, all.

    Raises:
        CaptureError: It is no such list, or a layer is not there.
    """
    if words is None:
        return tuple(range(count))
    found: set[int] = set()
    try:
        for part in words.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            if not 0 <= low <= high < count:
                raise ValueError(part)
            found.update(range(low, high + 1))
    except ValueError:
        raise CaptureError(
            f"--layers: got {words[:80]!r}, expected numbers and ranges within 0-{count - 1}, such "
            f"as 2-{count - 1} or 0,{count - 1}"
        ) from None
    return tuple(sorted(found))
