"""What a model can do with few keys: tasks through `generate`, and perplexity of long text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hata.calibration.hashable import dense_layers
from hata.errors import CaptureError
from hata.evaluate import decoding, report, selectors, tasks


def check_prompts(
    options: argparse.Namespace,
    tokenizer: Any,
    text: str,
    places: Sequence[tuple[int, list[int]]],
) -> None:
    """Raise `CaptureError` where the prompts of a task cannot be made."""
    for task in options.tasks:
        for tokens, _ in places:
            for prompt in _prompts(options, task, tokenizer, text, tokens):
                if not tokenizer(prompt.value):
                    raise CaptureError(
                        f"--tasks {task}: the tokenizer makes no tokens of {prompt.value!r}"
                    )


def tables(
    options: argparse.Namespace,
    encoders: Sequence[tuple[str, Any, int]],
    tokenizer: Any,
    text: str,
    read: Mapping[int, np.ndarray],
    places: Sequence[tuple[int, list[int]]],
    device: str,
    progress: Any,
) -> Iterator[str]:
    """One table per length and budget: a row per way to decode, a column per task and measure.

    Args:
        options: Of `hata eval`.
        encoders: Name, encoder and bits of each.
        tokenizer: Text to tokens.
        text: What prompts are hidden in.
        read: Length -> sequences that are read.
        places: Lengths, and budgets in keys.
        device: Where to run the model.
        progress: Told what happens.
    """
    model = decoding.load(options.model, device, options.dtype)
    dense = dense_layers(model)
    batch = options.batch or (1 if device == "cpu" else 20)
    others: dict[str, Any] = {
        "exact": selectors.Exact(), "pages": selectors.Pages(), "window": selectors.Window()
    }  # fmt: skip
    # Layers that an encoder leaves dense, beyond those that are dense in all rows.
    more = {
        name: f" ({count} more dense)"
        for name, encoder, _ in encoders
        if (count := sum(layer >= options.dense_layers for layer in encoder.dense_layers))
    }
    for tokens, budgets in places:
        for k in budgets:
            policy = decoding.Policy(
                k / tokens,
                options.dense_layers,
                options.sink,
                options.recent,
                tokens + tasks.DIGITS,
            )
            ways = [decoding.dense()]
            ways += [
                decoding.simulated(model, selector, policy, dense)
                for method, selector in others.items()
                if method in options.methods
            ]
            ways += [
                decoding.attached(name, model, encoder, bits, policy)
                for name, encoder, bits in encoders
            ]
            columns: dict[str, dict[tuple[str, int], str]] = {}
            for task in options.tasks:
                right = _task(options, model, task, tokenizer, text, tokens, ways, batch, progress)
                columns[task] = {way: f"{n}/{options.prompts}" for way, n in right.items()}
            if options.perplexity:
                nats = _losses(options, model, read[tokens], ways, batch)
                columns["perplexity"] = {way: f"{math.exp(x):.4f}" for way, x in nats.items()}
                base = nats["dense", 0]
                columns["against dense"] = {
                    way: f"{100 * (math.exp(x - base) - 1):+.2f}%" for way, x in nats.items()
                }
            rows = [
                [
                    way.name + more.get(way.name, ""),
                    str(way.bits or "-"),
                    *(column[way.name, way.bits] for column in columns.values()),
                ]
                for way in ways
            ]
            head = ["decoding with", "bits", *columns]
            told = (
                f"{tokens:,} tokens, a budget of {policy.share:.2%} ({options.sink} first and "
                f"{options.recent} last keys within it), {options.dense_layers} dense layers"
            )
            progress.note(f"decoded: {told}")
            yield f"{told}:\n\n{report.table(head, rows)}"


def _task(
    options: argparse.Namespace,
    model: Any,
    task: str,
    tokenizer: Any,
    text: str,
    tokens: int,
    ways: Sequence[Any],
    batch: int,
    progress: Any,
) -> dict[tuple[str, int], int]:
    """Right answers of every way."""
    made = list(_prompts(options, task, tokenizer, text, tokens))
    right = {(way.name, way.bits): 0 for way in ways}
    for start in range(0, len(made), batch):
        some = made[start : start + batch]
        ids = torch.tensor([prompt.tokens for prompt in some], device=model.device)
        wanted = [tokenizer(prompt.value) for prompt in some]
        found = decoding.answers(model, ids, ways, max(map(len, wanted)))
        for way, answers in found.items():
            right[way] += sum(
                answer[: len(one)] == one for answer, one in zip(answers, wanted, strict=True)
            )
        progress.show(f"{task}: {min(start + batch, len(made))} of {len(made)} prompts")
    return right


def _prompts(
    options: argparse.Namespace, task: str, tokenizer: Any, text: str, tokens: int
) -> Iterator[tasks.Prompt]:
    try:
        yield from tasks.prompts(task, tokenizer, text, tokens, options.prompts, seed=options.seed)
    except ValueError as error:
        raise CaptureError(f"--tasks {task}: {error}") from None


def _losses(
    options: argparse.Namespace,
    model: Any,
    ids: np.ndarray,
    ways: Sequence[Any],
    batch: int,
) -> dict[tuple[str, int], float]:
    """Nats per token of every way, the mean over sequences."""
    total = {(way.name, way.bits): 0.0 for way in ways}
    for start in range(0, len(ids), batch):
        some = torch.from_numpy(ids[start : start + batch]).to(model.device)
        for way, nats in decoding.losses(model, some, ways, options.perplexity).items():
            total[way] += nats * len(some) / len(ids)
    return total
