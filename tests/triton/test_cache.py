"""Triton's cache folder may be damaged or read-only: one more compilation, then a named error."""

import importlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from hata.errors import KernelError
from hata.problem import Problem

triton = pytest.importorskip("triton", reason="the Triton backend needs it")
torch = pytest.importorskip("torch", reason="the Triton backend needs it")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

launch = importlib.import_module("hata.backends.triton.launch")

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter compiles nothing")
SM = 90
WARNING = pytest.mark.filterwarnings("default:Triton's cache folder")


@triton.jit
def _fill_kernel(arrays, sizes, C: tl.constexpr):
    tl.store(arrays.out + tl.arange(0, C.N), tl.zeros([C.N], tl.int32) + sizes.number)


@triton.jit
def _broken_kernel(arrays, sizes, C: tl.constexpr):
    tl.store(arrays.out + tl.arange(0, C.N), tl.arange(0, 8) + sizes.number)


def bound(fn=_fill_kernel, n=64):
    """A kernel that nobody has loaded; `launch.launch` would remember it."""
    types = launch.group(out="*i32"), launch.group(number="i32")
    return launch.Bound(fn, types, launch.group(N=n), {"num_warps": 1})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and another for the second attempt."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launch._folder_of_this_process.cache_clear()
    yield tmp_path / "cache"
    shutil.rmtree(launch._folder_of_this_process(), ignore_errors=True)
    launch._folder_of_this_process.cache_clear()


def only(folder, pattern):
    (found,) = (p for p in folder.rglob(pattern) if not p.name.startswith("__grp__"))
    return found


def truncate(folder, share):
    cubin = only(folder, "*.cubin")
    whole = cubin.read_bytes()
    cubin.write_bytes(whole[: int(len(whole) * share)])


DAMAGE = {
    "empty cubin": lambda folder: truncate(folder, 0),
    "half a cubin": lambda folder: truncate(folder, 0.5),
    "a byte short": lambda folder: truncate(folder, 0.9999),
    "missing cubin": lambda folder: only(folder, "*.cubin").unlink(),
    "bad JSON": lambda folder: only(folder, "*.json").write_text('{"hash": "tor'),
    "JSON of another shape": lambda folder: only(folder, "*.json").write_text("[1, 2]"),
    "JSON without what it must hold": lambda folder: only(folder, "*.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_fault_56_a_damaged_cache_is_passed_over(cache, damage):
    right = bound().compile(SM).asm["cubin"]
    DAMAGE[damage](cache)
    with pytest.warns(RuntimeWarning, match=f"{cache} cannot be used.*TRITON_CACHE_DIR"):
        again = bound().compile(SM)
    assert again.asm["cubin"] == right
    assert os.environ["TRITON_CACHE_DIR"] == str(cache)
    assert Path(triton.knobs.cache.dir) == cache


@WARNING
def test_fault_56_torn_groups_and_lost_metadata_are_compiled_anew(cache):
    """Some releases of Triton take these for a miss and say nothing; others raise."""
    right = bound().compile(SM).asm["cubin"]
    for group in cache.rglob("__grp__*"):
        group.write_text("{torn")
    assert bound().compile(SM).asm["cubin"] == right
    only(cache, "*.json").unlink()
    assert bound().compile(SM).asm["cubin"] == right


def test_fault_56_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    # Root may write everywhere, but nobody into a file.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="file/cache cannot be used.*NotADirectoryError"):
        made = bound().compile(SM)
    assert launch.is_whole(made.asm["cubin"])


def test_fault_56_nowhere_to_write_is_a_named_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    launch._folder_of_this_process.cache_clear()

    def refuse(prefix):
        raise PermissionError("no temporary folder")

    monkeypatch.setattr(launch.tempfile, "mkdtemp", refuse)
    match = "_fill_kernel cannot be compiled.*NotADirectoryError.*no temporary folder.*clear"
    with pytest.raises(KernelError, match=match):
        bound().compile(SM)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "file" / "cache")
    monkeypatch.undo()


def test_a_kernel_that_does_not_compile_is_not_the_caches_fault(cache, recwarn):
    with pytest.raises(KernelError, match="_broken_kernel cannot be compiled"):
        bound(_broken_kernel).compile(SM)
    assert not recwarn.list


@WARNING
def test_threads_meet_a_damaged_cache_together(cache):
    sizes = [16, 32, 64, 128]
    right = {n: bound(n=n).compile(SM).asm["cubin"] for n in sizes}
    for file in cache.rglob("*.json"):
        if not file.name.startswith("__grp__"):
            file.write_text("torn")
    found, failed = {}, []
    start = threading.Barrier(len(sizes))

    def work(n):
        start.wait()
        try:
            found[n] = bound(n=n).compile(SM).asm["cubin"]
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert found == right
    assert os.environ["TRITON_CACHE_DIR"] == str(cache)


def test_whole_files_are_told_from_cut_ones(cache):
    cubin = bound().compile(SM).asm["cubin"]
    assert launch.is_whole(cubin)
    for length in (0, 3, 40, 63, 64, len(cubin) // 2, len(cubin) - 1):
        assert not launch.is_whole(cubin[:length])
    assert not launch.is_whole(b"\0" * len(cubin))
    assert not launch.is_whole(json.dumps({"hash": "x"}).encode() * 100)


@pytest.mark.gpu
@pytest.mark.parametrize("damage", DAMAGE)
def test_fault_56_on_a_gpu(cache, damage):
    device = torch.cuda.current_device()
    bound().load_on(device)
    DAMAGE[damage](cache)
    kernel = bound()
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        kernel.load_on(device)
    kernel.starter(device, 1, (launch.group(number=7),))(
        (out.data_ptr(),), torch.cuda.current_stream().cuda_stream
    )
    assert (out == 7).all()


@pytest.mark.gpu
def test_threads_load_a_kernel_once(cache, monkeypatch):
    device = torch.cuda.current_device()
    kernel, made = bound(), []
    attempt = launch.Bound._attempt
    monkeypatch.setattr(launch.Bound, "_attempt", lambda *args: made.append(1) or attempt(*args))
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(kernel.load_on(device))) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert loaded == [loaded[0]] * 4


def test_place_in_cache_does_not_depend_on_what_was_hashed_first():
    """Else another process, or a thread that is faster, would compile the same kernels again."""
    backend = importlib.import_module("hata.backends.triton").TritonBackend()
    problem = Problem(
        "hash_attend", "cuda", "bfloat16", "bfloat16", heads=8, kv_heads=2, head_dim=64,
        value_dim=64, bits=128, k=64, slots=4096, norms=True,
    )  # fmt: skip
    kernels = [bound.fn for bound in backend.ahead(problem, backend.default(problem), 90)]
    assert len({fn.__name__ for fn in kernels}) > 4
    found = []
    for order in (kernels, kernels[::-1]):
        forget(kernels)
        for fn in order:
            launch.hash_callees_first(fn)
        found.append({fn.__name__: fn.cache_key for fn in kernels})
    assert found[0] == found[1]


def forget(functions):
    """Take the hashes of jitted functions, and of all that they call, from Triton."""
    for fn in functions:
        if fn.hash is not None:
            fn.hash, fn.used_global_vals = None, {}
            named = (fn.fn.__globals__.get(name) for name in fn.fn.__code__.co_names)
            forget([callee for callee in named if isinstance(callee, JITFunction)])
