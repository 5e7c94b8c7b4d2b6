"""Arrays of every framework, in every memory layout the contract allows.

A `Kit` puts NumPy values into its framework's memory. What lies between and around the elements is
poisoned, so that reading it shows and writing it can be found.
"""

# What a method does stands at `Kit`.
# ruff: noqa: D102

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hata import arrays as adapters
from hata.backend import Backend

Shape = tuple[int, ...]
# Memory layouts of a `[..., rows, columns]` array. All have dense rows.
LAYOUTS = {
    "dense": "C order",
    "tokens_first": "[B, S, heads, D] memory seen as [B, heads, S, D]",
    "padded": "rows longer by 3 elements, so that none but the first is aligned",
    "offset": "the first element stands one element after an aligned address",
    "sliced": "the middle of a longer buffer of rows",
    "expanded": "stride 0 over the batch (the first batch row, repeated)",
}


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of a dtype name; bfloat16 is that of ml_dtypes."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def lay_out(values: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Lay values out in memory.

    Returns:
        `(buffer, view)`: the whole memory as a flat array, and the values as a view into it.
    """
    shape, dtype = values.shape, values.dtype
    if layout == "expanded" and values.ndim > 1 and shape[0] > 1:
        buffer = values[:1].copy().reshape(-1)
        return buffer, np.broadcast_to(buffer.reshape(1, *shape[1:]), shape)
    base, region, order = [*shape], [slice(0, n) for n in shape], [*range(values.ndim)]
    if layout == "tokens_first" and values.ndim == 4:
        order = [0, 2, 1, 3]
    elif layout == "padded" and values.ndim > 1:
        base[-1] += 3
    elif layout == "sliced" and values.ndim > 1:
        base[-2] += 5
        region[-2] = slice(2, 2 + shape[-2])
    shift = 1 if layout == "offset" else 0
    poison: Any = np.iinfo(dtype).max - 90 if dtype.kind in "iu" else np.nan
    buffer = np.full(shift + math.prod(base), poison, dtype)
    memory = buffer[shift:].reshape([base[axis] for axis in order])
    # `order` swaps two axes at most, so it is its own inverse.
    view = memory.transpose(order)[(..., *region)]
    view[...] = values
    return buffer, view


@dataclass
class Placed:
    """An array under test.

    Attributes:
        array: The framework's array, to be given to an op.
        values: Its values as a NumPy array of the same dtype (a copy).
        memory: The framework's flat array over the whole buffer.
        strides, offset: Where the array's elements stand in the buffer, in elements.
    """

    array: Any
    values: np.ndarray
    memory: Any
    strides: tuple[int, ...] = ()
    offset: int = 0

    def buffer_after(self, before: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the buffer must hold once `values` were written into the array, and no more."""
        buffer = before.copy()
        steps = tuple(s * buffer.itemsize for s in self.strides)
        np.lib.stride_tricks.as_strided(buffer[self.offset :], values.shape, steps)[...] = values
        return buffer


# Arguments of an op by name: a `Placed` each, or `None` where one is left out.
Arrays = dict[str, Any]


@dataclass
class Growth:
    """The most memory that was taken at a time, in bytes, or `None` where no one can tell."""

    bytes: int | None = None


def _high_water() -> int:
    """The most memory that this process has had resident, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmHWM"].split()[0]) << 10


class Kit:
    """Makes and reads the arrays of one framework. Subclasses: one per framework."""

    name = ""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def missing(self, dtype: str) -> str | None:
        """Why arrays of a dtype cannot be made here; `None` if they can."""
        if importlib.util.find_spec(self.name) is None:
            return f"{self.name} is not installed"
        if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
            return "ml_dtypes is not installed: NumPy has no bfloat16 of its own"
        return None

    def place(self, values: np.ndarray, layout: str = "dense") -> Placed:
        """Put values into memory in a layout of `LAYOUTS`."""
        buffer, view = lay_out(values, layout)
        start = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
        strides, offset = tuple(s // view.itemsize for s in view.strides), start // view.itemsize
        kept, memory = view.copy(), self.memory(buffer)
        array = self.strided_view(memory, view.shape, strides, offset)
        return Placed(array, kept, memory, strides, offset)

    def put(self, values: Any, layout: str = "dense") -> Any:
        """The framework's array of some values; `None` stays `None`."""
        return None if values is None else self.place(np.asarray(values), layout).array

    def cast(self, values: np.ndarray, dtype: str) -> Any:
        """The framework's array of some values in another dtype."""
        return self.put(values.astype(numpy_dtype(dtype)))

    @property
    def lib(self) -> Any:
        """The framework."""
        return importlib.import_module(self.name)

    def memory(self, buffer: np.ndarray) -> Any:
        """The framework's own array of a buffer, which is given away."""
        return self.lib.asarray(buffer)

    def strided_view(self, memory: Any, shape: Shape, strides: Shape, offset: int) -> Any:
        """A view into `memory`; strides and offset in elements."""
        steps = tuple(s * memory.itemsize for s in strides)
        return self.lib.lib.stride_tricks.as_strided(memory[offset:], shape, steps)

    def get(self, array: Any) -> np.ndarray:
        """A framework's array as a NumPy array."""
        return np.asarray(array)

    def read(self, array: Any) -> np.ndarray:
        """Like `get`, floating-point data as float32."""
        values = self.get(array)
        return values if values.dtype.kind in "iu" else values.astype(np.float32)

    def empty(self, shape: Shape, dtype: str) -> Any:
        """An array with undefined contents, of which memory is taken only where it is touched."""
        return self.lib.empty(shape, numpy_dtype(dtype))

    def normal(self, rng: np.random.Generator, shape: Shape, dtype: str) -> Any:
        """Standard normal values."""
        return self.cast(rng.standard_normal(shape, dtype=np.float32), dtype)

    def bytes(self, rng: np.random.Generator, shape: Shape) -> Any:
        """Uniform random bytes."""
        return self.put(np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape))

    def free_bytes(self) -> int:
        """Free memory of the device; a CPU's is taken where it is touched, so all is free there."""
        return 1 << 62

    @contextmanager
    def growth(self) -> Iterator[Growth]:
        """How much memory the calls in a `with` block take beyond what was taken before."""
        growth = Growth()
        try:
            # Linux: the process's high-water mark begins anew. It may have been higher long before.
            Path("/proc/self/clear_refs").write_text("5")
            before = _high_water()
        except (OSError, LookupError):
            yield growth
            return
        yield growth
        growth.bytes = _high_water() - before

    def stream(self) -> Any:
        """A context of a new stream on a GPU; of nothing on a CPU."""
        return nullcontext()

    def adapter(self) -> adapters.Framework:
        """The ops' adapter of this framework."""
        return adapters.framework("x", self.put(np.zeros(1, np.float32)))

    def is_same_kind(self, array: Any) -> bool:
        """Whether an op returned the kind of array that it was given."""
        return type(array) is type(self.put(np.zeros(1, np.float32)))


