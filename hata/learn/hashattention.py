"""HashAttention's recipe (arXiv 2412.14468 and its published trainer), as a baseline.

Queries and keys have networks of their own, three layers with SiLU, the last of them the projection
and bias of `hata.encode`. What is wanted are the exact best 32 keys of every query head outside the
first and the last 128; scores are products of tanh codes, and Adam minimises their weighted binary
cross-entropy (`objectives.matching`).

Queries have a network per query head. Keys have one per KV head, since that is how codes are stored
and scored here; the published trainer repeats keys and gives them a network per query head as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import silu

from hata.encoder import Hidden, QueryHash
from hata.encoder.layer import LayerHash
from hata.learn import objectives
from hata.learn.recipe import Recipe, Watcher, exported, minimised
from hata.learn.samples import LayerSamples


@dataclass(frozen=True)
class HashAttention(Recipe):
    """See the module.

    Attributes:
        queries: Queries of a step.
        best: Exact best keys that are wanted.
        edges: First and last keys that are left out, each.
        weight: Weight of a wanted key.
        rate: Learning rate of Adam.
    """

    # Both edges and the best keys between them: in a shorter one no key is wanted.
    least_tokens: ClassVar[int] = 2 * 128 + 32

    name: str = "hashattention"
    steps: int = 1000
    queries: int = 128
    best: int = 32
    edges: int = 128
    weight: float = 20.0
    rate: float = 1e-3

    def train(
        self, samples: LayerSamples, bits: int, steps: int, seed: int, watch: Watcher
    ) -> LayerHash:
        """See `Recipe`."""
        generator = torch.Generator().manual_seed(seed)
        size, heads = samples.head_dim, samples.kv_heads
        for_keys = Network(heads, size, bits, generator).to(samples.device)
        for_queries = Network(heads * samples.group, size, bits, generator).to(samples.device)
        parameters = [*for_keys.parameters(), *for_queries.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=self.rate)

        def loss(step: int) -> torch.Tensor:
            batch = samples.batch(step, self.queries, samples.tokens, generator)
            q = for_queries(batch.q.flatten(0, 1)).tanh().unflatten(0, (heads, samples.group))
            keys = for_keys(batch.keys).tanh()
            out = self._edges(batch.visible, batch.keys.shape[1]).to(samples.device) | batch.hidden
            logits = (batch.q @ batch.keys[:, None].mT).masked_fill(out, objectives.LOWEST)
            best = logits.topk(min(self.best, logits.shape[-1]), -1).indices
            # Where fewer keys are left than are wanted, none of those left out becomes one.
            wanted = torch.zeros_like(logits).scatter_(-1, best, 1.0).masked_fill(out, 0.0)
            return objectives.matching(q @ keys[:, None].mT, wanted, out, self.weight)

        def export() -> LayerHash:
            *hidden, (projection, bias) = for_keys.export()
            *before, last = for_queries.export()
            query = QueryHash(*last, hidden=tuple(before))
            return LayerHash(projection, bias, query, tuple(hidden))

        return minimised(loss, optimiser, steps, watch, export)

    def _edges(self, visible: torch.Tensor, slots: int) -> torch.Tensor:
        """`[Q, S]`: the keys at the start and the end of what each query sees."""
        place = torch.arange(slots)
        return (place < self.edges) | (place >= visible[:, None] - self.edges)


class Network(nn.Module):
    """Three layers per head, SiLU between them; initialised as `torch.nn.Linear` is.

    Args:
        heads: How many networks.
        size: Of a vector and of the hidden layers.
        bits: Of a code.
        generator: Source of the weights.
    """

    def __init__(self, heads: int, size: int, bits: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = size**-0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)

        widths = (size, size, bits)
        self.weights = nn.ParameterList([uniform(heads, size, width) for width in widths])
        self.biases = nn.ParameterList([uniform(heads, 1, width) for width in widths])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[heads, n, D]` -> `[heads, n, r]`, before the signs."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = x if i == last else silu(x)
        return x

    def export(self) -> list[Hidden]:
        """Its layers, as an encoder holds them; the last one is the projection and its bias."""
        layers = zip(self.weights, self.biases, strict=True)
        return [Hidden(exported(weight), exported(bias.squeeze(1))) for weight, bias in layers]
