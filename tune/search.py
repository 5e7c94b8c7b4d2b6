"""The search: Optuna studies, and the rules by which a winner is chosen.

The only file that knows Optuna. One study per problem, in an SQLite file (or any database Optuna
speaks to), named after the device, the kernel sources and the problem, so that it can be continued:

- a trial checks one configuration and times it in turns with the default; its value is the ratio
  of the two, which a machine that slows down does not change;
- a configuration that was measured is never measured again, its stored value is told;
- one that fails is a finished trial with a violated constraint and a typed failure, never chosen;
- trials of a process that is gone (no heartbeat, or no such process) are queued again, a few times.

The winner is settled by a last race of the best few against the default (`tune.verdict`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from hata.backend import Config
from tune.database import StorageError, damage, foreign, move_aside, sqlite_path
from tune.measure import Timing
from tune.propose import climb
from tune.space import Space
from tune.verdict import Verdict, decide, from_json, to_json
from tune.worker import CRASH, CandidateFailed, Failure

SEED = 0
# How near the floor is near enough.
NEAR_FLOOR = 1.05
FINALISTS = 3
# A few candidates are always tried: time may be short, or a floor measured on a busy machine high.
LEAST_TRIALS = 6
REPEATS = 10
RETRIES = 2
HEARTBEAT_SECONDS = 5
# Value of a trial that failed; its constraint says so, the value only has to be a bad one.
_FAILED = 1e3


class DefaultFailed(Exception):
    """The default configuration of a problem fails, so there is nothing to compare with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Evaluator(Protocol):
    """What runs configurations of one problem."""

    def check(self, config: Config) -> Failure | None:
        """Whether a configuration's results are right; `None` if they are."""

    def race(self, configs: Sequence[Config], seconds: float) -> list[list[float]]:
        """Microseconds of each configuration, one sample a round; may raise `CandidateFailed`."""
        ...

    def expect(self, configs: Sequence[Config]) -> None:
        """Told which configurations come next, to make ready for them."""


@dataclass(frozen=True)
class Limits:
    """When the search of one problem ends.

    Attributes:
        trials: Configurations to measure.
        seconds: Time for all of it.
        sample_seconds: Time to measure one configuration.
    """

    trials: int = 40
    seconds: float = 30.0
    sample_seconds: float = 0.08


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Heartbeats and their callback are marked experimental; everything else may still warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*(heartbeat|Heartbeat).*experimental", category=ExperimentalWarning
        )
        yield


def _retry() -> RetryHeartbeatStaleTrialCallback:
    with _experimental():
        return RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


def open_storage(url: str, *, ours: bool = False) -> tuple[RDBStorage, str]:
    """Open a database; a broken SQLite file is moved aside.

    Args:
        url: Of `tune.database.storage_url`.
        ours: It is a file of the user's cache folder, so that whatever lies there may be moved.

    Returns:
        The storage, and what people should be told (`""` for nothing).

    Raises:
        StorageError: it cannot be opened or written, or is a file of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    message = ""
    path = sqlite_path(url)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"storage: {path.parent} cannot be made ({error.strerror}); name another with "
                "--storage"
            ) from None
        if not ours and (why := foreign(path)):
            raise StorageError(
                f"--storage: {path} {why}, and was left as it is; name another file, or a new one"
            )
        broken = damage(path)
        if broken:
            moved = move_aside(path)
            message = f"{path} is damaged ({broken}); it was moved to {moved}, a new one begins"
    try:
        with _experimental():
            storage = RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT_SECONDS,
                heartbeat_stale_trial_callback=_retry(),
            )
    except (
        SQLAlchemyError,
        OptunaError,
        ImportError,
        LookupError,
        RuntimeError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(
            f"storage: {url} cannot be opened ({reason}); check it, or name another with --storage"
        ) from None
    if path is not None:
        # A kill loses nothing without the syncs, and after a power cut a broken file is replaced.
        event.listen(storage.engine, "connect", _do_not_sync)
        storage.engine.dispose()
    return storage, message


def _do_not_sync(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def digest(*parts: object) -> str:
    """A short name for values that print the same wherever they are equal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def open_study(storage: RDBStorage, name: str, *, resume: bool, notes: str = "") -> optuna.Study:
    """The study of a name: the latest run of it to go on with, or a new run beside the others.

    Args:
        storage: Where it lies.
        name: Without the number of the run.
        resume: Go on with the latest run, if there is one.
        notes: What it is about, for people who look into the database.
    """
    runs = _runs(storage, name)
    run = max(runs, default=0)
    sampler = optuna.samplers.TPESampler(seed=SEED)
    if resume and runs:
        study = optuna.load_study(study_name=f"{name}#{run}", storage=storage, sampler=sampler)
        # The seed's first draws were made before.
        study.sampler = optuna.samplers.TPESampler(seed=SEED + len(study.trials))
        _requeue_dead(study)
        return study
    while True:
        run += 1
        with contextlib.suppress(DuplicatedStudyError):
            study = optuna.create_study(
                study_name=f"{name}#{run}", storage=storage, sampler=sampler, direction="minimize"
            )
            study.set_user_attr("about", notes)
            return study


