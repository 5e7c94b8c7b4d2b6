"""One run of the tuner: what happens in which order, and what is written when."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Container, Mapping, Sequence
from datetime import date

from hata.backend import Backend, Config
from hata.problem import Problem
from hata.profile import (
    Entry,
    Measured,
    Profile,
    SelectionSet,
    Timing,
    default_output,
)
from tune import capture, cost, search, space
from tune.ahead import Ahead
from tune.ahead import Entry as ToCompile
from tune.check import awkward_problem
from tune.plan import Plan, check_folder, check_numbers, make_plan
from tune.propose import suggestions, winners
from tune.report import KERNEL_HEADER, LAYER_HEADER, Report, kernel_row
from tune.selections import Chooser
from tune.space import Space
from tune.verdict import Verdict
from tune.worker import CandidateFailed, Failure, Worker

# What a machine is taken for where nothing may be measured: a few cores, or a GPU, of a server.
_NOMINAL = {
    "cpu": cost.Machine(bandwidth=10e3, flops=100e3, launch_us=20.0, workers=2),
    "cuda": cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132),
}
_TIME_UP = "the time was up"
# Patience with one check, in seconds. A GPU's kernels may have to be compiled.
_CHECK_SECONDS = {"cpu": 30.0, "cuda": 90.0}


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        HataError: the command line cannot be followed; nothing was written.
        KeyboardInterrupt: what was finished is in the profile and the storage.
    """
    report = Report()
    check_numbers(options)
    plan = make_plan(options)
    for note in plan.notes:
        report.note(note)
    if options.dry_run:
        _tell_plan(plan, options, report)
        return 0
    _check_output(plan)
    return _Session(plan, options, report).run()


def _check_output(plan: Plan) -> None:
    """Fail before the work rather than after it."""
    if plan.out.exists() and plan.out.stat().st_size:
        _profile(plan, [], [], []).merged_with(Profile.load(plan.out))
    check_folder(plan.out)


def _profile(
    plan: Plan,
    entries: Sequence[Entry],
    verdicts: Sequence[Verdict],
    selections: Sequence[SelectionSet],
) -> Profile:
    noise = statistics.median([v.noise for v in verdicts]) if verdicts else 0.0
    rounds = statistics.median_low([v.rounds for v in verdicts]) if verdicts else 0
    return Profile(
        fingerprint=plan.fingerprint,
        measured=Measured(
            date=date.today().isoformat(),
            method="cuda_graph" if plan.device == "cuda" else "perf_counter",
            repeats=rounds,
            cold_cache=True,
            noise_pct=round(100 * noise, 2),
            trials=sum(v.trials for v in verdicts),
            seed=search.SEED,
        ),
        entries=tuple(entries),
        selections=tuple(selections),
    )


def _tell_plan(plan: Plan, options: argparse.Namespace, report: Report) -> None:
    report.say(f"device    {plan.fingerprint.describe()}")
    report.say(f"heads     {plan.layout.name}: {plan.layout.heads_text}, D {plan.layout.head_dim}")
    rows = []
    for backend in plan.backends:
        for problem in plan.problems[backend.name]:
            configs = Space.of(backend, problem)
            default = backend.default(problem)
            best = suggestions(problem, configs, _NOMINAL[plan.device], default)
            first = _apart(configs.config(best[0]), default) if best else "no knobs"
            rows.append(
                [problem.op, space.shape_text(problem), backend.name, str(configs.size), first]
            )
    header = ("op", "shape", "backend", "configurations", "first candidate after the default")
    report.table(f"{len(rows)} problems", header, rows)
    effort = _effort(plan.device, options)
    report.say(
        f"search    at most {effort.trials} configurations each, {effort.seconds:.0f} s in all"
    )
    source = f"text of {len(plan.text):,} characters" if plan.model else "the synthetic set"
    report.say(f"selection bits, k, sink, recent at quality {options.quality:g}, from {source}")
    report.say(f"studies   {plan.storage}")
    report.say(f"profile   {plan.out} (not written: --dry-run)")


