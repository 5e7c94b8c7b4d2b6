"""Kept cubins: made once, made again when damaged or foreign, never half written."""

import importlib
import os
import subprocess
import sys

import pytest

from hata.errors import KernelError

pytest.importorskip("cupy", reason="the CuPy backend needs it")

compiler = importlib.import_module("hata.backends.cupy.compiler")
MACROS = (
    ("D", 32), ("R", 32), ("N", 32), ("WARPS", 2), ("TILES", 1), ("STAGES", 2), ("DATA", 2),
    ("WIDE_WEIGHTS", 0), ("ALIGNED", 1), ("WORDS", 1), ("OVERLAP", 0),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HATA_CACHE", str(tmp_path))
    return tmp_path / "cubins"


@pytest.fixture
def made(folder, monkeypatch):
    """Compiles, counted."""
    compiled = []
    real = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: compiled.append(a) or real(*a))
    return compiled


def test_a_cubin_is_made_once(folder, made):
    first = compiler.cubin("encode", MACROS, 90)
    assert compiler.cubin("encode", MACROS, 90) == first
    assert len(made) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_the_key_holds_what_it_follows_from(made, monkeypatch):
    compiler.cubin("encode", MACROS, 90)
    compiler.cubin("encode", MACROS, 80)
    compiler.cubin("encode", (*MACROS[:-1], ("OVERLAP", 1)), 90)
    monkeypatch.setattr(compiler, "version", lambda: (0, 0))
    compiler.cubin("encode", MACROS, 90)
    real = compiler.read
    monkeypatch.setattr(compiler, "read", lambda name: real(name) + "\n// changed\n")
    compiler.cubin("encode", MACROS, 90)
    assert len(made) == 5


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "flipped", "other"])
def test_damage_is_found_and_repaired(folder, made, damage):
    good = compiler.cubin("encode", MACROS, 90)
    [path] = folder.iterdir()
    data = path.read_bytes()
    if damage == "other":
        # A sound file, made for another key.
        compiler.cubin("encode", MACROS, 80)
        [other] = set(folder.iterdir()) - {path}
        data = other.read_bytes()
    changed = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "foreign": b"not a cubin",
        "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "other": data,
    }
    path.write_bytes(changed[damage])
    before = len(made)
    assert compiler.cubin("encode", MACROS, 90) == good
    assert len(made) == before + 1
    assert compiler.cubin("encode", MACROS, 90) == good
    assert len(made) == before + 1


def test_a_folder_that_cannot_be_written(tmp_path, made, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("HATA_CACHE", str(blocked))
    assert compiler.cubin("encode", MACROS, 90).startswith(b"\x7fELF")
    assert len(made) == 1


def test_processes_share_a_folder(folder):
    script = (
        "import importlib, sys\n"
        "compiler = importlib.import_module('hata.backends.cupy.compiler')\n"
        f"code = compiler.cubin('encode', {MACROS!r}, 90)\n"
        "print(len(code))\n"
    )
    env = {**os.environ, "HATA_CACHE": str(folder.parent)}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    sizes = {run.communicate()[0] for run in runs}
    assert [run.returncode for run in runs] == [0] * 4
    assert len(sizes) == 1
    assert len(list(folder.iterdir())) == 1


def test_what_does_not_compile_says_so(folder):
    with pytest.raises(KernelError, match=r"encode\.cu"):
        compiler.cubin("encode", (("D", "nonsense"),), 90)
