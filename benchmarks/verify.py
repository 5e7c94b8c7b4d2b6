"""A result is checked before it is timed.

The ops and the dense contenders are held against the NumPy reference in float64, on a sample of the
(row, KV head) pairs, within the tolerance of `hata.measure`; `hash_attend` with an unlimited budget
must agree with dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

import hata
from benchmarks.contenders import Case, Contender
from hata.call import Encode, HammingTopK, SparseAttend
from hata.measure import tolerance
from hata.measure.arrays import TorchKit
from hata.measure.expected import Expected

# (row, KV head) pairs that are checked, spread evenly.
_PAIRS = 8
# Keys of the comparison between an unlimited budget and dense attention.
_PREFIX = 4096


class WrongResult(Exception):
    """A contender computes something else than it should; nothing of it is timed."""


def verify(case: Case, ops: Sequence[Contender], dense: Sequence[Contender]) -> None:
    """Check all four ops and every dense contender of a case, whose arrays stay as they are.

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
    shape, n = case.shape, case.shape.keys
    parts = [_Part(case, row, head) for row, head in _pairs(case)]
    # Every bit of a sample whose value is not within rounding of zero must be its sign.
    some = slice(0, n, max(1, n // 16))
    lengths = case.lengths
    for part in parts:
        of_q, of_keys = (part.of(Encode(x, case.projection)) for x in (case.q, case.keys))
        part.told("encode", of_q.codes()(case.q_codes) or of_keys.codes(some)(case.codes))
        scan = part.of(HammingTopK(case.q_codes, case.codes, lengths=lengths, k=shape.k))
        chosen = scan.selection()
        got = scan.part(results["hamming_topk"])
        part.told("hamming_topk", tolerance.selection_fault(got, chosen))
        part.attended(chosen, {n: results[n] for n in ("sparse_attend", "hash_attend")})
    everything = np.arange(n, dtype=np.int32)[None, None, None]
    parts[-1].attended(everything, {one.name: results[one.name] for one in dense})
    # With a budget of all keys, hash attention is dense attention.
    first = min(_PREFIX, n)
    cache = (x[:, :, :first] for x in (case.keys, case.values, case.codes))
    found = hata.hash_attend(case.q, *cache, case.projection, first)
    parts[-1].attended(everything[..., :first], {"hash_attend": found})


def _pairs(case: Case) -> Iterator[tuple[int, int]]:
    total = case.shape.batch * case.shape.kv_heads
    for flat in np.unique(np.linspace(0, total - 1, min(_PAIRS, total)).astype(int)):
        yield divmod(int(flat), case.shape.kv_heads)


def _fail(case: Case, name: str, fault: str) -> None:
    raise WrongResult(f"{name}, {case.shape.name}: {fault}; nothing was timed")


class _Part:
    """One KV head of one row, with its query heads."""

    def __init__(self, case: Case, row: int, head: int) -> None:
        self.case, self.where = case, f"row {row}, head {head}: "
        kit, dtype = TorchKit(case.q.device), case.shape.dtype
        self.of = partial(Expected, kit, dtype=dtype, rows=[row], heads=[head])

    def told(self, name: str, fault: str | None) -> None:
        """Raise `WrongResult` if there is a fault."""
        if fault is not None:
            _fail(self.case, name, self.where + fault)

    def attended(self, indices: np.ndarray, outputs: Mapping[str, Tensor]) -> None:
        """Each output is attention over the given positions."""
        case = self.case
        call = SparseAttend(case.q, case.keys, case.values, case.indices)
        judge = self.of(call).attention(indices)
        for name, out in outputs.items():
            self.told(name, judge(out))
