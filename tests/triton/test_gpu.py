"""The Triton backend's own promises about launches, on a GPU."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

import hata
from hata.backend import use_config
from hata.errors import HataCaptureError
from hata.measure.arrays import TorchKit
from hata.problem import Problem
from hata.testing.faults_values import SMALL
from hata.testing.properties import Properties

torch = pytest.importorskip("torch", reason="the Triton backend needs it")
pytest.importorskip("triton", reason="the Triton backend needs it")

launch = importlib.import_module("hata.backends.triton.launch")

pytestmark = pytest.mark.gpu


@pytest.fixture
def unprepared(monkeypatch):
    """No kernel is loaded, as in a new process."""
    monkeypatch.setattr(launch, "_bound", {})
    hata.registry._forget()
    with hata.use_backend("triton"):
        yield
    hata.registry._forget()


def step(**changes):
    kit = TorchKit("cuda")
    placed, options = Properties().arguments(kit, replace(SMALL, **changes), "hash_attend")
    return {name: p and p.array for name, p in placed.items()}, options


# torch says so at the end of a capture in which nothing was launched.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_an_unprepared_call_under_capture_is_refused_and_harms_nothing(unprepared):
    tensors, options = step(fresh=1)
    with (
        pytest.raises(HataCaptureError, match=r"not prepared.*hata\.prepare"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        hata.hash_attend(**tensors, **options)
    hata.prepare("hash_attend", **tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hata.hash_attend(**tensors, **options)
    graph.replay()
    assert torch.equal(out, hata.hash_attend(**tensors, **options))


@pytest.mark.parametrize("group", [1, 5])
def test_prepare_is_all_that_a_capture_needs(unprepared, group):
    tensors, options = step(given_codes=True, code_group=group, norms=True, slots=77)
    hata.prepare("hash_attend", **tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hata.hash_attend(**tensors, **options)
    graph.replay()
    assert torch.equal(out, hata.hash_attend(**tensors, **options))


def test_compiled_ahead_is_what_is_loaded(unprepared, tmp_path, monkeypatch):
    """What `compile` leaves in the cache without a GPU, a launch on one finds there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors, options = step(slots=64, fresh=1, bits=128)
    backend = hata.registry.load("triton")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "prepare", lambda self, call: seen.append(call.problem))
        hata.prepare("hash_attend", **tensors, **options)
    major, minor = torch.cuda.get_device_capability()
    for kernel in backend.ahead(seen[0], backend.config(seen[0]), 10 * major + minor):
        kernel.compile(10 * major + minor)

    def cubins():
        return {file.relative_to(tmp_path) for file in tmp_path.rglob("*.cubin")}

    before = cubins()
    assert before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_bound", {})
        hata.registry._forget()
        hata.hash_attend(**tensors, **options)
    assert cubins() == before


# Planes and words in odd and even number; codes that share a vector, fill one and take several.
@pytest.mark.parametrize(
    ("group", "bits"),
    [
        (1, 32), (4, 32), (2, 64), (3, 96), (4, 128), (5, 160), (7, 256), (8, 64), (16, 128),
        (4, 512),
    ],
)  # fmt: skip
@pytest.mark.parametrize("norms", [False, True], ids=["hamming", "norms"])
def test_binary_products_count_what_popcounts_do(unprepared, group, bits, norms):
    """Indices of the NumPy backend, with distances made either way."""
    backend = hata.registry.load("triton")
    rng = np.random.default_rng(group * bits)
    q_codes = rng.integers(0, 256, (2, 2 * group, 1, bits // 8), np.uint8)
    k_codes = rng.integers(0, 256, (2, 2, 3000, bits // 8), np.uint8)
    given = {"key_norms": rng.random((2, 2, 3000)).astype(np.float16)} if norms else {}
    with hata.use_backend("reference"):
        expected = hata.hamming_topk(q_codes, k_codes, 200, **given)
    placed = [torch.from_numpy(x).cuda() for x in (q_codes, k_codes)]
    given = {name: torch.from_numpy(x).cuda() for name, x in given.items()}
    problem = Problem(
        "hamming_topk", "cuda", "uint8", batch=2, heads=2 * group, kv_heads=2, bits=bits, k=200,
        slots=3000, norms=norms,
    )  # fmt: skip
    for binary in (False, True):
        config = {**backend.default(problem), "binary_mma": binary}
        if bits == 32:
            # With more warps none would have keys enough for a product.
            config["scan_warps"] = 2
        launch._bound.clear()
        with use_config("triton", "hamming_topk", config):
            indices = hata.hamming_topk(*placed, 200, **given)
        (scan,) = (x for x in launch._bound.values() if x.fn.__name__ == "_scan_kernel")
        assert (binary and launch.gpu(0).has_binary_mma) == scan.constants.BINARY_MMA
        np.testing.assert_array_equal(indices.cpu().numpy(), expected)
