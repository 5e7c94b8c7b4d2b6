"""A result is checked before it is timed.

The ops and the dense contenders are held against the NumPy oracle in float64, on a sample of the
(row, KV head) pairs; `hash_attend` with an unlimited budget must agree with dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from hata.backends.reference import oracle
from torch import Tensor

import hata
from benchmarks.contenders import Case, Contender

# (row, KV head) pairs that are checked, spread evenly.
_PAIRS = 8
# Keys of the comparison between an unlimited budget and dense attention.
_PREFIX = 4096
# Largest error allowed, relative to the largest magnitude of the expected values.
_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


class WrongResult(Exception):
    """A contender computes something else than it should; nothing of it is timed."""


def case(case: Case, ops: Sequence[Contender], dense: Sequence[Contender]) -> None:
    """Check every op and every dense contender of a case.

    Args:
        case: The arrays; unchanged afterwards.
        ops: `encode`, `hamming_topk`, `sparse_attend` and `hash_attend`.
        dense: Dense contenders.

    Raises:
        WrongResult: naming the contender, the shape, and what was found.
    """
    fresh = case.codes[:, :, case.shape.keys - 1]
    code = fresh.clone()
    results = {one.name: one.call() for one in (*ops, *dense) if one.name != "hash_attend"}
    fresh.bitwise_not_()
    results |= {one.name: one.call() for one in ops if one.name == "hash_attend"}
    if not torch.equal(fresh, code):
        fresh.copy_(code)
        _fail(case, "hash_attend", "the code of the fresh key is not what encode gives")
    if not torch.equal(results["encode"], case.q_codes):
        _fail(case, "encode", "a second call gives other codes")
    pairs = list(_pairs(case))
    _codes(case, pairs)
    for row, head in pairs:
        expected = _select(case, row, head)
        got = _host(results["hamming_topk"][row, head, 0])
        if not np.array_equal(got[got >= 0], expected):
            _fail(case, "hamming_topk", f"row {row}, head {head}: other keys than the oracle's")
        attended = _attend(case, row, head, expected)
        for name in ("sparse_attend", "hash_attend"):
            _close(case, name, results[name], row, head, attended)
    row, head = pairs[-1]
    everything = _attend(case, row, head, np.arange(case.shape.keys))
    for one in dense:
        _close(case, one.name, results[one.name], row, head, everything)
    _unlimited(case)


def _pairs(case: Case) -> Iterator[tuple[int, int]]:
    total = case.shape.batch * case.shape.kv_heads
    for flat in np.unique(np.linspace(0, total - 1, min(_PAIRS, total)).astype(int)):
        yield divmod(int(flat), case.shape.kv_heads)


def _host(x: Tensor) -> np.ndarray:
    """A tensor as NumPy: floats in float64, the rest as they are."""
    x = x.double() if x.is_floating_point() else x
    return x.cpu().numpy()


def _group(case: Case, head: int) -> slice:
    size = case.shape.heads // case.shape.kv_heads
    return slice(head * size, (head + 1) * size)


def _codes(case: Case, pairs: Sequence[tuple[int, int]]) -> None:
    """Every bit of a sample whose value is not within rounding of zero must be its sign."""
    keys = slice(0, case.shape.keys, max(1, case.shape.keys // 16))
    for row, head in pairs:
        projection = _host(case.projection[head, None])
        for x, codes in (
            (case.q[row, None, _group(case, head)], case.q_codes[row, None, _group(case, head)]),
            (case.keys[row, None, head, None, keys], case.codes[row, None, head, None, keys]),
        ):
            value, margin = oracle.project(_host(x), projection)
            bits = np.unpackbits(_host(codes), axis=-1, bitorder="little")
            wrong = (bits != (value > 0)) & (np.abs(value) > margin)
            if wrong.any():
                _fail(case, "encode", f"{int(wrong.sum())} wrong bits in head {head}")


def _select(case: Case, row: int, head: int) -> np.ndarray:
    """The positions that a group must attend to, ascending."""
    queries = _host(case.q_codes[row, _group(case, head), 0])
    keys = _host(case.codes[row, head, : case.shape.keys])
    return oracle.select(queries, keys, None, case.shape.k, 0, 0)


def _attend(case: Case, row: int, head: int, positions: np.ndarray) -> np.ndarray:
    """Attention of a group over given positions, `[G, D]`."""
    at = torch.from_numpy(positions).to(case.q.device)
    keys, values = _host(case.keys[row, head, at]), _host(case.values[row, head, at])
    scale = case.shape.head_dim**-0.5
    queries = _host(case.q[row, _group(case, head), 0])
    return np.stack([oracle.attend_row(q, keys, values, scale, None, None)[0] for q in queries])


def _close(case: Case, name: str, out: Tensor, row: int, head: int, expected: np.ndarray) -> None:
    error = np.abs(_host(out[row, _group(case, head), 0]) - expected).max()
    allowed = _TOLERANCE[case.shape.dtype] * np.abs(expected).max()
    # Written so that a NaN fails.
    if not error <= allowed:
        _fail(case, name, f"head {head} is off by {error:.2e}, allowed {allowed:.2e}")


def _unlimited(case: Case) -> None:
    """With a budget of all keys, hash attention is dense attention."""
    n = min(_PREFIX, case.shape.keys)
    keys, values = case.keys[:, :, :n], case.values[:, :, :n]
    codes = case.codes[:, :, :n]
    got = hata.hash_attend(case.q, keys, values, codes, case.projection, n)
    dense = torch.nn.functional.scaled_dot_product_attention(case.q, keys, values, enable_gqa=True)
    error = float((got.double() - dense.double()).abs().max())
    allowed = _TOLERANCE[case.shape.dtype] * float(dense.abs().max())
    if not error <= allowed:
        _fail(case, "hash_attend", f"k = {n} >= keys is off dense by {error:.2e}, allowed "
              f"{allowed:.2e}")  # fmt: skip


def _fail(case: Case, name: str, what: str) -> None:
    raise WrongResult(f"{name}, {case.shape.name}: {what}; nothing was timed")
