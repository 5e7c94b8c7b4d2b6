"""The ways to choose keys that are compared, all under one budget and one rule.

A `Selector` chooses, for one sequence and one layer, which keys the queries of each KV head attend
to. None of them has sinks or recent keys for granted, except where that is its method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch

from hata.encoder import Encoder
from hata.hf.layer_plan import LayerPlan
from hata.selection import Selection


class Asked(NamedTuple):
    """Queries of one sequence in one layer, and all its keys.

    Attributes:
        layer: Which layer.
        q: `[Hkv, G, Q, D]`: the last queries, or those that `hidden` describes. Several rows of a
            batch that see alike may come together, as so many times the KV heads.
        keys: `[Hkv, S, D]`.
        hidden: `[Q, S]`: true where a query does not see a key.
    """

    layer: int
    q: torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor


class Selector(ABC):
    """A way to choose keys.

    Attributes:
        name: For tables.
        bits: Bits of what it stores of a key; 0 where that is not a code.
        guards: Whether it can be given first and last keys that it need not choose; one that
            consists of them cannot.
    """

    name: str
    bits: int = 0
    guards: bool = True

    def covers(self, layer: int) -> bool:
        """Whether it has a way to choose in this layer."""
        return True

    @abstractmethod
    def choose(self, asked: Asked, k: int) -> torch.Tensor:
        """The best k keys of every query, `[Hkv, Q, k]` int64, in any order.

        Where a query sees fewer than k keys, any others fill its row.
        """


class Exact(Selector):
    """The largest sums over the group of q.k: what every hash estimates."""

    name = "exact top-k"

    def choose(self, asked: Asked, k: int) -> torch.Tensor:
        """See `Selector`."""
        totals = asked.q.sum(1) @ asked.keys.mT
        return totals.masked_fill(asked.hidden, -torch.inf).topk(k, -1).indices


class Coded(Selector):
    """The smallest Hamming distances, summed over the group's codes, as `hata.hamming_topk` does.

    Args:
        name: For tables.
        encoder: Whose codes.
        bits: How many of its bits; all unless given.
    """

    def __init__(self, name: str, encoder: Encoder, bits: int | None = None) -> None:
        self.name, self.bits, self._encoder = name, bits or encoder.bits, encoder
        self._plans: dict[int, LayerPlan] = {}

    def covers(self, layer: int) -> bool:
        """See `Selector`: layers that the encoder leaves dense are not hashed."""
        return layer not in self._encoder.dense_layers

    def choose(self, asked: Asked, k: int) -> torch.Tensor:
        """See `Selector`."""
        scores = self.scores(asked)
        if self._encoder.key_norms:
            return lowest_first(scores.masked_fill_(asked.hidden, -torch.inf), k)
        # Whole numbers: the position can be part of the number, of which no two are equal then.
        slots = scores.shape[-1]
        edge = int(scores.abs().amax()) + 1
        wide = torch.int32 if (edge + 1) * slots < 2**31 else torch.int64
        ranked = scores.masked_fill_(asked.hidden, -edge).to(wide) * slots
        ranked -= torch.arange(slots, dtype=wide, device=scores.device)
        return ranked.topk(k, -1).indices

    def scores(self, asked: Asked) -> torch.Tensor:
        """Agreement of codes, `[Hkv, Q, S]`: whole numbers, times the norms of keys if used."""
        if asked.layer not in self._plans:
            self._plans[asked.layer] = LayerPlan(
                self._encoder, asked.layer, Selection(bits=self.bits, k=1)
            )
        kv_heads = self._encoder.shape.kv_heads
        placed = self._plans[asked.layer].on(asked.keys)
        keys = asked.keys.unflatten(0, (-1, kv_heads))  # [rows, Hkv, S, D]
        q = asked.q.unflatten(0, (-1, kv_heads)).flatten(1, 2)  # [rows, H, Q, D]
        q_signs, k_signs = placed.query_signs(q), placed.key_signs(keys)
        heads = k_signs.shape[1]
        # One key code per KV head, or one per query head, whose scores add up.
        scores = q_signs.unflatten(1, (heads, -1)).sum(2) @ k_signs.mT
        scores = scores.unflatten(1, (kv_heads, -1)).sum(2).flatten(0, 1)
        if self._encoder.key_norms:
            scores = scores * asked.keys.norm(dim=-1).half().float()[:, None]
        return scores


class Pages(Selector):
    """Bounds of q.k over pages of keys, in the manner of Quest (arXiv 2406.10774).

    A page keeps the least and the largest value of each channel; the pages with the largest bound
    of the group's summed products are taken whole. The budget counts keys, so k / page pages.
    """

    def __init__(self, page: int = 16) -> None:
        self.name, self._page = f"pages of {page} (Quest)", page

    def choose(self, asked: Asked, k: int) -> torch.Tensor:
        """See `Selector`; keys after a query count for the bound of the page that it stands in."""
        heads, slots, size = asked.keys.shape
        page = self._page
        pages = -(-slots // page)
        rest = pages * page - slots
        last = asked.keys[:, -1:].expand(heads, rest, size)
        cut = torch.cat([asked.keys, last], 1).unflatten(1, (pages, page))
        q = asked.q
        bound = (q.clamp_min(0) @ cut.amax(2)[:, None].mT).sum(1)
        bound += (q.clamp_max(0) @ cut.amin(2)[:, None].mT).sum(1)
        bound = bound.masked_fill(asked.hidden[:, ::page], -torch.inf)
        best = bound.topk(min(-(-k // page), pages), -1).indices
        chosen = (best[..., None] * page + torch.arange(page, device=q.device)).flatten(2)
        return chosen.clamp_max(slots - 1)[..., :k]


class Window(Selector):
    """The first and the last keys, in the manner of StreamingLLM (arXiv 2309.17453)."""

    guards = False

    def __init__(self, sink: int = 4) -> None:
        self.name, self._sink = f"{sink} first and the last (StreamingLLM)", sink

    def choose(self, asked: Asked, k: int) -> torch.Tensor:
        """See `Selector`."""
        slots = asked.keys.shape[1]
        sink = min(self._sink, k)
        seen = slots - asked.hidden.sum(-1, keepdim=True)
        recent = seen - torch.arange(k - sink, 0, -1, device=seen.device)
        first = torch.arange(sink, device=seen.device).expand(len(seen), -1)
        chosen = torch.cat([first, recent.clamp_min(0)], 1)
        return chosen.expand(len(asked.keys), -1, -1)


def lowest_first(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row; of equals, those at the lowest positions."""
    edge = scores.topk(k, -1).values[..., -1:]
    above = scores > edge
    level = scores == edge
    room = k - above.sum(-1, keepdim=True)
    taken = above | (level & (level.cumsum(-1) <= room))
    return taken.nonzero()[:, -1].view(*scores.shape[:-1], k)


# Those that need no encoder, by the names that the command line has for them.
WITHOUT_CODES: dict[str, Callable[[], Selector]] = {
    "exact": Exact,
    "pages": Pages,
    "window": Window,
}