class NumPyKit(Kit):
    """NumPy arrays."""

    name = "numpy"


class TorchKit(Kit):
    """torch tensors on the CPU or a GPU. On a GPU they are drawn there: a cache is a gigabyte."""

    name = "torch"

    def memory(self, buffer: np.ndarray) -> Any:
        if buffer.dtype.name != "bfloat16":
            return self.lib.from_numpy(buffer).to(self.device)
        return self.lib.from_numpy(buffer.view(np.int16)).view(self.lib.bfloat16).to(self.device)

    def cast(self, values: np.ndarray, dtype: str) -> Any:
        return self.put(values).to(getattr(self.lib, dtype))

    def strided_view(self, memory: Any, shape: Shape, strides: Shape, offset: int) -> Any:
        return memory.as_strided(shape, strides, offset)

    def empty(self, shape: Shape, dtype: str) -> Any:
        return self.lib.empty(shape, dtype=getattr(self.lib, dtype), device=self.device)

    def _generator(self, rng: np.random.Generator) -> Any:
        return self.lib.Generator(self.device).manual_seed(int(rng.integers(2**62)))

    def normal(self, rng: np.random.Generator, shape: Shape, dtype: str) -> Any:
        if self.device == "cpu":
            return super().normal(rng, shape, dtype)
        return self.empty(shape, dtype).normal_(generator=self._generator(rng))

    def bytes(self, rng: np.random.Generator, shape: Shape) -> Any:
        if self.device == "cpu":
            return super().bytes(rng, shape)
        return self.empty(shape, "uint8").random_(0, 256, generator=self._generator(rng))

    def free_bytes(self) -> int:
        if self.device == "cpu":
            return super().free_bytes()
        return self.lib.cuda.mem_get_info()[0]

    @contextmanager
    def growth(self) -> Iterator[Growth]:
        """On a GPU it is what torch allocates."""
        if self.device == "cpu":
            with super().growth() as growth:
                yield growth
            return
        growth, cuda = Growth(), self.lib.cuda
        cuda.reset_peak_memory_stats(self.device)
        before = cuda.memory_allocated(self.device)
        yield growth
        growth.bytes = cuda.max_memory_allocated(self.device) - before

    def get(self, array: Any) -> np.ndarray:
        array = array.detach().cpu()
        if array.dtype == self.lib.bfloat16:
            return array.view(self.lib.int16).numpy().view(numpy_dtype("bfloat16"))
        return array.numpy()

    def stream(self) -> Any:
        cuda = self.lib.cuda
        return super().stream() if self.device == "cpu" else cuda.stream(cuda.Stream())

    def read(self, array: Any) -> np.ndarray:
        return self.get(array.float() if array.is_floating_point() else array)


class CuPyKit(Kit):
    """CuPy arrays on a GPU."""

    name = "cupy"

    def free_bytes(self) -> int:
        return self.lib.cuda.runtime.memGetInfo()[0]

    @contextmanager
    def growth(self) -> Iterator[Growth]:
        """It is all that CuPy allocates, freed or not, since CuPy keeps no peak."""
        growth = Growth(0)

        class Count(self.lib.cuda.MemoryHook):
            name = "hata growth"

            def malloc_postprocess(self, **given: Any) -> None:
                growth.bytes = (growth.bytes or 0) + given["mem_size"]

        with Count():
            yield growth

    def stream(self) -> Any:
        return self.lib.cuda.Stream(non_blocking=True)

    def get(self, array: Any) -> np.ndarray:
        return array.get()


class JAXKit(Kit):
    """JAX arrays: always dense, whatever the layout asked for, and never written in place."""

    name = "jax"

    def place(self, values: np.ndarray, layout: str = "dense") -> Placed:
        jax = importlib.import_module("jax")
        # JAX knows no int64 unless told so for the whole process.
        if values.dtype == np.int64:
            values = values.astype(np.int32)
        kind = "cpu" if self.device == "cpu" else "gpu"
        array = jax.device_put(values.copy(), jax.devices(kind)[0])
        return Placed(array, values.copy(), array)


KITS: dict[str, type[Kit]] = {kit.name: kit for kit in (NumPyKit, TorchKit, CuPyKit, JAXKit)}


def kit_for(backend: Backend, device: str, dtype: str) -> Kit:
    """The kit of the framework that a backend is tuned with."""
    kit = NumPyKit(device)
    # torch is the heavier of the two to load, but has a bfloat16 of its own.
    if device == "cpu" and "numpy" in backend.frameworks and not kit.missing(dtype):
        return kit
    return TorchKit(device)
