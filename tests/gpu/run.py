"""Run every test that needs a GPU, in several processes where pytest-xdist is installed.

    python tests/gpu/run.py                 # all of them
    python tests/gpu/run.py -k fault_20     # pytest's own options go on to pytest

Most of the time goes into compiling kernels, so there are as many processes as cores, up to 12, and
each keeps to few threads of its own. The exit status is pytest's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

MOST_PROCESSES = 12
TESTS = ("tests/triton", "tests/cupy", "tests/gpu")


def command(arguments: list[str], cores: int) -> list[str]:
    """The pytest that runs them."""
    made = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # It warns in processes of xdist, and warnings are errors.
    made += ["-p", "no:benchmark", "--durations=12"]
    if importlib.util.find_spec("xdist") is not None:
        made += ["-n", str(min(cores, MOST_PROCESSES)), "--dist", "worksteal"]
    root = Path(__file__).resolve().parents[2]
    return made + [str(root / name) for name in TESTS if (root / name).is_dir()] + arguments


def main() -> int:
    """Run pytest; its exit status."""
    cores = len(os.sched_getaffinity(0))
    few = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        command(sys.argv[1:], cores), cwd=root, env={**os.environ, **few}, check=False
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
