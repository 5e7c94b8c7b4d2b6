"""Test arrays of every framework, in every memory layout the contract allows.

A test makes NumPy values; a kit puts them into its framework's memory. What lies between and around
the elements is poisoned, so that reading it shows and writing it can be found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hata import arrays as adapters

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
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def has_bfloat16() -> bool:
    """Whether NumPy can hold bfloat16 here."""
    return importlib.util.find_spec("ml_dtypes") is not None


def _poison(dtype: np.dtype) -> Any:
    if dtype.kind in "iu":
        return np.iinfo(dtype).max - 90
    return np.nan


def lay_out(values: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Lay values out in memory.

    Returns:
        `(buffer, view)`: the whole memory as a flat array, and the values as a view into it.
    """
    shape, dtype = values.shape, values.dtype
    if layout == "expanded" and values.ndim > 1 and shape[0] > 1:
        buffer = values[:1].copy().reshape(-1)
        return buffer, np.broadcast_to(buffer.reshape(1, *shape[1:]), shape)
    base, region = shape, tuple(slice(0, n) for n in shape)
    order = tuple(range(values.ndim))
    if layout == "tokens_first" and values.ndim == 4:
        order = (0, 2, 1, 3)
    elif layout == "padded" and values.ndim > 1:
        base = (*shape[:-1], shape[-1] + 3)
    elif layout == "sliced" and values.ndim > 1:
        base = (*shape[:-2], shape[-2] + 5, shape[-1])
        region = (*region[:-2], slice(2, 2 + shape[-2]), region[-1])
    shift = 1 if layout == "offset" else 0
    buffer = np.full(shift + int(np.prod(base)), _poison(dtype), dtype)
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
        view = np.lib.stride_tricks.as_strided(buffer[self.offset :], values.shape, steps)
        view[...] = values
        return buffer


@dataclass
class Growth:
    """The most memory that was taken at a time, in bytes, or `None` where no one can tell."""

    bytes: int | None = None


