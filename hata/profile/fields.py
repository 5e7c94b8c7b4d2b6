"""The types and ranges of a profile's fields: from nodes of its text to values, and back.

A check takes a node and the name of where it stands, and returns the value or raises a
`ProfileError` with file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from hata.errors import HataError
from hata.profile import text
from hata.profile.text import Node, fail

Check = Callable[[Node, str], Any]
_MAX_TEXT = 200


def refuse(node: Node, where: str, expected: str) -> NoReturn:
    """Raise, naming what came and what is expected."""
    fail(node, f"{where}: got {node}, expected {expected}")


def word(allowed: Callable[[], Iterable[str]] | Iterable[str] = ()) -> Check:
    """A string, of `allowed` ones (or of those that a function names) if there are any."""

    def check(node: Node, where: str) -> str:
        value = text.as_text(node)
        known = list(allowed() if callable(allowed) else allowed)
        if value is None:
            refuse(node, where, "a string; put it in quotes if it is one")
        if known and value not in known:
            near = difflib.get_close_matches(value, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(node, where, f"one of {', '.join(map(repr, known))}{hint}")
        if len(value) > _MAX_TEXT or not value.isprintable():
            refuse(node, where, f"at most {_MAX_TEXT} printable characters")
        return value

    return check


def _scalar(read: Callable[[Node], Any], fits: Callable[[Any], bool], expected: str) -> Check:
    def check(node: Node, where: str) -> Any:
        value = read(node)
        if value is None or not fits(value):
            refuse(node, where, expected)
        return value

    return check


def whole(low: int, high: int, multiple: int = 1) -> Check:
    """An integer of a range."""
    steps = f" in steps of {multiple}" if multiple > 1 else ""
    return _scalar(
        text.as_int,
        lambda value: low <= value <= high and value % multiple == 0,
        f"a decimal integer from {low} to {high}{steps}",
    )


def pow2(high: int) -> Check:
    """A power of two, or 0."""
    return _scalar(
        text.as_int,
        lambda value: 0 <= value <= high and not value & (value - 1),
        f"0 or a power of two up to {high}, as the look-up rounds to",
    )


def real(low: float, high: float) -> Check:
    """A number of a range."""
    return _scalar(
        text.as_float,
        lambda value: low <= value <= high,
        f"a number from {low:g} to {high:g}, written like 1000.0",
    )


flag = _scalar(text.as_bool, lambda _: True, "true or false")


def optional(check: Check) -> Check:
    """`null`, or what `check` takes."""
    return lambda node, where: None if text.is_null(node) else check(node, where)


def moment(node: Node, where: str) -> str:
    """A day or moment of ISO 8601, as text."""
    value = name_of(node, where)
    try:
        datetime.fromisoformat(value)
    except ValueError:
        refuse(node, where, "a day or moment of ISO 8601, such as '2026-11-21'")
    return value


def items(check: Check) -> Check:
    """A list."""

    def check_all(node: Node, where: str) -> tuple:
        if node.kind != "list":
            refuse(node, where, "a list")
        return tuple(check(item, f"{where}[{i}]") for i, item in enumerate(node.items))

    return check_all


def table(check: Check) -> Check:
    """A table with any words as keys."""

    def check_all(node: Node, where: str) -> dict[str, Any]:
        if node.kind != "table":
            refuse(node, where, "a table")
        return {
            name_of(key, where): check(value, f"{where}.{name}")
            for name, (key, value) in node.table.items()
        }

    return check_all


def record(build: Callable[..., Any], /, **given: Check) -> Check:
    """What `build` makes of a table whose keys are its parameters.

    Those with a default may lack. Strings and booleans need no check of their own.
    """
    parameters = inspect.signature(build).parameters
    checks = {name: given.get(name) or _BY_TYPE[one.annotation] for name, one in parameters.items()}
    due = [name for name, one in parameters.items() if one.default is one.empty]

    def check(node: Node, where: str) -> Any:
        if node.kind != "table":
            refuse(node, where, f"a table with {', '.join(checks)}")
        # The file as a whole is nowhere.
        at = f"{where}: " if where else ""
        for name, (key, _) in node.table.items():
            if name not in checks:
                near = difflib.get_close_matches(name, checks, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(checks)}"
                fail(key, f"{at}unknown key {name!r}; {hint}")
        missing = [name for name in due if name not in node.table]
        if missing:
            fail(node, f"{at}{', '.join(missing)} missing; add it")
        values = {
            name: checks[name](value, f"{where}.{name}".lstrip("."))
            for name, (_, value) in node.table.items()
        }
        try:
            return build(**values)
        except HataError as error:
            # A record that checks itself (Selection) does not know where it stands.
            fail(node, f"{at}{error}")

    return check


name_of = word()
_BY_TYPE = {"str": name_of, "str | None": optional(name_of), "bool": flag}


def sparse(found: Any, skip: str = "") -> dict[str, Any]:
    """A record's fields, without those that have their default."""
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name != skip and getattr(found, field.name) != field.default
    }
