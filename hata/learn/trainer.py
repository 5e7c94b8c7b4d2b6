"""`Training`: capture, then train a layer at a time, over all ranks; resumable at every file.

What is finished lies in the working folder: captured sequences, and a file per trained layer with
its history. A run that was cut off goes on with the first sequence or layer that is missing; since
every layer starts from the seed, the result is the same as if it had not been.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hata.calibration.progress import Progress
from hata.calibration.text import first_line
from hata.encoder import Encoder, ModelShape
from hata.encoder import file as encoder_file
from hata.encoder.encoder import of_layers
from hata.encoder.layer import LayerHash
from hata.errors import EncoderError, LearnError
from hata.learn import capture
from hata.learn.judge import Judge
from hata.learn.listwise import prefixes_of
from hata.learn.plan import Plan
from hata.learn.ranks import Ranks
from hata.learn.recipe import Recipe
from hata.learn.samples import LayerSamples

# How often the held-out sequence is looked at while a layer is trained.
LOOKS = 4
# On a CPU; each has its samples in memory.
LAYERS_AT_ONCE = 4


class Outcome(NamedTuple):
    """What a training made.

    Attributes:
        encoder: The encoder.
        histories: Layer -> points of `step`, `loss` and `kept` (bits -> share of exact top-k that
            the held-out sequence keeps).
        dense: Layer -> why it stays dense.
    """

    encoder: Encoder
    histories: dict[int, list[dict[str, Any]]]
    dense: dict[int, str]


@dataclass(frozen=True)
class Training:
    """A training, on one of the ranks that share it.

    Attributes:
        plan: What to do.
        recipe: How.
        shape: The model's sizes.
        load: Makes the model, for capture; called only where something is to be captured.
        ids: `[n, T]` token ids; the last sequence is held out.
        folder: Working folder, prepared.
        store: Folder for what is captured, prepared; it may hold some of it already.
        device: Where to train.
        ranks: Who shares the work.
        progress: Told what happens.
        asked: For each sequence that asks back, the positions that do.
    """

    plan: Plan
    recipe: Recipe
    shape: ModelShape
    load: Callable[[], Any]
    ids: np.ndarray
    folder: Path
    store: Path
    device: str
    ranks: Ranks
    progress: Progress
    asked: Sequence[np.ndarray] = ()

    def run(self) -> Outcome | None:
        """Capture, and train what is missing: the outcome on rank 0, `None` on the others."""
        dense = self._captured()
        layers = [layer for layer in self.plan.layers if layer not in dense]
        missing = [i for i in self.ranks.share(layers) if not self._file(i).is_file()]
        stop = threading.Event()
        with _side_by_side(self.device) as several:
            try:
                for _ in several(lambda layer: self._train(layer, stop), missing):
                    pass
            finally:
                # Cut off: what runs beside is not waited for to the end.
                stop.set()
        self.ranks.meet()
        return None if self.ranks.rank else self._outcome(layers, dense)

    def _captured(self) -> dict[int, str]:
        """Let this rank's sequences be read; what all ranks found to be dense."""
        plan, count = self.plan, len(self.ids)
        mine = self.ranks.share(range(count))
        # A model spread over all GPUs is there once.
        if self.device == "spread":
            mine = [] if self.ranks.rank else list(range(count))
        started = time.monotonic()
        missing = [i for i in mine if not capture.is_whole(self.store, i, plan.layers)]
        if missing:
            self.progress.note(f"loading {plan.capture.model}")
            capture.capture(
                self.load(),
                self.ids,
                self.store,
                sequences=missing,
                layers=plan.layers,
                queries=plan.capture.queries,
                seed=plan.capture.seed,
                asked=self.asked,
                on_sequence=lambda i: self.progress.show(f"capture: sequence {i + 1} of {count}"),
            )
            self.progress.note(
                f"captured {len(missing)} sequences of {self.ids.shape[1]} tokens in "
                f"{time.monotonic() - started:.1f} s{_peak(self.device)}"
            )
        self.ranks.meet()
        dense: dict[int, str] = {}
        for i in range(count):
            dense |= capture.refused(self.store, i)
        return {layer: why for layer, why in dense.items() if layer in plan.layers}

    def _train(self, layer: int, stop: threading.Event) -> None:
        """Train one layer and write its file, unless stopped before."""
        plan = self.plan
        device = "cuda" if self.device == "spread" else self.device
        started = time.monotonic()
        *learned_from, held_out = range(plan.capture.sequences)
        samples = LayerSamples.load(self.store, layer, learned_from, device)
        held = LayerSamples.load(self.store, layer, [held_out], device)
        judge = Judge(held, self.shape, plan.bits)
        bits = prefixes_of(plan.bits) if self.recipe.nested else (plan.bits,)
        history: list[dict[str, Any]] = []
        looks = {(plan.steps - 1) * (i + 1) // LOOKS for i in range(LOOKS)} | {0}

        def watch(step: int, loss: torch.Tensor, export: Callable[[], LayerHash]) -> None:
            if stop.is_set():
                raise CancelledError
            if step in looks:
                kept = judge(export(), bits)
                history.append({"step": step, "loss": float(loss), "kept": kept})
            if step % 10 == 0:
                self.progress.show(
                    f"layer {layer}: step {step + 1} of {plan.steps}, loss {loss:.3f}; held out: "
                    f"{_told(history[-1]['kept'])}"
                )

        try:
            with _fast_products(device):
                seed = plan.seed * 1000 + layer
                learned = self.recipe.train(samples, plan.bits, plan.steps, seed, watch)
        except torch.linalg.LinAlgError as error:  # type: ignore[reportPrivateImportUsage]
            raise LearnError(
                f"--model: layer {layer} attends with queries or keys that nothing can be learned "
                f"from ({first_line(error)}); check the weights, or leave it out with --layers"
            ) from None
        history[-1]["kept"] = judge(learned, bits)
        self.progress.note(
            f"layer {layer}: {plan.steps} steps in {time.monotonic() - started:.1f} s, loss "
            f"{history[-1]['loss']:.3f}; held-out mass over exact top-k: "
            f"{_told(history[-1]['kept'])}{_peak(device)}"
        )
        path = self._file(layer)
        try:
            encoder_file.write(
                path, encoder_file.flattened([learned]), {"history": json.dumps(history)}
            )
        except OSError as error:
            raise LearnError(
                f"{path} cannot be written ({error.strerror or error}); free space, then go on "
                "with --resume"
            ) from None

    def _outcome(self, layers: list[int], dense: dict[int, str]) -> Outcome:
        plan = self.plan
        found = [LayerHash(None)] * self.shape.num_layers
        histories = {}
        for layer in layers:
            histories[layer], tensors = _read_layer(self._file(layer))
            (found[layer],) = encoder_file.assembled(self._file(layer), tensors, 1, more=True)
        made = {
            "recipe": plan.recipe,
            "settings": json.loads(plan.settings),
            "model": plan.capture.model,
            "steps": plan.steps,
            "sequences": plan.capture.sequences - 1,
            "tokens": plan.capture.tokens,
            "recall": plan.capture.recall,
            "seed": plan.seed,
            "text": plan.capture.text,
        }
        return Outcome(of_layers(self.shape, plan.bits, found, made=made), histories, dense)

    def _file(self, layer: int) -> Path:
        return self.folder / "layers" / f"layer_{layer:03d}.safetensors"


def _told(kept: Mapping[str, float]) -> str:
    return ", ".join(f"{bits} bits {share:.3f}" for bits, share in kept.items())


def _read_layer(path: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """History and tensors of a trained layer."""
    try:
        header, tensors = encoder_file.read_tensors(path)
        return json.loads(header["history"]), tensors
    except (EncoderError, KeyError, ValueError) as error:
        raise LearnError(
            f"{path} is damaged ({first_line(error)}); delete it, then go on with --resume"
        ) from None


def _peak(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return f"; peak device memory so far {peak:.1f} GiB"


@contextmanager
def _side_by_side(device: str) -> Iterator[Callable[..., Iterator[None]]]:
    """A `map` that works on a few layers at once on a CPU.

    Its cores do more each with a layer of their own than all of them with one.
    """
    if device != "cpu":
        yield map
        return
    cores = torch.get_num_threads()
    workers = min(cores, LAYERS_AT_ONCE)
    torch.set_num_threads(cores // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(cores)


@contextmanager
def _fast_products(device: str) -> Iterator[None]:
    """TF32 on GPUs: what training can do without, judging cannot."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
