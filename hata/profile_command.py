"""`hata profile`: show, validate and compare profiles. Imports no array framework."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

from hata import registry
from hata.errors import ProfileError
from hata.problem import Problem
from hata.profile import Entry, Profile, SelectionSet, find
from hata.profile.fields import sparse
from hata.selection import Selection
from hata.words import ranges, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of the command to its parser."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    show = verbs.add_parser("show", help="print a profile as tables")
    show.add_argument("file", nargs="?", help="path or name; without it, the profile in force")
    show.set_defaults(run=_show)
    validate = verbs.add_parser("validate", help="exit 0 if every file is a sound profile, else 1")
    validate.add_argument("files", nargs="+", metavar="file", help="path or name")
    validate.set_defaults(run=_validate)
    diff = verbs.add_parser("diff", help="print what differs; exit 0 if nothing does, else 1")
    diff.add_argument("a", help="path or name")
    diff.add_argument("b", help="path or name")
    diff.set_defaults(run=_diff)


def counts(profile: Profile) -> str:
    """How much a profile holds, in words."""
    predicted = ", predicted" if profile.measured.predicted else ""
    entries, models = len(profile.entries), len(profile.selections)
    return (
        f"{entries} {'entry' if entries == 1 else 'entries'}, "
        f"{models} {'model' if models == 1 else 'models'}{predicted}"
    )


def _show(options: argparse.Namespace) -> int:
    profile = Profile.load(options.file) if options.file else find()
    if profile is None:
        print("no profile is in force; write one with: hata tune")
        return 0
    recorded, measured = profile.fingerprint, profile.measured
    print(profile.path)
    _warn_of_stale(profile)
    software = {**recorded.versions, "driver": recorded.driver, "cuda": recorded.cuda}
    table(
        [
            ["device", recorded.describe()],
            ["software", _pairs({name: value for name, value in software.items() if value})],
            [
                "predicted" if measured.predicted else "measured",
                f"{measured.date}, {measured.method}, {measured.repeats} repeats, "
                f"{'cold' if measured.cold_cache else 'warm'} cache, "
                f"noise {measured.noise_pct:g}%, {measured.trials} trials, seed {measured.seed}",
            ],
        ]
    )
    if measured.predicted:
        print("These times were predicted by a model; nothing was run. Tune on the device itself.")
    if profile.entries:
        print("\nEntries (times in microseconds)")
        head = ["backend", "op", "problem", "us", "p10-p90", "default", "gain", "config"]
        table([head, *map(_entry, profile.entries)])
    for found in profile.selections:
        _show_selections(found)
    return 0


def _entry(entry: Entry) -> list[str]:
    """The row of an entry."""
    us = entry.us
    return [
        entry.backend,
        entry.op,
        _problem(entry.key),
        f"{us.median:.1f}",
        f"{us.p10:.1f}-{us.p90:.1f}",
        f"{entry.default_us:.1f}",
        f"{entry.default_us / us.median if us.median else 0.0:.2f}x",
        _pairs(entry.config),
    ]


def _show_selections(found: SelectionSet) -> None:
    model, seed = found.model, found.encoder.seed
    seeded = f", seed {seed}" if seed is not None else ""
    print(
        f"\nModel {model.name} ({model.model_type}, {model.layers} layers, {model.heads}/"
        f"{model.kv_heads} heads of {model.head_dim}): {found.source}, encoder "
        f"{found.encoder.name} of {found.encoder.bits} bits{seeded}; keeps "
        f"{found.quality.achieved:.1%} of exact top-k, {found.quality.required:.1%} was asked"
    )
    rows = [["layers", "selection"]]
    if isinstance(found.layers, Selection):
        rows.append(["all", _selection(found.layers)])
    else:
        for layer, alike in groupby(enumerate(found.layers), key=lambda pair: pair[1]):
            rows.append([ranges(i for i, _ in alike), _selection(layer)])
    table(rows)


def _validate(options: argparse.Namespace) -> int:
    sound = True
    for file in options.files:
        try:
            profile = Profile.load(file)
        except ProfileError as error:
            print(error, file=sys.stderr)
            sound = False
        else:
            print(f"{profile.path}: ok, {counts(profile)}")
            _warn_of_stale(profile)
    return 0 if sound else 1


def _warn_of_stale(profile: Profile) -> None:
    # No fault of the file, which may be meant for other kernels than those here.
    for one in registry.stale(profile):
        print(f"{profile.path}: warning: {one}", file=sys.stderr)


def _diff(options: argparse.Namespace) -> int:
    a, b = Profile.load(options.a), Profile.load(options.b)
    lines = [*_diff_devices(a, b), *_diff_entries(a, b), *_diff_selections(a, b)]
    print("\n".join(lines) or "no difference")
    return 1 if lines else 0


def _differing(old: Mapping, new: Mapping, absent: Any = None) -> list[tuple[Any, Any, Any]]:
    """Keys whose values differ, with both; those of `old` first."""
    pairs = ((key, old.get(key, absent), new.get(key, absent)) for key in {**old, **new})
    return [(key, was, now) for key, was, now in pairs if was != now]


def _diff_devices(a: Profile, b: Profile) -> list[str]:
    old, new = a.fingerprint, b.fingerprint
    return [
        *(
            f"{name}: {was} -> {now}"
            for x, y in ((old, new), (a.measured, b.measured))
            for name, was, now in _differing(asdict(x), asdict(y))
            if name not in ("versions", "kernels")
        ),
        *(
            f"{name}: {was} -> {now}"
            for name, was, now in sorted(_differing(old.versions, new.versions, "absent"))
        ),
        *(
            f"kernel {name}: sources differ"
            for name, *_ in sorted(_differing(_kernels(a), _kernels(b), ""))
        ),
    ]


def _kernels(profile: Profile) -> dict[str, str]:
    recorded = profile.fingerprint.kernels.items()
    return {f"{backend} {op}": sha for backend, ops in recorded for op, sha in ops.items()}


def _diff_entries(a: Profile, b: Profile) -> list[str]:
    lines = []
    old, new = ({(entry.backend, entry.key): entry for entry in one.entries} for one in (a, b))
    for (backend, key), x, y in _differing(old, new):
        title = f"{backend} {key.op} {_problem(key)}"
        if x is None or y is None:
            lines.append(f"{'+' if x is None else '-'} {title}")
            continue
        ratio = f" ({y.us.median / x.us.median:.2f}x)" if x.us.median else ""
        knobs = sorted(_differing(x.config, y.config, "-"), key=lambda knob: knob[0])
        changes = [f"{name} {was} -> {now}" for name, was, now in knobs]
        lines.append(
            ", ".join([f"~ {title}: {x.us.median:.1f} -> {y.us.median:.1f} us{ratio}", *changes])
        )
    return lines


def _diff_selections(a: Profile, b: Profile) -> list[str]:
    lines = []
    old, new = ({found.model: found for found in one.selections} for one in (a, b))
    for model, x, y in _differing(old, new):
        if x is None or y is None:
            lines.append(f"{'+' if x is None else '-'} model {model.name}")
            continue
        quality = f"{x.quality.achieved:.4f} -> {y.quality.achieved:.4f}"
        lines.append(f"~ model {model.name}: quality {quality}")
        if x.encoder != y.encoder:
            lines.append(f"    encoder {x.encoder} -> {y.encoder}")
        for i, (was, now) in enumerate(zip(x.by_layer, y.by_layer, strict=True)):
            if was != now:
                lines.append(f"    layer {i}: {_selection(was)} -> {_selection(now)}")
    return lines


def _problem(key: Problem) -> str:
    """A problem in a few words: what differs from the default, op and device aside."""
    named = {name: value for name, value in sparse(key).items() if name not in _SAID}
    words = (f"{name}={value}" if value is not True else name for name, value in named.items())
    return " ".join([key.dtype, *words])


_SAID = ("op", "device", "dtype")


def _selection(layer: Selection | None) -> str:
    return "dense" if layer is None else _pairs(sparse(layer))


def _pairs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items()) or "-"
