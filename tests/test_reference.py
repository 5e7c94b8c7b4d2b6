"""The reference backend against the conformance suite."""

from hata.testing import BackendSuite


class TestReference(BackendSuite):
    backend = "reference"
