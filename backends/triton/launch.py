"""How kernels are compiled, kept and launched.

A kernel is compiled for the types and constants that follow from the problem and the alignment of
its arrays alone, never for the values of sizes or strides: a cache that grows by a token never
compiles again, and a prepared call can be captured. `bind` names such a variant; calling it
hands addresses and numbers to the driver, without Triton's own argument inspection.

Under `TRITON_INTERPRET=1` the same calls run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError

from hata.errors import BackendUnavailable, HataCaptureError

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def source(fn: Any, types: tuple[str, ...], constants: dict[str, Any]) -> Any:
    """What Triton compiles: `fn` with the types of its first parameters and constants after them.

    A pointer type that ends in ":16" promises data aligned to 16 bytes. Nothing else is specialised
    on a value: strides come in units of whole vectors, so that their alignment follows.
    """
    names = fn.arg_names
    signature, aligned = {}, {}
    for i, (name, kind) in enumerate(zip(names, types, strict=False)):
        signature[name], _, promise = kind.partition(":")
        if promise:
            aligned[(i,)] = [["tt.divisibility", int(promise)]]
    signature |= dict.fromkeys(names[len(types) :], "constexpr")
    return triton.compiler.ASTSource(
        fn, signature, {name: constants[name] for name in names[len(types) :]}, aligned
    )


class Bound:
    """A kernel with its types and constants: callable, compiled at the first call per device."""

    def __init__(
        self, fn: Any, types: tuple[str, ...], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.fn, self.types, self.constants, self.options = fn, types, constants, options
        self._placeholders = (None,) * len(constants)
        self._loaded: dict[int, tuple[Callable[..., None], int, Any]] = {}

    def load(self, device: int) -> tuple[Callable[..., None], int, Any]:
        """Compile for and load on a device (the current one); a broken cache is retried once."""
        if torch.cuda.is_current_stream_capturing():
            raise HataCaptureError(
                f"{self.fn.__name__}: this call is not prepared, and kernels cannot be loaded "
                "while a CUDA graph is captured; call hata.prepare with the same arguments, or "
                "make the call once, before the capture"
            )
        try:
            kernel = self._compile()
        except CompilationError:
            # Not the cache's fault.
            raise
        # Whatever a damaged or read-only cache folder makes Triton raise.
        except Exception as error:
            previous = os.environ.get("TRITON_CACHE_DIR")
            os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="hata-triton-")
            try:
                kernel = self._compile()
            except Exception as again:
                raise BackendUnavailable(
                    f"backend 'triton' failed to compile {self.fn.__name__}: {error}; in a fresh "
                    f"cache folder: {type(again).__name__}: {again}; clear or change "
                    "TRITON_CACHE_DIR"
                ) from again
            finally:
                if previous is None:
                    del os.environ["TRITON_CACHE_DIR"]
                else:
                    os.environ["TRITON_CACHE_DIR"] = previous
        found = self._loaded[device] = (kernel.run, kernel.function, kernel.packed_metadata)
        return found

    def _compile(self) -> Any:
        kernel = triton.compile(
            source(self.fn, self.types, self.constants), options=dict(self.options)
        )
        kernel._init_handles()
        return kernel

    def compile_for(self, target: Any) -> Any:
        """Compile for a `GPUTarget`; needs no GPU."""
        return triton.compile(
            source(self.fn, self.types, self.constants), target, dict(self.options)
        )

    def __call__(self, grid: int, device: int, stream: int, *args: Any) -> None:
        """Launch on `grid` programs; `args` are addresses (0 for none) and numbers."""
        run, function, metadata = self._loaded.get(device) or self.load(device)
        run(grid, 1, 1, stream, function, metadata, None, None, None, *args, *self._placeholders)


class _Interpreted(Bound):
    """The same, run by the interpreter on tensors."""

    def load(self, device: int) -> Any:
        return None

    def __call__(self, grid: int, device: int, stream: int, *args: Any) -> None:
        self.fn[(grid,)](*args, **self.constants)


_bound: dict[tuple, Bound] = {}
_met: ContextVar[list[Bound] | None] = ContextVar("hata_triton_met", default=None)


@contextmanager
def rehearsal() -> Iterator[list[Bound]]:
    """Launches made in this context, on tensors without data, are listed and not made."""
    met: list[Bound] = []
    token = _met.set(met)
    try:
        yield met
    finally:
        _met.reset(token)


def rehearsed(kernels: list[Bound]) -> bool:
    """In a rehearsal: note the kernels of a call, which is then not made."""
    met = _met.get()
    if met is not None:
        met.extend(kernels)
    return met is not None


def bind(
    fn: Any,
    types: tuple[str, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int = 2,
    overlapped: bool = False,
) -> Bound:
    """The variant of kernel `fn` for these types (of its first parameters) and constants.

    Args:
        fn: A jitted function; all parameters after the typed ones are constants.
        types: Triton types, such as `"*bf16"` and `"i32"`.
        constants: Value of every constant parameter.
        warps: Warps a program.
        stages: Default depth of software pipelines.
        overlapped: Whether it may start while the launch before it drains (it then waits inside).
    """
    constants = {name: constants[name] for name in fn.arg_names[len(types) :]}
    key = (fn.__name__, types, tuple(constants.values()), warps, stages, overlapped)
    found = _bound.get(key)
    if found is None:
        options = {"num_warps": warps, "num_stages": stages}
        if overlapped:
            options["launch_pdl"] = True
        kind = _Interpreted if INTERPRETED else Bound
        found = _bound[key] = kind(fn, types, constants, options)
    return found


@functools.lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def overlaps(wanted: bool, x: Any) -> bool:
    """Whether launches may overlap: asked for, and the device of `x` (sm_90 or newer) can."""
    if INTERPRETED or not wanted:
        return False
    if x.is_cuda:
        return _capability(x.device.index) >= (9, 0)
    # Arrays without data stand for those of the current device, or of none.
    return not torch.cuda.is_available() or _capability(torch.cuda.current_device()) >= (9, 0)
