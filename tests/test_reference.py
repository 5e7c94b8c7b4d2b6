"""The reference backend against the conformance suite."""

from hata.testing import BackendSuite


class TestReference(BackendSuite):
    backend = "reference"
    max_examples = 5
    max_slots = 60
    max_head_dim = 128