def _owner() -> list[object]:
    return [socket.gethostname(), os.getpid(), _started(os.getpid())]


def _started(pid: int) -> str:
    """When a process started, so that a new process under an old number is told apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(owner: object) -> bool:
    if not (isinstance(owner, list) and len(owner) == 3):
        return False
    host, pid, started = owner
    if host != socket.gethostname() or not Path("/proc/self").exists():
        return False
    return _started(int(pid)) != started


def _requeue_dead(study: optuna.Study) -> None:
    """Queue trials again whose process is gone, without waiting for their heartbeat to be late."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial.user_attrs.get("owner")):
            study.tell(trial.number, state=TrialState.FAIL)
            _retry()(study, trial)


def _result(trial: FrozenTrial) -> dict[str, Any] | None:
    return trial.user_attrs.get("result") if trial.state == TrialState.COMPLETE else None


class _Search:
    """The search of one problem, in one study."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        default: Config,
        evaluator: Evaluator,
        limits: Limits,
        floor_us: float,
        on_trial: Callable[[int, float, Failure | None], None],
    ) -> None:
        self.study, self.space, self.evaluator, self.limits = study, space, evaluator, limits
        self.default = space.number(default)
        self.floor_us, self.on_trial = floor_us, on_trial
        self.stopped = ""
        self.known: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, Failure] = {}
        self.best, self.repeats, self.began = 1.0, 0, time.monotonic()
        deaths: Counter[int] = Counter()
        for trial in study.get_trials(deepcopy=False):
            result = _result(trial)
            if result is not None:
                self._learn(result)
            elif trial.state == TrialState.FAIL and "interrupted" not in trial.user_attrs:
                # Optuna fails a trial only when its process died.
                number = self._number(trial)
                if number is not None:
                    deaths[number] += 1
        for number, times in deaths.items():
            if times > RETRIES and number not in self.known:
                failure = Failure(CRASH, f"the tuner itself ended {times} times while it ran")
                self._learn({"number": number, "ratio": _FAILED, "failure": list(failure)})

    def _learn(self, result: dict[str, Any]) -> None:
        self.known[result["number"]] = result
        if result["failure"]:
            self.failures[result["number"]] = Failure(*result["failure"])
        else:
            self.best = min(self.best, result["ratio"])

    def _number(self, trial: FrozenTrial) -> int | None:
        # A process may die before all knobs are drawn.
        if any(name not in trial.params for name, _ in self.space.knobs):
            return None
        return self.space.number_at(trial.params)

    def enqueue(self, numbers: Sequence[int]) -> None:
        """Queue configurations, once each."""
        queued = [trial.system_attrs.get("fixed_params") or trial.params for trial in self._waiting]
        fresh = [number for number in dict.fromkeys(numbers) if number not in self.known]
        # No more than will be measured; what is enqueued is also expected, and may be compiled.
        fresh = fresh[: max(self.limits.trials - len(self.known), 0)]
        self.evaluator.expect([self.space.config(number) for number in fresh])
        for number in fresh:
            params = self.space.places(number)
            if params not in queued:
                self.study.enqueue_trial(params)

    @property
    def _waiting(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def objective(self, trial: Trial) -> float:
        """One trial: check, then time; or tell what is known."""
        trial.set_user_attr("owner", _owner())
        # Values are in ascending order, so their places are what the sampler should see.
        places = {
            name: trial.suggest_int(name, 0, len(values) - 1) for name, values in self.space.knobs
        }
        number = self.space.number_at(places)
        result = self.known.get(number)
        if result is None:
            self.repeats = 0
            try:
                result = self._measure(number)
            except KeyboardInterrupt:
                trial.set_user_attr("interrupted", True)
                self.study.enqueue_trial(places)
                raise
            self._learn(result)
            self.on_trial(len(self.known), self.best, self.failures.get(number))
        else:
            self.repeats += 1
        trial.set_user_attr("result", result)
        # On every trial: samplers want to see the same constraints everywhere.
        trial.set_constraint("failed", 1.0 if result["failure"] else -1.0)
        self._stop_if_done()
        return result["ratio"]

    def _measure(self, number: int) -> dict[str, Any]:
        config = self.space.config(number)
        failure = self.evaluator.check(config)
        found: dict[str, Any] = {"number": number, "ratio": _FAILED, "failure": None}
        if failure is None:
            is_default = number == self.default
            racers = [config] if is_default else [self.space.config(self.default), config]
            try:
                samples = self.evaluator.race(racers, self.limits.sample_seconds)
            except CandidateFailed as error:
                failure = error.failure
            else:
                ratios = np.asarray(samples[-1]) / np.asarray(samples[0])
                found["ratio"] = 1.0 if is_default else float(np.median(ratios))
                found["us"] = list(Timing.of(samples[-1]))
        if failure is not None:
            found["failure"] = list(failure)
        return found

    def _stop_if_done(self) -> None:
        times = [r["us"][0] for r in self.known.values() if not r["failure"]]
        if self.default in self.failures:
            self.stopped = "the default fails"
        elif len(self.known) >= self.space.size:
            self.stopped = "every configuration was measured"
        elif len(self.known) >= self.limits.trials:
            self.stopped = f"{len(self.known)} configurations were measured"
        elif len(times) >= LEAST_TRIALS and min(times) <= NEAR_FLOOR * self.floor_us:
            self.stopped = "within 5% of the floor"
        elif self.repeats >= REPEATS:
            self.stopped = "the sampler repeats itself"
        elif (
            len(self.known) >= LEAST_TRIALS and time.monotonic() - self.began >= self.limits.seconds
        ):
            self.stopped = "its time was up"
        if self.stopped:
            self.study.stop()

    def run(self) -> None:
        """Run trials until there is a reason to stop."""
        if self.default in self.failures:
            self.stopped = "the default fails"
        elif len(self.known) >= min(self.space.size, self.limits.trials):
            self.stopped = f"{len(self.known)} configurations were measured"
        while not self.stopped:
            waiting = len(self._waiting)
            if waiting:
                self.study.optimize(self.objective, n_trials=waiting)
                continue
            # Failures too, as what was tried and is no gain.
            ratios = {number: result["ratio"] for number, result in self.known.items()}
            self.enqueue(climb(self.space, self.default, ratios))
            if not self._waiting:
                # Nothing is left that the times suggest: the sampler looks elsewhere.
                self.study.optimize(self.objective)

    def settle(self) -> Verdict:
        """The last race."""
        ranked = sorted(
            (result["ratio"], number)
            for number, result in self.known.items()
            if not result["failure"] and number != self.default and result["ratio"] < 1
        )
        finalists = [number for _, number in ranked[:FINALISTS]]
        seconds = 5 * self.limits.sample_seconds * (len(finalists) + 2)
        while True:
            racers = [self.default, self.default, *finalists]
            try:
                samples = self.evaluator.race([self.space.config(n) for n in racers], seconds)
                break
            except CandidateFailed as error:
                # Somebody who was well before fails now: find out who, and go on without.
                failed = {}
                for number in dict.fromkeys(racers):
                    failure = self.evaluator.check(self.space.config(number))
                    if failure is not None:
                        failed[number] = failure
                self.failures |= failed
                if self.default in failed or (not failed and not finalists):
                    raise DefaultFailed(failed.get(self.default, error.failure)) from None
                finalists = [n for n in finalists if n not in failed] if failed else []
        winner, noise = decide(
            samples[0], samples[1], dict(zip(finalists, samples[2:], strict=True)), self.default
        )
        place = 0 if winner == self.default else 2 + finalists.index(winner)
        return Verdict(
            config=self.space.config(winner),
            us=Timing.of(samples[place]),
            default_us=Timing.of(samples[0]),
            noise=noise,
            rounds=len(samples[0]),
            trials=len(self.known),
            failures=self.failures,
            stopped=self.stopped,
        )


def tune(
    study: optuna.Study,
    space: Space,
    default: Config,
    evaluator: Evaluator,
    *,
    suggestions: Sequence[int] = (),
    limits: Limits | None = None,
    floor_us: float = 0.0,
    on_trial: Callable[[int, float, Failure | None], None] = lambda *_: None,
) -> Verdict:
    """Find the best configuration of a problem.

    Args:
        study: Of `open_study`; what it knows is used, and it knows everything afterwards.
        space: The configurations.
        default: The backend's default.
        evaluator: Runs configurations.
        suggestions: Numbers to begin with, after the default.
        limits: When to end.
        floor_us: Nothing is faster; the search ends near it.
        on_trial: Called after each measured trial with how many there are, the best ratio to the
            default, and why this one failed, if it did.

    Raises:
        DefaultFailed: the default is wrong or cannot run.
        KeyboardInterrupt: what was measured is kept, and the running trial queued again.
    """
    limits = limits or Limits()
    told = study.user_attrs.get("verdict")
    if told is not None:
        return from_json(told)
    search = _Search(study, space, default, evaluator, limits, floor_us, on_trial)
    first = [search.default, *suggestions]
    if space.size <= limits.trials:
        first += space.numbers()
    search.enqueue(first)
    search.run()
    if search.default in search.failures:
        raise DefaultFailed(search.failures[search.default])
    verdict = search.settle()
    study.set_user_attr("verdict", to_json(verdict))
    return verdict


def sweep(
    study: optuna.Study,
    points: Sequence[Mapping[str, int]],
    evaluate: Callable[[Mapping[str, int]], dict[str, Any]],
    on_point: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Evaluate every point of a grid, each once in the life of a study.

    Args:
        study: Of `open_study`.
        points: Knob -> value; the same knobs in each.
        evaluate: Returns JSON values: `value` (smaller is better), `constraints` (name -> number,
            positive where violated), and anything else.
        on_point: Called with how many are done.

    Returns:
        What `evaluate` returned, in the order of the points.
    """
    values = {name: sorted({point[name] for point in points}) for name in points[0]}
    done: dict[tuple, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        result = _result(trial)
        if result is not None:
            done[tuple(result["point"])] = result
    names = tuple(values)

    def objective(trial: Trial) -> float:
        trial.set_user_attr("owner", _owner())
        point = {n: int(trial.suggest_categorical(n, values[n]) or 0) for n in names}
        key = tuple(point.values())
        result = done.get(key) or evaluate(point) | {"point": list(key)}
        done[key] = result
        trial.set_user_attr("result", result)
        for name, amount in result["constraints"].items():
            trial.set_constraint(name, amount)
        return result["value"]

    for point in points:
        # A trial of a process that died may stand before this one in the queue.
        while tuple(point[n] for n in names) not in done:
            study.enqueue_trial({n: point[n] for n in names})
            study.optimize(objective, n_trials=1)
            on_point(len(done))
    return [done[tuple(point[n] for n in names)] for point in points]


def is_settled(storage: RDBStorage, name: str) -> bool:
    """Whether the latest run of a study has a verdict."""
    runs = _runs(storage, name)
    if not runs:
        return False
    study = optuna.load_study(study_name=f"{name}#{max(runs)}", storage=storage)
    return "verdict" in study.user_attrs


def _runs(storage: RDBStorage, name: str) -> list[int]:
    """Numbers of the runs of a study."""
    split = [found.rpartition("#") for found in optuna.get_all_study_names(storage)]
    return [int(run) for base, _, run in split if base == name and run.isdecimal()]
