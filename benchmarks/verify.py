"""A result is checked before it is timed.

The ops and the dense contenders are held against the NumPy reference in float64, on a sample of the
(row, KV head) pairs, within the tolerance of `hata.measure`; `hash_attend` with an unlimited budget
must agree with dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import hata
from benchmarks.contenders import Case, Contender
from hata.measure import reference, tolerance
from hata.measure.arrays import TorchKit

# (row, KV head) pairs that are checked, spread evenly.
_PAIRS = 8
# Keys of the comparison between an unlimited budget and dense attention.
_PREFIX = 4096


class WrongResult(Exception):
    """A contender computes something else than it should; nothing of it is timed."""


def verify(case: Case, ops: Sequence[Contender], dense: Sequence[Contender]) -> None:
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
        _told(case, "hash_attend", "the code of the fresh key is not what encode gives")
    if not torch.equal(results["encode"], case.q_codes):
        _told(case, "encode", "a second call gives other codes")
    groups = [_Group(case, row, head) for row, head in _pairs(case)]
    for group in groups:
        group.check_codes()
        chosen = group.selected(results["hamming_topk"])
        group.check_attention({n: results[n] for n in ("sparse_attend", "hash_attend")}, chosen)
    outputs = {one.name: results[one.name] for one in dense}
    groups[-1].check_attention(outputs, np.arange(case.shape.keys))
    # With a budget of all keys, hash attention is dense attention.
    n = min(_PREFIX, case.shape.keys)
    arrays = (x[:, :, :n] for x in (case.keys, case.values, case.codes))
    everything = hata.hash_attend(case.q, *arrays, case.projection, n)
    groups[-1].check_attention({"hash_attend": everything}, np.arange(n))


def _pairs(case: Case) -> Iterator[tuple[int, int]]:
    total = case.shape.batch * case.shape.kv_heads
    for flat in np.unique(np.linspace(0, total - 1, min(_PAIRS, total)).astype(int)):
        yield divmod(int(flat), case.shape.kv_heads)


def _told(case: Case, name: str, fault: str | None) -> None:
    if fault is not None:
        raise WrongResult(f"{name}, {case.shape.name}: {fault}; nothing was timed")


class _Group:
    """One KV head of one row, with its query heads, as the reference sees it."""

    def __init__(self, case: Case, row: int, head: int) -> None:
        self.case, self.kit, self.reference = case, TorchKit(), reference()
        size = case.shape.heads // case.shape.kv_heads
        self.row, self.head, self.name = row, head, f"row {row}, head {head}: "
        self.group = slice(row, row + 1), slice(head * size, (head + 1) * size)
        self.one = slice(row, row + 1), slice(head, head + 1)
        self.projection = self.kit.read(case.projection[head : head + 1])

    def told(self, name: str, fault: str | None) -> None:
        """Raise `WrongResult` if there is a fault."""
        _told(self.case, name, fault and self.name + fault)

    def check_codes(self) -> None:
        """Every bit of a sample whose value is not within rounding of zero must be its sign."""
        case = self.case
        places = slice(0, case.shape.keys, max(1, case.shape.keys // 16))
        for x, codes, at in (
            (case.q, case.q_codes, self.group),
            (case.keys, case.codes, (*self.one, places)),
        ):
            vectors = self.kit.read(x[at])
            expected = self.reference.encode(vectors, self.projection)
            doubtful = tolerance.doubtful_bits(vectors, self.projection)
            got = self.kit.get(codes[at])
            self.told("encode", tolerance.codes_fault(got, expected, doubtful))

    def selected(self, indices: Tensor) -> np.ndarray:
        """The positions that the group must attend to, which `indices` must be."""
        keys = self.kit.get(self.case.codes[self.one][:, :, : self.case.shape.keys])
        queries = self.kit.get(self.case.q_codes[self.group])
        expected = self.reference.hamming_topk(queries, keys, self.case.shape.k)
        got = self.kit.get(indices[self.one])
        self.told("hamming_topk", tolerance.selection_fault(got, expected))
        return expected[expected >= 0]

    def check_attention(self, outputs: Mapping[str, Tensor], positions: np.ndarray) -> None:
        """Each output is attention of the group over the given positions."""
        case, read = self.case, self.kit.read
        at = (self.row, self.head, torch.from_numpy(positions).to(case.q.device))
        rows = (read(x[at])[None, None] for x in (case.keys, case.values))
        everything = np.arange(len(positions), dtype=np.int32)[None, None, None]
        given = read(case.q[self.group]), *rows, everything
        expected = self.reference.sparse_attend(*given)
        scale, dtype = case.shape.head_dim**-0.5, case.shape.dtype
        plain = tolerance.plain_attention(*given, scale, dtype=dtype)
        for name, out in outputs.items():
            got = read(out[self.group])
            self.told(name, tolerance.attention_fault(got, expected, plain))
