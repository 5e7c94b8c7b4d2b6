"""Launch lists: what a call of a GPU backend launches, made once per signature and run again.

A backend of this kind writes a call into a `LaunchList`: the results and the workspace that every
run allocates, and its launches, in which arrays stand by the names of the call's fields. A run
allocates, puts together the addresses, and launches on the caller's current stream.

From the lists follow also `hata.prepare`, compiling ahead and the refusal of configurations that do
not fit: they are written for a call, or for one without data, and their kernels are looked at.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

from hata.arrays import ITEMSIZE, Framework
from hata.backend import Config, Kernel, PlanningBackend
from hata.problem import Problem

# Of pieces of the workspace, in bytes.
_ALIGNMENT = 256


class Address(NamedTuple):
    """An array of a call, or `""` for none, and an offset in bytes into it."""

    name: str
    offset: int = 0


NONE = Address("")
_WORKSPACE = "workspace"


class View:
    """How an array of a call lies, not where.

    Attributes:
        shape: Its shape.
        strides: In elements; 0 where there is one element.
        dtype: Its dtype by name.
        alignment: Its address modulo 16.
    """

    def __init__(self, fw: Framework, x: Any) -> None:
        self.shape, self.dtype = fw.shape(x), fw.dtype(x)
        self.alignment = fw.pointer(x) & 15
        pairs = zip(fw.strides(x), self.shape, strict=True)
        self.strides = tuple(stride if size > 1 else 0 for stride, size in pairs)

    def in_units_of(self, size: int) -> bool:
        """Whether every row (along the last axis) starts at a multiple of `size` bytes."""
        itemsize = ITEMSIZE[self.dtype]
        return self.alignment % size == 0 and all(
            stride * itemsize % size == 0 for stride in self.strides[:-1]
        )


def row_step(x: View | None) -> int:
    """Step between the rows of lengths or starts, in int32; 0 for a scalar, -1 for `None`."""
    if x is None:
        return -1
    return 0 if x.shape in ((), (1,)) else 2 if x.dtype == "int64" else 1


class LaunchList:
    """The launches of a call.

    Attributes:
        gpu: What the backend knows of the GPU, which need not be here.
        views: How the arrays of the call lie, by name; `None` where one is not given.
        kernels: What is launched, in order.
    """

    def __init__(self, call: Any, gpu: Any) -> None:
        self.gpu = gpu
        self.views: dict[str, View | None] = {
            name: None if x is None else View(call.fw, x) for name, x in call.arrays().items()
        }
        self.kernels: list[Kernel] = []
        self._call: Any = call
        self._outputs: list[tuple[str, tuple[int, ...], str]] = []
        self._workspace = 0
        # Distinct addresses, and of each launch those that it takes.
        self._addresses: dict[Address, int] = {}
        self._launches: list[tuple[Callable[..., Any], Callable[..., None]]] = []

    def output(self, name: str) -> Address:
        """A result of the call, which every run allocates; runs return them in order."""
        shape, dtype = next(result[1:] for result in self._call.results() if result.name == name)
        self._outputs.append((name, shape, dtype or self._call.problem.dtype))
        return Address(name)

    def address(self, name: str, offset: int = 0) -> Address:
        """An argument of the call, `offset` bytes in; none where it is not given."""
        return NONE if self.views[name] is None else Address(name, offset)

    def piece(self, count: int, itemsize: int = 4) -> Address:
        """Some elements of the workspace, at a multiple of 256 bytes; undefined contents."""
        offset = self._workspace
        self._workspace += -(-count * itemsize // _ALIGNMENT) * _ALIGNMENT
        return Address(_WORKSPACE, offset)

    def launch(
        self, kernel: Kernel, addresses: Sequence[Address], start: Callable[..., None]
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: What is launched.
            addresses: What it takes.
            start: Called as `start(addresses, stream)` with a tuple of ints.
        """
        self.kernels.append(kernel)
        places = [self._addresses.setdefault(at, len(self._addresses)) for at in addresses]
        assert len(places) > 1, "an item getter of one item gives no tuple"
        self._launches.append((itemgetter(*places), start))

    def close(self) -> LaunchList:
        """Nothing more is launched: fix where addresses come from."""
        call = self._call
        # Of the arrays of a run: the call's, then the results, the workspace, and none.
        self.names = [*call._fields[: call.ARRAYS], *(output[0] for output in self._outputs)]
        self.names += [_WORKSPACE, ""]
        slots = {name: slot for slot, name in enumerate(self.names)}
        self._places = [(slots[name], offset) for name, offset in self._addresses]
        self._made = [output[1:] for output in self._outputs]
        # Last, so that results come first.
        self._made.append(((self._workspace,), "uint8"))
        # Its arrays are the caller's alone.
        self._call = None
        self._index = int(call.route.device.partition(":")[2] or 0)
        return self

    def allocate(self, call: Any) -> list[Any]:
        """The results and the workspace, for the arrays of this call."""
        fw, like = call.route.fw, call[0]
        return [fw.empty(shape, dtype, like) for shape, dtype in self._made]

    def run(self, call: Any) -> list[Any]:
        """Allocate and launch for the arrays of this call; returns results and workspace."""
        fw = call.route.fw
        made = self.allocate(call)
        arrays = [*call.addresses, *map(fw.pointer, made), 0]
        addresses = [arrays[slot] + offset for slot, offset in self._places]
        stream = fw.stream(self._index)
        if stream is None:
            with fw.on(self._index):
                self._start(addresses, fw.stream(self._index))
        else:
            self._start(addresses, stream)
        return made

    def _start(self, addresses: list[int], stream: int | None) -> None:
        for pick, start in self._launches:
            start(pick(addresses), stream)


class LaunchingBackend(PlanningBackend):
    """A backend for GPUs whose ops are launch lists.

    Attributes:
        package: Its package: a module for each op, whose `write(launches, call)` writes a call, and
            `defaults`: `KNOBS`, the tunables by op, and `of(problem)`, the default configuration.
    """

    package: ClassVar[str]

    @abstractmethod
    def gpu(self, device: str, sm: int | None) -> Any:
        """What is known of a device that is here, or of one of this capability (90 is 9.0)."""

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def default(self, problem: Problem) -> Config:
        """The configuration of an untuned problem."""
        return self._module("defaults").of(problem)

    def tunables(self, op: str, problem: Problem) -> dict[str, tuple]:
        """The knobs of an op; `defaults` says what each is."""
        return self._module("defaults").KNOBS[op]

    def kernels(self, call: Any, sm: int | None = None) -> Sequence[Kernel]:
        """Every kernel that a call launches."""
        return self.plan(call, sm).kernels

    def plan(self, call: Any, sm: int | None = None) -> LaunchList:
        """The launches of a call, on a GPU of this capability or on the one where it is."""
        launches = self.new_list(call, self.gpu(call.route.device, sm))
        self._module(call.OP).write(launches, call)
        return launches.close()

    def new_list(self, call: Any, gpu: Any) -> LaunchList:
        """An empty list."""
        return LaunchList(call, gpu)
