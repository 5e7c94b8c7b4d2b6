"""The CuPy backend against the conformance suite, on a GPU."""

import importlib

import pytest

from hata import registry
from hata.testing import BackendSuite

CuPyBackend = importlib.import_module("hata.backends.cupy").CuPyBackend


class TestCuPy(BackendSuite):
    backend = "cupy"
    device = "cuda"
    # Every case compiles kernels of its own.
    max_examples = 5


class ThroughMemory(CuPyBackend):
    """Blocks of a row meet through global memory, as by default only those of long rows do."""

    def default(self, problem):
        config = super().default(problem)
        if "cluster" in config:
            config |= {"cluster": "cooperative", "num_splits": 4}
        return config


class TestCuPyThroughMemory(BackendSuite):
    backend = "cupy"
    device = "cuda"
    max_examples = 2

    @pytest.fixture(autouse=True)
    def _through_memory(self, monkeypatch):
        monkeypatch.setitem(registry._state.backends, "cupy", ThroughMemory())
