"""Speed of the ops against dense attention, for one decode step of one layer.

    python -m benchmarks.ops --backend numba --device cpu

Each shape is filled, checked, then timed: the four ops, the dense contenders beside them in the
same rounds, and reads of as many bytes as the scan and the step move. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import hata
from benchmarks import bars, contenders, options, tables
from benchmarks.bars import Bar, Row
from benchmarks.contenders import Case, Contender
from benchmarks.shapes import ITEMSIZE, SUITES, Shape
from benchmarks.verify import WrongResult, verify
from hata import registry
from hata.backend import Backend, Config
from hata.commandline import Parser, output
from hata.device import cpu_cores
from hata.files import write_whole
from hata.measure.clock import times, timing_of
from hata.problem import OPS, Problem

# Names and samples of the kernels that each call launches, in order; by kind of device.
Profiler = Callable[[Sequence[Callable[[], object]]], list[list[tuple[str, list[float]]]]]
PROFILERS: dict[str, Profiler] = {}


def measure(
    group: Sequence[Shape], device: str, rounds: int, cold: bool = False, progress: Any = None
) -> list[Row]:
    """Fill, check and time the shapes of a group, interleaved; none where a result is wrong."""
    kind = torch.device(device).type
    tasks: list[tuple[Case, Contender]] = []
    progress = progress or Progress(disable=True)
    say = partial(progress.update, progress.add_task("", total=None))
    for shape in group:
        say(description=f"fill   {shape.name}")
        case = contenders.build(shape, device)
        say(description=f"check  {shape.name}")
        ops = [make(case) for make in contenders.OPS.values()]
        dense = [make(case) for make in contenders.DENSE[kind].values()]
        verify(case, ops, dense)
        reads = [make(case) for make in contenders.READS.values()]
        tasks += [(case, one) for one in (*ops, *dense, *reads)]

    say(description=f"time   {group[0].name}", total=rounds * len(tasks))
    calls = [one.call for _, one in tasks]
    found = times(calls, kind, rounds, cold=cold, tick=partial(say, advance=1))
    say(visible=False)
    rows = [
        Row(case.shape, one.name, one.family, timing_of(samples), one.bytes, len(samples))
        for (case, one), samples in zip(tasks, found, strict=True)
    ]
    if kind in PROFILERS:
        for case in {id(case): case for case, _ in tasks}.values():
            rows += kernels(case, PROFILERS[kind])
    return rows


def kernels(case: Case, profiler: Profiler) -> list[Row]:
    """Times of the kernels of a step, and of a plain read of the codes beside them."""
    step, read = contenders.hash_attend(case), contenders.READS["read codes"](case)
    # A read is one kernel.
    of_step, [(_, reading)] = profiler([step.call, read.call])
    size = case.shape.code_bytes
    found = [(f"kernel {name}", us, size if name == "scan" else 0) for name, us in of_step]
    return [
        Row(case.shape, name, "kernel", timing_of(us), size, len(us))
        for name, us, size in (*found, (bars.READ_KERNEL, reading, size))
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m benchmarks.ops", description=(__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    option("--backend", default="auto", help="what runs the ops (default: auto)")
    option("--device", default="cpu", help="cpu or cuda[:index] (default: cpu)")
    option(
        "--suite", action="append", choices=SUITES,
        help="may be repeated (default: cpu on a CPU, design on a GPU)",
    )  # fmt: skip
    option(
        "--shapes", nargs="+", type=options.shape, metavar="BxH/HkvxKEYS",
        help="shapes instead of a suite, such as 1x32/8x128K",
    )  # fmt: skip
    option("--dtype", choices=ITEMSIZE, help="instead of the shapes' own")
    option("--bits", type=options.bits, help="bits of a code, instead of the shapes' own")
    option("--k", type=options.count, help="key budget, instead of 1/64 and at least 512")
    option("--rounds", type=options.count, default=15, help="blocks of calls (default: 15)")
    option("--cold", action="store_true", help="empty the caches before every counted call")
    option(
        "--set", nargs="+", type=options.knob, default=[], metavar="KNOB=VALUE",
        help="change the backend's default configuration, in every op that has the knob",
    )  # fmt: skip
    option(
        "--profile", type=options.profile,
        help="a tuned profile, or 'none' (default: the one in force)",
    )  # fmt: skip
    option("--markdown", action="store_true", help="print the closing table as Markdown too")
    option("--json", type=output, metavar="FILE", help="write all figures here")
    args = parser.parse_args(argv)
    kind = args.device.partition(":")[0]
    if kind not in contenders.DENSE:
        parser.error(
            f"--device: got {args.device!r}, expected one of {', '.join(contenders.DENSE)}; there "
            "is no clock for other devices yet"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device: got {args.device!r}, expected cpu, cuda or cuda:<index>")
    if kind == "cuda":
        # It needs Triton.
        PROFILERS[kind] = importlib.import_module("benchmarks.gpu").kernels
    if args.shapes and args.suite:
        parser.error("--shapes and --suite: got both, expected one of them")
    if args.set and args.backend == "auto":
        parser.error("--set: knobs are a backend's own; name it with --backend")
    if args.set and args.profile not in (None, "none"):
        parser.error("--set and --profile: got both, expected one of them")
    args.suite = args.suite or ["cpu" if kind == "cpu" else "design"]
    args.profile = "none" if args.set else args.profile
    return args


def change_defaults(backend: Backend, changes: Mapping[str, bool | int | str]) -> None:
    """Have a backend run its default configurations with some knobs changed, and no profile's."""
    problems = (Problem(op, "cuda", "float16", "float16") for op in OPS)
    known = {name for problem in problems for name in backend.tunables(problem.op, problem)}
    for name in changes.keys() - known:
        raise hata.HataError(
            f"--set: got {name!r}, expected a knob of backend {backend.name!r}: "
            f"{', '.join(sorted(known)) or 'it has none'}"
        )

    def changed(backend: Backend, problem: Problem) -> Config:
        knobs = backend.tunables(problem.op, problem)
        mine = {name: value for name, value in changes.items() if name in knobs}
        for name, value in mine.items():
            # 1 equals True.
            if value not in knobs[name] or type(value) is not type(knobs[name][0]):
                raise hata.HataError(
                    f"--set {name}: got {value!r}, expected one of {knobs[name]} for {problem.op}"
                )
        return {**backend.default(problem), **mine}

    backend.look_up_with(changed)


