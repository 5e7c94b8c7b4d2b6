"""What is tuned: the problems of a head layout, and the search space of each.

The problems are those of decoding: one token per row against a cache of S keys. A configuration
never crosses dtypes, head layouts or bits, so the grid has every combination of these that a model
of the layout can meet, and a few points along batch, tokens, slots and budget:

========== ======================= ========================== =================
op         dtypes                  bits                       slots, k
========== ======================= ========================== =================
hash_attend each                   64, 128, 256               4K, 32K, 128K; S/64, at least 256
hamming_topk uint8                 64, 128, 256               32K; k 512
encode     each (heads of keys)    64, 128, 256               4,096 tokens
sparse_attend each                 none                       32K; k 512
========== ======================= ========================== =================

A GPU serves batches and long contexts, and kernels differ by how many programs fill it, so its grid
is that of `GPU_STEPS`, `GPU_LAYOUTS` and `GPU_LONG`. `--quick` keeps a point or two of each op. For
a model, its own layout, dtype and context length count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from hata.backend import Backend, Config
from hata.problem import SOFT_FIELDS, Problem, pow2

BITS = (64, 128, 256)
# Slots at which decoding is tuned where no model says how long its context is.
SLOTS = (32768, 4096, 131072)
QUICK_BITS = 128


class Limits(NamedTuple):
    """When a search ends: configurations, seconds; and seconds of samples of one configuration."""

    trials: int
    seconds: float
    sample_seconds: float


# By device and `--quick`, with seconds for all problems. A GPU has many more knobs.
EFFORT = {
    ("cpu", False): Limits(40, 100.0, 0.06),
    ("cpu", True): Limits(12, 25.0, 0.04),
    ("cuda", False): Limits(64, 270.0, 0.06),
    ("cuda", True): Limits(40, 75.0, 0.04),
}
# Decode steps of the common layout on a GPU: batch, slots, bits; the most useful first.
GPU_STEPS = (
    (1, 32768, 128), (8, 32768, 128), (1, 131072, 128), (8, 131072, 128), (1, 8192, 128),
    (1, 131072, 256), (1, 131072, 64), (32, 32768, 128), (1, 524288, 128),
)  # fmt: skip
# Heads of other models, each at one step: H, Hkv, batch, slots.
GPU_LAYOUTS = (
    (64, 8, 1, 131072), (32, 32, 1, 131072), (28, 4, 1, 131072), (16, 8, 1, 131072),
    (32, 2, 1, 131072), (32, 32, 8, 32768), (64, 8, 8, 32768),
)  # fmt: skip
# Slots of the ops by themselves on a GPU, and tokens of a prefill that is encoded.
GPU_LONG = 131072
# Budgets below this leave a GPU idle.
GPU_LEAST_BUDGET = 512
# Share of the attention mass of exact top-k that selections keep.
QUALITY = 0.95
# Queries are dense below this budget in practice, so no smaller one is tuned.
LEAST_BUDGET = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """Heads of a model; `model_type` is transformers', `dtype` stored, `context` in tokens."""

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    context: int


# Llama 3 8B, Mistral 7B and Qwen3 8B have these heads.
COMMON = Layout("32/8 heads of 128", "synthetic", 32, 32, 8, 128, "bfloat16", 131072)


@dataclass(frozen=True)
class Space:
    """The configurations of one problem, numbered in the order of its knobs' values.

    Numbers settle draws: they depend on the knobs alone, so that all processes pick the same one.
    """

    knobs: tuple[tuple[str, tuple], ...]

    @classmethod
    def of(cls, backend: Backend, problem: Problem) -> Space:
        """The space that a backend declares for a problem."""
        return cls(tuple((k, tuple(v)) for k, v in backend.tunables(problem.op, problem).items()))

    @property
    def size(self) -> int:
        """How many configurations there are; 1 where there are no knobs."""
        return math.prod(len(values) for _, values in self.knobs)

    def config(self, number: int) -> dict[str, int | str | bool]:
        """The configuration with a number; the last knob varies fastest."""
        places = self.places(number)
        return {name: values[places[name]] for name, values in self.knobs}

    def number(self, config: Config) -> int:
        """The number of a configuration; raises `ValueError` for one that is not of the space."""
        places = {}
        for name, values in self.knobs:
            value = config.get(name)
            # True == 1, yet a kernel specialised on one is not specialised on the other.
            same = [type(v) is type(value) and v == value for v in values]
            if True not in same:
                raise ValueError(f"{name}={value!r} is not one of {values}")
            places[name] = same.index(True)
        return self.number_at(places)

    def places(self, number: int) -> dict[str, int]:
        """For each knob the place of its value among those allowed."""
        found: dict[str, int] = {}
        for name, values in reversed(self.knobs):
            number, found[name] = divmod(number, len(values))
        return dict(reversed(found.items()))

    def number_at(self, places: Mapping[str, int]) -> int:
        """The number of the configuration with these places."""
        number = 0
        for name, values in self.knobs:
            number = number * len(values) + places[name]
        return number


