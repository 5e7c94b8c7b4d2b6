"""Options that `hata learn` and `hata eval` share: which text, which device, numbers in range."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any

from hata.calibration import text as texts
from hata.errors import CaptureError, LearnError

MOST_BITS = 512


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What names the text."""
    parser.add_argument("--text", nargs="+", default=[], help="files, or folders of them")
    parser.add_argument(
        "--dataset",
        help='"python": sources of the installed packages; else a name for the datasets library',
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="NAME",
        help="folders and files to leave out, by their names alone",
    )


def need_text(options: argparse.Namespace) -> None:
    """Raise `CaptureError` unless the text is named once. Loads no framework."""
    if options.text and options.dataset:
        raise CaptureError("--text and --dataset: got both, expected one of them")
    if not (options.text or options.dataset):
        raise CaptureError("--text: got none; name files, or a --dataset")


def gather_text(options: argparse.Namespace, tokens: int) -> str:
    """The text that the options name, enough for so many tokens.

    Raises:
        CaptureError: None is named, or it cannot be read.
    """
    need_text(options)
    if options.without and options.dataset and options.dataset != "python":
        raise CaptureError(
            f"--without: got it with --dataset {options.dataset}, whose text has no folders; leave "
            "it out"
        )
    if options.text:
        return texts.read_text(options.text, without=options.without)
    # Sequences are spread over the text, so there is more of it than they hold.
    characters = 16 * tokens
    if options.dataset == "python":
        text, absent = texts.python_sources(characters, without=options.without)
        if absent:
            # What is not installed is not read either; a name that is misspelt would be.
            print(
                f"note: --without: no installed package has a file or folder named "
                f"{', '.join(map(repr, absent))}, so nothing was left out for it",
                file=sys.stderr,
            )
        return text
    return texts.dataset_text(options.dataset, characters)


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


def device_of(name: str, *, spread: bool = True) -> str:
    """The device that is meant; `auto` is the GPU where there is one.

    Raises:
        LearnError: There is none such, or it is all of them where one is meant.
    """
    import torch

    known = re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|spread", name)
    if not known or (name == "spread" and not spread):
        names = "cuda, cuda:N or spread" if spread else "cuda or cuda:N"
        raise LearnError(f"--device: got {name!r}, expected auto, cpu, {names}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    if name != "cpu" and count <= int(name.partition(":")[2] or 0):
        raise LearnError(f"--device: got {name!r}, but torch sees {count} GPUs here; use auto")
    return name


def context_of(config: Any) -> int | None:
    """How many tokens a model reads, if its configuration says so."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if type(context) is int and context > 0 else None
