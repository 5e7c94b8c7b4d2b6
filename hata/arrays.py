"""Arrays of four frameworks behind one small interface.

Requirements this module meets:

- a framework is touched only if one of its arrays is present; nothing is ever imported here that
  the caller has not imported already;
- the ops never convert: torch, CuPy and NumPy arrays are used through pointers and strides, and
  what an op returns is allocated by the caller's framework;
- JAX arrays are immutable and opaque, so they are viewed as arrays of another framework on the way
  in (NumPy on the CPU, DLPack on a GPU) and turned back on the way out;
- a `Layout` says how an array lies and holds none: calls of those are checked and planned for like
  others, so that kernels can be compiled ahead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hata.errors import HataDTypeError

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}


class Framework:
    """What the ops need to know of a framework's arrays. Subclasses: one per framework."""

    # Of its module, and of its class of arrays in there.
    name: str = ""
    array: str = "ndarray"
    # Foreign arrays have no pointers of their own: `call` takes them through another framework.
    foreign: bool = False

    def signature(self, x: Any) -> tuple[tuple, int]:
        """All that a check of `x` depends on, hashable and cheap; and its address."""
        raise NotImplementedError

    def shape(self, x: Any) -> tuple[int, ...]:
        """Shape of `x`."""
        return tuple(x.shape)

    def dtype(self, x: Any) -> str:
        """dtype name of `x`, such as `"bfloat16"`."""
        return str(x.dtype)

    def device(self, x: Any) -> str:
        """Device of `x`, `"cpu"`, or its kind and index as in `"cuda:0"`."""
        return "cpu"

    def strides(self, x: Any) -> tuple[int, ...]:
        """Strides of `x` in elements."""
        return tuple(s // x.itemsize for s in x.strides)

    def pointer(self, x: Any) -> int:
        """Address of the first element of `x`; 0 where it has none."""
        return 0

    def is_readonly(self, x: Any) -> bool:
        """Whether writing into `x` is forbidden."""
        return False

    def needs_grad(self, x: Any) -> bool:
        """Whether a derivative with respect to `x` is asked for, backward or forward."""
        return False

    def refusal(self, x: Any) -> str | None:
        """Why `x` cannot be used at all, if so."""
        return None

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new array with undefined contents on the device of `like`."""
        raise NotImplementedError

    def signatures(self, arrays: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """Signatures of the arrays of a call, and their addresses (0 for `None`)."""
        found = [(None, 0) if x is None else self.signature(x) for x in arrays]
        return [signature for signature, _ in found], [address for _, address in found]

    def stream(self, index: int) -> int | None:
        """The current stream of a GPU; `None` where another GPU is current."""
        return 0

    def on(self, index: int) -> AbstractContextManager[Any]:
        """In this context a GPU is current."""
        raise NotImplementedError

    def call(self, run: Callable[[Any, tuple], Any], kind: Any, fields: tuple) -> Any:
        """Run a call of foreign arrays (only where `foreign`)."""
        raise NotImplementedError


class Layout:
    """How an array lies, without the array: dense, or with rows that are aligned to nothing.

    Args:
        shape: Its shape.
        dtype: Its dtype by name.
        device: Kind of its device.
        aligned: Whether rows are dense; else each is an element longer than its data.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: str, device: str = "cuda", aligned: bool = True
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        row, outer = shape[-1] + (not aligned), shape[:-1]
        self.strides = (*(row * math.prod(outer[i + 1 :]) for i in range(len(outer))), 1)


class _Layouts(Framework):
    name = "layout"

    def signature(self, x: Any) -> tuple[tuple, int]:
        return (x.shape, x.strides, x.dtype, x.device), 0

    def device(self, x: Any) -> str:
        return x.device

    def strides(self, x: Any) -> tuple[int, ...]:
        return x.strides

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return Layout(shape, dtype, like.device)


class _NumPy(Framework):
    name = "numpy"

    def __init__(self) -> None:
        self._np = sys.modules["numpy"]
        # `dtype.name` costs more than all else that a call asks of an array.
        self._names: dict[Any, str] = {}

    def signature(self, x: Any) -> tuple[tuple, int]:
        pointer, readonly = x.__array_interface__["data"]
        # The class too: a masked array has all else in common with its plain twin.
        return (x.__class__, x.shape, x.strides, x.dtype, pointer & 15, readonly), pointer

    def dtype(self, x: Any) -> str:
        name = self._names.get(x.dtype)
        if name is None:
            name = x.dtype.name if x.dtype.isnative else f"{x.dtype.str} (byte-swapped)"
            self._names[x.dtype] = name
        return name

    def pointer(self, x: Any) -> int:
        return x.__array_interface__["data"][0]

    def is_readonly(self, x: Any) -> bool:
        return not x.flags.writeable

    def refusal(self, x: Any) -> str | None:
        if isinstance(x, self._np.ma.MaskedArray):
            return "a masked array's mask would be ignored; call .filled() first"
        if x.itemsize and any(s % x.itemsize for s in x.strides):
            return f"strides {x.strides} bytes are no multiples of the item size {x.itemsize}"
        return None

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        # Only asked for bfloat16 where such an array came in, so its dtype object is at hand.
        return self._np.empty(shape, like.dtype if dtype == "bfloat16" else dtype)


class _Torch(Framework):
    name = "torch"
    array = "Tensor"

    def __init__(self) -> None:
        self._torch = torch = sys.modules["torch"]
        self._forward = torch.autograd.forward_ad
        # Of a class that overrides nothing of it, without a frame of ours.
        self.pointer = torch.Tensor.data_ptr
        self._names = {getattr(torch, name): name for name in ITEMSIZE}
        self._dtypes = {name: dtype for dtype, name in self._names.items()}

    def signatures(self, arrays: Sequence[Any]) -> tuple[list[Any], list[int]]:
        # Flat, since every call waits for this. The class and the lazy sign belong to it: all else
        # may be that of a tensor that passed.
        # Nearly always nobody differentiates forward, and then no array has a tangent.
        dual = self._forward._current_level >= 0 and tuple(map(self._is_dual, arrays))
        signatures: list[Any] = [self._torch.is_grad_enabled(), arrays[0].device, dual]
        addresses = []
        for x in arrays:
            if x is None:
                signatures.append(None)
                addresses.append(0)
                continue
            pointer = x.data_ptr()
            addresses.append(pointer)
            signatures += (
                x.__class__, x.is_neg(), x.shape, x.stride(), x.dtype, x.get_device(),
                x.requires_grad,
                # No memory at all is not memory that is aligned, nor on a device without a number.
                pointer & 15 if pointer else x.device,
            )  # fmt: skip
        return signatures, addresses

    def dtype(self, x: Any) -> str:
        return self._names.get(x.dtype) or str(x.dtype).removeprefix("torch.")

    def device(self, x: Any) -> str:
        return str(x.device)

    def strides(self, x: Any) -> tuple[int, ...]:
        return tuple(x.stride())

    def stream(self, index: int) -> int | None:
        cuda = self._torch._C
        return cuda._cuda_getCurrentRawStream(index) if cuda._cuda_getDevice() == index else None

    def on(self, index: int) -> AbstractContextManager[Any]:
        return self._torch.cuda.device(index)

    def needs_grad(self, x: Any) -> bool:
        return (x.requires_grad and self._torch.is_grad_enabled()) or self._is_dual(x)

    def _is_dual(self, x: Any) -> bool:
        return x is not None and self._forward.unpack_dual(x).tangent is not None

    def refusal(self, x: Any) -> str | None:
        if self._torch.jit.is_tracing():
            return "torch.jit.trace cannot follow the op; use torch.export or torch.compile"
        if x.layout is not self._torch.strided or x.is_nested:
            kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
            return f"{kind} has no strides; pass a dense tensor"
        if x.is_neg() or x.is_conj():
            return "it is a lazy negated or conjugated view; call .resolve_neg().resolve_conj()"
        try:
            without = not x.is_meta and x.numel() > 0 and x.data_ptr() == 0
        except RuntimeError:
            without = True
        why = "it has no memory of its own (freed, fake, vmapped, wrapped); pass a plain tensor"
        return why if without else None

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        wanted, torch = self._dtypes[dtype], self._torch
        same = shape == like.shape and wanted is like.dtype and like.__class__ is torch.Tensor
        if same and like.is_contiguous():
            # Half the time of the other.
            return torch.empty_like(like)
        return torch.empty(shape, dtype=wanted, device=like.device)


class _CuPy(Framework):
    name = "cupy"

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]

    def signature(self, x: Any) -> tuple[tuple, int]:
        pointer = x.data.ptr
        return (x.shape, x.strides, x.dtype, x.data.device_id, pointer & 15), pointer

    def dtype(self, x: Any) -> str:
        return x.dtype.name

    def device(self, x: Any) -> str:
        return f"cuda:{x.data.device_id}"

    def pointer(self, x: Any) -> int:
        return x.data.ptr

    def stream(self, index: int) -> int | None:
        cuda = self._cupy.cuda
        return cuda.get_current_stream().ptr if cuda.runtime.getDevice() == index else None

    def on(self, index: int) -> AbstractContextManager[Any]:
        return self._cupy.cuda.Device(index)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        with self.on(like.data.device_id):
            return self._cupy.empty(shape, like.dtype if dtype == "bfloat16" else dtype)


