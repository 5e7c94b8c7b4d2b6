"""Plans: what a call launches, made once per signature and run again with other arrays.

A launcher writes its call into a plan: the arrays it allocates, and its launches. The argument of a
kernel is one struct, in which addresses come first; all that follows them is packed once. A run
allocates, packs the addresses, and launches on the caller's current stream.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem

from . import device as devices
from .device import Described, Device, Kernel, Launch


class Address(NamedTuple):
    """An array of a call and an offset in bytes into it."""

    slot: int
    offset: int = 0


# The last of a run's addresses is null, the one before it that of the scratch.
NONE = Address(-1)
_SCRATCH = -2


class Plan:
    """The launches of a call."""

    def __init__(self, arrays: Sequence[Any], device: Described) -> None:
        self.device = device
        self._slots = {id(x): i for i, x in enumerate(arrays) if x is not None}
        self._given = len(arrays)
        self._made: list[tuple[tuple[int, ...], str]] = []
        self._keep: list[object] = []
        self._scratch = 0
        self.launches: list[tuple[Launch, struct.Struct, tuple[Address, ...], bytes]] = []

    def output(self, shape: tuple[int, ...], dtype: str) -> object:
        """An array that every run allocates; runs return them in order."""
        token = object()
        self._keep.append(token)
        self._slots[id(token)] = self._given + len(self._made)
        self._made.append((shape, dtype))
        return token

    def address(self, x: Any, offset: int = 0) -> Address:
        """An array, or none for `None`, as a field of an argument; `offset` bytes in."""
        return NONE if x is None else Address(self._slots[id(x)], offset)

    def piece(self, size: int) -> Address:
        """Some bytes of scratch, at a multiple of 256."""
        offset = self._scratch
        self._scratch += -(-size // 256) * 256
        return Address(_SCRATCH, offset)

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        shared: int,
        fields: Mapping[str, Address | int | float],
        layout: Mapping[str, str],
        overlap: bool = False,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: What to launch.
            grid: Blocks; a multiple of the kernel's cluster.
            shared: Bytes of dynamic shared memory.
            fields: Values of the argument by the names of `layout`; those left out are 0.
            layout: Name -> `struct` code of the argument's fields, addresses ("P") first.
            overlap: It may start while the launch before it drains (and waits inside).
        """
        addresses, numbers, codes = [], [], "<"
        for name, code in layout.items():
            if code == "P":
                given = fields.get(name, NONE)
                addresses.append(given if isinstance(given, Address) else NONE)
            else:
                codes += code
                numbers.append(fields.get(name, 0))
        packed = struct.pack(codes, *numbers)
        packed += b"\0" * (-len(packed) % 8)
        head = struct.Struct(f"<{len(addresses)}Q")
        launch = Launch(kernel, grid, shared, overlap and bool(self.launches))
        self.launches.append((launch, head, tuple(addresses), packed))

    def run(self, fw: Framework, arrays: Sequence[Any]) -> list[Any]:
        """Allocate and launch; `arrays` are those of this call. Returns what was allocated."""
        if _preparing.get():
            self.load()
            return [None] * len(self._made)
        like = arrays[0]
        made = [fw.empty(shape, dtype, like) for shape, dtype in self._made]
        pointers = [0 if x is None else fw.pointer(x) for x in (*arrays, *made)]
        scratch = fw.empty((self._scratch,), "uint8", like) if self._scratch else None
        pointers += (0 if scratch is None else fw.pointer(scratch), 0)
        with_stream(fw, like, self._launch, pointers)
        return made

    def load(self) -> None:
        """Compile and load what the launches need."""
        assert isinstance(self.device, Device)
        for launch, *_ in self.launches:
            self.device.load(launch.kernel)

    def _launch(self, pointers: list[int], stream: int) -> None:
        device = self.device
        assert isinstance(device, Device)
        for launch, head, addresses, packed in self.launches:
            data = head.pack(*[pointers[slot] + offset for slot, offset in addresses]) + packed
            device.launch(launch, data, stream)


_preparing: ContextVar[bool] = ContextVar("hata_cupy_preparing", default=False)


