"""What a trial does with a configuration: are its results right, and how fast is it.

Two calls are held against the reference: the problem's own inputs (of large ones the first and last
rows and heads), and an awkward small one. How close results must be stands in
`hata.measure.tolerance`. What the reference says is computed once per problem.

Configurations that are right are timed in turns, each through the public op and on caches that hold
nothing of the call's data: every call takes the next of several *sets* of inputs, whose codes,
queries and selected rows together are larger than the last cache (of a CPU: as far as memory for
them reaches; second-level caches are always cold).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np

from hata.backend import Backend, Config
from hata.measure import reference, tolerance
from hata.measure.clock import CPUClock, CUDAClock, in_turns
from hata.measure.inputs import AwkwardInputs, Inputs, running

# Scores that the reference may have to compute, of every query head and key; more takes it seconds.
_MOST_SCORES = 1 << 21
# Vectors of each row and head whose codes are checked.
_MOST_VECTORS = 512

Judge = Callable[[Any], str | None]


def race(
    backend: Backend,
    entries: Sequence[tuple[Inputs, Config]],
    *,
    seconds: float,
    least: int = 7,
    most: int = 400,
) -> list[list[float]]:
    """Time configurations against each other.

    Args:
        backend: Runs all of them.
        entries: Configurations, each on the inputs of a problem on which it ran before.
        seconds: About how long the whole race may take.
        least: Fewest rounds, whatever they take.
        most: Most rounds.

    Returns:
        For each entry its samples in microseconds, one a round.
    """
    on_gpu = entries[0][0].problem.device == "cuda"
    clock = CUDAClock() if on_gpu else CPUClock()
    for inputs, config in entries:
        within = partial(running, backend, inputs.problem.op, config)
        if on_gpu:
            # Nothing compiles or allocates in a sample.
            with within():
                inputs.prepare()
        clock.add(inputs.calls, within)
    return in_turns(clock, rounds=most, seconds=seconds, least=least, order=Random(0))


class Checker:
    """Checks configurations of one problem."""

    def __init__(self, backend: Backend, inputs: Inputs) -> None:
        self.inputs, self._backend = inputs, backend
        self._judges: list[tuple[str, Inputs, Judge]] = []

    def fault(self, config: Config) -> str | None:
        """What is wrong with the results of a configuration; `None` if nothing is."""
        if not self._judges:
            awkward = AwkwardInputs(self._backend, self.inputs.problem)
            for name, inputs in (("", self.inputs), ("awkward inputs: ", awkward)):
                self._judges.append((name, inputs, _Expected(inputs).judge()))
        for name, inputs, judge in self._judges:
            with running(self._backend, inputs.problem.op, config):
                result = inputs.calls[0]()
            wrong = judge(result)
            if wrong:
                return name + wrong
        return None


class _Expected:
    """What the first call of some inputs must give, in the part of it that is looked at."""

    def __init__(self, inputs: Inputs) -> None:
        self.problem, self.kit, self.call = inputs.problem, inputs.kit, inputs.sets[0]
        self.reference = reference()
        (self.batch, heads, tokens), kv_heads = self.call[0].shape[:3], self.problem.kv_heads
        scored = self.problem.k if self.problem.op == "sparse_attend" else self.problem.slots
        everything = self.batch * heads * tokens * scored <= _MOST_SCORES
        # Batch rows, KV heads and query heads: all of them, or the corners.
        self.rows, self.heads = (
            np.arange(n) if everything else np.unique([0, n - 1]) for n in (self.batch, kv_heads)
        )
        group = np.arange(heads // kv_heads)
        self.members = (self.heads[:, None] * len(group) + group).reshape(-1)

    def judge(self) -> Judge:
        """What is wrong with a result, as a function of it."""
        return getattr(self, f"_{self.problem.op}")()

    def part(self, x: Any) -> np.ndarray:
        """The rows and heads of an array that are looked at."""
        heads = self.heads if x.shape[1] == self.problem.kv_heads else self.members
        return self.kit.read(x[self.kit.put(self.rows[:, None]), self.kit.put(heads[None])])

    def _encode(self) -> Judge:
        half, tokens = _MOST_VECTORS // 2, self.call.x.shape[2]
        places = np.r_[: min(half, tokens), max(tokens - half, half) : tokens]

        def ends(x: Any) -> np.ndarray:
            return self.kit.read(x[:, :, self.kit.put(places)])

        x, projection = ends(self.call.x), self.kit.read(self.call.projection)
        lengths = np.zeros(x.shape[:3], np.float16)
        expected = self.reference.encode(x, projection, norms=lengths)
        doubtful = tolerance.doubtful_bits(x, projection)
        norms = self.call.norms

        def judge(codes: Any) -> str | None:
            fault = tolerance.codes_fault(ends(codes), expected, doubtful)
            if fault is None and norms is not None:
                return tolerance.norms_fault(ends(norms).astype(np.float16), lengths)
            return fault

        return judge

    def _select(self, q_codes: np.ndarray, key_codes: Any, norms: Any) -> np.ndarray:
        """What the reference selects."""
        call, lengths = self.call, None
        if call.lengths is not None:
            lengths = self.kit.get(call.lengths)[self.rows]
        return self.reference.hamming_topk(
            q_codes, self.part(key_codes), call.k, lengths=lengths, sink=call.sink,
            recent=call.recent, key_norms=norms, per_head=self.problem.per_head,
        )  # fmt: skip

    def _norms(self) -> np.ndarray | None:
        norms = self.call.key_norms
        return None if norms is None else self.part(norms)

    def _hamming_topk(self) -> Judge:
        q_codes = self.part(self.call.q_codes)
        expected = self._select(q_codes, self.call.k_codes, self._norms())
        return lambda indices: tolerance.selection_fault(self.part(indices), expected)

    def _sparse_attend(self) -> Judge:
        return self._attention(self.part(self.call.indices))

    def _hash_attend(self) -> Judge:
        call, kit, rows = self.call, self.kit, np.arange(self.batch)
        projection, lengths = kit.read(call.projection), call.keys.shape[2]
        if call.lengths is not None:
            lengths = kit.get(call.lengths)
        # The last visible key of every row and head is the one that has no code yet.
        last = np.broadcast_to(lengths, self.batch) - 1
        places = kit.put(rows), slice(None), kit.put(last)
        fresh = kit.read(call.keys[places])[:, :, None]
        sizes = np.zeros(fresh.shape[:3], np.float16)
        codes = self.reference.encode(fresh, projection, norms=sizes)
        right_codes = copy.deepcopy(call.key_codes)
        right_codes[places] = kit.put(codes[:, :, 0])
        norms = self._norms()
        if norms is not None:
            there = np.arange(len(self.rows)), slice(None), last[self.rows]
            norms[there] = sizes[np.ix_(self.rows, self.heads)][..., 0]
        q_codes = self.reference.encode(self.part(call.q), projection[self.heads])
        attention = self._attention(self._select(q_codes, right_codes, norms))

        def judge(out: Any) -> str | None:
            if not (call.key_codes == right_codes).all():
                return "the code of the fresh key is wrong, or another code was written to"
            return attention(out)

        return judge

    def _attention(self, indices: np.ndarray) -> Judge:
        """What is expected where `indices` are selected."""
        call, kit, q = self.call, self.kit, self.part(self.call.q)
        heads, k = q.shape[1], indices.shape[3]
        # Selected rows only, one small cache a query, so that a long cache costs nothing.
        flat = q.reshape(-1, 1, 1, q.shape[3])
        places = np.full((len(flat), 1, 1, k), -1, np.int32)
        few = {
            n: np.zeros((len(flat), 1, k, getattr(call, n).shape[3]), "f4")
            for n in ("keys", "values")
        }
        for row, (b, h, t) in enumerate(np.ndindex(q.shape[:3])):
            chosen = indices[b, h * indices.shape[1] // heads, t]
            chosen = chosen[chosen >= 0].astype(np.int64)
            at = int(self.rows[b]), int(self.heads[h * len(self.heads) // heads]), kit.put(chosen)
            for name, x in few.items():
                x[row, 0, : len(chosen)] = kit.read(getattr(call, name)[at])
            places[row, 0, 0, : len(chosen)] = np.arange(len(chosen))
        expected = self.reference.sparse_attend(flat, *few.values(), places)
        plain = tolerance.plain_attention(
            flat, *few.values(), places, q.shape[3] ** -0.5, dtype=self.problem.dtype
        )
        shape = (*call.q.shape[:3], call.values.shape[3])

        def judge(out: Any) -> str | None:
            if tuple(out.shape) != shape:
                return f"shape {tuple(out.shape)}, expected {shape}"
            # All of it, where only a part is compared.
            if not (abs(out) < np.inf).all():
                return "the output is not finite"
            return tolerance.attention_fault(
                self.part(out).reshape(expected.shape), expected, plain
            )

        return judge
