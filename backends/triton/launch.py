"""How kernels are compiled, kept and launched.

A kernel is compiled for the types and constants that follow from the problem and the alignment of
its arrays alone, never for the values of sizes or strides: a cache that grows by a token never
compiles again, and a prepared call can be captured. `launch` writes the launch of such a variant
into the list of a call.

A kernel has few parameters, each a named tuple made by `group`: `arrays`, then what its docstring
names of `sizes`, `budget` and `strides`, and the constants `C`. The compiler sees their fields.

A damaged or unwritable cache folder of Triton's costs one more compilation, in a folder of this
process, and a warning. Under `TRITON_INTERPRET=1` the same calls run on CPU tensors in Triton's
interpreter.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import tempfile
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from hata.errors import HataCaptureError, KernelError
from hata.launches import Address, LaunchList

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True, slots=True)
class Pointer:
    """A field of `arrays`: where it points, and its Triton type; `"*bf16:16"` is aligned so."""

    address: Address
    type: str


@dataclass(frozen=True, slots=True)
class Long:
    """A 64-bit number for a kernel; an `int` is one of 32 bits, a `float` one of fp32."""

    value: int


@functools.cache
def _named(names: tuple[str, ...]) -> Any:
    return namedtuple("Group", names)


def group(**fields: Any) -> Any:
    """Arguments of a kernel that it takes as one, `fields` in order, as `group(a=1).a`.

    The compiler's own tuples have attributes `values` and `type`, which no field may be called.
    """
    return _named(tuple(fields))(*fields.values())


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """`x`, of groups in groups, with `function` of every field."""
    return type(x)(*(_each(function, y) for y in x)) if isinstance(x, tuple) else function(x)


def _leaves(x: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The fields of a group, of those in it too, by their paths."""
    for i, y in enumerate(x):
        yield from _leaves(y, (*path, i)) if isinstance(y, tuple) else [((*path, i), y)]


def _type(x: Any) -> str:
    if isinstance(x, Pointer):
        return x.type
    return "i64" if isinstance(x, Long) else "fp32" if isinstance(x, float) else "i32"


def source(fn: Any, types: tuple[Any, ...], constants: Any) -> Any:
    """What Triton compiles: `fn` with groups of types, and a last one of constants.

    Nothing but the alignment of pointers is specialised on a value: strides come in units of whole
    vectors, so that their alignment follows.
    """
    promises = [kind.partition(":")[2] for kind in types[0]]
    plain = (_each(lambda kind: kind.partition(":")[0], x) for x in types)
    last = _each(lambda _: "constexpr", constants)
    return triton.compiler.ASTSource(
        fn,
        dict(zip(fn.arg_names, (*plain, last), strict=True)),
        dict(_leaves(constants, (len(types),))),
        {(0, i): [["tt.divisibility", int(n)]] for i, n in enumerate(promises) if n},
    )


_hashing = threading.Lock()


def hash_callees_first(fn: Any) -> None:
    """Have Triton hash the functions that jitted `fn` calls before `fn` itself.

    Its hash of a function, and with it the place in its cache, takes in the global constants of a
    callee only if that was hashed before: otherwise what one process has compiled, another that
    begins with another kernel, or a thread that is ahead of another, would not find.
    """
    if fn.hash is not None:
        return
    for name in fn.fn.__code__.co_names:
        callee = fn.fn.__globals__.get(name)
        if isinstance(callee, JITFunction) and callee is not fn:
            hash_callees_first(callee)
    fn.cache_key  # noqa: B018  computes the hash


