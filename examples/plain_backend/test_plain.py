"""The plain backend against the conformance suite."""

from hata.testing import BackendSuite


class TestPlain(BackendSuite):
    """Few and small cases, since this backend is slow."""

    backend = "plain"
    max_examples = 5
    max_slots = 60
    max_head_dim = 128
