"""encode: launcher of `encode.cu`, for the op and for the first launch of a decode step.

    code_j = 1  iff  (x . projection + bias)_j > 0,     bit j at byte j // 8, weight 2^(j % 8)

A vector's code does not depend on which launch made it: every variant of the kernel takes the same
sum over the head size, in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.call import Encode
from hata.launches import NONE, Address, LaunchList, View

from .compiler import layout
from .device import Kernel, launch
from .row import DATA, kind, steps

# `struct Params` of encode.cu.
LAYOUT = layout("encode.cu")
# Bytes of shared memory for the columns that a block keeps.
_ROOM = 48 * 1024
# Stages of the ring through which vectors come, at most.
MOST_STAGES = 3


class Job(NamedTuple):
    """Vectors with one projection.

    Attributes:
        x, projection, bias, norms: Names of arrays of the call; x is `[B, H', T, D]`.
        codes, code_steps: Where codes go: an address, and three strides in bytes.
        words: Whether codes are written as aligned words.
        fresh: 0 for all vectors of x, else how many of each row's last ones.
    """

    x: str
    projection: str
    bias: str
    codes: Address
    code_steps: tuple[int, ...]
    words: bool
    norms: str = ""
    fresh: int = 0


def launch_jobs(
    launches: LaunchList,
    call: Any,
    jobs: list[Job],
    spans: dict[str, Any],
    step: bool = False,
    pdl: bool = False,
) -> None:
    """Write the launches of some jobs: one, unless their variants differ; `step`: few vectors."""
    dtype, config = call.problem.dtype, call.config
    most_tiles, loops = (1, 1) if step else (config["tiles"], config["loops"])
    together_by: dict[tuple[bool, ...], list[Job]] = {}
    for job in jobs:
        x, projection = _given(launches, job.x), _given(launches, job.projection)
        wide = projection.dtype != dtype
        aligned = not wide and x.in_units_of(16) and projection.in_units_of(16)
        together_by.setdefault((wide, aligned, job.words), []).append(job)
    for (wide, aligned, words), together in together_by.items():
        kv_heads, depth, bits = _given(launches, together[0].projection).shape
        ieee = wide or dtype == "float32"
        padded = -(-depth // 32) * 32
        columns = 32 if ieee else config["columns"]
        while bits % columns or (not ieee and padded * columns * 2 > _ROOM):
            columns //= 2
        warps, tiles = config["encode_warps"], 1 if ieee else most_tiles
        stages, weights = 1, 0
        if not ieee:
            weights = padded * columns * 2 + columns * 4
            room = launches.gpu.shared - weights
            warps, tiles, stages = _stages(room, warps, tiles, padded * 16)
            stages = min(stages, loops)
        constants = {
            "HEAD_DIM": depth, "BITS": bits, "BLOCK_BITS": columns, "WARPS": warps, "TILES": tiles,
            "STAGES": stages, "DTYPE": DATA[dtype], "FP32_WEIGHTS": wide, "ALIGNED": aligned,
            "ALIGNED_CODES": words, "PDL": pdl,
        }  # fmt: skip
        fields: dict[str, Any] = {"kv_heads": kv_heads, **spans}
        grid = 0
        for i, job in enumerate(together):
            rows = 8 * warps * tiles
            own = _fields(launches, job, dtype, rows, loops)
            own["blocks"] *= kv_heads * (bits // columns)
            grid += own["blocks"]
            fields |= {f"{name}{i}": value for name, value in own.items()}
        kernel = Kernel("encode", tuple(constants.items()), 32 * warps)
        ring = 0 if ieee else warps * stages * tiles * padded * 16
        launch(launches, kernel, grid, weights + ring, fields, LAYOUT)


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


def _given(launches: LaunchList, name: str) -> View:
    found = launches.views[name]
    assert found is not None
    return found


def _fields(launches: LaunchList, job: Job, dtype: str, rows: int, loops: int) -> dict[str, Any]:
    x, projection = _given(launches, job.x), _given(launches, job.projection)
    bias, norms = launches.views[job.bias], launches.views[job.norms] if job.norms else None
    batch, heads, tokens, _ = x.shape
    group = heads // projection.shape[0]
    tokens = job.fresh or tokens
    vectors = batch * group * tokens
    return {
        "x": launches.address(job.x),
        "projection": launches.address(job.projection),
        "bias": launches.address(job.bias),
        "codes": job.codes,
        "norms": launches.address(job.norms) if job.norms else NONE,
        **steps("x", x),
        **steps("projection", projection, 2),
        **steps("bias", bias, 1),
        **dict(zip(("codes_0", "codes_1", "codes_2"), job.code_steps, strict=True)),
        **steps("norms", norms),
        "vectors": vectors,
        "per_batch": group * tokens,
        "group": group,
        "tokens": tokens,
        "fresh": int(job.fresh > 0),
        "bias_kind": kind(bias, dtype),
        "blocks": -(-vectors // (rows * loops)),
        "loops": loops,
    }


def dense_codes(heads: int, tokens: int, bits: int) -> tuple[int, ...]:
    """Strides of newly allocated codes, in bytes."""
    return heads * tokens * bits // 8, tokens * bits // 8, bits // 8


def write(launches: LaunchList, call: Encode) -> None:
    """Write the launch of `hata.encode`."""
    out = launches.views["out"]
    if out is None:
        _, heads, tokens, _ = call.x.shape
        code_steps, words = dense_codes(heads, tokens, call.problem.bits), True
        codes = launches.output("codes")
    else:
        code_steps, words = out.strides[:3], out.in_units_of(4)
        codes = launches.address("out")
    job = Job("x", "projection", "bias", codes, code_steps, words, "norms")
    launch_jobs(launches, call, [job], {"length_step": -1, "start_step": -1})
