"""Whether a configuration's results are right, before anybody asks how fast it is.

Two calls are held against the oracle: the problem's own inputs, and an awkward small one (ragged
lengths, a row shorter than the budget, codes that are all equal, an odd number of slots, NaN where
nothing may be read). Selections must be equal bit for bit; codes must be equal but for bits whose
value is within rounding of zero; attention may err twice as much as a plain computation in the
same precision, against float64. What the oracle says is computed once per problem.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hata.backend import Backend, Config, use_config
from hata.problem import Problem
from tune.measure import Arrays, Call, Inputs, near_zero

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
        x, projection = call.source["x"], call.source["projection"]
        expected = np.asarray(self._oracle.encode(x, projection))
        every_head = np.repeat(projection, x.shape[1] // projection.shape[0], axis=0)
        doubtful = np.packbits(near_zero(x, every_head), axis=-1, bitorder="little")
        norms = call.kwargs.get("norms")
        lengths = np.minimum(np.sqrt((x.astype(np.float64) ** 2).sum(-1)), 65504)

        def verdict(codes: Any) -> str | None:
            wrong = (arrays.read(codes) ^ expected) & ~doubtful
            if wrong.any():
                return f"{np.count_nonzero(wrong)} of {wrong.size} bytes of codes are wrong"
            if norms is not None:
                # One unit in the last place of float16, and the rounding of float32 sums.
                apart = np.abs(arrays.read(norms) - lengths)
                if not (apart <= lengths * 2.0**-10 + 2.0**-24).all():
                    return f"norms are off by up to {np.nanmax(apart):.3g}"
            return None

        return verdict

    def _expect_hamming_topk(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        source, k = call.source, call.args[2]
        options = {name: source[name] for name in ("lengths", "key_norms") if name in source}
        options |= {n: call.kwargs[n] for n in ("sink", "recent", "per_head") if n in call.kwargs}
        expected = np.asarray(
            self._oracle.hamming_topk(source["q_codes"], source["k_codes"], k, **options)
        )

        def verdict(indices: Any) -> str | None:
            return _selection_fault(arrays.read(indices), expected)

        return verdict

    def _expect_sparse_attend(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        return self._attention(arrays, call, call.source["indices"])

    def _expect_hash_attend(self, arrays: Arrays, call: Call) -> Callable[[Any], str | None]:
        source, k = call.source, call.args[5]
        q, keys = call.args[0], call.args[1]
        lengths = source.get("lengths")
        if lengths is None:
            lengths = np.full(q.shape[0], keys.shape[2], np.int32)
        codes = source["key_codes"].copy()
        last = np.stack(
            [
                [arrays.take(keys, b, h, np.array([n - 1])) for h in range(keys.shape[1])]
                for b, n in enumerate(lengths)
            ]
        )
        fresh = np.asarray(self._oracle.encode(last, source["projection"]))
        codes[np.arange(len(lengths)), :, lengths - 1] = fresh[:, :, 0]
        norms = source.get("key_norms")
        if norms is not None:
            norms = norms.copy()
            size = np.sqrt((last.astype(np.float64) ** 2).sum(-1))[..., 0]
            norms[np.arange(len(lengths)), :, lengths - 1] = size.astype(np.float16)
        q_codes = np.asarray(self._oracle.encode(arrays.read(q), source["projection"]))
        options = {n: call.kwargs[n] for n in ("sink", "recent") if n in call.kwargs}
        indices = np.asarray(
            self._oracle.hamming_topk(
                q_codes, codes, k, lengths=lengths, key_norms=norms, **options
            )
        )
        attention = self._attention(arrays, call, indices)
        written = call.args[3]

        def verdict(out: Any) -> str | None:
            if not np.array_equal(arrays.read(written), codes):
                return "the code of the fresh key is wrong, or another code was written to"
            return attention(out)

        return verdict

    def _attention(
        self, arrays: Arrays, call: Call, indices: np.ndarray
    ) -> Callable[[Any], str | None]:
        q, keys, values = call.args[:3]
        q64 = arrays.read(q).astype(np.float64)
        batch, heads = q64.shape[:2]
        kv_heads, k = keys.shape[1], indices.shape[3]
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
                    kv = h * kv_heads // heads
                    few_keys[row, h, :n] = arrays.take(keys, b, kv, chosen)
                    few_values[row, h, :n] = arrays.take(values, b, kv, chosen)
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
            got = arrays.read(out).astype(np.float64)
            if got.shape != expected.shape:
                return f"shape {got.shape}, expected {expected.shape}"
            if not np.isfinite(got).all():
                return "the output is not finite"
            error = np.abs(got - expected).max(initial=0.0)
            if error > limit:
                return f"attention is off by {error:.3g}, at most {limit:.3g} is right"
            return None

        return verdict


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


def _awkward(backend: Backend, problem: Problem) -> tuple[Arrays, Call]:
    """A small call of the same kernel with everything that kernels get wrong."""
    slots, lengths = 203, np.array([203, 37], np.int32)
    small = replace(
        problem,
        batch=2,
        tokens=3 if problem.op == "encode" else 1,
        slots=slots if problem.slots else 0,
        k=min(problem.k, 64),
    )
    inputs = Inputs(backend, small, seed=1, pool=0)
    arrays, call = inputs.arrays, inputs.calls[0]
    if problem.op == "encode":
        return arrays, call
    source, kwargs, args = dict(call.source), dict(call.kwargs), list(call.args)
    if problem.op == "sparse_attend":
        indices = source["indices"].copy()
        indices[:, :, :, 1::3] = -1
        unread = np.setdiff1d(np.arange(slots), indices)
        args[2] = arrays.spoil(args[2], unread)
        source["indices"], args[3] = indices, arrays.make(indices)
        return arrays, Call(call.op, tuple(args), kwargs, source)
    name, place = ("k_codes", 1) if problem.op == "hamming_topk" else ("key_codes", 3)
    codes = source[name].copy()
    codes[1] = codes[1, :1, :1]
    codes[0, :, ::2] = codes[0, :, :1]
    source[name], args[place] = codes, arrays.make(codes.copy())
    source["lengths"], kwargs["lengths"] = lengths, arrays.make(lengths)
    if small.k >= 8:
        kwargs |= {"sink": 2, "recent": 3}
    if problem.op == "hash_attend":
        for row, length in enumerate(lengths):
            # The last visible key is the one that is encoded: a settled one (see `Inputs`).
            args[1] = arrays.copy_row(args[1], row, length - 1, slots - 1)
            args[2] = arrays.spoil(args[2], np.arange(length, slots), row)
    return arrays, Call(call.op, tuple(args), kwargs, source)
