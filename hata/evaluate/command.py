"""`hata eval`: the command line of `hata.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hata.calibration import text as texts
from hata.calibration.options import (
    add_text_arguments,
    check_bits,
    check_least,
    context_of,
    device_of,
    gather_text,
    need_text,
)
from hata.errors import CaptureError
from hata.files import write_whole
from hata.profile import user_path

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("exact", "random", "pages", "window")
# Names of rows that are not encoders'.
TAKEN = frozenset({"dense", "exact top-k", "random hash"})
# Numbers, and the least of each.
LEAST = {
    "sequences": 1, "queries": 1, "prompts": 1, "perplexity": 1, "batch": 1,
    "dense_layers": 0, "sink": 0, "recent": 0,
}  # fmt: skip
# Budgets that are looked at unless others are named: shares of 1.56% and 3.1%.
SHARES = (64, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen. Loads no framework."""
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    add_text_arguments(parser)
    parser.add_argument(
        "--encoder",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="encoders to compare, by a name or that of the file",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        default=[32, 64, 128, 256],
        help="of codes that may be cut: nested ones, and random ones",
    )
    parser.add_argument(
        "--at",
        nargs="+",
        default=["4096"],
        metavar="TOKENS[:K,K]",
        help="lengths, and budgets in keys (default: 4096, budgets of 1/64 and 1/32)",
    )
    parser.add_argument("--sequences", type=int, default=16, help="of each length (16)")
    parser.add_argument("--queries", type=int, default=256, help="last queries looked at (256)")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=METHODS,
        default=list(METHODS),
        help="to compare with (default: all of them)",
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        metavar="TASK",
        help="needle, multi-needle, tracking, frequency: through generate",
    )
    parser.add_argument("--prompts", type=int, default=200, help="of each task and length (200)")
    parser.add_argument(
        "--perplexity", type=int, metavar="N", help="of the last N tokens, fed one by one"
    )
    parser.add_argument(
        "--dense-layers", type=int, default=2, help="first layers that decode dense (2)"
    )
    parser.add_argument("--sink", type=int, default=4, help="decoding: first keys taken (4)")
    parser.add_argument("--recent", type=int, default=16, help="decoding: last keys taken (16)")
    parser.add_argument("--no-mass", action="store_true", help="leave the attention mass out")
    parser.add_argument("--batch", type=int, help="prompts at a time (1 on a CPU, else 20)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="for decoding (float32 on a CPU, else the model's)"
    )
    parser.add_argument("--out", help="folder for report.md and plots")


def run(options: argparse.Namespace) -> int:
    """Measure, print each table as soon as it is there, and write all of them."""
    need_text(options)

    from hata.calibration import recorder
    from hata.calibration.hashable import check_config
    from hata.calibration.progress import Progress
    from hata.evaluate import report, retained, selectors, tasks
    from hata.evaluate.abilities import Abilities

    if unknown := set(options.tasks) - set(tasks.TASKS):
        raise CaptureError(
            f"--tasks: got {sorted(unknown)}, expected some of {', '.join(tasks.TASKS)}"
        )
    device = device_of(options.device, spread=False)
    places = parse_places(options.at)
    _check(options, places)
    config = texts.load_config(options.model)
    check_config(config)
    longest, limit = max(tokens for tokens, _ in places), context_of(config)
    if limit is not None and longest > limit:
        raise CaptureError(
            f"--at: got {longest} tokens, expected at most {limit}, the model's limit"
        )
    encoders = _encoders(options, config)
    folder = _folder(options.out) if options.out else None
    tokenizer = texts.load_tokenizer(user_path(options.model))
    text = gather_text(options, longest * options.sequences)
    # Said now rather than after minutes.
    read = {
        tokens: texts.sequences(tokenizer, text, options.sequences, tokens, tokens)
        for tokens, _ in places
    }
    progress = Progress()
    abilities = Abilities(options, tokenizer, text, progress)
    abilities.check(read)
    parts: list[str] = []

    def tell(part: str) -> None:
        print(f"\n{part}" if parts else part, flush=True)
        parts.append(part)
        if folder is not None:
            write_whole(folder / "report.md", "\n\n".join(parts) + "\n")

    tell(f"# {user_path(options.model).resolve().name}, {device}")
    found: list[Any] = []
    if not options.no_mass:
        compared: list[selectors.Selector] = [
            make() for method, make in selectors.WITHOUT_CODES.items() if method in options.methods
        ]
        compared += [selectors.Coded(*one) for one in encoders]
        model = recorder.load_model(options.model, device)
        for tokens, budgets in places:
            found += retained.evaluate(
                model,
                read[tokens],
                compared,
                budgets,
                queries=options.queries,
                on_sequence=lambda i: progress.show(f"attention mass: sequence {i}"),
            )
            count = len(read[tokens])
            progress.note(f"attention mass: {count} sequences of {tokens} tokens")
        del model
        if not found:
            raise CaptureError(
                "--encoder: got none that hashes a layer of this model that can be hashed; there "
                "is nothing to compare"
            )
        tell(report.retained_tables(found))
    if options.tasks or options.perplexity:
        for part in abilities.tables(encoders, read, places, device):
            tell(part)
    if folder is not None:
        if found and not report.plot(folder / "mass.png", found):
            progress.note("no plot: it needs matplotlib, from the learn extra")
        progress.note(f"report: {folder / 'report.md'}")
    return 0


def _check(options: argparse.Namespace, places: Sequence[tuple[int, list[int]]]) -> None:
    """Raise `HataError` for numbers that mean nothing, or that leave nothing to measure."""
    check_least(options, LEAST)
    for bits in options.bits:
        check_bits(bits)
    if not options.methods and not options.encoder:
        raise CaptureError("--methods and --encoder: got none, so nothing is compared")
    decodes = bool(options.tasks or options.perplexity)
    if options.no_mass and not decodes:
        raise CaptureError("--no-mass: leaves nothing to measure; name --tasks or --perplexity")
    guards = options.sink + options.recent
    for tokens, budgets in places:
        if options.perplexity and options.perplexity > tokens - 2:
            raise CaptureError(
                f"--perplexity: got {options.perplexity}, expected at most {tokens - 2} of "
                f"{tokens} tokens"
            )
        if decodes and guards > min(budgets):
            raise CaptureError(
                f"--sink and --recent: got {guards} keys together, expected no more than the "
                f"budget of {min(budgets)}"
            )


def _folder(out: str) -> Path:
    """The folder of the report, made before anything is measured.

    Raises:
        CaptureError: It cannot be made.
    """
    folder = user_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CaptureError(f"--out: {out} cannot be made a folder: {error}") from None
    return folder


def parse_places(words: Sequence[str]) -> list[tuple[int, list[int]]]:
    """`["4096:64,128"]` -> `[(4096, [64, 128])]`, every length once, and every budget of it.

    Raises:
        CaptureError: One is no such thing.
    """
    places: dict[int, list[int]] = {}
    for word in words:
        length, _, budgets = word.partition(":")
        try:
            tokens = int(length)
            chosen = [int(k) for k in budgets.split(",")] if budgets else []
        except ValueError:
            tokens, chosen = 0, []
        chosen = chosen or [max(tokens // share, 1) for share in SHARES]
        if tokens < 2 or min(chosen) < 1 or max(chosen) > tokens:
            raise CaptureError(
                f"--at: got {word!r}, expected a length in tokens and budgets of no more keys, "
                "such as 4096:64,128"
            )
        places.setdefault(tokens, []).extend(chosen)
    return [(tokens, list(dict.fromkeys(chosen))) for tokens, chosen in places.items()]


def _encoders(options: argparse.Namespace, config: Any) -> list[tuple[str, Any, int]]:
    """Name, encoder and bits of every code that is compared."""
    from hata.encoder import Encoder

    found = []
    taken: set[str] = set(TAKEN)
    if "random" in options.methods:
        made = Encoder.random(config, max(options.bits))
        found += [("random hash", made, bits) for bits in dict.fromkeys(options.bits)]
    for word in options.encoder:
        name, _, file = word.rpartition("=")
        if not user_path(file).is_file():
            raise CaptureError(
                f"--encoder: got {file}, which is not a file; give the path of an encoder, "
                "*.safetensors"
            )
        encoder = Encoder.load(user_path(file))
        encoder.check(config)
        recipe = encoder.made.get("recipe", "unknown")
        nested = recipe == "random" or encoder.made.get("settings", {}).get("nested", False)
        cut = [bits for bits in dict.fromkeys(options.bits) if bits <= encoder.bits]
        widths = cut if nested and cut else [encoder.bits]
        name = name or Path(file).stem
        if name in taken:
            raise CaptureError(
                f"--encoder: got {name!r} for {file}, which is the name of another row; give it "
                f"one of its own, such as other={file}"
            )
        taken.add(name)
        found += [(name, encoder, bits) for bits in widths]
    return found
