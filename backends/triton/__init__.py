"""The Triton backend: portable kernels for NVIDIA GPUs from sm_80 up.

One file per op. `pieces` holds jitted pieces that several kernels share, `launch` how kernels are
compiled, kept and launched. Start reading at `hamming_topk`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, ClassVar

from hata.arrays import Framework
from hata.backend import Backend, Budget, Config, use_config
from hata.problem import Problem

OLDEST = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonBackend(Backend):
    """Portable GPU kernels in Triton, for NVIDIA GPUs from sm_80 up.

    With `TRITON_INTERPRET=1` in the environment of the process it runs CPU tensors in Triton's
    interpreter instead, for tests and for reading along.
    """

    name: ClassVar[str] = "triton"
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

    def default(self, problem: Problem) -> Config:
        """The configuration of an untuned problem."""
        from . import defaults

        return defaults.of(problem)

    def tunables(self, op: str, problem: Problem) -> dict[str, tuple]:
        """The knobs of an op; `defaults` says what each is."""
        from . import defaults

        return defaults.KNOBS[op]

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Say why kernels of a configuration do not fit the GPU; they are compiled to see."""
        if INTERPRETED:
            return None
        from hata import device

        from . import launch, rehearsal

        here = device.fingerprint("cuda")
        sm = here.sm or 0
        with use_config(self.name, problem.op, config):
            kernels = rehearsal.kernels(self, problem, sm)
        return launch.misfit(kernels, sm, here.smem_optin or 0)

    def prepare_call(self, launcher: str, problem: Problem, fw: Framework, *args: Any) -> None:
        """Compile and load what this call launches, on the device of its arrays."""
        if INTERPRETED:
            return
        import torch

        from . import launch, rehearsal

        kernels = rehearsal.of_call(self, launcher, problem, fw, args)
        with torch.cuda.device(args[0].device):
            launch.load_all(kernels, args[0].device.index)

    def compile(self, problem: Problem, sm: int) -> None:
        """Compile what launches of this problem need into Triton's cache, without a GPU."""
        from . import launch, rehearsal

        launch.compile_all(rehearsal.kernels(self, problem, sm), sm)

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
