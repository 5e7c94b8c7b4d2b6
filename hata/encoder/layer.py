"""What a layer of an encoder may hold beside its projection: hashes of queries, hidden layers.

A *hidden layer* is `silu(x A + a)` with weights `[heads, in, out]` and a bias `[heads, out]`; the
projection and bias of `hata.encode` come after the last one. Keys and queries have their own.

Heads: `x [B, H', T, in]` meets weights of C heads, of which H' is a multiple, so that head h takes
those of h // (H' / C); or C is a multiple of H', and every head is used C / H' times in a row. The
first is how several query heads share a projection; the second is how a query head gets several
codes, or a KV head one code per query head.

Everything here is NumPy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hata.errors import EncoderError

_DTYPES = frozenset({"float32", "float16", "bfloat16"})
# More than any kernel takes, and few enough that a slip of the pen does not fill the memory.
MOST_BITS = 65_536


class Hidden(NamedTuple):
    """A hidden layer.

    Attributes:
        weight: `[heads, in, out]`.
        bias: `[heads, out]`.
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, eq=False)
class QueryHash:
    """How the queries of a layer are hashed, where keys are hashed otherwise.

    Attributes:
        projection: `[Cq, in, r]`; Cq is a multiple of the projection's heads for keys.
        bias: `[Cq, r]`, or `None`.
        hidden: Hidden layers before the projection, each with Cq heads.

    Raises:
        EncoderError: One of them is no NumPy array.
    """

    projection: np.ndarray
    bias: np.ndarray | None = None
    hidden: tuple[Hidden, ...] = ()

    def __post_init__(self) -> None:
        need_array("query_projection", self.projection)
        if self.bias is not None:
            need_array("query_bias", self.bias)
        object.__setattr__(self, "hidden", hidden_layers("query_hidden", self.hidden))


class LayerHash(NamedTuple):
    """How a layer is hashed.

    Attributes:
        projection: Of keys, `[Hkv, in, r]`; `None` where the layer is dense.
        bias: `[Hkv, r]`, or `None`.
        query: How queries are hashed, or `None` where like keys.
        hidden: Hidden layers of keys, from first to last.
    """

    projection: np.ndarray | None
    bias: np.ndarray | None = None
    query: QueryHash | None = None
    hidden: tuple[Hidden, ...] = ()


def hidden_layers(name: str, given: Any) -> tuple[Hidden, ...]:
    """Hidden layers of pairs of arrays; raises `EncoderError` where they are none."""
    try:
        found = tuple(Hidden(*one) for one in given)
    except TypeError:
        raise EncoderError(
            f"{name}: got {type(given).__name__}, expected hidden layers, each a weight and a bias"
        ) from None
    for number, one in enumerate(found):
        need_array(f"{name}.{number}.weight", one.weight)
        need_array(f"{name}.{number}.bias", one.bias)
    return found


def need_array(name: str, array: Any) -> None:
    """Raise `EncoderError` unless it is a NumPy array."""
    if not isinstance(array, np.ndarray):
        kind = type(array)
        raise EncoderError(
            f"{name}: got {kind.__module__}.{kind.__qualname__}, expected a NumPy array; convert it"
        )


def check_bits(bits: Any) -> int:
    """Bits as an int; raises `EncoderError` unless they are a positive multiple of 32."""
    try:
        number = 0 if isinstance(bits, bool) else operator.index(bits)
    except TypeError:
        number = 0
    if not 32 <= number <= MOST_BITS or number % 32:
        raise EncoderError(
            f"bits: got {bits!r}, expected a positive multiple of 32, at most {MOST_BITS}"
        )
    return number


def check_array(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    """Raise `EncoderError` unless an array has this shape, a known dtype and finite numbers."""
    if array.shape != expected:
        raise EncoderError(f"{name}: got shape {array.shape}, expected {expected}")
    if array.dtype.name in _DTYPES and not np.isfinite(array.astype(np.float32)).all():
        raise EncoderError(
            f"{name}: got NaN or infinite numbers, with which all codes are alike; train it again"
        )
    if array.dtype.name not in _DTYPES:
        raise EncoderError(
            f"{name}: got dtype {array.dtype.name}, expected one of {', '.join(sorted(_DTYPES))}"
        )


def check_side(
    name: str,
    projection: np.ndarray,
    bias: np.ndarray | None,
    hidden: Sequence[Hidden],
    heads: int,
    size: int,
    bits: int,
) -> None:
    """Check one side of a layer: its hidden layers follow one another, the projection the last.

    A vector of `size` goes in, and all parts have so many `heads`; errors call a part `name`, such
    as `layers.3.query_`, and what it is. Raises `EncoderError` where one does not fit.
    """
    for number, (weight, offset) in enumerate(hidden):
        part = f"{name}hidden.{number}"
        if weight.ndim != 3 or weight.shape[2] < 1:
            raise EncoderError(
                f"{part}.weight: got shape {weight.shape}, expected ({heads}, {size}, width)"
            )
        check_array(f"{part}.weight", weight, (heads, size, weight.shape[2]))
        size = weight.shape[2]
        check_array(f"{part}.bias", offset, (heads, size))
    if hidden and (size % 16 or size > 576):
        raise EncoderError(
            f"{name}hidden: got a last layer of width {size}, expected a multiple of 16 up to 576, "
            "which is what hata.encode takes; train it with another width"
        )
    check_array(f"{name}projection", projection, (heads, size, bits))
    if bias is not None:
        check_array(f"{name}bias", bias, (heads, bits))


def features(x: np.ndarray, hidden: Sequence[Hidden], heads: int) -> np.ndarray:
    """What `hata.encode` is given: x after the hidden layers, float32.

    Args:
        x: `[B, H', T, in]`.
        hidden: Of C heads, from first to last.
        heads: C, also where there is no hidden layer.

    Returns:
        `[B, max(H', C), T, width]`; x itself where nothing has to be done.
    """
    if heads > x.shape[1]:
        x = np.repeat(x, heads // x.shape[1], axis=1)
    for weight, bias in hidden:
        repeats = x.shape[1] // heads
        x = x.astype(np.float32) @ np.repeat(weight.astype(np.float32), repeats, axis=0)
        x += np.repeat(bias.astype(np.float32), repeats, axis=0)[:, None]
        # exp may overflow to infinity, whose quotient is the right 0.
        with np.errstate(over="ignore"):
            x /= 1 + np.exp(-x)
    return x
