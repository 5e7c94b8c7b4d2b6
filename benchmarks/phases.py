"""When the phases of the CUDA kernels end, by clocks inside them.

    python -m benchmarks.phases --shapes 1x32/8x128K 8x32/8x32K

Where a step is one launch, no profiler tells its scan from the rest. So kernels of `cupy` are
compiled with clocks in them (`backends/cupy/trace.cuh`): the first thread of every block notes when
it comes to the end of a phase, in steps of 32 ns. Clocks take some of the time that they measure;
the scan is held against a read of as many bytes with the same clocks, each from the start of the
first block to the end of the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import hata
from benchmarks import contenders, options
from benchmarks.bars import Bar, least, scan_bar
from benchmarks.shapes import SUITES, Shape, parse
from benchmarks.tables import table_of
from benchmarks.verify import WrongResult
from hata.commandline import Parser, output
from hata.files import write_whole
from hata.measure.clock import CUDAClock

# In the order of `enum Phase`, without the start.
PHASES = (
    "the row's length has come", "codes are in flight", "queries are hashed", "scan",
    "sums are published", "threshold", "positions", "attention starts", "attention",
    "all warps have come", "warps are combined", "splits are combined",
)  # fmt: skip
# Words of a block in the buffer of the clocks, and blocks that find room there.
_WORDS, _BLOCKS = 16, 1 << 15


class Phases(NamedTuple):
    """When phases end, in µs from the start of the first block; NaN for what a kernel has not.

    `median` is that of all blocks, `last` that of the slowest; `whole` is the time of a launch by
    the clock of the benchmarks.
    """

    median: list[float]
    last: list[float]
    whole: float


@contextlib.contextmanager
def traced() -> Iterator[Tensor]:
    """Run `cupy` with kernels that note their clocks, and keep those kernels from other processes.

    Yields:
        Where they do, `[blocks, words]` (int64, ns): the start of a block, then its phases.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), hata.use_backend("cupy"):
        from hata.backends.cupy import compiler

        # Machine code holds the address of these clocks.
        os.environ["HATA_CACHE"] = folder
        clocks = torch.zeros((_BLOCKS, _WORDS), dtype=torch.int64, device="cuda")
        compiler.TRACE = clocks.data_ptr()
        yield clocks


def measure(call: Callable[[], object], clocks: Tensor, rounds: int) -> Phases:
    """Run a call whose kernel notes clocks, and look at the clocks of `rounds` launches."""
    call()
    clock = CUDAClock()
    clock.add([call])
    found, times = [], []
    for _ in range(rounds):
        clocks.zero_()
        times += clock.sample(0)
        noted = clocks[clocks[:, 0] > 0].double()
        ends = noted[:, 1 : len(PHASES) + 1]
        ends = torch.where(ends > 0, ends - noted[:, 0].min(), torch.nan) / 1e3
        found.append(torch.stack([ends.nanmedian(0).values, ends.max(0).values]))
    median, last = torch.stack(found).nanmedian(0).values.tolist()
    return Phases(median, last, sorted(times)[rounds // 2])


def scans(rounds: int) -> list[Bar]:
    """Scans of the design suite that have a bar, against reads of as many bytes."""
    from benchmarks.gpu import reader

    found = []
    with traced() as clocks:
        for shape in chain.from_iterable(SUITES["design"]):
            wanted = scan_bar("cupy", shape)
            if wanted is not None:
                call = contenders.hamming_topk(contenders.build(shape, "cuda")).call
                scan = measure(call, clocks, rounds).last[PHASES.index("scan")]
                read = measure(reader(shape.code_bytes, clocks), clocks, rounds).last[0]
                name = f"{shape.name}: scan ({scan:.1f} µs), share of read speed"
                found.append(least(name, wanted, read / scan))
    return found


def scans_apart(rounds: int) -> list[Bar]:
    """`scans`, in a process of its own: kernels of this one keep what they were compiled with."""
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scans.json")
        command = [sys.executable, "-m", "benchmarks.phases", "--rounds", str(rounds)]
        done = subprocess.run([*command, "--scans", str(file)], check=False)
        if done.returncode:
            raise WrongResult(f"benchmarks.phases: exit status {done.returncode}, see above")
        return [Bar(*bar) for bar in json.loads(file.read_text())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    about = (__doc__ or "").partition("\n")[0]
    parser = Parser(prog="python -m benchmarks.phases", description=about)
    option, usual = parser.add_argument, "1x32/8x32K 1x32/8x128K 8x32/8x32K"
    option(
        "--op", choices=("hash_attend", "hamming_topk"), default="hash_attend",
        help="whose kernel (default: hash_attend)",
    )  # fmt: skip
    option(
        "--shapes", nargs="+", type=options.shape, metavar="BxH/HkvxKEYS",
        default=[*map(parse, usual.split())], help=f"bfloat16, 128 bits (default: {usual})",
    )  # fmt: skip
    option("--rounds", type=options.count, default=15, help="launches (default: 15)")
    option(
        "--scans", type=output, metavar="FILE",
        help="hold the scans of the design suite against reads instead, and write them here",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU is here, and this measures one")
    try:
        if args.scans is None:
            show(args.op, args.shapes, args.rounds)
        else:
            write_whole(args.scans, json.dumps(scans(args.rounds)))
    except (hata.HataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def show(op: str, shapes: Sequence[Shape], rounds: int) -> None:
    """Measure an op, and print when its phases end: in the median block, and in the slowest."""
    shapes = [replace(shape, dtype="bfloat16") for shape in shapes]
    with traced() as clocks:
        found = []
        for shape in track(shapes, "measure", console=Console(stderr=True), transient=True):
            step = contenders.OPS[op](contenders.build(shape, "cuda"))
            found.append(measure(step.call, clocks, rounds))
    title = f"{op}: µs from the start of the first block (median block, slowest block)"
    table = table_of(title, ("phase ends", *(shape.name for shape in shapes)))
    for i, phase in enumerate(PHASES):
        ends = [(phases.median[i], phases.last[i]) for phases in found]
        if any(end == end for pair in ends for end in pair):
            table.add_row(phase, *(f"{median:.1f} {last:.1f}" for median, last in ends))
    table.add_section()
    table.add_row("a launch in a graph", *(f"{phases.whole:.1f}" for phases in found))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
