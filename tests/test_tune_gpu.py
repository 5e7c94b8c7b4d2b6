"""Tuning on a GPU, as far as it can be held without one: the clock, the plan, the failures."""

import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

import hata
from hata import checks, registry
from hata.backend import Backend, Budget
from hata.device import Fingerprint
from hata.problem import Problem
from hata.profile import Profile
from tune import ahead, check, cost, cuda, inputs, measure, propose, search, session, space
from tune.__main__ import main
from tune.ahead import Ahead
from tune.check import Checker
from tune.inputs import Candidate, Inputs, sets_for
from tune.space import Space
from tune.worker import CRASH, MEMORY, Failure, Worker

H200 = Fingerprint("cuda", "NVIDIA H200", 132, sm=90, smem_optin=232448, driver="580", cuda="13.0")
ENCODE = Problem(
    op="encode", device="cpu", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)


# The clock.


class FakeGPU:
    """A `torch` whose GPU is a list of kernels; each takes its time, or is captured.

    A launch, of a kernel or of a node of a graph, takes the host `launch_us`; work begins when the
    GPU has done what was before it and the host has handed it over.
    """

    L2 = 1 << 20

    def __init__(self):
        self.now, self.log, self.capturing, self.largest = 0.0, [], None, 0
        self.host, self.launch_us = 0.0, 0.0
        self.float32, self.cuda = "float32", self
        self.is_available = self.is_initialized = lambda: True

    def kernel(self, name, us):
        if self.capturing is not None:
            self.capturing.append((name, us))
        else:
            self.host += self.launch_us
            self.run(name, us)

    def run(self, name, us):
        self.log.append(name)
        self.now = max(self.now, self.host) + us

    # torch
    def zeros(self, shape, dtype, device):
        self.largest = 4 * shape[0] * shape[1]
        return self

    def empty(self, *_, **__):
        return self

    def sum(self, memory, dim, out):
        self.kernel("sweep", 40.0)

    # torch.cuda
    def current_device(self):
        return 0

    def get_device_properties(self, _):
        return SimpleNamespace(L2_cache_size=self.L2)

    def synchronize(self):
        assert self.capturing is None, "a wait while a graph is captured"

    def graph_pool_handle(self):
        return "pool"

    def Stream(self):
        return "stream"

    def stream(self, stream):
        import contextlib

        return contextlib.nullcontext()

    def CUDAGraph(self):
        gpu = self

        class Graph:
            def capture_begin(self, pool):
                assert pool == "pool"
                gpu.capturing = self.kernels = []

            def capture_end(self):
                gpu.capturing = None

            def replay(self):
                gpu.host += gpu.launch_us * len(self.kernels)
                for name, us in self.kernels:
                    gpu.run(name, us)

        return Graph()

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                gpu.run("event", 0.0)
                self.at = gpu.now

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGPU()
    monkeypatch.setattr(cuda, "_torch", lambda: fake)
    cuda._sweeps.cache_clear()
    yield fake
    cuda._sweeps.cache_clear()


def simulated(gpu, us, sets=3):
    """A candidate whose calls take `us` and note which set of inputs they were given."""
    problem = replace(ENCODE, device="cuda")

    class Call:
        op, args, kwargs = "encode", (), {}

        def __init__(self, number):
            self.number = number

        def __call__(self):
            gpu.kernel(f"set {self.number}", us)

    inputs = SimpleNamespace(problem=problem, calls=[Call(n) for n in range(sets)])
    return Candidate(inputs, {})  # type: ignore[arg-type]


@pytest.fixture
def prepared(monkeypatch):
    calls = []
    monkeypatch.setattr(hata, "prepare", lambda op, *_, **__: calls.append(op))
    return calls


