"""A call of an op as one object: what checks, registry, backends and tests hand on.

Each op has a class of calls, a named tuple: frozen, cheap to make, its fields named as in
`hata.ops`. Arrays come first, then numbers. `hata.ops` makes a call as the caller wrote it;
`hata.dispatch` checks it and gives the backend the same call *completed*: defaults filled in, sizes
clipped to S, and with a `route`, which holds what was decided once for all calls that look alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from hata.arrays import Framework, Layout
from hata.problem import Problem

# Of a framework, or `hata.arrays.Layout`.
Array = Any


class Budget(NamedTuple):
    """How many keys a query may attend to.

    Attributes:
        k: Most keys.
        ratio: `round(ratio * 2**32)`, or -1 where the budget is k.
        k_min: Fewest keys where a ratio is given.
        sink: First visible keys that always win.
        recent: Last visible keys that always win.
    """

    k: int
    ratio: int = -1
    k_min: int = 0
    sink: int = 0
    recent: int = 0

    @property
    def least(self) -> int:
        """Fewest keys of a budget that follows a ratio."""
        return min(self.k, max(1, self.k_min, self.sink + self.recent))

    def of(self, visible: int) -> int:
        """The budget of a query that sees `visible` keys (it may exceed `visible`)."""
        if self.ratio < 0:
            return self.k
        return min(self.k, max(self.least, (visible * self.ratio) >> 32))


@dataclass(slots=True, eq=False)
class Route:
    """What is decided once for all calls with one signature.

    Attributes:
        fw: The framework of the arrays.
        problem: What a configuration is looked up by.
        device: Where the arrays are, such as `"cuda:0"`.
        options: The numbers of the call, completed.
        budget: Its budget, if it has one.
        given: Names of the arrays that the caller gave.
        backend: What runs it.
        config: The backend's configuration for the problem.
        memo: Whatever the backend wants to keep for such calls; `None` at first.
        spans: What the arrays take up in memory, where the call writes into some.
        apart: Addresses that were found to lie apart.
    """

    fw: Framework
    problem: Problem
    device: str
    options: tuple
    budget: Budget
    given: frozenset[str]
    backend: Any = None
    config: Any = field(default_factory=dict)
    memo: Any = None
    spans: tuple = ()
    apart: set[tuple[int, ...]] = field(default_factory=set)


class Result(NamedTuple):
    """What a call gives: an array by name, its shape, and its dtype (`None`: that of q)."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None


class Call:
    """What the calls of all ops have in common.

    Class constants:
        OP: Name of the op.
        ARRAYS: How many of the fields, the first ones, are arrays.
    """

    __slots__ = ()
    OP: ClassVar[str]
    ARRAYS: ClassVar[int]
    _fields: ClassVar[tuple[str, ...]]
    route: Route

    @property
    def fw(self) -> Framework:
        """The framework of the arrays: `fw.empty(shape, dtype, like)` allocates a result."""
        return self.route.fw

    @property
    def problem(self) -> Problem:
        """The problem that the call poses."""
        return self.route.problem

    @property
    def budget(self) -> Budget:
        """The budget, with the ratio in fixed point, of a call that has one."""
        return self.route.budget

    @property
    def config(self) -> dict[str, Any]:
        """The backend's configuration for the problem."""
        return self.route.config

    def arrays(self: Any) -> dict[str, Any]:
        """The arrays by name; `None` where one was not given."""
        return dict(zip(self._fields[: self.ARRAYS], self, strict=False))

    def options(self: Any) -> dict[str, Any]:
        """The numbers by name."""
        return dict(zip(self._fields[self.ARRAYS : -2], self[self.ARRAYS : -2], strict=True))

    def written(self) -> tuple[str, ...]:
        """Names of the arrays that the call writes into, where they are given."""
        return ()

    def results(self) -> tuple[Result, ...]:
        """What the call gives."""
        raise NotImplementedError

    @classmethod
    def complete(cls: Any, arrays: tuple, route: Route, addresses: list[int]) -> Any:
        """A call as a backend gets it: of its arrays, and what was found for calls like it."""
        return tuple.__new__(cls, (*arrays, *route.options, route, addresses))


