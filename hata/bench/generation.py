"""The ways to decode that are compared, and what a step of each takes.

A step is timed where its user waits for it: between two tokens of `model.generate`, Python and
sampling included. The cache is filled with random keys and values rather than by a prefill, which
at these lengths takes longer than all steps; what they hold changes no time.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import hata.hf
from hata.calibration.progress import blank_figure
from hata.encoder import ModelShape
from hata.hf.models import cache_argument
from hata.selection import Selection

# What others are compared with: transformers with a cache of fixed size, whose step it compiles on
# a GPU; and the best dense kernel in the same graph as hash attention.
OWN, DENSE, HASH = "transformers", "dense", "hash"
# Hash attention in other ways: with a cache of fixed size, and without graphs.
STATIC, EAGER = "hash, static cache", "hash, eager"
WAYS = (OWN, DENSE, HASH, STATIC, EAGER)
_STEPS, _SETTLE = 48, 16


@dataclass(frozen=True)
class Step:
    """What a decode step takes in one way.

    Attributes:
        way: One of `WAYS`.
        ms: Median time between two tokens, in milliseconds.
        first: Longest time between two tokens, in seconds: compiling and capturing.
        gigabytes: Most memory that was taken at a time; 0 on a CPU.
        codes: Memory of the codes, in gigabytes.
        graphs: Steps that our CUDA graphs ran, and how many were captured.
    """

    way: str
    ms: float
    first: float
    gigabytes: float
    codes: float = 0.0
    graphs: tuple[int, int] = (0, 0)


def measure(
    model: PreTrainedModel,
    way: str,
    batch: int,
    context: int,
    selection: Selection,
    *,
    encoder: Any = "random",
    steps: int = _STEPS,
) -> Step:
    """Time the steps of a model in one way.

    Args:
        model: One that is not attached.
        way: One of `WAYS`.
        batch: Rows.
        context: Keys in the cache before the first step.
        selection: What hashed layers attend to.
        encoder: As `hata.hf.attach` takes it.
        steps: Tokens to generate.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    static = way == STATIC or (way == OWN and on_gpu)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    attached: AbstractContextManager[Any] = nullcontext()
    if way != OWN:
        chosen = None if way == DENSE else selection
        attached = hata.hf.attach(model, encoder, selection=chosen, graphs=way != EAGER)
    with attached as handle:
        cache = _filled(model, batch, context, steps, static)
        tokens = torch.randint(3, 90, (batch, context + 1), device=device)
        moments: list[float] = []

        def stop(*_: Any, **__: Any) -> torch.Tensor:
            if on_gpu:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return torch.zeros(batch, dtype=torch.bool, device=device)

        generate: Any = model.generate
        generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            stopping_criteria=[stop],
            **{cache_argument(model): cache},
        )
        waits = [after - before for before, after in itertools.pairwise(moments)]
        codes = sum(layer.codes.nbytes for layer in cache.layers if _has_codes(layer))
        report = handle.report().steps if handle is not None else None
    return Step(
        way=way,
        ms=1e3 * median(waits[min(_SETTLE, len(waits) // 2) :]),
        first=max(waits),
        gigabytes=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        codes=codes / 2**30,
        graphs=(report.replayed, report.captured) if report else (0, 0),
    )


def _has_codes(layer: Any) -> bool:
    return getattr(layer, "codes", None) is not None


def _filled(model: PreTrainedModel, batch: int, context: int, steps: int, static: bool) -> Any:
    """A cache that holds random keys and values."""
    config = model.config.get_text_config()
    sizes = ModelShape.of(config)
    cache: Any = DynamicCache(config=config)
    if static:
        cache = StaticCache(config=config, max_cache_len=context + steps + 1)
    shape = batch, sizes.kv_heads, context, sizes.head_dim
    for i in range(sizes.num_layers):
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        cache.update(keys, keys.roll(1, dims=2), i)
    return cache


def rows(steps: Sequence[Step], batch: int) -> list[list[str]]:
    """The steps of one model as a table, with what each is compared with."""
    of = {step.way: step.ms for step in steps}
    head = ["way", "ms a step", "tokens/s", f"x {OWN}", f"x {DENSE}", "slowest s", "GB", "codes GB"]
    found = [head]
    for step in steps:
        times = (f"{of[way] / step.ms:.2f}" if way in of else "-" for way in (OWN, DENSE))
        found.append(
            [
                step.way, f"{step.ms:.2f}", f"{1e3 * batch / step.ms:.1f}", *times,
                f"{step.first:.1f}", f"{step.gigabytes:.1f}", f"{step.codes:.2f}",
            ]
        )  # fmt: skip
    return found


def plot(path: Path, measured: dict[str, Sequence[Step]]) -> bool:
    """Draw the steps of several models or lengths; whether matplotlib is there."""
    figure = blank_figure(2 + 2.2 * len(measured), 3.6)
    if figure is None:
        return False
    for place, (name, steps) in enumerate(measured.items(), start=1):
        axes = figure.add_subplot(1, len(measured), place)
        bars = axes.bar([step.way.replace(", ", "\n") for step in steps], [s.ms for s in steps])
        axes.bar_label(bars, fmt="%.1f")
        axes.set_title(name)
        axes.set_ylabel("ms a decode step" if place == 1 else "")
        axes.tick_params(axis="x", labelrotation=60)
    figure.savefig(path)
    return True


def compare(
    model: PreTrainedModel,
    ways: Sequence[str],
    batch: int,
    context: int,
    selection: Selection,
    told: Callable[[str], None],
    **more: Any,
) -> list[Step]:
    """`measure` in several ways; one that runs out of memory is left out, and told."""
    found = []
    for way in ways:
        try:
            found.append(measure(model, way, batch, context, selection, **more))
        except torch.OutOfMemoryError:
            told(f"{way}: out of memory")
        else:
            told(f"{way}: {found[-1].ms:.2f} ms a step")
    return found
