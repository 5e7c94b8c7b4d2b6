"""A process for kernels to crash, hang or run out of memory in.

`Bench` does the work: it builds inputs, checks candidates and times them. `Worker` is the same in a
child process that lives on from candidate to candidate; when it dies or does not answer in time it
is replaced, and the candidate at fault gets a `Failure`. The child ends with its parent, whatever
ends the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from hata import registry
from hata.backend import Config
from hata.errors import HataError
from hata.measure.inputs import Inputs
from hata.problem import Problem
from tune import cost
from tune.trial import Checker, race

# Kinds of failure.
WRONG, ERROR, CRASH, HANG, MEMORY = "wrong_result", "error", "crash", "hang", "out_of_memory"
_PR_SET_PDEATHSIG = 1

Case = tuple[Problem, Config]


class Failure(NamedTuple):
    """Why a candidate cannot be chosen."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class CandidateFailed(Exception):
    """A candidate failed while several were timed, or while a machine was probed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Bench:
    """Checks and times configurations of one backend, in this process."""

    def __init__(self, backend: str, *, pool: int | None = None, keep: int = 1) -> None:
        self._backend = registry.load(backend)
        self._pool, self._keep = pool, keep
        self._held: dict[Problem, Checker] = {}

    def held(self, problem: Problem) -> Checker:
        """A problem's inputs and checks; those of the last few are kept."""
        if problem not in self._held:
            while len(self._held) >= self._keep:
                del self._held[next(iter(self._held))]
                _ask_gpu("empty_cache")
            inputs = Inputs(self._backend, problem, pool=self._pool)
            self._held[problem] = Checker(self._backend, inputs)
        return self._held[problem]

    def check(self, problem: Problem, config: Config) -> str | None:
        """What is wrong with a configuration's results; `None` if nothing is."""
        return self.held(problem).fault(config)

    def race(self, entries: Sequence[Case], seconds: float, **rounds: int) -> list[list[float]]:
        """Time checked configurations against each other; see `tune.trial`."""
        self._keep = max(self._keep, len({problem for problem, _ in entries}))
        racers = [(self.held(problem).inputs, config) for problem, config in entries]
        return race(self._backend, racers, seconds=seconds, **rounds)

    def forget(self) -> None:
        """Drop all inputs, so that the next candidate finds the memory that this one did not."""
        self._held.clear()
        gc.collect()
        _ask_gpu("empty_cache")

    def calibrate(self, device: str) -> cost.Machine:
        """The constants of the analytic model; see `tune.cost`."""
        return cost.calibrate(self._backend, device)


def _ask_gpu(action: str) -> None:
    """Have torch do something to the GPU, if that is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        getattr(torch.cuda, action)()


def gpu_fault() -> str | None:
    """Why all further work of this process on the GPU fails, as after an illegal access, if so."""
    try:
        _ask_gpu("synchronize")
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _serve(connection: Connection, parent: int, backend: str, options: dict[str, Any]) -> None:
    """Body of the child: answer requests until the parent, or the GPU, is gone."""
    # Ctrl-C goes to the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    # Only profiles in the making are tuned, and a broken one must not stop its renewal.
    os.environ["HATA_PROFILE"] = "none"
    bench: Bench | None = None
    # Before it is asked for; what goes wrong is told when it is.
    with contextlib.suppress(Exception):
        bench = Bench(backend, **options)
    while True:
        try:
            method, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        try:
            bench = bench or Bench(backend, **options)
            answer = getattr(bench, method)(*args, **kwargs)
        # Kernels are somebody else's code: whatever they raise is an answer.
        except BaseException as error:
            answer = _failure(error)
        lost = gpu_fault() if isinstance(answer, Failure) else None
        if lost is not None:
            # Whatever came next would fail too: the parent starts another process.
            answer = Failure(CRASH, f"{answer.detail}; the GPU is lost to it: {lost}")
        connection.send((answer, lost is None))
        if lost is not None:
            return
        if isinstance(answer, Failure) and answer.kind == MEMORY and bench is not None:
            bench.forget()


def _failure(error: BaseException) -> Failure:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    if isinstance(error, MemoryError):
        return Failure(MEMORY, str(error) or "no memory was left")
    # torch and CuPy have exceptions for it, the driver has words.
    if "OutOfMemory" in type(error).__name__ or "out of memory" in text:
        return Failure(MEMORY, text)
    if not isinstance(error, HataError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text += f" ({Path(frame.filename).name}:{frame.lineno})"
    return Failure(ERROR, text)


def die_with(parent: int) -> None:
    """End this process when its parent ends, even while a kernel hangs; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # When memory runs out, this process is the one to go, not the one that remembers.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except (OSError, AttributeError):
        pass
    if os.getppid() != parent:
        os._exit(1)


