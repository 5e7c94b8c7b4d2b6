"""Entries: the kernel configurations of a device, as records and as fields of a profile."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from typing import Any

from hata import arguments
from hata.device import Fingerprint, kinds
from hata.errors import HataDTypeError
from hata.problem import OPS, Problem
from hata.profile import fields, text
from hata.profile.text import Node, fail


@dataclass(frozen=True)
class Measured:
    """How the entries were measured.

    Attributes:
        date: Day or moment, ISO 8601, such as `"2026-11-21"`.
        method: The clock, such as `"perf_counter"` or `"cuda_graph"`.
        repeats: Timed runs behind each median.
        cold_cache: Whether caches were flushed before each run.
        noise_pct: Spread of repeated medians, in per cent; smaller gains were not believed.
        trials: Candidates tried, all entries together.
        seed: Seed of the search.
        predicted: Whether an analytic model stands in for the clock, as the device was not there.
    """

    date: str
    method: str
    repeats: int
    cold_cache: bool
    noise_pct: float
    trials: int
    seed: int
    predicted: bool = False


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Entry:
    """The best configuration found for one problem.

    Attributes:
        backend: Name of the backend.
        key: The problem it was measured on.
        config: Knob -> value, as the backend's `tunables` names them.
        us: Time with `config`.
        default_us: Median time with the default configuration, in microseconds.
    """

    backend: str
    key: Problem
    config: Mapping[str, int | str | bool]
    us: Timing
    default_us: float

    @property
    def op(self) -> str:
        """Name of the op."""
        return self.key.op


_MAX_KNOB = 1 << 24
_SIZED_KNOB = re.compile(r"block|tile|warp")
_DTYPES = ("float32", "float16", "bfloat16", "uint8")
_count, _size, _large, _us = (
    fields.whole(0, 1 << 31),
    fields.whole(0, 1 << 20),
    fields.whole(0, 1 << 40),
    fields.real(0, 1e10),
)

fingerprint = fields.record(
    Fingerprint,
    device=fields.word(kinds),
    cores=fields.whole(1, 1 << 20),
    sm=fields.optional(fields.whole(10, 999)),
    smem_optin=fields.optional(fields.whole(0, 1 << 24)),
    versions=fields.table(fields.name_of),
    kernels=fields.table(fields.table(fields.name_of)),
)
measured = fields.record(
    Measured,
    date=fields.moment,
    repeats=_count,
    noise_pct=fields.real(0, 1000),
    trials=_count,
    seed=fields.whole(0, 1 << 53),
)
_key = fields.record(
    # Its op stands beside it.
    partial(Problem, ""),
    device=fields.word(kinds),
    dtype=fields.word(_DTYPES),
    projection_dtype=fields.word(("", *_DTYPES)),
    batch=fields.pow2(1 << 31),
    bits=fields.whole(0, 1 << 16, 32),
    k=_large,
    tokens=_large,
    slots=fields.pow2(1 << 40),
    **dict.fromkeys(("heads", "kv_heads", "head_dim", "value_dim"), _size),
)


def _knob(node: Node, where: str) -> int | str | bool:
    for value in (text.as_bool(node), text.as_int(node)):
        if value is not None:
            low = 1 if _SIZED_KNOB.search(where.rpartition(".")[2]) else -_MAX_KNOB
            if not isinstance(value, bool) and not low <= value <= _MAX_KNOB:
                fields.refuse(node, where, f"an integer from {low} to {_MAX_KNOB}")
            return value
    if text.as_text(node) is None:
        fields.refuse(node, where, "an integer, true, false, or a string (quoted if in doubt)")
    return fields.name_of(node, where)


def _entry(
    op: str, backend: str, key: Problem, config: Any, us: Timing, default_us: float
) -> Entry:
    # What no call can pose would never be found.
    arguments.multiple("key.heads", key.heads, key.kv_heads)
    if key.head_dim:
        arguments.head_dim("key.head_dim", key.head_dim)
    if (key.dtype == "uint8") != (op == "hamming_topk"):
        raise HataDTypeError(f"key.dtype: got {key.dtype} for {op}; uint8 is hamming_topk's alone")
    return Entry(backend, replace(key, op=op), config, us, default_us)


entries = fields.items(
    fields.record(
        _entry,
        op=fields.word(OPS),
        key=_key,
        config=fields.table(_knob),
        us=fields.record(Timing, median=_us, p10=_us, p90=_us),
        default_us=_us,
    )
)


def check(found: Sequence[Entry], nodes: Sequence[Node], device: Fingerprint) -> None:
    """Hold entries against each other and against the device that they are for.

    Raises:
        ProfileError: with file and line, for what does not fit.
    """
    seen: dict[tuple[str, Problem], Node] = {}
    for entry, node in zip(found, nodes, strict=True):
        first = seen.setdefault((entry.backend, entry.key), node)
        if first is not node:
            fail(node, f"the same key as the entry on line {first.line}; remove one")
        if entry.key.device != device.device:
            fail(
                node,
                f"key.device: got {entry.key.device}, expected {device.device} as in the "
                "fingerprint; a profile is for one device",
            )
        if entry.op not in device.kernels.get(entry.backend, {}):
            where = f"fingerprint.kernels.{entry.backend}.{entry.op}"
            fail(node, f"no kernel hash; expected {where}; tune anew")
        if not entry.us.p10 <= entry.us.median <= entry.us.p90:
            fail(node, "us: expected p10 <= median <= p90; tune anew")


def tree(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """What is written of entries: sorted, without what is default, times in nanosecond steps."""

    def place(entry: Entry) -> tuple:
        return entry.backend, OPS.index(entry.op), *astuple(entry.key)

    return [
        {
            "op": entry.op,
            "backend": entry.backend,
            "key": fields.sparse(entry.key, skip="op"),
            "config": dict(sorted(entry.config.items())),
            "us": {name: round(value, 3) for name, value in asdict(entry.us).items()},
            "default_us": round(entry.default_us, 3),
        }
        for entry in sorted(found, key=place)
    ]
