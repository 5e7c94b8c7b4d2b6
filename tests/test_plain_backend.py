"""The worked third-party backend: installed, found, and held to the suite."""

import json
import os
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def installed(tmp_path_factory, repo_root):
    """A folder into which pip has installed the example, and nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    # pip builds in the source folder, so it gets one of its own.
    shutil.copytree(repo_root / "examples" / "plain_backend", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command += ["--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(arguments, installed, cwd):
    """Run Python with the example on its path."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_found_by_its_entry_point(installed, tmp_path):
    code = (
        "import hata, json, numpy as np\n"
        "hata.set_backend('plain')\n"
        "x, p = np.ones((1, 1, 1, 16), 'f4'), np.ones((1, 16, 32), 'f4')\n"
        "infos = {i.name: i.available for i in hata.list_backends()}\n"
        "try: hata.encode(x, np.ones((1, 16, 512), 'f4'))\n"
        "except hata.BackendUnavailable as error: reason = str(error)\n"
        "print(json.dumps([infos, hata.encode(x, p).tolist(), reason]))"
    )
    done = run(["-c", code], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    infos, codes, reason = json.loads(done.stdout)
    assert infos["plain"]
    assert codes == [[[[255] * 4]]]
    assert "codes of 512 bits; at most 256 are supported" in reason


def test_it_passes_the_suite(installed, repo_root, tmp_path):
    """A part of its own test file: each op, and one fault of each kind."""
    wanted = "declaration or encode or hamming_topk or sparse_attend or hash_attend or fault_12"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    arguments += ["--rootdir", str(tmp_path), "-c", os.devnull, "-k", f"({wanted}) and not float16"]
    test = repo_root / "examples" / "plain_backend" / "test_plain.py"
    done = run([*arguments, str(test)], installed, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
