"""Schema `hata.profile/1`: the file as a whole, read and written.

A new field is added to a record and to the checks below it, in `entries` or `selections`, and
nowhere else. Every error names the file and the line.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from hata.device import Fingerprint
from hata.profile import entries, selections, text
from hata.profile.fields import name_of, record, refuse, sparse

SCHEMA = "hata.profile/1"
_HEADER = """\
# Written by the tuner of hata: kernel configurations of one device, selections of models.
# Use it: hata.use_profile("<this file>"), or HATA_PROFILE=<this file>.
# Read it: hata profile show <this file>. Renew it: hata tune --out <this file>.
"""


class Parts(NamedTuple):
    """What a file holds: the first fields of a `Profile`."""

    fingerprint: Fingerprint
    measured: entries.Measured
    entries: tuple[entries.Entry, ...] = ()
    selections: tuple[selections.SelectionSet, ...] = ()
    schema: str = SCHEMA


_file = record(
    Parts,
    schema=name_of,
    fingerprint=entries.fingerprint,
    measured=entries.measured,
    entries=entries.entries,
    selections=selections.read,
)


def read(content: str, source: str) -> Parts:
    """The parts of a `Profile`, from a file's text.

    Raises:
        ProfileError: with file and line, for anything that is not schema `hata.profile/1`.
    """
    root = text.parse(content, source)
    if root.kind != "table" or "schema" not in root.table:
        text.fail(root, f"no schema, expected `schema: {SCHEMA}`; is it a profile?")
    schema = root.table["schema"][1]
    if schema.text != SCHEMA:
        refuse(schema, "schema", f"{SCHEMA}; install the hata that wrote it, or tune anew")
    found: Parts = _file(root, "")
    if found.entries:
        entries.check(found.entries, root.table["entries"][1].items, found.fingerprint)
    return found


def write(parts: Parts) -> str:
    """The file's text: sorted, without what is default, times in nanosecond steps."""
    device = parts.fingerprint
    kernels = {name: dict(sorted(ops.items())) for name, ops in sorted(device.kernels.items())}
    software = {"versions": dict(sorted(device.versions.items())), "kernels": kernels}
    tree = {
        "schema": SCHEMA,
        "fingerprint": sparse(device) | software,
        "measured": asdict(parts.measured),
        "entries": entries.tree(parts.entries),
        "selections": selections.tree(parts.selections),
    }
    return _HEADER + text.dump(tree)
