"""Schema `hata.profile/1`: the fields, their types and their ranges, read and written.

The one place that knows what a profile file contains; a new field is added to a record, to its
table here, and nowhere else. Every error names the file and the line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hata.device import Fingerprint
from hata.errors import HataError
from hata.problem import OPS, Problem
from hata.profile import text
from hata.profile.records import (
    SCHEMA,
    EncoderKey,
    Entry,
    Measured,
    ModelKey,
    Quality,
    SelectionSet,
    Timing,
)
from hata.profile.text import Node
from hata.selection import Selection

if TYPE_CHECKING:
    from hata.profile import Profile

_Check = Callable[["_Reader", Node, str], Any]
_MAX_TEXT = 200
_MAX_KNOB = 1 << 24
_SIZED_KNOB = re.compile(r"block|tile|warp")
_DTYPES = ("float32", "float16", "bfloat16", "uint8")
_HEADER = """\
# Written by the tuner of hata: kernel configurations of one device, selections of models.
# Use it: hata.use_profile("<this file>"), or HATA_PROFILE=<this file>.
# Read it: hata profile show <this file>. Renew it: hata tune --out <this file>.
"""


class _Reader:
    """Turns nodes into values; knows the file's name for messages."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, node: Node, where: str, expected: str) -> Any:
        text.fail(self.source, node.line, f"{where}: got {node}, expected {expected}")

    def table(self, node: Node, where: str, checks: Mapping[str, tuple[_Check, bool]]) -> dict:
        """A table with known keys; `checks` says for each how to read it and if it is required."""
        if node.kind != "table":
            self.fail(node, where, f"a table with {', '.join(checks)}")
        # The file as a whole is nowhere.
        at = f"{where}: " if where else ""
        for name, (key, _) in node.table.items():
            if name not in checks:
                near = difflib.get_close_matches(name, checks, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(checks)}"
                text.fail(self.source, key.line, f"{at}unknown key {name!r}; {hint}")
        missing = [name for name, (_, due) in checks.items() if due and name not in node.table]
        if missing:
            text.fail(self.source, node.line, f"{at}{', '.join(missing)} missing; add it")
        return {
            name: checks[name][0](self, value, f"{where}.{name}".lstrip("."))
            for name, (_, value) in node.table.items()
        }

    def free_table(self, node: Node, where: str, check: _Check) -> dict[str, Any]:
        """A table with any words as keys."""
        if node.kind != "table":
            self.fail(node, where, "a table")
        return {
            _text()(self, key, where): check(self, value, f"{where}.{name}")
            for name, (key, value) in node.table.items()
        }

    def items(self, node: Node, where: str, check: _Check) -> tuple:
        """A list."""
        if node.kind != "list":
            self.fail(node, where, "a list")
        return tuple(check(self, item, f"{where}[{i}]") for i, item in enumerate(node.items))


