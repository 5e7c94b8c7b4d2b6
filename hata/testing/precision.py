"""How close is close enough: the tolerances of the conformance suite, each with its reason.

- Selection: none. Indices are equal bit for bit.
- Codes: equal, except where `|value| <= D * 2**-23 * sum|x_i p_i|`: there float32 sums of different
  order may have different signs.
- Norms: one unit in the last place of float16.
- Attention: at most twice the error of a plain computation in the same precision over the same
  selection, both against float64, plus a floor of one rounding of the output and eight of float32
  in the logits (a plain computation can be exact by luck).
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOAT32_EPS = 2.0**-23
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def wide(x: Any) -> Any:
    """An array in float64; `None` stays `None`."""
    return None if x is None else np.asarray(x).astype(np.float64)


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


def assert_codes(actual: np.ndarray, expected: np.ndarray, doubtful: np.ndarray) -> None:
    """Codes are equal wherever their bits are not doubtful."""
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    differs = np.unpackbits(np.bitwise_xor(actual, expected), axis=-1, bitorder="little").astype(
        bool
    )
    wrong = np.argwhere(differs & ~doubtful)
    assert not len(wrong), (
        f"{len(wrong)} of {differs.size} bits are wrong, the first at [b, h, t, bit] = "
        f"{wrong[0].tolist()}; {int((differs & doubtful).sum())} more differ within the margin"
    )


def assert_norms(actual: np.ndarray, expected: np.ndarray) -> None:
    """Norms are float16, none NaN, infinite or negative, and within one unit in the last place."""
    assert actual.dtype == np.float16
    assert np.isfinite(actual).all(), "a norm is NaN or infinite; NaN counts as 0, inf as 65504"
    # The bits of non-negative float16 numbers are integers in the same order.
    bits = np.ascontiguousarray(actual).view(np.int16).astype(int)
    ulps = np.abs(bits - np.ascontiguousarray(expected).view(np.int16))
    assert (ulps <= 1).all(), f"a norm is {int(ulps.max())} units in the last place off"


def plain_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
    scale: float,
    softcap: float | None,
    sink_logits: np.ndarray | None,
) -> tuple[np.ndarray, float]:
    """Attention as one would write it in the precision of q, gathered row by row.

    Every step is rounded to q's dtype, as a chain of framework calls in that dtype would; sums
    within a step are float32, as they are there.

    Returns:
        `(out, largest)`: out in float64, and the largest finite logit met.
    """
    dtype = q.dtype

    def rounded(x: Any) -> Any:
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)

    batch, heads, tokens, _ = q.shape
    out = np.zeros((batch, heads, tokens, values.shape[3]))
    largest = 0.0
    with np.errstate(all="ignore"):
        for b, h, t in np.ndindex(batch, heads, tokens):
            chosen = indices[b, h * indices.shape[1] // heads, t]
            chosen = chosen[chosen >= 0]
            head = h * keys.shape[1] // heads
            if not len(chosen):
                continue
            rows = keys[b, head, chosen].astype(np.float32)
            logits = rounded(rounded(rows @ q[b, h, t].astype(np.float32)) * np.float32(scale))
            if softcap is not None:
                logits = rounded(rounded(np.tanh(rounded(logits / softcap))) * softcap)
            sink = -np.inf if sink_logits is None else np.float32(sink_logits[h])
            top = np.maximum(logits.max(), sink)
            weights = np.exp(logits - top, dtype=np.float32)
            total = weights.sum(dtype=np.float32) + np.exp(sink - top, dtype=np.float32)
            shares = rounded(weights / total)
            out[b, h, t] = rounded(shares @ values[b, head, chosen].astype(np.float32))
            finite = np.abs(logits[np.isfinite(logits)])
            largest = max(largest, float(finite.max(initial=0.0)))
    return out, largest


def assert_attention(
    actual: np.ndarray, expected: np.ndarray, plain: np.ndarray, values: np.ndarray, logit: float
) -> None:
    """An output is NaN where the float64 one is, and elsewhere within the tolerance.

    Args:
        actual: Output under test, in its dtype.
        expected: The float64 output.
        plain: The output of `plain_attention`.
        values: The values attended to.
        logit: The largest logit, as `plain_attention` gives it.
    """
    assert actual.shape == expected.shape
    dtype = actual.dtype.name
    got = wide(actual)
    same = np.isfinite(got) == np.isfinite(expected)
    assert same.all(), f"not finite where float64 is, or the reverse: {np.argwhere(~same)[:3]}"
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.abs(got[finite] - expected[finite]).max()
    both = finite & np.isfinite(plain)
    plain_error = np.abs(plain[both] - expected[both]).max(initial=0.0)
    size = np.abs(wide(values))
    size = size[np.isfinite(size)].max(initial=0.0)
    floor = size * (EPS[dtype] / 2 + 8 * FLOAT32_EPS * (1.0 + logit))
    assert error <= 2 * plain_error + floor, (
        f"attention error {error:.3g}, a plain {dtype} computation has {plain_error:.3g} "
        f"(floor {floor:.3g})"
    )


def assert_lse(actual: np.ndarray, expected: np.ndarray, logit: float) -> None:
    """An lse is float32 and within 32 roundings of float32 of the float64 one."""
    assert actual.dtype == np.float32
    finite = np.isfinite(expected)
    assert (np.isfinite(actual) == finite).all(), "lse not finite where float64 is, or the reverse"
    assert (actual[np.isneginf(expected)] == -np.inf).all(), "lse of a query without keys"
    error = np.abs(wide(actual)[finite] - expected[finite]).max(initial=0.0)
    # A logit is a long sum itself.
    limit = 32 * FLOAT32_EPS * (1.0 + logit + np.abs(expected[finite]).max(initial=0.0))
    assert error <= limit, f"lse error {error:.3g}, expected at most {limit:.3g}"