def _high_water() -> int:
    """The most memory that this process has had resident, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmHWM"].split()[0]) << 10


# Arguments of an op by name: a `Placed` each, or `None` where one is left out.
Arrays = dict[str, Any]


class Kit:
    """Makes and reads the arrays of one framework. Subclasses: one per framework."""

    name = ""
    # Whether strides and offsets can be chosen, and arrays be written in place.
    strided = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def missing(self, dtype: str) -> str | None:
        """Why arrays of a dtype cannot be made here; `None` if they can."""
        if importlib.util.find_spec(self.name) is None:
            return f"{self.name} is not installed"
        if dtype == "bfloat16" and not has_bfloat16():
            return "ml_dtypes is not installed: NumPy has no bfloat16 of its own"
        return None

    def place(self, values: np.ndarray, layout: str = "dense") -> Placed:
        """Put values into memory in a layout of `LAYOUTS`."""
        buffer, view = lay_out(values, layout)
        start = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
        strides = tuple(s // view.itemsize for s in view.strides)
        memory = self.memory(buffer)
        offset = start // view.itemsize
        array = self.strided_view(memory, view.shape, strides, offset)
        return Placed(array, view.copy(), memory, strides, offset)

    def put(self, values: Any, layout: str = "dense") -> Any:
        """The framework's array of some values; `None` stays `None`."""
        return None if values is None else self.place(np.asarray(values), layout).array

    def memory(self, buffer: np.ndarray) -> Any:
        """The framework's own flat copy of a buffer."""
        raise NotImplementedError

    def strided_view(
        self, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Any:
        """A view into `memory`; strides and offset in elements."""
        raise NotImplementedError

    def get(self, array: Any) -> np.ndarray:
        """A framework's array as a NumPy array."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array with undefined contents, of which memory is taken only where it is touched."""
        raise NotImplementedError

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

    def adapter(self) -> adapters.Framework:
        """The ops' adapter of this framework."""
        return adapters.framework("x", self.put(np.zeros(1, np.float32)))

    def is_same_kind(self, array: Any) -> bool:
        """Whether an op returned the kind of array that it was given."""
        return type(array) is type(self.put(np.zeros(1, np.float32)))


class NumPyKit(Kit):
    """NumPy arrays."""

    name = "numpy"

    def memory(self, buffer: np.ndarray) -> Any:
        """See `Kit`."""
        return buffer.copy()

    def strided_view(
        self, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Any:
        """See `Kit`."""
        steps = tuple(s * memory.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(memory[offset:], shape, steps)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `Kit`."""
        return np.empty(shape, numpy_dtype(dtype))

    def get(self, array: Any) -> np.ndarray:
        """See `Kit`."""
        return array


class TorchKit(Kit):
    """torch tensors on the CPU or a GPU."""

    name = "torch"

    def memory(self, buffer: np.ndarray) -> Any:
        """See `Kit`."""
        import torch

        if buffer.dtype.name == "bfloat16":
            tensor = torch.from_numpy(buffer.view(np.int16).copy()).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(buffer.copy())
        return tensor.to(self.device)

    def strided_view(
        self, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Any:
        """See `Kit`."""
        return memory.as_strided(shape, strides, offset)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `Kit`."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def free_bytes(self) -> int:
        """See `Kit`."""
        import torch

        return super().free_bytes() if self.device == "cpu" else torch.cuda.mem_get_info()[0]

    @contextmanager
    def growth(self) -> Iterator[Growth]:
        """See `Kit`; on a GPU it is what torch allocates."""
        if self.device == "cpu":
            with super().growth() as growth:
                yield growth
            return
        import torch

        growth = Growth()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield growth
        growth.bytes = torch.cuda.max_memory_allocated(self.device) - before

    def get(self, array: Any) -> np.ndarray:
        """See `Kit`."""
        import torch

        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return array.numpy()


class CuPyKit(Kit):
    """CuPy arrays on a GPU."""

    name = "cupy"

    def memory(self, buffer: np.ndarray) -> Any:
        """See `Kit`."""
        import cupy

        return cupy.asarray(buffer)

    def strided_view(
        self, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Any:
        """See `Kit`."""
        from cupy.lib.stride_tricks import as_strided

        return as_strided(memory[offset:], shape, tuple(s * memory.itemsize for s in strides))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `Kit`."""
        import cupy

        return cupy.empty(shape, dtype)

    def free_bytes(self) -> int:
        """See `Kit`."""
        import cupy

        return cupy.cuda.runtime.memGetInfo()[0]

    @contextmanager
    def growth(self) -> Iterator[Growth]:
        """See `Kit`; it is all that CuPy allocates, freed or not, since CuPy keeps no peak."""
        import cupy

        growth = Growth(0)

        class Count(cupy.cuda.MemoryHook):
            name = "hata growth"

            def malloc_postprocess(self, **given: Any) -> None:
                growth.bytes = (growth.bytes or 0) + given["mem_size"]

        with Count():
            yield growth

    def get(self, array: Any) -> np.ndarray:
        """See `Kit`."""
        return array.get()


class JAXKit(Kit):
    """JAX arrays: always dense, never written in place."""

    name = "jax"
    strided = False

    def place(self, values: np.ndarray, layout: str = "dense") -> Placed:
        """Put values into memory; JAX chooses the layout."""
        import jax

        # JAX knows no int64 unless told so for the whole process.
        if values.dtype == np.int64:
            values = values.astype(np.int32)
        kind = "cpu" if self.device == "cpu" else "gpu"
        array = jax.device_put(values.copy(), jax.devices(kind)[0])
        return Placed(array, values.copy(), array)

    def get(self, array: Any) -> np.ndarray:
        """See `Kit`."""
        return np.asarray(array)


KITS: dict[str, type[Kit]] = {kit.name: kit for kit in (NumPyKit, TorchKit, CuPyKit, JAXKit)}
