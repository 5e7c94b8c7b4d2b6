"""Decode steps of whole models through plain `generate`, against transformers and dense attention.

    python -m benchmarks.generate [8x32K 1x128K ...] [--model llama-3.1-8b] [--all]
    python -m benchmarks.generate 8x32K --model llama-2-7b --one-layer

Models are made of the configurations in `benchmarks/models`, with random weights; see
`hata.bench.generation` for what is timed, and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers

import hata
from benchmarks.bars import Bar, least, most
from benchmarks.shapes import short
from hata import device as devices
from hata.bench import generation
from hata.bench.generation import DENSE, HASH, OWN, Step
from hata.calibration.progress import Progress
from hata.commandline import Parser, output, size
from hata.files import write_whole
from hata.words import table

MODELS = Path(__file__).with_name("models")
# What a step of a model is to take on one H200, in bfloat16 with 128 bits and a 64th of the keys:
# milliseconds at most; and how many times faster it is to be than in other ways.
BARS: dict[tuple[str, int, int], dict[str, float]] = {
    ("llama-3.1-8b", 8, 32 << 10): {"ms": 6.6, OWN: 12.0, DENSE: 2.1},
    ("llama-3.1-8b", 1, 128 << 10): {OWN: 8.0, DENSE: 1.5},
    ("llama-3.1-8b", 4, 128 << 10): {DENSE: 3.0},
    ("llama-3.1-8b", 1, 512 << 10): {DENSE: 2.8},
    ("llama-2-7b", 4, 32 << 10): {DENSE: 3.3},
}
# What dense attention alone is to gain over transformers.
DENSE_BARS = {("llama-3.1-8b", 8, 32 << 10): 5.0, ("llama-3.1-8b", 1, 128 << 10): 5.0}
# What one layer is to gain over dense attention, by bits.
LAYER_BARS = {("llama-2-7b", 8, 32 << 10): {128: 6.5, 64: 7.2}}
# Enough of them that a step waits for the GPU and not for Python.
_FEW, _MORE = 4, 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    option = made.add_argument
    option("shapes", nargs="*", type=_shape, default=[(8, 32 << 10)], help="batch x keys: 8x32K")
    known = sorted(file.stem for file in MODELS.glob("*.json"))
    option("--model", choices=known, default="llama-3.1-8b")
    option("--layers", type=size, help="fewer layers than the model has")
    option("--one-layer", action="store_true", help="what one layer takes by itself")
    option("--bits", type=size, default=128, help="bits of a code")
    option(
        "--share", type=Fraction, default=Fraction(1, 64), help="keys to attend to, 512 at least"
    )
    option("--all", action="store_true", help="also with a static cache, and without graphs")
    option("--no-own", action="store_true", help="leave out what transformers takes")
    option("--device", default="cuda", help="cuda, cuda:N or cpu")
    option("--json", type=output, metavar="FILE", help="write all figures here")
    option("--plot", type=output, metavar="FILE", help="draw them here, *.png or *.svg")
    return made


def _shape(text: str) -> tuple[int, int]:
    batch, cross, context = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected rows x keys, such as 8x32K")
    return size(batch), size(context)


def build(name: str, layers: int | None, device: str) -> transformers.PreTrainedModel:
    """A model of `benchmarks/models` with random weights, in bfloat16 (float32 on a CPU)."""
    given = json.loads((MODELS / f"{name}.json").read_text())
    given |= {"max_position_embeddings": 1 << 20, "pad_token_id": 0, "eos_token_id": None}
    if layers is not None:
        given["num_hidden_layers"] = layers
    config = transformers.AutoConfig.for_model(**given)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def measure(
    options: argparse.Namespace, batch: int, context: int, progress: Progress
) -> list[Step]:
    """The steps of one shape, in all ways; with `--one-layer` those of one layer."""
    ways = generation.WAYS if options.all else generation.WAYS[:3]
    ways = [way for way in ways if not (options.no_own and way == OWN)]
    k = max(512, int(context * options.share))
    selection = hata.Selection(bits=options.bits, k=k, dense_layers=0)

    def steps(layers: int | None) -> list[Step]:
        model = build(options.model, layers, options.device)
        return generation.compare(model, ways, batch, context, selection, progress.note)

    if not options.one_layer:
        return steps(options.layers)
    few, more = steps(_FEW), {step.way: step for step in steps(_MORE)}
    alike = ((step, more[step.way]) for step in few if step.way in more)
    # What is beside the layers falls out.
    return [replace(b, ms=(b.ms - a.ms) / (_MORE - _FEW)) for a, b in alike]


def bars(options: argparse.Namespace, batch: int, context: int, steps: Sequence[Step]) -> list[Bar]:
    """What was wanted of a shape on an H200, where that is known."""
    place, of = (options.model, batch, context), {step.way: step.ms for step in steps}
    if options.one_layer:
        wanted = LAYER_BARS.get(place, {}).get(options.bits)
        if wanted is None or not {DENSE, HASH} <= of.keys():
            return []
        return [least(f"one layer, {options.bits} bits, x {DENSE}", wanted, of[DENSE] / of[HASH])]
    if options.layers is not None or HASH not in of:
        return []
    found = []
    for what, wanted in BARS.get(place, {}).items():
        if what == "ms":
            found.append(most(f"{batch}x{short(context)}, ms a step", wanted, of[HASH]))
        elif what in of:
            name = f"{batch}x{short(context)}, x {what}"
            found.append(least(name, wanted, of[what] / of[HASH]))
    if place in DENSE_BARS and {OWN, DENSE} <= of.keys():
        name = f"{batch}x{short(context)}, {DENSE} x {OWN}"
        found.append(least(name, DENSE_BARS[place], of[OWN] / of[DENSE]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: --device: no GPU is here; take --device cpu", file=sys.stderr)
        return 2
    progress, measured, met = Progress(), {}, []
    here = devices.fingerprint(options.device).describe()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.model} on {here}, {versions}")
    print(f"{options.bits} bits, k {options.share} of the keys, 512 at least")
    figures: list[dict[str, Any]] = []
    for batch, context in options.shapes:
        name = f"{batch} x {short(context)}"
        steps = measured[name] = measure(options, batch, context, progress)
        print(f"\n{name}{', one layer' if options.one_layer else ''}")
        table(generation.rows(steps, batch))
        met += bars(options, batch, context, steps)
        figures += [{"batch": batch, "context": context, **asdict(step)} for step in steps]
    for bar in met:
        print(
            f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured:.2f} ({bar.wanted:g})"
        )
    if options.json is not None:
        head = {"model": options.model, "device": here, "bits": options.bits}
        write_whole(options.json, json.dumps({**head, "steps": figures}, indent=1) + "\n")
    if options.plot is not None and not generation.plot(options.plot, measured):
        print("no plot: needs matplotlib; pip install matplotlib", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