def groups_of(args: argparse.Namespace) -> list[list[Shape]]:
    """The groups that a command line asks for, each shape once."""
    given = {"dtype": args.dtype, "bits": args.bits, "budget": args.k}
    changes = {name: value for name, value in given.items() if value is not None}
    groups = [[shape] for shape in args.shapes or ()]
    groups = groups or [group for suite in args.suite for group in SUITES[suite]]
    changed = [tuple(replace(shape, **changes) for shape in group) for group in groups]
    return [list(group) for group in dict.fromkeys(changed)]


def _too_large(group: Sequence[Shape], device: str) -> str:
    """Why a group does not fit into memory, if so. Filling needs a little more than it holds."""
    if torch.device(device).type == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = torch.cuda.mem_get_info(device)[0]
    needed = round(1.2 * sum(shape.resident for shape in group))
    told = f"{group[0].name} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return told if needed > free else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments(argv)
    # What is not a terminal has no width; tables must not be folded there.
    out = Console(width=None if sys.stdout.isatty() else 110)
    err = Console(stderr=True)
    fail = partial(err.print, style="bold red", soft_wrap=True, markup=False)
    kind = torch.device(args.device).type
    if args.profile is not None:
        os.environ["HATA_PROFILE"] = args.profile
        registry.reset()
    if kind == "cpu":
        torch.set_num_threads(cpu_cores())
        if "design" in args.suite and not args.shapes:
            err.print("the design suite is made for GPUs: it takes gigabytes and minutes on a CPU")
    changes = dict(args.set)
    loaded = os.getloadavg()[0] > 0.5
    # A GPU's ratios are those of CUDA graphs, which the CPU hardly changes.
    busy = loaded and kind == "cpu"
    settings = {
        "backend": args.backend, "rounds": args.rounds, "cold": args.cold or kind == "cuda",
        "set": changes, "busy": busy,
    }  # fmt: skip
    rows: list[Row] = []
    beyond: list[Bar] = []
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=err, transient=True)
    try:
        with progress, torch.no_grad(), hata.use_backend(args.backend):
            out.print(tables.heading(args.device, settings), soft_wrap=True)
            if changes:
                change_defaults(registry.load(args.backend), changes)
            if loaded:
                err.print("the machine is not quiet (see load): do not trust these times")
            groups = groups_of(args)
            for number, group in enumerate(groups, 1):
                if too_large := _too_large(group, args.device):
                    err.print(f"skipped: {too_large}")
                    continue
                if not err.is_terminal:
                    err.print(f"{number}/{len(groups)}  {group[0].name}")
                new = measure(group, args.device, args.rounds, args.cold, progress)
                rows += new
                for shape in bars.shapes_of(new):
                    out.print(tables.shape_table(new, shape, busy))
            if kind == "cuda" and "design" in args.suite and not args.shapes:
                beyond = importlib.import_module("benchmarks.beyond").bars(args.rounds)
                if args.backend == "cupy" and not changes:
                    beyond += importlib.import_module("benchmarks.phases").scans_apart(args.rounds)
    except (WrongResult, hata.HataError) as error:
        fail(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130
    if not rows:
        err.print("error: no shape fits into memory")
        return 1
    met = [*bars.bars(rows, kind, args.backend), *beyond]
    for table in tables.closing_tables(rows, met, busy):
        out.print(table)
    if args.markdown:
        print(tables.markdown(rows, busy))
    if args.json is not None:
        figures = tables.figures(rows, met, settings, args.device)
        try:
            write_whole(args.json, json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            fail(f"error: --json: {error}")
            return 1
        out.print(f"figures: {args.json.resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
