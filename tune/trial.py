"""What a trial does with a configuration: are its results right, and how fast is it.

Two calls are held against the reference: the problem's own inputs (of large ones the first and last
rows and heads), and an awkward small one. What the reference says is computed once per problem.

Configurations that are right are timed in turns, each through the public op and on caches that hold
nothing of the call's data: every call takes the next of several *sets* of inputs, whose codes,
queries and selected rows together are larger than the last cache (of a CPU: as far as memory for
them reaches; second-level caches are always cold).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np

from hata.backend import Backend, Config
from hata.measure import reference, tolerance
from hata.measure.clock import clock_of, in_turns
from hata.measure.expected import Expected, Judge
from hata.measure.inputs import AwkwardInputs, Inputs, running

# Scores that the reference may have to compute, of every query head and key; more takes it seconds.
_MOST_SCORES = 1 << 21
# Vectors of each row and head whose codes are checked.
_MOST_VECTORS = 512


def race(
    backend: Backend,
    entries: Sequence[tuple[Inputs, Config]],
    *,
    seconds: float,
    least: int = 7,
    most: int = 400,
) -> list[list[float]]:
    """Samples of each configuration in microseconds, one a round, on inputs that it ran on before.

    Takes about `seconds`, but `least` rounds at least.
    """
    device = entries[0][0].problem.device
    clock = clock_of(device)
    for inputs, config in entries:
        within = partial(running, backend, inputs.problem.op, config)
        if device != "cpu":
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
                self._judges.append((name, inputs, _judge(inputs)))
        for name, inputs, judge in self._judges:
            with running(self._backend, inputs.problem.op, config):
                result = inputs.calls[0]()
            if wrong := judge(result):
                return name + wrong
        return None


def _judge(inputs: Inputs) -> Judge:
    """What is wrong with a result of the first call of some inputs, as a function of it."""
    kit, call, p = inputs.kit, inputs.sets[0], inputs.problem
    scored = p.k if p.op == "sparse_attend" else p.slots
    everything = p.batch * p.heads * p.tokens * scored <= _MOST_SCORES
    rows, heads = (
        np.arange(n) if everything else np.unique([0, n - 1]) for n in (p.batch, p.kv_heads)
    )
    expected = Expected(kit, call, p.dtype, rows, heads)
    if p.op == "encode":
        half = _MOST_VECTORS // 2
        ends = kit.put(np.r_[: min(half, p.tokens), max(p.tokens - half, half) : p.tokens])
        return expected.codes(ends)
    if p.op == "hamming_topk":
        selection = expected.selection()
        return lambda indices: tolerance.selection_fault(expected.part(indices), selection)
    if p.op == "sparse_attend":
        return expected.attention(expected.part(call.indices))
    return _hash_attend(expected)


def _hash_attend(expected: Expected) -> Judge:
    call, kit = expected.call, expected.kit
    batch, _, slots, _ = call.keys.shape
    # The last visible key of every row and head is the one that has no code yet.
    last = np.full(batch, slots) if call.lengths is None else kit.get(call.lengths)
    last = last.astype(np.int64) - 1
    places = kit.put(np.arange(batch)), slice(None), kit.put(last)
    fresh, projection = kit.read(call.keys[places])[:, :, None], kit.read(call.projection)
    sizes = np.zeros(fresh.shape[:3], np.float16)
    codes = reference().encode(fresh, projection, norms=sizes)
    right_codes = copy.deepcopy(call.key_codes)
    right_codes[places] = kit.put(codes[:, :, 0])
    rows, heads = expected.rows, expected.heads
    norms = None if call.key_norms is None else expected.part(call.key_norms)
    if norms is not None:
        norms[np.arange(len(rows)), :, last[rows]] = sizes[np.ix_(rows, heads)][..., 0]
    q_codes = reference().encode(expected.part(call.q), projection[heads])
    k_codes = expected.part(right_codes)
    selection = expected.selection(q_codes=q_codes, k_codes=k_codes, key_norms=norms)
    attention = expected.attention(selection)

    def judge(out: Any) -> str | None:
        if not (call.key_codes == right_codes).all():
            return "the code of the fresh key is wrong, or another code was written to"
        return attention(out)

    return judge
