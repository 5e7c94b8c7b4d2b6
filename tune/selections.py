"""Which bits, budget, sink and recent every layer gets: all chosen together.

The retained mass of every point of the grid is measured (`tune.quality`), and the time of a decode
step for all bits and budgets; per layer the fastest point that keeps the quality asked for wins. No
layer is dense by decree: one is left dense where no point keeps enough, which the first layers of a
model often are. One trial of the study is one layer with one number of bits.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hata.backend import Backend, Config
from hata.problem import Problem
from hata.profile import ModelKey, Quality, SelectionSet
from hata.selection import Selection
from tune import capture, cost, quality, space, studies
from tune.ahead import Ahead
from tune.console import Report, layer_row
from tune.task import Task
from tune.worker import CandidateFailed, Worker

# Layers that a selection for any model leaves dense, as HATA does.
DENSE_LAYERS = 2
SEQUENCES, QUICK_SEQUENCES = 2, 1


class Chosen(NamedTuple):
    """Outcome: what goes into the profile, and the rows of the table."""

    selections: SelectionSet | None
    rows: list[list[str]]


class Chooser:
    """Chooses the selections of one run.

    Args:
        task, report, ahead: Of the session.
        backend, tuned: What runs hash attention, and its tuned configurations.
        machine: Constants for predictions, where a step cannot be timed.
        noise: Relative difference of times that is not believed.
    """

    def __init__(
        self,
        task: Task,
        report: Report,
        backend: Backend,
        ahead: Ahead,
        tuned: Mapping[Problem, Config],
        machine: cost.Machine,
        noise: float,
    ) -> None:
        self._task, self._report, self._backend, self._ahead = task, report, backend, ahead
        self._tuned, self._machine, self._noise = tuned, machine, noise
        self._quick, self._required = task.options.quick, task.options.quality
        self._bits = space.bits_of(task.encoder.bits)
        self._sequences = QUICK_SEQUENCES if self._quick or not task.model else SEQUENCES
        # Nothing can be learned about positions from a set that has none.
        self._guards = quality.GUARDS if task.model else quality.GUARDS[:1]
        self._captured: capture.Captured | None = None
        self._gauge: tuple[int, quality.Gauge] | None = None
        self._us: dict[tuple[int, int], float] = {}

    def run(self, storage: Any) -> Chosen:
        """Measure what is not known to the studies of a storage, and choose."""
        task = self._task
        tokens = min(capture.TOKENS, task.layout.context) if task.model else capture.TOKENS
        self._us = self._step_times(tokens)
        hashed = [i for i in range(task.layout.layers) if i not in task.encoder.dense_layers]
        layers = hashed if task.model else [0]
        points = [{"layer": layer, "bits": bits} for layer in layers for bits in self._bits]
        notes, resume = f"retained attention mass of {task.layout.name}", task.options.resume
        study = studies.open_study(storage, self._study_name(), resume=resume, notes=notes)
        with self._report.watching(len(points), "selections"):
            self._report.begin("reading text" if task.model else "synthetic set")
            found = studies.sweep(study, points, self._evaluate, lambda _: self._report.advance())
        tables: dict[int, list[quality.Point]] = {}
        for point, result in zip(points, found, strict=True):
            tables.setdefault(point["layer"], []).extend(quality.Point(*p) for p in result["table"])
        length = next((result["tokens"] for result in found if result["tokens"]), tokens)
        if length != tokens:
            # The text was shorter than the context that steps were timed at.
            self._us = self._step_times(length)
        return self._settle(tables, length)

    def _study_name(self) -> str:
        task = self._task
        projections = [p for p in task.encoder.projections if p is not None]
        key = studies.digest(
            task.layout, task.encoder_key, task.encoder.key_norms,
            [hashlib.sha256(p.tobytes()).hexdigest() for p in projections],
            hashlib.sha256(task.text.encode()).hexdigest(), self._sequences,
            (capture.TOKENS, capture.QUERIES, quality.SHARES, self._guards), self._backend.name,
            self._backend.kernel_hash("hamming_topk"),
        )  # fmt: skip
        return f"hata/selection/{task.layout.name[:64]}/{key}"

    def _evaluate(self, point: Mapping[str, int]) -> dict[str, Any]:
        """One trial: all budgets and guards of a layer with one number of bits."""
        gauge, tokens = self._gauge_of(point["layer"])
        if gauge is None:
            return {"value": 0.0, "constraints": {"quality": 1.0}, "tokens": 0, "table": []}
        table = quality.grid(gauge, point["bits"], tokens, self._guards)
        able = [self._us.get((p.bits, p.k), 0.0) for p in table if p.quality >= self._required]
        return {
            "value": min(able, default=max(self._us.values())),
            "constraints": {"quality": self._required - max(p.quality for p in table)},
            "tokens": tokens,
            "table": table,
        }

    def _gauge_of(self, layer: int) -> tuple[quality.Gauge | None, int]:
        """The gauge of a layer, one at a time; text is read when the first one is needed."""
        task = self._task
        if self._captured is None:
            if task.model is None:
                self._captured = capture.synthetic(task.layout, sequences=self._sequences)
            else:
                self._captured = capture.capture(
                    task.model, task.text, device=task.device, sequences=self._sequences
                )
            self._report.begin("retained mass")
        probe = self._captured.probes.get(layer)
        if probe is None:
            return None, self._captured.tokens
        if self._gauge is None or self._gauge[0] != layer:
            gauge = quality.Gauge(self._backend, task.device, probe, task.encoder, layer)
            self._gauge = (layer, gauge)
        return self._gauge[1], self._captured.tokens

    def _settle(self, tables: Mapping[int, Sequence[quality.Point]], tokens: int) -> Chosen:
        task, layout = self._task, self._task.layout
        chosen: list[Selection | None] = []
        rows, achieved = [], [1.0]
        for layer in range(layout.layers) if task.model else [0]:
            points = tables.get(layer, ())
            point = quality.choose(points, self._us, self._required, self._noise)
            if point is None:
                chosen.append(None)
                if not points:
                    self._report.note(f"  layer {layer} stays dense: {self._why_dense(layer)}")
            else:
                dense_layers = 0 if task.model else DENSE_LAYERS
                chosen.append(quality.selection_of(point, tokens, layout.context, dense_layers))
                achieved.append(point.quality)
            name = str(layer) if task.model else "any"
            rows.append(layer_row(name, point, self._us, points))
        layers = tuple(chosen) if task.model else chosen[0]
        if layers is None:
            self._report.note("no selection keeps enough of the synthetic set; none is written")
            return Chosen(None, rows)
        source = "measured" if task.model else "synthetic"
        sizes = layout.layers, layout.heads, layout.kv_heads, layout.head_dim
        key = ModelKey(layout.name if task.model else source, layout.model_type, *sizes)
        # Layers that are dense keep everything.
        kept = Quality(self._required, round(min(achieved), 4))
        return Chosen(SelectionSet(key, task.encoder_key, source, kept, layers), rows)

    def _why_dense(self, layer: int) -> str:
        if layer in self._task.encoder.dense_layers:
            return "the encoder leaves it so"
        return (self._captured.dense if self._captured else {}).get(layer, "it cannot be hashed")

    def _step_times(self, tokens: int) -> dict[tuple[int, int], float]:
        """Microseconds of a decode step for every number of bits and budget of the grid."""
        task, backend = self._task, self._backend
        dtype = space.dtypes_of(task.layout, task.device, backend.dtypes)[0]
        grid = space.Grid(task.layout, task.device, task.encoder.key_norms)
        points = [(bits, k) for bits in self._bits for k in quality.budgets(tokens)]
        problems = [grid.step(dtype, bits, tokens, k) for bits, k in points]
        entries = [(p, space.nearest_config(p, self._tuned, backend.default(p))) for p in problems]
        try:
            # Few sets of inputs for each, so that all fit into memory together.
            with Worker(backend.name, pool=24 << 20, keep=len(points)) as worker:
                worker.start()
                self._ahead.prefer(backend.name, entries)
                self._ahead.wait(backend.name, entries)
                samples = worker.race(entries, 1.0 if self._quick else 2.0, least=15)
        except CandidateFailed as error:
            self._report.note(
                f"  steps could not be timed ({error.failure}); their times are predicted"
            )
            us = [cost.predict_us(*entry, self._machine) for entry in entries]
        else:
            us = map(statistics.median, samples)
        return dict(zip(points, us, strict=True))
