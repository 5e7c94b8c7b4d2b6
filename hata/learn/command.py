"""`hata learn`: the command line of `hata.learn`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
from typing import Any

import numpy as np

from hata.encoder import ModelShape
from hata.encoder_layer import check_bits
from hata.learn import text as texts
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


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, for `hata eval` as well."""
    parser.add_argument("--text", nargs="+", default=[], help="files, or folders of them")
    parser.add_argument(
        "--dataset",
        help='"python": sources of the installed packages; else a name for the datasets library',
    )
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="folders to leave out of the text"
    )


def run(options: argparse.Namespace) -> int:
    """Learn, and write the encoder and its plot."""
    from hata.learn import recorder
    from hata.learn.plan import Capture, LearnError, Plan, prepare, settings_of
    from hata.learn.progress import Progress, plot
    from hata.learn.ranks import joined
    from hata.learn.recall import planted
    from hata.learn.trainer import learn

    _check_numbers(options)
    if options.rehearse is not None:
        return _rehearse(options)
    if options.out is None:
        raise LearnError("--out: got none, expected the name of the encoder to write")
    out = user_path(options.out)
    if out.suffix != ".safetensors":
        raise LearnError(f"--out: got {out}, expected a name that ends in .safetensors")
    recipe, bits = _recipe(options)
    config = texts.load_config(options.model)
    shape = ModelShape.of(config)
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or TOKENS)
    tokens = options.tokens or min(TOKENS, context)
    layers = parse_layers(options.layers, shape.num_layers)
    # One more sequence than is learned from: the last is held out.
    count = _sequences(options) + 1
    path = user_path(options.model)
    text = gather_text(options, count * tokens)
    least = min(texts.LEAST_TOKENS, tokens)
    tokenizer = texts.load_tokenizer(path)
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
    with joined() as ranks:
        device = ranks.device(options.device)
        progress = Progress(quiet=ranks.rank > 0)
        read = Capture(
            model=path.resolve().name,
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
        settings = settings_of(recipe)
        plan = Plan(read, layers, recipe.name, settings, bits, steps, options.seed)
        work = user_path(options.work) if options.work else out.with_suffix(".work")
        store = user_path(options.capture) if options.capture else work / "capture"
        if ranks.rank == 0:
            prepare(work, plan, resume=options.resume, option="--work")
            prepare(store, read, resume=True, option="--capture")
        ranks.meet()
        outcome = learn(
            plan,
            recipe,
            shape,
            lambda: recorder.load_model(path, device),
            ids,
            work,
            store,
            device,
            asked=asked,
            ranks=ranks,
            progress=progress,
        )
        if outcome is None:
            return 0
        outcome.encoder.save(out)
        for layer, why in sorted(outcome.dense.items()):
            progress.note(f"layer {layer} stays dense: {why}")
        image = user_path(options.plot) if options.plot else out.with_suffix(".png")
        if plot(image, outcome.histories, f"{read.model}, {plan.recipe}, {plan.bits} bits"):
            progress.note(f"plot: {image}")
        else:
            progress.note("no plot: it needs matplotlib, from the learn extra")
        if not options.keep:
            shutil.rmtree(work)
    print(f"{out}: {outcome.encoder!r}")
    return 0


def _recipe(options: argparse.Namespace) -> tuple[Any, int]:
    """The recipe with its settings, and the bits of a code."""
    from hata.learn.plan import RECIPES, LearnError

    recipe: Any = RECIPES[options.recipe]
    if options.recipe == "listwise" and _on_cpu(options):
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
    bits = BITS[options.recipe] if options.bits is None else options.bits
    check_bits(bits)
    return recipe, bits


def _check_numbers(options: argparse.Namespace) -> None:
    from hata.learn.plan import LearnError

    for name in ("sequences", "tokens", "queries", "steps", "recall"):
        value, least = getattr(options, name), 0 if name == "recall" else 1
        if value is not None and value < least:
            raise LearnError(f"--{name}: got {value}, expected {least} or more")


def _on_cpu(options: argparse.Namespace) -> bool:
    from hata.learn.ranks import Ranks

    return Ranks().device(options.device) == "cpu"


def _sequences(options: argparse.Namespace) -> int:
    """How many to learn from."""
    if options.sequences is not None:
        return options.sequences
    return CPU_SEQUENCES if _on_cpu(options) else SEQUENCES


def _rehearse(options: argparse.Namespace) -> int:
    """Try some layers of random weights."""
    from hata.learn.plan import LearnError
    from hata.learn.ranks import Ranks
    from hata.learn.rehearsal import rehearse

    recipe, bits = _recipe(options)
    if options.rehearse < 1:
        raise LearnError(f"--rehearse: got {options.rehearse}, expected one layer or more")
    config = texts.load_config(options.model)
    told = rehearse(
        config,
        options.rehearse,
        recipe,
        bits=bits,
        steps=options.steps or recipe.steps,
        sequences=_sequences(options),
        tokens=options.tokens or TOKENS,
        queries=options.queries,
        seed=options.seed,
        device=Ranks().device(options.device),
        folder=user_path(options.work) if options.work else None,
    )
    print(told)
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
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        found = {-1}
    if not found or min(found) < 0 or max(found) >= count:
        raise texts.CaptureError(
            f"--layers: got {words!r}, expected numbers and ranges within 0-{count - 1}, such as "
            f"2-{count - 1} or 0,{count - 1}"
        )
    return tuple(sorted(found))


def gather_text(options: argparse.Namespace, tokens: int) -> str:
    """The text that the options name, enough for so many tokens.

    Raises:
        CaptureError: None is named, or it cannot be read.
    """
    if bool(options.text) == bool(options.dataset):
        raise texts.CaptureError("--text: name files, or a --dataset, and not both")
    if options.text:
        return texts.read_text(options.text, without=options.without)
    # Sequences are spread over the text, so there is more of it than they hold.
    characters = 16 * tokens
    if options.dataset == "python":
        return texts.python_sources(characters, without=options.without)
    return texts.dataset_text(options.dataset, characters)
