"""How calls are timed: in turns, each clock on one kind of device.

On a CPU two thread pools are at work, torch's and that of the kernels. After a parallel region the
idle threads of an OpenMP pool spin for some milliseconds before they sleep, and a spinning thread
takes a core from the other pool. So contenders of two pools get blocks of calls, each after a pause
in which threads fall asleep, and the first calls of a block, which wake its own threads, are not
counted.

On a GPU a decode step finds caches that the other layers have emptied, and its launches cost what
they cost in a CUDA graph. So a contender is captured in a graph of pairs: a sweep, which reads more
memory than the second-level cache holds, and a call. Another graph holds as many sweeps alone, and
is replayed right before; the difference of the two is the time of the calls. Neither events nor
launches are in it: while the GPU sweeps, the host hands it the next graph.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

from hata.device import cpu_cores, plugin
from hata.profile import Timing

# Of a block on a CPU, in seconds: the pause before it, for longer than OpenMP threads spin; calls
# that are not counted; and about how long it is, with at most so many calls.
SETTLE_S, WARM_S, BLOCK_S, BLOCK_CALLS = 0.03, 0.03, 0.06, 20
# Pairs of sweep and call in a graph of a GPU.
PAIRS = 20
# Sweeps before the first event, which take longer than the host takes to hand over a graph.
LEAD = 6
# What a sweep of a GPU reads, in second-level caches, and the row of it that is one block's work.
_SWEEP, _ROW = 3, 16384
# A call that the clock cannot tell from nothing, in µs.
_LEAST_US = 0.01

Call = Callable[[], object]
Within = Callable[[], contextlib.AbstractContextManager[Any]]


def timing_of(samples: Sequence[float]) -> Timing:
    """Median and percentiles of samples in microseconds."""
    p10, median, p90 = np.percentile(np.asarray(samples, float), (10, 50, 90))
    return Timing(float(median), float(p10), float(p90))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of samples, and of graphs that are captured."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Clock(Protocol):
    """Times calls on one kind of device.

    Attributes:
        blocks: Whether a sample is a block of calls, that warms up by itself.
    """

    blocks: bool

    def add(self, calls: Sequence[Call], within: Within = contextlib.nullcontext) -> None:
        """Another contender: calls that take turns, each run before, and the context to run in."""

    def sample(self, index: int) -> list[float]:
        """Microseconds of the next call, or of each of a block of calls, of a contender."""
        ...

    def __len__(self) -> int:
        """How many contenders there are."""
        ...


class CPUClock:
    """Times calls on the CPU.

    Args:
        blocks: Give contenders blocks of calls; else a sample is one call.
        cold: Empty the caches before every call that is counted.
    """

    def __init__(self, *, blocks: bool = False, cold: bool = False) -> None:
        self.blocks, self._sweep = blocks, CPUSweep() if cold else None
        self._contenders: list[tuple[Sequence[Call], Within, int]] = []
        self._turn = 0

    def add(self, calls: Sequence[Call], within: Within = contextlib.nullcontext) -> None:
        """See `Clock`."""
        counted = 1
        if self.blocks:
            # The first call of a block wakes threads, so the second says how many fit a block.
            estimate = min(_seconds(calls[0]) for _ in range(2))
            counted = max(1, min(BLOCK_CALLS, int(BLOCK_S / estimate)))
        self._contenders.append((calls, within, counted))

    def sample(self, index: int) -> list[float]:
        """See `Clock`."""
        calls, within, counted = self._contenders[index]
        call = calls[self._turn % len(calls)]
        self._turn += 1
        found = []
        with within():
            if self.blocks:
                time.sleep(SETTLE_S)
                warm_until = time.perf_counter() + WARM_S
                call()
                while time.perf_counter() < warm_until:
                    call()
            for _ in range(counted):
                if self._sweep is not None:
                    self._sweep()
                found.append(1e6 * _seconds(call))
        return found

    def __len__(self) -> int:
        return len(self._contenders)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CPUSweep:
    """Empties the caches: every core reads its own part of a buffer larger than the last level."""

    def __init__(self) -> None:
        self.cores = cpu_cores()
        parts = min(2 * last_level_bytes(), 2**29) // self.cores // 8
        self.bytes = self.cores * parts * 8
        self._parts = [np.ones(parts) for _ in range(self.cores)]
        self._pool = ThreadPoolExecutor(self.cores)

    def __call__(self) -> None:
        """Read the buffer once. NumPy releases the interpreter lock while it does."""
        for _ in self._pool.map(np.max, self._parts):
            pass


def last_level_bytes() -> int:
    """Size of the largest CPU cache; 32 MB where the system does not say."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        digits = text.rstrip("KMG")
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        largest = max(largest, int(digits) * scale if digits.isdecimal() else 0)
    return largest or 32 << 20


