"""How kernels are compiled, kept and launched.

A kernel is compiled for the types and constants that follow from the problem and the alignment of
its arrays alone, never for the values of sizes or strides: a cache that grows by a token never
compiles again, and a prepared call can be captured. `Kernel.bind` names such a variant; calling it
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
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError

from hata.arrays import Framework
from hata.backend import Config
from hata.errors import BackendUnavailable, HataCaptureError
from hata.problem import Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Pointer types of data by dtype name.
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_TORCH = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*u8": torch.uint8,
    "*i16": torch.int16,
    "*i32": torch.int32,
}


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


class Scratch:
    """The layout of a call's one allocation: pieces that start at multiples of 256 bytes."""

    def __init__(self) -> None:
        self.size = 0

    def piece(self, count: int, itemsize: int = 4) -> int:
        """Reserve `count` elements; returns their offset in bytes."""
        offset = self.size
        self.size += -(-count * itemsize // 256) * 256
        return offset


def in_fp32(dtype: str) -> bool:
    """Whether products of this dtype are taken in fp32; the interpreter has none in bfloat16."""
    return dtype == "float32" or (INTERPRETED and dtype == "bfloat16")


def steps(fw: Framework, x: Any, unit: int = 1) -> tuple[int, ...]:
    """Strides of `x` but the last, in units of `unit` elements; 0 where there is one element."""
    if x is None:
        return ()
    sizes = zip(fw.strides(x)[:-1], fw.shape(x)[:-1], strict=True)
    return tuple(stride // unit if size > 1 else 0 for stride, size in sizes)


def vector(fw: Framework, *arrays: Any) -> int:
    """8 if the rows of all arrays start at multiples of 16 bytes and 8 elements, else 1."""
    given = [x for x in arrays if x is not None]
    whole = all(
        fw.pointer(x) % 16 == 0 and all(step % 8 == 0 for step in steps(fw, x)) for x in given
    )
    return 8 if whole else 1


def words(fw: Framework, codes: Any) -> tuple[int, int]:
    """`(unit, vector)` of codes: bytes a word is read by, and words that are aligned together."""
    for size in (16, 8, 4):
        if fw.pointer(codes) % size == 0 and all(s % size == 0 for s in steps(fw, codes)):
            return 4, size // 4
    return 1, 1


def code_steps(unit: int, vector: int) -> int:
    """Bytes that strides of codes are counted in."""
    return 1 if unit == 1 else 4 * vector


def norm_steps(fw: Framework, norms: Any) -> tuple[int, ...]:
    """All strides of norms [B, heads, T or S]; zeros where there are none."""
    return (0, 0, 0) if norms is None else fw.strides(norms)


def row_step(fw: Framework, x: Any) -> int:
    """Step between the rows of lengths or starts, in int32; 0 for a scalar, -1 for `None`."""
    if x is None:
        return -1
    if fw.shape(x) in ((), (1,)):
        return 0
    return 2 if fw.dtype(x) == "int64" else 1


def code_pointer(unit: int, vector: int) -> str:
    """Type of a pointer to codes."""
    return "*u8" if unit == 1 else f"*i32:{4 * vector}" if vector > 1 else "*i32"


def data_pointer(dtype: str, vector: int) -> str:
    """Type of a pointer to data."""
    return POINTERS[dtype] + (":16" if vector > 1 else "")


class Plan:
    """The launches of a call, made once per signature and run again with other arrays.

    A launcher writes its call into a plan: the arrays it allocates, and the kernels with their
    arguments, in which addresses stand as references. Whatever a plan depends on is in its key.
    """

    def __init__(self, arrays: tuple[Any, ...]) -> None:
        self._slots = {id(x): i for i, x in enumerate(arrays) if x is not None}
        self._given = len(arrays)
        self._made: list[tuple[tuple[int, ...], str]] = []
        self._keep: list[object] = []
        self.launches: list[tuple[Bound, int, tuple[_Reference, ...], tuple[Any, ...]]] = []

    def output(self, shape: tuple[int, ...], dtype: str) -> object:
        """An array that every run allocates; runs return them in order (scratch comes last)."""
        token = object()
        self._keep.append(token)
        self._slots[id(token)] = self._given + len(self._made)
        self._made.append((shape, dtype))
        return token

    def address(self, x: Any, pointer: str, offset: int = 0) -> _Reference:
        """An array as a kernel argument of type `pointer`, `offset` bytes in; `None` for none."""
        return _Reference(-1 if x is None else self._slots[id(x)], pointer, offset)

    def optional(self, fw: Framework, x: Any, dtype: str) -> tuple[_Reference, _Reference, int]:
        """A bias or sink logits as two arguments and a flag.

        The array comes in `dtype` (flag 1) or, beside data of another dtype, in float32 (flag 2);
        0: there is none. The argument that is not used is empty.
        """
        flag = 0 if x is None else 1 if fw.dtype(x) == dtype else 2
        return (
            self.address(x if flag == 1 else None, POINTERS[dtype]),
            self.address(x if flag == 2 else None, "*fp32"),
            flag,
        )

    def launch(self, kernel: Bound, grid: int, *args: Any) -> None:
        """Launch a kernel on `grid` programs; references come first in `args`."""
        count = sum(isinstance(arg, _Reference) for arg in args)
        self.launches.append((kernel, grid, args[:count], args[count:]))

    def run(self, fw: Framework, arrays: tuple[Any, ...]) -> list[Any]:
        """Allocate and launch; `arrays` are those of this call. Returns what was allocated."""
        like = arrays[0]
        made = [fw.empty(shape, dtype, like) for shape, dtype in self._made]
        met = _met.get()
        if met is not None:
            met.extend(launch[0] for launch in self.launches)
            return made
        arrays = (*arrays, *made, None)
        if INTERPRETED:
            for kernel, grid, references, numbers in self.launches:
                views = (_view(arrays[slot], pointer, offset) for slot, pointer, offset in references)
                kernel(grid, 0, 0, *views, *numbers)
            return made
        device = like.device.index
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                return self._run(device, arrays, made)
        return self._run(device, arrays, made)

    def _run(self, device: int, arrays: tuple[Any, ...], made: list[Any]) -> list[Any]:
        stream = torch._C._cuda_getCurrentRawStream(device)
        addresses = [0 if x is None else x.data_ptr() for x in arrays]
        for kernel, grid, references, numbers in self.launches:
            pointers = [addresses[slot] + offset for slot, _, offset in references]
            kernel(grid, device, stream, *pointers, *numbers)
        return made


class _Reference(NamedTuple):
    slot: int
    pointer: str
    offset: int


def _view(x: Any, pointer: str, offset: int) -> torch.Tensor:
    """A tensor as the interpreter takes it: with elements of the pointer's type."""
    dtype = _TORCH[pointer.partition(":")[0]]
    if x is None or x.numel() == 0:
        return torch.zeros(1, dtype=dtype)
    x = x[offset:] if offset else x
    return x if x.dtype == dtype else x.view(dtype)


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
    signatures = [None if x is None else fw.signature(x) for x in arrays]
    key = (problem, id(config), options, *signatures)
    found = _plans.get(key)
    if found is None:
        # Aliases, so that one array in two roles is not taken for the other in a later call.
        aliases = tuple(None if x is None else x.detach() for x in arrays)
        plan = Plan(aliases)
        build(plan, problem, config, fw, *aliases, *options)
        if len(_plans) >= _PLAN_LIMIT:
            _plans.clear()
        # Kept with its configuration, whose identity is in the key.
        found = _plans[key] = (plan, config)
    return found[0].run(fw, arrays)
