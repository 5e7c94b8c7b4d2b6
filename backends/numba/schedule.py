"""How the CPU kernels run: compiled workers, and tickets that share work among threads.

A call is one record of int64 words in memory (see `record`). A worker is a compiled C function of
that record's address: it draws tickets (an atomic counter) until none are left. Tickets are drawn
in order and an item waits only for items of lower tickets, which are already in the hands of
running threads, so one worker alone finishes the call and several cannot deadlock. That makes a
whole op one parallel region, whatever its phases.

Helper threads sleep on a semaphore. A call wakes them, works itself, and returns when all items are
done: not when all helpers have woken, so a helper that finds its core taken (by the spinning pool
of another library, say) delays nobody, unlike in a fork and join. One call at a time has the
helpers; a call from another thread meanwhile runs alone, which gives the same bits. Semaphores are
POSIX ones; elsewhere than on Linux every call runs on its own thread.
"""

import ctypes
import hashlib
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.core import config
from numba.core.caching import FunctionCache
from numba.core.errors import NumbaError

from .intrinsics import call_address, fetch_add, load_acquire, load_i64, store_64

# Threads of a call: the calling one, or as many as numba may use (NUMBA_NUM_THREADS).
THREADS = ("one", "all")
_ALL: int = config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
# Byte offsets of the words of a call's control memory.
TICKET, SLOT, YIELD, COUNTERS = 0, 8, 16, 24
# Looks at a counter before a waiting thread offers its core to others.
_SPINS = 200
# Byte offsets of the words that helpers share; a semaphore stands at the last.
_ACTIVE, _ASLEEP, _RECORD, _FUNCTION, _WAIT, _POST, _SEMAPHORE = range(0, 448, 64)

_OPTIONS = {"error_model": "numpy", "boundscheck": False}

# Parts of kernels are called by kernels only: entry points for Python would double compile time.
# Their parameters are int64, but for `call` and `run`, which are parts of a record.
_PART = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}

device = njit(**_PART)
inlined = njit(forceinline=True, **_PART)
# Inlined as source; LLVM would compile what it calls once more for every worker.
pasted = njit(inline="always", **_PART)


