"""Kept cubins: made once, made again when damaged or foreign, never half written."""

import importlib
import os
import shutil
import struct
import subprocess
import sys

import pytest

from hata.errors import KernelError

pytest.importorskip("cupy", reason="the CuPy backend needs it")

compiler = importlib.import_module("hata.backends.cupy.compiler")
CONSTANTS = (
    ("HEAD_DIM", 32), ("BITS", 32), ("BLOCK_BITS", 32), ("WARPS", 2), ("TILES", 1), ("STAGES", 2),
    ("DTYPE", 2), ("FP32_WEIGHTS", False), ("ALIGNED", True), ("ALIGNED_CODES", True),
    ("PDL", False),
)  # fmt: skip
KERNELS = "encode", "hamming_topk", "sparse_attend", "hash_attend", "probe"


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
    first = compiler.cubin("encode", CONSTANTS, 90)
    assert compiler.cubin("encode", CONSTANTS, 90) == first
    assert len(made) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_the_key_holds_what_it_follows_from(made, monkeypatch):
    compiler.cubin("encode", CONSTANTS, 90)
    compiler.cubin("encode", CONSTANTS, 80)
    compiler.cubin("encode", (*CONSTANTS[:-1], ("PDL", True)), 90)
    monkeypatch.setattr(compiler, "version", lambda: (0, 0))
    compiler.cubin("encode", CONSTANTS, 90)
    assert len(made) == 4


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Edits a copy of the sources; gives the kernels whose keys it changed."""
    folder = tmp_path / "sources"
    shutil.copytree(compiler.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(compiler, "FOLDER", folder)

    def edit(name, old, new):
        before = {kernel: compiler.key(kernel, CONSTANTS, 90) for kernel in KERNELS}
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        return {
            kernel for kernel in KERNELS if compiler.key(kernel, CONSTANTS, 90) != before[kernel]
        }

    return edit


@pytest.mark.parametrize("name", ["ptx.cuh", "scan.cuh", "encode.cu"])
def test_a_comment_changes_no_key(edited, name):
    assert edited(name, "\n//", "\n\n// More words.\n//") == set()
    assert edited(name, ";\n", ';  // "More" words.\n') == set()


def test_a_header_changes_the_keys_of_those_that_reach_it(edited):
    rows = {"hamming_topk", "sparse_attend", "hash_attend"}
    for name, old, new, expected in (
        ("ptx.cuh", "setp.eq.s32", "setp.ne.s32", {"encode", *rows}),
        ("vectors.cuh", "65504.f", "65505.f", {"encode", "sparse_attend", "hash_attend"}),
        ("row.cuh", "__align__(128)", "__align__(256)", rows),
        ("scan.cuh", "distance + 1", "distance + 2", {"hamming_topk", "hash_attend"}),
        ("attend.cuh", "size / 4 + 64", "size / 4 + 65", {"sparse_attend", "hash_attend"}),
        ("fused.cuh", "> 0.f", ">= 0.f", {"hash_attend"}),
        ("encode.cu", "> 0.f", ">= 0.f", {"encode"}),
        ("probe.cu", "{}", "{ return; }", {"probe"}),
    ):
        assert edited(name, old, new) == expected, name


def test_sources_reach_their_headers():
    found = {kernel: compiler.reached(f"{kernel}.cu") for kernel in KERNELS}
    assert found["encode"] == ["encode.cu", "vectors.cuh", "ptx.cuh"]
    assert found["probe"] == ["probe.cu"]
    used = {name for names in found.values() for name in names}
    assert used == {path.name for path in compiler.FOLDER.glob("*.cu*")}


@pytest.mark.parametrize("name", ["row.cuh", "encode.cu"])
def test_arguments_are_packed_without_padding(name):
    codes = "".join(compiler.layout(name).values())
    addresses = codes.rstrip("qif")
    assert set(addresses) == {"P"}
    assert "P" not in codes[len(addresses) :]
    assert struct.calcsize(f"@{codes}") == struct.calcsize(f"<{codes.replace('P', 'Q')}")


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "flipped", "other"])
def test_damage_is_found_and_repaired(folder, made, damage):
    good = compiler.cubin("encode", CONSTANTS, 90)
    [path] = folder.iterdir()
    data = path.read_bytes()
    if damage == "other":
        # A sound file, made for another key.
        compiler.cubin("encode", CONSTANTS, 80)
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
    assert compiler.cubin("encode", CONSTANTS, 90) == good
    assert len(made) == before + 1
    assert compiler.cubin("encode", CONSTANTS, 90) == good
    assert len(made) == before + 1


def test_a_folder_that_cannot_be_written(tmp_path, made, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("HATA_CACHE", str(blocked))
    assert compiler.cubin("encode", CONSTANTS, 90).startswith(b"\x7fELF")
    assert len(made) == 1


def test_processes_share_a_folder(folder):
    script = (
        "import importlib, sys\n"
        "compiler = importlib.import_module('hata.backends.cupy.compiler')\n"
        f"code = compiler.cubin('encode', {CONSTANTS!r}, 90)\n"
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
        compiler.cubin("encode", (("HEAD_DIM", -1),), 90)
