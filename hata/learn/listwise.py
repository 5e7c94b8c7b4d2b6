"""Our recipe: rank the keys of a GQA group as its attention does, for every number of bits at once.

A step takes some queries of one sequence and all keys that they see. Scores of the first 32, 64,
128, ... bits come from one pass, since each is the one before plus the agreement of its own bits,
and every one of them is trained as if it were used alone. In the first part of the training scores
learn the attention (`objectives.listwise`); then the mass on the best keys is raised directly
(`objectives.kept_mass`), for budgets drawn anew for every query, so that the hard negatives are
those at the budget's edge, wherever it is. Signs are tanh that sharpen, and at last signs.

Half of the steps see short contexts, half long ones.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from hata.encoder.layer import LayerHash
from hata.learn import objectives
from hata.learn.hasher import Hasher, Sign, soft_sign, straight_through
from hata.learn.recipe import Recipe, Watcher, minimised
from hata.learn.samples import LayerSamples


@dataclass(frozen=True)
class Listwise(Recipe):
    """See the module.

    Attributes:
        queries: Queries of a step.
        keys: Keys of a step at most, the rest thinned out at random; `None`: all that are seen.
        query_codes: Codes of a KV head's queries, at least one per query head; more of them make
            finer weights and a slower scan.
        rate: Learning rate of Adam; rises over 20 steps, then falls along a cosine.
        listwise: Share of the steps that learn the attention; the rest raise the kept mass.
        straight: Share of the steps, the last ones, with signs instead of tanh.
        sharpness: Of tanh at the start, and where it ends.
        width: Softness of a budget's edge, in units of a score over the root of its bits.
        budgets: Smallest and largest share of the visible keys that budgets are drawn from.
        short: Share of the sequence that a short context has at most.
        least: Smallest budget, in keys.
    """

    name: str = "listwise"
    steps: int = 2400
    nested: bool = True
    recall: bool = True
    queries: int = 64
    keys: int | None = None
    query_codes: int = 8
    rate: float = 1e-2
    listwise: float = 0.3
    straight: float = 0.25
    sharpness: tuple[float, float] = (1.0, 4.0)
    width: float = 0.075
    budgets: tuple[float, float] = (1 / 128, 1 / 16)
    short: float = 0.3
    least: int = 8

    def train(
        self, samples: LayerSamples, bits: int, steps: int, seed: int, watch: Watcher
    ) -> LayerHash:
        """See `Recipe`."""
        generator = torch.Generator().manual_seed(seed)
        hasher = Hasher(
            *samples.start(),
            group=samples.group,
            bits=bits,
            codes=max(1, self.query_codes // samples.group),
            generator=generator,
        )
        prefixes = prefixes_of(bits) if self.nested else (bits,)
        # Bits that a prefix has more than the one before; splitting once is cheaper to go back
        # through than slicing every time.
        more = [last - first for first, last in itertools.pairwise((0, *prefixes))]
        # Products of codes to logits; what a layer needs depends on how sharply it attends.
        start = torch.tensor([math.log(6 / n**0.5) for n in prefixes])
        factors = torch.nn.Parameter(start.repeat(samples.kv_heads, 1).to(samples.device))
        parameters = [*hasher.parameters(), factors]
        optimiser = torch.optim.Adam(parameters, lr=self.rate, betas=(0.9, 0.98), fused=True)

        def loss(step: int) -> torch.Tensor:
            done = step / steps
            for settings in optimiser.param_groups:
                settings["lr"] = self.rate * _schedule(step, done)
            before = samples.tokens if step % 2 else math.ceil(samples.tokens * self.short)
            batch = samples.batch(step, self.queries, before, generator, self.keys)
            q, keys, visible, hidden = batch
            target = objectives.group_target(q, keys, samples.scale, hidden)
            sign = self._sign(done)
            k_codes, q_codes = hasher.encode_keys(keys, sign), hasher.encode_queries(q, sign)
            budgets = self._budgets(visible, generator)
            parts = zip(prefixes, q_codes.split(more, -1), k_codes.split(more, -1), strict=True)
            scores = torch.zeros((), device=keys.device)
            total = torch.zeros((), device=keys.device)
            for i, (last, q_part, k_part) in enumerate(parts):
                scores = scores + q_part @ k_part.mT
                root = last**0.5
                if done < self.listwise:
                    logits = scores * (factors[:, i].exp() / root)[:, None, None]
                    total = total + objectives.listwise(logits, target, hidden)
                else:
                    kept = objectives.kept_mass(scores, target, hidden, budgets, self.width * root)
                    total = total - 2 * kept
            return total

        return minimised(loss, optimiser, steps, watch, hasher.export)

    def _budgets(self, visible: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        low, high = (math.log2(share) for share in self.budgets)
        shares = 2 ** (low + (high - low) * torch.rand(len(visible), generator=generator))
        return (visible * shares).long().clamp_min(self.least).minimum(visible)

    def _sign(self, done: float) -> Sign:
        soft, sharp = self.sharpness
        if done >= 1 - self.straight:
            return straight_through(sharp / 2)
        return soft_sign(soft * (sharp / soft) ** (done / (1 - self.straight)))


def prefixes_of(bits: int) -> tuple[int, ...]:
    """The numbers of bits that are trained to be used alone: powers of two, and all."""
    return (*(n for n in (32, 64, 128, 256, 512) if n < bits), bits)


def _schedule(step: int, done: float) -> float:
    return min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
