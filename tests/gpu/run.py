"""Run every test that needs a GPU, in several processes where pytest-xdist is installed.

    python tests/gpu/run.py                 # all of them
    python tests/gpu/run.py -k fault_20     # pytest's own options go on to pytest
    python tests/gpu/run.py --shared        # without those that nothing may run beside
    python tests/gpu/run.py --alone         # those alone

Most of the time goes into compiling kernels, so there are as many processes as cores, up to 12, and
each keeps to few threads of its own. Tests of clocks follow, one by one. The status is pytest's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

MOST_PROCESSES = 12
# What pytest says where no test was chosen.
NOTHING = 5
TESTS = ("tests/triton", "tests/cupy", "tests/gpu")


def command(arguments: list[str], cores: int, alone: bool = False) -> list[str]:
    """The pytest that runs those that share the GPU, or those that must be `alone`."""
    wanted = "gpu and alone" if alone else "gpu and not alone"
    made = [sys.executable, "-m", "pytest", "-q", "-m", wanted, "-p", "no:cacheprovider"]
    # It warns in processes of xdist, and warnings are errors.
    made += ["-p", "no:benchmark", "--durations=12"]
    if not alone and importlib.util.find_spec("xdist") is not None:
        made += ["-n", str(min(cores, MOST_PROCESSES)), "--dist", "worksteal"]
    root = Path(__file__).resolve().parents[2]
    return made + [str(root / name) for name in TESTS if (root / name).is_dir()] + arguments


def main() -> int:
    """Run pytest, once or twice; the first exit status that is none of success."""
    parts = {"--shared": (False,), "--alone": (True,)}
    chosen = next((parts[word] for word in sys.argv[1:] if word in parts), (False, True))
    arguments = [word for word in sys.argv[1:] if word not in parts]
    cores = len(os.sched_getaffinity(0))
    few = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    root = Path(__file__).resolve().parents[2]
    found = [
        subprocess.run(
            command(arguments, cores, alone), cwd=root, env={**os.environ, **few}, check=False
        ).returncode
        for alone in chosen
    ]
    return worst(found)


def worst(statuses: list[int]) -> int:
    """What several runs come to: a run that had nothing to do counts only if all had nothing."""
    told = [status for status in statuses if status != NOTHING]
    return next((status for status in told if status), 0) if told else NOTHING


if __name__ == "__main__":
    raise SystemExit(main())