@contextmanager
def preparing() -> Iterator[None]:
    """Plans that are run in this context load their kernels, and allocate and launch nothing."""
    token = _preparing.set(True)
    try:
        yield
    finally:
        _preparing.reset(token)


def with_stream(
    fw: Framework, like: Any, act: Callable[[list[int], int], None], pointers: list[int]
) -> None:
    """Act on the current stream of the device of `like`, with that device current."""
    if fw.name == "torch":
        torch = sys.modules["torch"]
        index = like.device.index
        if torch.cuda.current_device() == index:
            act(pointers, torch._C._cuda_getCurrentRawStream(index))
        else:
            with torch.cuda.device(index):
                act(pointers, torch._C._cuda_getCurrentRawStream(index))
    else:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.data.device_id):
            act(pointers, cupy.cuda.get_current_stream().ptr)


def device_of(fw: Framework, x: Any) -> Device:
    """The GPU that an array is on."""
    return devices.device(int(fw.device(x).partition(":")[2] or 0))


# A growing cache makes a new signature at every step; the memo is emptied when it is full.
_PLAN_LIMIT = 1024
_plans: dict[tuple, tuple[Plan, object]] = {}


def planned(
    build: Callable[..., None],
    problem: Problem,
    config: Config,
    fw: Framework,
    arrays: tuple[Any, ...],
    *options: Any,
) -> list[Any]:
    """Run the plan that `build(plan, problem, config, fw, *arrays, *options)` writes.

    Returns:
        What the plan's `output`s became, in order.
    """
    key = (problem, id(config), fw.name, options, *_signatures(fw, arrays))
    found = _plans.get(key)
    if found is None:
        plan = written(build, problem, config, fw, arrays, *options)
        if len(_plans) >= _PLAN_LIMIT:
            _plans.clear()
        # Kept with its configuration, whose identity is in the key.
        found = _plans[key] = (plan, config)
    return found[0].run(fw, arrays)


def _signatures(fw: Framework, arrays: tuple[Any, ...]) -> list[Any]:
    """All that a plan for these arrays depends on."""
    if fw.name != "torch":
        return [None if x is None else fw.signature(x) for x in arrays]
    # What `fw.signature` asks besides, such as the class, was checked and costs as much again.
    found: list[Any] = [
        None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in arrays
    ]
    found.append(arrays[0].device)
    return found


def written(
    build: Callable[..., None],
    problem: Problem,
    config: Config,
    fw: Framework,
    arrays: tuple[Any, ...],
    *options: Any,
) -> Plan:
    """A new plan, written by `build`."""
    # One array in two roles must not be taken for the other in a later call.
    views = tuple(None if x is None else View(fw, x) for x in arrays)
    plan = Plan(views, device_of(fw, arrays[0]))
    build(plan, problem, config, *views, *options)
    return plan


class View:
    """What a launcher may know of an array: not where it lies, but how it lies."""

    def __init__(self, fw: Framework, x: Any) -> None:
        self.shape = fw.shape(x)
        self.dtype = fw.dtype(x)
        self.alignment = fw.pointer(x) & 15
        self._strides = fw.strides(x)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """In elements; 0 where there is one element."""
        pairs = zip(self._strides, self.shape, strict=True)
        return tuple(stride if size > 1 else 0 for stride, size in pairs)

    def in_units_of(self, size: int, itemsize: int) -> bool:
        """Whether every row (along the last axis) starts at a multiple of `size` bytes."""
        return self.alignment % size == 0 and all(
            stride * itemsize % size == 0 for stride in self.strides[:-1]
        )


def row_step(x: View | None) -> int:
    """Step between the rows of lengths or starts, in int32; 0 for a scalar, -1 for `None`."""
    if x is None:
        return -1
    if x.shape in ((), (1,)):
        return 0
    return (2 if x.dtype == "int64" else 1) * (x.strides[0] or 1)


def kind(x: View | None, dtype: str) -> int:
    """A bias or sink logits: absent (0), in the dtype of the data (1), or float32 (2)."""
    return 0 if x is None else 1 if x.dtype == dtype else 2
