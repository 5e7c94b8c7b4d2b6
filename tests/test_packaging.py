"""The wheel: two top-level names, every source file, and indifference to where it is used."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCES = {"hata": "hata", "tune": "tune", "backends": "hata/backends"}  # folder -> place in wheel


def run(*args, cwd, path=None):
    """Run a command; returns its stdout, fails the test with its whole output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*args, cwd):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *args, cwd=cwd)


@pytest.fixture(scope="session")
def wheel(repo_root, tmp_path_factory):
    """A wheel, built from a copy: a build in the tree would pick up what older builds left."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in SOURCES:
        shutil.copytree(
            repo_root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    # fmt: off
    pip("wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--wheel-dir", str(out), str(tree), cwd=tree)
    # fmt: on
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip(
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


@pytest.fixture
def hostile(tmp_path):
    """A working directory with names that must neither be imported nor read."""
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("raise RuntimeError('imported by accident')")
    (tmp_path / "hata.yaml").write_text("schema: [not a profile")
    return tmp_path


def test_wheel_has_two_top_level_names(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hata", "tune"}


def test_wheel_holds_every_source(wheel, repo_root):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in SOURCES.items():
        for suffix in ("py", "cu", "yaml", "typed"):
            for file in (repo_root / folder).rglob(f"*.{suffix}"):
                assert f"{place}/{file.relative_to(repo_root / folder).as_posix()}" in held
    assert any(name.endswith("/LICENSE") for name in held)


def test_wheel_works_from_a_hostile_directory(site, hostile):
    code = """
import json, hata, hata.backends.reference
print(json.dumps({
    "files": [hata.__file__, hata.backends.reference.__file__],
    "backends": [info.name for info in hata.list_backends()],
}))
"""
    found = json.loads(run(sys.executable, "-c", code, cwd=hostile, path=site))
    assert all(file.startswith(str(site)) for file in found["files"])
    assert {"reference", "triton", "cupy"} <= set(found["backends"])


def test_tuner_starts_from_a_hostile_directory(site, hostile):
    out = run(sys.executable, "-m", "tune", "--help", cwd=hostile, path=site)
    assert "--gpu" in out


def test_console_script_starts_from_a_hostile_directory(site, hostile):
    out = run(sys.executable, str(site / "bin" / "hata"), "--help", cwd=hostile, path=site)
    assert "profile" in out


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_installed_backends_import(place, repo_root, tmp_path):
    cwd = repo_root if place == "repository" else tmp_path
    out = run(
        sys.executable,
        "-c",
        "import hata.backends.reference as b; print(b.__name__)",
        cwd=cwd,
    )
    assert out.strip() == "hata.backends.reference"


def test_every_dependency_has_a_tested_version(repo_root):
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(Requirement(line).name) for line in lines if re.match(r"[A-Za-z]", line)
    }
    declared = map(Requirement, importlib.metadata.requires("hata-attention") or [])
    names = {canonicalize_name(requirement.name) for requirement in declared}
    # cuda12 replaces cuda13 by name, so one environment can only have tested one of them.
    untested = {"hata-attention", "cupy-cuda12x", "nvidia-cuda-nvrtc-cu12"}
    assert names - untested <= pinned
