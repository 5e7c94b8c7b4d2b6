"""Strict YAML text: what a profile may be written in.

YAML 1.1 guesses (`no` is a boolean, `010` is eight, `12:30:45` is a number, `1e3` is a string),
expands aliases without bound, keeps the last of two equal keys, and can name Python objects. A
profile needs none of it. So text is read as events into a tree of nodes that still know their
line and whether they were quoted, and only the schema, which knows what type is due, decides what
a scalar means. Nothing is ever constructed from what a file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from hata.errors import ProfileError

MAX_BYTES = 1_000_000
MAX_DEPTH = 16

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"0|-?[1-9][0-9]{0,17}")
# A YAML 1.1 float and a Python float at once: an exponent needs a point and a sign.
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+([eE][-+][0-9]{1,3})?)?")
# What YAML 1.2 and people read as a number, whatever YAML 1.1 makes of it.
_NUMERIC = re.compile(
    r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|0[xob][0-9a-f]+"
)
_SAFE_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*")


@dataclass(slots=True)
class Node:
    """A piece of a profile's text.

    Attributes:
        kind: `"scalar"`, `"list"` or `"table"`.
        source: The file's name.
        line: Line in the file, from 1.
        text: A scalar's characters.
        plain: Whether a scalar stood without quotes.
        items: A list's elements.
        table: A table's key nodes and value nodes, by key text.
    """

    kind: str
    source: str
    line: int
    text: str = ""
    plain: bool = False
    items: list[Node] = field(default_factory=list)
    table: dict[str, tuple[Node, Node]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind != "scalar":
            return f"a {self.kind}"
        if self.plain and not self.text:
            return "nothing"
        shown = self.text if len(self.text) <= 40 else self.text[:37] + "..."
        return shown if self.plain else repr(shown)


def fail(node: Node, message: str) -> NoReturn:
    """Raise a `ProfileError` that starts with file and line."""
    raise ProfileError(f"{node.source}:{node.line}: {message}")


def parse(text: str, source: str) -> Node:
    """Parse one document.

    Args:
        text: The file's text; its size is checked by whoever read it.
        source: The file's name, for messages.

    Raises:
        ProfileError: for malformed YAML, tags, anchors, aliases, duplicate keys, nesting beyond
            `MAX_DEPTH` or more than one document, with the line.
    """
    start = Node("table", source, 1)
    root: Node | None = None
    try:
        events = iter(yaml.parse(text, Loader=_LOADER))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    start.line = _line(event)
                    fail(start, "got a second document, expected one; split the file")
                root = _node(next(events), events, source, 1)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        start.line = mark.line + 1 if mark else 1
        fail(start, f"this is not YAML: {error.problem or error.context or 'malformed'}")
    except yaml.YAMLError as error:
        fail(start, f"this is not YAML: {' '.join(str(error).split())}")
    if root is None:
        fail(start, "the file is empty, expected a profile; write one with: hata tune")
    return root


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def _node(event: Any, events: Iterator[Any], source: str, depth: int) -> Node:
    node = Node("scalar", source, _line(event))
    if isinstance(event, yaml.AliasEvent):
        fail(node, f"got the alias *{event.anchor}; aliases are refused, repeat the value")
    if event.anchor is not None:
        fail(node, f"got the anchor &{event.anchor}; anchors are refused, remove it")
    if event.tag is not None:
        fail(node, f"got the tag {event.tag}; tags are refused, remove it")
    if isinstance(event, yaml.ScalarEvent):
        node.text, node.plain = event.value, not event.style
        return node
    if depth > MAX_DEPTH:
        fail(node, f"nested deeper than {MAX_DEPTH} levels; a profile needs no more than 5")
    if isinstance(event, yaml.SequenceStartEvent):
        node.kind = "list"
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            node.items.append(_node(event, events, source, depth + 1))
        return node
    node.kind = "table"
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(event, events, source, depth + 1)
        if key.kind != "scalar":
            fail(key, f"got {key} as a key, expected a word")
        if key.text in node.table:
            first = node.table[key.text][0].line
            fail(key, f"duplicate key {key.text!r}, first on line {first}; keep one")
        node.table[key.text] = key, _node(next(events), events, source, depth + 1)
    return node


def _resolved(text: str) -> str:
    """The YAML 1.1 type of a plain scalar: `"str"`, `"bool"`, `"int"`, `"float"`, `"null"`..."""
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    for tag, pattern in [*resolvers.get(text[:1], []), *resolvers.get(None, [])]:
        if pattern.match(text):
            return tag.rpartition(":")[2]
    return "str"


def as_text(node: Node) -> str | None:
    """A string, or `None` where the scalar is something else or would be to another reader."""
    if node.kind != "scalar":
        return None
    if node.plain and (_resolved(node.text) != "str" or _NUMERIC.fullmatch(node.text.lower())):
        return None
    return node.text


def as_int(node: Node) -> int | None:
    """A decimal integer, or `None`: no octal, no underscores, no sexagesimal, no quotes."""
    return int(node.text) if _is_plain(node) and _INT.fullmatch(node.text) else None


def as_float(node: Node) -> float | None:
    """A finite decimal number, or `None`."""
    return float(node.text) if _is_plain(node) and _FLOAT.fullmatch(node.text) else None


def as_bool(node: Node) -> bool | None:
    """`true` or `false`, or `None`."""
    return {"true": True, "false": False}.get(node.text) if _is_plain(node) else None


def is_null(node: Node) -> bool:
    """Whether the scalar is a written-out `null`."""
    return _is_plain(node) and node.text == "null"


def _is_plain(node: Node) -> bool:
    return node.kind == "scalar" and node.plain


_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_DUMPER):
    """Writes what `parse` and the `as_` functions read back as the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: Any, value: str) -> yaml.ScalarNode:
    # Some hashes would be numbers: so that all look alike, none is plain, nor are tables of them.
    plain = len(value) < 32 and _SAFE_PLAIN.fullmatch(value) and _resolved(value) == "str"
    style = None if plain else '"' if not value.isprintable() else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(tree: dict[str, Any]) -> str:
    """YAML of nested dicts, lists and scalars: innermost tables on one line, order as given."""
    return yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )
