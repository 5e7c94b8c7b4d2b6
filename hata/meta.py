"""`Meta`: what the ops give for tensors on torch's `meta` device, which hold no data.

It stands in for a backend, whichever is in force: the call is checked like any other, the results
have the right shapes, dtypes and strides, and nothing is computed.
"""

from __future__ import annotations

from typing import Any

from hata.arrays import Framework
from hata.backend import Budget
from hata.problem import Problem


class Meta:
    """Allocates the results, with the launchers of a `hata.backend.Backend`."""

    def prepare_call(self, *_: Any) -> None:
        """Nothing runs, so nothing is prepared."""

    def launch_encode(
        self, problem: Problem, fw: Framework, x: Any, projection: Any, bias: Any, out: Any, *_: Any
    ) -> Any:
        """The codes."""
        return fw.empty((*x.shape[:3], problem.bits // 8), "uint8", x) if out is None else out

    def launch_hamming_topk(
        self,
        problem: Problem,
        fw: Framework,
        q_codes: Any,
        k_codes: Any,
        lengths: Any,
        starts: Any,
        budget: Budget,
        *_: Any,
    ) -> Any:
        """The indices."""
        heads = problem.heads if problem.per_head else problem.kv_heads
        shape = q_codes.shape[0], heads, q_codes.shape[2], budget.k
        return fw.empty(shape, "int32", q_codes)

    def launch_sparse_attend(
        self, problem: Problem, fw: Framework, q: Any, *_: Any
    ) -> tuple[Any, Any]:
        """The outputs and the lse."""
        out = fw.empty((*q.shape[:3], problem.value_dim), problem.dtype, q)
        return out, fw.empty(q.shape[:3], "float32", q)

    launch_hash_attend = launch_sparse_attend
