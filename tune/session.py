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
from hata.profile import Entry, Measured, Profile, SelectionSet, default_output
from tune import capture, cost, search, space, studies
from tune.ahead import Ahead
from tune.console import KERNEL_HEADER, LAYER_HEADER, Report, kernel_row
from tune.propose import suggestions, winners
from tune.search import Evaluator, Verdict, to_compile
from tune.selections import Chooser
from tune.space import Space
from tune.task import Task, check_folder, make_task
from tune.worker import CandidateFailed, Worker

# What a machine is taken for where nothing may be measured: a few cores, or a GPU, of a server.
_NOMINAL = {
    "cpu": cost.Machine(bandwidth=10e3, flops=100e3, launch_us=20.0, workers=2),
    "cuda": cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132),
}
_TIME_UP = "the time was up"
# Patience with one check, in seconds. A GPU's kernels may have to be compiled.
_CHECK_SECONDS = {"cpu": 30.0, "cuda": 90.0}

_Search = tuple[Backend, Problem]


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    A `HataError` leaves nothing written; an interruption, what was finished.
    """
    report, task = Report(), make_task(options)
    for note in task.notes:
        report.note(note)
    session = _Session(task, report)
    if options.dry_run:
        session.tell()
        return 0
    # Fail before the work rather than after it.
    if task.out.exists() and task.out.stat().st_size:
        session.profile().merged_with(Profile.load(task.out))
    check_folder(task.out)
    return session.run()


def _apart(config: Config, default: Config) -> str:
    """A configuration in words: where it differs from the default, else all of it."""
    told = {name: value for name, value in config.items() if value != default[name]} or config
    return " ".join(f"{name}={value}" for name, value in told.items()) or "no knobs"


class _Session:
    def __init__(self, task: Task, report: Report) -> None:
        self.task, self.options, self.report = task, task.options, report
        self.device = task.fingerprint.device
        self.on = f"{', '.join(b.name for b in task.backends)} on {task.fingerprint.describe()}"
        usual = space.EFFORT[self.device, task.options.quick]
        seconds = usual.seconds if task.options.budget is None else task.options.budget
        self.limits = usual._replace(trials=task.options.trials or usual.trials, seconds=seconds)
        # By the name of a backend, and a problem.
        self.settled: dict[tuple[str, Problem], Verdict] = {}
        self.selections: SelectionSet | None = None
        self.layer_rows: list[list[str]] = []
        self.machines: dict[str, cost.Machine] = {}
        self.skipped: list[str] = []

    def profile(self) -> Profile:
        """What was found so far."""
        verdicts = list(self.settled.values())
        entries = (
            Entry(name, problem, verdict.config, verdict.us, verdict.default_us.median)
            for (name, problem), verdict in self.settled.items()
        )
        return Profile(
            fingerprint=self.task.fingerprint,
            measured=Measured(
                date=date.today().isoformat(),
                method="cuda_graph" if self.device == "cuda" else "perf_counter",
                repeats=statistics.median_low([v.rounds for v in verdicts] or [0]),
                cold_cache=True,
                noise_pct=round(100 * statistics.median([v.noise for v in verdicts] or [0.0]), 2),
                trials=sum(v.trials for v in verdicts),
                seed=studies.SEED,
            ),
            entries=tuple(entries),
            selections=() if self.selections is None else (self.selections,),
        )

    def tell(self) -> None:
        """Say what would be done."""
        task, layout, say, rows = self.task, self.task.layout, self.report.say, []
        say(f"device    {task.fingerprint.describe()}")
        say(f"heads     {layout.name}: {layout.heads}/{layout.kv_heads}, D {layout.head_dim}")
        for backend in task.backends:
            for problem in task.problems[backend.name]:
                configs, default = Space.of(backend, problem), backend.default(problem)
                best = suggestions(problem, configs, _NOMINAL[self.device], default)
                first = _apart(configs.config(best[0]), default) if best else "no knobs"
                shape = space.shape_text(problem)
                rows.append([problem.op, shape, backend.name, str(configs.size), first])
        header = ("op", "shape", "backend", "configurations", "first candidate after the default")
        self.report.table(f"{len(rows)} problem{'s' * (len(rows) != 1)}", header, rows)
        trials, seconds, _ = self.limits
        say(f"search    at most {trials} configurations each, {seconds:.0f} s in all")
        source = f"text of {len(task.text):,} characters" if task.text else "the synthetic set"
        quality = self.options.quality
        say(f"selection bits, k, sink, recent at quality {quality:g}, from {source}")
        say(f"studies   {task.storage}")
        say(f"profile   {task.out} (not written: --dry-run)")

    def run(self) -> int:
        """Tune, choose, and write; returns the exit code."""
        task, ours = self.task, self.options.storage is None
        self.storage, message = studies.open_storage(task.storage, ours=ours)
        if message:
            self.report.note(message)
        total = sum(map(len, task.problems.values()))
        self.report.note(f"tuning {self.on}: {total} searches in {self.limits.seconds:.0f} s")
        try:
            with Ahead(task.backends, task.fingerprint.sm) as self.ahead:
                with self.report.watching(total, "kernels"):
                    self._tune_kernels()
                self._choose_selections()
        except KeyboardInterrupt:
            if self.settled:
                self._close()
            raise
        if not self.settled:
            self.report.note("nothing could be tuned: " + "; ".join(self.skipped))
            return 1
        self._close()
        return 0

    def _tune_kernels(self) -> None:
        patience = _CHECK_SECONDS[self.device]
        with contextlib.ExitStack() as stack:
            workers = {
                backend.name: stack.enter_context(Worker(backend.name, check_seconds=patience))
                for backend in self.task.backends
            }
            # All of them load their frameworks at the same time.
            for worker in workers.values():
                worker.start()
            self._look_ahead(self._queue(workers))
            for backend in self.task.backends:
                if not self._probe(backend, workers[backend.name]):
                    del workers[backend.name]
            self._tune_all(self._queue(workers), workers)

    def _queue(self, names: Container[str]) -> list[_Search]:
        """What to tune, in turn, so that where time is short every backend has the same."""
        backends = [backend for backend in self.task.backends if backend.name in names]
        problems = dict.fromkeys(p for b in backends for p in self.task.problems[b.name])
        return [(b, p) for p in problems for b in backends if p in self.task.problems[b.name]]

    def _tune_all(self, queue: Sequence[_Search], workers: Mapping[str, Worker]) -> None:
        seconds_left = self.limits.seconds
        begun: set[Problem] = set()
        for number, (backend, problem) in enumerate(queue):
            start = time.monotonic()
            seconds = seconds_left / (len(queue) - number)
            # What one backend has, the others must have too: times are compared.
            late = seconds <= 0 and self.settled and problem not in begun
            if late and not self._finished(backend, problem):
                self.skipped.append(f"{self._title(backend, problem)}: {_TIME_UP}")
                self.report.advance()
                continue
            begun.add(problem)
            self._look_ahead(queue[number + 1 :])
            self._tune(backend, problem, workers[backend.name], max(seconds, 0.1))
            seconds_left -= time.monotonic() - start

    def _look_ahead(self, queue: Sequence[_Search]) -> None:
        """Have compiled what comes next: one problem's first candidates, and before them defaults.

        Candidates share kernels with the default: what was compiled with it is there for all.
        """
        for backend, problem in queue[:2]:
            self.ahead.begin(backend.name, to_compile(problem, [backend.default(problem)]))
        for backend, problem in queue[:1]:
            configs = Space.of(backend, problem)
            numbers = self._suggestions(backend, problem, configs)[: self.limits.trials]
            self.ahead.begin(backend.name, to_compile(problem, map(configs.config, numbers)))

    def _suggestions(self, backend: Backend, problem: Problem, configs: Space) -> list[int]:
        """What to try first: what won elsewhere, then what looks good on paper."""
        machine = self.machines.get(backend.name, _NOMINAL[self.device])
        tuned = self._tuned(backend).items()
        won = {other: config for other, config in tuned if config != backend.default(other)}
        proposed = suggestions(problem, configs, machine, backend.default(problem))
        return [*winners(problem, configs, won), *proposed]

    def _tuned(self, backend: Backend) -> dict[Problem, Config]:
        return {p: v.config for (name, p), v in self.settled.items() if name == backend.name}

    def _title(self, backend: Backend, problem: Problem) -> str:
        name = f"{backend.name} " if len(self.task.backends) > 1 else ""
        return f"{name}{problem.op} {space.shape_text(problem)}"

    def _probe(self, backend: Backend, worker: Worker) -> bool:
        """Measure the machine with a backend; whether that could be done."""
        name, problems = backend.name, self.task.problems[backend.name]
        self.report.begin(f"measuring this machine with {name}")
        try:
            self.machines[name] = worker.calibrate(self.device)
        except CandidateFailed as error:
            self._skip(f"backend {name} fails: {error.failure}", len(problems))
            return False
        if self.device == "cpu":
            # Every op runs once on little data, so that compiling does not eat the time to search.
            # A GPU's kernels are compiled ahead, configuration by configuration.
            self.report.begin(f"compiling {name}")
            for problem in {p.op: p for p in problems}.values():
                few = {"slots": min(problem.slots, 256), "k": min(problem.k, 16)}
                few |= {} if problem.slots else {"tokens": 16}
                small = dataclasses.replace(problem, **few)
                # What fails here fails again on the problem itself, and is told there.
                worker.check(small, backend.default(small))
        return True

    def _study_name(self, backend: Backend, problem: Problem) -> str:
        knobs = studies.digest(problem, Space.of(backend, problem).knobs)
        kernel = backend.kernel_hash(problem.op)[:12]
        slug = self.task.fingerprint.slug
        return "/".join(("hata", slug, backend.name, problem.op, kernel, knobs))

    def _finished(self, backend: Backend, problem: Problem) -> bool:
        """Whether an earlier run that is continued has settled a problem."""
        study, _ = studies.latest(self.storage, self._study_name(backend, problem))
        return self.options.resume and study is not None and "verdict" in study.user_attrs

    def _tune(self, backend: Backend, problem: Problem, worker: Worker, seconds: float) -> None:
        configs, title = Space.of(backend, problem), self._title(backend, problem)
        study = studies.open_study(
            self.storage, self._study_name(backend, problem), resume=self.options.resume,
            notes=f"{title} on {self.task.fingerprint.describe()}",
        )  # fmt: skip
        self.report.begin(title)
        try:
            verdict = search.Search(
                study, configs, backend.default(problem),
                Evaluator(backend.name, worker, self.ahead, problem),
                self.limits._replace(seconds=seconds),
                suggestions=self._suggestions(backend, problem, configs),
                floor_us=cost.floor_us(problem, self.machines[backend.name]),
                on_trial=self.report.trial,
            ).run()  # fmt: skip
        except search.DefaultFailed as error:
            self._skip(f"{title}: the default fails, {error.failure}")
            return
        self.report.done(title, verdict)
        self.settled[backend.name, problem] = verdict
        self.profile().save(self.task.out)

    def _skip(self, why: str, problems: int = 1) -> None:
        self.skipped.append(why)
        self.report.note("  " + why)
        self.report.advance(problems)

    def _choose_selections(self) -> None:
        able = {name for name, problem in self.settled if problem.op == "hash_attend"}
        backend = next((b for b in self.task.backends if b.name in able), None)
        if backend is None:
            if self.settled:
                self.report.note("no selection is chosen: no backend here runs hash_attend")
            return
        noise = statistics.median([verdict.noise for verdict in self.settled.values()])
        found = self._tuned(backend), self.machines[backend.name], noise
        chooser = Chooser(self.task, self.report, self.ahead, backend, *found)
        self.selections, self.layer_rows = chooser.run(self.storage)
        self.profile().save(self.task.out)

    def _close(self) -> None:
        say, task = self.report.say, self.task
        say()
        rows = [
            kernel_row(problem, name if len(task.backends) > 1 else "", verdict)
            for (name, problem), verdict in self.settled.items()
        ]
        self.report.table(f"Kernels of {self.on}", KERNEL_HEADER, rows)
        if self.layer_rows:
            source = task.layout.name if task.text else "the synthetic set, attach will warn"
            say()
            self.report.table(
                f"Selections at quality {self.options.quality:g} ({source}); k is the budget, and "
                f"µs a step's time, at {capture.TOKENS} tokens; k grows with the context",
                LAYER_HEADER, self.layer_rows,
            )  # fmt: skip
        if self.skipped:
            say()
            count = len(self.skipped)
            say(f"Not tuned: {count} problem{'s' * (count != 1)}")
            for text in self.skipped[:8]:
                say(f"  {text}")
            if any(text.endswith(_TIME_UP) for text in self.skipped):
                say("The same command with --resume goes on; --budget gives it more time.")
        say()
        if task.out == default_output(task.fingerprint):
            say("hata finds this profile by itself. To name it: HATA_PROFILE=<file>, or")
        else:
            say(f"Use it with HATA_PROFILE={task.out}, or")
        say(f'  hata.use_profile("{task.out}")')
        say(str(task.out))
