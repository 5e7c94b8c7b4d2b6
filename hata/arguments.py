"""Checks of single arguments: arrays, sizes, numbers.

`hata.checks` puts them together for each op. Messages name the argument, what came, what is
expected, and the fix.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

from hata.arrays import ITEMSIZE, Framework, framework
from hata.call import Budget
from hata.errors import HataAutogradError, HataDeviceError, HataDTypeError, HataShapeError

MAX_HEAD_DIM = 576
# Sizes without an upper limit mean "all" from here on: no array has more slots.
_ALL = 2**31 - 1
# Bits of an int that an error can still write out.
_MOST_BITS = 4096
# Kernels take numbers as float32: those from here on round to infinity there, and a positive one
# below the smallest normal number may count as 0.
_INFINITE = 2.0**128 - 2.0**103
_SMALLEST = 2.0**-126


class Arrays:
    """Checks the arrays of one call, by name, and remembers their framework and device."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.first = call._fields[0]
        self.fw = framework(self.first, call[0])
        self.device = ""
        self.wide = False

    def take(self, name: str, dtypes: tuple[str, ...], *ndims: int) -> tuple[int, ...]:
        """Check one array's framework, dtype, device, rank and strides; return its shape."""
        x = getattr(self.call, name)
        fw = framework(name, x)
        if fw is not self.fw:
            raise HataDTypeError(
                f"{name}: got a {fw.name} array, expected {self.fw.name} like {self.first}; "
                "pass arrays of one framework"
            )
        refusal = fw.refusal(x)
        if refusal:
            raise HataDTypeError(f"{name}: {refusal}")
        dtype = fw.dtype(x)
        if dtype not in dtypes:
            hint = "convert it"
            if dtypes == ("uint8",) and dtype in ("int8", "int32", "int64", "uint32", "uint64"):
                hint = "codes are bytes: use .view(uint8)"
            raise HataDTypeError(f"{name}: got {dtype}, expected {' or '.join(dtypes)}; {hint}")
        device = fw.device(x)
        if not self.device:
            self.device, self.first = device, name
        if device != self.device:
            raise HataDeviceError(
                f"{name}: got an array on {device}, but {self.first} is on {self.device}; "
                "move them to one device"
            )
        shape = fw.shape(x)
        if len(shape) not in ndims:
            expected = " or ".join(map(str, ndims))
            raise HataShapeError(f"{name}: got shape {list(shape)}, expected {expected} dimensions")
        self._strides(name, x, shape)
        if fw.needs_grad(x):
            raise HataAutogradError(
                f"{name}: requires a gradient, but HATA's ops have no derivative; call them under "
                "torch.no_grad(), detach the tensor, or pass the primal of forward_ad.unpack_dual"
            )
        if name in self.call.written():
            self._writable(name, x)
        return shape

    def given(self, name: str) -> bool:
        """Whether an argument is there."""
        return getattr(self.call, name) is not None

    def expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> None:
        """Check one array, if it is given, and its whole shape; `why`: what that follows from."""
        if self.given(name):
            got = self.take(name, dtypes, len(shape))
            if got != shape:
                expected = f"{list(shape)} ({why})"
                raise HataShapeError(f"{name}: got shape {list(got)}, expected {expected}")

    def dtype(self, name: str) -> str:
        """dtype name of an array that was taken."""
        return self.fw.dtype(getattr(self.call, name))

    def _strides(self, name: str, x: Any, shape: tuple[int, ...]) -> None:
        strides = self.fw.strides(x)
        if 0 in shape:
            return
        if any(s < 0 for s, n in zip(strides, shape, strict=True) if n > 1):
            raise HataShapeError(
                f"{name}: got negative strides {strides}, expected none; pass a contiguous copy"
            )
        if shape and shape[-1] > 1 and strides[-1] != 1:
            raise HataShapeError(
                f"{name}: got stride {strides[-1]} in the last dimension, expected 1 (dense "
                "rows); pass a contiguous copy"
            )
        itemsize = ITEMSIZE[self.fw.dtype(x)]
        if self.fw.pointer(x) % itemsize:
            raise HataShapeError(
                f"{name}: got data at an address that is no multiple of its item size "
                f"{itemsize}; pass a copy"
            )
        extent = sum((n - 1) * s for s, n in zip(strides, shape, strict=True))
        self.wide |= extent >= 2**31

    def _writable(self, name: str, x: Any) -> None:
        """Check that the call may write into `x`, each element once."""
        if self.fw.foreign:
            raise HataDTypeError(
                f"{name}: got a {self.fw.name} array, which cannot be written in place; "
                "use another framework's array, or leave it out"
            )
        if self.fw.is_readonly(x):
            raise HataDTypeError(
                f"{name}: got a read-only array, expected one that can be written; pass a copy"
            )
        shape, strides = self.fw.shape(x), self.fw.strides(x)
        if 0 in shape:
            return
        step = 1
        for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
            if stride < step:
                raise HataShapeError(
                    f"{name}: got overlapping elements (strides {strides} of shape "
                    f"{list(shape)}), expected each element once; pass a copy"
                )
            step = stride * size

    def aligned(self, *names: str) -> bool:
        """Whether rows are 16-byte aligned and a head's rows contiguous over the tokens."""
        for name in names:
            x = getattr(self.call, name)
            shape, strides = self.fw.shape(x), self.fw.strides(x)
            if 0 in shape:
                continue
            items = 16 // ITEMSIZE[self.dtype(name)]
            steps = [s for s, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1]
            if any(step % items for step in (*steps, shape[-1])):
                return False
            if self.fw.pointer(x) % 16 or (shape[-2] > 1 and strides[-2] != shape[-1]):
                return False
        return True


