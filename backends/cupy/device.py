"""GPUs, the kernels loaded on them, and launches.

What a launch is given is never changed afterwards, so threads may share it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from hata.errors import HataCaptureError
from hata.launches import NONE, LaunchList

from . import compiler, driver
from .compiler import Constants


class Kernel(NamedTuple):
    """A variant of a kernel.

    Attributes:
        name: Of the source, and of the function in it.
        constants: Its compile-time constants.
        threads: Threads a block.
        cluster: Blocks a cluster; 1: no cluster.
        cooperative: All blocks of a launch run at the same time, or the driver refuses it.
    """

    name: str
    constants: Constants
    threads: int
    cluster: int = 1
    cooperative: bool = False

    def load(self, device: str) -> None:
        """Compile and load it on a device, once."""
        device_of(device).load(self)

    def compile(self, sm: int) -> None:
        """Compile it into the folder of cubins; needs no GPU."""
        compiler.cubin(self.name, self.constants, sm)

    def misfit(self, sm: int, smem: int) -> None:
        """It always fits: what it needs of shared memory follows from what there is."""


# Multiprocessors, and bytes of shared memory that a block may have, of the largest GPU of a compute
# capability; of others, those of the nearest one below.
_LARGEST = {80: (108, 163), 86: (84, 99), 87: (16, 163), 89: (142, 99), 90: (132, 227),
            100: (148, 227), 120: (188, 99)}  # fmt: skip


class Described:
    """A GPU that need not be here: what launchers ask of one.

    Attributes:
        architecture: Compute capability as one number.
        sms: Multiprocessors.
        shared: Bytes of shared memory that a block may have.
        clusters: Most blocks that a cluster may have; 1: it knows no clusters.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        nearest = max((n for n in _LARGEST if n <= architecture), default=80)
        self.sms, kilobytes = _LARGEST[nearest]
        self.shared = kilobytes * 1024
        self.clusters = 1 if architecture < 90 else {9: 16, 10: 16}.get(architecture // 10, 8)

    def at_once(self, size: int, resident: int) -> int:
        """Rows of `size` blocks that it holds at once, with `resident` blocks a multiprocessor."""
        return self.sms * resident // size


class Device(Described):
    """A GPU that is here, and the kernels loaded on it."""

    def __init__(self, ordinal: int) -> None:
        self._library = library = driver.library()
        self._device = ctypes.c_int()
        self._check(library.cuDeviceGet(ctypes.byref(self._device), ordinal), "cuDeviceGet")
        super().__init__(10 * self._attribute(driver.MAJOR) + self._attribute(driver.MINOR))
        self.sms = self._attribute(driver.SMS)
        self.shared = self._attribute(driver.SHARED)
        self._context: ctypes.c_void_p | None = None
        self._functions: dict[Kernel, ctypes.c_void_p] = {}
        self._at_once: dict[tuple[int, int], int] = {}

    def _check(self, code: int, what: str) -> None:
        driver.checked(self._library, code, what)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        code = self._library.cuDeviceGetAttribute(ctypes.byref(value), number, self._device)
        self._check(code, "cuDeviceGetAttribute")
        return value.value

    def _primary(self) -> ctypes.c_void_p:
        """The context that the frameworks use."""
        if self._context is None:
            context = ctypes.c_void_p()
            code = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
            self._check(code, "cuDevicePrimaryCtxRetain")
            self._context = context
        return self._context

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make this GPU the current one of this thread for a while."""
        code = self._library.cuCtxPushCurrent_v2(self._primary())
        self._check(code, "cuCtxPushCurrent")
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    @contextmanager
    def _beside_captures(self) -> Iterator[None]:
        """What this thread does meanwhile is no part of a CUDA graph that it captures."""
        mode = ctypes.c_int(driver.RELAXED)
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def load(self, kernel: Kernel, stream: int = 0) -> ctypes.c_void_p:
        """Compile and load a kernel, once."""
        found = self._functions.get(kernel)
        if found is not None:
            return found
        status = ctypes.c_int()
        self._library.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
        if status.value:
            raise HataCaptureError(
                f"{kernel.name}: this call is not prepared, and kernels cannot be loaded while a "
                "CUDA graph is captured; call hata.prepare with the same arguments, or make the "
                "call once, before the capture"
            )
        code = compiler.cubin(kernel.name, kernel.constants, self.architecture)
        with self._current():
            return self._functions.setdefault(kernel, self._loaded(kernel, code))

    def _loaded(self, kernel: Kernel, code: bytes) -> ctypes.c_void_p:
        library = self._library
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(library.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        self._check(
            library.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()),
            "cuModuleGetFunction",
        )
        if kernel.cluster > 8:
            self._check(
                library.cuFuncSetAttribute(function, driver.LARGE_CLUSTERS, 1), "large clusters"
            )
        static = ctypes.c_int()
        self._check(library.cuFuncGetAttribute(ctypes.byref(static), 1, function), "shared memory")
        self._check(
            library.cuFuncSetAttribute(function, driver.MOST_SHARED, self.shared - static.value),
            "shared memory",
        )
        # As much as there is: else the driver may leave room for one block where two would fit.
        self._check(library.cuFuncSetAttribute(function, driver.CARVEOUT, 100), "shared memory")
        return function

    def at_once(self, size: int, resident: int) -> int:
        """Rows of `size` blocks that it holds at once, with `resident` blocks a multiprocessor.

        A cluster lies within a group of multiprocessors, and how many of those a GPU has, and of
        what sizes, differs from chip to chip: the driver knows.
        """
        if size > self.clusters or size == 1:
            return super().at_once(size, resident)
        found = self._at_once.get((size, resident))
        if found is None:
            found = self._at_once[size, resident] = self._ask(size, resident)
        return found

    def _ask(self, size: int, resident: int) -> int:
        with self._beside_captures():
            function = self.load(Kernel("probe", (), 128, size))
        attribute = (driver.Attribute * 1)()
        attribute[0].id = driver.CLUSTER
        attribute[0].value.dims[:] = (size, 1, 1)
        room = (self.shared + 1024) // resident - 1024
        config = driver.LaunchConfig((size, 1, 1), (128, 1, 1), room, None, attribute, 1)
        found = ctypes.c_int()
        with self._current():
            code = self._library.cuOccupancyMaxActiveClusters(
                ctypes.byref(found), function, ctypes.byref(config)
            )
        self._check(code, "cuOccupancyMaxActiveClusters")
        return found.value

    def starter(self, launch: Launch, stream: int) -> Callable[[bytes], None]:
        """What starts a launch on a stream, given its argument."""
        kernel = launch.kernel
        function = self.load(kernel, stream)
        attributes = (driver.Attribute * 3)()
        count = 0
        for number, kind, value in (
            (driver.CLUSTER, "dims", (kernel.cluster, 1, 1) if kernel.cluster > 1 else None),
            (driver.COOPERATIVE, "flag", int(kernel.cooperative)),
            (driver.PDL, "flag", int(launch.pdl)),
        ):
            if value:
                attributes[count].id = number
                setattr(attributes[count].value, kind, value)
                count += 1
        config = driver.LaunchConfig(
            (launch.grid, 1, 1), (kernel.threads, 1, 1), launch.shared, stream, attributes, count
        )
        address, library = ctypes.addressof(config), self._library
        start, argument = library.cuLaunchKernelEx, driver.OneArgument

        def launched(data: bytes) -> None:
            code = start(address, function, argument(data), None)
            if code == driver.NO_CONTEXT:
                # A thread that has done nothing on a GPU yet.
                library.cuCtxSetCurrent(self._primary())
                code = start(address, function, argument(data), None)
            if code:
                self._check(code, f"to launch {kernel.name}")

        # Its address must stay valid.
        launched.config = config  # pyright: ignore[reportFunctionMemberAccess]
        return launched


class Launch:
    """A launch of a kernel on a GPU, but for addresses and stream.

    Attributes:
        kernel: What is launched.
        grid: Blocks; a multiple of the kernel's cluster.
        shared: Bytes of dynamic shared memory.
        pdl: It may start while the launch before it drains (and waits inside).
    """

    def __init__(self, device: Any, kernel: Kernel, grid: int, shared: int, pdl: bool) -> None:
        self.kernel, self.grid, self.shared, self.pdl = kernel, grid, shared, pdl
        self._device = device
        # By stream; what they hold is never changed, so threads may share them.
        self._starts: dict[int, Callable[[bytes], None]] = {}

    def of(self, count: int, numbers: bytes) -> Callable[[tuple[int, ...], int], None]:
        """What launches with one argument, a struct: so many addresses, then the numbers."""
        starts, pack = self._starts, struct.Struct(f"<{count}Q").pack

        def start(addresses: tuple[int, ...], stream: int) -> None:
            found = starts.get(stream)
            if found is None:
                found = starts[stream] = self._device.starter(self, stream)
            found(pack(*addresses) + numbers)

        return start


def launch(
    launches: LaunchList,
    kernel: Kernel,
    grid: int,
    shared: int,
    fields: Mapping[str, Any],
    layout: Mapping[str, str],
    pdl: bool = False,
) -> None:
    """Write the launch of a kernel into a list.

    Args:
        launches: The list.
        kernel: What to launch.
        grid: Blocks; see `Launch`.
        shared: Bytes of dynamic shared memory.
        fields: Values of the argument by the names of `layout`; those left out are 0.
        layout: Name -> `struct` code of the argument's fields, addresses ("P") first.
        pdl: It may start while the launch before it drains.
    """
    addresses = [fields.get(name, NONE) for name, code in layout.items() if code == "P"]
    numbers = {name: code for name, code in layout.items() if code != "P"}
    packed = struct.pack("<" + "".join(numbers.values()), *(fields.get(n, 0) for n in numbers))
    packed += b"\0" * (-len(packed) % 8)
    pdl = pdl and bool(launches.kernels)
    made = Launch(launches.gpu, kernel, grid, shared, pdl)
    launches.launch(kernel, addresses, made.of(len(addresses), packed))


@functools.lru_cache
def device(ordinal: int) -> Device:
    """The GPU of this number."""
    return Device(ordinal)


def device_of(name: str) -> Device:
    """The GPU of a device's name, such as `"cuda:0"`."""
    return device(int(name.partition(":")[2] or 0))
