"""A parser of command lines that takes no empty values."""

from __future__ import annotations

import argparse
import io
import sys
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
