"""What the suite draws: the sizes, layouts and options of a call, and the values that fill it.

A `Case` is drawn by hypothesis and says everything about one call of any op; its values follow from
it, so that a failing case prints as something a person can read and repeat.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hata.call import CALLS
from hata.measure.arrays import LAYOUTS, Arrays, Kit, numpy_dtype

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 576)
BITS = (32, 64, 96, 128, 160, 256, 512)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
# How vectors and codes repeat: ties are the normal case of a selection.
FLAVOURS = ("random", "few", "equal", "small")


@dataclass(frozen=True)
class Case:
    """One call. Names are those of `hata.ops`; `None` and 0 leave an option out.

    Attributes:
        group: Query heads per KV head.
        flavour: One of `FLAVOURS`.
        float32_projection: The projection is float32 even if the data is not.
        bias, query_projection, query_bias, norms, sinks: With such an array.
        code_group: Query codes per KV head that `hamming_topk` scores, or that are given.
        given_codes: `hash_attend` gets `q_codes`.
        lengths, starts: One per row, or one for all (0-d), or left out.
        lengths_dtype: Of both.
        shuffled: The indices of `sparse_attend` stand in any order, -1 in between.
        layouts: Memory layouts, dealt to the arrays in turn.
    """

    seed: int
    dtype: str
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    tokens: int = 1
    slots: int = 16
    head_dim: int = 16
    value_dim: int = 16
    bits: int = 32
    flavour: str = "random"
    float32_projection: bool = False
    bias: bool = False
    query_projection: bool = False
    query_bias: bool = False
    code_group: int = 1
    given_codes: bool = False
    per_head: bool = False
    lengths: tuple[int, ...] | int | None = None
    starts: tuple[int, ...] | int | None = None
    lengths_dtype: str = "int32"
    k: int = 4
    ratio: float | None = None
    k_min: int = 0
    sink: int = 0
    recent: int = 0
    norms: bool = False
    fresh: int = 0
    dense_below: int = 0
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    shuffled: bool = False
    layouts: tuple[str, ...] = ("dense",)

    @property
    def heads(self) -> int:
        """H."""
        return self.kv_heads * self.group

    def options(self, op: str) -> dict[str, Any]:
        """The numbers of an op."""
        kind = CALLS[op]
        names = kind._fields[kind.ARRAYS :]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


# What does not depend on other sizes, made once: a strategy costs more to make than to draw from.
_FREE = {
    "seed": st.integers(0, 2**16),
    "kv_heads": st.sampled_from((1, 2, 3)),
    "group": st.sampled_from(GROUPS),
    "tokens": st.sampled_from((1, 1, 2, 3)),
    "bits": st.sampled_from(BITS),
    "flavour": st.sampled_from(FLAVOURS),
    "code_group": st.sampled_from(GROUPS),
    "lengths_dtype": st.sampled_from(("int32", "int64")),
    "ratio": st.one_of(st.none(), st.floats(2**-20, 1.0), st.sampled_from((0.1, 1 / 3))),
    "k_min": st.integers(0, 20),
    "scale": st.one_of(st.none(), st.floats(-0.5, 0.5)),
    "softcap": st.one_of(st.none(), st.floats(0.5, 50.0)),
    "layouts": st.lists(st.sampled_from(tuple(LAYOUTS)), min_size=1, max_size=4).map(tuple),
    **{field.name: st.booleans() for field in fields(Case) if field.type == "bool"},
}
_few_or_none = functools.cache(lambda most: st.one_of(st.just(0), st.integers(0, most)))


@functools.cache
def _of_slots(batch: int, slots: int) -> dict[str, st.SearchStrategy[Any]]:
    """What depends on the number of slots."""
    anywhere = st.one_of(st.sampled_from((0, 1, slots)), st.integers(0, slots))
    # Mostly many visible keys and a budget of fewer: else there is nothing to select.
    late = st.one_of(st.integers(slots - slots // 4, slots), anywhere)
    early = st.one_of(st.integers(0, slots // 4), anywhere)
    few = st.integers(1, max(1, slots // 3))
    return {
        "lengths": st.one_of(st.none(), st.tuples(*[late] * batch), late),
        "starts": st.one_of(st.none(), st.tuples(*[early] * batch), early),
        "k": st.one_of(few, few, st.integers(1, slots + 10)),
        "fresh": _few_or_none(slots + 2),
        "dense_below": st.one_of(st.just(0), late),
    }


@functools.cache
def cases(dtype: str, max_slots: int = 200, max_head_dim: int = 576) -> st.SearchStrategy[Case]:
    """Cases within the contract, odd sizes preferred over round ones."""
    slots = st.one_of(st.integers(1, max_slots // 4), st.integers(1, max_slots))
    head_dim = st.sampled_from([d for d in HEAD_DIMS if d <= max_head_dim])
    free = {**_FREE, "head_dim": head_dim, "value_dim": head_dim}
    sizes = st.tuples(st.sampled_from((1, 2, 3)), slots)

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        batch, slots = draw(sizes)
        drawn = {n: draw(s) for n, s in {**_of_slots(batch, slots), **free}.items()}
        sink = draw(_few_or_none(min(drawn["k"], 5)))
        recent = draw(_few_or_none(min(drawn["k"] - sink, 5)))
        return Case(dtype=dtype, batch=batch, slots=slots, sink=sink, recent=recent, **drawn)

    return case()


def place(kit: Kit, case: Case, op: str, values: dict[str, Any]) -> Arrays:
    """Put the arguments of an op into a kit's memory, in the case's layouts."""
    kind = CALLS[op]
    names = [name for name in kind._fields[: kind.ARRAYS] if name in values]
    layouts = zip(names, itertools.cycle(case.layouts), strict=False)
    return {n: None if values[n] is None else kit.place(values[n], layout) for n, layout in layouts}


def make_values(case: Case, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The values of a case's array arguments, all or some; `None` where it has none.

    Each has a seed of its own, so that it is the same whenever and with whatever it is asked.
    """
    dtype = numpy_dtype(case.dtype)
    projection_dtype = np.dtype(np.float32) if case.float32_projection else dtype
    batch, kv_heads, heads = case.batch, case.kv_heads, case.heads

    def normal(*shape: int, kind: np.dtype = dtype, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(kind)

    def repeated(draw: Callable[..., np.ndarray], *shape: int) -> np.ndarray:
        if case.flavour == "equal":
            return np.broadcast_to(draw(shape[-1]), shape).copy()
        if case.flavour == "few":
            return draw(4, shape[-1])[rng.integers(0, 4, shape[:-1])]
        return draw(*shape)

    vectors = partial(repeated, partial(normal, size=1e-3 if case.flavour == "small" else 1.0))
    codes = partial(repeated, lambda *shape: rng.integers(0, 256, shape, np.uint8))

    def norms() -> np.ndarray:
        made = np.abs(normal(batch, kv_heads, case.slots, kind=np.dtype(np.float16), size=8.0))
        # Norms that tie, that are zero, and that no norm should be.
        for value, share in (
            (3.0, 0.2),
            (0.0, 0.05),
            (-0.0, 0.02),
            (65504.0, 0.02),
            (np.nan, 0.02),
        ):
            made[rng.random(made.shape) < share] = value
        return made

    def positions(given: tuple[int, ...] | int | None) -> np.ndarray | None:
        return None if given is None else np.array(given, case.lengths_dtype)

    weights = partial(normal, kv_heads, case.head_dim, case.bits, kind=projection_dtype)
    code_heads, width = kv_heads * case.code_group, case.bits // 8
    key_codes = partial(codes, batch, kv_heads, case.slots, width)
    draws: dict[str, Callable[[], Any]] = {
        "x": partial(vectors, batch, code_heads, min(case.slots, 50), case.head_dim),
        "q": partial(vectors, batch, heads, case.tokens, case.head_dim),
        "keys": partial(vectors, batch, kv_heads, case.slots, case.head_dim),
        "values": partial(normal, batch, kv_heads, case.slots, case.value_dim),
        "projection": weights,
        "bias": partial(normal, kv_heads, case.bits, kind=projection_dtype),
        "query_projection": weights,
        "query_bias": partial(normal, kv_heads, case.bits),
        "q_codes": partial(codes, batch, code_heads, case.tokens, width),
        "key_codes": key_codes,
        # The two ops have two names for them.
        "k_codes": key_codes,
        "key_norms": norms,
        "indices": lambda: _indices(rng, case),
        "sink_logits": partial(normal, heads, kind=projection_dtype),
        "lengths": partial(positions, case.lengths),
        "starts": partial(positions, case.starts),
    }
    optional = {"key_norms": "norms", "sink_logits": "sinks"}
    optional |= {name: name for name in ("bias", "query_projection", "query_bias")}
    values = {}
    for number, (name, draw) in enumerate(draws.items()):
        if names is None or name in names:
            rng = np.random.default_rng([case.seed, number])
            wanted = name not in optional or getattr(case, optional[name])
            values[name] = draw() if wanted else None
    return values


def _indices(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Some distinct positions for every query, padded with -1."""
    shape = case.batch, case.heads if case.per_head else case.kv_heads, case.tokens
    indices = np.full((*shape, case.k), -1, np.int32)
    for query in np.ndindex(shape):
        count = rng.integers(0, min(case.k, case.slots) + 1)
        indices[query][:count] = np.sort(rng.permutation(case.slots)[:count])
        if case.shuffled:
            rng.shuffle(indices[query])
    return indices
