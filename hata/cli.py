"""The `hata` command: info, tune, check, learn, eval, convert and profile.

`hata tune` is the program `python -m tune`; the library knows it by name only. `hata profile`
imports no array framework.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import hata
from hata import device, registry
from hata.commandline import Parser
from hata.errors import BackendUnavailable, HataDeviceError, HataError, ProfileError
from hata.evaluate import check_command
from hata.evaluate import command as eval_command
from hata.learn import command as learn_command
from hata.problem import Problem
from hata.profile import Profile, SelectionSet, default_output, find, soft_differences
from hata.selection import Selection

_TUNER = "tune"
_PACKAGES = (
    "numpy", "numba", "pyyaml", "filelock", "safetensors", "ml_dtypes", "torch", "triton",
    "cupy-cuda12x", "cupy-cuda13x", "jax", "transformers", "optuna", "rich",
)  # fmt: skip
_VARIABLES = {
    "HATA_BACKEND": "the backend of the process",
    "HATA_CACHE": "folder for profiles and other caches",
    "HATA_CHECK": "1: check preconditions that read device memory",
    "HATA_PROFILE": "the profile: a path, a name, or none",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; `None`: those of the process.

    Returns:
        Exit status: 0, 1 for a fault in a file or on the way, 2 for a wrong command line, 130 if
        stopped.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # All that follows `tune` is the tuner's, its --help included.
    if arguments[:1] == ["tune"]:
        return _tune(arguments[1:])
    options = _parser().parse_args(arguments)
    name = f"hata {arguments[0]}"
    try:
        return options.run(options)
    except HataError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        # Messages begin with what is at fault, such as an option.
        return 2 if str(error).startswith("--") else 1
    except BrokenPipeError:
        # `hata profile show FILE | head` closes early; what is left has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk, a folder that may not be written: the message names it.
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hata", description="Hash-aware top-k attention for long-context decoding."
    )
    parser.add_argument("--version", action="version", version=f"hata {hata.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="what is installed, what can run, what is in force",
        description="Print versions, devices, every backend and why it can or cannot run, the "
        "profile in force and the variables of the environment.",
    )
    info.add_argument("--json", action="store_true", help="for machines")
    info.set_defaults(run=_info)

    commands.add_parser("tune", help="tune for this machine and write a profile", add_help=False)

    check = commands.add_parser(
        "check",
        help="hold a model with hash attention against its own answers",
        description="Generate a few tokens with hash attention that leaves nothing out, and by the "
        "model alone: with a dynamic cache, a static one, and left padding. A difference is an "
        "error that names the layer where it begins.",
    )
    check_command.add_arguments(check)
    check.set_defaults(run=_check)

    learn = commands.add_parser(
        "learn",
        help="train an encoder on a model and some text",
        description="Train an encoder, layer by layer, on what a model attends with while it reads "
        "text.",
    )
    learn_command.add_arguments(learn)
    learn.set_defaults(run=_learn)

    judge = commands.add_parser(
        "eval",
        help="what an encoder keeps of a model's attention",
        description="Measure the attention mass that encoders, and other ways of choosing keys, "
        "keep of a model's attention; and, where asked for, tasks and perplexity.",
    )
    eval_command.add_arguments(judge)
    judge.set_defaults(run=_eval)

    convert = commands.add_parser(
        "convert",
        help="make an encoder file of weights that HATA or HashAttention published",
        description="Make an encoder file of weights that HATA or HashAttention published. Nothing "
        "in them is executed.",
    )
    convert.add_argument(
        "source",
        help="HATA: a folder with one hash_weight_layer_N.pt per hashed layer; HashAttention: a "
        "state dictionary (.pt) or a .pkl",
    )
    convert.add_argument("--config", required=True, help="the model's config.json, or its folder")
    convert.add_argument("--out", required=True, help="encoder to write, *.safetensors")
    convert.set_defaults(run=_convert)

    profile = commands.add_parser(
        "profile",
        help="show, validate or compare profiles",
        description="Show, validate or compare profiles: the files that the tuner writes.",
    )
    verbs = profile.add_subparsers(metavar="VERB", required=True)
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
    return parser


def _tune(arguments: list[str]) -> int:
    if importlib.util.find_spec(_TUNER) is None:
        print(
            "hata tune: error: the tuner is not installed beside hata; reinstall with: "
            "pip install 'hata-attention[tune]'",
            file=sys.stderr,
        )
        return 2
    before, sys.argv = sys.argv, ["hata tune", *arguments]
    try:
        runpy.run_module(_TUNER, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


def _convert(options: argparse.Namespace) -> int:
    from hata.convert import convert

    encoder = convert(options.source, options.config)
    encoder.save(options.out)
    print(f"{options.out}: {encoder!r}")
    return 0


def _check(options: argparse.Namespace) -> int:
    _need_torch()
    return check_command.run(options)


def _learn(options: argparse.Namespace) -> int:
    _need_torch()
    return learn_command.run(options)


def _eval(options: argparse.Namespace) -> int:
    _need_torch()
    return eval_command.run(options)


def _need_torch() -> None:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailable(
                f"needs {name}, which is not installed; pip install 'hata-attention[learn]'"
            )


def _info(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"hata {facts['hata']}, Python {facts['python']}, {facts['platform']}")
    print("\nPackages")
    _table([[f"  {name}", version or "-"] for name, version in facts["packages"].items()])
    print("\nDevices")
    for found in facts["devices"]:
        print(f"  {found['device']}: {found['description']}")
        if "profile" in found:
            print(f"    profile: {found['profile']}")
    print("\nBackends")
    _table(
        [
            [f"  {one['name']}", "can run" if one["available"] else f"cannot run: {one['reason']}"]
            for one in facts["backends"]
        ]
    )
    print(f"  in force: {facts['backend']}")
    print("\nEnvironment")
    _table(
        [
            [f"  {name}", repr(value) if value is not None else "not set", _VARIABLES.get(name, "")]
            for name, value in facts["environment"].items()
        ]
    )
    for fault in facts["errors"]:
        print(f"  error: {fault}")
    return 0


def _facts() -> dict[str, Any]:
    """All of `hata info`. Every probe may fail; then its place says why."""
    names = sorted({*_VARIABLES, *(name for name in os.environ if name.startswith("HATA_"))})
    return {
        "hata": hata.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: device.package_version(name) for name in _PACKAGES},
        "devices": [_device_facts(kind) for kind in device.kinds()],
        "backends": [one._asdict() for one in registry.list_backends()],
        "backend": registry.get_backend(),
        "environment": {name: os.environ.get(name) for name in names},
        "errors": registry.environment_faults(),
    }


def _device_facts(kind: str) -> dict[str, Any]:
    try:
        here = device.fingerprint(kind)
    except HataDeviceError as error:
        return {"device": kind, "description": f"none ({error})"}
    facts: dict[str, Any] = {
        "device": kind,
        "description": here.describe(),
        "slug": here.slug,
        "fingerprint": {
            field.name: value
            for field in dataclasses.fields(here)
            if (value := getattr(here, field.name)) and field.name != "kernels"
        },
    }
    try:
        found = find(kind)
        facts["profile"] = _in_force(found, here) if found else _nothing_in_force(here)
    except ProfileError as error:
        facts["profile"] = f"error: {error}"
    return facts


def _in_force(profile: Profile, here: device.Fingerprint) -> str:
    recorded = profile.fingerprint
    text = f"{profile.path} ({profile.origin}, {_counts(profile)})"
    if recorded.device != here.device or recorded.sm != here.sm:
        return f"{text}; not used, it is for {recorded.describe()}"
    apart = soft_differences(recorded, here)
    text = f"{text}; used although {'; '.join(apart)}" if apart else text
    return "; but ".join([text, *registry.stale(profile)])


def _nothing_in_force(here: device.Fingerprint) -> str:
    if os.environ.get("HATA_PROFILE", "").strip() == "none":
        return "none (HATA_PROFILE=none), defaults"
    return f"none, defaults; hata tune writes {default_output(here)}"


def _counts(profile: Profile) -> str:
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
    rows = [
        ["device", recorded.describe()],
        ["software", _pairs(_software(recorded))],
        [
            "predicted" if measured.predicted else "measured",
            f"{measured.date}, {measured.method}, {measured.repeats} repeats, "
            f"{'cold' if measured.cold_cache else 'warm'} cache, noise {measured.noise_pct:g}%, "
            f"{measured.trials} trials, seed {measured.seed}",
        ],
    ]
    _table(rows)
    if measured.predicted:
        print("These times were predicted by a model; nothing was run. Tune on the device itself.")
    if profile.entries:
        print("\nEntries (times in microseconds)")
        rows = [["backend", "op", "problem", "us", "p10-p90", "default", "gain", "config"]]
        for entry in profile.entries:
            gain = entry.default_us / entry.us.median if entry.us.median else 0.0
            rows.append(
                [
                    entry.backend,
                    entry.op,
                    _problem(entry.key),
                    f"{entry.us.median:.1f}",
                    f"{entry.us.p10:.1f}-{entry.us.p90:.1f}",
                    f"{entry.default_us:.1f}",
                    f"{gain:.2f}x",
                    _pairs(entry.config),
                ]
            )
        _table(rows)
    for found in profile.selections:
        _show_selections(found)
    return 0


def _show_selections(found: SelectionSet) -> None:
    model, seed = found.model, found.encoder.seed
    seeded = f", seed {seed}" if seed is not None else ""
    print(
        f"\nModel {model.name} ({model.model_type}, {model.layers} layers, {model.heads}/"
        f"{model.kv_heads} heads of {model.head_dim}): {found.source}, encoder "
        f"{found.encoder.name} of {found.encoder.bits} bits{seeded}; keeps "
        f"{found.quality.achieved:.1%} of exact top-k, {found.quality.required:.1%} was asked"
    )
    if isinstance(found.layers, Selection):
        _table([["layers", "selection"], ["all", _selection(found.layers)]])
        return
    rows = [["layers", "selection"]]
    start = 0
    for i, layer in enumerate(found.layers):
        if i + 1 == len(found.layers) or found.layers[i + 1] != layer:
            rows.append([str(i) if i == start else f"{start}-{i}", _selection(layer)])
            start = i + 1
    _table(rows)


def _validate(options: argparse.Namespace) -> int:
    sound = True
    for file in options.files:
        try:
            profile = Profile.load(file)
        except ProfileError as error:
            print(error, file=sys.stderr)
            sound = False
        else:
            print(f"{profile.path}: ok, {_counts(profile)}")
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


def _diff_devices(a: Profile, b: Profile) -> list[str]:
    lines = []
    for x, y in ((a.fingerprint, b.fingerprint), (a.measured, b.measured)):
        for field in dataclasses.fields(x):
            old, new = getattr(x, field.name), getattr(y, field.name)
            if old != new and field.name not in ("versions", "kernels"):
                lines.append(f"{field.name}: {old} -> {new}")
    old, new = dict(a.fingerprint.versions), dict(b.fingerprint.versions)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    old, new = _kernels(a), _kernels(b)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            lines.append(f"kernel {name}: sources differ")
    return lines


def _kernels(profile: Profile) -> dict[str, str]:
    recorded = profile.fingerprint.kernels.items()
    return {f"{backend} {op}": sha for backend, ops in recorded for op, sha in ops.items()}


def _diff_entries(a: Profile, b: Profile) -> list[str]:
    lines = []
    old = {(entry.backend, entry.key): entry for entry in a.entries}
    new = {(entry.backend, entry.key): entry for entry in b.entries}
    for key in [*old, *(key for key in new if key not in old)]:
        x, y = old.get(key), new.get(key)
        title = f"{key[0]} {key[1].op} {_problem(key[1])}"
        if x is None or y is None:
            lines.append(f"{'+' if x is None else '-'} {title}")
        elif x != y:
            ratio = f" ({y.us.median / x.us.median:.2f}x)" if x.us.median else ""
            change = f"~ {title}: {x.us.median:.1f} -> {y.us.median:.1f} us{ratio}"
            knobs = [
                f"{name} {x.config.get(name, '-')} -> {y.config.get(name, '-')}"
                for name in sorted({*x.config, *y.config})
                if x.config.get(name) != y.config.get(name)
            ]
            lines.append(", ".join([change, *knobs]))
    return lines


def _diff_selections(a: Profile, b: Profile) -> list[str]:
    lines = []
    old = {found.model: found for found in a.selections}
    new = {found.model: found for found in b.selections}
    for model in [*old, *(model for model in new if model not in old)]:
        x, y = old.get(model), new.get(model)
        if x is None or y is None:
            lines.append(f"{'+' if x is None else '-'} model {model.name}")
        elif x != y:
            lines.append(
                f"~ model {model.name}: quality {x.quality.achieved:.4f} -> "
                f"{y.quality.achieved:.4f}"
            )
            if x.encoder != y.encoder:
                lines.append(f"    encoder {x.encoder} -> {y.encoder}")
            for i, (was, now) in enumerate(zip(_by_layer(x), _by_layer(y), strict=True)):
                if was != now:
                    lines.append(f"    layer {i}: {_selection(was)} -> {_selection(now)}")
    return lines


def _by_layer(found: SelectionSet) -> tuple[Selection | None, ...]:
    if isinstance(found.layers, Selection):
        return (found.layers,) * found.model.layers
    return found.layers


def _software(recorded: device.Fingerprint) -> dict[str, str]:
    more = {"driver": recorded.driver, "cuda": recorded.cuda}
    return {**recorded.versions, **{name: value for name, value in more.items() if value}}


def _problem(key: Problem) -> str:
    """A problem in a few words: what differs from the default, op and device aside."""
    words = [key.dtype]
    for field in dataclasses.fields(key):
        value = getattr(key, field.name)
        if field.name in ("op", "device", "dtype") or value == field.default:
            continue
        words.append(f"{field.name}={value}" if value is not True else field.name)
    return " ".join(words)


def _selection(layer: Selection | None) -> str:
    if layer is None:
        return "dense"
    return _pairs(
        {
            field.name: getattr(layer, field.name)
            for field in dataclasses.fields(layer)
            if getattr(layer, field.name) != field.default
        }
    )


def _pairs(table: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in table.items()) or "-"


def _table(rows: list[list[str]]) -> None:
    """Print rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
