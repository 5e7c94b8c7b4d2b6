"""How arrays of a call are handed to kernels: types of pointers, and strides.

Strides come in units of whole vectors, so that the compiler sees their alignment; what is not
there (a bias, lengths, norms) is an empty argument and a flag or a step beside it.
"""

from __future__ import annotations

from typing import Any

from hata.launches import NONE, LaunchList, View, row_step

from .launch import INTERPRETED, Long, Pointer, group

# Pointer types of data by dtype name.
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def in_fp32(dtype: str) -> bool:
    """Whether products of this dtype are taken in fp32; the interpreter has none in bfloat16."""
    return dtype == "float32" or (INTERPRETED and dtype == "bfloat16")


def strides(x: View | None, names: str, unit: int = 1) -> Any:
    """Strides of `x` but the last, in units of `unit` elements, by one-letter names; 0 for none."""
    found = (0,) * len(names) if x is None else x.strides
    return group(**{name: Long(step // unit) for name, step in zip(names, found, strict=False)})


def cache_strides(x: View, unit: int) -> Any:
    """`strides` of a cache [B, Hkv, S, D]: `b`, `h` and `s`, that of 32 bits where they suffice."""
    found = strides(x, "bhs", unit)
    return found._replace(s=narrow(found.s.value, x.shape[2]))


def narrow(step: int, rows: int = 1 << 14) -> int | Long:
    """The step between `rows` of a head: 32 bits save work wherever they are enough."""
    return step if abs(step) * rows < 1 << 31 else Long(step)


def vector(*arrays: View | None) -> int:
    """8 if the rows of all arrays start at multiples of 16 bytes and 8 elements, else 1."""
    whole = all(
        x.alignment == 0 and all(step % 8 == 0 for step in x.strides[:-1])
        for x in arrays
        if x is not None
    )
    return 8 if whole else 1


def words(codes: View) -> tuple[int, int]:
    """`(unit, vector)` of codes: bytes a word is read by, and words that are aligned together."""
    for size in (16, 8, 4):
        if codes.in_units_of(size):
            return 4, size // 4
    return 1, 1


def words_of(bits: int) -> tuple[int, int]:
    """`words` of newly allocated codes of so many bits."""
    return 4, next(size // 4 for size in (16, 8, 4) if bits // 8 % size == 0)


def scanned_words(codes: View) -> tuple[int, int, int]:
    """`words` of codes to scan, and how many of them one vector of 16 bytes holds (at least 1).

    More than one only where codes are shorter than a vector and lie one after the other, in whole
    vectors; then strides of batch and heads are whole vectors.
    """
    slots, width = codes.shape[2:]
    whole = codes.alignment == 0 and all(step % 16 == 0 for step in codes.strides[:2])
    if width in (4, 8) and whole and codes.strides[2] == width and slots * width % 16 == 0:
        return 4, 4, 16 // width
    return *words(codes), 1


def code_steps(unit: int, vector: int) -> int:
    """Bytes that strides of codes are counted in."""
    return 1 if unit == 1 else 4 * vector


def code_pointer(unit: int, vector: int) -> str:
    """Type of a pointer to codes."""
    return "*u8" if unit == 1 else f"*i32:{4 * vector}" if vector > 1 else "*i32"


def data_pointer(dtype: str, vector: int) -> str:
    """Type of a pointer to data."""
    return POINTERS[dtype] + (":16" if vector > 1 else "")


def spans(launches: LaunchList) -> tuple[dict[str, Pointer], dict[str, int]]:
    """What `visible` reads: pointers to lengths and starts, and their steps from row to row."""
    names = "lengths", "starts"
    return (
        {name: Pointer(launches.address(name), "*i32") for name in names},
        {f"{name[:-1]}_step": row_step(launches.views[name]) for name in names},
    )


def optional(launches: LaunchList, name: str, dtype: str) -> tuple[Pointer, Pointer, int]:
    """A bias or sink logits as two pointers and a flag.

    The array comes in `dtype` (flag 1) or, beside data of another dtype, in float32 (flag 2);
    0: there is none. The pointer that is not used is empty.
    """
    view = launches.views[name]
    flag = 0 if view is None else 1 if view.dtype == dtype else 2
    at = launches.address(name)
    return (
        Pointer(at if flag == 1 else NONE, POINTERS[dtype]),
        Pointer(at if flag == 2 else NONE, "*fp32"),
        flag,
    )
