"""The CPU backend: every op in numba, compiled at its first use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from hata.backend import Config, Kernel, PlanningBackend
from hata.problem import OPS, Problem


class NumbaBackend(PlanningBackend):
    """CPU kernels for float32, float16 and bfloat16, right for every stride and alignment.

    Machine code is kept in numba's cache on disk (`NUMBA_CACHE_DIR`). Kernels use as many threads
    as numba would (`NUMBA_NUM_THREADS`), their own.
    """

    name: ClassVar[str] = "numba"

    @classmethod
    def missing(cls) -> str | None:
        """Say what the kernels lack here."""
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed; pip install numba"
        if _uncompiled():
            return "NUMBA_DISABLE_JIT is set, and kernels run compiled only; unset it"
        return None

    def __init__(self) -> None:
        super().__init__()
        # numba is imported when the backend is used, not when it is listed
        from .schedule import workers

        self._workers = workers
        self._ops = {op: importlib.import_module(f".{op}", __name__) for op in OPS}

    def plan(self, call: Any) -> Any:
        """The record of a call but for its addresses."""
        return self._ops[call.OP].plan(call)

    def kernels(self, call: Any, sm: int | None = None) -> Sequence[Kernel]:
        """The one worker of an op."""
        return (self._ops[call.OP].worker,)

    def tunables(self, op: str, problem: Problem) -> dict[str, tuple]:
        """The knobs of an op: threads, and how its work is cut."""
        return dict(self._ops[op].TUNABLES)

    def default(self, problem: Problem) -> Config:
        """Threads where there is work for them, and a few items for each of them."""
        config = dict(self._ops[problem.op].DEFAULTS)
        if _work(problem) < _WORTH_THREADS:
            config["threads"] = "one"
        chunks = self.tunables(problem.op, problem).get("chunk")
        if chunks:
            wanted = _ITEMS_EACH * self._workers(config["threads"])
            groups = problem.batch * problem.kv_heads
            enough = [c for c in chunks if groups * -(-problem.slots // c) >= wanted]
            config["chunk"] = enough[-1] if enough else chunks[0]
        return config


def _uncompiled() -> bool:
    """Whether numba would run its functions as plain Python."""
    numba = sys.modules.get("numba")
    if numba is not None:
        return bool(numba.config.DISABLE_JIT)
    try:
        return bool(int(os.environ.get("NUMBA_DISABLE_JIT") or 0))
    except ValueError:
        # numba, too, goes on as if it were not set
        return False


# Items of work for each thread, so that one that starts late or is held up costs little. Fewer and
# larger ones are faster where all goes well.
_ITEMS_EACH = 4
# Starting the other threads costs about as much as this many operations of 32 lanes.
_WORTH_THREADS = 20_000


def _work(problem: Problem) -> int:
    """A rough count of an op's vector operations (the cache counts as full)."""
    rows = problem.batch * problem.tokens
    dims = problem.head_dim + problem.value_dim
    scan = rows * problem.slots * max(problem.heads, problem.kv_heads) * problem.bits // 2048
    gather = rows * problem.heads * min(problem.k, problem.slots) * dims // 32
    project = rows * problem.heads * problem.head_dim * problem.bits // 32
    alone = {"encode": project, "hamming_topk": scan, "sparse_attend": gather}
    return alone.get(problem.op, scan + gather + project)
