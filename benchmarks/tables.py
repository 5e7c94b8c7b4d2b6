"""Tables and files of figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

import torch
from rich.table import Table

from benchmarks.bars import Bar, Row, best_dense, find, shapes_of, slot_ratios
from benchmarks.shapes import Shape, short
from hata import device as devices
from hata import registry

SCHEMA = "hata.benchmark/1"
# Under tables whose ratios another process may have changed.
BUSY = (
    "* the machine was busy, from which dense attention suffers most: these ratios may be too high"
)


def table_of(title: str, columns: Sequence[str], busy: bool = False) -> Table:
    """A table whose columns stand right, but for the first."""
    table = Table(title=title, title_justify="left")
    if busy:
        table.caption, table.caption_justify = BUSY, "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def shape_table(rows: Sequence[Row], shape: Shape, busy: bool = False) -> Table:
    """All contenders of a shape; ratios are marked where the machine was busy."""
    dense, mark = best_dense(rows, shape).us.median, "*" if busy else ""
    columns = ("", "µs", "p10", "p90", "MB", "GB/s", "best dense / this")
    table = table_of(shape.name, columns, busy)
    table.title_style = "bold"
    for _, family in groupby((row for row in rows if row.shape == shape), lambda row: row.family):
        table.add_section()
        for row in family:
            us = row.us
            table.add_row(
                row.name,
                *(f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                  for value in (us.median, us.p10, us.p90)),
                f"{row.bytes / 1e6:,.2f}" if row.bytes else "",
                f"{row.gbs:,.1f}" if row.bytes else "",
                f"{dense / us.median:,.2f}{mark}" if row.family in ("op", "dense") else "",
            )  # fmt: skip
    return table


def summary(rows: Sequence[Row], busy: bool = False) -> Table:
    """One line per shape: what hash attention gains."""
    columns = ("shape", "dense µs", "hash µs", "faster", "scan GB/s", "over a plain read")
    table = table_of("hash_attend against the fastest dense attention", columns, busy)
    mark = "*" if busy else ""
    for shape in shapes_of(rows):
        dense, ours = best_dense(rows, shape).us.median, find(rows, shape, "hash_attend").us.median
        table.add_row(
            shape.name, f"{dense:,.0f}", f"{ours:,.0f}", f"{dense / ours:.1f}x{mark}",
            f"{find(rows, shape, 'hamming_topk').gbs:.1f}",
            f"{ours / find(rows, shape, 'read step').us.median:.1f}",
        )  # fmt: skip
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


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    profile = registry.profile_in_force()
    return {
        **asdict(devices.fingerprint(device)),
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
    """The gains, the kernels of each step by themselves, and the bars."""
    tables = [summary(rows, busy)]
    names = list(dict.fromkeys(row.name for row in rows if row.family == "kernel"))
    if names:
        title = "kernels of a step by the profiler, µs (each with its own start and end)"
        table = table_of(title, ("shape", *(name.removeprefix("kernel ") for name in names)))
        for shape in shapes_of(rows):
            times = {row.name: row.us.median for row in rows if row.shape == shape}
            table.add_row(shape.name, *(f"{times[n]:.1f}" if n in times else "" for n in names))
        tables.append(table)
    if bars:
        table = table_of("targets", ("bar", "wanted", "measured", ""), busy)
        mark = "*" if busy else ""
        table.columns[-1].justify = "left"
        for bar in bars:
            met = "met" if bar.met else "not met"
            table.add_row(bar.name, f"{bar.wanted:.4g}", f"{bar.measured:.2f}{mark}", met)
        tables.append(table)
    return tables


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
                "us": asdict(row.us) | {"samples": row.samples},
                "bytes": row.bytes,
                "gb_per_s": row.gbs,
                "times_best_dense": best_dense(rows, row.shape).us.median / row.us.median,
            }
            for row in rows
        ],
        "slot_ratios": slot_ratios(rows),
        "bars": [
            {"bar": bar.name, "wanted": bar.wanted, "measured": bar.measured, "met": bar.met}
            for bar in bars
        ],
    }
