"""How close is close enough: one tolerance for each result, with its reason.

- Selection: none. Indices are equal bit for bit.
- Codes: equal, except where `|value| <= D * 2**-23 * sum|x_i p_i|`: there float32 sums of different
  order may have different signs.
- Norms: one unit in the last place of float16.
- Attention: at most twice the error of a plain computation in the same precision over the same
  selection, both against float64, plus a floor (a plain computation can be exact by luck): one
  rounding of the output and eight of float32 in the logits, of what the weights make of |values|.

A *fault* is what is wrong with a result, in words; `None` if nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

FLOAT32_EPS = 2.0**-23
EPS = {"float32": FLOAT32_EPS, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def hold(fault: str | None) -> None:
    """Raise `AssertionError` if there is a fault."""
    if fault is not None:
        raise AssertionError(fault)


def wide(x: Any) -> Any:
    """An array in float64; `None` stays `None`."""
    return None if x is None else np.asarray(x).astype(np.float64)


def round_to(dtype: str, x: np.ndarray) -> np.ndarray:
    """Float32 values rounded to a dtype; bfloat16 needs no more than NumPy."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float32)
    bits = x.view(np.uint32)
    # To the nearest, of two equally near ones to the even one.
    nearest = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
    return np.where(np.isfinite(x), nearest, x)


def doubtful_bits(x: Any, projection: Any, bias: Any = None) -> np.ndarray:
    """Bits that backends may disagree on, `[B, H', T, r]` bool."""
    x, projection = wide(x), wide(projection)
    group = x.shape[1] // projection.shape[0]
    weights = projection.repeat(group, axis=0)
    with np.errstate(all="ignore"):
        values = x @ weights
        if bias is not None:
            values = values + wide(bias).repeat(group, axis=0)[:, None]
        margin = x.shape[3] * FLOAT32_EPS * (np.abs(x) @ np.abs(weights))
        # A bit decided by an infinity or a NaN is in no doubt.
        return np.isfinite(margin) & (np.abs(values) <= margin)


def codes_fault(
    actual: np.ndarray, expected: np.ndarray, doubtful: Callable[[], np.ndarray]
) -> str | None:
    """Codes differ in a bit that is not doubtful; which are is asked only where some differ."""
    if (actual.dtype, actual.shape) != (np.uint8, expected.shape):
        return f"codes are {actual.dtype} {actual.shape}, expected uint8 {expected.shape}"
    if np.array_equal(actual, expected):
        return None
    differs = np.unpackbits(np.bitwise_xor(actual, expected), axis=-1, bitorder="little") > 0
    wrong = np.argwhere(differs & ~doubtful())
    if not len(wrong):
        return None
    return (
        f"{len(wrong)} of {differs.size} bits of codes are wrong, the first at [b, h, t, bit] = "
        f"{wrong[0].tolist()}; {int(differs.sum()) - len(wrong)} more differ within the margin"
    )