def _apart(config: Config, default: Config) -> str:
    """A configuration in words: all of it, or where it differs from the default."""
    told = {name: value for name, value in config.items() if value != default[name]} or config
    return " ".join(f"{name}={value}" for name, value in told.items()) or "no knobs"


def _effort(device: str, options: argparse.Namespace) -> space.Effort:
    usual = space.EFFORT[device, options.quick]
    return space.Effort(
        seconds=usual.seconds if options.budget is None else options.budget,
        trials=options.trials or usual.trials,
    )


def to_compile(problem: Problem, configs: Sequence[Config]) -> list[ToCompile]:
    """What checking configurations of a problem runs."""
    both = problem, awkward_problem(problem)
    return [(problem, config) for config in configs for problem in both]


class _Evaluator:
    """A worker, as the search of one problem sees it."""

    def __init__(self, name: str, worker: Worker, ahead: Ahead, problem: Problem) -> None:
        self._name, self._worker, self._ahead, self._problem = name, worker, ahead, problem

    def expect(self, configs: Sequence[Config]) -> None:
        self._ahead.prefer(self._name, to_compile(self._problem, configs))

    def check(self, config: Config) -> Failure | None:
        self._ahead.wait(self._name, to_compile(self._problem, [config]))
        return self._worker.check(self._problem, config)

    def race(self, configs: Sequence[Config], seconds: float) -> list[list[float]]:
        return self._worker.race([(self._problem, config) for config in configs], seconds)


