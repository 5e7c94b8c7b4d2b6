"""Inputs of a problem: what candidates are checked and timed on.

Arrays of a GPU are drawn on the GPU: a long cache is a gigabyte of keys.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hata
from hata.backend import Backend, Config
from hata.problem import Problem

# Data that all sets of one problem may touch; keys and values may lie in twice as much.
MAX_POOL = {"cpu": 256 << 20, "cuda": 2 << 30}
# On a CPU keys and values repeat in blocks: their values do not matter to the clock, their places
# do, and drawing them takes long.
_BLOCK = 4096
_MAX_SETS = {"cpu": 64, "cuda": 4}


@dataclass(frozen=True)
class Call:
    """One set of inputs.

    Attributes:
        op: Name of the op.
        args: Positional arguments, in the framework the backend is tuned with.
        kwargs: Keyword arguments.
    """

    op: str
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Run the op."""
        return getattr(hata, self.op)(*self.args, **self.kwargs)


class Arrays:
    """Makes arrays of the framework that a backend is tuned with, and reads them back."""

    def __init__(self, backend: Backend, device: str, dtype: str) -> None:
        self.device = device
        self.name = "torch"
        if device == "cpu" and "numpy" in backend.frameworks and dtype != "bfloat16":
            self.name = "numpy"
        elif device == "cpu" and "numpy" in backend.frameworks:
            # NumPy has no bfloat16 of its own; torch is the heavier of the two to load.
            try:
                self._bfloat16 = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
                self.name = "numpy"
            except ImportError:
                pass
        if self.name == "torch":
            self._torch = importlib.import_module("torch")

    def make(self, x: np.ndarray, dtype: str = "") -> Any:
        """`x` as an array on the device; floating-point data in `dtype`."""
        if self.name == "numpy":
            if not dtype:
                return np.ascontiguousarray(x)
            return np.ascontiguousarray(
                x.astype(self._bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
            )
        tensor = self._torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        return tensor.to(getattr(self._torch, dtype)) if dtype else tensor

    def normal(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
        """Standard normal values on the device."""
        if self.device == "cpu":
            return self.make(rng.standard_normal(shape, dtype=np.float32), dtype)
        kind = getattr(self._torch, dtype)
        return self._torch.randn(
            shape, dtype=kind, device=self.device, generator=self._generator(rng)
        )

    def codes(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        """Uniform random bytes on the device."""
        if self.device == "cpu":
            data = bytearray(rng.bytes(math.prod(shape)))
            return self.make(np.frombuffer(data, np.uint8).reshape(shape))
        return self._torch.randint(
            256,
            shape,
            dtype=self._torch.uint8,
            device=self.device,
            generator=self._generator(rng),
        )

    def _generator(self, rng: np.random.Generator) -> Any:
        generator = self._torch.Generator(self.device)
        return generator.manual_seed(int(rng.integers(2**62)))

    def repeat(self, x: Any, times: int) -> Any:
        """`x [1, heads, n, D]` repeated along the tokens."""
        if times == 1:
            return x
        return np.tile(x, (1, 1, times, 1)) if self.name == "numpy" else x.repeat(1, 1, times, 1)

    def stack(self, x: Any, times: int) -> Any:
        """`x [1, heads, n, D]` repeated along the batch."""
        if times == 1:
            return x
        return np.tile(x, (times, 1, 1, 1)) if self.name == "numpy" else x.repeat(times, 1, 1, 1)

    def take(self, x: Any, row: int, head: int, places: np.ndarray) -> np.ndarray:
        """Rows `places` of one head of `x [B, heads, S, D]`, as `read` gives them."""
        if self.name == "torch":
            places = self._torch.from_numpy(places).to(self.device)
        return self.read(x[row, head][places])

    def part(self, x: Any, rows: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Some rows and heads of `x [B, heads, ...]`, as `read` gives them."""
        if self.name == "numpy":
            return self.read(x[np.ix_(rows, heads)])
        rows, heads = (self._torch.from_numpy(n).to(self.device) for n in (rows, heads))
        return self.read(x[rows[:, None], heads[None, :]])

    def copy(self, x: Any) -> Any:
        """A copy in the same memory."""
        return x.copy() if self.name == "numpy" else x.clone()

    def equal(self, x: Any, y: Any) -> bool:
        """Whether two arrays of the device hold the same."""
        return bool(np.array_equal(x, y) if self.name == "numpy" else self._torch.equal(x, y))

    def finite(self, x: Any) -> bool:
        """Whether an array of the device holds numbers alone."""
        if self.name == "numpy":
            return bool(np.isfinite(x.astype(np.float32)).all())
        return bool(self._torch.isfinite(x).all())

    def spoil(self, x: Any, places: np.ndarray, row: int | None = None) -> Any:
        """`x [B, heads, S, D]` with NaN at `places` of one row or of all."""
        if self.name == "torch":
            places = self._torch.from_numpy(places).to(self.device)
        x[slice(None) if row is None else slice(row, row + 1), :, places] = float("nan")
        return x

    def copy_row(self, x: Any, row: int, place: int, source: int) -> Any:
        """`x [B, heads, S, D]` with the vector at `source` also at `place`, in one row."""
        x[row, :, place] = x[row, :, source]
        return x

    def read(self, x: Any) -> np.ndarray:
        """An array as NumPy has it; floating-point data as float32."""
        if self.name == "torch":
            x = x.detach().cpu()
            x = x.float().numpy() if x.is_floating_point() else x.numpy()
        return x if x.dtype.kind in "iu" else x.astype(np.float32)


def sets_for(problem: Problem, pool: int | None = None) -> tuple[int, int]:
    """How many sets of queries and codes, and of keys and values, calls take turns over.

    On a CPU as many as keep its caches cold, as far as `pool` bytes reach. On a GPU the clock sees
    to that, and a few sets are there so that no one draw of values counts.
    """
    pool = MAX_POOL[problem.device] if pool is None else pool
    size = {"float32": 4}.get(problem.dtype, 2)
    b, hkv = problem.batch, problem.kv_heads
    rows = b * problem.tokens * hkv * min(problem.k, problem.slots)
    touched = b * problem.tokens * problem.heads * problem.head_dim * size
    touched += b * hkv * problem.slots * (problem.bits // 8)
    held = 0
    if problem.op in ("sparse_attend", "hash_attend"):
        touched += rows * (problem.head_dim + problem.value_dim) * size
        held = b * hkv * problem.slots * (problem.head_dim + problem.value_dim) * size
    reach = pool if problem.device == "cuda" else min(1.25 * last_cache_bytes(), pool)
    wanted = min(max(math.ceil(reach / max(touched, 1)), 2), _MAX_SETS[problem.device])
    kv = max(1, min(wanted, 2 * pool // max(held, 1)))
    return wanted, kv


def last_cache_bytes() -> int:
    """Size of the largest CPU cache; 32 MB where the system does not say."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        largest = max(largest, int(digits) * scale if digits.isdecimal() else 0)
    return largest or 32 << 20


class Inputs:
    """The sets of inputs of one problem, drawn from a seed: the same everywhere.

    Codes are uniform random bytes: distances then crowd around one value, with many ties, as those
    of real codes do. What `hash_attend` encodes has no projection so near zero that backends may
    disagree about a bit, so that there is one right selection.
    """

    def __init__(
        self, backend: Backend, problem: Problem, *, seed: int = 0, pool: int | None = None
    ) -> None:
        self.problem = problem
        self.arrays = Arrays(backend, problem.device, problem.dtype)
        self._rng = np.random.default_rng([seed, len(problem.op)])
        self._projection: tuple[np.ndarray, Any] | None = None
        count, kv_count = sets_for(problem, pool)
        kv = [self._kv() for _ in range(kv_count)]
        self.calls = [self._call(kv[i % kv_count]) for i in range(count)]

    def _normal(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal(shape, dtype=np.float32)

    def _codes(self, heads: int, tokens: int) -> Any:
        p = self.problem
        return self.arrays.codes(self._rng, (p.batch, heads, tokens, p.bits // 8))

    def _kv(self) -> tuple[Any, Any]:
        p, arrays = self.problem, self.arrays
        if p.op not in ("sparse_attend", "hash_attend"):
            return None, None
        made = []
        for size in (p.head_dim, p.value_dim):
            if p.device == "cuda":
                made.append(arrays.normal(self._rng, (p.batch, p.kv_heads, p.slots, size), p.dtype))
                continue
            block = min(p.slots, _BLOCK)
            one = arrays.normal(self._rng, (1, p.kv_heads, block, size), p.dtype)
            made.append(arrays.stack(arrays.repeat(one, p.slots // block), p.batch))
        keys, values = made
        if p.op == "hash_attend" and p.slots:
            keys[:, :, p.slots - 1 :] = arrays.make(self._settled(1, p.kv_heads, 1), p.dtype)
        return keys, values

    def _projections(self) -> tuple[np.ndarray, Any]:
        if self._projection is None:
            p = self.problem
            x = self._normal(p.kv_heads, p.head_dim, p.bits)
            made = self.arrays.make(x, p.projection_dtype)
            self._projection = self.arrays.read(made), made
        return self._projection

    def _settled(self, batch: int, heads: int, tokens: int) -> np.ndarray:
        """Vectors none of whose projections is within rounding of zero."""
        p = self.problem
        projection = np.repeat(self._projections()[0], heads // p.kv_heads, axis=0)
        x = self._normal(batch, heads, tokens, p.head_dim)
        for _ in range(100):
            rounded = self.arrays.read(self.arrays.make(x, p.dtype))
            near = near_zero(rounded, projection).any(-1)
            if not near.any():
                break
            x[near] = self._normal(int(near.sum()), p.head_dim)
        return x

    def _norms(self) -> Any:
        p = self.problem
        shape = (p.batch, p.kv_heads, p.slots)
        return abs(self.arrays.normal(self._rng, shape, "float16")) + 0.5

    def _call(self, kv: tuple[Any, Any]) -> Call:
        p, arrays = self.problem, self.arrays
        kwargs: dict[str, Any] = {}
        if p.op == "encode":
            x = arrays.normal(self._rng, (p.batch, p.heads, p.tokens, p.head_dim), p.dtype)
            if p.norms:
                blank = np.zeros((p.batch, p.heads, p.tokens), np.float16)
                kwargs["norms"] = arrays.make(blank)
            return Call(p.op, (x, self._projections()[1]), kwargs)
        if p.norms:
            kwargs["key_norms"] = self._norms()
        if p.op == "hamming_topk":
            codes = self._codes(p.heads, p.tokens), self._codes(p.kv_heads, p.slots)
            if p.per_head:
                kwargs["per_head"] = True
            return Call(p.op, (*codes, p.k), kwargs)
        keys, values = kv
        if p.op == "sparse_attend":
            heads = p.heads if p.per_head else p.kv_heads
            indices = self._indices(p.batch * heads * p.tokens, p.k)
            q = arrays.normal(self._rng, (p.batch, p.heads, p.tokens, p.head_dim), p.dtype)
            indices = arrays.make(indices.reshape(p.batch, heads, p.tokens, p.k))
            return Call(p.op, (q, keys, values, indices), {})
        q = arrays.make(self._settled(p.batch, p.heads, p.tokens), p.dtype)
        codes = self._codes(p.kv_heads, p.slots)
        made = self._projections()[1]
        # A decode step brings one key that has no code yet.
        return Call(p.op, (q, keys, values, codes, made, p.k), kwargs | {"fresh": 1})

    def _indices(self, rows: int, k: int) -> np.ndarray:
        slots = self.problem.slots
        taken = min(k, slots)
        found = np.full((rows, k), -1, np.int32)
        for row in found:
            row[:taken] = np.sort(self._rng.choice(slots, taken, replace=False))
        return found


def near_zero(x: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Where backends may disagree about a bit: `|x.p| <= D * 2**-23 * sum |x_i p_i|`.

    Args:
        x: `[B, heads, T, D]`.
        projection: `[heads, D, r]`.
    """
    x64, p64 = x.astype(np.float64), projection.astype(np.float64)
    margin = x.shape[-1] * 2.0**-23 * (np.abs(x64) @ np.abs(p64))
    return np.abs(x64 @ p64) <= margin


class Candidate(NamedTuple):
    """What is timed: a configuration on the inputs of a problem."""

    inputs: Inputs
    config: Config