def norms_fault(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """Norms are no finite float16 numbers, or more than one unit in the last place off."""
    if actual.dtype != np.float16:
        return f"norms are {actual.dtype}, expected float16"
    if not np.isfinite(actual).all():
        return "a norm is NaN or infinite; NaN counts as 0, inf as 65504"
    # The bits of non-negative float16 numbers are integers in the same order.
    bits, right = (np.ascontiguousarray(x).view(np.int16).astype(int) for x in (actual, expected))
    off = np.abs(bits - right).max(initial=0)
    return None if off <= 1 else f"a norm is {off} units in the last place off"


def selection_fault(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """Indices differ."""
    if (actual.dtype, actual.shape) != (np.int32, expected.shape):
        return f"indices are {actual.dtype} {actual.shape}, expected int32 {expected.shape}"
    wrong = (actual != expected).any(-1)
    if not wrong.any():
        return None
    first = tuple(np.argwhere(wrong)[0].tolist())
    return (
        f"{np.count_nonzero(wrong)} of {wrong.size} selections are wrong, the first at [b, h, t] = "
        f"{list(first)}: {actual[first].tolist()}, expected {expected[first].tolist()}"[:600]
    )


class Plain(NamedTuple):
    """Attention as one would write it in the precision of q.

    Attributes:
        out: `[B, H, T, Dv]`, in float64.
        logit: The largest finite logit met.
        size: The largest sum of weights times |values|.
        dtype: What its steps were rounded to.
    """

    out: np.ndarray
    logit: float
    size: float
    dtype: str


def plain_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: np.ndarray | None = None,
    dtype: str = "",
) -> Plain:
    """Attention gathered row by row, each step rounded to `dtype`, or else to that of q.

    So would a chain of framework calls in that dtype; sums within a step are float32, as there.
    """
    dtype = dtype or q.dtype.name

    def rounded(x: Any) -> np.ndarray:
        return round_to(dtype, np.asarray(x, np.float32))

    def most(x: np.ndarray, least: float) -> float:
        return max(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)), least)

    batch, heads, tokens, depth = q.shape
    scale = depth**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, tokens, values.shape[3]))
    logit = size = 0.0
    with np.errstate(all="ignore"):
        # One selection after the other, for all query heads that it is of.
        for b, row, t in np.ndindex(batch, indices.shape[1], tokens):
            chosen = indices[b, row, t]
            chosen = chosen[chosen >= 0]
            if not len(chosen):
                continue
            members = slice(*(n * heads // indices.shape[1] for n in (row, row + 1)))
            head = row * keys.shape[1] // indices.shape[1]
            rows = keys[b, head, chosen].astype(np.float32)
            queries = q[b, members, t].astype(np.float32)
            logits = rounded(rounded(queries @ rows.T) * np.float32(scale))
            if softcap is not None:
                logits = rounded(rounded(np.tanh(rounded(logits / softcap))) * softcap)
            sink = np.full(len(logits), -np.inf, np.float32)
            if sink_logits is not None:
                sink[:] = sink_logits[members]
            top = np.maximum(logits.max(-1), sink)
            weights = np.exp(logits - top[:, None], dtype=np.float32)
            total = weights.sum(-1, dtype=np.float32) + np.exp(sink - top, dtype=np.float32)
            shares = rounded(weights / total[:, None])
            rows = values[b, head, chosen].astype(np.float32)
            out[b, members, t] = rounded(shares @ rows)
            mixed = shares @ np.abs(rows)
            # Where this computation overflows, another may not.
            mixed = np.where(np.isfinite(mixed), mixed, np.abs(rows).max(0))
            logit, size = most(logits, logit), most(mixed, size)
    return Plain(out, logit, size, dtype)


def attention_fault(actual: np.ndarray, expected: np.ndarray, plain: Plain) -> str | None:
    """An output is not NaN where the float64 one is, or elsewhere beyond the tolerance.

    Args:
        actual: Output under test, in any dtype.
        expected: The float64 output.
        plain: Of `plain_attention`, over the same selection.
    """
    if actual.shape != expected.shape:
        return f"the output has shape {actual.shape}, expected {expected.shape}"
    got, finite = wide(actual), np.isfinite(expected)
    strange = np.argwhere(np.isfinite(got) != finite)
    if len(strange):
        return f"not finite where float64 is, or the reverse: {strange[:3].tolist()}"
    error = np.abs(got[finite] - expected[finite]).max(initial=0.0)
    both = finite & np.isfinite(plain.out)
    usual = np.abs(plain.out[both] - expected[both]).max(initial=0.0)
    floor = plain.size * (EPS[plain.dtype] / 2 + 8 * FLOAT32_EPS * (1.0 + plain.logit))
    if error <= 2 * usual + floor:
        return None
    return (
        f"attention is off by {error:.3g}, a plain {plain.dtype} computation by {usual:.3g} "
        f"(floor {floor:.3g})"
    )


def lse_fault(actual: np.ndarray, expected: np.ndarray, logit: float) -> str | None:
    """An lse is not float32, or more than 32 roundings of float32 off the float64 one."""
    if actual.dtype != np.float32:
        return f"lse is {actual.dtype}, expected float32"
    finite = np.isfinite(expected)
    if (np.isfinite(actual) != finite).any():
        return "lse not finite where float64 is, or the reverse"
    if (actual[np.isneginf(expected)] != -np.inf).any():
        return "lse of a query without keys is not -inf"
    error = np.abs(wide(actual)[finite] - expected[finite]).max(initial=0.0)
    # A logit is a long sum itself.
    limit = 32 * FLOAT32_EPS * (1.0 + logit + np.abs(expected[finite]).max(initial=0.0))
    return None if error <= limit else f"lse error {error:.3g}, expected at most {limit:.3g}"
