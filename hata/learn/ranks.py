"""Processes that share a training: those of torchrun, or this one alone.

    torchrun --nproc-per-node 8 -m hata learn ...

Ranks share no tensors: they divide sequences among them to capture and layers to train, all through
files, so the folder must be one they all see, and they meet at barriers only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")
# A rank may wait while another trains the layers that are left.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process's place among them.

    Attributes:
        rank: Which one it is.
        count: How many there are.
        local: Which one it is on its machine: the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    def share(self, work: Sequence[_T]) -> list[_T]:
        """This rank's part of the work."""
        return list(work[self.rank :: self.count])

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def device(self, name: str) -> str:
        """The device of this rank: of several GPUs its own."""
        return f"cuda:{self.local}" if name == "cuda" and self.count > 1 else name


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, or one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    # Only barriers are needed, and gloo's need no GPU.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
