"""The calls that a problem is checked and timed on, drawn from a seed: the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

import hata
from hata import registry
from hata.backend import Backend, Config, use_config
from hata.call import Encode, HammingTopK, HashAttend, SparseAttend
from hata.measure.arrays import kit_for
from hata.measure.clock import last_level_bytes
from hata.measure.tolerance import doubtful_bits
from hata.problem import Problem

# Data that all sets of one problem may touch; keys and values may lie in twice as much.
MAX_POOL = {"cpu": 256 << 20, "cuda": 2 << 30}
_MAX_SETS = {"cpu": 64, "cuda": 4}
# On a CPU keys and values repeat in blocks: their values do not matter to the clock, their places
# do, and drawing them takes long.
_BLOCK = 4096


def sets_for(problem: Problem, pool: int | None = None) -> tuple[int, int]:
    """How many sets of queries and codes, and of keys and values, calls take turns over.

    On a CPU as many as keep its caches cold, as far as `pool` bytes reach. On a GPU the clock sees
    to that, and a few sets are there so that no one draw of values counts.
    """
    pool = MAX_POOL[problem.device] if pool is None else pool
    size = {"float32": 4}.get(problem.dtype, 2)
    b, hkv = problem.batch, problem.kv_heads
    touched = b * problem.tokens * problem.heads * problem.head_dim * size
    touched += b * hkv * problem.slots * (problem.bits // 8)
    held = 0
    if problem.op.endswith("attend"):
        row = (problem.head_dim + problem.value_dim) * size
        touched += b * problem.tokens * hkv * min(problem.k, problem.slots) * row
        held = b * hkv * problem.slots * row
    reach = pool if problem.device == "cuda" else min(1.25 * last_level_bytes(), pool)
    wanted = min(max(math.ceil(reach / max(touched, 1)), 2), _MAX_SETS[problem.device])
    return wanted, max(1, min(wanted, 2 * pool // max(held, 1)))


@contextmanager
def running(backend: Backend, op: str, config: Config) -> Iterator[None]:
    """Run an op on a backend with a configuration, whatever else is in force."""
    with registry.use_backend(backend.name), use_config(backend.name, op, config):
        yield


def public(call: Any) -> Callable[[], Any]:
    """The public op on the arguments of a call."""
    return partial(getattr(hata, call.OP), **call.arrays(), **call.options())


class Inputs:
    """The sets of inputs of one problem, and the calls of its op on them.

    Codes are uniform random bytes: distances then crowd around one value, with many ties, as those
    of real codes do. What `hash_attend` encodes has no projection so near zero that backends may
    disagree about a bit, so that there is one right selection.

    Attributes:
        sets: The calls of `hata.call`, one for each set.
    """

    def __init__(
        self, backend: Backend, problem: Problem, *, seed: int = 0, pool: int | None = None
    ) -> None:
        self.problem = problem
        self.kit = kit_for(backend, problem.device, problem.dtype)
        self._rng = np.random.default_rng([seed, len(problem.op)])
        count, kv_count = sets_for(problem, pool)
        caches = [self._cache() for _ in range(kv_count)]
        self.sets = [self._set(caches[i % kv_count]) for i in range(count)]

    @property
    def calls(self) -> list[Callable[[], Any]]:
        """The public op on each set."""
        return [public(call) for call in self.sets]

    def prepare(self) -> None:
        """Have all that the calls need compiled and loaded."""
        for call in self.sets:
            hata.prepare(call.OP, **call.arrays(), **call.options())

    def _normal(self, *shape: int) -> Any:
        return self.kit.normal(self._rng, shape, self.problem.dtype)

    def _codes(self, heads: int, tokens: int) -> Any:
        p = self.problem
        return self.kit.bytes(self._rng, (p.batch, heads, tokens, p.bits // 8))

    @cached_property
    def _projection(self) -> Any:
        p = self.problem
        return self.kit.normal(self._rng, (p.kv_heads, p.head_dim, p.bits), p.projection_dtype)

    def _settled(self, batch: int, heads: int, tokens: int) -> Any:
        """Vectors none of whose projections is within rounding of zero."""
        p, kit, projection = self.problem, self.kit, self.kit.read(self._projection)
        x = self._rng.standard_normal((batch, heads, tokens, p.head_dim), dtype=np.float32)
        for _ in range(100):
            near = doubtful_bits(kit.read(kit.cast(x, p.dtype)), projection).any(-1)
            if not near.any():
                break
            x[near] = self._rng.standard_normal((int(near.sum()), p.head_dim), dtype=np.float32)
        return kit.cast(x, p.dtype)

    def _cache(self) -> dict[str, Any]:
        """Keys and values, where the op has some."""
        p, made = self.problem, {}
        if not p.op.endswith("attend"):
            return made
        for name, size in (("keys", p.head_dim), ("values", p.value_dim)):
            if p.device == "cuda":
                made[name] = self._normal(p.batch, p.kv_heads, p.slots, size)
                continue
            made[name] = self.kit.empty((p.batch, p.kv_heads, p.slots, size), p.dtype)
            block = self._normal(1, p.kv_heads, min(p.slots, _BLOCK), size)
            for start in range(0, p.slots, _BLOCK):
                made[name][:, :, start : start + _BLOCK] = block
        if p.op == "hash_attend" and p.slots:
            made["keys"][:, :, p.slots - 1 :] = self._settled(1, p.kv_heads, 1)
        return made

    def _set(self, cache: dict[str, Any]) -> Any:
        p, kit = self.problem, self.kit
        if p.op == "encode":
            x = self._normal(p.batch, p.heads, p.tokens, p.head_dim)
            norms = kit.put(np.zeros((p.batch, p.heads, p.tokens), np.float16)) if p.norms else None
            return Encode(x, self._projection, norms=norms)
        if p.op == "sparse_attend":
            q = self._normal(p.batch, p.heads, p.tokens, p.head_dim)
            return SparseAttend(q, **cache, indices=kit.put(self._indices()))
        norms = None
        if p.norms:
            norms = abs(kit.normal(self._rng, (p.batch, p.kv_heads, p.slots), "float16")) + 0.5
        if p.op == "hamming_topk":
            codes = self._codes(p.heads, p.tokens), self._codes(p.kv_heads, p.slots)
            return HammingTopK(*codes, key_norms=norms, k=p.k, per_head=p.per_head)
        # A decode step brings one key that has no code yet.
        return HashAttend(
            q=self._settled(p.batch, p.heads, p.tokens), **cache, projection=self._projection,
            key_codes=self._codes(p.kv_heads, p.slots), key_norms=norms, k=p.k, fresh=1,
        )  # fmt: skip

    def _indices(self) -> np.ndarray:
        p = self.problem
        heads, taken = p.heads if p.per_head else p.kv_heads, min(p.k, p.slots)
        found = np.full((p.batch, heads, p.tokens, p.k), -1, np.int32)
        for row in found.reshape(-1, p.k):
            row[:taken] = np.sort(self._rng.choice(p.slots, taken, replace=False))
        return found


def awkward_problem(problem: Problem) -> Problem:
    """The small problem of the same kernel whose awkward call is checked beside the problem's."""
    tokens, slots = 3 if problem.op == "encode" else 1, 203 if problem.slots else 0
    return replace(problem, batch=2, tokens=tokens, slots=slots, k=min(problem.k, 64))


