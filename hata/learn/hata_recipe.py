"""HATA's recipe (arXiv 2506.02572 and its published trainer), as a baseline.

One projection per KV head hashes queries and keys alike. Pairs of a query and a key are labelled by
rank: a query's best tenth of the keys get 20 down to 1, the rest -1, for every query head. Codes
are relaxed to `2 sigmoid(0.1 x W) - 1`, and SGD minimises `objectives.pairwise`.

The last words of the trainer are followed where it and the paper differ: the factors 1 and 2 belong
to balance and orthogonality, in this order, and balance counts queries and keys.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from hata.encoder.layer import LayerHash
from hata.learn import objectives
from hata.learn.recipe import Recipe, Watcher, exported, minimised
from hata.learn.samples import LayerSamples


@dataclass(frozen=True)
class HataRecipe(Recipe):
    """See the module.

    Attributes:
        pairs: Pairs of a query and a key that are drawn from.
        chunk: Pairs of a step; an epoch draws them anew.
        epoch: Steps of an epoch.
        best: Share of a query's keys that are wanted.
        similarity: Factor of the similarity term.
        balance: Factor of the balance term.
        orthogonality: Factor of the orthogonality term.
        sharpness: Of the sigmoid.
        rate: Learning rate of SGD.
        momentum: Of SGD.
        decay: Weight decay.
    """

    # Every query is held against all pairs of a step. Short sequences make few pairs of a query, so
    # there are many queries: below this, gigabytes of them.
    least_tokens: ClassVar[int] = 512

    name: str = "hata"
    steps: int = 300
    pairs: int = 200_000
    chunk: int = 65536
    epoch: int = 20
    best: float = 0.1
    similarity: float = 0.01
    balance: float = 1.0
    orthogonality: float = 2.0
    sharpness: float = 0.1
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-6

    def train(
        self, samples: LayerSamples, bits: int, steps: int, seed: int, watch: Watcher
    ) -> LayerHash:
        """See `Recipe`."""
        generator = torch.Generator().manual_seed(seed)
        queries, keys, labels, owner = self._pairs(samples, generator)
        shape = (samples.kv_heads, samples.head_dim, bits)
        weights = torch.nn.Parameter(torch.randn(shape, generator=generator).to(samples.device))
        optimiser = torch.optim.SGD(
            [weights], lr=self.rate, momentum=self.momentum, weight_decay=self.decay
        )

        chosen = owned = torch.empty(0)

        def loss(step: int) -> torch.Tensor:
            nonlocal chosen, owned
            if step % self.epoch == 0:
                chosen = torch.randperm(len(owner), generator=generator)[: self.chunk]
                chosen = chosen.to(samples.device)
                numbers = torch.arange(queries.shape[2], device=samples.device)
                owned = (owner[chosen] == numbers[:, None]).float()
            return objectives.pairwise(
                self._relaxed(queries, weights[:, None]),
                self._relaxed(keys[:, chosen], weights),
                labels[..., chosen],
                owned,
                weights,
                similarity=self.similarity,
                balance=self.balance,
                orthogonality=self.orthogonality,
            )

        def export() -> LayerHash:
            return LayerHash(exported(weights))

        return minimised(loss, optimiser, steps, watch, export)

    def _relaxed(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(self.sharpness * (x @ weights)) - 1

    def _pairs(
        self, samples: LayerSamples, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[N, G, Q, D]`, keys `[N, P, D]`, labels `[N, G, P]`, each pair's query `[P]`.

        A query stands in the second half of its sequence, and makes a pair with every key it sees.
        """
        queries, keys, labels = [], [], []
        sizes: list[int] = []
        for read in itertools.cycle(samples.reads):
            if sum(sizes) >= self.pairs:
                break
            late = (read.positions >= samples.tokens // 2).nonzero()[:, 0]
            late = late if len(late) else torch.arange(len(read.positions))[-1:]
            place = late[int(torch.randint(len(late), (1,), generator=generator))]
            seen = int(read.positions[place]) + 1
            q, visible = read.q[:, :, place], read.keys[:, :seen]
            order = (q @ visible.mT).argsort(-1, descending=True)
            wanted = max(int(self.best * seen), 1)
            ranked = torch.full((seen,), -1.0, device=samples.device)
            ranked[:wanted] = torch.linspace(20, 1, wanted, device=samples.device)
            label = torch.empty_like(order, dtype=torch.float32)
            labels.append(label.scatter_(-1, order, ranked.expand_as(order)))
            queries.append(q)
            keys.append(visible)
            sizes.append(seen)
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return (
            torch.stack(queries, 2),
            torch.cat(keys, 1),
            torch.cat(labels, -1),
            owner.to(samples.device),
        )
