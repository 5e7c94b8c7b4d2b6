"""`hata bench`: what a model of one's own gains, before anybody trusts it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from hata.commandline import output, size
from hata.files import write_whole
from hata.words import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    option = parser.add_argument
    option("--model", required=True, metavar="DIR", help="folder of the model")
    option("--context", type=size, default=32768, help="keys before the step, such as 32K")
    option("--batch", type=size, default=1, help="rows")
    option("--encoder", default="random", metavar="FILE", help='encoder file, or "random"')
    option("--bits", type=size, default=128, help="bits of a code")
    option("--k", type=size, help="keys to attend to; default: a 64th of the context, 512 at least")
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, "
           "the model's elsewhere")  # fmt: skip
    option("--all", action="store_true", help="also with a static cache, and without graphs")
    option("--json", type=output, metavar="FILE", help="write the figures")
    option("--plot", type=output, metavar="FILE", help="draw them, *.png or *.svg")


def run(options: argparse.Namespace) -> int:
    """Measure, and print a table.

    Raises:
        HataError: The model cannot be loaded or attached to, or a file cannot be written.
    """
    from hata.bench import generation
    from hata.calibration.options import device_of
    from hata.calibration.progress import Progress
    from hata.calibration.recorder import load_model
    from hata.selection import Selection

    model = load_model(options.model, device_of(options.device, spread=False), options.dtype)
    k = options.k or max(512, options.context // 64)
    selection = Selection(bits=options.bits, k=k, dense_layers=0)
    ways = generation.WAYS if options.all else generation.WAYS[:3]
    steps = generation.compare(
        model, ways, options.batch, options.context, selection, Progress().note,
        encoder=options.encoder,
    )  # fmt: skip
    print(f"{options.batch} x {options.context} keys, {options.bits} bits, k {k}, {model.dtype}")
    table(generation.rows(steps, options.batch))
    print("Keys are random: this is what it takes, not what it keeps; for that: hata eval")
    if options.json is not None:
        write_whole(options.json, json.dumps([asdict(step) for step in steps], indent=2) + "\n")
    if options.plot is not None:
        name = f"{Path(options.model).name}, {options.batch} x {options.context}"
        if not generation.plot(options.plot, {name: steps}):
            print("no plot: needs matplotlib; pip install matplotlib")
    return 0
