"""`Backend`: what somebody who writes a backend implements.

A backend is one class with a method for each op. It declares as class constants what it can take,
says in words why it cannot run a problem, and publishes its knobs as data. Everything else is done
for it: a call arrives checked against the contract in `hata.ops` and completed (defaults filled in,
sizes clipped to S), its arrays in the caller's framework, with the tuned configuration as
`call.config`.

A backend keeps no mutable state on the device between calls and none in Python in a decode step.
Outputs and workspaces are allocated with `call.fw.empty`, by the caller's framework, on every call.

Register one under the entry-point group `hata.backends` (`name = "package:Class"`) and hold it
against `hata.testing.BackendSuite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from hata import checks
from hata.arrays import Framework
from hata.call import Encode, HammingTopK, HashAttend, SparseAttend, examples, visible
from hata.errors import HataDeviceError, HataDTypeError, UnsupportedProblem
from hata.problem import Problem

# Values are int, str or bool; what each knob is, its backend knows.
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Override:
    """A configuration given in a context, told apart by its identity."""

    backend: str
    op: str
    identity: int
    config: Config = field(compare=False)


override: ContextVar[Override | None] = ContextVar("hata_config", default=None)


class Kernel(Protocol):
    """A kernel in one variant: what `Backend.kernels` lists."""

    def load(self, device: str) -> Any:
        """Compile and load it on a device, such as `"cuda:0"`, once."""

    def compile(self, sm: int) -> Any:
        """Compile it for a compute capability (90 is 9.0) into a cache on disk; needs no GPU."""

    def misfit(self, sm: int, smem: int) -> str | None:
        """Why it cannot run on a GPU with `smem` bytes of shared memory a block, if so."""


class Backend(ABC):
    """An implementation of the ops.

    Class constants:
        name: What `hata.set_backend` takes.
        devices: Kinds of device it runs on: `"cpu"`, `"cuda"`, or those of a plug-in.
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

    # What the author of a backend implements. Calls arrive checked and completed.

    @abstractmethod
    def encode(self, call: Encode) -> Any:
        """Run `hata.encode`: fill `call.out` and `call.norms` where given. Returns the codes."""

    @abstractmethod
    def hamming_topk(self, call: HammingTopK) -> Any:
        """Run `hata.hamming_topk`. Returns the indices, `[B, heads, T, call.k]` int32."""

    @abstractmethod
    def sparse_attend(self, call: SparseAttend) -> tuple[Any, Any]:
        """Run `hata.sparse_attend`. Returns `(out, lse)`; lse may be `None` if not asked for."""

    def hash_attend(self, call: HashAttend) -> tuple[Any, Any]:
        """Run `hata.hash_attend`. Returns `(out, lse)`; lse may be `None` if not asked for.

        The default runs the three ops, and reads lengths on the host where keys are fresh or short
        rows dense: right everywhere, and meant for the CPU.
        """
        q, keys, tokens = call.q, call.keys, call.q.shape[2]
        q_codes = call.q_codes
        if q_codes is None:
            q_codes = self._part(Encode(q, call.query_projection, call.query_bias))
        spans = list(visible(call))
        for b, t, start, stop in spans:
            if call.fresh and t == tokens - 1:
                rows = slice(b, b + 1), slice(None), slice(max(start, stop - call.fresh), stop)
                norms = None if call.key_norms is None else call.key_norms[rows]
                codes = call.key_codes[rows]
                self._part(Encode(keys[rows], call.projection, call.bias, codes, norms))
        arrays = q_codes, call.key_codes, call.lengths, call.starts, call.key_norms
        # Clipped to the slots one by one, those that always win may be more than k.
        k = max(call.k, call.sink + call.recent)
        numbers = k, call.ratio, call.k_min, call.sink, call.recent
        indices = self._part(HammingTopK(*arrays, *numbers))
        if call.dense_below:
            short = self._part(HammingTopK(*arrays, max(k, call.dense_below)))
            for b, t, start, stop in spans:
                if stop - start > call.dense_below:
                    short[b, :, t, :k] = indices[b, :, t]
                    short[b, :, t, k:] = -1
            indices = short
        arrays = q, keys, call.values, indices, call.sink_logits
        return self._part(SparseAttend(*arrays, call.scale, call.softcap, call.return_lse))

    def _part(self, part: Any) -> Any:
        """Run another op for a part of a call."""
        return getattr(self, part.OP)(self._completed(part))

    def _completed(self, call: Any, config: Config | None = None) -> Any:
        """A call as it comes from `hata.dispatch`, with the configuration in force or this one."""
        route, arrays = checks.check(call), call[: call.ARRAYS]
        route.backend = self
        route.config = self.config(route.problem) if config is None else config
        return call.complete(arrays, route, route.fw.signatures(arrays)[1])

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

    def kernels(self, call: Any, sm: int | None = None) -> Sequence[Kernel]:
        """Every kernel that a call launches, none of which is launched or loaded.

        From this follow `hata.prepare`, compiling ahead and the refusal of configurations that do
        not fit. The default lists none: then whatever is to be compiled, the first launch compiles.

        Args:
            call: A call with its route; arrays may be `hata.arrays.Layout`, which have no data.
            sm: Compute capability to assume (90 is 9.0); `None`: of the device of the arrays.
        """
        return ()

    def kernel_hash(self, op: str) -> str:
        """SHA-256 (hex) of the sources behind an op; a tuned entry is valid for one hash only.

        The default covers what the op's module in the backend's package reaches, by imports and by
        `#include`, but for docstrings and comments; see `hata.sources`.
        """
        from hata import sources

        return sources.digest(type(self), op)

    # What every backend has.

    def prepare(self, call: Any) -> None:
        """Compile and load what a call launches, on the device of its arrays."""
        for kernel in self.kernels(call):
            kernel.load(call.route.device)

    def ahead(self, problem: Problem, config: Config, sm: int) -> list[Kernel]:
        """Every kernel that calls which pose a problem may launch where the capability is `sm`."""
        found: dict[Kernel, None] = {}
        for call in examples(problem):
            found |= dict.fromkeys(self.kernels(self._completed(call, config), sm))
        return list(found)

    def refusal(self, problem: Problem, config: Config, sm: int, smem: int) -> str | None:
        """Why a configuration cannot run although each of its values is allowed, if so.

        Kernels may need more shared memory than the `smem` bytes that a block has on a GPU, which
        no single knob shows; they are compiled to see.
        """
        reasons = (kernel.misfit(sm, smem) for kernel in self.ahead(problem, config, sm))
        return next((reason for reason in reasons if reason is not None), None)

    def config(self, problem: Problem) -> Config:
        """The configuration in force for a problem: the profile's, else the default."""
        given = override.get()
        if given is not None and given.backend == self.name and given.op == problem.op:
            return given.config
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
            fix = {"cpu": "numba", "cuda": "triton"}.get(kind)
            named = f"hata.set_backend({fix!r}), or " if fix else ""
            raise HataDeviceError(
                f"backend {self.name!r}: got arrays on {device}, expected "
                f"{' or '.join(sorted(self.devices))}; move the arrays, or "
                f"{named}hata.set_backend('auto')"
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


class PlanningBackend(Backend):
    """A backend whose calls follow plans, each made once for all calls with one signature."""

    @abstractmethod
    def plan(self, call: Any) -> Any:
        """The plan of a call: its `run(call)` gives the results that it allocates, in order."""

    def encode(self, call: Encode) -> Any:
        """Run `hata.encode`."""
        made = self._run(call)
        return made[0] if call.out is None else call.out

    def hamming_topk(self, call: HammingTopK) -> Any:
        """Run `hata.hamming_topk`."""
        return self._run(call)[0]

    def sparse_attend(self, call: SparseAttend | HashAttend) -> tuple[Any, Any]:
        """Run `hata.sparse_attend` or `hata.hash_attend`."""
        made = self._run(call)
        return made[0], made[1] if call.return_lse else None

    hash_attend = sparse_attend

    def _run(self, call: Any) -> list[Any]:
        plan = call.route.memo
        if plan is None:
            plan = call.route.memo = self.plan(call)
        return plan.run(call)


@contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """In this context a variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def use_config(backend: str, op: str, config: Config) -> AbstractContextManager[None]:
    """Run an op of a backend with a given configuration in this context (for tuners and tests)."""
    return setting(override, Override(backend, op, id(config), config))