class _Session:
    def __init__(self, plan: Plan, options: argparse.Namespace, report: Report) -> None:
        self.plan, self.options, self.report = plan, options, report
        self.effort = _effort(plan.device, options)
        self.entries: list[Entry] = []
        self.verdicts: list[Verdict] = []
        self.selections: list[SelectionSet] = []
        self.rows: list[list[str]] = []
        self.layer_rows: list[list[str]] = []
        self.tuned: dict[str, dict[Problem, Config]] = {b.name: {} for b in plan.backends}
        self.won: dict[str, dict[Problem, Config]] = {b.name: {} for b in plan.backends}
        self.machines: dict[str, cost.Machine] = {}
        self.skipped: list[str] = []

    def run(self) -> int:
        self.storage, message = search.open_storage(
            self.plan.storage, ours=self.options.storage is None
        )
        if message:
            self.report.note(message)
        total = sum(map(len, self.plan.problems.values()))
        self.report.note(
            f"tuning {', '.join(b.name for b in self.plan.backends)} on "
            f"{self.plan.fingerprint.describe()}: {total} searches in {self.effort.seconds:.0f} s"
        )
        try:
            with Ahead(self.plan.backends, self.plan.fingerprint.sm) as self.ahead:
                with self.report.watching(total, "kernels"):
                    self._tune_kernels()
                self._choose_selections()
        except KeyboardInterrupt:
            if self.entries:
                self._close()
            raise
        if not self.entries:
            self.report.note("nothing could be tuned: " + "; ".join(self.skipped))
            return 1
        self._close()
        return 0

    # Kernels.

    def _tune_kernels(self) -> None:
        patience = _CHECK_SECONDS[self.plan.device]
        with contextlib.ExitStack() as stack:
            workers = {
                backend.name: stack.enter_context(Worker(backend.name, check_seconds=patience))
                for backend in self.plan.backends
            }
            # All of them load their frameworks at the same time.
            for worker in workers.values():
                worker.start()
            self._look_ahead(self._queue(workers))
            for backend in self.plan.backends:
                if not self._probe(backend, workers[backend.name]):
                    del workers[backend.name]
            self._tune_all(self._queue(workers), workers)

    def _tune_all(
        self, queue: Sequence[tuple[Backend, Problem]], workers: Mapping[str, Worker]
    ) -> None:
        seconds_left = self.effort.seconds
        begun: set[Problem] = set()
        for number, (backend, problem) in enumerate(queue):
            start = time.monotonic()
            seconds = seconds_left / (len(queue) - number)
            title = self._title(backend, problem)
            # What one backend has, the others must have too: times are compared.
            late = seconds <= 0 and self.entries and problem not in begun
            if late and not self._finished(backend, problem):
                self.skipped.append(f"{title}: {_TIME_UP}")
                self.report.advance()
                continue
            begun.add(problem)
            self._look_ahead(queue[number + 1 :])
            evaluator = _Evaluator(backend.name, workers[backend.name], self.ahead, problem)
            self._tune(backend, problem, evaluator, max(seconds, 0.1), title)
            seconds_left -= time.monotonic() - start

    def _queue(self, names: Container[str]) -> list[tuple[Backend, Problem]]:
        """What to tune, in turn, so that where time is short every backend has the same."""
        backends = [backend for backend in self.plan.backends if backend.name in names]
        problems = dict.fromkeys(p for b in backends for p in self.plan.problems[b.name])
        return [(b, p) for p in problems for b in backends if p in self.plan.problems[b.name]]

    def _look_ahead(self, queue: Sequence[tuple[Backend, Problem]]) -> None:
        """Have compiled what comes next: one problem's first candidates, and before them defaults.

        Candidates share kernels with the default: what was compiled with it is there for all.
        """
        for backend, problem in queue[:2]:
            self.ahead.begin(backend.name, to_compile(problem, [backend.default(problem)]))
        for backend, problem in queue[:1]:
            configs = Space.of(backend, problem)
            numbers = self._suggestions(backend, problem, configs)[: self.effort.trials]
            candidates = [configs.config(number) for number in numbers]
            self.ahead.begin(backend.name, to_compile(problem, candidates))

    def _suggestions(self, backend: Backend, problem: Problem, configs: Space) -> list[int]:
        """What to try first: what won elsewhere, then what looks good on paper."""
        machine = self.machines.get(backend.name, _NOMINAL[self.plan.device])
        proposed = suggestions(problem, configs, machine, backend.default(problem))
        return [*winners(problem, configs, self.won[backend.name]), *proposed]

    def _title(self, backend: Backend, problem: Problem) -> str:
        name = f"{backend.name} " if len(self.plan.backends) > 1 else ""
        return f"{name}{problem.op} {space.shape_text(problem)}"

    def _probe(self, backend: Backend, worker: Worker) -> bool:
        """Measure the machine with a backend; whether that could be done."""
        self.report.begin(f"measuring this machine with {backend.name}")
        try:
            self.machines[backend.name] = worker.calibrate(self.plan.device)
        except CandidateFailed as error:
            self.skipped.append(f"backend {backend.name} fails: {error.failure}")
            self.report.note("  " + self.skipped[-1])
            self.report.advance(len(self.plan.problems[backend.name]))
            return False
        if self.plan.device == "cpu":
            # A GPU's kernels are compiled ahead, configuration by configuration.
            self._compile(backend, worker)
        return True

    def _compile(self, backend: Backend, worker: Worker) -> None:
        """Run every op once on little data, so that compiling does not eat the time to search."""
        self.report.begin(f"compiling {backend.name}")
        for problem in {p.op: p for p in self.plan.problems[backend.name]}.values():
            tokens = problem.tokens if problem.slots else 16
            small = dataclasses.replace(
                problem, tokens=tokens, slots=min(problem.slots, 256), k=min(problem.k, 16)
            )
            # What fails here fails again on the problem itself, and is told there.
            worker.check(small, backend.default(small))

    def _study_name(self, backend: Backend, problem: Problem) -> str:
        configs = Space.of(backend, problem)
        kernel = backend.kernel_hash(problem.op)[:12]
        return "/".join(
            (
                "hata",
                self.plan.fingerprint.slug,
                backend.name,
                problem.op,
                kernel,
                search.digest(problem, configs.knobs),
            )
        )

    def _finished(self, backend: Backend, problem: Problem) -> bool:
        """Whether an earlier run that is continued has settled a problem."""
        if not self.options.resume:
            return False
        return search.is_settled(self.storage, self._study_name(backend, problem))

    def _tune(
        self,
        backend: Backend,
        problem: Problem,
        evaluator: _Evaluator,
        seconds: float,
        title: str,
    ) -> None:
        configs, default = Space.of(backend, problem), backend.default(problem)
        study = search.open_study(
            self.storage,
            self._study_name(backend, problem),
            resume=self.options.resume,
            notes=f"{title} on {self.plan.fingerprint.describe()}",
        )
        self.report.begin(title)
        try:
            verdict = search.tune(
                study,
                configs,
                default,
                evaluator,
                suggestions=self._suggestions(backend, problem, configs),
                limits=search.Limits(
                    self.effort.trials, seconds, 0.04 if self.options.quick else 0.06
                ),
                floor_us=cost.floor_us(problem, self.machines[backend.name]),
                on_trial=self.report.trial,
            )
        except search.DefaultFailed as error:
            self.skipped.append(f"{title}: the default fails, {error.failure}")
            self.report.note("  " + self.skipped[-1])
            self.report.advance()
            return
        self.report.done(title, verdict)
        self.tuned[backend.name][problem] = verdict.config
        if verdict.config != default:
            self.won[backend.name][problem] = verdict.config
        self.verdicts.append(verdict)
        self.entries.append(
            Entry(
                backend=backend.name,
                key=problem,
                config=verdict.config,
                us=Timing(*verdict.us),
                default_us=verdict.default_us.median,
            )
        )
        name = backend.name if len(self.plan.backends) > 1 else ""
        self.rows.append(kernel_row(problem.op, space.shape_text(problem), name, verdict))
        self._save()

    def _save(self) -> None:
        _profile(self.plan, self.entries, self.verdicts, self.selections).save(self.plan.out)

    def _choose_selections(self) -> None:
        able = {entry.backend for entry in self.entries if entry.op == "hash_attend"}
        backend = next((b for b in self.plan.backends if b.name in able), None)
        if backend is None:
            if self.entries:
                self.report.note("no selection is chosen: no backend here runs hash_attend")
            return
        chosen = Chooser(
            self.plan,
            self.report,
            backend,
            self.tuned[backend.name],
            self.machines[backend.name],
            statistics.median([verdict.noise for verdict in self.verdicts]),
            self.options.quick,
            self.ahead,
        ).run(self.storage, self.options.quality, self.options.resume)
        self.layer_rows = chosen.rows
        if chosen.selections is not None:
            self.selections = [chosen.selections]
            self._save()

    def _close(self) -> None:
        report, plan = self.report, self.plan
        report.say()
        names = ", ".join(backend.name for backend in plan.backends)
        title = f"Kernels of {names} on {plan.fingerprint.describe()}"
        report.table(title, KERNEL_HEADER, self.rows)
        if self.layer_rows:
            source = plan.layout.name if plan.model else "the synthetic set, attach will warn"
            report.say()
            report.table(
                f"Selections at quality {self.options.quality:g} ({source}); k is the budget, and "
                f"µs a step's time, at {capture.TOKENS} tokens; k grows with the context",
                LAYER_HEADER,
                self.layer_rows,
            )
        if self.skipped:
            report.say()
            report.say(f"Not tuned: {len(self.skipped)} problems")
            for text in self.skipped[:8]:
                report.say(f"  {text}")
            if any(text.endswith(_TIME_UP) for text in self.skipped):
                report.say("The same command with --resume goes on; --budget gives it more time.")
        report.say()
        if plan.out == default_output(plan.fingerprint):
            report.say("hata finds this profile by itself. To name it: HATA_PROFILE=<file>, or")
        else:
            report.say(f"Use it with HATA_PROFILE={plan.out}, or")
        report.say(f'  hata.use_profile("{plan.out}")')
        report.say(str(plan.out))