class _Encode(NamedTuple):
    x: Array
    projection: Array
    bias: Array | None = None
    out: Array | None = None
    norms: Array | None = None
    route: Any = None
    addresses: Any = None


class Encode(_Encode, Call):
    """A call of `hata.encode`."""

    __slots__ = ()
    OP = "encode"
    ARRAYS = 5

    def written(self) -> tuple[str, ...]:
        """What the caller gave for the results."""
        return "out", "norms"

    def results(self) -> tuple[Result, ...]:
        """The codes."""
        width = self.projection.shape[2] // 8
        return (Result("codes", (*self.x.shape[:3], width), "uint8"),)


class _HammingTopK(NamedTuple):
    q_codes: Array
    k_codes: Array
    lengths: Array | None = None
    starts: Array | None = None
    key_norms: Array | None = None
    k: int = 0
    ratio: float | None = None
    k_min: int = 0
    sink: int = 0
    recent: int = 0
    per_head: bool = False
    route: Any = None
    addresses: Any = None


class HammingTopK(_HammingTopK, Call):
    """A call of `hata.hamming_topk`."""

    __slots__ = ()
    OP = "hamming_topk"
    ARRAYS = 5

    def results(self) -> tuple[Result, ...]:
        """The indices."""
        batch, heads, tokens, _ = self.q_codes.shape
        rows = heads if self.per_head else self.k_codes.shape[1]
        return (Result("indices", (batch, rows, tokens, self.k), "int32"),)


def _attended(call: Any) -> tuple[Result, ...]:
    shape = tuple(call.q.shape[:3])
    out = Result("out", (*shape, call.values.shape[3]), None)
    return out, Result("lse", shape, "float32")


class _SparseAttend(NamedTuple):
    q: Array
    keys: Array
    values: Array
    indices: Array
    sink_logits: Array | None = None
    scale: float | None = None
    softcap: float | None = None
    return_lse: bool = False
    route: Any = None
    addresses: Any = None


class SparseAttend(_SparseAttend, Call):
    """A call of `hata.sparse_attend`."""

    __slots__ = ()
    OP = "sparse_attend"
    ARRAYS = 5

    def results(self) -> tuple[Result, ...]:
        """Outputs and lse."""
        return _attended(self)


class _HashAttend(NamedTuple):
    q: Array
    keys: Array
    values: Array
    key_codes: Array
    projection: Array | None
    bias: Array | None = None
    query_projection: Array | None = None
    query_bias: Array | None = None
    q_codes: Array | None = None
    lengths: Array | None = None
    starts: Array | None = None
    key_norms: Array | None = None
    sink_logits: Array | None = None
    k: int = 0
    dense_below: int = 0
    ratio: float | None = None
    k_min: int = 0
    sink: int = 0
    recent: int = 0
    scale: float | None = None
    softcap: float | None = None
    fresh: int = 0
    return_lse: bool = False
    route: Any = None
    addresses: Any = None


class HashAttend(_HashAttend, Call):
    """A call of `hata.hash_attend`."""

    __slots__ = ()
    OP = "hash_attend"
    ARRAYS = 13

    def results(self) -> tuple[Result, ...]:
        """Outputs and lse."""
        return _attended(self)

    def written(self) -> tuple[str, ...]:
        """Codes and norms of keys, if some are fresh."""
        return ("key_codes", "key_norms") if self.fresh else ()

    @classmethod
    def complete(cls, arrays: tuple, route: Route, addresses: list[int]) -> HashAttend:
        """A call as a backend gets it: queries are hashed as keys are, unless it says how."""
        if arrays[6] is None or arrays[7] is None:
            # Of the keys, fields 4 and 5; of the queries, 6 and 7.
            filled = list(arrays)
            for field in (6, 7):
                if filled[field] is None:
                    filled[field], addresses[field] = filled[field - 2], addresses[field - 2]
            arrays = tuple(filled)
        return tuple.__new__(HashAttend, (*arrays, *route.options, route, addresses))


