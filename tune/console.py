"""What people see: progress on stderr, tables and the profile's path on stdout.

Where no terminal is, the same is said in plain lines, one a problem, so that logs stay short.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hata.problem import Problem
from tune.quality import Point
from tune.search import Verdict
from tune.space import shape_text
from tune.worker import Failure

KERNEL_HEADER = ("op", "shape", "backend", "default µs", "tuned µs", "ratio", "noise", "tried")
LAYER_HEADER = ("layer", "bits", "k", "sink", "recent", "µs", "kept", "exact", "quality")


class Report:
    """Tells people what happens."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, emoji=False)
        self._progress = Progress(disable=True)
        self._task = self._progress.add_task("")
        self._title = ""

    def note(self, text: str) -> None:
        """Say something that is not a result."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """Say something that is a result."""
        print(text, flush=True)

    @contextmanager
    def watching(self, total: int, what: str) -> Iterator[None]:
        """A progress display around `total` steps, where somebody looks."""
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self._console, transient=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._progress.add_task(what, total=total)
        with self._progress:
            yield

    def begin(self, title: str) -> None:
        """A step begins."""
        self._title = title
        self._progress.update(self._task, description=title)

    def trial(self, done: int, best: float, failure: Failure | None) -> None:
        """A configuration was measured."""
        if failure is not None:
            self.note(f"  {self._title}: a configuration failed, {failure}")
        gain = f"{1 / best:.2f}x" if best < 1 else "default"
        text = f"{self._title}  {done} tried, best {gain}"
        self._progress.update(self._task, description=text)

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        self._progress.advance(self._task, steps)

    def done(self, title: str, verdict: Verdict) -> None:
        """A problem is finished."""
        self.advance()
        default, tuned = verdict.default_us.median, verdict.us.median
        self.note(
            f"  {title}: {default:.1f} -> {tuned:.1f} µs "
            f"({default / tuned:.2f}x, {verdict.trials} tried, {verdict.stopped})"
        )

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of results; numbers stand right, and a column that says nothing is left out."""
        columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
        right = [all(map(_is_number, cells)) for _, *cells in columns]
        if sys.stdout.isatty():
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for (name, *_), is_right in zip(columns, right, strict=True):
                # Where a terminal is narrow, shapes fold and nothing else.
                folds, justify = name == "shape", "right" if is_right else "left"
                width = 20 if folds else None
                table.add_column(name, justify=justify, no_wrap=not folds, min_width=width)
            for row in zip(*(cells for _, *cells in columns), strict=True):
                table.add_row(*row)
            Console().print(table)
            return
        padded = []
        for column, is_right in zip(columns, right, strict=True):
            width = max(map(len, column))
            padded.append([c.rjust(width) if is_right else c.ljust(width) for c in column])
        self.say(title)
        for row in zip(*padded, strict=True):
            self.say(("  " + "  ".join(row)).rstrip())


def _is_number(text: str) -> bool:
    digits = text.rstrip("x%").replace(".", "").replace(",", "").lstrip("-")
    return digits.isdecimal() or text == ""


def kernel_row(problem: Problem, backend: str, verdict: Verdict) -> list[str]:
    """A row of the table of kernels; see `KERNEL_HEADER`."""
    default, tuned = verdict.default_us.median, verdict.us.median
    return [
        problem.op, shape_text(problem), backend, f"{default:.1f}", f"{tuned:.1f}",
        f"{default / tuned:.2f}x", f"{100 * verdict.noise:.1f}%", str(verdict.trials),
    ]  # fmt: skip


def layer_row(
    layer: str, point: Point | None, us: Mapping[tuple[int, int], float], points: Sequence[Point]
) -> list[str]:
    """A row of the table of selections; see `LAYER_HEADER`. Dense layers tell the best of all."""
    if point is None:
        best = f"{max(p.quality for p in points):.3f}" if points else ""
        return [layer, "dense", *[""] * 6, best]
    sizes = map(str, (point.bits, point.k, point.sink, point.recent))
    shares = (f"{share:.3f}" for share in (point.kept, point.exact, point.quality))
    return [layer, *sizes, f"{us[point.bits, point.k]:.1f}", *shares]