def _text(*allowed: str) -> _Check:
    def check(reader: _Reader, node: Node, where: str) -> str:
        value = text.as_text(node)
        if value is None:
            reader.fail(node, where, "a string; put it in quotes if it is one")
        elif allowed and value not in allowed:
            near = difflib.get_close_matches(value, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            reader.fail(node, where, f"one of {', '.join(map(repr, allowed))}{hint}")
        elif len(value) > _MAX_TEXT or not value.isprintable():
            reader.fail(node, where, f"at most {_MAX_TEXT} printable characters")
        return value or ""

    return check


def _int(low: int, high: int, multiple: int = 1) -> _Check:
    def check(reader: _Reader, node: Node, where: str) -> int:
        value = text.as_int(node)
        if value is None or not low <= value <= high or value % multiple:
            steps = f" in steps of {multiple}" if multiple > 1 else ""
            reader.fail(node, where, f"a decimal integer from {low} to {high}{steps}")
        return value or 0

    return check


def _pow2(low: int, high: int) -> _Check:
    def check(reader: _Reader, node: Node, where: str) -> int:
        value = _int(low, high)(reader, node, where)
        if value & (value - 1):
            reader.fail(node, where, "a power of two, as the look-up rounds to")
        return value

    return check


def _float(low: float, high: float) -> _Check:
    def check(reader: _Reader, node: Node, where: str) -> float:
        value = text.as_float(node)
        if value is None or not low <= value <= high:
            reader.fail(node, where, f"a number from {low:g} to {high:g}, written like 1000.0")
        return value or 0.0

    return check


def _bool(reader: _Reader, node: Node, where: str) -> bool:
    value = text.as_bool(node)
    if value is None:
        reader.fail(node, where, "true or false")
    return bool(value)


def _optional(check: _Check) -> _Check:
    return lambda reader, node, where: None if text.is_null(node) else check(reader, node, where)


def _free(check: _Check) -> _Check:
    return lambda reader, node, where: reader.free_table(node, where, check)


def _list(check: _Check) -> _Check:
    return lambda reader, node, where: reader.items(node, where, check)


def _record(
    build: Callable[..., Any], required: dict[str, _Check], optional: dict[str, _Check]
) -> _Check:
    checks = {name: (check, True) for name, check in required.items()}
    checks |= {name: (check, False) for name, check in optional.items()}

    def check(reader: _Reader, node: Node, where: str) -> Any:
        fields = reader.table(node, where, checks)
        try:
            return build(**fields)
        except HataError as error:
            # A record that checks itself (Selection) does not know where it stands.
            text.fail(reader.source, node.line, f"{where}: {error}")

    return check


def _knob(reader: _Reader, node: Node, where: str) -> int | str | bool:
    for value in (text.as_bool(node), text.as_int(node)):
        if value is not None:
            name = where.rpartition(".")[2]
            low = 1 if _SIZED_KNOB.search(name) else -_MAX_KNOB
            if not isinstance(value, bool) and not low <= value <= _MAX_KNOB:
                reader.fail(node, where, f"an integer from {low} to {_MAX_KNOB}")
            return value
    if text.as_text(node) is None:
        reader.fail(node, where, "an integer, true, false, or a string (quoted if in doubt)")
    return _text()(reader, node, where)


_name = _text()
_count = _int(0, 1 << 31)
_size = _int(0, 1 << 20)
_fingerprint = _record(
    Fingerprint,
    {"device": _text("cpu", "cuda"), "name": _name, "cores": _int(1, 1 << 20)},
    {
        "sm": _optional(_int(10, 999)),
        "smem_optin": _optional(_int(0, 1 << 24)),
        "driver": _optional(_name),
        "cuda": _optional(_name),
        "versions": _free(_name),
        "kernels": _free(_free(_name)),
    },
)
_measured = _record(
    Measured,
    {
        "date": _name,
        "method": _name,
        "repeats": _count,
        "cold_cache": _bool,
        "noise_pct": _float(0, 1000),
        "trials": _count,
        "seed": _int(0, 1 << 53),
    },
    {"predicted": _bool},
)
_timing = _record(Timing, dict.fromkeys(("median", "p10", "p90"), _float(0, 1e10)), {})
_problem: dict[str, _Check] = {
    "device": _text("cpu", "cuda"),
    "dtype": _text(*_DTYPES),
    "projection_dtype": _text("", *_DTYPES),
    "batch": _pow2(0, 1 << 31),
    "heads": _size,
    "kv_heads": _size,
    "head_dim": _size,
    "value_dim": _size,
    "bits": _int(0, 1 << 16, 32),
    "k": _int(0, 1 << 40),
    "tokens": _int(0, 1 << 40),
    "slots": _pow2(0, 1 << 40),
    "norms": _bool,
    "per_head": _bool,
    "aligned": _bool,
    "wide": _bool,
}
_key = _record(
    dict,
    {name: _problem[name] for name in ("device", "dtype")},
    {name: check for name, check in _problem.items() if name not in ("device", "dtype")},
)


def _build_entry(op: str, backend: str, key: dict, **rest: Any) -> Entry:
    return Entry(backend=backend, key=Problem(op=op, **key), **rest)


_entry = _record(
    _build_entry,
    {
        "op": _text(*OPS),
        "backend": _name,
        "key": _key,
        "config": _free(_knob),
        "us": _timing,
        "default_us": _float(0, 1e10),
    },
    {},
)
_selection = _record(
    Selection,
    {"bits": _int(32, 1 << 16, 32), "k": _int(1, 1 << 31)},
    {
        "ratio": _optional(_float(0, 1)),
        "k_min": _count,
        "sink": _count,
        "recent": _count,
        "dense_layers": _size,
        "min_length": _optional(_int(0, 1 << 40)),
    },
)


def _layers(reader: _Reader, node: Node, where: str) -> Any:
    if node.kind == "list":
        return reader.items(node, where, _optional(_selection))
    return _selection(reader, node, where)


_selection_set = _record(
    SelectionSet,
    {
        "model": _record(
            ModelKey,
            {
                "name": _name,
                "model_type": _name,
                "layers": _size,
                "heads": _size,
                "kv_heads": _size,
                "head_dim": _size,
            },
            {},
        ),
        "encoder": _record(
            EncoderKey,
            {"name": _name, "bits": _int(32, 1 << 16, 32)},
            {"seed": _optional(_int(0, 1 << 53))},
        ),
        "source": _text("measured", "synthetic"),
        "quality": _record(Quality, dict.fromkeys(("required", "achieved"), _float(0, 1)), {}),
        "layers": _layers,
    },
    {},
)
_profile = {
    "schema": (_name, True),
    "fingerprint": (_fingerprint, True),
    "measured": (_measured, True),
    "entries": (_list(_entry), False),
    "selections": (_list(_selection_set), False),
}


def read(content: str, source: str) -> dict[str, Any]:
    """The fields of a `Profile` from a file's text.

    Raises:
        ProfileError: with file and line, for anything that is not schema `hata.profile/1`.
    """
    reader = _Reader(source)
    root = text.parse(content, source)
    if root.kind != "table" or "schema" not in root.table:
        text.fail(source, root.line, f"no schema, expected `schema: {SCHEMA}`; is it a profile?")
    schema = root.table["schema"][1]
    if schema.text != SCHEMA:
        reader.fail(schema, "schema", f"{SCHEMA}; install the hata that wrote it, or tune anew")
    fields = reader.table(root, "", _profile)
    fingerprint, entries = fields["fingerprint"], fields.get("entries", ())
    lines = root.table["entries"][1].items if entries else []
    seen: dict[tuple[str, Problem], int] = {}
    for entry, node in zip(entries, lines, strict=True):
        first = seen.setdefault((entry.backend, entry.key), node.line)
        if first != node.line:
            text.fail(source, node.line, f"the same key as the entry on line {first}; remove one")
        if entry.key.device != fingerprint.device:
            text.fail(
                source,
                node.line,
                f"key.device: got {entry.key.device}, expected {fingerprint.device} as in the "
                "fingerprint; a profile is for one device",
            )
        if entry.op not in fingerprint.kernels.get(entry.backend, {}):
            text.fail(
                source,
                node.line,
                f"no kernel hash; expected fingerprint.kernels.{entry.backend}.{entry.op}; tune "
                "anew",
            )
        if not entry.us.p10 <= entry.us.median <= entry.us.p90:
            text.fail(source, node.line, "us: expected p10 <= median <= p90; tune anew")
    models: set[ModelKey] = set()
    nodes = root.table["selections"][1].items if fields.get("selections") else []
    for selections, node in zip(fields.get("selections", ()), nodes, strict=True):
        _check_selections(selections, models, node.line, source)
        models.add(selections.model)
    return fields


def _check_selections(found: SelectionSet, models: set[ModelKey], line: int, source: str) -> None:
    if found.model in models:
        text.fail(source, line, f"model {found.model.name!r} stands twice; remove one")
    one = isinstance(found.layers, Selection)
    layers = (found.layers,) if isinstance(found.layers, Selection) else found.layers
    if not one and len(layers) != found.model.layers:
        text.fail(
            source,
            line,
            f"layers: got {len(layers)}, expected {found.model.layers}, one a layer; or one "
            "selection without the list",
        )
    wide = [layer.bits for layer in layers if layer is not None and layer.bits > found.encoder.bits]
    if wide:
        text.fail(
            source,
            line,
            f"layers: got {max(wide)} bits, expected at most the encoder's {found.encoder.bits}",
        )


def write(profile: Profile) -> str:
    """The file's text: sorted, without what is default, times in nanosecond steps."""
    entries = sorted(profile.entries, key=lambda entry: (entry.backend, _order(entry.key)))
    selections = sorted(profile.selections, key=lambda found: dataclasses.astuple(found.model))
    fingerprint = profile.fingerprint
    tree = {
        "schema": SCHEMA,
        "fingerprint": _sparse(fingerprint)
        | {
            "versions": dict(sorted(fingerprint.versions.items())),
            "kernels": {
                backend: dict(sorted(ops.items()))
                for backend, ops in sorted(fingerprint.kernels.items())
            },
        },
        "measured": dataclasses.asdict(profile.measured),
        "entries": [
            {
                "op": entry.op,
                "backend": entry.backend,
                "key": _sparse(entry.key, skip="op"),
                "config": dict(sorted(entry.config.items())),
                "us": {k: round(v, 3) for k, v in dataclasses.asdict(entry.us).items()},
                "default_us": round(entry.default_us, 3),
            }
            for entry in entries
        ],
        "selections": [
            {
                "model": dataclasses.asdict(found.model),
                "encoder": _sparse(found.encoder),
                "source": found.source,
                "quality": dataclasses.asdict(found.quality),
                "layers": _sparse(found.layers)
                if isinstance(found.layers, Selection)
                else [layer and _sparse(layer) for layer in found.layers],
            }
            for found in selections
        ],
    }
    return _HEADER + text.dump(tree)


def _order(problem: Problem) -> tuple:
    return OPS.index(problem.op), *dataclasses.astuple(problem)


def _sparse(record: Any, skip: str = "") -> dict[str, Any]:
    """A record's fields, without those that have their default."""
    return {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name != skip and getattr(record, field.name) != field.default
    }