class Bound:
    """A kernel with its types and constants: callable, compiled at the first call per device."""

    def __init__(
        self, fn: Any, types: tuple[Any, ...], constants: Any, options: dict[str, Any]
    ) -> None:
        self.fn, self.types, self.constants, self.options = fn, types, constants, options
        self.loaded: dict[int, tuple[Callable[..., None], int, Any]] = {}
        self._lock = threading.Lock()

    def load(self, device: str) -> None:
        """Compile for and load on a device, once."""
        index = int(device.partition(":")[2] or 0)
        with torch.cuda.device(index):
            self.load_on(index)

    def load_on(self, device: int) -> tuple[Callable[..., None], int, Any]:
        """Compile for and load on a GPU, which must be the current one.

        Raises:
            HataCaptureError: a CUDA graph is being captured, and the kernel is not loaded yet.
            KernelError: it cannot be compiled or loaded.
        """
        found = self.loaded.get(device)
        if found is not None:
            return found
        if torch.cuda.is_current_stream_capturing():
            raise HataCaptureError(
                f"{self.fn.__name__}: this call is not prepared, and kernels cannot be loaded "
                "while a CUDA graph is captured; call hata.prepare with the same arguments, or "
                "make the call once, before the capture"
            )
        with self._lock:
            found = self.loaded.get(device)
            if found is None:
                target = triton.runtime.driver.active.get_current_target()
                kernel = self._compiled(target, lambda made: made._init_handles())
                found = kernel.run, kernel.function, kernel.packed_metadata
                self.loaded[device] = found
        return found

    def compile(self, sm: int) -> Any:
        """Compile for a capability, or take from Triton's cache; needs no GPU."""
        return self._compiled(GPUTarget("cuda", sm, 32), lambda made: None)

    def misfit(self, sm: int, smem: int) -> str | None:
        """Why it cannot run on a GPU with `smem` bytes of shared memory a block, if so."""
        try:
            needed = self.compile(sm).metadata.shared
        except KernelError as error:
            return str(error)
        if needed <= smem:
            return None
        return (
            f"{self.fn.__name__} needs {needed} bytes of shared memory, and a block of this GPU "
            f"has {smem}"
        )

    def starter(
        self, ordinal: int, grid: int, numbers: tuple[Any, ...]
    ) -> Callable[[tuple[int, ...], int], None]:
        """What launches it on `grid` programs, given addresses and a stream."""
        loaded, tail = self.loaded, (*numbers, self.constants)

        def start(addresses: tuple[int, ...], stream: int) -> None:
            # Without Triton's own inspection of arguments.
            run, function, metadata = loaded.get(ordinal) or self.load_on(ordinal)
            run(grid, 1, 1, stream, function, metadata, None, None, None, addresses, *tail)

        return start

    def _compiled(self, target: Any, use: Callable[[Any], None]) -> Any:
        """The compiled kernel, on which `use` succeeded; a broken cache is passed over once."""
        name = self.fn.__name__
        try:
            return self._attempt(target, use)
        except TritonError as error:
            # What the compiler or the device says of the kernel itself: not the cache's fault.
            raise KernelError(
                f"backend 'triton': {name} cannot be compiled or loaded with "
                f"{self.constants._asdict() | self.options}: {error}; choose another configuration"
            ) from error
        # Whatever a damaged or unwritable cache folder makes Triton raise.
        except Exception as error:
            first = error
        with _redirected:
            # Nobody else's second attempt is under way, so this is the folder that was asked for.
            folder = knobs.cache.dir
        try:
            with _cache_of_this_process():
                made = self._attempt(target, use)
        except Exception as again:
            raise KernelError(
                f"backend 'triton': {name} cannot be compiled or loaded: "
                f"{_text(first)}; nor in a fresh cache folder: {_text(again)}; clear {folder}, "
                "or set TRITON_CACHE_DIR to a folder that can be written"
            ) from again
        warnings.warn(
            f"Triton's cache folder {folder} cannot be used ({_text(first)}): kernels are compiled "
            "anew for this process alone; clear it, or set TRITON_CACHE_DIR to a folder that can "
            "be written",
            RuntimeWarning,
            stacklevel=2,
        )
        return made

    def _attempt(self, target: Any, use: Callable[[Any], None]) -> Any:
        with _hashing:
            hash_callees_first(self.fn)
        made = triton.compile(
            source(self.fn, self.types, self.constants), target, dict(self.options)
        )
        # The driver takes a pointer without a size, and would read beyond what was cut off.
        if not is_whole(made.asm["cubin"]):
            raise ValueError(f"the cubin of {self.fn.__name__} is cut off")
        use(made)
        return made


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_whole(cubin: bytes) -> bool:
    """Whether an ELF file holds all that its header tables point at."""
    try:
        programs, sections = struct.unpack_from("<QQ", cubin, 32)
        program_size, program_count, size, count = struct.unpack_from("<HHHH", cubin, 54)
        ends = [programs + program_size * program_count, sections + size * count]
        for at in range(sections, ends[1], size):
            (kind,) = struct.unpack_from("<I", cubin, at + 4)
            offset, length = struct.unpack_from("<QQ", cubin, at + 24)
            # Sections of kind 8 take memory and no room in the file.
            ends.append(0 if kind == 8 else offset + length)
    except (struct.error, ValueError):
        return False
    return cubin[:4] == b"\x7fELF" and count > 0 and max(ends) <= len(cubin)


