"""What is tuned: the problems of a head layout, and the search space of each.

The problems are those of decoding: one token per row against a cache of S keys. A configuration
never crosses dtypes, head layouts or bits, and takes the nearest neighbour in batch, tokens, slots
and budget (`hata.problem`), so the grid has every hard combination that a model of the layout can
meet and a few points along the soft ones:

========== ======================= ========================== =================
op         dtypes                  bits                       slots, k
========== ======================= ========================== =================
hash_attend each                   64, 128, 256               4K, 32K, 128K; S/64, at least 256
hamming_topk uint8                 64, 128, 256               32K; k 512
encode     each (heads of keys)    64, 128, 256               4,096 tokens
sparse_attend each                 none                       32K; k 512
========== ======================= ========================== =================

A GPU serves batches and long contexts, and its kernels differ by how many programs there are to
fill it with, so its grid is that of `GPU_STEPS`, `GPU_LAYOUTS` and `GPU_LONG`: batches 1 to 32, 8K
to 512K keys, and the head layouts of other models.

`--quick` keeps a point or two of each op. For a model, its own layout, dtype and context length
count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hata.backend import Backend, Config
from hata.problem import Problem, pow2

BITS = (64, 128, 256)
# Slots at which decoding is tuned where no model says how long its context is.
SLOTS = (32768, 4096, 131072)
QUICK_BITS = 128


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: seconds for all kernels, configurations for one problem."""

    seconds: float
    trials: int


