"""`hata learn`: the command line of `hata.learn`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from hata.calibration import text as texts
from hata.calibration.options import add_text_arguments, gather_text, need_text
from hata.encoder import ModelShape
from hata.errors import CaptureError
from hata.profile import user_path

# Recipes, and the bits of their codes unless others are asked for.
BITS = {"listwise": 256, "hata": 128, "hashattention": 32}
TOKENS = 16384
SEQUENCES = 16
# Two CPU cores learn a small model's encoder with these in a quarter of an hour.
CPU_SEQUENCES, CPU_KEYS, CPU_STEPS = 6, 4096, 2500
# Tokens per assignment that is asked back.
RECALL = 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen. Loads no framework."""
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    add_text_arguments(parser)
    parser.add_argument("--out", help="encoder to write, *.safetensors")
    parser.add_argument(
        "--rehearse",
        type=int,
        metavar="N",
        help="write nothing: try N layers of random weights, and tell what all of them would take",
    )
    parser.add_argument(
        "--recipe", choices=list(BITS), default="listwise", help="default: listwise"
    )
    told = ", ".join(f"{name}: {bits}" for name, bits in BITS.items())
    parser.add_argument("--bits", type=int, help=f"bits of a code ({told})")
    parser.add_argument("--layers", help="such as 2-31 or 0,5,7 (default: all)")
    parser.add_argument("--steps", type=int, help="optimiser steps of a layer (the recipe's)")
    parser.add_argument(
        "--query-codes", type=int, help="listwise: codes of a KV head's queries (8)"
    )
    parser.add_argument(
        "--keys", type=int, help=f"listwise: keys of a step at most (all; on a CPU {CPU_KEYS})"
    )
    parser.add_argument(
        "--no-nested",
        action="store_true",
        help="listwise: train all bits together only, not the first 32, 64, ... as well",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        help=f"to learn from ({SEQUENCES}; on a CPU {CPU_SEQUENCES})",
    )
    parser.add_argument("--tokens", type=int, help=f"of a sequence (the model's, up to {TOKENS})")
    parser.add_argument("--queries", type=int, default=4096, help="kept of a sequence (4096)")
    parser.add_argument(
        "--recall",
        type=int,
        help="assignments put into a sequence, which it asks back (listwise: one in 384 tokens; "
        "others: none)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, or spread: the model over all GPUs"
    )
    parser.add_argument("--work", help="working folder (default: OUT.work); on a disk with room")
    parser.add_argument("--resume", action="store_true", help="go on with what lies in --work")
    parser.add_argument(
        "--capture", help="folder to keep what is captured in, and to take it from (in --work)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    parser.add_argument("--plot", help="image to write (default: OUT with .png)")


def run(options: argparse.Namespace) -> int:
    """Learn, and write the encoder and its plot.

    Returns:
        Exit status: 0, or 130 where it was interrupted.
    """
    try:
        return _rehearse(options) if options.rehearse is not None else _learn(options)
    except KeyboardInterrupt:
        print(f"hata learn: interrupted{_left(options)}", file=sys.stderr)
        return 130


def _left(options: argparse.Namespace) -> str:
    """What an interrupted run can go on with, in words.

    Loads no framework: one that was half loaded as it was interrupted cannot be loaded again.
    """
    from hata.learn.folders import MARK, work_of

    if options.out is None or options.rehearse is not None:
        return ""
    if not (work_of(options) / MARK).is_file():
        return ""
    return f"; the same command with --resume goes on with what lies in {work_of(options)}"


class _Asked(NamedTuple):
    """What is to be learned, from what.

    Attributes:
        ids: `[n, T]` token ids, the last sequence held out.
        asked: For each sequence that asks back, the positions that do.
        pairs: Assignments of a sequence that it asks back.
        shape: The model's sizes.
        layers: To train.
    """

    ids: np.ndarray
    asked: list[np.ndarray]
    pairs: int
    shape: ModelShape
    layers: tuple[int, ...]


def _learn(options: argparse.Namespace) -> int:
    need_text(options)

    from hata.calibration import recorder
    from hata.calibration.options import device_of
    from hata.calibration.progress import Progress
    from hata.learn.arguments import check_numbers, places_of
    from hata.learn.folders import clear, held, prepare
    from hata.learn.plan import Capture, Plan
    from hata.learn.ranks import joined
    from hata.learn.trainer import Training
    from hata.learn.weights import fingerprint

    check_numbers(options)
    options.device = device_of(options.device)
    recipe, bits = _recipe(options)
    places = places_of(options)
    path = user_path(options.model)
    read = _read(options, recipe)
    with joined() as ranks, ExitStack() as locks:
        device = ranks.device(options.device)
        progress = Progress(quiet=ranks.rank > 0)
        captured = Capture(
            model=path.resolve().name,
            weights=fingerprint(path),
            shape=str(read.shape),
            text=hashlib.sha256(np.ascontiguousarray(read.ids).tobytes()).hexdigest()[:16],
            sequences=len(read.ids),
            tokens=read.ids.shape[1],
            queries=options.queries,
            recall=read.pairs,
            seed=options.seed,
            device=device.partition(":")[0],
        )
        steps = options.steps or recipe.steps
        settings = recipe.settings()
        plan = Plan(captured, read.layers, recipe.name, settings, bits, steps, options.seed)
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
            read.shape,
            lambda: recorder.load_model(path, device),
            read.ids,
            places.work,
            places.store,
            device,
            ranks,
            progress,
            read.asked,
        ).run()
        if outcome is None:
            return 0
        _write(places, plan, outcome, progress)
        if not options.keep:
            clear(places.work, Plan)
    print(f"{places.out}: {outcome.encoder!r}")
    return 0


