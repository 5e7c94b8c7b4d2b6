"""Inputs of a problem, and the clock.

A candidate is timed as users run it: through the public op, one call a sample, on caches that hold
nothing of the call's data. For that every call takes the next of several *sets* of inputs, whose
codes, queries and selected rows together are larger than the last cache (of a CPU: as far as
`MAX_POOL` bytes reach; second-level caches are always cold). Candidates take turns within a round,
in an order that changes, so that a machine that slows down slows all of them.

On a GPU a sample is the replay of a CUDA graph between two events, after a write that fills the
second-level cache.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

import hata
from hata.backend import Backend, Config, use_config
from hata.problem import Problem

# Data that all sets of one problem may touch; keys and values may lie in twice as much.
MAX_POOL = 256 << 20
# Keys and values repeat in blocks: their values do not matter to the clock, their places do.
_BLOCK = 4096
_MAX_SETS = 64


class Timing(NamedTuple):
    """Microseconds of one call: median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The percentiles of samples in microseconds."""
        p10, median, p90 = np.percentile(np.asarray(samples, float), (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


@dataclass(frozen=True)
class Call:
    """One set of inputs.

    Attributes:
        op: Name of the op.
        args: Positional arguments, in the framework the backend is tuned with.
        kwargs: Keyword arguments.
        source: The same arrays as NumPy has them (float32 for data), by argument name.
    """

    op: str
    args: tuple
    kwargs: dict[str, Any]
    source: dict[str, Any]

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

    def repeat(self, x: Any, times: int) -> Any:
        """`x [1, heads, n, D]` repeated along the tokens."""
        if times == 1:
            return x
        return np.tile(x, (1, 1, times, 1)) if self.name == "numpy" else x.repeat(1, 1, times, 1)

    def take(self, x: Any, row: int, head: int, places: np.ndarray) -> np.ndarray:
        """Rows `places` of one head of `x [B, heads, S, D]`, as `read` gives them."""
        if self.name == "torch":
            places = self._torch.from_numpy(places).to(self.device)
        return self.read(x[row, head][places])

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


def sets_for(problem: Problem, pool: int = MAX_POOL) -> tuple[int, int]:
    """How many sets of queries and codes, and of keys and values, keep caches cold."""
    size = {"float32": 4}.get(problem.dtype, 2)
    b, hkv = problem.batch, problem.kv_heads
    rows = b * problem.tokens * hkv * min(problem.k, problem.slots)
    touched = b * problem.tokens * problem.heads * problem.head_dim * size
    touched += b * hkv * problem.slots * (problem.bits // 8)
    held = 0
    if problem.op in ("sparse_attend", "hash_attend"):
        touched += rows * (problem.head_dim + problem.value_dim) * size
        held = b * hkv * problem.slots * (problem.head_dim + problem.value_dim) * size
    wanted = min(
        max(math.ceil(min(1.25 * last_cache_bytes(), pool) / max(touched, 1)), 2), _MAX_SETS
    )
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
        self, backend: Backend, problem: Problem, *, seed: int = 0, pool: int = MAX_POOL
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

    def _codes(self, heads: int, tokens: int) -> np.ndarray:
        p = self.problem
        data = bytearray(self._rng.bytes(p.batch * heads * tokens * p.bits // 8))
        return np.frombuffer(data, np.uint8).reshape(p.batch, heads, tokens, p.bits // 8)

    def _kv(self) -> tuple[Any, Any]:
        p = self.problem
        if p.op not in ("sparse_attend", "hash_attend"):
            return None, None
        block = min(p.slots, _BLOCK)
        made = []
        for name, size in (("keys", p.head_dim), ("values", p.value_dim)):
            x = self._normal(1, p.kv_heads, block, size)
            if name == "keys" and p.op == "hash_attend":
                x[:, :, -1:] = self._settled(1, p.kv_heads, 1)
            base = self.arrays.make(x, p.dtype)
            one = self.arrays.repeat(base, p.slots // block)
            if p.batch > 1:
                stack = np.concatenate if self.arrays.name == "numpy" else self.arrays._torch.cat
                one = stack([one] * p.batch)
            made.append(one)
        return made[0], made[1]

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
        return np.abs(self._normal(*shape)).astype(np.float16) + np.float16(0.5)

    def _call(self, kv: tuple[Any, Any]) -> Call:
        p, arrays = self.problem, self.arrays
        source: dict[str, Any] = {}
        kwargs: dict[str, Any] = {}
        if p.op == "encode":
            projection, made = self._projections()
            x = arrays.make(self._normal(p.batch, p.heads, p.tokens, p.head_dim), p.dtype)
            source = {"x": arrays.read(x), "projection": projection}
            if p.norms:
                blank = np.zeros((p.batch, p.heads, p.tokens), np.float16)
                kwargs["norms"] = arrays.make(blank)
            return Call(p.op, (x, made), kwargs, source)
        if p.norms:
            source["key_norms"] = self._norms()
            kwargs["key_norms"] = arrays.make(source["key_norms"].copy())
        if p.op == "hamming_topk":
            source |= {
                "q_codes": self._codes(p.heads, p.tokens),
                "k_codes": self._codes(p.kv_heads, p.slots),
            }
            args = (arrays.make(source["q_codes"]), arrays.make(source["k_codes"]), p.k)
            if p.per_head:
                kwargs["per_head"] = True
            return Call(p.op, args, kwargs, source)
        keys, values = kv
        if p.op == "sparse_attend":
            heads = p.heads if p.per_head else p.kv_heads
            source["indices"] = self._indices(p.batch * heads * p.tokens, p.k).reshape(
                p.batch, heads, p.tokens, p.k
            )
            q = arrays.make(self._normal(p.batch, p.heads, p.tokens, p.head_dim), p.dtype)
            return Call(p.op, (q, keys, values, arrays.make(source["indices"])), {}, source)
        projection, made = self._projections()
        q = arrays.make(self._settled(p.batch, p.heads, p.tokens), p.dtype)
        source |= {"projection": projection, "key_codes": self._codes(p.kv_heads, p.slots)}
        codes = arrays.make(source["key_codes"].copy())
        # A decode step brings one key that has no code yet.
        return Call(p.op, (q, keys, values, codes, made, p.k), kwargs | {"fresh": 1}, source)

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


def race(
    backend: Backend,
    candidates: Sequence[Candidate],
    *,
    seconds: float,
    least: int = 7,
    most: int = 400,
    seed: int = 0,
) -> list[list[float]]:
    """Time candidates against each other.

    Args:
        backend: Runs all of them.
        candidates: Each must have run once before.
        seconds: About how long the whole race may take.
        least: Fewest rounds, whatever they take.
        most: Most rounds.
        seed: Of the order within rounds.

    Returns:
        For each candidate its samples in microseconds, one a round.
    """
    cuda = candidates[0].inputs.problem.device == "cuda"
    clock = (_CudaClock if cuda else _CpuClock)(backend, candidates)
    order, shuffle = list(range(len(candidates))), Random(seed).shuffle
    samples: list[list[float]] = [[] for _ in candidates]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in order:
            # The first calls after a pause are slow: clocks rise, threads wake.
            clock.sample(index, 0)
        start = time.perf_counter()
        turn = 0
        for _ in range(most):
            shuffle(order)
            for index in order:
                turn += 1
                samples[index].append(clock.sample(index, turn))
            if len(samples[0]) >= least and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


class _CpuClock:
    def __init__(self, backend: Backend, candidates: Sequence[Candidate]) -> None:
        self._name = backend.name
        self._candidates = candidates

    def sample(self, index: int, turn: int) -> float:
        """Microseconds of one call with the set of inputs whose turn it is."""
        inputs, config = self._candidates[index]
        call = inputs.calls[turn % len(inputs.calls)]
        op: Callable[..., Any] = getattr(hata, call.op)
        args, kwargs = call.args, call.kwargs
        with use_config(self._name, call.op, config):
            start = time.perf_counter_ns()
            op(*args, **kwargs)
            return (time.perf_counter_ns() - start) / 1e3


class _CudaClock:
    """Replays of captured calls, each after a write as large as the second-level cache."""

    def __init__(self, backend: Backend, candidates: Sequence[Candidate]) -> None:
        self._torch = torch = importlib.import_module("torch")
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._graphs = []
        for inputs, config in candidates:
            call = inputs.calls[0]
            with use_config(backend.name, call.op, config):
                hata.prepare(call.op, *call.args, **call.kwargs)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
            self._graphs.append(graph)

    def sample(self, index: int, turn: int) -> float:
        """Microseconds of one replay."""
        before, after = self._events
        self._flush.fill_(turn & 255)
        before.record()
        self._graphs[index].replay()
        after.record()
        after.synchronize()
        return 1e3 * before.elapsed_time(after)