def test_a_sample_is_the_time_of_a_call_without_its_sweep(gpu, prepared):
    backend = SimpleNamespace(name="any")
    candidates = [simulated(gpu, 25.0), simulated(gpu, 10.0)]
    samples = measure.race(backend, candidates, seconds=0.0, least=5)  # type: ignore[arg-type]
    assert np.allclose(samples[0], 25.0)
    assert np.allclose(samples[1], 10.0)
    assert len(samples[0]) == len(samples[1]) == 5
    # More memory is read than the cache holds, before every call.
    assert gpu.largest >= 2 * gpu.L2
    # Each set of each candidate was prepared: nothing compiles in a capture.
    assert len(prepared) == 6


def test_calls_take_turns_over_the_sets_behind_sweeps(gpu):
    clock = cuda.Clock()
    clock.add(simulated(gpu, 5.0).inputs.calls)
    gpu.log.clear()
    clock.sample(0)
    first, second = (n for n, kernel in enumerate(gpu.log[:-1]) if kernel == "event")
    # The GPU has something to do while it is handed the graphs.
    assert gpu.log[:first] == ["sweep"] * cuda.LEAD
    assert gpu.log[first + 1 : second] == ["sweep"] * cuda.PAIRS
    pairs = gpu.log[second + 1 : -1]
    assert pairs[::2] == ["sweep"] * cuda.PAIRS
    assert pairs[1::2] == [f"set {n % 3}" for n in range(cuda.PAIRS)]


def test_the_time_of_the_host_is_in_no_sample(gpu, prepared):
    """Kernels shorter than their launches, and graphs that take long to hand over."""
    gpu.launch_us = 4.0
    candidates = [simulated(gpu, 25.0), simulated(gpu, 2.0)]
    samples = measure.race(SimpleNamespace(name="any"), candidates, seconds=0.0)  # type: ignore[arg-type]
    assert np.allclose(samples[0], 25.0)
    assert np.allclose(samples[1], 2.0)


def test_a_call_that_costs_nothing_is_not_divided_by(gpu):
    clock = cuda.Clock()
    clock.add(simulated(gpu, 0.0).inputs.calls)
    assert clock.sample(0) > 0


def test_a_capture_that_fails_is_ended_and_told(gpu, prepared):
    candidate = simulated(gpu, 1.0)

    class Failing:
        op, args, kwargs = "encode", (), {}

        def __call__(self):
            raise RuntimeError("not while capturing")

    candidate.inputs.calls[:] = [Failing()]
    with pytest.raises(RuntimeError, match="not while capturing"):
        cuda.Clock().add(candidate.inputs.calls)
    assert gpu.capturing is None


