"""`Selection`: which keys a layer may attend to."""

from __future__ import annotations

from dataclasses import dataclass

from hata import arguments
from hata.encoder.layer import MOST_BITS
from hata.errors import HataShapeError


@dataclass(frozen=True, slots=True)
class Selection:
    """The policy of one layer, or of all layers of a model.

    Attributes:
        bits: Bits of a code; a multiple of 32, at most 65536.
        k: Key budget: the most keys one KV head may attend to in one step.
        ratio: Share of the visible keys to attend to, in (0, 1]; the budget of a query is then
            `min(k, max(1, k_min, sink + recent, floor(visible * ratio)))`. `None`: the budget is k.
        k_min: Fewest keys when `ratio` is given.
        sink: How many of the first visible keys are always attended to, within the budget.
        recent: How many of the last visible keys are always attended to, within the budget.
        dense_layers: How many of the first layers stay dense, where one `Selection` stands for
            all layers of a model (HATA keeps two, arXiv 2506.02572).
        min_length: Visible keys at or below which a query attends to all of them. `None`: the
            budget decides alone.
    """

    bits: int
    k: int
    ratio: float | None = None
    k_min: int = 0
    sink: int = 0
    recent: int = 0
    dense_layers: int = 2
    min_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "k", "k_min", "sink", "recent", "dense_layers", "min_length"):
            value = getattr(self, name)
            if value is None and name == "min_length":
                continue
            object.__setattr__(self, name, arguments.whole(f"Selection.{name}", value, 0))
        if not 32 <= self.bits <= MOST_BITS or self.bits % 32:
            raise HataShapeError(
                f"Selection.bits: got {self.bits}, expected a positive multiple of 32, at most "
                f"{MOST_BITS}"
            )
        if self.k < 1:
            raise HataShapeError(f"Selection.k: got {self.k}, k must be ≥ 1")
        if self.k >= 2**31:
            raise HataShapeError(f"Selection.k: got {self.k}, expected less than 2**31")
        if self.ratio is not None:
            object.__setattr__(self, "ratio", arguments.real("Selection.ratio", self.ratio))
            if not 0.0 < self.ratio <= 1.0:
                raise HataShapeError(f"Selection.ratio: got {self.ratio}, expected 0 < ratio <= 1")
        if self.sink + self.recent > self.k:
            raise HataShapeError(
                f"Selection.sink + Selection.recent: got {self.sink} + {self.recent}, expected at "
                f"most k = {self.k}; they count within the budget, so raise k or lower them"
            )