def _sound(answer: Any) -> Any:
    if isinstance(answer, Failure):
        raise CandidateFailed(answer)
    return answer


class Worker(contextlib.AbstractContextManager):
    """A `Bench` in a child process.

    `first_seconds` are the patience with the first answer about a problem, which may have to
    compile, and `check_seconds` with every later one; backend and options are those of `Bench`.
    """

    def __init__(
        self, backend: str, *, first_seconds: float = 180.0, check_seconds: float = 30.0,
        **options: Any,
    ) -> None:  # fmt: skip
        self._backend, self._options = backend, options
        self._first, self._later = first_seconds, check_seconds
        self._process: Any = None
        self._connection: Connection | None = None
        self._seen: set[Problem] = set()
        self._good: dict[Problem, dict] = {}
        self.restarts = 0

    def check(self, problem: Problem, config: Config) -> Failure | None:
        """Run a configuration and hold it against the reference; `None` if it is right."""
        config = dict(config)
        good = self._good.setdefault(problem, config)
        if problem not in self._seen and good != config:
            # A new process builds inputs and compiles with what is known to end, so that this
            # candidate need not be given the time for that.
            self._ask(self._first, "check", problem, good)
            self._seen.add(problem)
        patience = self._later if problem in self._seen else self._first
        wrong = self._ask(patience, "check", problem, config)
        if isinstance(wrong, Failure):
            if good is config:
                del self._good[problem]
            return wrong
        self._seen.add(problem)
        return None if wrong is None else Failure(WRONG, wrong)

    def race(self, entries: Sequence[Case], seconds: float, **rounds: int) -> list[list[float]]:
        """Samples of each entry in microseconds, one a round; or raises `CandidateFailed`."""
        fresh = any(problem not in self._seen for problem, _ in entries)
        patience = seconds + (self._first if fresh else self._later)
        plain = [(problem, dict(config)) for problem, config in entries]
        return _sound(self._ask(patience, "race", plain, seconds, **rounds))

    def calibrate(self, device: str) -> cost.Machine:
        """The constants of the analytic model; raises `CandidateFailed` if the defaults fail."""
        return _sound(self._ask(self._first, "calibrate", device))

    def _ask(self, patience: float, method: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of the `Bench` answers, or a `Failure`."""
        connection = self.start()
        try:
            connection.send((method, args, kwargs))
            if not connection.poll(patience):
                self.close()
                return Failure(HANG, f"no answer within {patience:.0f} s")
            answer, lives_on = connection.recv()
            if not lives_on:
                self.close()
        except (EOFError, OSError):
            return Failure(CRASH, self._end())
        except BaseException:
            # Interrupted between question and answer: the next answer would be the wrong one.
            self.close()
            raise
        return answer

    def start(self) -> Connection:
        """Have the child load its frameworks, without waiting for it."""
        if self._connection is not None:
            return self._connection
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        given = theirs, os.getpid(), self._backend, self._options
        self._process = spawn.Process(target=_serve, args=given, daemon=True, name="hata-tune")
        self._process.start()
        theirs.close()
        self._seen.clear()
        self.restarts += 1
        return self._connection

    def _end(self) -> str:
        """How the child ended, in words."""
        self._process.join(5)
        code = self._process.exitcode
        self.close()
        if code is None or code >= 0:
            return f"the process ended with code {code}"
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"

    def close(self) -> None:
        """End the child."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(10)
            self._connection = self._process = None

    def __exit__(self, *_: object) -> None:
        self.close()
