"""The reference backend: every op on a CPU, in numba. Its NumPy oracle is in `oracle.py`."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any, ClassVar

from hata.arrays import Framework
from hata.backend import Backend, Budget, Config
from hata.problem import Problem


class ReferenceBackend(Backend):
    """CPU kernels for float32, float16 and bfloat16, right for every stride and alignment.

    Kernels are compiled at their first use and kept in numba's cache on disk (`NUMBA_CACHE_DIR`).
    They use as many threads as numba would (`NUMBA_NUM_THREADS`), their own.
    """

    name: ClassVar[str] = "reference"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "bfloat16"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"numpy", "torch", "jax"})

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
        from . import encode, hamming_topk, hash_attend, schedule, sparse_attend

        self._workers = schedule.workers
        self._ops = {
            "encode": encode,
            "hamming_topk": hamming_topk,
            "sparse_attend": sparse_attend,
            "hash_attend": hash_attend,
        }
        self._encode = encode.launch
        self._hamming_topk = hamming_topk.launch
        self._sparse_attend = sparse_attend.launch
        self._hash_attend = hash_attend.launch

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

    def prepare(self, problem: Problem) -> None:
        """Compile the kernels of an op, or load them from the disk cache."""
        self._ops[problem.op].worker.compile()

    def launch_encode(
        self, problem: Problem, fw: Framework, x: Any, projection: Any, bias: Any, out: Any,
        norms: Any,
    ) -> Any:  # fmt: skip
        """Run `hata.encode`."""
        return self._encode(problem, fw, x, projection, bias, out, norms, self.config(problem))

    def launch_hamming_topk(
        self, problem: Problem, fw: Framework, q_codes: Any, k_codes: Any, lengths: Any,
        starts: Any, budget: Budget, key_norms: Any, per_head: bool,
    ) -> Any:  # fmt: skip
        """Run `hata.hamming_topk`."""
        return self._hamming_topk(
            problem, fw, q_codes, k_codes, lengths, starts, budget, key_norms, per_head,
            self.config(problem),
        )  # fmt: skip

    def launch_sparse_attend(
        self, problem: Problem, fw: Framework, q: Any, keys: Any, values: Any, indices: Any,
        scale: float, softcap: float | None, sink_logits: Any, return_lse: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Run `hata.sparse_attend`."""
        return self._sparse_attend(
            problem, fw, q, keys, values, indices, scale, softcap, sink_logits, return_lse,
            self.config(problem),
        )  # fmt: skip

    def launch_hash_attend(
        self, problem: Problem, fw: Framework, q: Any, keys: Any, values: Any, key_codes: Any,
        projection: Any, bias: Any, query_projection: Any, query_bias: Any, q_codes: Any,
        fresh: int, dense_below: int, lengths: Any, starts: Any, budget: Budget, key_norms: Any,
        scale: float, softcap: float | None, sink_logits: Any, return_lse: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Run `hata.hash_attend`."""
        return self._hash_attend(
            problem, fw, q, keys, values, key_codes, projection, bias, query_projection, query_bias,
            q_codes, fresh, dense_below, lengths, starts, budget, key_norms, scale, softcap,
            sink_logits, return_lse, self.config(problem),
        )  # fmt: skip


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
    if problem.op == "encode":
        return project
    if problem.op == "hamming_topk":
        return scan
    return gather if problem.op == "sparse_attend" else scan + gather + project
