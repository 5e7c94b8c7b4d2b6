"""Compiling ahead: configurations that come next, several at a time, before they are timed.

A GPU kernel takes seconds to compile and a tenth of one to time, so a search that compiled one
configuration after the other would do little else. The processes here see no GPU and fill the cache
on disk from which the worker loads; nothing compiles while it measures. Whatever is not done, or
fails, is done, or told, where the configuration is tried.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hata import registry
from hata.backend import Backend, Config, use_config
from hata.problem import Problem
from tune.worker import die_with

# More of them would wait for memory rather than compile.
MOST_PROCESSES = 12
# Patience with the configurations of one call, in seconds.
PATIENCE = 60.0


class Ahead:
    """Compiles configurations of one backend in other processes, which start at the first call.

    Args:
        backend: Whose kernels they are; one that cannot compile ahead is left alone.
        sm: Compute capability of the GPU; `None` where there is none.
        processes: How many; `None`: as many as there are cores, within reason.
    """

    def __init__(self, backend: Backend, sm: int | None, processes: int | None = None) -> None:
        self._name = backend.name
        self._sm = sm if type(backend).compile is not Backend.compile else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._processes = processes or min(cores, MOST_PROCESSES)
        self._pool: ProcessPoolExecutor | None = None

    def compile(self, entries: Sequence[tuple[Problem, Config]]) -> None:
        """Have configurations compiled; returns when they are, or patience is at an end."""
        if self._sm is None or not entries:
            return
        end = time.monotonic() + PATIENCE
        try:
            # What all of them share is compiled once, with the first.
            for some in (entries[:1], entries[1:]):
                running = [self._submit(problem, config, self._sm) for problem, config in some]
                done, late = wait(running, max(end - time.monotonic(), 0))
                for future in late:
                    future.cancel()
                for future in done:
                    future.result()
        except BrokenProcessPool:
            # A compiler crashed, and took the others along; without them things are slower.
            self.close()
            self._sm = None

    def _submit(self, problem: Problem, config: Config, sm: int) -> Future:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )
        return self._pool.submit(_compile, self._name, problem, dict(config), sm)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        if self._pool is not None:
            running = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            # The interpreter would wait for them at its end.
            for process in running:
                process.kill()
            self._pool = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    # Before any framework is loaded: the GPU belongs to the one that measures.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HATA_PROFILE"] = "none"


_backends: dict[str, Backend] = {}


def _compile(name: str, problem: Problem, config: Config, sm: int) -> None:
    # A backend is asked to compile where it could not run: `registry.load` would refuse it.
    backend = _backends.get(name) or _backends.setdefault(name, registry.class_of(name)())
    with contextlib.suppress(Exception), use_config(name, problem.op, config):
        backend.compile(problem, sm)
