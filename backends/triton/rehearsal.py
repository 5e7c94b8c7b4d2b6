"""Which kernels a call or a problem needs: the launchers run, and what they would launch is listed.

`of_call` takes the arrays of a real call: what `hata.prepare` loads. `kernels` has a problem and a
compute capability alone, and lends the launchers torch's meta tensors, whose shapes and alignment
follow from the problem: what can be compiled ahead, without a GPU. Whatever a call may add without
changing the problem (a bias, sinks, ragged lengths) is an argument of the same kernels, but for
`dense_below` beyond the budget, of which the attention takes longer shares; given query codes add
one kernel, here for as many heads as q has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hata.arrays import Framework, framework
from hata.backend import Budget
from hata.problem import Problem

from .launch import Bound, rehearsal

if TYPE_CHECKING:
    from . import TritonBackend


def of_call(
    backend: TritonBackend, launcher: str, problem: Problem, fw: Framework, args: tuple[Any, ...]
) -> list[Bound]:
    """Every kernel that one call launches."""
    with rehearsal() as met:
        getattr(backend, launcher)(problem, fw, *args)
    return list(dict.fromkeys(met))


def kernels(backend: TritonBackend, problem: Problem, sm: int) -> list[Bound]:
    """Every kernel that calls of this problem may launch where the capability is `sm` (90: 9.0)."""
    layouts = (True,) if problem.aligned else (True, False)
    # Codes shorter than a vector are scanned otherwise where rows are no whole vectors.
    lengths = (problem.slots, problem.slots - 1) if problem.bits in (32, 64) else (problem.slots,)
    with rehearsal(sm) as met:
        for aligned, slots in itertools.product(layouts, lengths):
            for launcher, arguments in _calls(problem, aligned, max(slots, 1)):
                fw = framework("x", arguments[0])
                getattr(backend, launcher)(problem, fw, *arguments)
    return list(dict.fromkeys(met))


def _calls(problem: Problem, aligned: bool, slots: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    batch, tokens = max(problem.batch, 1), max(problem.tokens, 1)
    heads, kv_heads = problem.heads, problem.kv_heads
    depth, lanes, bits = problem.head_dim, problem.value_dim, problem.bits
    budget = Budget(problem.k)

    def array(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        # Rows that are one element longer than their data are aligned to nothing.
        padded = shape if aligned else (*shape[:-1], shape[-1] + 1)
        x = torch.empty(padded, dtype=getattr(torch, dtype), device="meta")
        return x[..., : shape[-1]]

    q_codes = array((batch, heads, tokens, bits // 8), "uint8") if bits else None
    codes = array((batch, kv_heads, slots, bits // 8), "uint8") if bits else None
    norms = array((batch, kv_heads, slots), "float16") if problem.norms else None
    if problem.op == "hamming_topk":
        arguments = q_codes, codes, None, None, budget, norms, problem.per_head
        yield "launch_hamming_topk", arguments
        return
    q = array((batch, heads, tokens, depth), problem.dtype)
    projection = array((kv_heads, depth, bits), problem.projection_dtype) if bits else None
    if problem.op == "encode":
        norms = array((batch, heads, tokens), "float16") if problem.norms else None
        yield "launch_encode", (q, projection, None, None, norms)
        return
    keys = array((batch, kv_heads, slots, depth), problem.dtype)
    values = array((batch, kv_heads, slots, lanes), problem.dtype)
    if problem.op == "sparse_attend":
        chosen = heads if problem.per_head else kv_heads
        indices = array((batch, chosen, tokens, problem.k), "int32")
        yield "launch_sparse_attend", (q, keys, values, indices, 1.0, None, None, False)
        return
    for given in (None, q_codes):
        yield "launch_hash_attend", (
            q, keys, values, codes, projection, None, projection, None, given, 1, 0, None, None,
            budget, norms, 1.0, None, None, False,
        )  # fmt: skip
