"""Tuning on a GPU, as far as it can be held without one: plan, checks, failures, a whole run."""

import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

import hata
from hata import checks, registry
from hata.backend import Backend
from hata.device import Fingerprint
from hata.measure import clock, inputs
from hata.measure.inputs import Inputs, awkward_problem, sets_for
from hata.problem import Problem
from hata.profile import Profile
from tune import ahead, cost, search, space, trial
from tune.__main__ import main
from tune.ahead import Ahead
from tune.trial import Checker
from tune.worker import CRASH, MEMORY, Worker

H200 = Fingerprint("cuda", "NVIDIA H200", 132, sm=90, smem_optin=232448, driver="580", cuda="13.0")
ENCODE = Problem(
    op="encode", device="cpu", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)


# The plan.


@pytest.fixture
def h200(monkeypatch):
    """An H200 with the Triton backend, as far as a plan can see."""
    pytest.importorskip("triton", reason="the Triton backend needs it")
    backend = registry.class_of("triton")
    monkeypatch.setattr("hata.device.has_cuda", lambda: True)
    monkeypatch.setattr(
        "hata.device.fingerprint",
        lambda kind="cpu": H200 if kind == "cuda" else Fingerprint("cpu", "some CPU", 2),
    )
    monkeypatch.setattr(backend, "missing", classmethod(lambda cls: None))
    monkeypatch.setattr(backend, "devices", frozenset({"cuda"}))
    yield
    registry.reset()


