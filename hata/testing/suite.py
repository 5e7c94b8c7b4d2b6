"""`BackendSuite`: all tests of a backend in one class."""

from __future__ import annotations

from hata.testing.faults_inputs import InputFaults
from hata.testing.faults_torch import TorchFaults
from hata.testing.faults_values import ValueFaults


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
