"""The clocks of benchmarks/phases.py: names of phases, and kernels that note them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_phase_has_a_name_and_ends_somewhere():
    pytest.importorskip("torch", reason="the benchmarks use torch")
    sources = {path.name: path.read_text() for path in (ROOT / "backends/cupy").glob("*.cu*")}
    named = re.search(r"enum Phase \{(.*?)\};", sources["trace.cuh"], re.DOTALL)[1]
    phases = re.findall(r"\w+", named)
    ended = re.findall(r"\btrace\((\w+)", "".join(sources.values()))
    assert set(phases) <= set(ended)
    listed = subprocess.run(
        [sys.executable, "-c", "from benchmarks import phases; print(len(phases.PHASES))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(listed.stdout) == len(phases) - 1


def test_traced_kernels_compile(monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="the CuPy backend needs it")
    compiler = importlib.import_module("hata.backends.cupy.compiler")
    problems = importlib.import_module("hata.problem")
    monkeypatch.setenv("HATA_CACHE", str(tmp_path))
    problem = problems.Problem(
        "hamming_topk", "cuda", "uint8", heads=32, kv_heads=8, bits=128, k=2048, slots=131072
    )
    backend = importlib.import_module("hata.backends.cupy").CuPyBackend()
    [kernel] = backend.ahead(problem, backend.default(problem), 90)
    plain = compiler.cubin(kernel.name, kernel.constants, 90)
    monkeypatch.setattr(compiler, "TRACE", 4096)
    traced = compiler.cubin(kernel.name, kernel.constants, 90)
    assert len(traced) > len(plain)
    monkeypatch.setattr(compiler, "TRACE", 0)
    assert compiler.cubin(kernel.name, kernel.constants, 90) == plain


@pytest.mark.gpu
def test_phases_end_in_order():
    pytest.importorskip("cupy", reason="the CuPy backend needs it")
    # In a process of its own, since kernels keep their clocks.
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.phases", "--shapes", "2x8/2x32K", "--rounds", "3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ends = [float(end) for end in re.findall(r"(\d+\.\d) +\d+\.\d *│?$", shown, re.MULTILINE)]
    assert len(ends) == 12
    assert ends == sorted(ends)
