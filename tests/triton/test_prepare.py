"""What `prepare` loads is what a call launches, whatever heads its query codes have."""

import importlib
from dataclasses import replace

import pytest

import hata
from hata.device import Fingerprint
from hata.measure.arrays import TorchKit
from hata.problem import Problem
from hata.profile import Entry, Measured, Profile, ProfileWarning, Timing
from hata.testing.faults_values import SMALL
from hata.testing.properties import Properties

torch = pytest.importorskip("torch", reason="the Triton backend needs it")
pytest.importorskip("triton", reason="the Triton backend needs it")

launch = importlib.import_module("hata.backends.triton.launch")
triton_backend = importlib.import_module("hata.backends.triton").TritonBackend

CASES = {
    "encode": ("encode", {"norms": True}),
    "topk": ("hamming_topk", {"code_group": 3, "lengths": (40, 9)}),
    "topk per head": ("hamming_topk", {"code_group": 5, "per_head": True, "norms": True}),
    "attend": ("sparse_attend", {"per_head": True, "sinks": True}),
    "step": ("hash_attend", {"fresh": 1, "norms": True}),
    "one code a head": ("hash_attend", {"given_codes": True, "code_group": 1, "fresh": 1}),
    "codes of q's heads": ("hash_attend", {"given_codes": True, "code_group": 2}),
    "codes of more heads": ("hash_attend", {"given_codes": True, "code_group": 7, "fresh": 2}),
    "odd rows": ("hash_attend", {"layouts": ("padded", "offset"), "bits": 32, "slots": 39}),
}


@pytest.fixture
def launched(monkeypatch):
    """Kernels that calls on CPU tensors would have launched."""
    found = []

    def load_on(self, ordinal):
        return lambda *_: found.append(self), None, None

    monkeypatch.setattr(launch.Bound, "load_on", load_on)
    # What a launch asks the current GPU for.
    monkeypatch.setattr(launch, "gpu", lambda ordinal: launch.GPU(90, ordinal))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(triton_backend, "missing", classmethod(lambda cls: None))
    monkeypatch.setattr(triton_backend, "devices", frozenset({"cpu"}))
    yield found
    hata.registry.reset()


@pytest.mark.skipif(launch.INTERPRETED, reason="nothing is loaded in the interpreter")
@pytest.mark.parametrize("case", CASES)
def test_prepare_loads_what_the_call_launches(launched, monkeypatch, case):
    prepared = []
    monkeypatch.setattr(launch.Bound, "load", lambda self, device: prepared.append(self))
    op, changes = CASES[case]
    kit = TorchKit()
    placed, options = Properties().arguments(kit, replace(SMALL, **changes), op)
    arrays = {name: p and p.array for name, p in placed.items()}
    before = {name: kit.get(p.memory).tobytes() for name, p in placed.items() if p}
    with hata.use_backend("triton"):
        hata.prepare(op, **arrays, **options)
        assert not launched
        getattr(hata, op)(**arrays, **options)
    assert launched
    assert set(launched) == set(prepared)
    assert before == {name: kit.get(p.memory).tobytes() for name, p in placed.items() if p}


@pytest.mark.skipif(launch.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_a_problem_is_compiled_ahead(tmp_path, monkeypatch, sm):
    """The tuner's way: for a problem and a compute capability, into the cache, without a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []
    monkeypatch.setattr(launch.Bound, "compile", lambda self, sm: compiled.append((self, sm)))
    backend = triton_backend()
    problem = Problem(
        "hash_attend", "cuda", "bfloat16", "bfloat16", heads=8, kv_heads=2, head_dim=64,
        value_dim=64, bits=128, k=64, slots=4096,
    )  # fmt: skip
    for kernel in backend.ahead(problem, backend.default(problem), sm):
        kernel.compile(sm)
    assert len(compiled) == len({kernel for kernel, _ in compiled}) > 4
    # What a launch there would take: binary tensor cores, and launches that overlap.
    (scan,) = (kernel for kernel, _ in compiled if kernel.fn.__name__ == "_scan_kernel")
    assert scan.constants.BINARY_MMA is (sm <= 90)
    assert scan.options.get("launch_pdl", False) == (sm >= 90)


# 227 KB, what a block of an H200 may have, and the least that any GPU gives.
@pytest.mark.parametrize(("shared", "why"), [(232448, None), (64, "bytes of shared memory")])
def test_fault_52_kernels_that_do_not_fit_are_refused(tmp_path, monkeypatch, shared, why):
    """Of a profile's entry: the default runs, with one warning."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    here = Fingerprint("cuda", "NVIDIA H200", 132, sm=90, smem_optin=shared)
    monkeypatch.setattr("hata.device.fingerprint", lambda kind="cpu": here)
    monkeypatch.setattr(triton_backend, "missing", classmethod(lambda cls: None))
    problem = Problem(
        "sparse_attend", "cuda", "bfloat16", heads=8, kv_heads=2, head_dim=64, value_dim=64, k=64,
        slots=512,
    )  # fmt: skip
    backend = hata.registry.load("triton")
    knobs = backend.tunables(problem.op, problem)
    config = {name: values[-1] for name, values in knobs.items()}
    kernels = {"triton": {problem.op: backend.kernel_hash(problem.op)}}
    hata.use_profile(
        Profile(
            fingerprint=replace(here, kernels=kernels),
            measured=Measured("2026-01-01", "cuda_graph", 9, True, 1.0, 9, 0),
            entries=(Entry("triton", problem, config, Timing(1.0, 1.0, 1.0), 2.0),),
            selections=(),
        )
    )
    try:
        if why is None:
            assert backend.config(problem) == config
        else:
            with pytest.warns(ProfileWarning, match=why):
                assert backend.config(problem) == backend.default(problem)
    finally:
        hata.registry.reset()