def budget_for(slots: int, device: str = "cpu") -> int:
    """The budget at which a cache of `slots` keys is tuned: 1/64 of it, but not tiny ones."""
    least = GPU_LEAST_BUDGET if device == "cuda" else LEAST_BUDGET
    return max(slots // 64, min(least, slots))


def bits_of(most: int) -> tuple[int, ...]:
    """Bits of codes that may be selected from an encoder of `most` bits."""
    return tuple(bits for bits in BITS if bits <= most) or (most,)


class Grid(NamedTuple):
    """Makes the problems of one head layout; with `norms`, scores are weighted with key norms."""

    layout: Layout
    device: str
    norms: bool = False

    def _problem(self, op: str, dtype: str, **sizes: Any) -> Problem:
        heads = {"heads": self.layout.heads, "kv_heads": self.layout.kv_heads}
        return Problem(op, self.device, dtype, **{**heads, **sizes})

    def _coded(self, bits: int) -> dict[str, Any]:
        # Rows of codes below 128 bits are not multiples of 16 bytes.
        return {"bits": bits, "norms": self.norms, "aligned": bits % 128 == 0}

    def step(
        self, dtype: str, bits: int, slots: int, k: int | None = None, batch: int = 1
    ) -> Problem:
        """One decode step of hash attention."""
        size = self.layout.head_dim
        return self._problem(
            "hash_attend", dtype, projection_dtype=dtype, batch=pow2(batch), head_dim=size,
            value_dim=size, k=budget_for(slots, self.device) if k is None else k, slots=pow2(slots),
            **self._coded(bits),
        )  # fmt: skip

    def topk(self, bits: int, slots: int) -> Problem:
        """Selecting by itself."""
        k = budget_for(slots, self.device)
        return self._problem("hamming_topk", "uint8", k=k, slots=pow2(slots), **self._coded(bits))

    def encode(self, dtype: str, bits: int, tokens: int = 4096) -> Problem:
        """Encoding the keys of a prompt."""
        return self._problem(
            "encode", dtype, projection_dtype=dtype, heads=self.layout.kv_heads, norms=self.norms,
            head_dim=self.layout.head_dim, bits=bits, tokens=pow2(tokens),
        )  # fmt: skip

    def attend(self, dtype: str, slots: int) -> Problem:
        """Attention to selected keys by itself."""
        size, k = self.layout.head_dim, budget_for(slots, self.device)
        return self._problem(
            "sparse_attend", dtype, head_dim=size, value_dim=size, k=k, slots=pow2(slots)
        )


def dtypes_of(layout: Layout, device: str, allowed: Iterable[str]) -> list[str]:
    """The dtypes a model of this layout runs in: its own, and on a CPU float32 first."""
    names = ["float32", layout.dtype] if device == "cpu" else [layout.dtype]
    able = [name for name in dict.fromkeys(names) if name in set(allowed)]
    return able or sorted(allowed)[:1]


def problems(
    grid: Grid,
    dtypes: list[str],
    *,
    bits: tuple[int, ...] = BITS,
    of_model: bool = False,
    quick: bool = False,
) -> list[Problem]:
    """The problems to tune, the most useful first, so that a short budget goes to them.

    `dtypes` are those of data, the most important first, and `bits` those of codes that may be
    selected. Where the layout is `of_model`, selections need a step's time for all bits.
    """
    main = QUICK_BITS if QUICK_BITS in bits else bits[-1]
    if grid.device == "cuda":
        return _gpu_problems(grid, dtypes, bits, main, of_model, quick)
    context = grid.layout.context
    if of_model:
        slots = [s for s in (4096, 16384) if s <= max(context, 4096)]
    else:
        slots = [s for s in SLOTS if s <= context]
    first = slots[0]
    if quick:
        return [
            *(grid.step(dtypes[0], b, first) for b in (bits if of_model else (main,))),
            grid.encode(dtypes[0], bits[-1] if of_model else main),
            grid.topk(main, first),
            grid.attend(dtypes[0], first),
        ]
    found = [
        grid.step(dtype, b, s)
        for s in slots
        for dtype in dtypes
        for b in bits
        # How a dtype scales with the context is much like how another does.
        if of_model or s == first or dtype == dtypes[0]
    ]
    found += [grid.topk(b, first) for b in bits]
    for dtype in dtypes:
        found += [*(grid.encode(dtype, b) for b in bits), grid.attend(dtype, first)]

    def unlike(p: Problem) -> int:
        """In how many ways a problem differs from the one in the middle."""
        usual = ((p.bits, (main, 0)), (p.dtype, (dtypes[0], "uint8")), (p.slots, (pow2(first), 0)))
        return sum(value not in values for value, values in usual)

    return sorted(found, key=unlike)


def _gpu_problems(
    grid: Grid, dtypes: list[str], bits: tuple[int, ...], main: int, of_model: bool, quick: bool
) -> list[Problem]:
    dtype, layout = dtypes[0], grid.layout
    most = max(layout.context, 8192) if of_model else max(slots for _, slots, _ in GPU_STEPS)
    steps = [(batch, slots, width) for batch, slots, width in GPU_STEPS if slots <= most]
    if quick:
        steps = steps[:2]
    if of_model:
        # Its selections need the time of a step for every number of bits.
        near = steps[0][:2]
        steps += [(*near, width) for width in bits if width != main]
    found = [
        grid.step(dtype, main if width == QUICK_BITS else width, slots, batch=batch)
        for batch, slots, width in steps
        if width in bits or width == QUICK_BITS
    ]
    long = min(GPU_LONG, pow2(most))
    # The whole step first where time is short, but every op before the rarer steps.
    found[4:4] = [
        grid.topk(main, long),
        grid.encode(dtype, main, min(long, 16384 if quick else long)),
        grid.attend(dtype, long),
    ]
    if not quick:
        found.append(grid.encode(dtype, main))
        for heads, kv_heads, batch, slots in () if of_model else GPU_LAYOUTS:
            other = grid._replace(layout=replace(layout, heads=heads, kv_heads=kv_heads))
            found.append(other.step(dtype, main, slots, batch=batch))
        found += [grid.step(other, main, steps[0][1]) for other in dtypes[1:]]
    return list(dict.fromkeys(found))


def shape_text(problem: Problem) -> str:
    """A problem in a few words, for tables."""
    p = problem
    batch, tokens = p.batch if p.batch > 1 else 0, p.tokens if p.op == "encode" else 0
    sizes = {"D": p.head_dim, "r": p.bits, "B": batch, "T": tokens, "S": p.slots, "k": p.k}
    told = (f"{name} {size}" for name, size in sizes.items() if size)
    return " ".join((p.dtype, f"{p.heads}/{p.kv_heads}", *told))


def apart(problem: Problem, other: Problem) -> float:
    """How far one problem of an op is from another: in sizes, and much farther in what they are."""
    steps = sum(
        abs(math.log2(max(getattr(problem, name), 1) / max(getattr(other, name), 1)))
        for name in SOFT_FIELDS
    )
    soft = dict.fromkeys(SOFT_FIELDS, 1)
    return steps + (0 if replace(problem, **soft) == replace(other, **soft) else 100)


def nearest_config(problem: Problem, tuned: Mapping[Problem, Config], default: Config) -> Config:
    """The configuration that a profile with `tuned` entries would give."""
    same = [key for key in tuned if apart(problem, key) < 100]
    return tuned[min(same, key=partial(apart, problem))] if same else default
