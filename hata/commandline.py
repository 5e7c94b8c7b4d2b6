"""A parser of command lines that takes no empty values, and types of its values."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """`argparse`, refusing `--out ""`: an unset shell variable is not an option left out.

    Its sub-commands are parsers of this kind too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What argparse does with values of options that name no type.
        self.register("type", None, _filled)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """See `argparse`. From here on a name that the terminal's encoding lacks is escaped."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().parse_args(*args, **kwargs)

    def add_subparsers(self, **kwargs: Any) -> Any:
        """See `argparse`."""
        made = super().add_subparsers(**kwargs)
        # What follows a command is for that command's parser to judge.
        made.type = str
        return made


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("got an empty value; give one, or leave it out")
    return text


def output(text: str) -> Path:
    """A file that can be written. Makes its folder, and leaves no file."""
    file, why = Path(text), ""
    try:
        if file.is_dir():
            why = "it is a folder"
        # Others that are no plain files, such as /dev/stdout, can be.
        elif file.is_file() or not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name):
                why = "it is read-only" if file.exists() and not os.access(file, os.W_OK) else ""
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise argparse.ArgumentTypeError(f"{file} cannot be written ({why}); name another file")
    return file


def size(text: str) -> int:
    """A number of at least 1; K and M are 1024 and its square."""
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    if not (digits.isdecimal() and int(digits) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number such as 512 or 32K")
    return int(digits) * scale
