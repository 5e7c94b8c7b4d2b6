"""The CuPy backend: hand-written CUDA, compiled by NVRTC at first use.

One file per op: a launcher, and beside it the `.cu` source of its kernel. `row.cuh`, `scan.cuh`,
`select.cuh` and `attend.cuh` hold what kernels share; `compiler` makes machine code and keeps it,
`device` loads and launches it. Start reading at `hash_attend.cu`.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

from hata.launches import LaunchingBackend

OLDEST = 80


class CuPyBackend(LaunchingBackend):
    """Raw CUDA compiled by NVRTC, for NVIDIA GPUs from sm_80 up."""

    name: ClassVar[str] = "cupy"
    package: ClassVar[str] = __name__
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"torch", "cupy"})

    @classmethod
    def missing(cls) -> str | None:
        """Say why this backend cannot run here."""
        if importlib.util.find_spec("cupy") is None:
            return "cupy is not installed; pip install 'hata-attention[cuda13]' (or [cuda12])"
        from hata.device import has_cuda

        if not has_cuda():
            return "there is no CUDA device; an NVIDIA GPU and its driver are needed"
        from . import compiler, device, driver

        try:
            found, speaks = device.device(0).architecture, driver.version()
        except Exception as error:
            return str(error)
        if found < OLDEST:
            return f"the GPU has compute capability {found / 10}, expected 8.0 (A100) or newer"
        try:
            makes = compiler.version()[0]
        # Whatever a library that does not load makes CuPy raise.
        except Exception as error:
            return f"NVRTC does not load ({error}); pip install nvidia-cuda-nvrtc"
        if makes > speaks:
            return (
                f"NVRTC {makes} makes code that the driver does not load, which speaks CUDA "
                f"{speaks}; update the driver, or install CuPy and NVRTC for CUDA {speaks}"
            )
        return None

    def gpu(self, device: str, sm: int | None) -> Any:
        """The GPU that is here, or what is known of one of this capability."""
        from . import device as devices

        return devices.device_of(device) if sm is None else devices.Described(sm)
