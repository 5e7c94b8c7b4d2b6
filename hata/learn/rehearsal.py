"""`hata learn --rehearse N`: what a training would take, tried on N layers of random weights.

Neither weights nor text are needed: the model is made of its configuration, with N layers, and
reads random tokens. Capture and training take what they would take for each of these layers, so
times are extrapolated to all of them; reading weights from disk is not part of it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hata.calibration import recorder
from hata.calibration import text as texts
from hata.calibration.options import device_of
from hata.calibration.progress import Progress
from hata.encoder import ModelShape
from hata.errors import LearnError
from hata.learn.arguments import check_numbers, recipe_of, sequences_of, shape_of, tokens_of
from hata.learn.folders import CAPTURE, prepare
from hata.learn.plan import Capture, Plan
from hata.learn.ranks import Ranks
from hata.learn.trainer import Training
from hata.profile import user_path


def rehearse(options: argparse.Namespace) -> str:
    """Try a training as the command line says, and tell what all layers would take."""
    check_numbers(options)
    options.device = device = device_of(options.device)
    recipe, bits = recipe_of(options)
    if options.rehearse < 1:
        raise LearnError(f"--rehearse: got {options.rehearse}, expected one layer or more")
    config = texts.load_config(options.model)
    every = shape_of(config, options.query_codes).num_layers
    tokens = tokens_of(options, config, recipe)
    queries, seed = options.queries, options.seed
    folder = user_path(options.work) if options.work else None
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers = min(options.rehearse, every)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    shape = ModelShape.of(config)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, text.vocab_size, (sequences_of(options) + 1, tokens))
    read = Capture(
        "rehearsal", "random", str(shape), "random", len(ids), tokens, queries, 0, seed, device
    )
    steps = options.steps or recipe.steps
    plan = Plan(read, tuple(range(layers)), recipe.name, recipe.settings(), bits, steps, seed)
    started = time.monotonic()
    loaded = captured = started

    def load() -> Any:
        nonlocal loaded
        model = recorder.load_model("rehearsal", device, config=config)
        loaded = time.monotonic()
        return model

    class Clock(Progress):
        def note(self, text: str) -> None:
            nonlocal captured
            if text.startswith("captured"):
                captured = time.monotonic()
            super().note(text)

    with tempfile.TemporaryDirectory(dir=folder, prefix="rehearsal-") as name:
        work = Path(name) / "work"
        store = work / CAPTURE
        prepare(work, plan, resume=False, option="--work")
        prepare(store, read, resume=True, option="--capture")
        Training(plan, recipe, shape, load, ids, work, store, device, Ranks(), Clock()).run()
        disk = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 1e9
    trained = time.monotonic()
    capture, training = captured - loaded, trained - captured
    factor = every / layers
    memory = ""
    if device.startswith("cuda"):
        memory = f", peak device memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return (
        f"measured: {layers} of {every} layers, {len(ids)} sequences of {tokens} tokens: capture "
        f"{capture:.1f} s, training {training:.1f} s, {disk:.1f} GB on disk{memory}\n"
        f"extrapolated to {every} layers: {factor * (capture + training) / 60:.1f} minutes, "
        f"{factor * disk:.0f} GB on disk; plus loading the model, whose weights stay in device "
        "memory during capture only"
    )
