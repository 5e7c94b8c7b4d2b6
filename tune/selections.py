"""Which bits, budget, sink and recent every layer gets: all chosen together.

The retained mass of every point of the grid is measured (`tune.quality`), and the time of a decode
step for all bits and budgets; per layer the fastest point that keeps the quality asked for wins. No
layer is dense by decree: one is left dense where no point keeps enough, which the first layers of a
model often are. One trial of the study is one layer with one number of bits.
"""

from __future__ import annotations

import dataclasses
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
        task: What the run is to do.
        report: Told what happens.
        backend: Runs hash attention.
        tuned: Its tuned configurations.
        machine: Constants for predictions, where a step cannot be timed.
        noise: Relative difference of times that is not believed.
        quick: Whether to read less text and time for less long.
        ahead: Compiles what is timed.
    """

    def __init__(
        self,
        task: Task,
        report: Report,
        backend: Backend,
        tuned: Mapping[Problem, Config],
        machine: cost.Machine,
        noise: float,
        quick: bool,
        ahead: Ahead,
    ) -> None:
        self._task, self._report, self._backend, self._ahead = task, report, backend, ahead
        self._tuned, self._machine, self._noise, self._quick = tuned, machine, noise, quick
        self._bits = space.bits_of(task.encoder.bits)
        # Nothing can be learned about positions from a set that has none.
        self._guards = quality.GUARDS if task.model else quality.GUARDS[:1]
        self._captured: capture.Captured | None = None
        self._gauge: tuple[int, quality.Gauge] | None = None

    def run(self, storage: Any, required: float, resume: bool) -> Chosen:
        """Measure what is not known, and choose.

        Args:
            storage: Of `studies.open_storage`.
            required: Share of what exact top-k keeps.
            resume: Whether to use what an earlier run measured.
        """
        task = self._task
        tokens = min(capture.TOKENS, task.layout.context) if task.model else capture.TOKENS
        us = self._step_times(tokens)
        hashed = [i for i in range(task.layout.layers) if i not in task.encoder.dense_layers]
        layers = hashed if task.model else [0]
        points = [{"layer": layer, "bits": bits} for layer in layers for bits in self._bits]

        def evaluate(point: Mapping[str, int]) -> dict[str, Any]:
            return self._evaluate(point["layer"], point["bits"], us, required)

        notes = f"retained attention mass of {task.layout.name}"
        study = studies.open_study(storage, self._study_name(), resume=resume, notes=notes)
        with self._report.watching(len(points), "selections"):
            self._report.begin("reading text" if task.model else "synthetic set")
            found = studies.sweep(study, points, evaluate, lambda _: self._report.advance())
        tables: dict[int, list[quality.Point]] = {}
        length = tokens
        for point, result in zip(points, found, strict=True):
            table = [quality.Point(*row) for row in result["table"]]
            tables.setdefault(point["layer"], []).extend(table)
            length = result["tokens"] or length
        if length != tokens:
            # The text was shorter than the context that steps were timed at.
            us = self._step_times(length)
        return self._settle(tables, us, length, required)

    def _study_name(self) -> str:
        task = self._task
        projections = [p for p in task.encoder.projections if p is not None]
        key = studies.digest(
            task.layout,
            task.encoder_key,
            task.encoder.key_norms,
            [hashlib.sha256(p.tobytes()).hexdigest() for p in projections],
            hashlib.sha256(task.text.encode()).hexdigest(),
            self._sequences,
            (capture.TOKENS, capture.QUERIES, quality.SHARES, self._guards),
            self._backend.name,
            self._backend.kernel_hash("hamming_topk"),
        )
        return f"hata/selection/{task.layout.name[:64]}/{key}"

    @property
    def _sequences(self) -> int:
        return QUICK_SEQUENCES if self._quick or not self._task.model else SEQUENCES

    def _evaluate(
        self, layer: int, bits: int, us: Mapping[tuple[int, int], float], required: float
    ) -> dict[str, Any]:
        """One trial: all budgets and guards of a layer with one number of bits."""
        gauge, tokens = self._gauge_of(layer)
        if gauge is None:
            return {"value": 0.0, "constraints": {"quality": 1.0}, "tokens": 0, "table": []}
        table = quality.grid(gauge, bits, tokens, self._guards)
        able = [us.get((p.bits, p.k), 0.0) for p in table if p.quality >= required]
        return {
            "value": min(able, default=max(us.values())),
            "constraints": {"quality": required - max(p.quality for p in table)},
            "tokens": tokens,
            "table": [dataclasses.astuple(p) for p in table],
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

    def _settle(
        self,
        tables: Mapping[int, Sequence[quality.Point]],
        us: Mapping[tuple[int, int], float],
        tokens: int,
        required: float,
    ) -> Chosen:
        task, layout = self._task, self._task.layout
        chosen: list[Selection | None] = []
        rows: list[list[str]] = []
        achieved = []
        for layer in range(layout.layers) if task.model else [0]:
            points = tables.get(layer, ())
            name = str(layer) if task.model else "any"
            point = quality.choose(points, us, required, self._noise) if points else None
            if point is None:
                best = max((p.quality for p in points), default=None)
                chosen.append(None)
                rows.append(layer_row(name, None, None, 0.0, best))
                if not points:
                    self._report.note(f"  layer {layer} stays dense: {self._why_dense(layer)}")
                continue
            dense_layers = 0 if task.model else DENSE_LAYERS
            chosen.append(quality.selection_of(point, tokens, layout.context, dense_layers))
            achieved.append(point.quality)
            rows.append(layer_row(name, chosen[-1], point, us[point.bits, point.k], point.quality))
        layers = tuple(chosen) if task.model else chosen[0]
        if layers is None:
            self._report.note("no selection keeps enough of the synthetic set; none is written")
            return Chosen(None, rows)
        source = "measured" if task.model else "synthetic"
        key = ModelKey(
            layout.name if task.model else source,
            *(layout.model_type, layout.layers, layout.heads, layout.kv_heads, layout.head_dim),
        )
        # Layers that are dense keep everything.
        kept = Quality(required, min(1.0, round(min(achieved, default=1.0), 4)))
        return Chosen(SelectionSet(key, task.encoder_key, source, kept, layers), rows)

    def _why_dense(self, layer: int) -> str:
        if layer in self._task.encoder.dense_layers:
            return "the encoder leaves it so"
        return (self._captured.dense if self._captured else {}).get(layer, "it cannot be hashed")

    def _step_times(self, tokens: int) -> dict[tuple[int, int], float]:
        """Microseconds of a decode step for every number of bits and budget of the grid."""
        task, backend = self._task, self._backend
        dtypes = space.dtypes_of(task.layout, task.device, backend.dtypes)
        dtype = (dtypes or sorted(backend.dtypes))[0]
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
