"""A result is checked before it is timed.

The ops and the dense contenders are held against the NumPy reference in float64, on a sample of the
(row, KV head) pairs, within the tolerance of `hata.measure`; `hash_attend` with an unlimited budget
must agree with dense attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

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
    shape, n, where = case.shape, case.shape.keys, ""

    def told(name: str, fault: str | None) -> None:
        if fault is not None:
            raise WrongResult(f"{name}, {shape.name}: {where}{fault}; nothing was timed")

    fresh = case.codes[:, :, n - 1]
    code = fresh.clone()
    results = {one.name: one.call() for one in (*ops, *dense) if one.name != "hash_attend"}
    fresh.bitwise_not_()
    results |= {one.name: one.call() for one in ops if one.name == "hash_attend"}
    if not torch.equal(fresh, code):
        fresh.copy_(code)
        told("hash_attend", "the code of the fresh key is not what encode gives")
    if not torch.equal(results["encode"], case.q_codes):
        told("encode", "a second call gives other codes")
    kit, total = TorchKit(case.q.device), shape.batch * shape.kv_heads
    attention = SparseAttend(case.q, case.keys, case.values, case.indices)
    # Every bit of a sample whose value is not within rounding of zero must be its sign.
    some = slice(0, n, max(1, n // 16))
    for pair in np.unique(np.linspace(0, total - 1, min(_PAIRS, total)).astype(int)):
        row, head = divmod(int(pair), shape.kv_heads)
        where = f"row {row}, head {head}: "
        of = partial(Expected, kit, dtype=shape.dtype, rows=[row], heads=[head])
        of_q, of_keys = (of(Encode(x, case.projection)) for x in (case.q, case.keys))
        told("encode", of_q.codes()(case.q_codes) or of_keys.codes(some)(case.codes))
        scan = of(HammingTopK(case.q_codes, case.codes, lengths=case.lengths, k=shape.k))
        chosen = scan.selection()
        got = scan.part(results["hamming_topk"])
        told("hamming_topk", tolerance.selection_fault(got, chosen))
        judge = of(attention).attention(chosen)
        for name in ("sparse_attend", "hash_attend"):
            told(name, judge(results[name]))
    # Of the last pair only.
    everything = np.arange(n, dtype=np.int32)[None, None, None]
    judge = of(attention).attention(everything)
    for one in dense:
        told(one.name, judge(results[one.name]))
    # With a budget of all keys, hash attention is dense attention.
    first = min(_PREFIX, n)
    cache = (x[:, :, :first] for x in (case.keys, case.values, case.codes))
    found = hata.hash_attend(case.q, *cache, case.projection, first)
    told("hash_attend", of(attention).attention(everything[..., :first])(found))
