"""Who wins: the rules by which the last race of a search is decided.

The best few candidates run against the default, which runs twice: how far the default is from
itself is the noise. Who does not beat the default by more than that loses to it, and of those equal
within it the lowest number wins, so that several processes that draw agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hata.profile import Timing
from tune.worker import Failure

# The least difference that is believed.
LEAST_NOISE = 0.01


@dataclass(frozen=True)
class Verdict:
    """Outcome of the search of one problem.

    Attributes:
        config: The configuration to use.
        us: Its time.
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
    failures: dict[int, Failure] = field(default_factory=dict)
    stopped: str = ""


def decide(
    default: Sequence[float],
    again: Sequence[float],
    others: Mapping[int, Sequence[float]],
    default_number: int,
) -> tuple[int, float]:
    """Who wins a race, by the rules above.

    Args:
        default: Samples of the default, one a round.
        again: Samples of the default as if it were another.
        others: Number -> samples, of the other configurations.
        default_number: Number of the default.

    Returns:
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


def from_json(told: Mapping[str, Any]) -> Verdict:
    """A verdict as a database keeps it: `dataclasses.asdict` of it, through JSON."""
    us, default_us = Timing(**told["us"]), Timing(**told["default_us"])
    failures = {int(number): Failure(*failure) for number, failure in told["failures"].items()}
    return Verdict(**{**told, "us": us, "default_us": default_us, "failures": failures})
