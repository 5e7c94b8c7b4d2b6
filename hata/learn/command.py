"""`hata learn`: the command line of `hata.learn`."""

from __future__ import annotations

import argparse
import sys

from hata.calibration.options import add_text_arguments, need_text
from hata.learn.plan import BITS, CPU_KEYS, CPU_SEQUENCES, SEQUENCES, TOKENS


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
        if options.rehearse is not None:
            from hata.learn.rehearsal import rehearse

            print(rehearse(options))
            return 0
        need_text(options)
        from hata.learn.session import learn

        return learn(options)
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
