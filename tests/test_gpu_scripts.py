"""The scripts for machines with a GPU, as far as they can be tried without one."""

import importlib.util
import subprocess
import sys

import pytest


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sanitizers_script_runs_every_case(repo_root):
    pytest.importorskip("torch", reason="its arrays are torch's")
    script = repo_root / "tests" / "gpu" / "sanitize.py"
    command = [sys.executable, str(script), "--device", "cpu", "--backend", "numba"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "numba: 0 wrong"
    for op in ("encode", "hamming_topk", "sparse_attend", "hash_attend"):
        assert sum(f" {op} " in line for line in lines) >= 14
    assert all(line.endswith("right") for line in lines)


def test_the_sanitizers_script_says_what_is_absent(repo_root):
    script = repo_root / "tests" / "gpu" / "sanitize.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no backend runs on cuda here (" in done.stderr


def test_gpu_tests_run_in_as_many_processes_as_there_are_cores(repo_root, monkeypatch):
    run = load(repo_root / "tests" / "gpu" / "run.py")
    made = run.command(["-k", "fault_20"], 4)
    assert made[made.index("-m", 3) + 1] == "gpu and not alone"
    assert made[-2:] == ["-k", "fault_20"]
    assert made[made.index("-n") + 1] == "4"
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda _: None)
    assert "-n" not in run.command([], 4)


def test_what_is_timed_runs_alone(repo_root):
    run = load(repo_root / "tests" / "gpu" / "run.py")
    made = run.command([], 4, alone=True)
    assert made[made.index("-m", 3) + 1] == "gpu and alone"
    assert "-n" not in made
    # Nothing chosen is no failure where the other run had something to do.
    assert [run.worst(found) for found in ([0, 5], [5, 1], [1, 0], [5, 5])] == [0, 1, 1, 5]
