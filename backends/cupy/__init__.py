"""The CuPy backend: hand-written CUDA, compiled by NVRTC at first use.

One file per op: a launcher, and beside it the `.cu` source of its kernel. `row.cu`, `scan.cu`,
`select.cu` and `attend.cu` hold what kernels share; `compiler` makes machine code and keeps it,
`device` loads and launches it, `plan` is what a call does again and again. Start reading at
`hash_attend.cu`.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

from hata.arrays import Framework
from hata.backend import Backend, Budget, Config
from hata.problem import Problem

OLDEST = 80


class CuPyBackend(Backend):
    """Raw CUDA compiled by NVRTC, for NVIDIA GPUs from sm_80 up."""

    name: ClassVar[str] = "cupy"
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

    def default(self, problem: Problem) -> Config:
        """The configuration of an untuned problem."""
        from . import defaults

        return defaults.of(problem)

    def tunables(self, op: str, problem: Problem) -> dict[str, tuple]:
        """The knobs of an op; `defaults` says what each is."""
        from . import defaults

        return defaults.KNOBS[op]

    def prepare(self, problem: Problem) -> None:
        """Compile and load what launches of this problem need, on the current device."""
        from . import device, rehearsal

        gpu = device.current()
        for kernel in rehearsal.kernels(self, problem, gpu):
            gpu.load(kernel)

    def prepare_call(self, launcher: str, problem: Problem, fw: Framework, *args: Any) -> None:
        """Compile and load what this call launches, on the device of its arrays."""
        from . import plan

        with plan.preparing():
            getattr(self, launcher)(problem, fw, *args)

    def compile(self, problem: Problem, sm: int) -> None:
        """Compile what launches of this problem need into the folder of cubins, without a GPU."""
        from . import compiler, device, rehearsal

        for kernel in rehearsal.kernels(self, problem, device.Described(sm)):
            compiler.cubin(kernel.name, kernel.macros, sm)

    def launch_encode(
        self,
        problem: Problem,
        fw: Framework,
        x: Any,
        projection: Any,
        bias: Any,
        out: Any,
        norms: Any,
    ) -> Any:
        """Run `hata.encode`."""
        from . import encode

        return encode.launch(problem, self.config(problem), fw, x, projection, bias, out, norms)

    def launch_hamming_topk(
        self,
        problem: Problem,
        fw: Framework,
        q_codes: Any,
        k_codes: Any,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        per_head: bool,
    ) -> Any:
        """Run `hata.hamming_topk`."""
        from . import hamming_topk

        return hamming_topk.launch(
            problem, self.config(problem), fw, q_codes, k_codes, lengths, starts, budget,
            key_norms, per_head,
        )  # fmt: skip

    def launch_sparse_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        indices: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Run `hata.sparse_attend`."""
        from . import sparse_attend

        return sparse_attend.launch(
            problem, self.config(problem), fw, q, keys, values, indices, scale, softcap,
            sink_logits, return_lse,
        )  # fmt: skip

    def launch_hash_attend(
        self,
        problem: Problem,
        fw: Framework,
        q: Any,
        keys: Any,
        values: Any,
        key_codes: Any,
        projection: Any,
        bias: Any,
        query_projection: Any,
        query_bias: Any,
        q_codes: Any,
        fresh: int,
        dense_below: int,
        lengths: Any,
        starts: Any,
        budget: Budget,
        key_norms: Any,
        scale: float,
        softcap: float | None,
        sink_logits: Any,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Run `hata.hash_attend`."""
        from . import hash_attend

        return hash_attend.launch(
            problem, self.config(problem), fw, q, keys, values, key_codes, projection, bias,
            query_projection, query_bias, q_codes, fresh, dense_below, lengths, starts, budget,
            key_norms, scale, softcap, sink_logits, return_lse,
        )  # fmt: skip
