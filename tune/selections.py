"""Which bits, budget, sink and recent every layer gets: all chosen together.

The retained mass of every point of the grid is measured (`tune.quality`), and the time of a decode
step for all bits and budgets; per layer the fastest point that keeps the quality asked for wins. A
layer is left dense only where no point keeps enough, as often in the first ones. One trial of the
study is one layer with one number of bits.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass
class Chooser:
    """Chooses the selections of one run, for a backend and its tuned configurations.

    Where steps cannot be timed, `machine` predicts how long they take. Relative differences of
    times below `noise` are not believed.
    """

    task: Task
    report: Report
    ahead: Ahead
    backend: Backend
    tuned: Mapping[Problem, Config]
    machine: cost.Machine
    noise: float

    def __post_init__(self) -> None:
        options = self.task.options
        self.model, self.quick, self.required = options.model, options.quick, options.quality
        self.bits = space.bits_of(self.task.encoder.bits)
        self.sequences = QUICK_SEQUENCES if self.quick or not self.model else SEQUENCES
        # Nothing can be learned about positions from a set that has none.
        self.guards = quality.GUARDS if self.model else quality.GUARDS[:1]
        self.captured: capture.Captured | None = None
        # Of one layer at a time.
        self.gauge: tuple[int, quality.Gauge] | None = None
        # Of a step, by bits and budget.
        self.us: dict[tuple[int, int], float] = {}

    def run(self, storage: Any) -> tuple[SelectionSet | None, list[list[str]]]:
        """Measure what the studies do not know, and choose; returns rows of the table, too."""
        task, layout = self.task, self.task.layout
        tokens = min(capture.TOKENS, layout.context) if self.model else capture.TOKENS
        self.us = self._step_times(tokens)
        hashed = [i for i in range(layout.layers) if i not in task.encoder.dense_layers]
        layers = hashed if self.model else [0]
        points = [{"layer": layer, "bits": bits} for layer in layers for bits in self.bits]
        notes, resume = f"retained attention mass of {layout.name}", task.options.resume
        study = studies.open_study(storage, self._study_name(), resume=resume, notes=notes)
        with self.report.watching(len(points), "selections"):
            self.report.begin("reading text" if self.model else "synthetic set")
            found = studies.sweep(study, points, self._evaluate, lambda _: self.report.advance())
        tables: dict[int, list[quality.Point]] = {}
        for point, result in zip(points, found, strict=True):
            tables.setdefault(point["layer"], []).extend(quality.Point(*p) for p in result["table"])
        length = next((result["tokens"] for result in found if result["tokens"]), tokens)
        if length != tokens:
            # The text was shorter than the context that steps were timed at.
            self.us = self._step_times(length)
        return self._settle(tables, length)

    def _study_name(self) -> str:
        task = self.task
        projections = [p for p in task.encoder.projections if p is not None]
        key = studies.digest(
            task.layout, task.encoder_key, task.encoder.key_norms,
            [hashlib.sha256(p.tobytes()).hexdigest() for p in projections],
            hashlib.sha256(task.text.encode()).hexdigest(), self.sequences,
            (capture.TOKENS, capture.QUERIES, quality.SHARES, self.guards), self.backend.name,
            self.backend.kernel_hash("hamming_topk"),
        )  # fmt: skip
        return f"hata/selection/{task.layout.name[:64]}/{key}"

    def _evaluate(self, point: Mapping[str, int]) -> dict[str, Any]:
        """One trial: all budgets and guards of a layer with one number of bits."""
        gauge, tokens = self._gauge_of(point["layer"])
        if gauge is None:
            return {"value": 0.0, "constraints": {"quality": 1.0}, "tokens": 0, "table": []}
        table = quality.grid(gauge, point["bits"], tokens, self.guards)
        able = [self.us.get((p.bits, p.k), 0.0) for p in table if p.quality >= self.required]
        return {
            "value": min(able, default=max(self.us.values())),
            "constraints": {"quality": self.required - max(p.quality for p in table)},
            "tokens": tokens,
            "table": table,
        }

    def _gauge_of(self, layer: int) -> tuple[quality.Gauge | None, int]:
        """The gauge of a layer, one at a time; text is read when the first one is needed."""
        task, count = self.task, self.sequences
        device = task.fingerprint.device
        if self.captured is None:
            if self.model is None:
                self.captured = capture.synthetic(task.layout, sequences=count)
            else:
                self.captured = capture.capture(
                    self.model, task.text, device=device, sequences=count
                )
            self.report.begin("retained mass")
        probe = self.captured.probes.get(layer)
        if probe is None:
            return None, self.captured.tokens
        if self.gauge is None or self.gauge[0] != layer:
            self.gauge = layer, quality.Gauge(self.backend, device, probe, task.encoder, layer)
        return self.gauge[1], self.captured.tokens

    def _settle(
        self, tables: Mapping[int, Sequence[quality.Point]], tokens: int
    ) -> tuple[SelectionSet | None, list[list[str]]]:
        task, layout, model = self.task, self.task.layout, self.model
        chosen: list[Selection | None] = []
        rows, achieved = [], [1.0]
        for layer in range(layout.layers) if model else [0]:
            points = tables.get(layer, ())
            point = quality.choose(points, self.us, self.required, self.noise)
            if point is None:
                chosen.append(None)
                if not points:
                    self.report.note(f"  layer {layer} stays dense: {self._why_dense(layer)}")
            else:
                dense_layers = 0 if model else DENSE_LAYERS
                chosen.append(quality.selection_of(point, tokens, layout.context, dense_layers))
                achieved.append(point.quality)
            rows.append(layer_row(str(layer) if model else "any", point, self.us, points))
        layers = tuple(chosen) if model else chosen[0]
        if layers is None:
            self.report.note("no selection keeps enough of the synthetic set; none is written")
            return None, rows
        source = "measured" if model else "synthetic"
        sizes = layout.layers, layout.heads, layout.kv_heads, layout.head_dim
        key = ModelKey(layout.name if model else source, layout.model_type, *sizes)
        # Layers that are dense keep everything.
        kept = Quality(self.required, round(min(achieved), 4))
        return SelectionSet(key, task.encoder_key, source, kept, layers), rows

    def _why_dense(self, layer: int) -> str:
        if layer in self.task.encoder.dense_layers:
            return "the encoder leaves it so"
        return (self.captured.dense if self.captured else {}).get(layer, "it cannot be hashed")

    def _step_times(self, tokens: int) -> dict[tuple[int, int], float]:
        """Microseconds of a decode step for every number of bits and budget of the grid."""
        layout, device, backend = self.task.layout, self.task.fingerprint.device, self.backend
        dtype = space.dtypes_of(layout, device, backend.dtypes)[0]
        grid = space.Grid(layout, device, self.task.encoder.key_norms)
        points = [(bits, k) for bits in self.bits for k in quality.budgets(tokens)]
        problems = [grid.step(dtype, bits, tokens, k) for bits, k in points]
        steps = [(p, space.nearest_config(p, self.tuned, backend.default(p))) for p in problems]
        try:
            # Few sets of inputs for each, so that all fit into memory together.
            with Worker(backend.name, pool=24 << 20, keep=len(points)) as worker:
                worker.start()
                self.ahead.prefer(backend.name, steps)
                self.ahead.wait(backend.name, steps)
                samples = worker.race(steps, 1.0 if self.quick else 2.0, least=15)
            us = map(statistics.median, samples)
        except CandidateFailed as error:
            self.report.note(
                f"  steps could not be timed ({error.failure}); their times are predicted"
            )
            us = (cost.predict_us(*step, self.machine) for step in steps)
        return dict(zip(points, us, strict=True))
