"""The conformance suite: hold a backend against the contract of `hata.ops`.

In a test file of your own (pytest, hypothesis and NumPy are needed; torch, JAX and CuPy arrays are
tested where they are installed)::

    from hata.testing import BackendSuite

    class TestMine(BackendSuite):
        backend = "mine"            # its name among the entry points of the group "hata.backends"
        device = "cpu"              # or "cuda"

Then `pytest` runs every op over drawn sizes, strides, dtypes and options against a float64 oracle,
and every known fault (`test_fault_NN_...`, each a way to go wrong; a fault's number never changes).
Cases come from what the backend declares: its frameworks, dtypes and devices, and
`unsupported(problem)`, whose reasons become skips, as does what `missing()` says. A backend that
cannot be imported, compiled or loaded fails. Its undefined memory is poisoned, so that what it
forgets to write shows as NaN.
"""

from hata.testing.suite import BackendSuite

__all__ = ["BackendSuite"]
