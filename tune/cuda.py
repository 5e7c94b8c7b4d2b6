"""The clock of a GPU, and whether the GPU is still there.

A decode step finds caches that the other layers have emptied, and its launches cost what they cost
in a CUDA graph. So a contender is captured in a graph of pairs: a sweep, which reads more memory
than the second-level cache holds, and a call. Another graph holds as many sweeps alone, and is
replayed right before; the difference of the two is the time of the calls. Neither events nor
launches are in it: while the GPU sweeps, the host hands it the next graph.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Pairs of sweep and call in a graph.
PAIRS = 20
# Sweeps before the first event, which take longer than the host takes to hand over a graph.
LEAD = 6
# What a sweep reads, in second-level caches.
_SWEEP = 3
# Row of what a sweep sums, in float32: one block's work.
_ROW = 16384
# A call that the clock cannot tell from nothing, in µs.
_LEAST_US = 0.01

Call = Callable[[], object]


def _torch() -> Any:
    return importlib.import_module("torch")


class _Sweeps:
    """The sweep, its graph, and what all graphs of this process share.

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
        with torch.cuda.stream(self._stream), _captured(graph, self._pool):
            for call in calls:
                call()
        return graph


@contextlib.contextmanager
def _captured(graph: Any, pool: Any) -> Iterator[None]:
    # `torch.cuda.graph` does this too, and a garbage collection that takes longer than a trial.
    graph.capture_begin(pool=pool)
    try:
        yield
    except BaseException:
        # What broke the capture says more than that it is broken.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


_sweeps = functools.cache(_Sweeps)


def sweep() -> None:
    """Empty the second-level cache: one kernel that reads and writes next to nothing."""
    _sweeps().run()


class Clock:
    """Times calls on the current GPU, in CUDA graphs and with cold caches."""

    def __init__(self) -> None:
        torch = _torch()
        self._sweeps = _sweeps()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._graphs: list[Any] = []

    def add(self, calls: Sequence[Call]) -> None:
        """Another contender: calls that take turns, each prepared or run before."""
        pairs: list[Call] = []
        for turn in range(PAIRS):
            pairs += [self._sweeps.run, calls[turn % len(calls)]]
        self._graphs.append(self._sweeps.capture(pairs))

    def sample(self, index: int) -> float:
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
        return max(1e3 * (pairs - alone) / PAIRS, _LEAST_US)


def fault() -> str | None:
    """Why no further work can be done on the GPU in this process; `None` if it can.

    After an illegal access every call of the process fails, whoever made it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def release() -> None:
    """Give memory that nothing uses back to the GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
