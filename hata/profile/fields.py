"""The types and ranges of a profile's fields: from nodes of its text to values, and back.

A check takes a node and the name of where it stands, and returns the value or raises a
`ProfileError` with file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
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


def whole(low: int, high: int, multiple: int = 1) -> Check:
    """An integer of a range."""

    def check(node: Node, where: str) -> int:
        value = text.as_int(node)
        if value is None or not low <= value <= high or value % multiple:
            steps = f" in steps of {multiple}" if multiple > 1 else ""
            refuse(node, where, f"a decimal integer from {low} to {high}{steps}")
        return value

    return check


def pow2(low: int, high: int) -> Check:
    """A power of two, or 0."""

    def check(node: Node, where: str) -> int:
        value = whole(low, high)(node, where)
        if value & (value - 1):
            refuse(node, where, "a power of two, as the look-up rounds to")
        return value

    return check


def real(low: float, high: float) -> Check:
    """A number of a range."""

    def check(node: Node, where: str) -> float:
        value = text.as_float(node)
        if value is None or not low <= value <= high:
            refuse(node, where, f"a number from {low:g} to {high:g}, written like 1000.0")
        return value

    return check


def flag(node: Node, where: str) -> bool:
    """A boolean."""
    value = text.as_bool(node)
    if value is None:
        refuse(node, where, "true or false")
    return value


def optional(check: Check) -> Check:
    """`null`, or what `check` takes."""
    return lambda node, where: None if text.is_null(node) else check(node, where)


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


def record(build: Callable[..., Any], /, **checks: Check) -> Check:
    """What `build` makes of a table with known keys; those that it has defaults for may lack."""
    parameters = inspect.signature(build).parameters
    due = [name for name in checks if parameters[name].default is inspect.Parameter.empty]

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


def sparse(found: Any, skip: str = "") -> dict[str, Any]:
    """A record's fields, without those that have their default."""
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name != skip and getattr(found, field.name) != field.default
    }