def visible(call: Any) -> Iterator[tuple[int, int, int, int]]:
    """Row, token, first visible key and the one after the last, for every query of a call.

    Lengths and starts are read on the host, for backends of the CPU, and may hold anything.
    """
    (batch, _, tokens, _), slots = call[0].shape, call[1].shape[2]
    stops, starts = _rows(call.lengths, batch, slots), _rows(call.starts, batch, 0)
    for b, t in itertools.product(range(batch), range(tokens)):
        start = max(starts[b], 0)
        yield b, t, start, max(min(stops[b], slots) - (tokens - 1 - t), start)


def _rows(x: Any, batch: int, default: int) -> list[int]:
    found = default if x is None else x.tolist()
    return found if isinstance(found, list) else [int(found)] * batch


CALLS: dict[str, type[Any]] = {
    kind.OP: kind for kind in (Encode, HammingTopK, SparseAttend, HashAttend)
}


def examples(problem: Problem) -> Iterator[Any]:
    """Calls without data that pose a problem, in every layout that kernels may differ for.

    Whatever a call may add without changing the problem (a bias, sinks, ragged lengths) is an
    argument of the same kernels, and left out.
    """
    layouts = [(True, True)] if problem.aligned else [(True, False), (False, True), (False, False)]
    # Codes shorter than a vector are scanned otherwise where rows are no whole vectors.
    sizes = (problem.slots, problem.slots - 1) if problem.bits in (32, 64) else (problem.slots,)
    for (data, codes), slots in itertools.product(layouts, sizes):
        yield from _examples(problem, data, codes, max(slots, 1))


def _examples(problem: Problem, data: bool, codes: bool, slots: int) -> Iterator[Any]:
    batch, tokens, heads = max(problem.batch, 1), max(problem.tokens, 1), problem.heads
    kv_heads, dtype, depth = problem.kv_heads, problem.dtype, problem.head_dim
    bits, device = problem.bits, problem.device

    def layout(heads: int, tokens: int, size: int, dtype: str, aligned: bool = True) -> Layout:
        return Layout((batch, heads, tokens, size), dtype, device, aligned)

    def norms(heads: int, tokens: int) -> Layout | None:
        return Layout((batch, heads, tokens), "float16", device) if problem.norms else None

    q_codes = layout(heads, tokens, bits // 8, "uint8", codes)
    key_codes = layout(kv_heads, slots, bits // 8, "uint8", codes)
    q = layout(heads, tokens, depth, dtype, data)
    projection = Layout((kv_heads, depth, bits), problem.projection_dtype, device)
    if problem.op == "encode":
        yield Encode(q, projection, norms=norms(heads, tokens))
        return
    key_norms = norms(kv_heads, slots)
    if problem.op == "hamming_topk":
        yield HammingTopK(
            q_codes, key_codes, key_norms=key_norms, k=problem.k, per_head=problem.per_head
        )
        return
    keys = layout(kv_heads, slots, depth, dtype, data)
    values = layout(kv_heads, slots, problem.value_dim, dtype, data)
    if problem.op == "sparse_attend":
        rows = heads if problem.per_head else kv_heads
        yield SparseAttend(q, keys, values, layout(rows, tokens, problem.k, "int32"))
        return
    for given, fresh in itertools.product((None, q_codes), (0, 1)):
        yield HashAttend(
            q, keys, values, key_codes, projection, q_codes=given, key_norms=key_norms,
            k=problem.k, fresh=fresh,
        )  # fmt: skip
