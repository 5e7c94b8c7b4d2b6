"""One run of `hata learn`: from its options to an encoder, and a plot of how it was learned."""

from __future__ import annotations

import argparse
import hashlib
from contextlib import ExitStack

import numpy as np

from hata.calibration import recorder
from hata.calibration import text as texts
from hata.calibration.hashable import check_config
from hata.calibration.options import device_of, gather_text
from hata.calibration.progress import Progress, plot
from hata.encoder import ModelShape
from hata.errors import EncoderError, LearnError
from hata.learn.arguments import (
    Places,
    check_numbers,
    parse_layers,
    places_of,
    recipe_of,
    sequences_of,
    shape_of,
    tokens_of,
)
from hata.learn.folders import clear, held, prepare
from hata.learn.plan import RECALL, Capture, Plan
from hata.learn.ranks import joined
from hata.learn.recall import planted
from hata.learn.recipe import Recipe
from hata.learn.trainer import Outcome, Training
from hata.learn.weights import fingerprint
from hata.profile import user_path


def learn(options: argparse.Namespace) -> int:
    """Learn as the command line says; the exit status."""
    check_numbers(options)
    options.device = device_of(options.device)
    recipe, bits = recipe_of(options)
    places = places_of(options)
    path = user_path(options.model)
    shape, layers, ids, asked, pairs = _read(options, recipe)
    with joined() as ranks, ExitStack() as locks:
        device = ranks.device(options.device)
        progress = Progress(quiet=ranks.rank > 0)
        captured = Capture(
            model=path.resolve().name,
            weights=fingerprint(path),
            shape=str(shape),
            text=hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:16],
            sequences=len(ids),
            tokens=ids.shape[1],
            queries=options.queries,
            recall=pairs,
            seed=options.seed,
            device=device.partition(":")[0],
        )
        steps = options.steps or recipe.steps
        settings = recipe.settings()
        plan = Plan(captured, layers, recipe.name, settings, bits, steps, options.seed)
        # The other ranks of this run work in the same folders.
        if ranks.rank == 0:
            locks.enter_context(held(places.work, Plan, "--work"))
            if places.shared:
                locks.enter_context(held(places.store, Capture, "--capture"))
            found = prepare(places.work, plan, resume=options.resume, option="--work")
            if options.resume and not found:
                progress.note(f"--resume: nothing to go on with in {places.work}; starting anew")
            fresh = not (found or places.shared)
            prepare(places.store, captured, resume=True, option="--capture", fresh=fresh)
        ranks.meet()
        outcome = Training(
            plan,
            recipe,
            shape,
            lambda: recorder.load_model(path, device),
            ids,
            places.work,
            places.store,
            device,
            ranks,
            progress,
            asked,
        ).run()
        if outcome is None:
            return 0
        _write(places, plan, outcome, progress)
        if not options.keep:
            clear(places.work, Plan)
    print(f"{places.out}: {outcome.encoder!r}")
    return 0


def _read(
    options: argparse.Namespace, recipe: Recipe
) -> tuple[ModelShape, tuple[int, ...], np.ndarray, list[np.ndarray], int]:
    """The model's sizes, the layers to train, and what they learn from.

    That is `[n, T]` token ids, the last sequence held out; for each sequence that asks back, the
    positions that do; and how many assignments a sequence asks back.
    """
    config = texts.load_config(options.model)
    shape = shape_of(config, options.query_codes)
    check_config(config)
    layers = parse_layers(options.layers, shape.num_layers)
    tokens = tokens_of(options, config, recipe)
    # One more sequence than is learned from: the last is held out.
    count = sequences_of(options) + 1
    text = gather_text(options, count * tokens)
    least = min(texts.LEAST_TOKENS, tokens)
    tokenizer = texts.load_tokenizer(user_path(options.model))
    ids = texts.sequences(tokenizer, text, count, tokens, least)
    if len(ids) < 2:
        raise LearnError(
            "--text: got one sequence, expected two or more, of which one is held out; name more "
            "text, or ask for fewer --tokens"
        )
    pairs = options.recall
    if pairs is None:
        pairs = ids.shape[1] // RECALL if recipe.recall else 0
    # The text that judges stays as it is.
    ids[:-1], asked = planted(ids[:-1], tokenizer, pairs, options.seed)
    return shape, layers, ids, asked, pairs


def _write(places: Places, plan: Plan, outcome: Outcome, progress: Progress) -> None:
    """The encoder, then its plot."""
    try:
        outcome.encoder.save(places.out)
    except EncoderError as error:
        raise LearnError(
            f"{error}; what was trained lies in {places.work}: free space, then go on with --resume"
        ) from None
    for layer, why in sorted(outcome.dense.items()):
        progress.note(f"layer {layer} stays dense: {why}")
    title = f"{plan.capture.model}, {plan.recipe}, {plan.bits} bits"
    try:
        drawn = plot(places.image, outcome.histories, title)
    except (OSError, ValueError) as error:
        progress.note(f"no plot: {places.image} cannot be written ({texts.first_line(error)})")
        return
    if drawn:
        progress.note(f"plot: {places.image}")
    else:
        progress.note("no plot: it needs matplotlib, from the learn extra")
