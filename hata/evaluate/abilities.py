"""What a model can do with few keys: tasks through `generate`, and perplexity of long text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hata.calibration import recorder
from hata.calibration.hashable import dense_layers
from hata.calibration.progress import Progress
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.evaluate import decoding, report, tasks
from hata.evaluate.selectors import WITHOUT_CODES


@dataclass(frozen=True)
class Abilities:
    """Tasks and perplexity, as asked for.

    Attributes:
        options: Of `hata eval`.
        tokenizer: Text to tokens.
        text: What prompts are hidden in.
        progress: Told what happens.
    """

    options: argparse.Namespace
    tokenizer: Callable[[str], list[int]]
    text: str
    progress: Progress

    def check(self, lengths: Iterable[int]) -> None:
        """Raise `CaptureError` where the prompts of a task cannot be made."""
        for task in self.options.tasks:
            for tokens in lengths:
                for prompt in self._prompts(task, tokens):
                    if not self.tokenizer(prompt.value):
                        raise CaptureError(
                            f"--tasks {task}: the tokenizer makes no tokens of {prompt.value!r}"
                        )

    def tables(
        self,
        encoders: Sequence[tuple[str, Encoder, int]],
        read: Mapping[int, np.ndarray],
        places: Sequence[tuple[int, list[int]]],
        device: str,
    ) -> Iterator[str]:
        """One table per length and budget: a row per way to decode, a column per measure.

        Args:
            encoders: Name, encoder and bits of each.
            read: Length -> sequences that are read.
            places: Lengths, and budgets in keys.
            device: Where to run the model.
        """
        options = self.options
        model = recorder.load_model(options.model, device, options.dtype)
        dense = dense_layers(model)
        batch = options.batch or (1 if device == "cpu" else 20)
        # Layers that an encoder leaves dense, beyond those that are dense in all rows.
        more = {
            name: f" ({count} more dense)"
            for name, encoder, _ in encoders
            if (count := sum(layer >= options.dense_layers for layer in encoder.dense_layers))
        }
        for tokens, k in ((tokens, k) for tokens, budgets in places for k in budgets):
            longest = tokens + tasks.DIGITS
            policy = decoding.Policy(
                k / tokens, options.dense_layers, options.sink, options.recent, longest
            )
            ways = [decoding.dense()]
            ways += [
                decoding.simulated(model, make(), policy, dense)
                for method, make in WITHOUT_CODES.items()
                if method in options.methods
            ]
            ways += [
                decoding.attached(name, model, encoder, bits, policy)
                for name, encoder, bits in encoders
            ]
            columns: dict[str, dict[tuple[str, int], str]] = {}
            for task in options.tasks:
                right = self._right(model, task, tokens, ways, batch)
                columns[task] = {way: f"{n}/{options.prompts}" for way, n in right.items()}
            if options.perplexity:
                nats = self._nats(model, read[tokens], ways, batch)
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
            told = (
                f"{tokens:,} tokens, a budget of {policy.share:.2%} ({options.sink} first and "
                f"{options.recent} last keys within it), {options.dense_layers} dense layers"
            )
            self.progress.note(f"decoded: {told}")
            yield f"{told}:\n\n{report.table(['decoding with', 'bits', *columns], rows)}"

    def _prompts(self, task: str, tokens: int) -> Iterator[tasks.Prompt]:
        count, seed = self.options.prompts, self.options.seed
        try:
            yield from tasks.prompts(task, self.tokenizer, self.text, tokens, count, seed=seed)
        except ValueError as error:
            raise CaptureError(f"--tasks {task}: {error}") from None

    def _right(
        self, model: Any, task: str, tokens: int, ways: Sequence[decoding.Way], batch: int
    ) -> dict[tuple[str, int], int]:
        """Right answers of every way."""
        made = list(self._prompts(task, tokens))
        right = {(way.name, way.bits): 0 for way in ways}
        for start in range(0, len(made), batch):
            some = made[start : start + batch]
            ids = torch.tensor([prompt.tokens for prompt in some], device=model.device)
            wanted = [self.tokenizer(prompt.value) for prompt in some]
            found = decoding.answers(model, ids, ways, max(map(len, wanted)))
            for way, answers in found.items():
                right[way] += sum(
                    answer[: len(one)] == one for answer, one in zip(answers, wanted, strict=True)
                )
            done = min(start + batch, len(made))
            self.progress.show(f"{task}: {done} of {len(made)} prompts")
        return right

    def _nats(
        self, model: Any, ids: np.ndarray, ways: Sequence[decoding.Way], batch: int
    ) -> dict[tuple[str, int], float]:
        """Nats per token of every way, the mean over sequences."""
        total = {(way.name, way.bits): 0.0 for way in ways}
        for start in range(0, len(ids), batch):
            some = torch.from_numpy(ids[start : start + batch]).to(model.device)
            for way, nats in decoding.losses(model, some, ways, self.options.perplexity).items():
                total[way] += nats * len(some) / len(ids)
        return total
