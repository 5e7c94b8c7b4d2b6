"""The kernels themselves, without a GPU: compiled for the CPU and run through the suite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("emulated_suite.py")
# Some of the suite in every way in which the blocks of a row can sync; the rest is for a GPU.
RUNS = {
    "cluster": "(test_hash_attend or test_fault_07) and (float16 or bfloat16) or several_rounds"
    " or winners or all_is_taken",
    "cooperative": "test_hash_attend and float32 or several_rounds or winners or all_is_taken",
    "other": "(test_hash_attend or test_hamming_topk or test_sparse_attend) and bfloat16",
    "spill": "test_hamming_topk or test_hash_attend and bfloat16 or winners",
}


# Each is a suite of its own, which a busy machine of two cores is minutes with.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
@pytest.mark.parametrize("mode", RUNS)
def test_kernels_on_a_cpu(mode, repo_root):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            RUNS[mode],
            str(SUITE),
        ],
        cwd=repo_root,
        env={**os.environ, "EMULATED": mode, "EMULATED_DIM": "80", "EMULATED_EXAMPLES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
