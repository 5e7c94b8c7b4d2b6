"""Who may import whom: at run time, and as contracts over the sources."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = {"cupy", "jax", "numba", "optuna", "torch", "transformers", "triton"}
TEST_TOOLS = {"hypothesis", "pytest"}
LINTER = Path(sys.executable).parent / "lint-imports"


def python(code, cwd):
    """Run `code` in a fresh interpreter; returns what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_hata_loads_no_framework(repo_root):
    loaded = python("import hata, json, sys; print(json.dumps(list(sys.modules)))", repo_root)
    assert not (FRAMEWORKS | TEST_TOOLS) & set(loaded)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_adapter_says_what_to_install(name, repo_root):
    code = (
        f"import json, sys; sys.modules[{name!r}] = None\n"
        "try: import hata.hf\n"
        "except ModuleNotFoundError as error: print(json.dumps([error.name, str(error)]))"
    )
    found, message = python(code, repo_root)
    assert found == name
    assert message.endswith("not installed; pip install 'hata-attention[hf]'")


def test_import_hata_loads_no_backend_and_no_tuner(repo_root):
    loaded = python("import hata, json, sys; print(json.dumps(list(sys.modules)))", repo_root)
    assert not [name for name in loaded if name.split(".")[0] == "tune"]
    assert not [name for name in loaded if name.startswith("hata.backends.")]


@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_our_folders_hide_no_real_package(name, repo_root):
    code = (
        "import importlib.util, json; "
        f"spec = importlib.util.find_spec({name!r}); print(json.dumps(spec and spec.origin))"
    )
    origin = python(code, repo_root)
    assert origin is None or repo_root / "backends" not in Path(origin).parents
    here = importlib.util.find_spec(name)  # and in this process, which pytest has set up
    assert here is None or repo_root / "backends" not in Path(str(here.origin)).parents


# What must be caught: file, source, the contract that catches it.
VIOLATIONS = {
    "library names a backend": (
        "hata/planted.py",
        "from hata.backends import reference",
        "strings only",
    ),
    "library names a backend lazily": (
        "hata/planted.py",
        "def load():\n    import hata.backends.triton\n",
        "strings only",
    ),
    "tuner names a backend": ("tune/planted.py", "import hata.backends.cupy", "strings only"),
    "library imports the tuner": ("hata/planted.py", "def go():\n    import tune\n", "the tuner"),
    "backend imports the tuner": ("hata/backends/cupy/planted.py", "import tune", "the tuner"),
    "backend imports a backend": (
        "hata/backends/triton/planted.py",
        "import hata.backends.cupy",
        "one another",
    ),
    "backend imports a backend, relative": (
        "hata/backends/cupy/planted.py",
        "from .. import reference",
        "one another",
    ),
    "reference uses a framework": (
        "hata/backends/reference/planted.py",
        "import torch",
        "no framework",
    ),
    "numba backend uses a framework": (
        "hata/backends/numba/planted.py",
        "import torch",
        "no framework",
    ),
    "reference is compiled": (
        "hata/backends/reference/planted.py",
        "import numba",
        "no compiler",
    ),
    "library knows Optuna": ("hata/planted.py", "import optuna", "Optuna"),
    "backend knows YAML": ("hata/backends/cupy/planted.py", "import yaml", "YAML"),
    "core knows transformers": ("hata/planted.py", "import transformers", "transformers"),
}


def contracts(repo_root, tree):
    """Check the import contracts over a copy laid out as installed; returns (status, report)."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repo_root / "hata", tree / "hata", ignore=ignore, dirs_exist_ok=True)
    shutil.copytree(repo_root / "tune", tree / "tune", ignore=ignore, dirs_exist_ok=True)
    shutil.copytree(
        repo_root / "backends", tree / "hata" / "backends", ignore=ignore, dirs_exist_ok=True
    )
    config = str(repo_root / ".importlinter")
    done = subprocess.run(
        [str(LINTER), "--config", config, "--no-cache"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


needs_linter = pytest.mark.skipif(not LINTER.exists(), reason="import-linter is not installed")


@needs_linter
def test_import_contracts_are_kept(repo_root, tmp_path):
    status, report = contracts(repo_root, tmp_path)
    assert status == 0, report


@needs_linter
@pytest.mark.parametrize("violation", VIOLATIONS)
def test_import_contracts_catch(violation, repo_root, tmp_path):
    file, source, contract = VIOLATIONS[violation]
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    status, report = contracts(repo_root, tmp_path)
    assert status == 1, report
    broken = [line for line in report.splitlines() if line.endswith("BROKEN")]
    assert len(broken) == 1, report
    assert contract in broken[0], report
