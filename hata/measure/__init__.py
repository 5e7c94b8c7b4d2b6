"""What the conformance suite, the tuner and the benchmarks hold kernels against.

- `tolerance`: how close is close enough, against float64
- `arrays`: arrays of every framework, in every memory layout
- `inputs`: the calls that a problem is checked and timed on
- `clock`: how calls are timed, on a CPU and on a GPU
"""

from __future__ import annotations

import importlib
from typing import Any


def reference() -> Any:
    """The NumPy reference: the ops in float64, obviously right. Reached by name."""
    return importlib.import_module("hata.backends.reference")
