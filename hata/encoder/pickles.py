"""Pickles of plain data: dictionaries, lists, numbers, strings, NumPy arrays and torch tensors.

A pickle is a program that may name any function to call, and that may hand what it likes to the
objects it makes: NumPy's arrays believe what it says of their bytes, and so can be made to read
bytes as addresses. So nothing of NumPy or torch is named here. The few names that arrays and
tensors need stand for recorders, which note what they are called with and do nothing; every other
name is refused. `array` then reads such a record: dtypes from a list, shapes that fit the bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# A file of the largest published weights is some 160 MB.
_MOST_BYTES = 2 << 30
_MOST_DIMENSIONS = 8
# Floats, whole numbers and booleans, as NumPy writes them: never objects, records or strings.
_CODE = re.compile(r"f[248]|[iu][1248]|b1")
_ORDERS = {"<": "<", ">": ">", "=": "=", "|": "="}
# The dtypes of torch's storages; bfloat16, which NumPy lacks, as the upper half of a float32.
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<b1",
}
_KNOWN = frozenset(
    {
        ("collections", "OrderedDict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        *(
            (f"{home}.{module}", name)
            for home in ("numpy._core", "numpy.core")
            for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
        ),
        *(("torch", name) for name in _STORAGES),
    }
)
# The first two pickles of what `torch.save` writes for a pickled tensor.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class UnsafePickle(ValueError):
    """A pickle asks for something that could run code, or is too large."""


def load_plain(path: Path) -> Any:
    """Read a pickle of plain data; its arrays and tensors are records, for `array` to read.

    Raises:
        UnsafePickle: It names anything else, or is over 2 GiB.
        Exception: It is damaged; of any kind.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise UnsafePickle(f"of {size} bytes, expected at most {_MOST_BYTES}; it is something else")
    with path.open("rb") as file:
        return _load(file, size)


def array(x: Any) -> np.ndarray:
    """A record of an array or a tensor as a float32 array.

    Raises:
        ValueError: It is anything else, of another dtype, or its shape does not fit its bytes.
    """
    if isinstance(x, Record) and x.name == "_rebuild_parameter" and x.args:
        x = x.args[0]
    name = x.name if isinstance(x, Record) else type(x).__name__
    if not isinstance(x, Record) or name not in _READERS:
        raise ValueError(f"got {name} where an array or a tensor belongs")
    # What is too large for float32 becomes infinite, which the encoder refuses by name.
    with np.errstate(over="ignore"):
        return _READERS[name](x).astype(np.float32)


class Record:
    """What a name was called with, and the state that it was given afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        """Called by a pickle, which so can change nothing else here."""
        self.state = state


class _Name:
    """Stands for something that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        return _Dictionary() if self.name == "OrderedDict" else Record(self.name, args)

    def __setstate__(self, state: Any) -> None:
        """Called by a pickle that would change what others get for this name."""
        raise UnsafePickle(f"a pickle that gives {self.name} a state; expected plain data")


class _Dictionary(dict[Any, Any]):
    """Stands for an OrderedDict; its attributes, such as the versions of modules, are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """See `Record`."""


class _Plain(pickle.Unpickler):
    """Finds recorders for the names that plain data needs, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        if (module, name) not in _KNOWN:
            raise UnsafePickle(
                f"a pickle that asks for {shown(f'{module}.{name}')}, which could run code; "
                "expected nothing but dictionaries, lists, arrays and tensors; do not load it by "
                "other means unless you trust who made it"
            )
        return _Name(name)

    def persistent_load(self, pid: Any) -> Any:
        """See `pickle.Unpickler`: what a storage inside a tensor says of itself."""
        return Record("storage", pid if isinstance(pid, tuple) else ())


def shown(text: object) -> str:
    """The beginning of a text from a file as printable ASCII, in one line."""
    return ascii(str(text)[:100])[1:-1]


