"""Whether a configuration's results are right, before anybody asks how fast it is.

Two calls are held against the oracle: the problem's own inputs (of large ones the first and last
rows and heads), and an awkward small one (ragged lengths, a row shorter than the budget, codes that
are all equal, an odd number of slots, NaN where nothing may be read). Selections must be equal bit
for bit; codes must be equal but for bits whose value is within rounding of zero; attention may err
twice as much as a plain computation in the same precision, against float64. What the oracle says is
computed once per problem.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hata.backend import Backend, Config, use_config
from hata.problem import Problem
from tune.inputs import Arrays, Call, Inputs, near_zero

# Scores that the oracle may have to compute, of every query head and key; more takes it seconds.
_MOST_SCORES = 1 << 21
# Vectors of each row and head whose codes are checked.
_MOST_VECTORS = 512

_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def load_oracle() -> Any:
    """The NumPy oracle of the reference backend, reached by name."""
    return importlib.import_module("hata.backends.reference.oracle")


class Checker:
    """Checks configurations of one problem."""

    def __init__(self, backend: Backend, inputs: Inputs) -> None:
        self._backend = backend
        self._oracle = load_oracle()
        self._dtype = inputs.problem.dtype
        awkward = _awkward(backend, inputs.problem)
        self._calls = [(inputs.arrays, inputs.calls[0]), (awkward[0], awkward[1])]
        self._verdicts: list[Callable[[Any], str | None]] | None = None

    def fault(self, config: Config) -> str | None:
        """What is wrong with the results of a configuration; `None` if nothing is."""
        if self._verdicts is None:
            self._verdicts = [self._expect(arrays, call) for arrays, call in self._calls]
        where = ("", "awkward inputs: ")
        for (_, call), verdict, prefix in zip(self._calls, self._verdicts, where, strict=True):
            with use_config(self._backend.name, call.op, config):
                result = call()
            wrong = verdict(result)
            if wrong:
                return prefix + wrong
        return None

    def _expect(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        expect = getattr(self, f"_expect_{call.op}")
        return expect(arrays, call)

    def _expect_encode(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        tokens = call.args[0].shape[2]
        first, last = slice(0, _MOST_VECTORS // 2), slice(-(_MOST_VECTORS // 2), None)

        def ends(x: Any) -> np.ndarray:
            if tokens <= _MOST_VECTORS:
                return arrays.read(x)
            return np.concatenate([arrays.read(x[:, :, part]) for part in (first, last)], axis=2)

        x, projection = ends(call.args[0]), arrays.read(call.args[1])
        expected = np.asarray(self._oracle.encode(x, projection))
        every_head = np.repeat(projection, x.shape[1] // projection.shape[0], axis=0)
        doubtful = np.packbits(near_zero(x, every_head), axis=-1, bitorder="little")
        norms = call.kwargs.get("norms")
        lengths = np.minimum(np.sqrt((x.astype(np.float64) ** 2).sum(-1)), 65504)

        def verdict(codes: Any) -> str | None:
            wrong = (ends(codes) ^ expected) & ~doubtful
            if wrong.any():
                return f"{np.count_nonzero(wrong)} of {wrong.size} bytes of codes are wrong"
            if norms is not None:
                # One unit in the last place of float16, and the rounding of float32 sums.
                apart = np.abs(ends(norms) - lengths)
                if not (apart <= lengths * 2.0**-10 + 2.0**-24).all():
                    return f"norms are off by up to {np.nanmax(apart):.3g}"
            return None

        return verdict

    def _expect_hamming_topk(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        q_codes, k_codes, k = call.args
        part = _Part.of(q_codes.shape, k_codes.shape)
        chosen_by = part.members if call.kwargs.get("per_head") else part.heads
        norms = call.kwargs.get("key_norms")
        expected = np.asarray(
            self._oracle.hamming_topk(
                arrays.part(q_codes, part.rows, part.members),
                arrays.part(k_codes, part.rows, part.heads),
                k,
                lengths=_lengths(arrays, call, part.rows),
                key_norms=None if norms is None else arrays.part(norms, part.rows, part.heads),
                per_head=call.kwargs.get("per_head", False),
                **_guards(call),
            )
        )

        def verdict(indices: Any) -> str | None:
            if tuple(indices.shape[2:]) != expected.shape[2:]:
                return f"indices of shape {tuple(indices.shape)}, expected k = {expected.shape[3]}"
            return _selection_fault(arrays.part(indices, part.rows, chosen_by), expected)

        return verdict

    def _expect_sparse_attend(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        q, keys, _, indices = call.args
        part = _Part.of(q.shape, (*keys.shape[:2], indices.shape[3]))
        per_head = indices.shape[1] != keys.shape[1]
        chosen_by = part.members if per_head else part.heads
        return self._attention(arrays, call, arrays.part(indices, part.rows, chosen_by), part)

    def _expect_hash_attend(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        q, keys, _, key_codes, projection, k = call.args
        projection = arrays.read(projection)
        batch, kv_heads, slots = keys.shape[:3]
        lengths = _lengths(arrays, call, np.arange(batch))
        lengths = np.full(batch, slots, np.int32) if lengths is None else lengths
        # The last visible key of every row and head is the one that has no code yet.
        last = np.stack(
            [
                [arrays.take(keys, b, h, np.array([n - 1])) for h in range(kv_heads)]
                for b, n in enumerate(lengths)
            ]
        )
        fresh = np.asarray(self._oracle.encode(last, projection))
        right_codes = arrays.copy(key_codes)
        for b, n in enumerate(lengths):
            right_codes[b, :, int(n) - 1] = arrays.make(fresh[b, :, 0])
        part = _Part.of(q.shape, keys.shape)
        norms = call.kwargs.get("key_norms")
        if norms is not None:
            norms = arrays.part(norms, part.rows, part.heads)
            size = np.sqrt((last.astype(np.float64) ** 2).sum(-1))[..., 0].astype(np.float16)
            places = np.arange(len(part.rows)), slice(None), lengths[part.rows] - 1
            norms[places] = size[np.ix_(part.rows, part.heads)]
        indices = np.asarray(
            self._oracle.hamming_topk(
                np.asarray(
                    self._oracle.encode(
                        arrays.part(q, part.rows, part.members), projection[part.heads]
                    )
                ),
                arrays.part(right_codes, part.rows, part.heads),
                k,
                lengths=lengths[part.rows],
                key_norms=norms,
                **_guards(call),
            )
        )
        attention = self._attention(arrays, call, indices, part)

        def verdict(out: Any) -> str | None:
            if not arrays.equal(key_codes, right_codes):
                return "the code of the fresh key is wrong, or another code was written to"
            return attention(out)

        return verdict

    def _attention(
        self, arrays: Arrays, call: Call, indices: np.ndarray, part: _Part
    ) -> Callable[[Any], str | None]:
        """What is expected of `part`, whose selections are `indices`."""
        q, keys, values = call.args[:3]
        q64 = arrays.part(q, part.rows, part.members).astype(np.float64)
        batch, heads = q64.shape[:2]
        k = indices.shape[3]
        # Selected rows only, one small cache a query head, so that a long cache costs nothing.
        shape = (batch * q64.shape[2], heads, k)
        few_keys = np.zeros((*shape, keys.shape[3]))
        few_values = np.zeros((*shape, values.shape[3]))
        places = np.full((shape[0], heads, 1, k), -1, np.int32)
        for b in range(batch):
            for h in range(heads):
                for t in range(q64.shape[2]):
                    chosen = indices[b, h * indices.shape[1] // heads, t]
                    chosen = chosen[chosen >= 0].astype(np.int64)
                    row, n = b * q64.shape[2] + t, len(chosen)
                    at = int(part.rows[b]), int(part.heads[h * len(part.heads) // heads])
                    few_keys[row, h, :n] = arrays.take(keys, *at, chosen)
                    few_values[row, h, :n] = arrays.take(values, *at, chosen)
                    places[row, h, 0, :n] = np.arange(n)
        flat = q64.transpose(0, 2, 1, 3).reshape(shape[0], heads, 1, -1)
        scale = q64.shape[3] ** -0.5
        exact = np.asarray(
            self._oracle.sparse_attend(flat, few_keys, few_values, places, scale=scale)
        ).astype(np.float64)
        plain = _plain(arrays, flat, few_keys, few_values, places, scale, self._dtype)
        largest = np.abs(few_values).max(initial=0.0)
        limit = 2 * np.abs(plain - exact).max(initial=0.0) + largest * (
            _EPS[self._dtype] / 2 + 16 * _EPS["float32"]
        )
        expected = exact.reshape(batch, -1, heads, exact.shape[-1]).transpose(0, 2, 1, 3)

        def verdict(out: Any) -> str | None:
            if tuple(out.shape) != (*q.shape[:3], values.shape[3]):
                return f"shape {tuple(out.shape)}, expected {(*q.shape[:3], values.shape[3])}"
            if not arrays.finite(out):
                return "the output is not finite"
            got = arrays.part(out, part.rows, part.members).astype(np.float64)
            error = np.abs(got - expected).max(initial=0.0)
            if error > limit:
                return f"attention is off by {error:.3g}, at most {limit:.3g} is right"
            return None

        return verdict


class _Part(NamedTuple):
    """Of a call, the batch rows, KV heads and query heads (`members`) that are checked."""

    rows: np.ndarray
    heads: np.ndarray
    members: np.ndarray

    @classmethod
    def of(cls, q_shape: Sequence[int], k_shape: Sequence[int]) -> _Part:
        """All of `q [B, H, T, ...]` and `keys [B, Hkv, S, ...]`, or the corners of large ones."""
        batch, kv_heads, slots = k_shape[:3]
        group = q_shape[1] // kv_heads
        everything = batch * q_shape[1] * q_shape[2] * slots <= _MOST_SCORES
        rows, heads = (
            np.arange(n) if everything else np.unique([0, n - 1]) for n in (batch, kv_heads)
        )
        members = (heads[:, None] * group + np.arange(group)).reshape(-1)
        return cls(rows, heads, members)


def _lengths(arrays: Arrays, call: Call, rows: np.ndarray) -> np.ndarray | None:
    lengths = call.kwargs.get("lengths")
    return None if lengths is None else arrays.read(lengths)[rows]


def _guards(call: Call) -> dict[str, Any]:
    return {name: call.kwargs[name] for name in ("sink", "recent") if name in call.kwargs}


def _selection_fault(got: np.ndarray, expected: np.ndarray) -> str | None:
    if got.shape != expected.shape:
        return f"indices of shape {got.shape}, expected {expected.shape}"
    wrong = (got != expected).any(-1)
    if wrong.any():
        return f"{np.count_nonzero(wrong)} of {wrong.size} selections are wrong"
    return None


def _plain(
    arrays: Arrays,
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    scale: float,
    dtype: str,
) -> np.ndarray:
    """Attention as a chain of framework calls in `dtype` would compute it, with float32 sums."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return arrays.read(arrays.make(x.astype(np.float32), dtype))

    q32, k32, v32 = (x.astype(np.float32) for x in (q, keys, values))
    logits = rounded(np.einsum("bhtd,bhkd->bhtk", q32, k32) * np.float32(scale))
    logits = np.where(places >= 0, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True, dtype=np.float32)
    shares = rounded(weights / np.where(total == 0, 1, total))
    return rounded(np.einsum("bhtk,bhkd->bhtd", shares, v32)).astype(np.float64)


