"""What `hata learn` is asked for, checked before anything is read, trained or written."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hata.encoder import ModelShape
from hata.errors import HataError
from hata.learn.folders import CAPTURE, work_of
from hata.learn.plan import LearnError
from hata.learn.recipe import Recipe
from hata.learn.text import CaptureError, first_line
from hata.profile import user_path

MOST_BITS = 512
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


def check_least(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raise `LearnError` for an option below its least value; one that is not given is none."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            option = name.replace("_", "-")
            raise LearnError(f"--{option}: got {value}, expected {smallest} or more")


def check_bits(bits: int) -> None:
    """Raise `LearnError` for a number of bits that no code has."""
    if not 0 < bits <= MOST_BITS or bits % 32:
        raise LearnError(
            f"--bits: got {bits}, expected a positive multiple of 32, up to {MOST_BITS}"
        )


def check_device(name: str, *, spread: bool = True) -> None:
    """Raise `LearnError` for a device that there is not, or for all of them where one is meant."""
    import torch

    known = re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|spread", name)
    if not known or (name == "spread" and not spread):
        names = "cuda, cuda:N or spread" if spread else "cuda or cuda:N"
        raise LearnError(f"--device: got {name!r}, expected auto, cpu, {names}")
    if name in ("auto", "cpu"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(name.partition(":")[2] or 0):
        raise LearnError(f"--device: got {name!r}, but torch sees {count} GPUs here; use auto")


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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        # Then there is no plot, which is said at the end.
        return
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise LearnError(
            f"--plot: got {path}, expected a name that ends in one of {', '.join(known)}"
        )


def shape_of(config: Any) -> ModelShape:
    """The sizes of a model.

    Raises:
        CaptureError: Its configuration names none that fit one another.
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
    if shape.heads % shape.kv_heads:
        raise CaptureError(
            f"--model: got {shape.heads} heads for {shape.kv_heads} KV heads in config.json, "
            "expected a multiple"
        )
    return shape


def check_codes(codes: int | None, shape: ModelShape) -> None:
    """Raise `LearnError` unless the codes of a KV head share out among its query heads."""
    group = shape.heads // shape.kv_heads
    if codes is not None and codes % group:
        raise LearnError(
            f"--query-codes: got {codes}, expected a multiple of {group}, the query heads of a KV "
            "head"
        )


def context_of(config: Any) -> int | None:
    """How many tokens a model reads, if its configuration says so."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if type(context) is int and context > 0 else None


def tokens_of(asked: int | None, config: Any, recipe: Recipe, most: int) -> int:
    """Length of a sequence: what is asked, else the model's context up to `most`.

    Raises:
        LearnError: The model cannot read as many, or the recipe not learn from as few.
    """
    context = context_of(config)
    tokens = asked or min(most, context or most)
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
