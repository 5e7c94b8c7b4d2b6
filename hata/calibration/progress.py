"""What a person sees of a training: one line that moves, lines that stay, a plot at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Progress:
    """Lines on stderr; the moving one only where it is a terminal.

    Args:
        quiet: Say nothing, as all processes but the first do.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._stream = sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._start = time.monotonic()
        self._width = 0

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        self._clear()
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", file=self._stream, flush=True)

    def show(self, text: str) -> None:
        """The line that moves."""
        if not self._live:
            return
        self._clear()
        self._stream.write(text[:120])
        self._stream.flush()
        self._width = len(text[:120])

    def _clear(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def blank_figure(width: float, height: float) -> Any:
    """A figure of matplotlib to draw on, in inches; `None` where that is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def plot(path: Path, histories: Mapping[int, Sequence[Mapping[str, Any]]], title: str) -> bool:
    """Draw the loss and the held-out quality of every layer; whether matplotlib is there.

    Args:
        path: Image to write.
        histories: Layer -> points with `step`, `loss` and `kept` (bits -> share of exact top-k).
        title: Of the figure.
    """
    figure = blank_figure(11, 4)
    if figure is None:
        return False
    loss, kept, last = figure.subplots(1, 3)
    ends: dict[str, list[float]] = {}
    for layer, points in sorted(histories.items()):
        steps = [point["step"] for point in points]
        loss.plot(steps, [point["loss"] for point in points], label=f"layer {layer}")
        widest = max(points[-1]["kept"], key=int, default=None)
        if widest is None:
            continue
        kept.plot(steps, [point["kept"][widest] for point in points])
        for bits, share in points[-1]["kept"].items():
            ends.setdefault(bits, []).append(share)
    for bits, shares in ends.items():
        last.plot(sorted(histories)[: len(shares)], shares, marker=".", label=f"{bits} bits")
    loss.set(title="loss", xlabel="step")
    kept.set(title="held-out mass over exact top-k, all bits", xlabel="step")
    last.set(title="the same at the end", xlabel="layer")
    loss.legend(fontsize=6)
    if ends:
        last.legend(fontsize=6)
    figure.suptitle(title)
    figure.savefig(path)
    return True
