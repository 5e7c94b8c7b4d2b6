"""The clocks: how a list of contenders is timed, one function per kind of device.

On a CPU two thread pools are at work, torch's and that of the kernels. After a parallel region the
idle threads of an OpenMP pool spin for some milliseconds before they sleep, and a spinning thread
takes a core from the other pool. So contenders are not alternated call by call: each round gives
every contender a block of calls, after a pause in which threads fall asleep, and the first calls of
a block, which wake its own threads, are not counted. Rounds go over all contenders in turn, so slow
drift of the machine meets all of them alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Pause before a block; OpenMP threads spin for less.
SETTLE_S = 0.03
# A block is counted for about this long, and at most for this many calls.
BLOCK_S = 0.06
BLOCK_CALLS = 20
WARM_S = 0.03

Calls = Sequence[Callable[[], object]]
Clock = Callable[[Calls, int, bool, Callable[[], None]], list["Timing"]]


@dataclass(frozen=True)
class Timing:
    """Time of one call in µs over all rounds."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise samples in µs."""
        cuts = statistics.quantiles(samples, n=10, method="inclusive") if samples[1:] else samples
        return cls(statistics.median(samples), cuts[0], cuts[-1], len(samples))


class Sweep:
    """Empties the caches: every core reads its own part of a buffer larger than the last level."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        size = min(2 * last_level_bytes(), 2**30)
        self._parts = np.array_split(np.ones(size // 8), self._cores)
        self._pool = ThreadPoolExecutor(self._cores)

    def __call__(self) -> None:
        """Read the buffer once. NumPy releases the interpreter lock while it sums."""
        for _ in self._pool.map(np.sum, self._parts):
            pass


def last_level_bytes() -> int:
    """Size of the last-level cache of core 0; 64 MiB where it is not known."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) * 1024)
    return max(found) or 64 * 2**20


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu(calls: Calls, rounds: int, cold: bool, tick: Callable[[], None]) -> list[Timing]:
    """Time calls on the CPU.

    Args:
        calls: What to time, warmed up by the caller (compiled, checked).
        rounds: Blocks that each of them gets.
        cold: Empty the caches before every counted call.
        tick: Called after each block.
    """
    sweep = Sweep() if cold else None
    # The first call of a block wakes threads, so the second says how many fit a block.
    estimates = [min(_seconds(call) for _ in range(2)) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, estimate, into in zip(calls, estimates, samples, strict=True):
            counted = max(1, min(BLOCK_CALLS, int(BLOCK_S / estimate)))
            time.sleep(SETTLE_S)
            warm_until = time.perf_counter() + WARM_S
            call()
            while time.perf_counter() < warm_until:
                call()
            for _ in range(counted):
                if sweep is not None:
                    sweep()
                into.append(_seconds(call) * 1e6)
            tick()
    return [Timing.of(one) for one in samples]


CLOCKS: dict[str, Clock] = {"cpu": cpu}

# Times of the kernels that each call launches, with their names, in order; by kind of device.
Kernels = Callable[[Calls], list[list[tuple[str, Timing]]]]
KERNELS: dict[str, Kernels] = {}
