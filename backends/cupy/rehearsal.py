"""Which kernels a problem needs, without data: what can be compiled ahead, without a GPU.

The launchers write their plans for arrays that have a layout and no memory. Whatever a call may add
without changing the problem (a bias, sinks, ragged lengths) is an argument of the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hata.backend import Budget
from hata.problem import Problem

from .device import Described, Kernel
from .encode import write_encode
from .hamming_topk import write_hamming_topk
from .hash_attend import write_hash_attend
from .plan import Plan, View
from .sparse_attend import write_sparse_attend

if TYPE_CHECKING:
    from . import CuPyBackend


class Layout(View):
    """An array without memory, dense or with rows that are aligned to nothing."""

    def __init__(self, shape: tuple[int, ...], dtype: str, aligned: bool = True) -> None:
        self.shape, self.dtype, self.alignment = shape, dtype, 0
        steps, step = [1], shape[-1] + (not aligned)
        for size in reversed(shape[:-1]):
            steps.append(step)
            step *= size
        self._strides = tuple(reversed(steps))


def kernels(backend: CuPyBackend, problem: Problem, device: Described) -> list[Kernel]:
    """Every kernel that calls of this problem may launch."""
    found: dict[Kernel, None] = {}
    config = backend.config(problem)
    layouts = ((True, True),) if problem.aligned else ((True, False), (False, True), (False, False))
    # Codes shorter than a vector are scanned otherwise where rows are no whole vectors.
    sizes = (problem.slots, problem.slots - 1) if problem.bits in (32, 64) else (problem.slots,)
    for data, codes in layouts:
        for slots in sizes:
            for build, arrays, options in _calls(problem, data, codes, max(slots, 1)):
                plan = Plan(arrays, device)
                build(plan, problem, config, *arrays, *options)
                found.update(dict.fromkeys(launch[0].kernel for launch in plan.launches))
    return list(found)


def _calls(
    problem: Problem, data: bool, codes: bool, slots: int
) -> Iterator[tuple[Any, tuple[Any, ...], tuple[Any, ...]]]:
    batch, tokens = max(problem.batch, 1), max(problem.tokens, 1)
    heads, kv_heads = problem.heads, problem.kv_heads
    dtype, depth, bits = problem.dtype, problem.head_dim, problem.bits
    budget = Budget(problem.k)
    q_codes = Layout((batch, heads, tokens, bits // 8), "uint8")
    key_codes = Layout((batch, kv_heads, slots, bits // 8), "uint8", codes)
    norms = Layout((batch, kv_heads, slots), "float16") if problem.norms else None
    if problem.op == "hamming_topk":
        arrays = (q_codes, key_codes, None, None, norms)
        yield write_hamming_topk, arrays, (budget, problem.per_head)
        return
    projection = Layout((kv_heads, depth, bits), problem.projection_dtype)
    q = Layout((batch, heads, tokens, depth), dtype, data)
    if problem.op == "encode":
        norms = Layout((batch, heads, tokens), "float16") if problem.norms else None
        yield write_encode, (q, projection, None, None, norms), ()
        return
    keys = Layout((batch, kv_heads, slots, depth), dtype, data)
    values = Layout((batch, kv_heads, slots, problem.value_dim), dtype, data)
    if problem.op == "sparse_attend":
        chosen = heads if problem.per_head else kv_heads
        indices = Layout((batch, chosen, tokens, problem.k), "int32")
        yield write_sparse_attend, (q, keys, values, indices, None), (1.0, None, False)
        return
    for given, fresh in ((None, 0), (None, 1), (q_codes, 0), (q_codes, 1)):
        arrays = (
            q, keys, values, key_codes, projection, None, projection, None, given, None, None,
            norms, None,
        )  # fmt: skip
        yield write_hash_attend, arrays, (fresh, 0, budget, 1.0, None, False, True)
