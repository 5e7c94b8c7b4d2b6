"""encode: launcher of `encode.cu`, for the op and for the first launch of a decode step.

    code_j = 1  iff  (x . projection + bias)_j > 0,     bit j at byte j // 8, weight 2^(j % 8)

A vector's code does not depend on which launch made it: every variant of the kernel takes the same
sum over the head size, in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem

from .device import Kernel
from .plan import Address, Plan, View, kind, planned
from .row import DATA, ITEMSIZE, steps

_ARRAYS = ("x", "projection", "bias", "codes", "norms")
_STRIDES = (
    "x_0", "x_1", "x_2", "projection_0", "projection_1", "bias_0", "codes_0", "codes_1", "codes_2",
    "norms_0", "norms_1", "norms_2",
)  # fmt: skip
_SIZES = (
    "vectors", "per_batch", "group", "tokens", "fresh", "bias_kind", "blocks", "loops",
)  # fmt: skip
# `struct Params` of encode.cu.
LAYOUT = {
    **{f"{name}{i}": "P" for i in (0, 1) for name in _ARRAYS},
    "lengths": "P",
    "starts": "P",
    **{
        f"{name}{i}": code
        for i in (0, 1)
        for names, code in ((_STRIDES, "q"), (_SIZES, "i"))
        for name in names
    },
    **dict.fromkeys(("kv_heads", "length_step", "start_step", "slots"), "i"),
}
# Bytes of shared memory for the columns that a block keeps.
_ROOM = 48 * 1024
# Stages of the ring through which vectors come, at most.
MOST_STAGES = 3


class Job(NamedTuple):
    """Vectors with one projection.

    Attributes:
        x, projection, bias: Arrays; x is `[B, H', T, D]`.
        codes, code_steps: Where codes go: an address, and three strides in bytes.
        words: Whether codes are written as aligned words.
        norms: Array that norms go to, or `None`.
        fresh: 0 for all vectors of x, else how many of each row's last ones.
    """

    x: View
    projection: View
    bias: View | None
    codes: Address
    code_steps: tuple[int, ...]
    words: bool
    norms: View | None
    fresh: int = 0


def launch_jobs(
    plan: Plan,
    dtype: str,
    jobs: list[Job],
    config: Config,
    spans: dict[str, Any],
    slots: int = 0,
    overlap: bool = False,
) -> None:
    """Write the launches of some jobs into a plan: one, unless their variants differ."""
    launches: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        wide = job.projection.dtype != dtype
        size = ITEMSIZE[dtype]
        aligned = not wide and job.x.in_units_of(16, size) and job.projection.in_units_of(16, size)
        launches.setdefault((int(wide), int(aligned), int(job.words)), []).append(job)
    for (wide, aligned, words), together in launches.items():
        kv_heads, depth, bits = together[0].projection.shape
        ieee = wide or dtype == "float32"
        padded = -(-depth // 32) * 32
        columns = 32 if ieee else config["columns"]
        while bits % columns or (not ieee and padded * columns * 2 > _ROOM):
            columns //= 2
        warps, tiles = config["encode_warps"], 1 if ieee else config["tiles"]
        stages, weights = 1, 0
        if not ieee:
            weights = padded * columns * 2 + columns * 4
            room = plan.device.shared - weights
            warps, tiles, stages = _stages(room, warps, tiles, padded * 16)
            stages = min(stages, config["loops"])
        macros = {
            "D": depth, "R": bits, "N": columns, "WARPS": warps, "TILES": tiles, "STAGES": stages,
            "DATA": DATA[dtype], "WIDE_WEIGHTS": wide, "ALIGNED": aligned, "WORDS": words,
            "OVERLAP": int(overlap),
        }  # fmt: skip
        fields: dict[str, Any] = {"kv_heads": kv_heads, "slots": slots, **spans}
        grid = 0
        for i, job in enumerate(together):
            rows = 8 * warps * tiles
            own = _fields(plan, job, dtype, rows, config["loops"])
            own["blocks"] *= kv_heads * (bits // columns)
            grid += own["blocks"]
            fields |= {f"{name}{i}": value for name, value in own.items()}
        kernel = Kernel("encode", tuple(macros.items()), 32 * warps)
        ring = 0 if ieee else warps * stages * tiles * padded * 16
        plan.launch(kernel, grid, weights + ring, fields, LAYOUT)


def _stages(room: int, warps: int, tiles: int, tile: int) -> tuple[int, int, int]:
    """Warps, tiles and stages of rings that find room; `tile` is bytes of 8 vectors."""
    while True:
        stages = min(room // (warps * tiles * tile), MOST_STAGES)
        if stages >= 2 or warps == tiles == 1:
            return warps, tiles, max(stages, 1)
        if tiles > 1:
            tiles //= 2
        else:
            warps //= 2


def _fields(plan: Plan, job: Job, dtype: str, rows: int, loops: int) -> dict[str, Any]:
    batch, heads, tokens, _ = job.x.shape
    group = heads // job.projection.shape[0]
    tokens = job.fresh or tokens
    vectors = batch * group * tokens
    return {
        "x": plan.address(job.x),
        "projection": plan.address(job.projection),
        "bias": plan.address(job.bias),
        "codes": job.codes,
        "norms": plan.address(job.norms),
        **steps("x", job.x),
        **steps("projection", job.projection, 2),
        **steps("bias", job.bias, 1),
        **dict(zip(("codes_0", "codes_1", "codes_2"), job.code_steps, strict=True)),
        **({} if job.norms is None else norm_steps(job.norms)),
        "vectors": vectors,
        "per_batch": group * tokens,
        "group": group,
        "tokens": tokens,
        "fresh": int(job.fresh > 0),
        "bias_kind": kind(job.bias, dtype),
        "blocks": -(-vectors // (rows * loops)),
        "loops": loops,
    }


def norm_steps(norms: View) -> dict[str, int]:
    """All strides of norms, which have no dense rows of their own."""
    return steps("norms", norms)


def write_encode(
    plan: Plan,
    problem: Problem,
    config: Config,
    x: View,
    projection: View,
    bias: View | None,
    out: View | None,
    norms: View | None,
) -> None:
    """Write the launch of `hata.encode` into a plan."""
    batch, heads, tokens, _ = x.shape
    width = projection.shape[2] // 8
    if out is None:
        made = plan.output((batch, heads, tokens, width), "uint8")
        code_steps, words = (heads * tokens * width, tokens * width, width), True
        codes = plan.address(made)
    else:
        code_steps, words = out.strides[:3], out.in_units_of(4, 1)
        codes = plan.address(out)
    job = Job(x, projection, bias, codes, code_steps, words, norms)
    launch_jobs(plan, problem.dtype, [job], config, {"length_step": -1, "start_step": -1})


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    x: Any,
    projection: Any,
    bias: Any,
    out: Any,
    norms: Any,
) -> Any:
    """Launch `hata.encode`."""
    batch, _, tokens, _ = shape = fw.shape(x)
    if batch * tokens == 0:
        return fw.empty((*shape[:3], problem.bits // 8), "uint8", x) if out is None else out
    made = planned(write_encode, problem, config, fw, (x, projection, bias, out, norms))
    return made[0] if out is None else out
