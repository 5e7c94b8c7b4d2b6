"""Compiling ahead: configurations that come next, several at a time, before they are timed.

A GPU kernel takes seconds to compile and a tenth of one to time, so a search that compiled one
configuration after the other would do little else. The processes here see no GPU and fill the cache
on disk from which the worker loads. They go on while the worker measures: what the problem at hand
may still try comes first, then what the next one will. Whatever is not done, or fails, is done, or
told, where the configuration is tried.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hata import registry
from hata.backend import Backend
from hata.device import cpu_cores
from hata.problem import Problem
from tune.worker import Case, die_with

# More of them would wait for memory rather than compile.
MOST_PROCESSES = 12
# Patience with the configurations of one call, in seconds.
PATIENCE = 60.0
# The worker must not wait for a core while it hands launches to the GPU: this many are left, and
# the compilers give way.
_SPARE_CORES = 2
_NICE = 5

# A backend's name, a problem, and a configuration's items.
_Key = tuple[str, Problem, tuple]


class Ahead(contextlib.AbstractContextManager):
    """Compiles configurations in other processes, which start at the first of them.

    Backends that list no kernels are left alone, and all of them where there is no GPU (`sm`).
    """

    def __init__(
        self, backends: Iterable[Backend], sm: int | None, processes: int | None = None
    ) -> None:
        able = {b.name for b in backends if type(b).kernels is not Backend.kernels}
        self._names = able if sm is not None else set()
        self._sm = sm or 0
        self._processes = processes or max(min(cpu_cores() - _SPARE_CORES, MOST_PROCESSES), 1)
        self._pool: ProcessPoolExecutor | None = None
        self._jobs: dict[_Key, Future] = {}

    def begin(self, name: str, entries: Sequence[Case]) -> None:
        """Have configurations of a backend compiled, after what was asked for before."""
        with self._unless_broken():
            for key in self._keys(name, entries):
                self._job(key)

    def prefer(self, name: str, entries: Sequence[Case]) -> None:
        """Have configurations of a backend compiled before whatever else waits."""
        with self._unless_broken():
            keys = self._keys(name, entries)
            others = [key for key, job in self._jobs.items() if key not in keys and job.cancel()]
            for key in (*keys, *others):
                self._job(key)

    def wait(self, name: str, entries: Sequence[Case]) -> None:
        """Return when configurations are compiled, or patience is at an end."""
        keys = self._keys(name, entries)
        if any(key not in self._jobs for key in keys):
            # Nobody foresaw it.
            self.prefer(name, entries)
        with self._unless_broken():
            done, late = wait([self._job(key) for key in keys], PATIENCE)
            for job in late:
                job.cancel()
            for job in done:
                job.result()

    def _keys(self, name: str, entries: Sequence[Case]) -> list[_Key]:
        if name not in self._names:
            return []
        return [(name, problem, tuple(config.items())) for problem, config in entries]

    @contextlib.contextmanager
    def _unless_broken(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            # A compiler crashed, and took the others along; without them things are slower.
            self.close()
            self._names = set()

    def _job(self, key: _Key) -> Future:
        job = self._jobs.get(key)
        if job is None or job.cancelled():
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self._processes, multiprocessing.get_context("spawn"), _begin, (os.getpid(),)
                )
            self._jobs[key] = job = self._pool.submit(_compile, *key, self._sm)
        return job

    def close(self) -> None:
        """End the processes, whatever they are at."""
        if self._pool is not None:
            running = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            # The interpreter would wait for them at its end.
            for process in running:
                process.kill()
            self._pool = None
        self._jobs.clear()

    def __exit__(self, *_: object) -> None:
        self.close()


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    os.nice(_NICE)
    # Before any framework is loaded: the GPU belongs to the one that measures.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HATA_PROFILE": "none"}


_backends: dict[str, Backend] = {}


def _compile(name: str, problem: Problem, config: tuple, sm: int) -> None:
    # A backend is asked to compile where it could not run: `registry.load` would refuse it.
    backend = _backends.get(name) or _backends.setdefault(name, registry.class_of(name)())
    with contextlib.suppress(Exception):
        for kernel in backend.ahead(problem, dict(config), sm):
            kernel.compile(sm)