def test_a_lost_gpu_is_told_from_a_sound_one(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    fake = FakeGPU()
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert cuda.fault() is None
    fake.synchronize = lost
    assert cuda.fault() == "CUDA error: an illegal memory access was encountered"
    fake.is_initialized = lambda: False
    assert cuda.fault() is None


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
    found = space.problems(space.COMMON, "cuda", ["bfloat16"])
    assert len(set(found)) == len(found)
    assert {p.op for p in found[:7]} == set(hata.problem.OPS)
    assert found[0].heads == 32
    backend = registry.load("reference")
    for wanted in found:
        # The same call on few keys and another device; neither is in the way of the rest.
        small = replace(
            wanted, device="cpu", dtype="uint8" if wanted.dtype == "uint8" else "float32",
            projection_dtype=wanted.projection_dtype and "float32", slots=min(wanted.slots, 256),
            batch=min(wanted.batch, 2), tokens=min(wanted.tokens, 64), k=min(wanted.k, 64),
        )  # fmt: skip
        args = Inputs(backend, small, pool=0).calls[0].args
        if small.op == "encode":
            seen = checks.encode(*args, None, None, None)
        elif small.op == "hamming_topk":
            seen = checks.hamming_topk(*args[:2], Budget(small.k), None, None, None, False)
        elif small.op == "sparse_attend":
            seen = checks.sparse_attend(*args, None)
        else:
            none = (None,) * 4
            budget = Budget(small.k)
            seen = checks.hash_attend(*args[:5], *none, 1, None, None, budget, None, None)
        assert seen[1] == small


def test_memory_is_bounded():
    """All sets of the largest step fit a GPU of 40 GB, and so does the checker's copy of codes."""
    for p in space.problems(space.COMMON, "cuda", ["bfloat16"]):
        count, kv = sets_for(p)
        codes = p.batch * p.kv_heads * p.slots * p.bits // 8
        held = 2 * p.batch * p.kv_heads * p.slots * (p.head_dim + p.value_dim)
        vectors = 2 * p.batch * p.kv_heads * p.tokens * p.head_dim if p.op == "encode" else 0
        assert count <= 4
        assert (count + 1) * codes + kv * held + count * vectors < 10 << 30


# Proposals.

KNOBS = (*((f"n{i}", (1, 2, 4, 8, 16)) for i in range(6)), ("way", (False, True)))
LARGE = Space(KNOBS)
MIDDLE = {**{f"n{i}": 4 for i in range(6)}, "way": False}


def separable(config):
    """Some knobs matter and add up; the best is one or two steps off the default."""
    us = 100.0
    us += 6 * abs(np.log2(config["n0"]) - 3) + 5 * abs(np.log2(config["n1"]) - 4)
    us += 4 * abs(np.log2(config["n2"]) - 1) + (0 if config["way"] else 3)
    return us


def test_neighbours_differ_in_one_knob_by_one_step():
    found = list(propose.neighbours(LARGE, LARGE.number(MIDDLE)))
    assert len(found) == len(set(found)) == 13
    for number in found:
        config = LARGE.config(number)
        (name,) = (name for name in config if config[name] != MIDDLE[name])
        assert name == "way" or config[name] in (2, 8)
    corner = LARGE.number({**{f"n{i}": 1 for i in range(6)}, "way": True})
    assert len(list(propose.neighbours(LARGE, corner))) == 7


def test_gains_are_put_together_and_taken_further():
    default = LARGE.number(MIDDLE)
    ratios = {
        n: separable(LARGE.config(n)) / separable(MIDDLE)
        for n in (default, *propose.neighbours(LARGE, default))
    }
    asked = 0
    while more := propose.climb(LARGE, default, ratios):
        asked += len(more)
        ratios |= {n: separable(LARGE.config(n)) / separable(MIDDLE) for n in more}
    best = LARGE.config(min(ratios, key=ratios.__getitem__))
    assert {k: best[k] for k in ("n0", "n1", "n2", "way")} == {
        "n0": 8, "n1": 16, "n2": 2, "way": True,
    }  # fmt: skip
    # Few steps, and in the end all neighbours of the best.
    assert asked <= 20 + 14
    assert propose.climb(LARGE, default, {default: 1.0}) == []


def test_what_won_on_problems_like_it_is_tried_first():
    problem = replace(ENCODE, device="cuda", tokens=4096)
    won = {
        replace(problem, tokens=1): {**MIDDLE, "n0": 8},
        replace(problem, tokens=8192): {**MIDDLE, "n1": 8},
        replace(problem, tokens=4096, bits=64): {**MIDDLE, "n2": 8},
        # Not a configuration here, and another op.
        replace(problem, tokens=2048): {"other": 1},
        space.hash_problem(space.COMMON, "cuda", "bfloat16", 128, 4096, 512): {**MIDDLE, "n3": 8},
    }
    found = [LARGE.config(n) for n in propose.winners(problem, LARGE, won)]
    assert found == [{**MIDDLE, "n1": 8}, {**MIDDLE, "n0": 8}, {**MIDDLE, "n2": 8}]
    assert propose.winners(problem, LARGE, {}) == []


def test_where_time_is_short_every_backend_has_the_same_problems(monkeypatch):
    """Times of two backends are compared: neither may have entries that the other lacks."""
    problems = space.problems(space.COMMON, "cuda", ["bfloat16"], quick=True)[:4]
    names = [SimpleNamespace(name=name) for name in ("a", "b")]
    run = object.__new__(session._Session)
    # One of them cannot run the second problem.
    of_b = [problems[0], *problems[2:]]
    run.plan = SimpleNamespace(backends=names, problems={"a": problems, "b": of_b})  # type: ignore[assignment]
    run.effort, run.entries, run.skipped = space.Effort(1e-9, 1), [], []
    run.report = SimpleNamespace(advance=lambda: None)  # type: ignore[assignment]
    tuned: list[tuple[str, int]] = []
    monkeypatch.setattr(run, "_look_ahead", lambda queue: None)
    monkeypatch.setattr(run, "_finished", lambda backend, problem: problem == problems[3])
    run.ahead = None  # type: ignore[assignment]

    def tune(backend, problem, *_):
        tuned.append((backend.name, problems.index(problem)))
        run.entries.append(problem)

    monkeypatch.setattr(run, "_tune", tune)
    queue = run._queue({"a", "b"})
    run._tune_all(queue, {"a": None, "b": None})  # type: ignore[dict-item]
    # The first whatever the time, and what an earlier run has settled.
    assert tuned == [("a", 0), ("b", 0), ("a", 3), ("b", 3)]
    assert len(run.skipped) == 3
    assert all(text.endswith(session._TIME_UP) for text in run.skipped)


class OnPaper:
    def __init__(self):
        self.checked, self.expected = [], []

    def expect(self, configs):
        self.expected += [LARGE.number(config) for config in configs]

    def check(self, config):
        self.checked.append(LARGE.number(config))
        # One knob has a value that never runs.
        return Failure("error", "too much shared memory") if config["n5"] == 8 else None

    def race(self, configs, seconds):
        return [[separable(config)] * 9 for config in configs]


def test_a_large_space_is_searched_from_the_default_and_nothing_is_wasted(tmp_path):
    storage = search.open_storage(f"sqlite:///{tmp_path}/s.db")[0]
    study = search.open_study(storage, "s", resume=False)
    problem = replace(ENCODE, device="cuda")
    machine = cost.Machine(4e6, 300e6, 3.0, 132)
    evaluator = OnPaper()
    verdict = search.tune(
        study, LARGE, MIDDLE, evaluator,
        suggestions=propose.suggestions(problem, LARGE, machine, MIDDLE),
        limits=search.Limits(30, 60, 0.0),
    )  # fmt: skip
    assert {k: verdict.config[k] for k in ("n0", "n1", "n2", "way")} == {
        "n0": 8, "n1": 16, "n2": 2, "way": True,
    }  # fmt: skip
    assert verdict.trials <= 30
    assert evaluator.checked[0] == LARGE.number(MIDDLE)
    # What was proposed could be compiled ahead; the sampler's draws cannot be foreseen.
    assert set(evaluator.checked[:20]) <= set(evaluator.expected)
    assert {failure.kind for failure in verdict.failures.values()} == {"error"}


def test_shares_that_do_not_fill_a_gpu_look_slow():
    machine = cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132)
    problem = space.hash_problem(space.COMMON, "cuda", "bfloat16", 128, 131072, 2048)
    us = [cost.predict_us(problem, {"parts": n, "splits": 32}, machine) for n in (1, 4, 16, 32)]
    assert us == sorted(us, reverse=True)
    floor = cost.floor_us(problem, machine)
    assert 3.0 < floor < min(us)
    # The 16.8 MB of codes and 8.4 MB of rows, at 4 TB/s.
    assert floor == pytest.approx(3.0 + 6.4, abs=0.3)


