"""The race: candidates timed against each other, as users run them.

Each sample goes through the public op, on caches that hold nothing of the call's data. For that
every call takes the next of several *sets* of inputs, whose codes, queries and selected rows
together are larger than the last cache (of a CPU: as far as memory for them reaches; second-level
caches are always cold).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import NamedTuple

from hata.backend import Backend, Config, use_config
from hata.measure.clock import CPUClock, CUDAClock, in_turns
from hata.measure.inputs import Inputs


class Candidate(NamedTuple):
    """What is timed: a configuration on the inputs of a problem."""

    inputs: Inputs
    config: Config


def race(
    backend: Backend,
    candidates: Sequence[Candidate],
    *,
    seconds: float,
    least: int = 7,
    most: int = 400,
) -> list[list[float]]:
    """Time candidates against each other.

    Args:
        backend: Runs all of them.
        candidates: Each must have run once before.
        seconds: About how long the whole race may take.
        least: Fewest rounds, whatever they take.
        most: Most rounds.

    Returns:
        For each candidate its samples in microseconds, one a round.
    """
    on_gpu = candidates[0].inputs.problem.device == "cuda"
    clock = CUDAClock() if on_gpu else CPUClock()
    for inputs, config in candidates:
        within = partial(use_config, backend.name, inputs.problem.op, config)
        if on_gpu:
            # Nothing compiles or allocates in a sample.
            with within():
                inputs.prepare()
        clock.add(inputs.calls, within)
    return in_turns(clock, rounds=most, seconds=seconds, least=least, order=Random(0))
