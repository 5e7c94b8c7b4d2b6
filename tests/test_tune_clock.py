"""The clock of a GPU, held against a `torch` whose GPU is a list of kernels."""

import gc
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

from hata.measure import clock
from hata.measure.clock import CUDAClock
from hata.problem import Problem
from tune import worker
from tune.trial import race

ENCODE = Problem(
    op="encode", device="cpu", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)


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
    monkeypatch.setattr(clock, "_torch", lambda: fake)
    clock._sweeps.cache_clear()
    yield fake
    clock._sweeps.cache_clear()


class SimulatedInputs:
    """Inputs whose calls take `us` and tell which set of them they were given."""

    problem = replace(ENCODE, device="cuda")

    def __init__(self, gpu, us, sets=3):
        self.calls = [lambda n=n: gpu.kernel(f"set {n}", us) for n in range(sets)]
        self.prepared = 0

    def prepare(self):
        self.prepared += len(self.calls)


def simulated(gpu, us):
    return SimulatedInputs(gpu, us), {}


def test_a_sample_is_the_time_of_a_call_without_its_sweep(gpu):
    backend = SimpleNamespace(name="numba")
    candidates = [simulated(gpu, 25.0), simulated(gpu, 10.0)]
    samples = race(backend, candidates, seconds=0.0, least=5)  # type: ignore[arg-type]
    assert np.allclose(samples[0], 25.0)
    assert np.allclose(samples[1], 10.0)
    assert len(samples[0]) == len(samples[1]) == 5
    # More memory is read than the cache holds, before every call.
    assert gpu.largest >= 2 * gpu.L2
    # Each set of each candidate was prepared: nothing compiles in a capture.
    assert [inputs.prepared for inputs, _ in candidates] == [3, 3]


def test_calls_take_turns_over_the_sets_behind_sweeps(gpu):
    watch = CUDAClock()
    watch.add(simulated(gpu, 5.0)[0].calls)
    gpu.log.clear()
    watch.sample(0)
    first, second = (n for n, kernel in enumerate(gpu.log[:-1]) if kernel == "event")
    # The GPU has something to do while it is handed the graphs.
    assert gpu.log[:first] == ["sweep"] * clock.LEAD
    assert gpu.log[first + 1 : second] == ["sweep"] * clock.PAIRS
    pairs = gpu.log[second + 1 : -1]
    assert pairs[::2] == ["sweep"] * clock.PAIRS
    assert pairs[1::2] == [f"set {n % 3}" for n in range(clock.PAIRS)]


def test_the_time_of_the_host_is_in_no_sample(gpu):
    """Kernels shorter than their launches, and graphs that take long to hand over."""
    gpu.launch_us = 4.0
    candidates = [simulated(gpu, 25.0), simulated(gpu, 2.0)]
    samples = race(SimpleNamespace(name="numba"), candidates, seconds=0.0)  # type: ignore[arg-type]
    assert np.allclose(samples[0], 25.0)
    assert np.allclose(samples[1], 2.0)


def test_a_call_that_costs_nothing_is_not_divided_by(gpu):
    watch = CUDAClock()
    watch.add(simulated(gpu, 0.0)[0].calls)
    assert watch.sample(0)[0] > 0


def test_a_capture_that_fails_is_ended_and_told(gpu):
    def failing():
        raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        CUDAClock().add([failing])
    assert gpu.capturing is None
    assert gc.isenabled()


def test_a_lost_gpu_is_told_from_a_sound_one(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    fake = FakeGPU()
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert worker.gpu_fault() is None
    fake.synchronize = lost
    assert worker.gpu_fault() == "CUDA error: an illegal memory access was encountered"
    fake.is_initialized = lambda: False
    assert worker.gpu_fault() is None
