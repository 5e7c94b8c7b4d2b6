"""What was measured, line by line, and what the project set itself for it: the bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks import contenders
from benchmarks.shapes import Shape
from hata.profile import Timing

# What the numba backend has to reach on two cores, float32, 32/8 heads, D 128, r 128.
SPEED_BARS = {32 * 1024: 10.0, 128 * 1024: 15.0}
SCAN_BAR_GBS = 8.0
SLOTS_BAR = 1.3
# What a step is to take on one H200, bfloat16, D 128, r 128, in µs, by batch, heads, KV heads and
# thousands of keys; and by how much a backend may be slower.
STEP_BARS_US = {
    (1, 32, 8, 32): 9.0, (1, 32, 8, 128): 14.0, (1, 32, 8, 512): 32.0, (8, 32, 8, 32): 18.0,
    (8, 32, 8, 128): 60.0, (32, 32, 8, 32): 62.0, (1, 64, 8, 128): 15.0, (1, 32, 32, 128): 30.0,
    (8, 32, 32, 32): 58.0,
}  # fmt: skip
STEP_SLACK = {"triton": 1.4}
# Speed of the scan against a plain read of as many bytes, by group size, where codes are many; and
# what counts as many.
SCAN_BARS = {"triton": {4: 0.75, 8: 0.68}}
SCAN_BARS_OTHER = {4: 0.88, 8: 0.80}
MANY_CODES = 64e6
# From so many keys on, hash attention is to be faster than dense attention.
CROSSOVER = 16 * 1024
SCAN_KERNEL, READ_KERNEL = "kernel scan", "kernel read codes"


class Bar(NamedTuple):
    """Something wanted, and whether what was measured meets it."""

    name: str
    wanted: float
    measured: float
    met: bool


def least(name: str, wanted: float, measured: float) -> Bar:
    """A bar that is met from `wanted` on."""
    return Bar(name, wanted, measured, measured >= wanted)


def most(name: str, wanted: float, measured: float) -> Bar:
    """A bar that is met up to `wanted`."""
    return Bar(name, wanted, measured, measured <= wanted)


class Row(NamedTuple):
    """One measured line: a contender on a shape, or of the family `"kernel"` one of a step's.

    A call moves `bytes` at least (0: not counted); `samples` are how many the time stands on.
    """

    shape: Shape
    name: str
    family: str
    us: Timing
    bytes: int
    samples: int = 1

    @property
    def gbs(self) -> float:
        """GB/s (1e9 bytes)."""
        return self.bytes / self.us.median / 1e3


def best_dense(rows: Sequence[Row], shape: Shape) -> Row:
    """The fastest dense contender of a shape."""
    dense = (row for row in rows if row.shape == shape and row.family == "dense")
    return min(dense, key=lambda row: row.us.median)


def find(rows: Sequence[Row], shape: Shape, name: str) -> Row:
    """The line of a contender."""
    return next(row for row in rows if row.shape == shape and row.name == name)


def shapes_of(rows: Sequence[Row]) -> list[Shape]:
    """The shapes of some lines, in order."""
    return list(dict.fromkeys(row.shape for row in rows))


def times_dense(rows: Sequence[Row], shape: Shape) -> float:
    """How many times faster than the fastest dense contender hash attention is."""
    return best_dense(rows, shape).us.median / find(rows, shape, "hash_attend").us.median


def slot_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Per op, time in a cache with empty slots over time in a full one, where rows have both."""
    shapes = shapes_of(rows)
    return {
        name: find(rows, spare, name).us.median / find(rows, full, name).us.median
        for full in shapes
        for spare in shapes
        if spare.s > full.s and replace(spare, slots=full.slots) == full
        for name in contenders.OPS
    }


def bars(rows: Sequence[Row], device: str, backend: str = "") -> list[Bar]:
    """The bars that these lines can answer."""
    found: list[Bar] = []
    for shape in shapes_of(rows):
        speed = SPEED_BARS.get(shape.keys)
        if device == "cuda" and shape.dtype == "bfloat16":
            found += _gpu_bars(rows, shape, backend)
        elif device == "cpu" and shape == Shape(1, 32, 8, shape.keys) and speed is not None:
            ratio, scan = times_dense(rows, shape), find(rows, shape, "hamming_topk").gbs
            found.append(least(f"{shape.name}: times faster, least", speed, ratio))
            found.append(least(f"{shape.name}: scan GB/s, least", SCAN_BAR_GBS, scan))
    for name, ratio in slot_ratios(rows).items():
        found.append(most(f"empty slots, {name}: ratio, most", SLOTS_BAR, ratio))
    return found


def scan_bar(backend: str, shape: Shape) -> float | None:
    """Share of read speed that the scan of a shape is to reach, if there is such a bar."""
    if shape.code_bytes < MANY_CODES or shape.bits != 128 or shape.dtype != "bfloat16":
        return None
    return SCAN_BARS.get(backend, SCAN_BARS_OTHER).get(shape.heads // shape.kv_heads)


def _gpu_bars(rows: Sequence[Row], shape: Shape, backend: str) -> list[Bar]:
    found: list[Bar] = []
    place = shape.batch, shape.heads, shape.kv_heads, shape.keys // 1024
    if place in STEP_BARS_US and shape.bits == 128:
        limit = STEP_BARS_US[place] * STEP_SLACK.get(backend, 1.0)
        step = find(rows, shape, "hash_attend").us.median
        found.append(most(f"{shape.name}: step in µs, most", limit, step))
    if shape.keys >= CROSSOVER:
        ratio = times_dense(rows, shape)
        found.append(Bar(f"{shape.name}: times faster than dense", 1.0, ratio, ratio > 1.0))
    parts = {row.name: row for row in rows if row.shape == shape and row.family == "kernel"}
    wanted = scan_bar(backend, shape)
    if SCAN_KERNEL in parts and wanted is not None:
        share = parts[READ_KERNEL].us.median / parts[SCAN_KERNEL].us.median
        found.append(least(f"{shape.name}: scan, share of read speed", wanted, share))
    return found