def _torch() -> Any:
    return importlib.import_module("torch")


class _Sweeps:
    """The sweep of a GPU, its graph, and what all graphs of this process share.

    One stream and one pool of memory: graphs that are never replayed at the same time may use the
    same memory, and a pool lives as long as one of its graphs does, this one.
    """

    def __init__(self) -> None:
        torch = _torch()
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        rows = -(-_SWEEP * size // (4 * _ROW))
        self._memory = torch.zeros((rows, _ROW), dtype=torch.float32, device="cuda")
        self._sums = torch.empty(rows, dtype=torch.float32, device="cuda")
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self.run()
        self.graph = self.capture([self.run] * PAIRS)

    def run(self) -> None:
        """Read the memory."""
        _torch().sum(self._memory, 1, out=self._sums)

    def capture(self, calls: Sequence[Call]) -> Any:
        """A graph of some calls, one after the other."""
        torch = _torch()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _no_collection(), torch.cuda.stream(self._stream):
            # `torch.cuda.graph` does this too, and a garbage collection that outlasts a trial.
            graph.capture_begin(pool=self._pool)
            try:
                for call in calls:
                    call()
            except BaseException:
                # What broke the capture says more than that it is broken.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


_sweeps = functools.cache(_Sweeps)


def sweep_gpu() -> None:
    """Empty the second-level cache: one kernel that reads and writes next to nothing."""
    _sweeps().run()


class CUDAClock:
    """Times calls on the current GPU."""

    blocks = False

    def __init__(self) -> None:
        torch = _torch()
        self._sweeps = _sweeps()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._graphs: list[Any] = []

    def add(self, calls: Sequence[Call], within: Within = contextlib.nullcontext) -> None:
        """Another contender: calls that take turns, each prepared or run before."""
        pairs: list[Call] = []
        for turn in range(PAIRS):
            pairs += [self._sweeps.run, calls[turn % len(calls)]]
        with within():
            self._graphs.append(self._sweeps.capture(pairs))

    def sample(self, index: int) -> list[float]:
        """Microseconds of one call of a contender, as the mean of those in its graph."""
        begin, between, end = self._events
        for _ in range(LEAD):
            self._sweeps.run()
        begin.record()
        self._sweeps.graph.replay()
        between.record()
        self._graphs[index].replay()
        end.record()
        end.synchronize()
        alone, pairs = begin.elapsed_time(between), between.elapsed_time(end)
        return [max(1e3 * (pairs - alone) / PAIRS, _LEAST_US)]

    def __len__(self) -> int:
        return len(self._graphs)


def clock_of(device: str, *, blocks: bool = False, cold: bool = False) -> Clock:
    """A clock of a kind of device; `blocks` and `cold` are for that of the CPU."""
    if device == "cpu":
        return CPUClock(blocks=blocks, cold=cold)
    return CUDAClock() if device == "cuda" else plugin(device).clock()


def in_turns(
    clock: Clock,
    *,
    rounds: int,
    seconds: float = 0.0,
    least: int | None = None,
    order: Random | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Sample all contenders of a clock in turns, so that a slow machine slows all of them.

    Args:
        clock: With all contenders added.
        rounds: Most samples (on a CPU: blocks, if there are such) of each of them.
        seconds: About how long the whole may take.
        least: Fewest rounds, whatever they take; `None`: all of them.
        order: Shuffles the contenders of each round.
        tick: Called after each sample.
    """
    turns = list(range(len(clock)))
    samples: list[list[float]] = [[] for _ in turns]
    with _no_collection():
        # The first calls after a pause are slow: clocks rise, threads wake.
        for index in [] if clock.blocks else turns:
            clock.sample(index)
        start = time.perf_counter()
        for number in range(1, rounds + 1):
            if order is not None:
                order.shuffle(turns)
            for index in turns:
                samples[index] += clock.sample(index)
                tick()
            if number >= (least or rounds) and time.perf_counter() - start > seconds:
                break
    return samples


def times(
    calls: Sequence[Call],
    device: str,
    rounds: int,
    *,
    cold: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Samples in microseconds of calls that may use thread pools of their own; see `in_turns`.

    `cold` empties the caches of a CPU before every call that is counted; those of a GPU always are.
    """
    clock = clock_of(device, blocks=True, cold=cold)
    for call in calls:
        call()
        clock.add([call])
    return in_turns(clock, rounds=rounds, tick=tick)
