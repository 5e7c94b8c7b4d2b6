"""The CuPy backend. It declares itself; its kernels are not part of this release."""

from __future__ import annotations

from typing import ClassVar

from hata.backend import Backend


class CuPyBackend(Backend):
    """Raw CUDA compiled by NVRTC, for NVIDIA GPUs from sm_80 up."""

    name: ClassVar[str] = "cupy"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    frameworks: ClassVar[frozenset[str]] = frozenset({"torch", "cupy"})

    @classmethod
    def missing(cls) -> str | None:
        """Say why this backend cannot run."""
        return "this release holds no raw-CUDA kernels yet; use 'reference' on the CPU"