@functools.cache
def _folder_of_this_process() -> str:
    folder = tempfile.mkdtemp(prefix="hata-triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_redirected = threading.Lock()


@contextmanager
def _cache_of_this_process() -> Iterator[None]:
    """Triton caches in a folder of this process instead of the one it is told to use.

    That holds for all threads. What others compile meanwhile lands there too, and does no harm: the
    folder stays as long as the process.
    """
    with _redirected, knobs.cache.scope():
        knobs.cache.dir = _folder_of_this_process()
        yield


_bound: dict[tuple, Bound] = {}


class GPU(NamedTuple):
    """What kernels depend on of a GPU: its capability as one number (90 is 9.0), and its number."""

    sm: int
    ordinal: int = 0

    @property
    def has_pdl(self) -> bool:
        """Whether it has programmatic dependent launch."""
        return not INTERPRETED and self.sm >= 90

    @property
    def has_binary_mma(self) -> bool:
        """Whether it has binary tensor cores.

        Those are sm_80 to sm_90. For sm_100 and sm_120 the compiler makes of each product a call of
        a routine, some 110 instructions that spread bits to bytes and take eight products of those.
        """
        return not INTERPRETED and 80 <= self.sm <= 90


@functools.lru_cache
def gpu(ordinal: int) -> GPU:
    """A GPU that is here."""
    major, minor = torch.cuda.get_device_capability(ordinal)
    return GPU(10 * major + minor, ordinal)


def launch(
    launches: LaunchList,
    fn: Any,
    grid: int,
    groups: Sequence[Any],
    constants: Any,
    warps: int,
    stages: int = 2,
    pdl: bool = False,
) -> None:
    """Write the launch of a kernel into a list.

    Args:
        launches: The list.
        fn: A jitted function.
        grid: Programs.
        groups: Its arguments: a group of `Pointer`, then groups of numbers.
        constants: The group of its constants.
        warps: Warps a program.
        stages: Default depth of software pipelines.
        pdl: Whether it may start while the launch before it drains (it then waits inside).
    """
    types = tuple(_each(_type, x) for x in groups)
    key = (fn.__name__, types, constants, warps, stages, pdl)
    kernel = _bound.get(key)
    if kernel is None:
        options = {"num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if pdl else {})
        kernel = _bound[key] = Bound(fn, types, constants, options)
    addresses = tuple(pointer.address for pointer in groups[0])
    numbers = tuple(
        _each(lambda x: x.value if isinstance(x, Long) else x, one) for one in groups[1:]
    )
    if INTERPRETED:
        assert isinstance(launches, InterpretedList)
        launches.interpreted.append((kernel, grid, addresses, numbers))
    else:
        start = kernel.starter(launches.gpu.ordinal, grid, numbers)
        launches.launch(kernel, addresses, start)


class InterpretedList(LaunchList):
    """A launch list whose kernels the interpreter runs, on CPU tensors."""

    def __init__(self, call: Any, gpu: Any) -> None:
        super().__init__(call, gpu)
        self.interpreted: list[tuple[Bound, int, tuple[Address, ...], tuple[Any, ...]]] = []

    def run(self, call: Any) -> list[Any]:
        """Allocate and run the kernels, one after the other."""
        made = self.allocate(call)
        tensors = dict(zip(self.names, (*call[: call.ARRAYS], *made, None), strict=True))
        for kernel, grid, addresses, numbers in self.interpreted:
            kinds = kernel.types[0]
            pairs = zip(addresses, kinds, strict=True)
            views = (_view(tensors[name], kind, offset) for (name, offset), kind in pairs)
            kernel.fn[(grid,)](type(kinds)(*views), *numbers, kernel.constants)
        return made


_TORCH = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*u8": torch.uint8,
    "*i16": torch.int16,
    "*i32": torch.int32,
}


def _view(x: Any, pointer: str, offset: int) -> torch.Tensor:
    """A tensor as the interpreter takes it: with elements of the pointer's type."""
    dtype = _TORCH[pointer.partition(":")[0]]
    if x is None or x.numel() == 0:
        return torch.zeros(1, dtype=dtype)
    x = x[offset:] if offset else x if x.ndim else x.reshape(1)
    # A last dimension of one element may have any stride, of which a view would complain.
    return x if x.dtype == dtype else x.as_strided(x.shape, (*x.stride()[:-1], 1)).view(dtype)
