"""The Triton backend: portable kernels for NVIDIA GPUs from sm_80 up.

One file per op. `pieces` holds jitted functions that several kernels share, `launch` how kernels
are compiled, kept and launched. Start reading at `hamming_topk`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from hata.backend import Kernel
from hata.launches import LaunchingBackend, LaunchList

OLDEST = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonBackend(LaunchingBackend):
    """Portable GPU kernels in Triton, for NVIDIA GPUs from sm_80 up.

    With `TRITON_INTERPRET=1` in the environment of the process it runs CPU tensors in Triton's
    interpreter instead, for tests and for reading along.
    """

    name: ClassVar[str] = "triton"
    package: ClassVar[str] = __name__
    devices: ClassVar[frozenset[str]] = frozenset({"cpu" if INTERPRETED else "cuda"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"torch"})

    @classmethod
    def missing(cls) -> str | None:
        """Say why this backend cannot run here."""
        for package in ("torch", "triton"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed; pip install 'hata-attention[triton]'"
        if INTERPRETED:
            return None
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; an NVIDIA GPU and its driver are needed"
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if max(found) < OLDEST:
            return (
                f"the GPU has compute capability {max(found)[0]}.{max(found)[1]}, "
                f"expected {OLDEST[0]}.{OLDEST[1]} (A100) or newer"
            )
        return None

    def kernels(self, call: Any, sm: int | None = None) -> Sequence[Kernel]:
        """Every kernel that a call launches; the interpreter needs none."""
        return () if INTERPRETED else super().kernels(call, sm)

    def gpu(self, device: str, sm: int | None) -> Any:
        """The GPU that is here, or one of this capability."""
        from . import launch

        if INTERPRETED or sm is not None:
            return launch.GPU(sm or 90)
        return launch.gpu(int(device.partition(":")[2] or 0))

    def new_list(self, call: Any, gpu: Any) -> LaunchList:
        """A list that the interpreter runs, where it is to."""
        from . import launch

        return (launch.InterpretedList if INTERPRETED else LaunchList)(call, gpu)
