"""`LayerSamples`: the captured queries and keys of one layer, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hata.learn import capture


class Read(NamedTuple):
    """What one sequence left in one layer.

    Attributes:
        positions: `[n]` int64, ascending, on the CPU: where the kept queries stand.
        q: `[N, G, n, D]` float32, N KV heads.
        keys: `[N, S, D]` float32.
    """

    positions: torch.Tensor
    q: torch.Tensor
    keys: torch.Tensor


class Batch(NamedTuple):
    """Some queries of one sequence, and the keys that the last of them sees, or a draw of those.

    Attributes:
        q: `[N, G, Q, D]`.
        keys: `[N, S, D]`, in the order of the sequence.
        visible: `[Q]` int64, on the CPU: how many of the first of these each query sees.
        hidden: `[Q, S]`: true where it does not see a key.
    """

    q: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor
    hidden: torch.Tensor


class LayerSamples:
    """All that was captured of one layer, on one device.

    Args:
        reads: One per sequence.
        scale: Factor of the logits.
    """

    def __init__(self, reads: Sequence[Read], scale: float) -> None:
        self.reads = list(reads)
        self.scale = scale
        _, self.group, _, self.head_dim = self.reads[0].q.shape
        self.kv_heads, self.tokens, _ = self.reads[0].keys.shape
        self.device = self.reads[0].keys.device

    @classmethod
    def load(cls, folder: Path, layer: int, sequences: Sequence[int], device: str) -> LayerSamples:
        """Read the files of a layer."""
        found = [capture.load(folder, layer, sequence, device) for sequence in sequences]
        return cls([Read(*one[:3]) for one in found], found[-1][3])

    def batch(
        self,
        sequence: int,
        queries: int,
        before: int,
        generator: torch.Generator,
        most: int | None = None,
    ) -> Batch:
        """Draw queries of one sequence.

        Args:
            sequence: Which.
            queries: How many; fewer where the sequence has fewer.
            before: Only queries before this position.
            generator: On the CPU, so that every device draws alike.
            most: Keys of the batch at most; more are thinned out evenly at random, which leaves the
                order among the rest as it is.
        """
        read = self.reads[sequence % len(self.reads)]
        count = max(int((read.positions < before).sum()), 1)
        drawn = torch.randperm(count, generator=generator)[:queries]
        visible = read.positions[drawn] + 1
        slots = int(visible.max())
        keys = read.keys[:, :slots]
        if most is not None and slots > most:
            kept = torch.randperm(slots, generator=generator)[:most].sort().values
            keys = keys[:, self._placed(kept)]
            # At least one key is seen, whatever was drawn.
            visible = torch.searchsorted(kept, visible).clamp_min(1)
            slots = most
        hidden = torch.arange(slots, device=self.device) >= self._placed(visible)[:, None]
        return Batch(read.q[:, :, self._placed(drawn)], keys, visible, hidden)

    def _placed(self, small: torch.Tensor) -> torch.Tensor:
        """On the device, without waiting for what it is doing."""
        return small.to(self.device, non_blocking=True)

    def start(self, most: int = 1 << 15) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[N, n, D]` and keys `[N, n, D]` to start from: an even sample of all."""
        q = torch.cat([read.q.flatten(1, 2) for read in self.reads], 1)
        keys = torch.cat([read.keys for read in self.reads], 1)
        return tuple(x[:, :: max(1, x.shape[1] // most)] for x in (q, keys))  # type: ignore[return-value]
