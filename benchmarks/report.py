"""Tables and files of figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
from rich.table import Table

from benchmarks import contenders
from benchmarks.shapes import Shape, short
from benchmarks.timing import Timing
from hata import device as devices
from hata import registry

SCHEMA = "hata.benchmark/1"
# What the reference backend has to reach on two cores, float32, 32/8 heads, D 128, r 128.
SPEED_BARS = {32 * 1024: 10.0, 128 * 1024: 15.0}
SCAN_BAR_GBS = 8.0
SLOTS_BAR = 1.3
# What a step is to take on one H200, bfloat16, D 128, r 128, in µs, by batch, heads, KV heads and
# thousands of keys; and by how much a backend may be slower.
STEP_BARS_US = {
    (1, 32, 8, 32): 9.0,
    (1, 32, 8, 128): 14.0,
    (1, 32, 8, 512): 32.0,
    (8, 32, 8, 32): 18.0,
    (8, 32, 8, 128): 60.0,
    (32, 32, 8, 32): 62.0,
    (1, 64, 8, 128): 15.0,
    (1, 32, 32, 128): 30.0,
    (8, 32, 32, 32): 58.0,
}
STEP_SLACK = {"triton": 1.4}
# Speed of the scan against a plain read of as many bytes, by group size, where codes are many; and
# what counts as many.
SCAN_BARS = {"triton": {4: 0.75, 8: 0.68}}
SCAN_BARS_OTHER = {4: 0.88, 8: 0.80}
MANY_CODES = 64e6
# From so many keys on, hash attention is to be faster than dense attention.
CROSSOVER = 16 * 1024
# Under tables whose ratios another process may have changed.
BUSY = (
    "* the machine was busy, from which dense attention suffers most: these ratios may be too high"
)
SCAN_KERNEL, READ_KERNEL = "kernel scan", "kernel read codes"

Bar = tuple[str, float, float, bool]


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        shape: What was run.
        name: Which contender.
        family: `"op"`, `"dense"`, `"read"`, or `"kernel"` for one of a step's kernels.
        us: Time of a call in µs.
        bytes: What a call moves at least; 0: not counted.
    """

    shape: Shape
    name: str
    family: str
    us: Timing
    bytes: int

    @property
    def gbs(self) -> float:
        """GB/s (1e9 bytes)."""
        return self.bytes / self.us.median / 1e3


def best_dense(rows: Sequence[Row], shape: Shape) -> Row:
    """The fastest dense contender of a shape."""
    return min(
        (row for row in rows if row.shape == shape and row.family == "dense"),
        key=lambda row: row.us.median,
    )


def find(rows: Sequence[Row], shape: Shape, name: str) -> Row:
    """The line of a contender."""
    return next(row for row in rows if row.shape == shape and row.name == name)


def shapes_of(rows: Sequence[Row]) -> list[Shape]:
    """The shapes of some lines, in order."""
    return list(dict.fromkeys(row.shape for row in rows))


def shape_table(rows: Sequence[Row], shape: Shape, busy: bool = False) -> Table:
    """All contenders of a shape; ratios are marked where the machine was busy."""
    dense = best_dense(rows, shape).us.median
    table = Table(title=shape.name, title_justify="left", title_style="bold")
    _caption(table, busy)
    table.add_column("")
    for column in ("µs", "p10", "p90", "MB", "GB/s", "best dense / this"):
        table.add_column(column, justify="right")
    previous = ""
    for row in rows:
        if row.shape != shape:
            continue
        if previous not in ("", row.family):
            table.add_section()
        previous = row.family
        us = row.us
        table.add_row(
            row.name,
            *(f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
              for value in (us.median, us.p10, us.p90)),
            f"{row.bytes / 1e6:,.2f}" if row.bytes else "",
            f"{row.gbs:,.1f}" if row.bytes else "",
            f"{dense / us.median:,.2f}{_mark(busy)}" if row.family in ("op", "dense") else "",
        )  # fmt: skip
    return table