_AWKWARD_SLOTS = 203


def awkward_problem(problem: Problem) -> Problem:
    """The small problem of the same kernel whose awkward call is checked beside the problem's."""
    return replace(
        problem,
        batch=2,
        tokens=3 if problem.op == "encode" else 1,
        slots=_AWKWARD_SLOTS if problem.slots else 0,
        k=min(problem.k, 64),
    )


def _awkward(backend: Backend, problem: Problem) -> tuple[Arrays, Call]:
    """A small call with everything that kernels get wrong."""
    small, slots = awkward_problem(problem), _AWKWARD_SLOTS
    lengths = np.array([slots, 37], np.int32)
    inputs = Inputs(backend, small, seed=1, pool=0)
    arrays, call = inputs.arrays, inputs.calls[0]
    if problem.op == "encode":
        return arrays, call
    kwargs, args = dict(call.kwargs), list(call.args)
    if problem.op == "sparse_attend":
        indices = arrays.read(args[3]).copy()
        indices[:, :, :, 1::3] = -1
        unread = np.setdiff1d(np.arange(slots), indices)
        args[2] = arrays.spoil(args[2], unread)
        args[3] = arrays.make(indices)
        return arrays, Call(call.op, tuple(args), kwargs)
    place = 1 if problem.op == "hamming_topk" else 3
    codes = arrays.read(args[place]).copy()
    codes[1] = codes[1, :1, :1]
    codes[0, :, ::2] = codes[0, :, :1]
    args[place], kwargs["lengths"] = arrays.make(codes), arrays.make(lengths)
    if small.k >= 8:
        kwargs |= {"sink": 2, "recent": 3}
    if problem.op == "hash_attend":
        for row, length in enumerate(lengths):
            # The last visible key is the one that is encoded: a settled one (see `Inputs`).
            args[1] = arrays.copy_row(args[1], row, length - 1, slots - 1)
            args[2] = arrays.spoil(args[2], np.arange(length, slots), row)
    return arrays, Call(call.op, tuple(args), kwargs)
