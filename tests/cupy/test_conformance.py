"""The CuPy backend against the conformance suite, on a GPU."""

from hata.testing import BackendSuite


class TestCuPy(BackendSuite):
    backend = "cupy"
    device = "cuda"
    # Every case compiles kernels of its own.
    max_examples = 5
