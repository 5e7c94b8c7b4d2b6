"""`python -m tune`, also `hata tune`: from this machine to a profile.

    python -m tune --gpu auto
    python -m tune --gpu cpu --model PATH --text FILE... --out p.yaml

The last line on stdout is the absolute path of the profile, alone. Exit codes: 0 a profile was
written, 1 nothing could be tuned, 2 the command line cannot be followed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hata.commandline import Parser
from hata.errors import HataError
from tune.space import EFFORT, QUALITY


def _efforts(name: str) -> str:
    """The defaults of both kinds of device, in words."""
    return " and ".join(
        f"{getattr(EFFORT[device, False], name):.0f}, with --quick "
        f"{getattr(EFFORT[device, True], name):.0f}, on a {what}"
        for device, what in (("cpu", "CPU"), ("cuda", "GPU"))
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="hata tune",
        description="Find the fastest right configuration of every kernel on this machine, and "
        "the cheapest selection that keeps a model's attention; write both to a profile.",
    )
    option = made.add_argument
    option(
        "--gpu", default="auto", metavar="auto|cpu|NAME",
        help="what to tune for: what is here (default), the CPU, or a GPU by name, such as h200, "
        "which must be here",
    )  # fmt: skip
    option("--backend", metavar="B", help="tune this backend only (default: auto, all)")
    option(
        "--model", metavar="PATH",
        help="folder of a transformers model: tune for its heads, and choose what its layers "
        "attend to",
    )  # fmt: skip
    option(
        "--encoder", metavar="FILE",
        help='encoder of the model, or "random" (default: random, 256 bits, seed 0)',
    )  # fmt: skip
    option(
        "--text", nargs="+", metavar="FILE",
        help="what the model reads while its queries and keys are captured: files, or folders of "
        "text files; some 4,096 tokens at least",
    )  # fmt: skip
    option(
        "--quality", type=float, default=QUALITY, metavar="Q",
        help="share of the attention mass of exact top-k that a selection must keep at the same "
        f"budget (default {QUALITY})",
    )  # fmt: skip
    option("--quick", action="store_true", help="a few problems, a short search")
    option(
        "--budget", type=float, metavar="SECONDS",
        help=f"time for the search of kernels (default {_efforts('seconds')}); a problem that has "
        "begun is finished",
    )  # fmt: skip
    option(
        "--trials", type=int, metavar="N",
        help=f"configurations to measure for each problem (default {_efforts('trials')})",
    )  # fmt: skip
    option(
        "--storage", metavar="URL",
        help="database of the studies: an SQLite file or a URL that Optuna takes (default: a file "
        "in the user's cache folder)",
    )  # fmt: skip
    option("--resume", action="store_true", help="go on with what was measured in the storage")
    option(
        "--out", metavar="FILE",
        help="profile to write, merged with what it holds (default: this device's profile in the "
        "user's cache folder, which hata finds by itself)",
    )  # fmt: skip
    option("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        try:
            # Optuna is loaded here, so that `--help` works without it.
            from tune import session
        except ImportError as error:
            return _told(f"error: needs {error.name or error}; pip install 'hata-attention[tune]'")
        return session.run(options)
    except KeyboardInterrupt:
        kept = "what was measured is kept, go on with the same command and --resume"
        return _told(f"interrupted; {kept}", 130)
    except HataError as error:
        return _told(f"error: {error}")
    except BrokenPipeError:
        # `hata tune --dry-run | head` closes early; what is left has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # People get one line; who repairs the tuner sets HATA_DEBUG.
    except Exception as error:
        if os.environ.get("HATA_DEBUG"):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        where = "set HATA_DEBUG=1 to see where"
        return _told(f"internal error: {type(error).__name__}: {text}; {where}", 1)


def _told(message: str, code: int = 2) -> int:
    print(f"hata tune: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