@pytest.mark.parametrize("name", ["auto", "h200", "H200", "nvidia-h200"])
def test_the_plan_of_a_gpu(h200, name, capsys):
    assert main(["--gpu", name, "--backend", "triton", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200 (sm_90, 132 SMs)" in told
    for shape in ("B 8 S 131072", "64/8 D 128", "28/4", "S 524288", "r 64", "encode", "T 131072"):
        assert shape in told
    assert "nvidia-h200-132.yaml" in told
    assert main(["--gpu", name, "--backend", "triton", "--dry-run", "--quick"]) == 0
    assert "5 problems" in capsys.readouterr().out


def test_another_gpu_than_the_one_here_is_refused(h200, capsys):
    assert main(["--gpu", "a100", "--backend", "triton", "--dry-run"]) == 2
    assert "here is a NVIDIA H200" in capsys.readouterr().err


def test_every_step_that_a_gpu_is_tuned_for_is_one_that_users_call():
    found = space.problems(space.Grid(space.COMMON, "cuda"), ["bfloat16"])
    assert len(set(found)) == len(found)
    assert {p.op for p in found[:7]} == set(hata.problem.OPS)
    assert found[0].heads == 32
    backend = registry.load("numba")
    for wanted in found:
        # The same call on few keys and another device; neither is in the way of the rest.
        small = replace(
            wanted, device="cpu", dtype="uint8" if wanted.dtype == "uint8" else "float32",
            projection_dtype=wanted.projection_dtype and "float32", slots=min(wanted.slots, 256),
            batch=min(wanted.batch, 2), tokens=min(wanted.tokens, 64), k=min(wanted.k, 64),
        )  # fmt: skip
        assert checks.check(Inputs(backend, small, pool=0).sets[0]).problem == small


def test_memory_is_bounded():
    """All sets of the largest step fit a GPU of 40 GB, and so does the checker's copy of codes."""
    for p in space.problems(space.Grid(space.COMMON, "cuda"), ["bfloat16"]):
        count, kv = sets_for(p)
        codes = p.batch * p.kv_heads * p.slots * p.bits // 8
        held = 2 * p.batch * p.kv_heads * p.slots * (p.head_dim + p.value_dim)
        vectors = 2 * p.batch * p.kv_heads * p.tokens * p.head_dim if p.op == "encode" else 0
        assert count <= 4
        assert (count + 1) * codes + kv * held + count * vectors < 10 << 30


# Checks.


@pytest.mark.parametrize("op", hata.problem.OPS)
@pytest.mark.parametrize("whole", [True, False], ids=["all", "corners"])
def test_large_inputs_are_checked_at_their_corners(op, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(trial, "_MOST_SCORES", 0)
        monkeypatch.setattr(trial, "_MOST_VECTORS", 8)
    monkeypatch.setattr(space, "LEAST_BUDGET", 32)
    layout = space.Layout("tiny", "synthetic", 2, 12, 3, 32, "float32", 4096)
    grid = space.Grid(layout, "cpu", True)
    problem = replace(
        next(p for p in space.problems(grid, ["float32"]) if p.op == op),
        batch=4, slots=512 if op != "encode" else 0, k=32 if op != "encode" else 0,
    )  # fmt: skip
    backend = registry.load("numba")
    with registry.use_backend("numba"):
        checker = Checker(backend, Inputs(backend, problem, pool=0))
        assert checker.fault(backend.default(problem)) is None
        right = getattr(backend, op)

        def wrong(call):
            result = right(call)
            first = result[0] if isinstance(result, tuple) else result
            # The last row and head, which are looked at wherever not all are.
            first[-1, -1, -1, -1] += 1
            return result

        monkeypatch.setattr(backend, op, wrong)
        registry.reset()
        registry._state.backends["numba"] = backend
        with registry.use_backend("numba"):
            told = checker.fault(backend.default(problem))
    assert told is not None
    assert not told.startswith("awkward")
    registry.reset()


# Failures.

BACKEND = """
import os, pathlib
import numpy as np
import tune.worker
from hata.backend import Backend

class Kernel:
    def __init__(self, how):
        self.how = how

    def load(self, device):
        pass

    def compile(self, sm):
        if self.how == "exit":
            os._exit(3)
        if self.how == "full":
            raise RuntimeError("does not compile")
        seen = os.environ["CUDA_VISIBLE_DEVICES"]
        folder = pathlib.Path(os.environ["MINE_FOLDER"])
        (folder / self.how).write_text(f"{sm} {seen!r} {os.getpid()}")

class Mine(Backend):
    name = "mine"
    frameworks = frozenset({"numpy"})
    dtypes = frozenset({"float32"})

    def tunables(self, op, problem):
        return {"how": ("right", "illegal", "full", "exit")}

    def default(self, problem):
        return {"how": "right"}

    def kernels(self, call, sm=None):
        return [Kernel(call.config["how"])]

    def encode(self, call):
        x, projection, how = call.x, call.projection, call.config["how"]
        if how == "illegal":
            tune.worker.gpu_fault = lambda: "CUDA error: an illegal memory access was encountered"
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if how == "full":
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        group = x.shape[1] // projection.shape[0]
        bits = x @ projection.repeat(group, axis=0) > 0
        return np.packbits(bits, axis=-1, bitorder="little")

    hamming_topk = sparse_attend = encode
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mine.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nmine = mine:Mine\n")
    monkeypatch.syspath_prepend(str(site))
    folder = tmp_path / "compiled"
    folder.mkdir()
    monkeypatch.setenv("MINE_FOLDER", str(folder))
    yield folder
    registry.reset()
    sys.modules.pop("mine", None)


def test_fault_58_an_illegal_access_costs_a_process_and_nobody_else(mine):
    with Worker("mine", first_seconds=60, check_seconds=30) as worker:
        assert worker.check(ENCODE, {"how": "right"}) is None
        lost = worker.check(ENCODE, {"how": "illegal"})
        assert lost is not None
        assert lost.kind == CRASH
        assert "the GPU is lost" in lost.detail
        # The next one gets a new process, and no blame.
        assert worker.check(ENCODE, {"how": "right"}) is None
        assert worker.restarts == 2
        full = worker.check(ENCODE, {"how": "full"})
        assert full is not None
        assert full.kind == MEMORY
        assert worker.check(ENCODE, {"how": "right"}) is None
        assert worker.restarts == 2


def test_configurations_are_compiled_ahead_without_a_gpu(mine):
    backend = registry.load("mine")
    entries = [(ENCODE, {"how": how}) for how in ("right", "full", "illegal")]
    with Ahead([backend], 90, processes=2) as compiler:
        compiler.begin("mine", entries[:1])
        compiler.prefer("mine", entries[1:])
        compiler.wait("mine", entries)
        # One that does not compile is told where it is tried.
        told = {file.name: file.read_text().split() for file in mine.iterdir()}
        assert set(told) == {"right", "illegal"}
        for sm, visible, pid in told.values():
            assert (sm, visible) == ("90", "''")
            assert int(pid) != os.getpid()
        # Once is enough.
        (mine / "right").unlink()
        compiler.wait("mine", entries)
        assert not (mine / "right").exists()
        # A compiler that crashes ends compiling ahead, and nothing else.
        compiler.wait("mine", [(ENCODE, {"how": "exit"})])
        compiler.wait("mine", entries)
        assert not (mine / "right").exists()


def test_what_is_needed_now_is_compiled_before_what_was_asked_for(monkeypatch):
    done = []

    class Pool:
        """Runs what it was given when told to."""

        def __init__(self, *_, **__):
            self._processes, self.waiting = {}, []

        def submit(self, fn, name, problem, config, sm):
            job = Future()
            self.waiting.append((job, dict(config)["how"]))
            return job

        def shutdown(self, **_):
            pass

        def run(self):
            for job, how in self.waiting:
                if job.set_running_or_notify_cancel():
                    done.append(how)
                    job.set_result(None)
            self.waiting.clear()

    class Able:
        name = "able"

        def kernels(self, call, sm=None):
            pass

    pool = Pool()
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", lambda *_, **__: pool)

    def entries(text):
        return [(ENCODE, {"how": how}) for how in text]

    with Ahead([Able()], 90) as compiler:  # type: ignore[list-item]
        compiler.begin("able", entries("abc"))
        compiler.prefer("able", entries("xb"))
        compiler.begin("able", entries("ad"))
        pool.run()
        assert sorted(done[:2]) == ["b", "x"]
        assert done[2:] == ["a", "c", "d"]
        compiler.wait("able", entries("abx"))


def test_what_a_check_runs_is_compiled_ahead():
    """The awkward call beside the problem's has kernels of its own."""
    asked, waited = [], []
    compiler = SimpleNamespace(
        prefer=lambda name, entries: asked.extend(entries),
        wait=lambda name, entries: waited.extend(entries),
    )
    worker = SimpleNamespace(check=lambda problem, config: None)
    evaluator = search.Evaluator("mine", worker, compiler, ENCODE)  # type: ignore[arg-type]
    evaluator.expect([{"how": "right"}, {"how": "full"}])
    both = [ENCODE, awkward_problem(ENCODE)]
    assert [problem for problem, _ in asked] == both * 2
    assert [config["how"] for _, config in asked] == ["right", "right", "full", "full"]
    evaluator.check({"how": "full"})
    assert waited == asked[2:]


def test_a_backend_that_compiles_nothing_ahead_starts_no_process(monkeypatch):
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", None)

    class Plain:
        name, kernels = "plain", Backend.kernels

    with Ahead([Plain()], 90) as compiler:  # type: ignore[list-item]
        for ask in (compiler.begin, compiler.prefer, compiler.wait):
            ask("plain", [(ENCODE, {})])


SIMULATED = """
import importlib.util, sys
import numpy as np
import torch
from hata.backend import Backend
from hata.measure import clock, inputs
from hata.measure.arrays import TorchKit
from tune import cost

def load(path):
    spec = importlib.util.spec_from_file_location("tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

gpu = load(CLOCK).FakeGPU()
search = load(SEARCH)
clock._torch = lambda: gpu
cost._calibrate_cuda = lambda launch: cost.Machine(4e6, 300e6, launch, 132)
inputs.kit_for = lambda *_: TorchKit(torch.device("cpu"))

class Kernel:
    def load(self, device):
        pass

    def compile(self, sm):
        assert sm == 90

class Simulated(Backend):
    name = "simulated"
    devices = frozenset({"cpu", "cuda"})
    frameworks = frozenset({"torch"})

    def tunables(self, op, problem):
        return {name: tuple(values) for name, values in search.KNOBS}

    def default(self, problem):
        return search.MIDDLE

    def unsupported(self, problem):
        return [] if problem.op == "encode" else ["only encode"]

    def kernels(self, call, sm=None):
        return [Kernel()]

    def encode(self, call):
        x, projection, config = call.x, call.projection, call.config
        if config["n4"] == 8:
            raise RuntimeError("planted failure")
        # Next to nothing is the call by which launches are measured.
        gpu.kernel("encode", 2.0 if x.shape[2] == 1 else search.separable(config))
        if gpu.capturing is not None:
            return None
        values = x.double() @ projection.double().repeat_interleave(
            x.shape[1] // projection.shape[0], 0
        )
        bits = (values > 0).numpy()
        codes = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))
        return codes ^ 1 if config["n5"] == 2 else codes

    hamming_topk = sparse_attend = encode
"""


@pytest.mark.slow
def test_a_whole_run_on_a_simulated_gpu(tmp_path, monkeypatch, capsys):
    """Plan, processes, calibration, checks, clock, search, verdict and profile, on a stand-in."""
    pytest.importorskip("torch", reason="the stand-in's arrays are torch's")
    site = tmp_path / "site"
    info = site / "simulated-1.0.dist-info"
    info.mkdir(parents=True)
    here = Path(__file__)
    script = SIMULATED.replace("CLOCK", repr(str(here.with_name("test_tune_clock.py"))))
    script = script.replace("SEARCH", repr(str(here.with_name("test_tune_search.py"))))
    (site / "simulated_gpu.py").write_text(script)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nsimulated = simulated_gpu:Simulated\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("hata.device.has_cuda", lambda: True)
    monkeypatch.setattr("hata.device.fingerprint", lambda kind="cpu": H200)
    out = tmp_path / "p.yaml"
    arguments = ["--gpu", "h200", "--backend", "simulated", "--quick", "--out", str(out)]
    # This process loads the stand-in too, for the plan.
    kept = clock._torch, cost._calibrate_cuda, inputs.kit_for
    try:
        assert main([*arguments, "--storage", str(tmp_path / "s.db")]) == 0
    finally:
        clock._torch, cost._calibrate_cuda, inputs.kit_for = kept
        registry.reset()
        sys.modules.pop("simulated_gpu", None)
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(out)
    assert "planted failure" in told.err
    assert "bits of codes are wrong" in told.err
    found = Profile.load(out)
    assert found.fingerprint.name == "NVIDIA H200"
    assert found.measured.method == "cuda_graph"
    (entry,) = found.entries
    assert entry.op == "encode"
    assert {k: entry.config[k] for k in ("n0", "n1", "n2", "way")} == {
        "n0": 8, "n1": 16, "n2": 2, "way": True,
    }  # fmt: skip
    assert entry.config["n4"] != 8
    assert entry.config["n5"] != 2
    assert entry.us.median == pytest.approx(100.0)
    # What `separable` says of its default.
    assert entry.default_us == pytest.approx(123.0)


@pytest.mark.slow
def test_the_bench_checks_triton_kernels_in_the_interpreter(repo_root):
    """Inputs drawn on the device, reference and verdict meet a GPU's kernels, without a GPU."""
    pytest.importorskip("triton", reason="the Triton backend needs it")
    script = """
from dataclasses import replace
import torch
from hata import registry
from hata.measure import inputs
from hata.measure.arrays import TorchKit
from tune import space, trial
from tune.worker import Bench

# A device that is not called "cpu" and is one all the same.
inputs.kit_for = lambda *_: TorchKit(torch.device("cpu"))
trial._MOST_SCORES, trial._MOST_VECTORS = 0, 4
layout = space.Layout("tiny", "synthetic", 2, 6, 3, 16, "float32", 4096)
bench, backend = Bench("triton", pool=0), registry.load("triton")
for p in space.problems(space.Grid(layout, "cuda", True), ["float32"], quick=True)[1:]:
    p = replace(p, batch=min(p.batch, 2), tokens=min(p.tokens, 8), slots=min(p.slots, 128),
                k=min(p.k, 16))
    arrays = bench.held(p).inputs.sets[0].arrays().values()
    assert all(x.device.type == "cpu" for x in arrays if x is not None)
    print(p.op, bench.check(p, backend.default(p)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
        check=False, cwd=repo_root, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "hash_attend", "None", "hamming_topk", "None", "encode", "None", "sparse_attend", "None",
    ]  # fmt: skip