@pytest.mark.parametrize("name", ["triton", "cupy"])
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "all"])
def test_the_model_has_a_time_for_whatever_a_backend_may_be_tuned_with(name, quick):
    """Values that stand for no number included, such as 0 for as many as fit."""
    pytest.importorskip("triton" if name == "triton" else "torch", reason="the backend needs it")
    backend = registry.class_of(name)()
    machine = cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132)
    for problem in space.problems(space.COMMON, "cuda", ["bfloat16"], quick=quick):
        configs, default = Space.of(backend, problem), backend.default(problem)
        floor = cost.floor_us(problem, machine)
        for number in propose.suggestions(problem, configs, machine, default):
            us = cost.predict_us(problem, configs.config(number), machine)
            assert floor <= us * 1.001 < 1e6


# Checks.


@pytest.mark.parametrize("op", hata.problem.OPS)
@pytest.mark.parametrize("whole", [True, False], ids=["all", "corners"])
def test_large_inputs_are_checked_at_their_corners(op, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(check, "_MOST_SCORES", 0)
        monkeypatch.setattr(check, "_MOST_VECTORS", 8)
    monkeypatch.setattr(space, "LEAST_BUDGET", 32)
    layout = space.Layout("tiny", "synthetic", 2, 12, 3, 32, "float32", 4096)
    problem = replace(
        next(p for p in space.problems(layout, "cpu", ["float32"], norms=True) if p.op == op),
        batch=4, slots=512 if op != "encode" else 0, k=32 if op != "encode" else 0,
    )  # fmt: skip
    backend = registry.load("reference")
    with registry.use_backend("reference"):
        checker = Checker(backend, Inputs(backend, problem, pool=0))
        assert checker.fault(backend.default(problem)) is None
        launcher = f"launch_{op}"
        right = getattr(backend, launcher)

        def wrong(*args):
            result = right(*args)
            first = result[0] if isinstance(result, tuple) else result
            # The last row and head, which are looked at wherever not all are.
            first[-1, -1, -1, -1] += 1
            return result

        monkeypatch.setattr(backend, launcher, wrong)
        registry.reset()
        registry._state.backends["reference"] = backend
        with registry.use_backend("reference"):
            told = checker.fault(backend.default(problem))
    assert told is not None
    assert not told.startswith("awkward")
    registry.reset()


# Failures.

BACKEND = """
import os, pathlib
import numpy as np
import tune.cuda
from hata.backend import Backend

class Mine(Backend):
    name = "mine"
    frameworks = frozenset({"numpy"})
    dtypes = frozenset({"float32"})

    def tunables(self, op, problem):
        return {"how": ("right", "illegal", "full", "exit")}

    def default(self, problem):
        return {"how": "right"}

    def compile(self, problem, sm):
        how = self.config(problem)["how"]
        if how == "exit":
            os._exit(3)
        if how == "full":
            raise RuntimeError("does not compile")
        seen = os.environ["CUDA_VISIBLE_DEVICES"]
        folder = pathlib.Path(os.environ["MINE_FOLDER"])
        (folder / how).write_text(f"{sm} {seen!r} {os.getpid()}")

    def launch_encode(self, problem, fw, x, projection, bias, out, norms):
        how = self.config(problem)["how"]
        if how == "illegal":
            tune.cuda.fault = lambda: "CUDA error: an illegal memory access was encountered"
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if how == "full":
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        group = x.shape[1] // projection.shape[0]
        bits = x @ projection.repeat(group, axis=0) > 0
        return np.packbits(bits, axis=-1, bitorder="little")

    launch_hamming_topk = launch_sparse_attend = launch_hash_attend = launch_encode
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

        def compile(self, problem, sm):
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
    evaluator = session._Evaluator("mine", worker, compiler, ENCODE)  # type: ignore[arg-type]
    evaluator.expect([{"how": "right"}, {"how": "full"}])
    both = [ENCODE, check.awkward_problem(ENCODE)]
    assert [problem for problem, _ in asked] == both * 2
    assert [config["how"] for _, config in asked] == ["right", "right", "full", "full"]
    evaluator.check({"how": "full"})
    assert waited == asked[2:]


def test_a_backend_that_compiles_nothing_ahead_starts_no_process(monkeypatch):
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", None)
    backend = registry.load("reference")
    assert type(backend).compile is Backend.compile
    with Ahead([backend], 90) as compiler:
        for ask in (compiler.begin, compiler.prefer, compiler.wait):
            ask("reference", [(ENCODE, {})])


SIMULATED = """
import importlib.util, sys
import numpy as np
import torch
from hata.backend import Backend
from tune import cost, cuda, inputs

spec = importlib.util.spec_from_file_location("test_tune_gpu", TESTS)
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
gpu = tests.FakeGPU()
cuda._torch = lambda: gpu
cost._calibrate_cuda = lambda launch: cost.Machine(4e6, 300e6, launch, 132)

def stand_in(self, backend, device, dtype):
    self.device, self.name, self._torch = torch.device("cpu"), "torch", torch

inputs.Arrays.__init__ = stand_in

class Simulated(Backend):
    name = "simulated"
    devices = frozenset({"cpu", "cuda"})
    frameworks = frozenset({"torch"})

    def tunables(self, op, problem):
        return {name: tuple(values) for name, values in tests.KNOBS}

    def default(self, problem):
        return tests.MIDDLE

    def unsupported(self, problem):
        return [] if problem.op == "encode" else ["only encode"]

    def compile(self, problem, sm):
        assert sm == 90

    def launch_encode(self, problem, fw, x, projection, bias, out, norms):
        config = self.config(problem)
        if config["n4"] == 8:
            raise RuntimeError("planted failure")
        # Next to nothing is the call by which launches are measured.
        gpu.kernel("encode", 2.0 if x.shape[2] == 1 else tests.separable(config))
        if gpu.capturing is not None:
            return None
        values = x.double() @ projection.double().repeat_interleave(
            x.shape[1] // projection.shape[0], 0
        )
        bits = (values > 0).numpy()
        codes = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))
        return codes ^ 1 if config["n5"] == 2 else codes

    launch_hamming_topk = launch_sparse_attend = launch_hash_attend = launch_encode
