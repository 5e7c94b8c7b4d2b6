"""The tuner on a GPU for real: its clock, its way back from a lost GPU, a short run."""

import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")
pytest.importorskip("torch", reason="the GPU tests use torch")
pytest.importorskip("triton", reason="the planted kernels are in Triton")

import torch

from hata import device, registry
from hata.measure.clock import CUDAClock
from hata.problem import Problem
from hata.profile import Profile
from tune import ahead, capture, space
from tune.__main__ import main
from tune.worker import CRASH, MEMORY, WRONG, Worker

pytestmark = pytest.mark.gpu
ENCODE = Problem(
    op="encode", device="cuda", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)
BACKEND = """
import torch
import triton
import triton.language as tl
from hata.backend import Backend

@triton.jit
def _astray(out):
    tl.store(out + (1 << 40), 1)

class Bad(Backend):
    name = "bad"
    devices = frozenset({"cuda"})
    frameworks = frozenset({"torch"})
    dtypes = frozenset({"float32"})

    def tunables(self, op, problem):
        return {"how": ("slow", "fast", "wrong", "illegal", "full")}

    def default(self, problem):
        return {"how": "slow"}

    def encode(self, call):
        x, projection, fw, how = call.x, call.projection, call.fw, call.config["how"]
        group = x.shape[1] // projection.shape[0]
        if how == "full":
            fw.empty((1 << 44,), "uint8", x)
        if how == "illegal":
            _astray[(1,)](fw.empty((4,), "int32", x))
        weights = projection.repeat_interleave(group, 0)
        values = x @ weights
        for _ in range(20 if how == "slow" else 0):
            values = values + 0
        bits = (values > 0).reshape(*x.shape[:3], -1, 8)
        places = torch.arange(8, device=x.device)
        codes = (bits.int() << places).sum(-1).to(torch.uint8)
        return codes ^ 1 if how == "wrong" else codes

    hamming_topk = sparse_attend = encode
"""


@pytest.fixture
def bad(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "bad-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "bad_gpu.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nbad = bad_gpu:Bad\n")
    monkeypatch.syspath_prepend(str(site))
    yield
    registry.reset()
    sys.modules.pop("bad_gpu", None)


def test_the_fingerprint_is_what_torch_sees():
    found = device.fingerprint("cuda")
    properties = torch.cuda.get_device_properties(0)
    assert found.name == properties.name
    assert found.cores == properties.multi_processor_count
    assert found.sm == 10 * properties.major + properties.minor
    assert device.has_cuda()


def by_events(call, calls=50, replays=20):
    """Microseconds of a call, from events around many replays of a graph of many."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / (calls * replays)


@pytest.mark.alone
@pytest.mark.parametrize("cycles", [400_000, 20_000], ids=["long", "short"])
def test_the_clock_agrees_with_events_around_many_calls(cycles):
    """Where a cold cache makes no difference, and launches are no part of what events see."""

    def wait():
        torch.cuda._sleep(cycles)

    wait()
    clock = CUDAClock()
    clock.add([wait])
    us = np.median([clock.sample(0) for _ in range(15)])
    assert us == pytest.approx(by_events(wait), rel=0.05)


def test_fault_58_a_lost_gpu_costs_a_process_and_nobody_else(bad):
    with Worker("bad", first_seconds=120, check_seconds=60) as worker:
        assert worker.check(ENCODE, {"how": "fast"}) is None
        found = {how: worker.check(ENCODE, {"how": how}) for how in ("wrong", "illegal", "full")}
        assert {how: failure.kind for how, failure in found.items()} == {
            "wrong": WRONG,
            "illegal": CRASH,
            "full": MEMORY,
        }
        assert "the GPU is lost to it" in found["illegal"].detail
        assert worker.restarts == 2
        assert worker.check(ENCODE, {"how": "fast"}) is None
        samples = worker.race([(ENCODE, {"how": how}) for how in ("slow", "fast")], 0.1)
        assert np.median(samples[0]) > np.median(samples[1])


@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_a_short_run_tunes_every_op(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HATA_DEBUG", "1")
    absent = registry.missing(name)
    if absent is not None:
        pytest.skip(f"backend {name!r}: {absent}")
    found = space.problems(space.Grid(space.COMMON, "cuda"), ["bfloat16"], quick=True)
    small = [replace(p, slots=min(p.slots, 4096), k=min(p.k, 256)) for p in found[1:]]
    monkeypatch.setattr(space, "problems", lambda *args, **kwargs: small)
    monkeypatch.setattr(capture, "TOKENS", 1024)
    # Other tests compile at the same time.
    monkeypatch.setattr(ahead, "MOST_PROCESSES", 2)
    out = tmp_path / "p.yaml"
    arguments = ["--gpu", "auto", "--backend", name, "--quick", "--trials", "4"]
    arguments += ["--out", str(out), "--storage", str(tmp_path / "s.db")]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(out)
    profile = Profile.load(out)
    assert profile.fingerprint.device == "cuda"
    assert profile.measured.method == "cuda_graph"
    assert {entry.op for entry in profile.entries} == {p.op for p in small}
    for entry in profile.entries:
        assert 0 < entry.us.median <= entry.default_us
    backend = registry.load(name)
    for problem in small:
        match = profile.lookup(
            name, backend.kernel_hash(problem.op), problem, backend.tunables(problem.op, problem)
        )
        assert match.reason == "exact"
