"""Values of the command lines."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.shapes import Shape, parse


def unwritable(file: Path) -> str:
    """Why a file cannot be written, if so. Makes its folder, and leaves no file."""
    try:
        if file.is_dir():
            return "it is a folder"
        if file.exists() and not file.is_file():
            # Such as /dev/stdout.
            return ""
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return "" if not file.exists() or os.access(file, os.W_OK) else "it is read-only"


def shape_option(text: str) -> Shape:
    """A shape of the command line, for `argparse`."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