class AwkwardInputs(Inputs):
    """A small set with everything that kernels get wrong.

    Ragged lengths, a row shorter than the budget, codes that are all equal, an odd number of slots,
    NaN where nothing may be read.
    """

    def __init__(self, backend: Backend, problem: Problem) -> None:
        super().__init__(backend, awkward_problem(problem), seed=1, pool=0)
        call, kit, p = self.sets[0], self.kit, self.problem
        changes: dict[str, Any] = {}
        if p.op == "sparse_attend":
            indices = kit.get(call.indices).copy()
            indices[:, :, :, 1::3] = -1
            changes["indices"] = kit.put(indices)
            call.values[:, :, np.setdiff1d(np.arange(p.slots), indices)] = np.nan
        elif p.op != "encode":
            name = "k_codes" if p.op == "hamming_topk" else "key_codes"
            codes = kit.get(getattr(call, name)).copy()
            codes[1] = codes[1, :1, :1]
            codes[0, :, ::2] = codes[0, :, :1]
            lengths = np.array([p.slots, 37], np.int32)
            changes |= {name: kit.put(codes), "lengths": kit.put(lengths)}
            if p.k >= 8:
                changes |= {"sink": 2, "recent": 3}
            if p.op == "hash_attend":
                # The last visible key is the one that is encoded: a settled one.
                call.keys[1, :, 36] = call.keys[1, :, -1]
                call.values[1, :, 37:] = np.nan
        self.sets[0] = call._replace(**changes)
