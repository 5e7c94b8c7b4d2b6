"""The conformance suite itself: what it skips, and what it must not."""

import os
import subprocess
import sys

import pytest

# NumPy's own arithmetic, so that all of it is right but for what a test plants.
BACKEND = """
import numpy as np
from hata.backend import Backend
from hata.errors import BackendUnavailable, KernelError

class Mine(Backend):
    name = "mine"
    frameworks = frozenset({"numpy"})
    dtypes = frozenset({"float32"})

    def encode(self, call):
        PLANTED
        x, projection = call.x, call.projection
        group = x.shape[1] // projection.shape[0]
        value = x.astype("f8") @ projection.astype("f8").repeat(group, axis=0)
        if call.bias is not None:
            value = value + call.bias.astype("f8").repeat(group, axis=0)[:, None]
        codes = np.packbits(value > 0, axis=-1, bitorder="little")
        result = call.fw.empty(codes.shape, "uint8", x) if call.out is None else call.out
        result[...] = codes
        if call.norms is not None:
            call.norms[...] = np.sqrt((x.astype("f8") ** 2).sum(-1))
        return result

    hamming_topk = sparse_attend = encode
"""
TEST = """
from hata.testing import BackendSuite

class TestMine(BackendSuite):
    backend = "mine"
    max_examples = 3
"""
METHOD = "    @classmethod\n    def missing(cls): "
CASES = {
    "sound": ("pass", "", 0, "passed"),
    "absent": ("pass", METHOD + "return 'no such machine'\n", 0, "no such machine"),
    "unsupported": (
        "pass",
        "    def unsupported(self, problem): return ['not here']\n",
        0,
        "cannot run encode: not here",
    ),
    # These once were skips, and hid that nothing compiled.
    "kernel": ("raise KernelError('ptxas says no')", "", 1, "KernelError: ptxas says no"),
    "unavailable": ("raise BackendUnavailable('no cubin')", "", 1, "BackendUnavailable: no cubin"),
    "missing fails": ("pass", METHOD + "raise OSError('driver')\n", 2, "missing() failed"),
    "no constructor": (
        "pass",
        "    def __init__(self): raise OSError('no node')\n",
        2,
        "no node",
    ),
    "no import": ("pass", "raise ImportError('libcuda.so.1')\n", 2, "libcuda.so.1"),
}


def test_a_suite_of_an_unknown_backend_says_so(tmp_path):
    (tmp_path / "test_mine.py").write_text(TEST.replace('"mine"', '"referense"'))
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "--import-mode=importlib", "-c", os.devnull, "--rootdir", str(tmp_path), "test_mine.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "backend: got 'referense', expected one of" in done.stdout
    assert "Did you mean 'reference'?" in done.stdout


def suite(tmp_path, source, test, wanted):
    """Run a part of the suite against a backend of one module, installed as a plug-in."""
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mine.py").write_text(source)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nmine = mine:Mine\n")
    (tmp_path / "test_mine.py").write_text(test)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
            "--import-mode=importlib", "-c", os.devnull, "--rootdir", str(tmp_path),
            "-k", wanted, "test_mine.py",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_declared_skips(case, tmp_path):
    planted, more, code, expected = CASES[case]
    source = BACKEND.replace("PLANTED", planted) + more
    done = suite(tmp_path, source, TEST, "test_encode and not depends")
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stdout
    if case in ("absent", "unsupported"):
        assert "passed" not in done.stdout.splitlines()[-1]


# The fast backend, but for what it copies. The process was larger once, as after other tests: its
# high-water mark says nothing of a copy.
COPYING = """
import numpy as np
from hata.backends.numba import NumbaBackend

class Mine(NumbaBackend):
    name = "mine"
    frameworks = frozenset({FRAMEWORK})

    def hash_attend(self, call):
        keys = call.keys
        return super().hash_attend(call._replace(keys=COPY_KEYS))

    def hamming_topk(self, call):
        k_codes = call.k_codes
        return super().hamming_topk(call._replace(k_codes=COPY_CODES))

np.ones(1 << 26)
"""
WIDE = TEST + "    wide_slots = 2**17 + 64\n"
KEPT = {"COPY_KEYS": "keys", "COPY_CODES": "k_codes"}


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured on Linux alone"
)
@pytest.mark.parametrize(
    ("framework", "copies", "expected"),
    [
        ("numpy", {}, "1 passed"),
        ("numpy", {"COPY_KEYS": "keys.copy()"}, "hash_attend took"),
        ("torch", {"COPY_KEYS": "keys.clone()"}, "hash_attend took"),
        ("numpy", {"COPY_CODES": "np.ascontiguousarray(k_codes)"}, "hamming_topk took"),
    ],
)
def test_hidden_copies_are_found(framework, copies, expected, tmp_path):
    if framework == "torch":
        pytest.importorskip("torch")
    source = COPYING.replace("FRAMEWORK", repr(framework))
    for name, text in {**KEPT, **copies}.items():
        source = source.replace(name, text)
    done = suite(tmp_path, source, WIDE, "fault_20")
    assert done.returncode == bool(copies), done.stdout + done.stderr
    assert expected in done.stdout
    if copies:
        assert "something was copied" in done.stdout