# By device, and whether a short look is asked for. A GPU has many more knobs.
EFFORT = {
    ("cpu", False): Effort(100.0, 40),
    ("cpu", True): Effort(25.0, 12),
    ("cuda", False): Effort(270.0, 64),
    ("cuda", True): Effort(75.0, 40),
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
    """Heads of a model: what its attention layers look like.

    Attributes:
        name: What people call it.
        model_type: As in a transformers configuration.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Size of a query or key.
        dtype: dtype the model is stored in.
        context: Longest context, in tokens.
    """

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    context: int

    @property
    def heads_text(self) -> str:
        """Heads as people write them, such as `32/8`."""
        return f"{self.heads}/{self.kv_heads}"


# Llama 3 8B, Mistral 7B and Qwen3 8B have these heads.
COMMON = Layout("32/8 heads of 128", "synthetic", 32, 32, 8, 128, "bfloat16", 131072)


@dataclass(frozen=True)
class Space:
    """The configurations of one problem, numbered in the order of its knobs' values.

    The numbers are the ids that settle draws: they depend on the knobs alone, so every process
    that draws picks the same one.
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
        """The number of a configuration.

        Raises:
            ValueError: a knob is missing or has a value that is not allowed.
        """
        places = {}
        for name, values in self.knobs:
            if name not in config:
                raise ValueError(f"{name} is missing from {dict(config)}")
            # True == 1, yet a kernel specialised on one is not specialised on the other.
            same = [type(v) is type(config[name]) and v == config[name] for v in values]
            if True not in same:
                raise ValueError(f"{name}={config[name]!r} is not one of {values}")
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

    def numbers(self) -> range:
        """All numbers."""
        return range(self.size)


def budget_for(slots: int, device: str = "cpu") -> int:
    """The budget at which a cache of `slots` keys is tuned: 1/64 of it, but not tiny ones."""
    least = GPU_LEAST_BUDGET if device == "cuda" else LEAST_BUDGET
    return max(slots // 64, min(least, slots))


def hash_problem(
    layout: Layout,
    device: str,
    dtype: str,
    bits: int,
    slots: int,
    k: int,
    norms: bool = False,
    batch: int = 1,
) -> Problem:
    """One decode step of hash attention."""
    return Problem(
        op="hash_attend",
        device=device,
        dtype=dtype,
        projection_dtype=dtype,
        batch=pow2(batch),
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        value_dim=layout.head_dim,
        bits=bits,
        k=k,
        slots=pow2(slots),
        norms=norms,
        aligned=_aligned(bits),
    )


def _aligned(bits: int) -> bool:
    # Rows of codes below 128 bits are not multiples of 16 bytes.
    return bits % 128 == 0


def _topk_problem(layout: Layout, device: str, bits: int, slots: int, norms: bool) -> Problem:
    return Problem(
        op="hamming_topk",
        device=device,
        dtype="uint8",
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        bits=bits,
        k=budget_for(slots, device),
        slots=pow2(slots),
        norms=norms,
        aligned=_aligned(bits),
    )


def _encode_problem(
    layout: Layout, device: str, dtype: str, bits: int, tokens: int, norms: bool
) -> Problem:
    return Problem(
        op="encode",
        device=device,
        dtype=dtype,
        projection_dtype=dtype,
        heads=layout.kv_heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        bits=bits,
        tokens=pow2(tokens),
        norms=norms,
    )


def _attend_problem(layout: Layout, device: str, dtype: str, slots: int) -> Problem:
    return Problem(
        op="sparse_attend",
        device=device,
        dtype=dtype,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        value_dim=layout.head_dim,
        k=budget_for(slots, device),
        slots=pow2(slots),
    )


def dtypes_of(layout: Layout, device: str, allowed: Iterable[str]) -> list[str]:
    """The dtypes a model of this layout runs in: its own, and on a CPU float32 first."""
    names = ["float32", layout.dtype] if device == "cpu" else [layout.dtype]
    return [name for name in dict.fromkeys(names) if name in set(allowed)]


def problems(
    layout: Layout,
    device: str,
    dtypes: list[str],
    *,
    bits: tuple[int, ...] = BITS,
    norms: bool = False,
    of_model: bool = False,
    quick: bool = False,
) -> list[Problem]:
    """The problems to tune, the most useful first, so that a short budget goes to them.

    Args:
        layout: Heads of the model.
        device: `"cpu"` or `"cuda"`.
        dtypes: Of data, the most important first.
        bits: Bits of codes that may be selected.
        norms: Whether scores are weighted with key norms.
        of_model: Whether the layout is that of a given model, whose selections need the time of a
            step for every number of bits.
        quick: One point of each op only.
    """
    main = QUICK_BITS if QUICK_BITS in bits else bits[-1]
    if device == "cuda":
        return _gpu_problems(layout, dtypes, bits, main, norms, of_model, quick)
    if of_model:
        slots = [s for s in (4096, 16384) if s <= max(layout.context, 4096)]
    else:
        slots = [s for s in SLOTS if s <= layout.context]
    first = slots[0]
    if quick:
        found = [
            hash_problem(layout, device, dtypes[0], b, first, budget_for(first), norms)
            for b in (bits if of_model else (main,))
        ]
        found += [
            _encode_problem(layout, device, dtypes[0], bits[-1] if of_model else main, 4096, norms),
            _topk_problem(layout, device, main, first, norms),
            _attend_problem(layout, device, dtypes[0], first),
        ]
        return found
    found = [
        hash_problem(layout, device, dtype, b, s, budget_for(s), norms)
        for s in slots
        for dtype in dtypes
        for b in bits
        # How a dtype scales with the context is much like how another does.
        if of_model or s == first or dtype == dtypes[0]
    ]
    found += [_topk_problem(layout, device, b, first, norms) for b in bits]
    for dtype in dtypes:
        found += [_encode_problem(layout, device, dtype, b, 4096, norms) for b in bits]
        found.append(_attend_problem(layout, device, dtype, first))

    def unlike(problem: Problem) -> int:
        """In how many ways a problem differs from the one in the middle."""
        return (
            (problem.bits not in (main, 0))
            + (problem.dtype not in (dtypes[0], "uint8"))
            + (problem.slots not in (pow2(first), 0))
        )

    return sorted(found, key=unlike)


def _gpu_problems(
    layout: Layout,
    dtypes: list[str],
    bits: tuple[int, ...],
    main: int,
    norms: bool,
    of_model: bool,
    quick: bool,
) -> list[Problem]:
    def step(heads: Layout, dtype: str, width: int, slots: int, batch: int) -> Problem:
        k = budget_for(slots, "cuda")
        return hash_problem(heads, "cuda", dtype, width, slots, k, norms, batch)

    dtype = dtypes[0]
    most = max(layout.context, 8192) if of_model else max(slots for _, slots, _ in GPU_STEPS)
    steps = [(batch, slots, width) for batch, slots, width in GPU_STEPS if slots <= most]
    if quick:
        steps = steps[:2]
    if of_model:
        # Its selections need the time of a step for every number of bits.
        near = steps[0][:2]
        steps += [(*near, width) for width in bits if width != main]
    found = [
        step(layout, dtype, main if width == QUICK_BITS else width, slots, batch)
        for batch, slots, width in steps
        if width in bits or width == QUICK_BITS
    ]
    long = min(GPU_LONG, pow2(most))
    alone = [
        _topk_problem(layout, "cuda", main, long, norms),
        _encode_problem(layout, "cuda", dtype, main, min(long, 16384 if quick else long), norms),
        _attend_problem(layout, "cuda", dtype, long),
    ]
    # The whole step first where time is short, but every op before the rarer steps.
    found[4:4] = alone
    if not quick:
        found += [_encode_problem(layout, "cuda", dtype, main, 4096, norms)]
        if not of_model:
            found += [
                step(replace(layout, heads=heads, kv_heads=kv_heads), dtype, main, slots, batch)
                for heads, kv_heads, batch, slots in GPU_LAYOUTS
            ]
        found += [step(layout, other, main, steps[0][1], 1) for other in dtypes[1:]]
    return list(dict.fromkeys(found))


def shape_text(problem: Problem) -> str:
    """A problem in a few words, for tables."""
    heads = f"{problem.heads}/{problem.kv_heads}"
    parts = [problem.dtype, heads]
    if problem.head_dim:
        parts.append(f"D {problem.head_dim}")
    if problem.bits:
        parts.append(f"r {problem.bits}")
    if problem.batch > 1:
        parts.append(f"B {problem.batch}")
    if problem.op == "encode":
        parts.append(f"T {problem.tokens}")
    if problem.slots:
        parts.append(f"S {problem.slots}")
    if problem.k:
        parts.append(f"k {problem.k}")
    return " ".join(parts)


_SOFT = ("batch", "tokens", "slots", "k")


def apart(problem: Problem, other: Problem) -> float:
    """How far one problem of an op is from another: in sizes, and much farther in what they are."""
    steps = sum(
        abs(math.log2(max(getattr(problem, name), 1) / max(getattr(other, name), 1)))
        for name in _SOFT
    )
    soft = dict.fromkeys(_SOFT, 1)
    return steps + (0 if replace(problem, **soft) == replace(other, **soft) else 100)


def nearest_config(
    problem: Problem, tuned: Mapping[Problem, Config], default: Config
) -> tuple[Config, bool]:
    """The configuration a profile with `tuned` entries would give, and whether it is tuned."""
    same = [key for key in tuned if apart(problem, key) < 100]
    if not same:
        return default, False
    return tuned[min(same, key=lambda key: apart(problem, key))], True