class _JAX(Framework):
    name = "jax"
    array = "Array"
    foreign = True

    def __init__(self) -> None:
        self._jax = sys.modules["jax"]

    def signature(self, x: Any) -> tuple[tuple, int]:
        return (x.shape, x.dtype, x.device), 0

    def device(self, x: Any) -> str:
        device = x.device
        platform = getattr(device, "platform", "a sharding")
        kind = {"gpu": "cuda", "rocm": "cuda"}.get(platform, platform)
        return "cpu" if kind == "cpu" else f"{kind}:{device.local_hardware_id}"

    def strides(self, x: Any) -> tuple[int, ...]:
        return tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))

    def refusal(self, x: Any) -> str | None:
        if isinstance(x, self._jax.core.Tracer):
            return "it is traced by jax.jit; call the op outside jit or through jax.pure_callback"
        if x.is_deleted():
            return "it was deleted or donated; pass one that is still there"
        if not hasattr(x.device, "platform"):
            return "it lies on several devices; gather it on one with jax.device_put"
        if not self.device(x).startswith(("cpu", "cuda")):
            return f"it is on {self.device(x)}, expected a CPU or a CUDA GPU; use jax.device_put"
        return None

    def call(self, run: Callable[[Any, tuple], Any], kind: Any, fields: tuple) -> Any:
        result = run(kind, tuple(map(self._enter, fields)))
        return tuple(map(self._leave, result)) if isinstance(result, tuple) else self._leave(result)

    def _enter(self, x: Any) -> Any:
        if not isinstance(x, self._jax.Array):
            return x
        if self.device(x) == "cpu":
            return sys.modules["numpy"].asarray(x)
        import cupy

        return cupy.from_dlpack(x)

    def _leave(self, x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, sys.modules["numpy"].ndarray):
            return self._jax.numpy.asarray(x)
        return self._jax.dlpack.from_dlpack(x)


_by_type: dict[type, Framework] = {Layout: _Layouts()}
_loaded: dict[str, Framework] = {}


def framework(name: str, x: Any) -> Framework:
    """The framework of array `x`, an argument called `name`.

    Raises:
        HataDTypeError: if `x` is no array of a supported framework.
    """
    found = _by_type.get(type(x))
    if found is not None:
        return found
    for adapter in (_Torch, _NumPy, _CuPy, _JAX):
        if isinstance(x, getattr(sys.modules.get(adapter.name), adapter.array, ())):
            # One for all its classes of arrays.
            found = _by_type[type(x)] = _loaded.setdefault(adapter.name, adapter())
            return found
    raise HataDTypeError(
        f"{name}: got {type(x).__module__}.{type(x).__qualname__}, expected an array of torch, "
        "NumPy, CuPy or JAX; convert it first, for example with numpy.asarray"
    )
