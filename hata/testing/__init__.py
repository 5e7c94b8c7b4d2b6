"""The conformance suite: hold a backend against the contract of `hata.ops`.

In a test file of your own (pytest, hypothesis and NumPy are needed; torch, JAX and CuPy arrays are
tested where they are installed)::

    from hata.testing import BackendSuite

    class TestMine(BackendSuite):
        backend = "mine"            # its name among the entry points of the group "hata.backends"
        device = "cpu"              # or "cuda"

Then `pytest` runs every op over drawn sizes, strides, dtypes and options against the reference, and
every known fault (`test_fault_NN_...`, each a way to go wrong; a fault's number never changes).
Cases come from what the backend declares: its frameworks, dtypes and devices, and
`unsupported(problem)`, whose reasons become skips, as does what `missing()` says. A backend that
cannot be imported, compiled or loaded fails. Its undefined memory is poisoned, so that what it
forgets to write shows as NaN.
"""

from hata.testing.faults_inputs import InputFaults
from hata.testing.faults_torch import TorchFaults
from hata.testing.faults_values import ValueFaults

__all__ = ["BackendSuite"]


class BackendSuite(ValueFaults, InputFaults, TorchFaults):
    """Subclass it, name your backend, and run pytest.

    Attributes:
        backend: Name of the backend.
        device: `"cpu"` or `"cuda"`.
        frameworks: Frameworks to test; `None`: all that the backend declares for this device.
        dtypes: dtypes to test; `None`: all that the backend declares.
        max_slots: Most keys in a drawn case.
        max_head_dim: Largest head size in a drawn case.
        max_examples: Drawn cases per test, framework and dtype.
        wide_slots: Slots of the arrays that 32-bit offsets do not reach, some 5 KiB each. With
            fewer, on a small machine, fault 20 still sees copies, but no offset that is too small.
    """
