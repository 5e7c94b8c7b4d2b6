"""The Triton backend against the conformance suite: on a GPU, or in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from hata.testing import BackendSuite

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A program takes milliseconds in the interpreter, so its process runs what sees most.
OF_INTEREST = (
    "(test_encode or test_hamming_topk or test_sparse_attend or test_hash_attend or test_fault_04"
    " or soft_caps) and not depends"
)


@pytest.fixture(autouse=True)
def _language_patched_once(monkeypatch):
    """The interpreter patches Triton's language for a kernel, and for every function it calls.

    The second time changes nothing and takes two thirds of the suite's time.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(fn):
        known = [module for module in (tl, tl.core) if module in fn.__globals__.values()]
        if any(tl.core.is_builtin(module.load) for module in known):
            return patch(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", once)


# Where a GPU is silent about infinities and NaNs, the interpreter's NumPy warns; and some releases
# of torch call functions of their own that they have deprecated.
@pytest.mark.filterwarnings("ignore::RuntimeWarning" if INTERPRETED else "ignore:.*torch.jit")
class TestTriton(BackendSuite):
    backend = "triton"
    device = "cpu" if INTERPRETED else "cuda"
    if INTERPRETED:
        dtypes = ("float32",)
        max_slots = 40
        max_head_dim = 48
        max_examples = 2
    else:
        # Every case compiles kernels of its own.
        max_examples = 5


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_interpreter(repo_root):
    """The suite on small shapes in the interpreter, which needs a process of its own."""
    pytest.importorskip("triton", reason="the Triton backend needs it")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            OF_INTEREST,
            __file__,
        ],
        cwd=repo_root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