def _load(file: BinaryIO, size: int) -> Any:
    """One pickle; the memo's size is what its numbers say, so they are looked at before."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in ("PUT", "LONG_BINPUT") or not isinstance(argument, int):
            continue
        if not 0 <= argument <= size:
            raise UnsafePickle(f"with a memo of {argument} entries in {size} bytes; it is damaged")
    file.seek(start)
    return _Plain(file).load()


def _reconstructed(x: Record) -> np.ndarray:
    """`_reconstruct(ndarray, (0,), b"b")` with the state version, shape, dtype, Fortran, bytes."""
    if not isinstance(x.state, tuple) or len(x.state) != 5:
        raise ValueError("got an array without a whole state")
    _, shape, dtype, fortran, raw = x.state
    return _shaped(raw, dtype, shape, "F" if fortran is True else "C")


def _of_buffer(x: Record) -> np.ndarray:
    """`_frombuffer(bytes, dtype, shape, order)`, and the order of the axes where that is K."""
    if len(x.args) not in (4, 5):
        raise ValueError(f"got a buffer of {len(x.args)} parts, expected 4 or 5")
    raw, dtype, shape, order, *axes = x.args
    if order == "K" and axes:
        _check_sizes("axes", axes[0])
        return _shaped(raw, dtype, shape, "C").transpose(axes[0])
    return _shaped(raw, dtype, shape, "F" if order == "F" else "C")


def _shaped(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    found = _dtype(dtype)
    _check_sizes("shape", shape)
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape) * found.itemsize:
        held = f"{len(raw)} bytes" if isinstance(raw, bytes | bytearray) else type(raw).__name__
        raise ValueError(f"got {held} for an array of shape {shape} and dtype {found.name}")
    return np.frombuffer(raw, found).reshape(shape, order=order)


def _dtype(x: Any) -> np.dtype[Any]:
    """`dtype(code, align, copy)` with the state version, byte order, and no parts."""
    if not isinstance(x, Record) or x.name != "dtype" or not x.args:
        raise ValueError("got an array without a dtype")
    code, state = x.args[0], x.state
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise ValueError(
            f"got an array of dtype {shown(code) if isinstance(code, str) else type(code)}, "
            "expected real numbers"
        )
    if not isinstance(state, tuple) or len(state) < 5 or any(s is not None for s in state[2:5]):
        raise ValueError("got a dtype with parts, expected real numbers")
    if not isinstance(state[1], str) or state[1] not in _ORDERS:
        raise ValueError("got a dtype of an unknown byte order")
    return np.dtype(_ORDERS[state[1]] + code)


def _tensor(x: Record) -> np.ndarray:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
    if len(x.args) < 4:
        raise ValueError("got a tensor that is not whole")
    numbers = _storage(x.args[0])
    offset, size, stride = x.args[1:4]
    for name, given in (("offset", (offset,)), ("size", size), ("stride", stride)):
        _check_sizes(name, given)
    if len(size) != len(stride):
        raise ValueError(f"got a tensor of size {size} with strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # One that repeats its numbers could be of any size.
    if 0 in size or last >= len(numbers) or math.prod(size) > len(numbers):
        raise ValueError(f"got a tensor of size {size} and strides {stride} in {len(numbers)}")
    steps = [step * numbers.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False)


def _storage(x: Any) -> np.ndarray:
    """The numbers of `_load_from_bytes(bytes)`: five pickles, their count, and they themselves."""
    raw = x.args[0] if isinstance(x, Record) and len(x.args) == 1 else None
    if not isinstance(x, Record) or x.name != "_load_from_bytes" or not isinstance(raw, bytes):
        raise ValueError("got a tensor without a storage")
    file = io.BytesIO(raw)
    magic, protocol, _, held, _ = (_load(file, len(raw)) for _ in range(5))
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError("got a storage of another format")
    kind = held.args[1] if isinstance(held, Record) and len(held.args) > 1 else None
    if not isinstance(kind, _Name) or kind.name not in _STORAGES:
        raise ValueError("got a storage of an unknown dtype")
    dtype = np.dtype(_STORAGES[kind.name])
    count = int.from_bytes(file.read(8), "little")
    rest = file.read()
    if len(rest) != count * dtype.itemsize:
        raise ValueError(f"got {len(rest)} bytes for a storage of {count} {dtype.name}")
    numbers = np.frombuffer(rest, dtype)
    if kind.name == "BFloat16Storage":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers


def _check_sizes(name: str, sizes: Any) -> None:
    """Raise `ValueError` unless these are a few whole numbers, none negative."""
    if (
        not isinstance(sizes, tuple)
        or len(sizes) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes)
    ):
        raise ValueError(f"got a {name} of something else than whole numbers")


_READERS = {
    "_reconstruct": _reconstructed,
    "_frombuffer": _of_buffer,
    "_rebuild_tensor_v2": _tensor,
}