def _entry(name: str) -> int:
    """Address of a function of the C library."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


# Threads are shared, and so anybody waits, on Linux only.
_SCHED_YIELD = _entry("sched_yield") if sys.platform == "linux" else 0


@inlined
def draw(run) -> int:
    """The next ticket of a call."""
    return fetch_add(run.control + TICKET, 1)


@inlined
def wait(run, counter, amount) -> None:
    """Wait until a counter shows that `amount` items of an earlier phase are done."""
    spins = 0
    while load_acquire(counter) < amount:
        spins += 1
        if spins > _SPINS:
            # the thread that has the item may be waiting for this core
            call_address(load_i64(run.control + YIELD), 0)


@inlined
def claim(run, revision) -> int:
    """The scratch of this worker, whose first word is zero; 0 if there is none left for it.

    A worker has to mention the revision of the sources, which is never 0.
    """
    left = -fetch_add(run.control + SLOT, 1)
    if left <= 0 or revision == 0:
        return 0
    mine = run.scratch + (left - 1) * run.scratch_bytes
    store_64(mine, 0)
    return mine


def control_words(counters: int, threads: int) -> list[int]:
    """The control memory of a call: no ticket drawn, `threads` scratch slots, zero counters."""
    return [0, -threads, _SCHED_YIELD, *[0] * counters]


# numba's disk cache looks at a kernel's own file only; a change in any file must count
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
REVISION = int.from_bytes(hashlib.sha256(_SOURCES).digest()[:7], "little")


def _compiled(body: Callable, *arguments: Any) -> Any:
    signature = types.void(*arguments)
    cached, plain = (cfunc(signature, cache=cache, **_OPTIONS) for cache in (True, False))
    try:
        return cached(body)
    except NumbaError:
        raise
    except Exception as error:
        # unpickling damaged files may raise anything
        first = error
    try:
        cache = FunctionCache(body)
    except RuntimeError:
        # no folder that the cache could be written to
        return plain(body)
    try:
        # an empty index in place of this kernel's; its code is then written anew
        cache.flush()
        made = cached(body)
    except NumbaError:
        raise
    except Exception:
        made = plain(body)
    _warn_of_cache(cache.cache_path, first)
    return made


_warning = threading.Lock()
_warned: set[str] = set()


def _warn_of_cache(folder: str, error: Exception) -> None:
    """Warn of a cache folder, once in a process, however many kernels lie there."""
    with _warning:
        if folder in _warned:
            return
        _warned.add(folder)
    warnings.warn(
        f"numba's cache folder {folder} holds damaged files or cannot be written "
        f"({type(error).__name__}: {error}): those of HATA's kernels are compiled anew; if this "
        "comes again, clear the folder, or set NUMBA_CACHE_DIR to one that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _make_helper(revision: int) -> Any:
    def helper(shared):
        while revision != 0:
            fetch_add(shared + _ASLEEP, 1)
            # a signal ends the wait early
            while call_address(load_i64(shared + _WAIT), shared + _SEMAPHORE) != 0:
                pass
            # the record of a call stays valid while a helper that saw it is active
            fetch_add(shared + _ACTIVE, 1)
            record = fetch_add(shared + _RECORD, 0)
            if record != 0:
                call_address(load_i64(shared + _FUNCTION), record)
            fetch_add(shared + _ACTIVE, -1)

    return helper


def _make_lead(revision: int) -> Any:
    def lead(shared, function, record, threads, yielding):
        if revision == 0:
            return
        store_64(shared + _FUNCTION, function)
        fetch_add(shared + _RECORD, record)
        wake = min(load_acquire(shared + _ASLEEP), threads - 1)
        fetch_add(shared + _ASLEEP, -wake)
        for _ in range(wake):
            call_address(load_i64(shared + _POST), shared + _SEMAPHORE)
        call_address(function, record)
        fetch_add(shared + _RECORD, -record)
        spins = 0
        while fetch_add(shared + _ACTIVE, 0) != 0:
            spins += 1
            if spins > _SPINS:
                call_address(yielding, 0)

    return lead


class _Pool:
    """The helper threads of this process, started at the first call that shares its work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._shared = 0
        self._lead: Any = None

    def start(self) -> None:
        """Start the helpers."""
        # never freed: helpers use it for as long as the process lives
        memory = np.zeros(1024, np.uint8)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        shared = (address_of(memory) + 63) // 64 * 64
        for offset, name in ((_WAIT, "sem_wait"), (_POST, "sem_post")):
            ctypes.c_int64.from_address(shared + offset).value = _entry(name)
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(shared + _SEMAPHORE), 0, 0)
        # kept by the pool: its machine code must outlive the threads
        self._helper = _compiled(_make_helper(REVISION), types.int64)
        for number in range(1, _ALL):
            threading.Thread(
                target=self._helper.ctypes, args=(shared,), name=f"hata-{number}", daemon=True
            ).start()
        self._lead = _compiled(_make_lead(REVISION), *(types.int64,) * 5).ctypes
        self._shared = shared

    def run(self, function: int, record: int, threads: int) -> None:
        """Run a worker here and on up to `threads - 1` helpers. The caller holds the lock."""
        if not self._shared:
            self.start()
        self._lead(self._shared, function, record, threads, _SCHED_YIELD)


_pool = _Pool()


def _renew_pool() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    # a forked child has none of the threads, and perhaps a lock that nobody will release
    os.register_at_fork(after_in_child=_renew_pool)


class Worker:
    """A compiled worker: a kernel, as `hata.backend.Backend.kernels` lists them.

    `make(revision)` returns the function `worker(address)` of a record. It must mention `revision`,
    which ties the cached machine code to the sources of this package.
    """

    def __init__(self, make: Callable[[int], Callable[[int], None]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._function: Any = None
        self._call: Any = None
        self._address = 0

    def load(self, device: str = "cpu") -> None:
        """Compile the worker, or load it from numba's disk cache."""
        with self._lock:
            if self._function is None:
                # Kept: its machine code must outlive every call.
                self._function = _compiled(self._make(REVISION), types.int64)
                self._call = self._function.ctypes
                self._address = self._function.address

    def compile(self, sm: int) -> None:
        """Compile it into the disk cache."""
        self.load()

    def misfit(self, sm: int, smem: int) -> None:
        """It runs on every CPU."""

    def run(self, record: int, threads: int) -> None:
        """Run the call whose record is at an address on at most `threads` threads."""
        if not self._address:
            self.load()
        pool = _pool
        if threads > 1 and pool.lock.acquire(blocking=False):
            try:
                pool.run(self._address, record, threads)
            finally:
                pool.lock.release()
        else:
            self._call(record)


def workers(threads: str) -> int:
    """Number of threads that a `threads` knob stands for."""
    return _ALL if threads == "all" and sys.platform == "linux" else 1


def address_of(array: np.ndarray) -> int:
    """Address of a NumPy array's first byte."""
    return array.__array_interface__["data"][0]