def extent(fw: Framework, x: Any) -> tuple[int, bool]:
    """Bytes from the first to the last element of an array that is not empty, and if all are its.

    Strides must be 0 or more, as `Arrays.take` sees to.
    """
    elements, dense = 1, True
    for stride, size in sorted(zip(fw.strides(x), fw.shape(x), strict=True)):
        if size > 1:
            # A larger step than what is covered leaves holes, which rows that overlap do not fill.
            dense &= stride <= elements
            elements += stride * (size - 1)
    return elements * ITEMSIZE[fw.dtype(x)], dense


def multiple(name: str, heads: int, kv_heads: int) -> None:
    """Check that heads form whole groups."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise HataShapeError(
            f"{name}: got {heads} heads for {kv_heads} KV heads, expected a positive multiple of "
            "the KV heads"
        )


def head_dim(name: str, size: int) -> None:
    """Check a head size against the supported ones."""
    if size % 16 or not 16 <= size <= MAX_HEAD_DIM:
        raise HataShapeError(
            f"{name}: got head size {size}, supported are the multiples of 16 from 16 to "
            f"{MAX_HEAD_DIM}; pad with zeros to the next one"
        )


def bits_of(name: str, bits: int) -> None:
    """Check the bits of a code."""
    if bits < 32 or bits % 32:
        raise HataShapeError(f"{name}: got {bits} bits, expected a positive multiple of 32")


def code_width(name: str, shape: tuple[int, ...], bits: int, what: str) -> None:
    """Check that codes are as wide as what made the others."""
    if shape[-1] * 8 != bits:
        raise HataShapeError(
            f"{name}: got codes of {shape[-1]} bytes ({shape[-1] * 8} bits), but {what} has "
            f"{bits} bits ({bits // 8} bytes); encode with the same projection"
        )


def whole(name: str, value: Any, least: int) -> int:
    """An int argument of at least `least`; bool and float are refused."""
    if type(value) is not int:
        if isinstance(value, (bool, float)):
            raise HataDTypeError(f"{name}: got {value!r}, expected an int; pass a whole number")
        try:
            value = operator.index(value)
        except TypeError:
            raise HataDTypeError(
                f"{name}: got {type(value).__name__}, expected an int; pass a whole number"
            ) from None
    if value.bit_length() > _MOST_BITS:
        # Too long to be written out.
        raise HataShapeError(
            f"{name}: got an int of {value.bit_length()} bits, expected {_MOST_BITS} at most; "
            "pass a smaller number"
        )
    if value < least:
        raise HataShapeError(f"{name}: got {value}, {name} must be ≥ {least}")
    return value


def count(name: str, value: Any) -> int:
    """A number of keys that may be larger than there are keys; kernels get at most 2**31 - 1."""
    return min(whole(name, value, 0), _ALL)


def real(name: str, value: Any) -> float:
    """A float argument, finite in float32; NumPy's real scalars are numbers, bool is none."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise HataDTypeError(
            f"{name}: got {value!r} of type {type(value).__name__}, expected a float; pass a number"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # NaN fails every comparison.
    if not abs(number) < _INFINITE:
        raise HataShapeError(
            f"{name}: got {number}, expected a finite number in float32, which kernels take it as"
        )
    return number


def flag(name: str, value: Any) -> bool:
    """A bool argument."""
    if not isinstance(value, bool):
        raise HataDTypeError(
            f"{name}: got {value!r} of type {type(value).__name__}, expected True or False"
        )
    return value


def budget(call: Any) -> Budget:
    """Check the budget arguments of a call.

    Raises:
        HataShapeError: k < 1, a negative size, `sink + recent > k`, ratio outside (0, 1].
        HataDTypeError: an argument is no int (k, k_min, sink, recent) or no float (ratio).
    """
    k, ratio = whole("k", call.k, 1), call.ratio
    k_min, sink = count("k_min", call.k_min), whole("sink", call.sink, 0)
    recent = whole("recent", call.recent, 0)
    if sink + recent > k:
        raise HataShapeError(
            f"sink + recent: got {sink} + {recent}, expected at most k = {k}; they count within "
            "the budget, so raise k or lower them"
        )
    if k > _ALL:
        raise HataShapeError(f"k: got {k}, expected less than 2**31")
    if ratio is None:
        return Budget(k, -1, k_min, sink, recent)
    ratio = real("ratio", ratio)
    if not 0.0 < ratio <= 1.0:
        raise HataShapeError(f"ratio: got {ratio}, expected 0 < ratio <= 1")
    return Budget(k, round(ratio * 2**32), k_min, sink, recent)


def softcap(value: Any) -> float | None:
    """Check a soft cap: a positive normal float32, or `None`."""
    if value is None:
        return None
    value = real("softcap", value)
    if value < _SMALLEST:
        raise HataShapeError(
            f"softcap: got {value}, expected a positive number of at least {_SMALLEST:.3g}, or "
            "None for none"
        )
    return value
