"""Values of the command lines, as types for `argparse`."""

from __future__ import annotations

import argparse

from benchmarks.shapes import Shape, parse
from hata.errors import ProfileError
from hata.profile import Profile


def shape(text: str) -> Shape:
    """A shape, such as 1x32/8x128K."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def bits(text: str) -> int:
    """Bits of a code."""
    number = int(text)
    if number < 32 or number % 32:
        raise argparse.ArgumentTypeError(f"got {number}, expected a positive multiple of 32")
    return number


def knob(text: str) -> tuple[str, bool | int | str]:
    """A knob and its value."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KNOB=VALUE, such as threads=256")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.isdecimal() else value


def profile(text: str) -> str:
    """A profile that can be read, or `none`."""
    try:
        if text != "none":
            Profile.load(text)
    except ProfileError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
