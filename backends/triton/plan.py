"""Plans: what a call launches, made once per signature and run again with other arrays.

Strides are passed in units of whole vectors, so that the compiler sees their alignment; what is not
there (a bias, lengths, norms) is an empty argument and a flag or a step beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem

from .launch import INTERPRETED, Bound, assumed_sm, rehearsed

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


def words_of(bits: int) -> tuple[int, int]:
    """`words` of newly allocated codes of so many bits."""
    return 4, next(size // 4 for size in (16, 8, 4) if bits // 8 % size == 0)


def scanned_words(fw: Framework, codes: Any) -> tuple[int, int, int]:
    """`words` of codes to scan, and how many of them one vector of 16 bytes holds (at least 1).

    More than one only where codes are shorter than a vector and lie one after the other, in whole
    vectors; then strides of batch and heads are whole vectors.
    """
    slots, width = fw.shape(codes)[2:]
    strides = steps(fw, codes)
    whole = fw.pointer(codes) % 16 == 0 and all(step % 16 == 0 for step in strides[:2])
    if width in (4, 8) and whole and strides[2] == width and slots * width % 16 == 0:
        return 4, 4, 16 // width
    return *words(fw, codes), 1


def code_steps(unit: int, vector: int) -> int:
    """Bytes that strides of codes are counted in."""
    return 1 if unit == 1 else 4 * vector


def row_step_type(step: int, rows: int = 1 << 14) -> str:
    """Type of the step between `rows` of a head: 32 bits save work wherever they are enough."""
    return "i32" if abs(step) * rows < 1 << 31 else "i64"


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
        if rehearsed([launch[0] for launch in self.launches]):
            return made
        arrays = (*arrays, *made, None)
        if INTERPRETED:
            for kernel, grid, references, numbers in self.launches:
                views = (
                    _view(arrays[slot], pointer, offset) for slot, pointer, offset in references
                )
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
    x = x[offset:] if offset else x if x.ndim else x.reshape(1)
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
    key = (problem, id(config), options, assumed_sm.get(), *signatures)
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