def _mark(busy: bool) -> str:
    return "*" if busy else ""


def _caption(table: Table, busy: bool) -> None:
    if busy:
        table.caption, table.caption_justify = BUSY, "left"


def summary(rows: Sequence[Row], busy: bool = False) -> Table:
    """One line per shape: what hash attention gains."""
    table = Table(title="hash_attend against the fastest dense attention", title_justify="left")
    _caption(table, busy)
    table.add_column("shape")
    for column in ("dense µs", "hash µs", "faster", "scan GB/s", "over a plain read"):
        table.add_column(column, justify="right")
    for shape in shapes_of(rows):
        dense, ours = best_dense(rows, shape), find(rows, shape, "hash_attend")
        table.add_row(
            shape.name,
            f"{dense.us.median:,.0f}",
            f"{ours.us.median:,.0f}",
            f"{dense.us.median / ours.us.median:.1f}x{_mark(busy)}",
            f"{find(rows, shape, 'hamming_topk').gbs:.1f}",
            f"{ours.us.median / find(rows, shape, 'read step').us.median:.1f}",
        )
    return table


def markdown(rows: Sequence[Row], busy: bool = False) -> str:
    """The table of `summary` as it stands in the README."""
    lines = [
        "| keys | dtype, bits, budget | dense | hash attention | faster | scan |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    mark = "\\*" if busy else ""
    for shape in shapes_of(rows):
        dense, ours = best_dense(rows, shape).us.median, find(rows, shape, "hash_attend").us.median
        scan = find(rows, shape, "hamming_topk").gbs
        lines.append(
            f"| {short(shape.keys)} | {shape.dtype}, {shape.bits}, {shape.k} | "
            f"{dense / 1e3:.2f} ms | {ours / 1e3:.2f} ms | **{dense / ours:.1f}x**{mark} | "
            f"{scan:.1f} GB/s |"
        )
    if busy:
        lines += ["", f"\\{BUSY}."]
    return "\n".join(lines)


def slot_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Time in a cache with empty slots over time in a full one, per op.

    Empty where the shapes are not such a pair.
    """
    shapes = shapes_of(rows)
    pairs = [
        (full, spare)
        for full in shapes
        for spare in shapes
        if spare.s > full.s and replace(spare, slots=full.slots) == full
    ]
    return {
        name: find(rows, spare, name).us.median / find(rows, full, name).us.median
        for full, spare in pairs
        for name in contenders.OPS
    }


def bars(rows: Sequence[Row], device: str, backend: str = "") -> list[Bar]:
    """What the project set itself that these lines can answer: (bar, wanted, measured, met)."""
    found = _gpu_bars(rows, backend) if device == "cuda" else []
    if device == "cpu":
        for shape in shapes_of(rows):
            standard = Shape(1, 32, 8, shape.keys)
            if shape != standard or shape.keys not in SPEED_BARS:
                continue
            wanted = SPEED_BARS[shape.keys]
            ratio = best_dense(rows, shape).us.median / (find(rows, shape, "hash_attend").us.median)
            found.append((f"{shape.name}: times faster, least", wanted, ratio, ratio >= wanted))
            scan = find(rows, shape, "hamming_topk").gbs
            found.append(
                (f"{shape.name}: scan GB/s, least", SCAN_BAR_GBS, scan, scan >= SCAN_BAR_GBS)
            )
    for name, ratio in slot_ratios(rows).items():
        found.append((f"empty slots, {name}: ratio, most", SLOTS_BAR, ratio, ratio <= SLOTS_BAR))
    return found


def scan_bar(backend: str, shape: Shape) -> float | None:
    """Share of read speed that the scan of a shape is to reach, if there is such a bar."""
    if shape.code_bytes < MANY_CODES or shape.bits != 128 or shape.dtype != "bfloat16":
        return None
    return SCAN_BARS.get(backend, SCAN_BARS_OTHER).get(shape.heads // shape.kv_heads)


def _gpu_bars(rows: Sequence[Row], backend: str) -> list[Bar]:
    found: list[Bar] = []
    for shape in shapes_of(rows):
        if shape.dtype != "bfloat16":
            continue
        step = find(rows, shape, "hash_attend").us.median
        place = shape.batch, shape.heads, shape.kv_heads, shape.keys // 1024
        if place in STEP_BARS_US and shape.bits == 128:
            most = STEP_BARS_US[place] * STEP_SLACK.get(backend, 1.0)
            found.append((f"{shape.name}: step in µs, most", most, step, step <= most))
        if shape.keys >= CROSSOVER:
            ratio = best_dense(rows, shape).us.median / step
            found.append((f"{shape.name}: times faster than dense", 1.0, ratio, ratio > 1.0))
        parts = {row.name: row for row in rows if row.shape == shape and row.family == "kernel"}
        least = scan_bar(backend, shape)
        if SCAN_KERNEL in parts and least is not None:
            share = parts[READ_KERNEL].us.median / parts[SCAN_KERNEL].us.median
            found.append((f"{shape.name}: scan, share of read speed", least, share, share >= least))
    return found


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    profile = registry.profile_in_force()
    found = asdict(devices.fingerprint(device))
    return {
        **found,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "profile": None if profile is None else profile.label,
    }


def heading(device: str, settings: dict[str, Any]) -> str:
    """What is run, and on what, in one line."""
    facts = machine(device)
    knobs = "".join(f", {name}={value}" for name, value in settings.get("set", {}).items())
    return (
        f"{facts['name']}, {facts['cores']} cores, torch {facts['torch']}, "
        f"load {facts['load']:.2f}, backend {settings['backend']}, "
        f"profile {facts['profile'] or 'none'}, {'cold' if settings['cold'] else 'warm'} caches, "
        f"{settings['rounds']} rounds{knobs}"
    )


def closing_tables(rows: Sequence[Row], bars: Sequence[Bar], busy: bool = False) -> list[Table]:
    """The gains, the kernels of each step, and the bars."""
    tables = [summary(rows, busy)]
    if any(row.family == "kernel" for row in rows):
        tables.append(kernel_table(rows))
    if bars:
        table = Table(title="targets", title_justify="left")
        _caption(table, busy)
        for column in ("bar", "wanted", "measured", ""):
            table.add_column(column, justify="left" if column in ("bar", "") else "right")
        for name, wanted, measured, met in bars:
            table.add_row(
                name, f"{wanted:.4g}", f"{measured:.2f}{_mark(busy)}", "met" if met else "not met"
            )
        tables.append(table)
    return tables


def kernel_table(rows: Sequence[Row]) -> Table:
    """The kernels of a step by themselves, one line per shape."""
    names = list(dict.fromkeys(row.name for row in rows if row.family == "kernel"))
    table = Table(
        title="kernels of a step by the profiler, µs (each with its own start and end)",
        title_justify="left",
    )
    table.add_column("shape")
    for name in names:
        table.add_column(name.removeprefix("kernel "), justify="right")
    for shape in shapes_of(rows):
        times = {row.name: row.us.median for row in rows if row.shape == shape}
        table.add_row(shape.name, *(f"{times[n]:.1f}" if n in times else "" for n in names))
    return table


def figures(
    rows: Sequence[Row], bars: Sequence[Bar], settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """All figures as plain data, for `--json`."""
    return {
        "schema": SCHEMA,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "settings": settings,
        "rows": [
            {
                "shape": asdict(row.shape) | {"slots": row.shape.s, "budget": row.shape.k},
                "name": row.name,
                "family": row.family,
                "us": asdict(row.us),
                "bytes": row.bytes,
                "gb_per_s": row.gbs,
                "times_best_dense": (best_dense(rows, row.shape).us.median / row.us.median),
            }
            for row in rows
        ],
        "slot_ratios": slot_ratios(rows),
        "bars": [
            {"bar": name, "wanted": wanted, "measured": measured, "met": met}
            for name, wanted, measured, met in bars
        ],
    }
