"""What only a GPU has: a read-only kernel, and the times of single kernels by the profiler."""

# ruff: noqa: ANN001, ANN202 (arguments of a jitted kernel are the compiler's to type)

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hata.measure.clock import sweep_gpu

# Rounds of sweep and call that the profiler watches.
_PROFILED = 20
_BLOCK = 4096
_LOOPS = 2


@triton.jit
def _now(after):
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1", "=l,r", [after], tl.int64, False, 1
    )


@triton.jit
def _read_kernel(
    words, sums, clocks, count, BLOCK: tl.constexpr, LOOPS: tl.constexpr, CLOCKED: tl.constexpr
):
    """Read `count` words; the sums keep the compiler from leaving the reads out."""
    program = tl.program_id(0).to(tl.int64)
    if CLOCKED:
        tl.store(clocks + program * CLOCKED, _now(0))
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(LOOPS):
        at = (program * LOOPS + i) * BLOCK + tl.arange(0, BLOCK)
        total ^= tl.load(words + at, mask=at < count, other=0)
    total = tl.sum(total)
    if CLOCKED:
        tl.store(clocks + program * CLOCKED + 1, _now(total))
    tl.store(sums + program, total)


def reader(size: int, clocks: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    """A read-only pass over `size` bytes of memory of the GPU, with 16-byte loads.

    Its programs note when they start and have read in `clocks` `[programs, words]` (int64, ns).
    """
    words = torch.ones(max(size // 4, 1), dtype=torch.int32, device="cuda")
    programs = triton.cdiv(words.numel(), _BLOCK * _LOOPS)
    sums = torch.empty(programs, dtype=torch.int32, device="cuda")
    clocked = 0 if clocks is None else clocks.stride(0)

    def call() -> torch.Tensor:
        _read_kernel[(programs,)](words, sums, clocks, words.numel(), _BLOCK, _LOOPS, clocked)
        return sums

    return call


def kernels(calls: Sequence[Callable[[], object]]) -> list[list[tuple[str, list[float]]]]:
    """Names and samples in µs of the kernels of each call, each call after a sweep of the cache.

    A kernel's time includes its own start and end, some 2 µs of which the next one hides in a step.
    """
    found = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
            for _ in range(_PROFILED):
                sweep_gpu()
                call()
            torch.cuda.synchronize()
        events = sorted(
            (event for event in record.events() if event.device_type == DeviceType.CUDA),
            key=lambda event: event.time_range.start,
        )
        size = len(events) // _PROFILED
        # The first of each round is the sweep.
        names = [event.name.strip("_").removesuffix("_kernel") for event in events[1:size]]
        times = [[event.device_time for event in events[i::size]] for i in range(1, size)]
        found.append(list(zip(names, times, strict=True)))
    return found
