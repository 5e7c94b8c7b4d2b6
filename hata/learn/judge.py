"""What a layer in training keeps of the attention on a sequence that it does not learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hata.encoder import ModelShape
from hata.encoder.encoder import of_layers
from hata.encoder.layer import LayerHash
from hata.evaluate.retained import measure
from hata.evaluate.selectors import Asked, Coded
from hata.learn.samples import LayerSamples

QUERIES = 128
# A budget as HATA has it for long contexts: 1.56% of the keys.
SHARE = 64


class Judge:
    """Share of exact top-k's attention mass that a layer keeps on held-out sequences.

    Args:
        held_out: One sequence; its last queries are asked.
        shape: The model's sizes.
        bits: Bits of the layer's codes.
    """

    def __init__(self, held_out: LayerSamples, shape: ModelShape, bits: int) -> None:
        read = held_out.reads[0]
        self._shape = dataclasses.replace(shape, num_layers=1)
        self._bits, self._scale = bits, held_out.scale
        last = read.positions[-QUERIES:].to(held_out.device)
        slots = int(last[-1]) + 1
        hidden = torch.arange(slots, device=last.device) > last[:, None]
        self._asked = Asked(0, read.q[:, :, -QUERIES:], read.keys[:, :slots], hidden)
        self._k = max(slots // SHARE, 8)

    def __call__(self, learned: LayerHash, bits: Sequence[int]) -> dict[str, float]:
        """The share for each number of bits, `{"64": 0.95, ...}`."""
        encoder = of_layers(self._shape, self._bits, [learned], made={})
        selectors = [Coded(str(n), encoder, n) for n in bits]
        with torch.no_grad():
            found = measure(self._asked, self._scale, selectors, [self._k])
        return {name: mass / exact for (name, _, _), (mass, exact, _) in found.items()}
