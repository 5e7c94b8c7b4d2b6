"""The `hata` command: info, tune, check, learn, eval, bench, convert and profile.

`hata tune` is the program `python -m tune`; the library knows it by name only. `hata profile`
imports no array framework.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import hata
from hata import device, profile_command, registry
from hata.bench import command as bench_command
from hata.commandline import Parser
from hata.errors import BackendUnavailable, HataDeviceError, HataError, ProfileError
from hata.evaluate import check_command
from hata.evaluate import command as eval_command
from hata.learn import command as learn_command
from hata.profile import Profile, default_output, find, soft_differences
from hata.profile_command import counts
from hata.words import table

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
    except BrokenPipeError:
        # `hata profile show FILE | head` closes early; what is left has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HataError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        # Messages begin with what is at fault, such as an option, or a file that is not written.
        return 2 if str(error).startswith("--") else 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hata", description="Hash-aware top-k attention for long-context decoding."
    )
    parser.add_argument("--version", action="version", version=f"hata {hata.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[..., int], help: str, description: str) -> Parser:
        made = commands.add_parser(name, help=help, description=description)
        made.set_defaults(run=run)
        return made

    info = add(
        "info",
        _info,
        "what is installed, what can run, what is in force",
        "Print versions, devices, every backend and why it can or cannot run, the profile in force "
        "and the variables of the environment.",
    )
    info.add_argument("--json", action="store_true", help="for machines")
    commands.add_parser("tune", help="tune for this machine and write a profile", add_help=False)
    check = add(
        "check",
        partial(_with_torch, check_command.run),
        "hold a model with hash attention against its own answers",
        "Generate a few tokens with hash attention that leaves nothing out, and by the model "
        "alone: with a dynamic cache, a static one, and left padding. A difference is an error "
        "that names the layer where it begins.",
    )
    check_command.add_arguments(check)
    learn = add(
        "learn",
        partial(_with_torch, learn_command.run),
        "train an encoder on a model and some text",
        "Train an encoder, layer by layer, on what a model attends with while it reads text.",
    )
    learn_command.add_arguments(learn)
    judge = add(
        "eval",
        partial(_with_torch, eval_command.run),
        "what an encoder keeps of a model's attention",
        "Measure the attention mass that encoders, and other ways of choosing keys, keep of a "
        "model's attention; and, where asked for, tasks and perplexity.",
    )
    eval_command.add_arguments(judge)
    bench = add(
        "bench",
        partial(_with_torch, bench_command.run),
        "what a decode step of a model takes, with hash attention and without",
        "Time decode steps of a model through plain generate: as transformers runs them, with "
        "dense attention in the same graph, and with hash attention.",
    )
    bench_command.add_arguments(bench)
    convert = add(
        "convert",
        _convert,
        "make an encoder file of weights that HATA or HashAttention published",
        "Make an encoder file of weights that HATA or HashAttention published. Nothing in them is "
        "executed.",
    )
    convert.add_argument(
        "source",
        help="HATA: a folder with one hash_weight_layer_N.pt per hashed layer; HashAttention: a "
        "state dictionary (.pt) or a .pkl",
    )
    convert.add_argument("--config", required=True, help="the model's config.json, or its folder")
    convert.add_argument("--out", required=True, help="encoder to write, *.safetensors")
    profile_command.add_arguments(
        commands.add_parser(
            "profile",
            help="show, validate or compare profiles",
            description="Show, validate or compare profiles: the files that the tuner writes.",
        )
    )
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
    from hata.encoder.convert import convert

    encoder = convert(options.source, options.config)
    encoder.save(options.out)
    print(f"{options.out}: {encoder!r}")
    return 0


def _with_torch(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    _need_torch()
    return run(options)


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
    table([[f"  {name}", version or "-"] for name, version in facts["packages"].items()])
    print("\nDevices")
    for found in facts["devices"]:
        print(f"  {found['device']}: {found['description']}")
        if "profile" in found:
            print(f"    profile: {found['profile']}")
    print("\nBackends")
    table(
        [
            [f"  {one['name']}", "can run" if one["available"] else f"cannot run: {one['reason']}"]
            for one in facts["backends"]
        ]
    )
    print(f"  in force: {facts['backend']}")
    print("\nEnvironment")
    table(
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
        "fingerprint": {name: value for name, value in asdict(here).items() if value},
    }
    try:
        found = find(kind)
        facts["profile"] = _in_force(found, here) if found else _nothing_in_force(here)
    except ProfileError as error:
        facts["profile"] = f"error: {error}"
    return facts


def _in_force(profile: Profile, here: device.Fingerprint) -> str:
    recorded = profile.fingerprint
    text = f"{profile.path} ({profile.origin}, {counts(profile)})"
    if recorded.device != here.device or recorded.sm != here.sm:
        return f"{text}; not used, it is for {recorded.describe()}"
    apart = soft_differences(recorded, here)
    text = f"{text}; used although {'; '.join(apart)}" if apart else text
    return "; but ".join([text, *registry.stale(profile)])


def _nothing_in_force(here: device.Fingerprint) -> str:
    if os.environ.get("HATA_PROFILE", "").strip() == "none":
        return "none (HATA_PROFILE=none), defaults"
    return f"none, defaults; hata tune writes {default_output(here)}"


if __name__ == "__main__":
    sys.exit(main())
