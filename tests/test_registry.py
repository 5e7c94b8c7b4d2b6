"""The registry: choosing backends, plug-ins and their faults, contexts and threads."""

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

import hata
from hata import checks, device, registry
from hata.backend import Backend
from hata.device import Fingerprint
from hata.problem import Problem
from hata.profile import Entry, Measured, Profile, ProfileWarning, Timing, store

X = np.ones((1, 1, 2, 16), np.float32)
PROJECTION = np.ones((1, 16, 32), np.float32)
MEASURED = Measured("2026-01-01", "cuda_graph", 20, True, 1.0, 10, 0)
PROBLEM = Problem(op="encode", device="cpu", dtype="float32", head_dim=16, bits=32)

# A whole backend in one method: what it returns says that it ran.
WORKING = """
from hata.backend import Backend
class Mine(Backend):
    name = "mine"
    frameworks = frozenset({"numpy"})
    def encode(self, call): return "mine ran"
    def hamming_topk(self, call): raise NotImplementedError
    def sparse_attend(self, call): raise NotImplementedError
"""


@pytest.fixture(autouse=True)
def _fresh_registry():
    registry.reset()
    yield
    registry.reset()


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a plug-in: `plug_in(name, source, class name)`."""
    points = []
    monkeypatch.syspath_prepend(tmp_path)
    others = importlib.metadata.entry_points

    def entry_points(**asked):
        if asked.get("group", "").startswith("hata."):
            return [point for point in points if point.group == asked["group"]]
        return others(**asked)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    def install(name, source, attribute="Mine"):
        module = f"plug_in_{len(list(tmp_path.iterdir()))}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        points.append(EntryPoint(name, f"{module}:{attribute}", registry.ENTRY_POINTS))
        return name

    return install


def reason_of(name):
    return {info.name: info.reason for info in hata.list_backends()}[name]


def test_auto_is_the_default_and_runs_numba_here():
    assert hata.get_backend() == "auto"
    assert registry.resolve(PROBLEM, adapter(), "cpu").name == "numba"


def adapter():
    return hata.arrays.framework("x", X)


def test_every_backend_is_listed_with_its_reason():
    listed = {info.name: info for info in hata.list_backends()}
    for name in ("numba", "reference"):
        assert (listed[name].available, listed[name].reason) == (True, "")
    for info in listed.values():
        assert info.available == (not info.reason)


@pytest.mark.parametrize("wrong", [None, 3, ["reference"], b"reference", Backend])
def test_names_that_are_no_names(wrong):
    for choose in (hata.set_backend, registry.load):
        with pytest.raises(hata.HataDTypeError, match=r"backend: got .* expected a name"):
            choose(wrong)
    with pytest.raises(hata.HataDTypeError), hata.use_backend(wrong):
        pass
    assert hata.get_backend() == "auto"


def test_fault_46_unknown_name():
    with pytest.raises(ValueError, match=r"'tritn'.*'auto', 'reference'.*Did you mean 'triton'"):
        hata.set_backend("tritn")
    with pytest.raises(hata.UnknownBackend), hata.use_backend("referense"):
        pass
    with pytest.raises(hata.UnknownBackend):
        hata.set_backend("")
    assert hata.get_backend() == "auto"


def test_environment_names_the_backend(monkeypatch, plug_in):
    monkeypatch.setenv("HATA_BACKEND", " reference ")
    registry.reset()
    assert hata.get_backend() == "reference"
    plug_in("mine", WORKING + "    @classmethod\n    def missing(cls): return 'no such machine'\n")
    for name, error, match in (
        (
            "referense",
            hata.UnknownBackend,
            "^HATA_BACKEND: backend: got 'referense', .*'reference'",
        ),
        ("mine", hata.BackendUnavailable, "^HATA_BACKEND: backend 'mine' cannot run here"),
    ):
        monkeypatch.setenv("HATA_BACKEND", name)
        registry.reset()
        with pytest.raises(error, match=match):
            hata.encode(X, PROJECTION)
        # A choice made in the program is not the environment's.
        with hata.use_backend("reference"):
            hata.encode(X, PROJECTION)
        hata.set_backend("reference")
        hata.encode(X, PROJECTION)


def test_class_of_an_unknown_name():
    for ask in (registry.class_of, registry.missing):
        with pytest.raises(hata.UnknownBackend, match=r"got 'tritn', .*Did you mean 'triton'"):
            ask("tritn")


def test_fault_47_backend_that_cannot_run_here(plug_in):
    plug_in(
        "mine",
        WORKING + "    @classmethod\n    def missing(cls): return 'no CUDA driver was found'\n",
    )
    hata.set_backend("reference")
    with pytest.raises(hata.BackendUnavailable, match="'mine' cannot run here: no CUDA driver"):
        hata.set_backend("mine")
    with pytest.raises(hata.BackendUnavailable), hata.use_backend("mine"):
        pass
    assert hata.get_backend() == "reference"
    assert reason_of("mine") == "no CUDA driver was found"
    assert hata.encode(X, PROJECTION).shape == (1, 1, 2, 4)


# What may go wrong in somebody else's code, and what is to be read of it.
BROKEN = {
    "import fails": ("raise ImportError('libcuda.so.1: driver too old')", "driver too old"),
    "module is no python": ("def (", "SyntaxError"),
    "class is absent": ("", "AttributeError"),
    "class is no backend": ("class Mine: pass", "expected a subclass"),
    "class is no class": ("Mine = 3", "expected a subclass"),
    "class has no name": (WORKING.replace('name = "mine"', "pass"), "has the name None"),
    "class has another name": (WORKING.replace('"mine"', '"other"'), "has the name 'other'"),
    "missing() fails": (
        WORKING + "    @classmethod\n    def missing(cls): raise OSError('no such device')\n",
        "no such device",
    ),
    "method is absent": (WORKING.replace("def encode", "def encoded"), "abstract"),
    "missing() ends the process": (
        WORKING + "    @classmethod\n    def missing(cls): raise SystemExit('no licence')\n",
        "no licence",
    ),
    "constructor fails": (
        WORKING + "    def __init__(self): raise OSError('no device node')\n",
        "no device node",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_fault_48_broken_plug_in(plug_in, fault):
    source, expected = BROKEN[fault]
    plug_in("mine", source)
    with pytest.raises(hata.BackendUnavailable, match=expected):
        hata.set_backend("mine")
    assert hata.get_backend() == "auto"
    # It is reported, and it harms nobody else.
    listed = {info.name: info for info in hata.list_backends()}
    assert {*registry.BUILT_IN, "mine"} == set(listed)
    if fault != "constructor fails":  # which a list does not call
        assert re.search(expected, listed["mine"].reason)
    assert hata.encode(X, PROJECTION).dtype == np.uint8


@pytest.mark.parametrize(
    "method", ["unsupported", "kernel_hash", "tunables", "default", "config", "accept"]
)
def test_fault_48_a_method_that_fails_harms_no_other(plug_in, method):
    plug_in("mine", WORKING + f"    def {method}(self, *given): raise SystemExit(3)\n")
    kernels = {"numba": {"encode": registry.load("numba").kernel_hash("encode")}}
    here = replace(device.fingerprint("cpu"), kernels=kernels)
    hata.use_profile(Profile(here, MEASURED))
    assert hata.encode(X, PROJECTION).dtype == np.uint8


def test_fault_48_unsupported_that_fails(plug_in):
    plug_in("mine", WORKING + "    def unsupported(self, problem): return 1 / 0\n")
    assert hata.encode(X, PROJECTION).dtype == np.uint8
    # Asked for by name, its own error is shown as it is.
    with hata.use_backend("mine"), pytest.raises(ZeroDivisionError):
        hata.encode(X, PROJECTION)


def test_fault_48_import_with_a_library_that_cannot_load(tmp_path, repo_root):
    """`import hata` works beside a CuPy that fails to import."""
    (tmp_path / "cupy.py").write_text("raise RuntimeError('CUDA driver version is insufficient')")
    code = (
        "import hata, json, numpy; "
        "print(json.dumps([hata.encode(numpy.ones((1, 1, 1, 16), 'f4'), "
        "numpy.ones((1, 16, 32), 'f4')).tolist(), [b.name for b in hata.list_backends()]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, names = json.loads(done.stdout)
    assert codes == [[[[255] * 4]]]
    assert "cupy" in names


def test_plug_in_runs_when_chosen(plug_in):
    plug_in("mine", WORKING)
    with hata.use_backend("mine"):
        assert hata.encode(X, PROJECTION) == "mine ran"
    assert hata.encode(X, PROJECTION).dtype == np.uint8
    hata.set_backend("mine")
    assert hata.encode(X, PROJECTION) == "mine ran"


def test_hash_of_a_plug_in_names_its_own_sources(plug_in, tmp_path):
    plug_in("mine", WORKING)
    backend = registry.load("mine")
    before = backend.kernel_hash("encode")
    # A module by itself lies among all that is installed.
    stranger = tmp_path / "stranger.py"
    stranger.write_text("x = 1\n")
    assert backend.kernel_hash("encode") == before
    source = tmp_path / f"{type(backend).__module__}.py"
    source.write_text(source.read_text() + "\n# words\n")
    assert backend.kernel_hash("encode") == before
    source.write_text(source.read_text() + "x = 1\n")
    assert backend.kernel_hash("encode") != before


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A backend of several files: two ops that share a module and a header, one kernel each."""
    folder = tmp_path / "in_package"
    folder.mkdir()
    files = {
        "__init__.py": WORKING,
        "encode.py": "from .shared import add\nfrom .words import say\n",
        "encode.cu": '#include "common.cuh"\nint encode;\n',
        "hamming_topk.py": "def launch():\n    from .shared import add\n",
        "hamming_topk.cu": '#include "select.cuh"\n',
        "select.cuh": '#pragma once\n#include "common.cuh"\n',
        "common.cuh": "#pragma once\nint common;  // a word\n",
        "shared.py": '"""Says what."""\n\ndef add(a, b):\n    """Add."""\n    return a + b  # so\n',
        "words.py": "say = 1\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "in_package", raising=False)
    importlib.invalidate_caches()
    return folder, importlib.import_module("in_package").Mine()


def hashes(backend):
    return {op: backend.kernel_hash(op) for op in ("encode", "hamming_topk")}


@pytest.mark.parametrize(
    ("file", "old", "new", "void"),
    [
        ("shared.py", '"""Add."""', '"""Add two\n    numbers."""', set()),
        ("shared.py", "  # so", "", set()),
        ("shared.py", '"""Says what."""\n', "", set()),
        ("common.cuh", "  // a word", "  /* another\n word */", set()),
        ("shared.py", "a + b", "b + a", {"encode", "hamming_topk"}),
        ("words.py", "1", "2", {"encode"}),
        ("encode.cu", "int encode", "int decode", {"encode"}),
        ("select.cuh", "#pragma once", "#pragma once\nint more;", {"hamming_topk"}),
        ("common.cuh", "int common", "int comm0n", {"encode", "hamming_topk"}),
        ("hamming_topk.py", "add", "add as plus", {"hamming_topk"}),
    ],
)
def test_hash_covers_what_an_op_reaches_but_no_words(package, file, old, new, void):
    folder, backend = package
    before = hashes(backend)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    after = hashes(backend)
    assert {op for op in before if before[op] != after[op]} == void


# Files of a package, then the last of them after an edit, and whether it voids what was tuned.
WRITTEN = {
    "byte order mark": ({"encode.py": "\ufefffrom .k import f", "k.py": "f = 1"}, "f = 2", True),
    "name like a module": (
        {
            "encode.py": "from .ks import scan",
            "ks/__init__.py": "from .fast import scan",
            "ks/scan.py": "",
            "ks/fast.py": "def scan(): return 1",
        },
        "def scan(): return 2",
        True,
    ),
    "headers that include each other": (
        {
            "encode.py": "x = 'k/a.cu'",
            "k/a.cu": '#include "../k/b.cuh"',
            "k/b.cuh": '#pragma once\n#include "../k/c.cuh"',
            "k/c.cuh": '#pragma once\n#include "../k/b.cuh"',
        },
        '#pragma once\n#include "../k/b.cuh"\nint x;',
        True,
    ),
    "dots in a name": ({"encode.py": "x = 'scan.v2.cu'", "scan.v2.cu": "int a;"}, "int b;", True),
    "dots before a name": (
        {"encode.py": "from .k import m", "k/m.py": "x = '../scan.ptx'", "scan.ptx": "a"},
        "b",
        True,
    ),
    "import by a function": (
        {"encode.py": "k = import_module('.k', __package__)", "k.py": "f = 1"},
        "f = 2",
        True,
    ),
    "digits with quotes": (
        {"encode.py": "", "encode.cu": "int a = 1'000;  // don't"},
        "int a = 1'000;  // do",
        False,
    ),
    "raw string": (
        {"encode.py": "", "encode.cu": 'auto s = R"(" // )"; int x = 1;'},
        'auto s = R"(" // )"; int x = 2;',
        True,
    ),
    "comment that goes on": (
        {"encode.py": "", "encode.cu": "// a \\\n b\nint x;"},
        "// a \\\n c\nint x;",
        False,
    ),
    "include that goes on": (
        {"encode.py": "", "encode.cu": '#include \\\n "b.cuh"', "b.cuh": "int a;"},
        "int b;",
        True,
    ),
    "blank line in a string": ({"encode.py": 'x = """a\n\nb"""'}, 'x = """a\nb"""', True),
    "blank lines": ({"encode.py": "x = 1\n\n# so\n\ny = '#'"}, "\n#\nx = 1  # x\ny = '#'\n", False),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_hash_reads_sources_as_compilers_do(tmp_path, monkeypatch, case):
    files, edited, void = WRITTEN[case]
    folder = tmp_path / "written"
    for name, text in {"__init__.py": WORKING, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "written", raising=False)
    importlib.invalidate_caches()
    backend = importlib.import_module("written").Mine()
    before = backend.kernel_hash("encode")
    (folder / list(files)[-1]).write_text(edited, "utf-8")
    assert (backend.kernel_hash("encode") != before) is void


@pytest.mark.parametrize("name", ["triton", "cupy", "numba"])
def test_words_in_a_kernel_file_leave_every_hash(name, tmp_path):
    """On copies of our own backends."""
    kind = registry.class_of(name)
    folder = tmp_path / name
    shutil.copytree(Path(inspect.getfile(kind)).parent, folder)
    module = type("Copy", (kind,), {"__module__": kind.__module__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getfile", lambda found: str(folder / "__init__.py"))
        ops = ("encode", "hamming_topk", "sparse_attend", "hash_attend")
        before = {op: module().kernel_hash(op) for op in ops}
        for path in folder.glob("*.py"):
            text = path.read_text().replace('"""', '"""Other words. ', 1)
            path.write_text(f"# And these.\n{text}\n# The end.\n")
        for path in folder.glob("*.cu*"):
            path.write_text(f"// Other words.\n{path.read_text()}")
        assert {op: module().kernel_hash(op) for op in ops} == before
        sparse = folder / "sparse_attend.py"
        sparse.write_text(sparse.read_text() + "\nx = 1\n")
        after = {op: module().kernel_hash(op) for op in ops}
    changed = {op for op in ops if after[op] != before[op]}
    assert "sparse_attend" in changed
    assert not changed & {"encode", "hamming_topk"}


def test_plug_in_comes_after_our_own_in_auto(plug_in):
    plug_in("mine", WORKING)
    assert registry.resolve(PROBLEM, adapter(), "cpu").name == "numba"


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_plug_in_cannot_take_a_name_of_ours(plug_in, name):
    plug_in(name, WORKING.replace('"mine"', f'"{name}"'))
    assert hata.encode(X, PROJECTION).dtype == np.uint8
    assert [info.name for info in hata.list_backends()] == list(registry.BUILT_IN)


def test_explicit_choice_never_falls_back(plug_in):
    refusing = WORKING + "    def unsupported(self, problem): return ['too odd', 'too small']\n"
    plug_in("mine", refusing)
    with hata.use_backend("mine"):
        match = "'mine' cannot run encode: too odd; too small; use another backend"
        with pytest.raises(hata.BackendUnavailable, match=match):
            hata.encode(X, PROJECTION)
        torch = pytest.importorskip("torch")
        x, projection = torch.tensor(X), torch.tensor(PROJECTION)
        with pytest.raises(hata.HataDTypeError, match="'mine': got torch arrays"):
            hata.encode(x, projection)
    assert hata.encode(X, PROJECTION).dtype == np.uint8


def test_backend_refuses_dtypes_it_does_not_declare(plug_in):
    plug_in("mine", WORKING + "    dtypes = frozenset({'float16'})\n")
    with hata.use_backend("mine"):
        with pytest.raises(hata.HataDTypeError, match="got float32, expected one of float16"):
            hata.encode(X, PROJECTION)
        assert hata.encode(X.astype(np.float16), PROJECTION) == "mine ran"


def test_auto_lists_every_reason_where_nothing_can_run():
    with pytest.raises(hata.BackendUnavailable) as caught:
        registry.resolve(Problem(op="encode", device="cuda", dtype="float32"), adapter(), "cuda:0")
    for name in registry.BUILT_IN:
        assert f"'{name}'" in str(caught.value)


def test_fault_38_device_arrays_for_the_reference():
    with hata.use_backend("reference"), pytest.raises(hata.HataDeviceError, match="on cuda:0"):
        registry.resolve(Problem(op="encode", device="cuda", dtype="float32"), adapter(), "cuda:0")


def test_fault_38_host_arrays_for_a_device_backend(plug_in):
    plug_in("mine", WORKING + "    devices = frozenset({'cuda'})\n")
    with hata.use_backend("mine"):
        match = r"got arrays on cpu, expected cuda.*set_backend\('numba'\)"
        with pytest.raises(hata.HataDeviceError, match=match):
            hata.encode(X, PROJECTION)


def test_use_backend_nests_and_restores():
    hata.set_backend("reference")
    with hata.use_backend("auto"):
        assert hata.get_backend() == "auto"
        with hata.use_backend("reference"):
            assert hata.get_backend() == "reference"
        assert hata.get_backend() == "auto"
        with contextlib.suppress(ZeroDivisionError), hata.use_backend("reference"):
            raise ZeroDivisionError
        assert hata.get_backend() == "auto"
    assert hata.get_backend() == "reference"


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_fault_49_threads_with_different_backends(plug_in):
    plug_in("mine", WORKING)
    barrier = threading.Barrier(2)
    seen = {}

    def work(name, expected):
        with hata.use_backend(name):
            wrong = 0
            for _ in range(200):
                barrier.wait()
                wrong += (str(hata.encode(X, PROJECTION)) == "mine ran") != expected
            seen[name] = wrong, hata.get_backend()

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in (("mine", True), ("reference", False))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"mine": (0, "mine"), "reference": (0, "reference")}
    assert hata.get_backend() == "auto"


def test_a_choice_made_during_a_call_is_of_later_calls(monkeypatch):
    hata.set_backend("numba")
    check = checks.check

    def meanwhile(call):
        hata.set_backend("reference")
        return check(call)

    with monkeypatch.context() as patched:
        patched.setattr(checks, "check", meanwhile)
        hata.encode(X, PROJECTION)
    hata.set_backend("numba")
    hata.encode(X, PROJECTION)
    assert registry.in_force()[1].last[1].backend.name == "numba"


def test_a_profile_chosen_during_a_call_is_of_later_calls(monkeypatch):
    backend = registry.load("numba")
    hata.set_backend("numba")
    hata.use_profile(Profile(device.fingerprint("cpu"), MEASURED))
    hata.encode(X, PROJECTION)
    route = registry.in_force()[1].last[1]
    (other,) = {"one", "all"} - {route.config["threads"]}
    config = {**route.config, "threads": other}
    kernels = {"numba": {"encode": backend.kernel_hash("encode")}}
    here = replace(device.fingerprint("cpu"), kernels=kernels)
    entry = Entry("numba", route.problem, config, Timing(1.0, 1.0, 1.0), 2.0)
    drop = backend.look_up_with

    def late(lookup):
        hata.encode(X, PROJECTION)
        drop(lookup)

    monkeypatch.setattr(backend, "look_up_with", late)
    hata.use_profile(Profile(here, MEASURED, (entry,)))
    hata.encode(X, PROJECTION)
    assert registry.in_force()[1].last[1].config == config


def test_set_backend_is_seen_by_all_threads_and_use_backend_by_none():
    hata.set_backend("reference")
    assert in_thread(hata.get_backend) == "reference"
    with hata.use_backend("auto"):
        assert in_thread(hata.get_backend) == "reference"


def test_environment_names_the_default(monkeypatch):
    for value, expected in (("reference", "reference"), ("", "auto")):
        monkeypatch.setenv("HATA_BACKEND", value)
        registry.reset()
        assert hata.get_backend() == expected
    monkeypatch.setenv("HATA_BACKEND", "tritn")
    registry.reset()
    with pytest.raises(hata.UnknownBackend, match="Did you mean 'triton'"):
        hata.encode(X, PROJECTION)


def test_broken_profile_leaves_the_one_in_force(tmp_path):
    before = registry.profile_in_force()
    (tmp_path / "p.yaml").write_text("schema: [")
    with pytest.raises(hata.ProfileError):
        hata.use_profile(tmp_path / "p.yaml")
    with pytest.raises(hata.ProfileError):
        hata.use_profile(tmp_path / "absent.yaml")
    assert registry.profile_in_force() is before


def test_prepare_sees_the_call(monkeypatch):
    """Kernels may depend on arguments that no problem holds, such as the heads of query codes."""
    seen = []
    monkeypatch.setattr(registry.load("numba"), "prepare", seen.append)
    ones, codes = np.ones((1, 2, 5, 16), np.float32), np.zeros((1, 2, 5, 4), np.uint8)
    q_codes = np.zeros((1, 14, 1, 4), np.uint8)
    given = (ones[:, :, :1], ones, ones, codes, np.ones((2, 16, 32), np.float32))
    hata.prepare("hash_attend", *given, 3, q_codes=q_codes, fresh=2)
    (call,) = seen
    assert (call.OP, call.problem.op, call.fw.name) == ("hash_attend", "hash_attend", "numpy")
    assert call.q_codes is q_codes
    assert (codes == 0).all()


def test_what_is_prepared_compiled_and_refused_follows_from_one_list(plug_in):
    source = """
    class Piece:
        def __init__(self, call, sm): self.op, self.sm, self.done = call.OP, sm, []
        def load(self, device): LOADED.append((self.op, device))
        def misfit(self, sm, smem): return f"too large for {smem}" if smem < 100 else None
    LOADED = []
    """
    listing = "    def kernels(self, call, sm=None): return [Piece(call, sm)]\n"
    plug_in("mine", textwrap.dedent(source) + WORKING + listing)
    backend = registry.load("mine")
    with hata.use_backend("mine"):
        hata.prepare("encode", X, PROJECTION)
    assert sys.modules[type(backend).__module__].LOADED == [("encode", "cpu")]
    problem = replace(PROBLEM, projection_dtype="float32")
    ahead = backend.ahead(problem, {}, 80)
    assert {(kernel.op, kernel.sm) for kernel in ahead} == {("encode", 80)}
    assert backend.refusal(problem, {}, 80, 99) == "too large for 99"
    assert backend.refusal(problem, {}, 80, 100) is None


def test_auto_takes_what_the_profile_of_a_gpu_measured_fastest(monkeypatch, tmp_path):
    """By op and shape; written and read as files are."""
    pytest.importorskip("triton", reason="the Triton backend needs it")
    torch = pytest.importorskip("torch", reason="the arrays are torch's")
    h200 = Fingerprint("cuda", "NVIDIA H200", 132, sm=90, smem_optin=232448)
    monkeypatch.setattr("hata.device.has_cuda", lambda: True)
    monkeypatch.setattr("hata.device.fingerprint", lambda kind="cpu": h200)
    backends = {}
    for name in ("triton", "cupy"):
        found = registry.class_of(name)
        monkeypatch.setattr(found, "missing", classmethod(lambda cls: None))
        # It would compile kernels to see whether they fit.
        monkeypatch.setattr(found, "refusal", lambda self, problem, config, sm, smem: None)
        monkeypatch.setattr(found, "devices", frozenset({"cuda"}))
        backends[name] = registry.load(name)
    few, many = (
        Problem(op="hamming_topk", device="cuda", dtype="uint8", heads=32, kv_heads=8, bits=128,
                k=512, slots=slots)
        for slots in (32768, 1 << 19)
    )  # fmt: skip
    times = {("triton", few): 5.0, ("cupy", few): 4.0, ("triton", many): 30.0, ("cupy", many): 40.0}
    profile = Profile(
        fingerprint=replace(
            h200,
            kernels={
                n: {"hamming_topk": b.kernel_hash("hamming_topk")} for n, b in backends.items()
            },
        ),
        measured=MEASURED,
        entries=tuple(
            Entry(name, key, backends[name].default(key), Timing(us, us, us), us)
            for (name, key), us in times.items()
        ),
    )
    profile.save(tmp_path / "h200.yaml")
    hata.set_backend("auto")
    hata.use_profile(tmp_path / "h200.yaml")
    arrays = hata.arrays.framework("x", torch.zeros(1))

    def chosen(problem):
        return registry.resolve(problem, arrays, "cuda:0").name

    assert (chosen(few), chosen(many)) == ("cupy", "triton")
    # The nearest entries decide where nothing was measured.
    assert chosen(replace(few, slots=16384)) == "cupy"
    assert chosen(replace(many, k=1024)) == "triton"
    # Nothing was measured on other heads, and neither leads: the order of backends decides.
    assert registry.AUTO_ORDER[0] == "triton"
    assert chosen(replace(few, heads=16)) == "triton"
    middle = replace(few, slots=1 << 17)
    entries = [
        Entry(name, middle, backends[name].default(middle), Timing(us, us, us), us)
        for name, us in (("triton", 9.0), ("cupy", 8.0))
    ]
    led = replace(profile, entries=(*profile.entries, *entries))
    led.save(tmp_path / "led.yaml")
    hata.use_profile(tmp_path / "led.yaml")
    # What was fastest most often is taken for sizes that are new.
    assert chosen(replace(few, heads=16)) == "cupy"
    assert chosen(many) == "triton"
    # Of the same op, the same kernels and the same device.
    op, hashes = "hamming_topk", {n: b.kernel_hash("hamming_topk") for n, b in backends.items()}
    assert led.leader(op, "cuda", hashes) == "cupy"
    assert led.leader("encode", "cuda", hashes) is None
    assert led.leader(op, "cuda", {**hashes, "cupy": "0" * 64}) is None
    with pytest.warns(ProfileWarning, match="not used"):
        assert led.leader(op, "cuda", hashes, replace(h200, sm=80)) is None


def test_shipped_profiles_are_sound():
    for path in store.SHIPPED.glob("*.yaml"):
        shipped = Profile.load(path)
        assert path.stem == shipped.fingerprint.slug
        assert shipped.measured.cold_cache
        assert not shipped.measured.predicted
        # Those of models depend on their encoders.
        assert not shipped.selections
        for backend, ops in shipped.fingerprint.kernels.items():
            found = {op: registry.class_of(backend)().kernel_hash(op) for op in ops}
            # Else it would be refused: tune anew on that device, or remove the file.
            assert found == dict(ops)
        for entry in shipped.entries:
            assert 0 < entry.us.median <= entry.default_us