def _read(options: argparse.Namespace, recipe: Any) -> _Asked:
    """The model's sizes and the sequences to learn from."""
    from hata.calibration.hashable import check_config
    from hata.errors import LearnError
    from hata.learn.arguments import check_codes, shape_of, tokens_of
    from hata.learn.recall import planted

    config = texts.load_config(options.model)
    shape = shape_of(config)
    check_config(config)
    check_codes(options.query_codes, shape)
    layers = parse_layers(options.layers, shape.num_layers)
    tokens = tokens_of(options.tokens, config, recipe, TOKENS)
    # One more sequence than is learned from: the last is held out.
    count = _sequences(options) + 1
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
    return _Asked(ids, asked, pairs, shape, layers)


def _write(places: Any, plan: Any, outcome: Any, progress: Any) -> None:
    """The encoder, then its plot."""
    from hata.calibration.progress import plot
    from hata.errors import EncoderError, LearnError

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


def _recipe(options: argparse.Namespace) -> tuple[Any, int]:
    """The recipe with its settings, and the bits of a code."""
    from hata.errors import LearnError
    from hata.learn.recipes import RECIPES

    recipe: Any = RECIPES[options.recipe]
    if options.recipe == "listwise" and options.device == "cpu":
        recipe = dataclasses.replace(recipe, keys=CPU_KEYS, steps=CPU_STEPS)
    if options.no_nested:
        if options.recipe != "listwise":
            raise LearnError(
                f"--no-nested: got it for recipe {options.recipe}, whose codes are never nested; "
                "leave it out, or use recipe listwise"
            )
        recipe = dataclasses.replace(recipe, nested=False)
    for name in ("query_codes", "keys"):
        value = getattr(options, name)
        if value is None:
            continue
        if options.recipe != "listwise" or value < 1:
            raise LearnError(
                f"--{name.replace('_', '-')}: got {value} for recipe {options.recipe}, expected a "
                "positive number with recipe listwise"
            )
        recipe = dataclasses.replace(recipe, **{name: value})
    return recipe, BITS[options.recipe] if options.bits is None else options.bits


def _sequences(options: argparse.Namespace) -> int:
    """How many to learn from."""
    if options.sequences is not None:
        return options.sequences
    return CPU_SEQUENCES if options.device == "cpu" else SEQUENCES


def _rehearse(options: argparse.Namespace) -> int:
    """Try some layers of random weights."""
    from hata.calibration.options import device_of
    from hata.errors import LearnError
    from hata.learn.arguments import check_codes, check_numbers, shape_of, tokens_of
    from hata.learn.rehearsal import rehearse

    check_numbers(options)
    options.device = device_of(options.device)
    recipe, bits = _recipe(options)
    if options.rehearse < 1:
        raise LearnError(f"--rehearse: got {options.rehearse}, expected one layer or more")
    config = texts.load_config(options.model)
    check_codes(options.query_codes, shape_of(config))
    tokens = tokens_of(options.tokens, config, recipe, TOKENS)
    print(rehearse(options, config, recipe, bits, _sequences(options), tokens))
    return 0


def parse_layers(words: str | None, count: int) -> tuple[int, ...]:
    """`"0,2-4"` -> `(0, 2, 3, 4)`; without words, all.

    Raises:
        CaptureError: It is no such list, or a layer is not there.
    """
    if words is None:
        return tuple(range(count))
    found: set[int] = set()
    try:
        for part in words.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            if not 0 <= low <= high < count:
                raise ValueError(part)
            found.update(range(low, high + 1))
    except ValueError:
        raise CaptureError(
            f"--layers: got {words[:80]!r}, expected numbers and ranges within 0-{count - 1}, such "
            f"as 2-{count - 1} or 0,{count - 1}"
        ) from None
    return tuple(sorted(found))
