"""The race: candidates timed against each other.

A candidate is timed as users run it: through the public op, one call a sample, on caches that hold
nothing of the call's data. For that every call takes the next of several *sets* of inputs, whose
codes, queries and selected rows together are larger than the last cache (of a CPU: as far as
memory for them reaches; second-level caches are always cold). Candidates take turns within a round,
in an order that changes, so that a machine that slows down slows all of them. How a GPU is timed
stands in `tune.cuda`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np

import hata
from hata.backend import Backend, use_config
from tune import cuda
from tune.inputs import Arrays as Arrays
from tune.inputs import Candidate


class Timing(NamedTuple):
    """Microseconds of one call: median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The percentiles of samples in microseconds."""
        p10, median, p90 = np.percentile(np.asarray(samples, float), (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


def race(
    backend: Backend,
    candidates: Sequence[Candidate],
    *,
    seconds: float,
    least: int = 7,
    most: int = 400,
    seed: int = 0,
) -> list[list[float]]:
    """Time candidates against each other.

    Args:
        backend: Runs all of them.
        candidates: Each must have run once before.
        seconds: About how long the whole race may take.
        least: Fewest rounds, whatever they take.
        most: Most rounds.
        seed: Of the order within rounds.

    Returns:
        For each candidate its samples in microseconds, one a round.
    """
    on_gpu = candidates[0].inputs.problem.device == "cuda"
    order, shuffle = list(range(len(candidates))), Random(seed).shuffle
    samples: list[list[float]] = [[] for _ in candidates]
    collecting = gc.isenabled()
    # Not in a sample, and not while a graph is captured.
    gc.disable()
    try:
        clock = _gpu_clock(backend, candidates) if on_gpu else _CpuClock(backend, candidates)
        for index in order:
            # The first calls after a pause are slow: clocks rise, threads wake.
            clock.sample(index)
        start = time.perf_counter()
        for _ in range(most):
            shuffle(order)
            for index in order:
                samples[index].append(clock.sample(index))
            if len(samples[0]) >= least and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def _gpu_clock(backend: Backend, candidates: Sequence[Candidate]) -> cuda.Clock:
    """The clock of a GPU; nothing compiles or allocates in a sample."""
    clock = cuda.Clock()
    for inputs, config in candidates:
        with use_config(backend.name, inputs.problem.op, config):
            for call in inputs.calls:
                hata.prepare(call.op, *call.args, **call.kwargs)
            clock.add(inputs.calls)
    return clock


class _CpuClock:
    def __init__(self, backend: Backend, candidates: Sequence[Candidate]) -> None:
        self._name = backend.name
        self._candidates = candidates
        self._turn = 0

    def sample(self, index: int) -> float:
        """Microseconds of one call with the set of inputs whose turn it is."""
        inputs, config = self._candidates[index]
        call = inputs.calls[self._turn % len(inputs.calls)]
        self._turn += 1
        op: Callable[..., Any] = getattr(hata, call.op)
        args, kwargs = call.args, call.kwargs
        with use_config(self._name, call.op, config):
            start = time.perf_counter_ns()
            op(*args, **kwargs)
            return (time.perf_counter_ns() - start) / 1e3
