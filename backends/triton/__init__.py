"""The Triton backend. It declares itself; its kernels are not part of this release."""

from __future__ import annotations

from typing import ClassVar

from hata.backend import Backend


class TritonBackend(Backend):
    """Portable GPU kernels in Triton, for NVIDIA GPUs from sm_80 up."""

    name: ClassVar[str] = "triton"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})

    @classmethod
    def missing(cls) -> str | None:
        """Say why this backend cannot run."""
        return "this release holds no Triton kernels yet; use 'reference' on the CPU"
