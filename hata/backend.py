"""`Backend`: what somebody who writes a backend implements.

A backend is one class. It declares as class constants what it can take, says in words why it
cannot run a problem, publishes its knobs as data, and implements launchers. Everything else is
done for it: arguments arrive checked against the contract in `hata.ops`, in the caller's
framework, and `self.config(problem)` is the tuned configuration.

A backend keeps no mutable state on the device between calls and none in Python in a decode step.
Outputs and scratch are allocated with `fw.empty`, by the caller's framework, on every call.

Register one under the entry-point group `hata.backends` (`name = "package:Class"`) and hold it
against `hata.testing.BackendSuite`.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hata.arrays import Framework
from hata.errors import HataDeviceError, HataDTypeError, UnsupportedProblem
from hata.problem import Problem

# Values are int, str or bool; what each knob is, its backend knows.
Config = Mapping[str, Any]

_override: ContextVar[tuple[str, str, Config] | None] = ContextVar("hata_config", default=None)


class Budget(NamedTuple):
    """How many keys a query may attend to.

    Attributes:
        k: Most keys.
        ratio: `round(ratio * 2**32)`, or -1 where the budget is k.
        k_min: Fewest keys where a ratio is given.
        sink: First visible keys that always win.
        recent: Last visible keys that always win.
    """

    k: int
    ratio: int = -1
    k_min: int = 0
    sink: int = 0
    recent: int = 0

    def of(self, visible: int) -> int:
        """The budget of a query that sees `visible` keys (it may exceed `visible`)."""
        if self.ratio < 0:
            return self.k
        return min(
            self.k, max(1, self.k_min, self.sink + self.recent, (visible * self.ratio) >> 32)
        )


class Backend(ABC):
    """An implementation of the ops.

    Class constants:
        name: What `hata.set_backend` takes.
        devices: Kinds of device it runs on: `"cpu"`, `"cuda"`.
        dtypes: dtype names of data it takes.
        frameworks: Names of the frameworks whose arrays it takes: `"torch"`, `"numpy"`, `"cupy"`.
            JAX arrays arrive as NumPy (CPU) or CuPy (GPU) arrays.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "bfloat16"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"numpy", "torch"})

    def __init__(self) -> None:
        self._lookup: Callable[[Backend, Problem], Config | None] | None = None
        self._configs: dict[Problem, Config] = {}

    # What the author of a backend declares.

    @classmethod
    def missing(cls) -> str | None:
        """Why this backend cannot run on this machine; `None` if it can.

        Called before the class is instantiated. Must not raise and must change nothing.
        """
        return None

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this problem cannot run; empty if it can. Called once per problem."""
        return []

    def tunables(self, op: str, problem: Problem) -> dict[str, tuple]:
        """The knobs of an op for a problem: name -> allowed values in ascending order of effort."""
        return {}

    def default(self, problem: Problem) -> Config:
        """The configuration of an untuned problem: for each knob one of its allowed values."""
        return {}

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why a configuration cannot run here although each of its values is allowed.

        Asked of the entry of a profile that would serve, once per problem: kernels may need more
        shared memory than a GPU has, which no single knob shows. `None`: it can.
        """
        return None

    def kernel_hash(self, op: str) -> str:
        """SHA-256 (hex) of the sources behind an op; a tuned entry is valid for one hash only.

        The default hashes every Python and CUDA source beside the class, so that any change of
        the backend asks for a new tuning; of a module that is in no package, that file alone.
        """
        file = Path(inspect.getfile(type(self)))
        sources = [file]
        # A module by itself lies among strangers, such as all of site-packages.
        if _in_package(type(self)):
            sources = sorted([*file.parent.glob("*.py"), *file.parent.glob("*.cu")])
        digest = hashlib.sha256()
        for source in sources:
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
        return digest.hexdigest()

    def prepare(self, problem: Problem) -> None:
        """Compile and load all that a launch of this problem needs. May run kernels."""
        return None

    def prepare_call(self, launcher: str, problem: Problem, fw: Framework, *args: Any) -> None:
        """Compile and load all that one call needs, and run nothing of it: `hata.prepare`.

        The default prepares the problem. A backend overrides it whose kernels depend on more than
        that, such as the alignment of an array or the heads of given query codes.

        Args:
            launcher: Name of the method that the call would go to.
            problem: First argument of that method.
            fw: Second argument.
            *args: All others. Nothing may be written into them.
        """
        self.prepare(problem)

    def compile(self, problem: Problem, sm: int) -> None:
        """Compile what launches of this problem need into a cache on disk; needs no GPU.

        The tuner calls it for configurations that it will try (`use_config`), in several processes
        at a time, in which no GPU is visible and `missing` was not asked. Whatever it does not do,
        the first launch does: the default does nothing.

        Args:
            problem: What will be launched.
            sm: Compute capability of the GPU as one number (90 is 9.0).
        """
        return None

    # What the author of a backend implements. Arguments are those of `hata.ops`, checked.

    @abstractmethod
    def launch_encode(
        self,
        problem: Problem,
        fw: Framework,
        x: Any,
        projection: Any,
        bias: Any,
        out: Any,
        norms: Any,
    ) -> Any:
        """Run `hata.encode`; `out` and `norms` are given or `None`. Returns the codes."""

    @abstractmethod
    def launch_hamming_topk(
        self,
        problem: Problem,
        fw: Framework,
        q_codes: Any,
        k_codes: Any,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        per_head: bool,
    ) -> Any:
        """Run `hata.hamming_topk`. Returns the indices, `[B, heads, T, budget.k]` int32."""

    @abstractmethod
    def launch_sparse_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        indices: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Run `hata.sparse_attend`. Returns `(out, lse)`; lse may be `None` if not asked for."""

    @abstractmethod
    def launch_hash_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        key_codes: Any,
        projection: Any,
        bias: Any,
        query_projection: Any,
        query_bias: Any,
        q_codes: Any,
        fresh: int,
        dense_below: int,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Run `hata.hash_attend`. Returns `(out, lse)`; lse may be `None` if not asked for.

        Both projections are arrays, also where the caller gave none: then they are one of the right
        shape, in q's dtype, with undefined contents, `q_codes` is given and `fresh` is 0.
        """

    # What every backend has.

    def config(self, problem: Problem) -> Config:
        """The configuration in force for a problem: the profile's, else the default."""
        override = _override.get()
        if override is not None and override[0] == self.name and override[1] == problem.op:
            return override[2]
        configs = self._configs
        config = configs.get(problem)
        if config is None:
            found = self._lookup(self, problem) if self._lookup is not None else None
            config = configs[problem] = found or self.default(problem)
        return config

    def look_up_with(self, lookup: Callable[[Backend, Problem], Config | None] | None) -> None:
        """Take configurations from `lookup` from now on (the registry, when a profile changes)."""
        self._lookup = lookup
        # A new dict: a thread that is looking up by what was in force writes into the old one.
        self._configs = {}

    def accept(self, problem: Problem, fw: Framework, device: str) -> None:
        """Raise unless this backend runs `problem` on arrays of `fw`. Memoised by the caller."""
        kind = device.partition(":")[0]
        if kind not in self.devices:
            fix = "reference" if kind == "cpu" else "triton"
            raise HataDeviceError(
                f"backend {self.name!r}: got arrays on {device}, expected "
                f"{' or '.join(sorted(self.devices))}; move the arrays, or "
                f"hata.set_backend({fix!r}), or hata.set_backend('auto')"
            )
        if fw.name not in self.frameworks and not fw.foreign:
            raise HataDTypeError(
                f"backend {self.name!r}: got {fw.name} arrays, expected arrays of "
                f"{', '.join(sorted(self.frameworks))}; convert them or use another backend"
            )
        if problem.dtype not in self.dtypes | {"uint8"}:
            raise HataDTypeError(
                f"backend {self.name!r}: got {problem.dtype}, expected one of "
                f"{', '.join(sorted(self.dtypes))}"
            )
        reasons = self.unsupported(problem)
        if reasons:
            raise UnsupportedProblem(
                f"backend {self.name!r} cannot run {problem.op}: {'; '.join(reasons)}; "
                "use another backend, or hata.set_backend('auto')"
            )


def _in_package(backend_class: type[Backend]) -> bool:
    """Whether the module of a class is a package or a part of one."""
    name = backend_class.__module__
    return "." in name or hasattr(sys.modules.get(name), "__path__")


@contextmanager
def use_config(backend: str, op: str, config: Config) -> Iterator[None]:
    """Run an op of a backend with a given configuration in this context (for tuners and tests)."""
    token = _override.set((backend, op, config))
    try:
        yield
    finally:
        _override.reset(token)
