"""The search of one problem, in one study (`tune.studies`), and when it ends.

A trial checks one configuration and times it in turns with the default; its value is the ratio of
the two, which a machine that slows down does not change. What was measured is never measured again.
One that fails is a finished trial with a violated constraint and a typed failure, never chosen.

The winner is settled by a last race of the best few against the default, which runs twice: how far
the default is from itself is the noise. Who does not beat the default by more than that loses to
it, and of those equal within it the lowest number wins, so that several processes that draw agree.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from hata.backend import Config
from hata.measure.clock import timing_of
from hata.measure.inputs import awkward_problem
from hata.problem import Problem
from hata.profile import Timing
from tune.ahead import Ahead
from tune.propose import climb
from tune.space import Limits, Space
from tune.studies import RETRIES, owner, result_of
from tune.worker import CRASH, CandidateFailed, Case, Failure, Worker

# How near the floor is near enough.
NEAR_FLOOR = 1.05
FINALISTS = 3
# A few candidates are always tried: time may be short, or a floor measured on a busy machine high.
LEAST_TRIALS = 6
REPEATS = 10
# The least difference that is believed.
LEAST_NOISE = 0.01
# Value of a trial that failed; its constraint says so, the value only has to be a bad one.
_FAILED = 1e3


class DefaultFailed(CandidateFailed):
    """The default configuration of a problem fails, so there is nothing to compare with."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the search of one problem: the configuration to use.

    Attributes:
        us, default_us: Its time, and the default's in the same race.
        noise: Relative difference that was not believed.
        rounds, trials: Samples behind the times; configurations that were measured.
        failures: Number of a configuration -> why it cannot be chosen.
        stopped: Why the search ended.
    """

    config: dict[str, int | str | bool]
    us: Timing
    default_us: Timing
    noise: float
    rounds: int
    trials: int
    failures: dict[int, Failure]
    stopped: str


def to_compile(problem: Problem, configs: Iterable[Config]) -> list[Case]:
    """What checking configurations of a problem runs."""
    both = problem, awkward_problem(problem)
    return [(problem, config) for config in configs for problem in both]


class Evaluator(NamedTuple):
    """Runs configurations of one problem, on a backend and its worker."""

    name: str
    worker: Worker
    ahead: Ahead
    problem: Problem

    def expect(self, configs: Sequence[Config]) -> None:
        """Make ready for the configurations that come next."""
        self.ahead.prefer(self.name, to_compile(self.problem, configs))

    def check(self, config: Config) -> Failure | None:
        """What is wrong with a configuration; `None` if its results are right."""
        self.ahead.wait(self.name, to_compile(self.problem, [config]))
        return self.worker.check(self.problem, config)

    def race(self, configs: Sequence[Config], seconds: float) -> list[list[float]]:
        """Microseconds of each configuration, one sample a round; may raise `CandidateFailed`."""
        return self.worker.race([(self.problem, config) for config in configs], seconds)


def decide(
    default: Sequence[float],
    again: Sequence[float],
    others: Mapping[int, Sequence[float]],
    default_number: int,
) -> tuple[int, float]:
    """The number that wins a race by the rules above, and the noise.

    `again` are samples of the default as if it were another, `others` those of each number.
    """
    base = np.asarray(default, float)

    def ratio(samples: Sequence[float]) -> tuple[float, float]:
        ratios = np.asarray(samples, float) / base
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        # 0.93: the standard error of a median for normal noise; 2.7 of them leave a false gain a
        # chance of 1 in 100 among three finalists.
        return float(middle), float(2.7 * 0.93 * (high - low) / np.sqrt(len(ratios)))

    middle, spread = ratio(again)
    noise = max(LEAST_NOISE, abs(middle - 1) + spread)
    faster: dict[int, float] = {}
    for number, samples in others.items():
        middle, spread = ratio(samples)
        # Both ways to compare must agree: pairs within rounds, and the medians that are reported.
        if middle < 1 - max(noise, spread) and np.median(samples) < np.median(base):
            faster[number] = middle
    if not faster:
        return default_number, noise
    best = min(faster.values())
    return min(n for n, middle in faster.items() if middle <= best + noise), noise


@dataclass
class Search:
    """The search of one problem, in one study: what that knows is used, and added to.

    It begins with the default and the numbers of `suggestions`, and ends by its limits, or near
    `floor_us`: nothing is faster. `on_trial` is called after each measured trial with how many
    there are, the best ratio to the default, and why this one failed, if it did.
    """

    study: optuna.Study
    space: Space
    default: Config
    evaluator: Evaluator
    limits: Limits
    suggestions: Sequence[int] = ()
    floor_us: float = 0.0
    on_trial: Callable[[int, float, Failure | None], None] = lambda *_: None

    def run(self) -> Verdict:
        """Find the best configuration; raises `DefaultFailed` if it cannot be compared with any.

        Interrupted, it keeps what was measured, and queues the running trial again.
        """
        told = self.study.user_attrs.get("verdict")
        if told is not None:
            return _from_json(told)
        # Results of trials, and why some cannot be chosen, by number of the configuration.
        self._known: dict[int, dict[str, Any]] = {}
        self._failures: dict[int, Failure] = {}
        self._best, self._repeats, self._began = 1.0, 0, time.monotonic()
        self._base = self.space.number(self.default)
        self._recall()
        small = self.space.size <= self.limits.trials
        self._enqueue([self._base, *self.suggestions, *(range(self.space.size) if small else ())])
        self._stopped = self._reason_to_stop()
        while not self._stopped:
            if waiting := len(self._waiting()):
                self.study.optimize(self._trial, n_trials=waiting)
                continue
            # Failures too, as what was tried and is no gain.
            ratios = {number: result["ratio"] for number, result in self._known.items()}
            self._enqueue(climb(self.space, self._base, ratios))
            if not self._waiting():
                # Nothing is left that the times suggest: the sampler looks elsewhere.
                self.study.optimize(self._trial)
        if self._base in self._failures:
            raise DefaultFailed(self._failures[self._base])
        verdict = self._settle()
        self.study.set_user_attr("verdict", asdict(verdict))
        return verdict

    def _recall(self) -> None:
        """Take over what the study knows."""
        deaths: Counter[int] = Counter()
        for trial in self.study.get_trials(deepcopy=False):
            result = result_of(trial)
            if result is not None:
                self._learn(result)
            # Optuna fails a trial only when its process died, maybe before all knobs were drawn.
            elif (
                trial.state == TrialState.FAIL
                and "interrupted" not in trial.user_attrs
                and all(name in trial.params for name, _ in self.space.knobs)
            ):
                deaths[self.space.number_at(trial.params)] += 1
        for number, times in deaths.items():
            if times > RETRIES and number not in self._known:
                why = f"the tuner itself ended {times} times while it ran"
                self._learn(_failed(number, Failure(CRASH, why)))

    def _learn(self, result: dict[str, Any]) -> None:
        number, failure = result["number"], result["failure"]
        self._known[number] = result
        if failure:
            self._failures[number] = Failure(*failure)
        else:
            self._best = min(self._best, result["ratio"])

    def _waiting(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _enqueue(self, numbers: Iterable[int]) -> None:
        """Queue configurations, once each."""
        queued = [t.system_attrs.get("fixed_params") or t.params for t in self._waiting()]
        fresh = [number for number in dict.fromkeys(numbers) if number not in self._known]
        # No more than will be measured; what is enqueued is also expected, and may be compiled.
        fresh = fresh[: max(self.limits.trials - len(self._known), 0)]
        self.evaluator.expect([self.space.config(number) for number in fresh])
        for params in map(self.space.places, fresh):
            if params not in queued:
                self.study.enqueue_trial(params)

    def _trial(self, trial: Trial) -> float:
        """One trial: check, then time; or tell what is known."""
        trial.set_user_attr("owner", owner())
        # Values are in ascending order, so their places are what the sampler should see.
        places = {
            name: trial.suggest_int(name, 0, len(values) - 1) for name, values in self.space.knobs
        }
        number = self.space.number_at(places)
        result = self._known.get(number)
        self._repeats = 0 if result is None else self._repeats + 1
        if result is None:
            try:
                result = self._measure(number)
            except KeyboardInterrupt:
                trial.set_user_attr("interrupted", True)
                self.study.enqueue_trial(places)
                raise
            self._learn(result)
            self.on_trial(len(self._known), self._best, self._failures.get(number))
        trial.set_user_attr("result", result)
        # On every trial: samplers want to see the same constraints everywhere.
        trial.set_constraint("failed", 1.0 if result["failure"] else -1.0)
        self._stopped = self._reason_to_stop()
        if self._stopped:
            self.study.stop()
        return result["ratio"]

    def _measure(self, number: int) -> dict[str, Any]:
        failure = self.evaluator.check(self.space.config(number))
        if failure is not None:
            return _failed(number, failure)
        racers = map(self.space.config, dict.fromkeys((self._base, number)))
        try:
            samples = self.evaluator.race(list(racers), self.limits.sample_seconds)
        except CandidateFailed as error:
            return _failed(number, error.failure)
        # Of the default to itself: 1.
        ratio, us = np.median(np.divide(samples[-1], samples[0])), np.median(samples[-1])
        return {"number": number, "ratio": float(ratio), "us": float(us), "failure": None}

    def _reason_to_stop(self) -> str:
        measured = len(self._known)
        times = [result["us"] for result in self._known.values() if not result["failure"]]
        if self._base in self._failures:
            return "the default fails"
        if measured >= self.space.size:
            return "every configuration was measured"
        if measured >= self.limits.trials:
            return f"{measured} configurations were measured"
        if len(times) >= LEAST_TRIALS and min(times) <= NEAR_FLOOR * self.floor_us:
            return "within 5% of the floor"
        if self._repeats >= REPEATS:
            return "the sampler repeats itself"
        late = time.monotonic() - self._began >= self.limits.seconds
        return "its time was up" if late and measured >= LEAST_TRIALS else ""

    def _settle(self) -> Verdict:
        """The last race."""
        ratios = {number: result["ratio"] for number, result in self._known.items()}
        faster = [n for n, ratio in ratios.items() if n != self._base and ratio < 1]
        finalists = sorted(faster, key=lambda n: (ratios[n], n))[:FINALISTS]
        seconds = 5 * self.limits.sample_seconds * (len(finalists) + 2)
        while True:
            racers = [self._base, self._base, *finalists]
            try:
                samples = self.evaluator.race([self.space.config(n) for n in racers], seconds)
                break
            except CandidateFailed as error:
                # Somebody who was well before fails now: find out who, and go on without.
                failed = {}
                for n in dict.fromkeys(racers):
                    if failure := self.evaluator.check(self.space.config(n)):
                        failed[n] = failure
                self._failures |= failed
                if self._base in failed or (not failed and not finalists):
                    raise DefaultFailed(failed.get(self._base, error.failure)) from None
                finalists = [n for n in finalists if n not in failed] if failed else []
        base, again, *others = samples
        rivals = dict(zip(finalists, others, strict=True))
        winner, noise = decide(base, again, rivals, self._base)
        return Verdict(
            config=self.space.config(winner), us=timing_of({self._base: base, **rivals}[winner]),
            default_us=timing_of(base), noise=noise, rounds=len(base),
            trials=len(self._known), failures=self._failures, stopped=self._stopped,
        )  # fmt: skip


def _failed(number: int, failure: Failure) -> dict[str, Any]:
    """The result of a trial that failed."""
    return {"number": number, "ratio": _FAILED, "failure": list(failure)}


def _from_json(told: Mapping[str, Any]) -> Verdict:
    # `dataclasses.asdict` went through JSON, whose keys are strings.
    us, default_us = Timing(**told["us"]), Timing(**told["default_us"])
    failures = {int(number): Failure(*failure) for number, failure in told["failures"].items()}
    return Verdict(**{**told, "us": us, "default_us": default_us, "failures": failures})
