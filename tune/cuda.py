"""The clock of a GPU, and whether the GPU is still there.

A decode step finds caches that the other layers have emptied, and its launches cost what they cost
in a CUDA graph. So a candidate is captured in a graph of pairs: a sweep, which reads more memory
than the second-level cache holds, and a call, each on the next set of inputs. Another graph holds
the sweeps alone. The difference of the two is the time of the calls; neither events nor launches
are in it, and nothing compiles or allocates in a replay.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hata
from hata.backend import Backend, use_config
from tune.inputs import Candidate

# Pairs of sweep and call in a graph.
PAIRS = 8
# What a sweep reads, in second-level caches.
_SWEEP = 3
# Row of what a sweep sums, in float32: one block's work.
_ROW = 16384
# A call that the clock cannot tell from nothing, in µs.
_LEAST_US = 0.01


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

    def capture(self, calls: Sequence[Callable[[], object]]) -> Any:
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


class Clock:
    """Times candidates in CUDA graphs with cold caches."""

    def __init__(self, backend: Backend, candidates: Sequence[Candidate]) -> None:
        torch = _torch()
        self._sweeps = _sweeps()
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._empty = 0.0
        self._graphs = [self._graph(backend, candidate) for candidate in candidates]

    def _graph(self, backend: Backend, candidate: Candidate) -> Any:
        inputs, config = candidate
        calls: list[Callable[[], object]] = []
        with use_config(backend.name, inputs.problem.op, config):
            for turn in range(PAIRS):
                call = inputs.calls[turn % len(inputs.calls)]
                if turn < len(inputs.calls):
                    hata.prepare(call.op, *call.args, **call.kwargs)
                calls += [self._sweeps.run, call]
            return self._sweeps.capture(calls)

    def begin_round(self) -> None:
        """Time the sweeps alone, to be taken off the samples of this round."""
        self._empty = self._microseconds(self._sweeps.graph)

    def sample(self, index: int, turn: int) -> float:
        """Microseconds of one call, as the mean of those in a graph."""
        return max(self._microseconds(self._graphs[index]) - self._empty, _LEAST_US)

    def _microseconds(self, graph: Any) -> float:
        # The GPU is busy with this while the graph is handed to it, so that it does not wait for
        # the host between the two events.
        self._sweeps.run()
        self._before.record()
        graph.replay()
        self._after.record()
        self._after.synchronize()
        return 1e3 * self._before.elapsed_time(self._after) / PAIRS


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
