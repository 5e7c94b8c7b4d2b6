"""The search of one problem, in one study (`tune.studies`), and when it ends.

- A trial checks one configuration and times it in turns with the default; its value is the ratio
  of the two, which a machine that slows down does not change.
- A configuration that was measured is never measured again, its stored value is told.
- One that fails is a finished trial with a violated constraint and a typed failure, never chosen.

The winner is settled by a last race of the best few against the default, which runs twice: how far
the default is from itself is the noise. Who does not beat the default by more than that loses to
it, and of those equal within it the lowest number wins, so that several processes that draw agree.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from hata.backend import Config
from hata.measure.clock import timing_of
from hata.profile import Timing
from tune.propose import climb
from tune.space import Space
from tune.studies import RETRIES, owner, result_of
from tune.worker import CRASH, CandidateFailed, Failure

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
    """Outcome of the search of one problem.

    Attributes:
        config, us: The configuration to use, and its time.
        default_us: Time of the default in the same race.
        noise: Relative difference that was not believed.
        rounds: Samples behind the times.
        trials: Configurations that were measured.
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


class Evaluator(Protocol):
    """What runs configurations of one problem."""

    def check(self, config: Config) -> Failure | None:
        """What is wrong with a configuration; `None` if its results are right."""

    def race(self, configs: Sequence[Config], seconds: float) -> list[list[float]]:
        """Microseconds of each configuration, one sample a round; may raise `CandidateFailed`."""
        ...

    def expect(self, configs: Sequence[Config]) -> None:
        """Told which configurations come next, to make ready for them."""


class Limits(NamedTuple):
    """When the search of one problem ends; `sample_seconds` are those of one configuration."""

    trials: int = 40
    seconds: float = 30.0
    sample_seconds: float = 0.08


def decide(
    default: Sequence[float],
    again: Sequence[float],
    others: Mapping[int, Sequence[float]],
    default_number: int,
) -> tuple[int, float]:
    """Who wins a race, by the rules above.

    `again` are samples of the default as if it were another, `others` those of each number. Returns
    `(number, noise)`: the winner, and the relative difference that was not believed.
    """
    base = np.asarray(default, float)

    def ratio(samples: Sequence[float]) -> tuple[float, float]:
        ratios = np.asarray(samples, float) / base
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        # 0.93 is the standard error of a median for normal noise; 2.7 of them leave a false gain
        # a chance of 1 in 100 among three finalists.
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
class _Search:
    """The search of one problem, in one study."""

    study: optuna.Study
    space: Space
    default: int
    evaluator: Evaluator
    limits: Limits
    floor_us: float
    on_trial: Callable[[int, float, Failure | None], None]

    def __post_init__(self) -> None:
        self.stopped = ""
        self.known: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, Failure] = {}
        self.best, self.repeats, self.began = 1.0, 0, time.monotonic()
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
            if times > RETRIES and number not in self.known:
                failure = Failure(CRASH, f"the tuner itself ended {times} times while it ran")
                self._learn({"number": number, "ratio": _FAILED, "failure": list(failure)})

    def _learn(self, result: dict[str, Any]) -> None:
        self.known[result["number"]] = result
        if result["failure"]:
            self.failures[result["number"]] = Failure(*result["failure"])
        else:
            self.best = min(self.best, result["ratio"])

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
        trial.set_user_attr("owner", owner())
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
        self.stopped = self._reason_to_stop()
        if self.stopped:
            self.study.stop()
        return result["ratio"]

    def _measure(self, number: int) -> dict[str, Any]:
        config = self.space.config(number)
        failure = self.evaluator.check(config)
        if failure is None:
            default = self.space.config(self.default)
            racers = [config] if number == self.default else [default, config]
            try:
                samples = self.evaluator.race(racers, self.limits.sample_seconds)
            except CandidateFailed as error:
                failure = error.failure
            else:
                # Of the default to itself: 1.
                ratio = float(np.median(np.asarray(samples[-1]) / np.asarray(samples[0])))
                us = float(np.median(samples[-1]))
                return {"number": number, "ratio": ratio, "us": us, "failure": None}
        return {"number": number, "ratio": _FAILED, "failure": list(failure)}

    def _reason_to_stop(self) -> str:
        measured = len(self.known)
        times = [r["us"] for r in self.known.values() if not r["failure"]]
        if self.default in self.failures:
            return "the default fails"
        if measured >= self.space.size:
            return "every configuration was measured"
        if measured >= self.limits.trials:
            return f"{measured} configurations were measured"
        if len(times) >= LEAST_TRIALS and min(times) <= NEAR_FLOOR * self.floor_us:
            return "within 5% of the floor"
        if self.repeats >= REPEATS:
            return "the sampler repeats itself"
        late = time.monotonic() - self.began >= self.limits.seconds
        return "its time was up" if late and measured >= LEAST_TRIALS else ""

    def run(self) -> None:
        """Run trials until there is a reason to stop."""
        self.stopped = self._reason_to_stop()
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
                checked = {
                    n: self.evaluator.check(self.space.config(n)) for n in dict.fromkeys(racers)
                }
                failed = {n: failure for n, failure in checked.items() if failure is not None}
                self.failures |= failed
                if self.default in failed or (not failed and not finalists):
                    raise DefaultFailed(failed.get(self.default, error.failure)) from None
                finalists = [n for n in finalists if n not in failed] if failed else []
        winner, noise = decide(
            samples[0], samples[1], dict(zip(finalists, samples[2:], strict=True)), self.default
        )
        place = 0 if winner == self.default else 2 + finalists.index(winner)
        return Verdict(
            config=self.space.config(winner), us=timing_of(samples[place]),
            default_us=timing_of(samples[0]), noise=noise, rounds=len(samples[0]),
            trials=len(self.known), failures=self.failures, stopped=self.stopped,
        )  # fmt: skip


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
        return _from_json(told)
    number = space.number(default)
    search = _Search(study, space, number, evaluator, limits, floor_us, on_trial)
    first = [number, *suggestions]
    if space.size <= limits.trials:
        first += space.numbers()
    search.enqueue(first)
    search.run()
    if number in search.failures:
        raise DefaultFailed(search.failures[number])
    verdict = search.settle()
    study.set_user_attr("verdict", asdict(verdict))
    return verdict


def _from_json(told: Mapping[str, Any]) -> Verdict:
    # `dataclasses.asdict` went through JSON, whose keys are strings.
    us, default_us = Timing(**told["us"]), Timing(**told["default_us"])
    failures = {int(number): Failure(*failure) for number, failure in told["failures"].items()}
    return Verdict(**{**told, "us": us, "default_us": default_us, "failures": failures})
