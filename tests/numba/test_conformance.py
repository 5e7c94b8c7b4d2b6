"""The numba backend against the conformance suite."""

import json
import os
import subprocess
import sys

import pytest

from hata import registry
from hata.testing import BackendSuite


class TestNumba(BackendSuite):
    backend = "numba"


@pytest.mark.parametrize("first", ["", "import numba\n"])
def test_kernels_that_numba_would_not_compile(repo_root, first):
    code = (
        f"{first}import json, hata, numpy as np\n"
        "reason = {info.name: info.reason for info in hata.list_backends()}['numba']\n"
        "codes = hata.encode(np.ones((1, 1, 1, 16), 'f4'), np.ones((1, 16, 32), 'f4'))\n"
        "try: hata.set_backend('numba')\n"
        "except hata.BackendUnavailable as error:\n"
        "    print(json.dumps([reason, str(error), codes.tolist()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, error, codes = json.loads(done.stdout)
    assert reason == "NUMBA_DISABLE_JIT is set, and kernels run compiled only; unset it"
    assert reason in error
    # "auto" takes the reference then.
    assert codes == [[[[255] * 4]]]


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_words_by_which_numba_compiles(monkeypatch, value):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", value)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert registry.missing("numba") is None
