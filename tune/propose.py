"""Which configurations are tried: those that look good on paper, then what their times suggest.

The space of a CPU is small, and ranked by the analytic model as a whole. That of a GPU is entered
at the default: its launches are kernels of their own, so what one knob gains adds, roughly, to what
another gains. First come what won on problems like this one and the *neighbours*, which differ from
the default in one knob by one step; then, again and again, the gains are put together, what moved
moves a step further, and the neighbours of the best are tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from hata.backend import Config
from hata.problem import Problem
from tune import cost
from tune.space import Space, apart

SUGGESTIONS = 4
WINNERS = 3
# A ratio to the default above this is no gain worth a trial of its own.
_GAIN = 0.99
# Configurations that one look at the times may propose.
_AT_ONCE = 8


def suggestions(
    problem: Problem, configs: Space, machine: cost.Machine, default: Config
) -> list[int]:
    """Numbers of the configurations to begin with, the best on paper first.

    For a GPU all neighbours of the default. For a CPU the best few, and the best with each value of
    the knobs that are no numbers: a model may be wrong about a whole variant, but hardly about
    sizes within one.
    """

    def predicted(number: int) -> tuple[float, int]:
        return cost.predict_us(problem, configs.config(number), machine), number

    if problem.device == "cuda":
        return sorted(neighbours(configs, configs.number(default)), key=predicted)
    ranked = sorted(range(configs.size), key=predicted)
    found = ranked[:SUGGESTIONS]
    for name, values in configs.knobs:
        if all(isinstance(value, str) for value in values):
            for value in values:
                found += [n for n in ranked if configs.config(n)[name] == value][:1]
    return list(dict.fromkeys(found))


def winners(problem: Problem, configs: Space, won: Mapping[Problem, Config]) -> list[int]:
    """Numbers of the configurations that beat the default on the problems most like this one."""
    found = []
    others = (other for other in won if other.op == problem.op)
    for other in sorted(others, key=partial(apart, problem)):
        # Knobs may be others, or have other values, where heads or dtypes are.
        with contextlib.suppress(ValueError):
            found.append(configs.number(won[other]))
    return list(dict.fromkeys(found))[:WINNERS]


def neighbours(configs: Space, number: int) -> Iterator[int]:
    """Configurations that differ in one knob by one step; in any way where values are no sizes."""
    places = configs.places(number)
    for name, values in configs.knobs:
        here = places[name]
        ordered = all(type(value) is int for value in values)
        others = (here - 1, here + 1) if ordered else range(len(values))
        for place in others:
            if place != here and 0 <= place < len(values):
                yield configs.number_at({**places, name: place})


def climb(configs: Space, default: int, ratios: Mapping[int, float]) -> list[int]:
    """What to try next, given the number of the default; empty at the end.

    `ratios` are times over that of the default by number, of all that were measured, in that order.
    """
    base = configs.places(default)
    gains: dict[str, tuple[float, int]] = {}
    for number, ratio in ratios.items():
        places = configs.places(number)
        moved = [name for name, place in places.items() if place != base[name]]
        if len(moved) == 1 and ratio < _GAIN:
            (name,) = moved
            gains[name] = min(gains.get(name, (1.0, 0)), (ratio, places[name]))
    found = []
    together = dict(base)
    for name in sorted(gains, key=lambda name: gains[name]):
        together[name] = gains[name][1]
        found.append(configs.number_at(together))
    # All gains first: if they add up, the rest is soon seen to be worse.
    found.reverse()
    least = min(ratios.values(), default=1.0)
    if least < _GAIN:
        # Of those that are as good the one that was met first: nothing is gained by moving on.
        best = next(number for number, ratio in ratios.items() if ratio <= least / _GAIN)
        at = configs.places(best)
        for name, values in configs.knobs:
            step = (at[name] > base[name]) - (at[name] < base[name])
            if step and 0 <= at[name] + step < len(values):
                found.append(configs.number_at({**at, name: at[name] + step}))
        # What gained may have changed what the other knobs should be.
        found += neighbours(configs, best)
    return [number for number in dict.fromkeys(found) if number not in ratios][:_AT_ONCE]