"""


def test_a_whole_run_on_a_simulated_gpu(tmp_path, monkeypatch, capsys):
    """Plan, processes, calibration, checks, clock, search, verdict and profile, on a stand-in."""
    pytest.importorskip("torch", reason="the stand-in's arrays are torch's")
    site = tmp_path / "site"
    info = site / "simulated-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "simulated_gpu.py").write_text(SIMULATED.replace("TESTS", repr(__file__)))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nsimulated = simulated_gpu:Simulated\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("hata.device.has_cuda", lambda: True)
    monkeypatch.setattr("hata.device.fingerprint", lambda kind="cpu": H200)
    out = tmp_path / "p.yaml"
    arguments = ["--gpu", "h200", "--backend", "simulated", "--quick", "--out", str(out)]
    # This process loads the stand-in too, for the plan.
    kept = cuda._torch, cost._calibrate_cuda, inputs.Arrays.__init__
    try:
        assert main([*arguments, "--storage", str(tmp_path / "s.db")]) == 0
    finally:
        cuda._torch, cost._calibrate_cuda, inputs.Arrays.__init__ = kept
        registry.reset()
        sys.modules.pop("simulated_gpu", None)
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(out)
    assert "planted failure" in told.err
    assert "bytes of codes are wrong" in told.err
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
    assert entry.default_us == pytest.approx(separable(MIDDLE))


def test_the_bench_checks_triton_kernels_in_the_interpreter(repo_root):
    """Inputs drawn on the device, oracle and verdict meet a GPU's kernels, as far as a CPU can."""
    pytest.importorskip("triton", reason="the Triton backend needs it")
    script = """
from dataclasses import replace
import torch
from hata import registry
from tune import check, inputs, space
from tune.worker import Bench

def stand_in(self, backend, device, dtype):
    # A device that is not called "cpu" and is one all the same.
    self.device, self.name, self._torch = torch.device("cpu"), "torch", torch

inputs.Arrays.__init__ = stand_in
check._MOST_SCORES, check._MOST_VECTORS = 0, 4
layout = space.Layout("tiny", "synthetic", 2, 6, 3, 16, "float32", 4096)
bench, backend = Bench("triton", pool=0), registry.load("triton")
for p in space.problems(layout, "cuda", ["float32"], quick=True, norms=True)[1:]:
    p = replace(p, batch=min(p.batch, 2), tokens=min(p.tokens, 8), slots=min(p.slots, 128),
                k=min(p.k, 16))
    held = bench._problem(p)
    assert all(x.device.type == "cpu" for x in held.inputs.calls[0].args if hasattr(x, "device"))
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
