"""The share of attention that selectors keep, layer by layer.

For the last queries of a sequence: *retained mass* is the share of the GQA group's attention mass,
the mean over its query heads, that lies on the chosen keys; *kept* is that mass over what exact
top-k on summed q.k retains with the same budget; *recall* is the share of exact top-k's keys that
were chosen. Exact top-k ranks by the sum of q.k and not by mass, so kept may exceed 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hata.calibration import hashable, recorder
from hata.errors import CaptureError
from hata.evaluate.mass import group_mass, hidden_keys
from hata.evaluate.selectors import Asked, Exact, Selector

QUERIES = 256


@dataclass(frozen=True)
class Kept:
    """What a selector keeps of a model's attention at one budget.

    Attributes:
        selector: Its name.
        bits: Bits of its codes.
        tokens: Length of the sequences.
        k: Budget, in keys.
        mass: Layer -> retained mass.
        kept: Layer -> that over what exact top-k retains.
        recall: Layer -> share of exact top-k's keys that were chosen.
    """

    selector: str
    bits: int
    tokens: int
    k: int
    mass: Mapping[int, float]
    kept: Mapping[int, float]
    recall: Mapping[int, float]


def measure(
    asked: Asked, scale: float, selectors: Iterable[Selector], budgets: Sequence[int]
) -> dict[tuple[str, int, int], tuple[float, float, float]]:
    """One sequence of one layer: `(name, bits, k)` -> retained mass, exact top-k's, recall."""
    mass = torch.stack(
        [group_mass(q, keys, scale, asked.hidden)[0] for q, keys in zip(*asked[1:3], strict=True)]
    )
    seen = ~asked.hidden

    def marked(chosen: torch.Tensor) -> torch.Tensor:
        # What fills the row of a query that sees fewer keys is hidden; a key counts once.
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(2, chosen, True) & seen

    best = {k: marked(Exact().choose(asked, k)) for k in budgets}
    exact = {k: float(mass.where(best[k], 0).sum(-1).mean()) for k in budgets}
    found = {}
    for selector in selectors:
        if not selector.covers(asked.layer):
            continue
        for k in budgets:
            chosen = marked(selector.choose(asked, k))
            retained = float(mass.where(chosen, 0).sum(-1).mean())
            recall = float(((chosen & best[k]).sum(-1) / best[k].sum(-1)).mean())
            found[selector.name, selector.bits, k] = (retained, exact[k], recall)
    return found


def evaluate(
    model: Any,
    ids: np.ndarray,
    selectors: Sequence[Selector],
    budgets: Sequence[int],
    *,
    queries: int = QUERIES,
    on_sequence: Callable[[int], None] = lambda _: None,
) -> list[Kept]:
    """Let a model read, and measure every selector on every layer as it does.

    Nothing is stored: each layer that can be hashed is measured while the model attends.

    Args:
        model: Of `hata.calibration.recorder.load_model`.
        ids: `[n, T]` token ids.
        selectors: What is compared.
        budgets: In keys.
        queries: How many of the last queries are looked at.
        on_sequence: Called with how many are read.

    Raises:
        CaptureError: No layer can be hashed, or one attends with what is not finite.
    """
    # Of each selector and budget, by layer: mass, exact top-k's mass, recall, and their number.
    sums: dict[tuple[str, int, int], dict[int, np.ndarray]] = {}
    dense = hashable.dense_layers(model)

    def visit(layer: int, q: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        if layer in dense:
            return
        last = q[0, :, -queries:].float().unflatten(0, (keys.shape[1], -1))
        if not (last.isfinite().all() and keys.isfinite().all()):
            raise CaptureError(f"layer {layer}: queries or keys are not finite; mend the model")
        hidden = hidden_keys(last.shape[2], keys.shape[2], keys)
        asked = Asked(layer, last, keys[0].float(), hidden)
        for name, found in measure(asked, scale, selectors, budgets).items():
            layers = sums.setdefault(name, {})
            layers[layer] = layers.get(layer, 0.0) + np.array([*found, 1.0])

    for number, row in enumerate(ids, 1):
        recorder.read(model, torch.from_numpy(row)[None], visit)
        on_sequence(number)
    kept = []
    for (name, bits, k), layers in sums.items():
        found = sorted(layers.items())
        mass = {layer: float(total[0] / total[3]) for layer, total in found}
        over_exact = {layer: float(total[0] / total[1]) for layer, total in found}
        recall = {layer: float(total[2] / total[3]) for layer, total in found}
        kept.append(Kept(name, bits, ids.shape[1], k, mass, over_exact, recall))
    return kept
