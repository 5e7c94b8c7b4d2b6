"""The reference backend against the conformance suite."""

import subprocess
import sys
from dataclasses import replace

import numpy as np

import hata
from hata import device, registry
from hata.arrays import framework
from hata.problem import Problem
from hata.profile import Entry, Measured, Profile, Timing
from hata.testing import BackendSuite


class TestReference(BackendSuite):
    backend = "reference"
    max_examples = 5
    max_slots = 60
    max_head_dim = 128


def test_profiles_of_when_reference_had_knobs(tmp_path, monkeypatch):
    """Entries for CPUs of a backend `reference` that was tuned load, and are not used."""
    x, projection = np.ones((1, 8, 1, 16), "f4"), np.ones((8, 16, 32), "f4")
    key = Problem("encode", "cpu", "float32", "float32", heads=8, kv_heads=8, head_dim=16, bits=32)
    entry = Entry("reference", key, {"block": 64, "threads": "all"}, Timing(1.0, 1.0, 1.0), 2.0)
    kernels = {"reference": {"encode": "ab" * 32}}
    here = replace(device.fingerprint("cpu"), kernels=kernels)
    measured = Measured("2026-11-21", "perf_counter", 50, True, 1.8, 150, 0)
    path = Profile(here, measured, (entry,)).save(tmp_path / "old.yaml").path
    monkeypatch.setattr(registry, "_state", registry._State())
    hata.use_profile(path)
    profile = registry.profile_in_force()
    assert profile.entries == (entry,)
    # Neither chooses it, nor is anything said of tuning it anew.
    assert hata.encode(x, projection).tolist() == [[[[255] * 4]] * 8]
    assert registry.resolve(key, framework("x", x), "cpu").name == "numba"
    with hata.use_backend("reference"):
        hata.encode(x, projection)
    assert registry.load("reference").config(key) == {}
    told = ["reference has nothing to tune, so entries of it (1) are not used"]
    assert registry.stale(profile) == told


def test_it_runs_without_numba(repo_root):
    code = (
        "import sys; sys.modules.update(numba=None, llvmlite=None)\n"
        "import hata, numpy as np, torch\n"
        "reasons = {info.name: info.reason for info in hata.list_backends()}\n"
        "assert reasons['numba'] == 'numba is not installed; pip install numba', reasons\n"
        "x, projection = torch.ones(1, 1, 1, 16).bfloat16(), torch.ones(1, 16, 32)\n"
        "codes = torch.zeros(1, 1, 3, 4, dtype=torch.uint8)\n"
        "keys = x.expand(1, 1, 3, 16)\n"
        "print(hata.hash_attend(x, keys, keys, codes, projection, 2, fresh=3), codes.unique())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1., 1.]" in done.stdout
    assert "tensor([255], dtype=torch.uint8)" in done.stdout
