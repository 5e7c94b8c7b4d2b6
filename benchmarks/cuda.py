"""What is different on a GPU: the clock, a read-only kernel, and the dense kernels to beat.

The clock is that of the tuner: CUDA graphs of calls, each behind a sweep of the second-level cache,
less the sweeps. See `tune.cuda`.
"""

# ruff: noqa: ANN001, ANN202 (arguments of a jitted kernel are the compiler's to type)

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.profiler import ProfilerActivity, profile

from benchmarks import contenders, timing
from benchmarks.contenders import Builder, Case, Contender
from tune.cuda import Clock, sweep

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


def reader(
    size: int, device: str, clocks: torch.Tensor | None = None
) -> Callable[[], torch.Tensor]:
    """A read-only pass over `size` bytes of memory, with 16-byte loads.

    Its programs note when they start and have read in `clocks` `[programs, words]` (int64, ns).
    """
    words = torch.ones(max(size // 4, 1), dtype=torch.int32, device=device)
    programs = triton.cdiv(words.numel(), _BLOCK * _LOOPS)
    sums = torch.empty(programs, dtype=torch.int32, device=device)
    clocked = 0 if clocks is None else clocks.stride(0)

    def call() -> torch.Tensor:
        _read_kernel[(programs,)](words, sums, clocks, words.numel(), _BLOCK, _LOOPS, clocked)
        return sums

    return call


def clock(
    calls: timing.Calls, rounds: int, cold: bool, tick: Callable[[], None]
) -> list[timing.Timing]:
    """Time calls on the current GPU; the cache is always cold, so `cold` changes nothing.

    Args:
        calls: What to time, warmed up by the caller (compiled, checked).
        rounds: Samples that each of them gets, over all calls in turn.
        cold: Ignored.
        tick: Called after each sample.
    """
    del cold
    watch = Clock()
    for index, call in enumerate(calls):
        call()
        watch.add([call])
        watch.sample(index)
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for index, into in enumerate(samples):
            into.append(watch.sample(index))
            tick()
    return [timing.Timing.of(one) for one in samples]


def kernels(calls: timing.Calls) -> list[list[tuple[str, timing.Timing]]]:
    """Times of the kernels of each call by the profiler, each call after a sweep of the cache.

    A kernel's time includes its own start and end, some 2 µs of which the next one hides in a step.
    """
    found = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
            for _ in range(_PROFILED):
                sweep()
                call()
            torch.cuda.synchronize()
        events = sorted(
            (event for event in record.events() if event.device_type == DeviceType.CUDA),
            key=lambda event: event.time_range.start,
        )
        size = len(events) // _PROFILED
        # The first of each round is the sweep.
        found.append(
            [
                (
                    events[i].name.strip("_").removesuffix("_kernel"),
                    timing.Timing.of([event.device_time for event in events[i::size]]),
                )
                for i in range(1, size)
            ]
        )
    return found


def _with_kernel(name: str, kernel: SDPBackend) -> Builder:
    def build(case: Case) -> Contender:
        q, (keys, values) = case.q, case.visible

        def call() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return sdpa(q, keys, values, enable_gqa=True)

        return Contender(name, "dense", call, case.shape.dense_bytes)

    return build


def flashinfer(case: Case) -> Contender:
    """FlashInfer's decode kernel, a row at a time (its plain entry point takes one)."""
    import flashinfer

    q, (keys, values) = case.q, case.visible

    def call() -> torch.Tensor:
        rows = [
            flashinfer.single_decode_with_kv_cache(
                q[b, :, 0], keys[b], values[b], kv_layout="HND", use_tensor_cores=True
            )
            for b in range(q.shape[0])
        ]
        return torch.stack(rows)[:, :, None]

    return Contender("flashinfer", "dense", call, case.shape.dense_bytes)


timing.CLOCKS["cuda"] = clock
timing.KERNELS["cuda"] = kernels
contenders.DENSE["cuda"] = {
    "sdpa cudnn": _with_kernel("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": _with_kernel("sdpa flash", SDPBackend.FLASH_ATTENTION),
}
if importlib.util.find_spec("flashinfer") is not None:
    contenders.DENSE["cuda"]["flashinfer"] = flashinfer
