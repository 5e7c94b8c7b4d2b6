"""The analytic model: what a problem must cost, and which configurations look good on paper.

Three constants of the machine, measured in about two seconds, are put against what an op has to
do: bytes that must come from memory, multiply-adds and popcounts, launches. The floor of a problem
is the larger of its memory and its arithmetic time; nothing can be much below it, so a search that
comes within 5% of it stops. Configurations are ranked by how they divide the work: the share of
the machine they use, whole waves or a ragged last one, and what each piece costs on top. The model
is there to begin a search well; it never decides.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np

from hata.backend import Backend, Config
from hata.measure.clock import CPUSweep
from hata.measure.inputs import Inputs, running
from hata.problem import Problem
from tune.trial import race

SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "": 0}
# Cost of handing out one piece of work, in µs: an atomic counter and its cache line.
_PIECE_US = 0.3
# Cost of one more share of a row on a GPU, in µs: its part of a merge.
_SHARE_US = 0.01


class Machine(NamedTuple):
    """Constants of a machine, all cores together.

    Attributes:
        bandwidth, flops: Bytes from memory, and float32 multiply-adds, per µs.
        launch_us: What a call costs that has next to nothing to do.
        workers: Cores, or streaming multiprocessors.
    """

    bandwidth: float
    flops: float
    launch_us: float
    workers: int


class Work(NamedTuple):
    """What one call has to do.

    Attributes:
        read, gather: Bytes from memory, all in all and of selected rows.
        flops, popcounts: Multiply-adds, and 64-bit popcounts of the direct way.
    """

    read: float
    flops: float
    popcounts: float = 0.0
    gather: float = 0.0


def work(problem: Problem) -> Work:
    """What a problem has to do, with a full cache."""
    p = problem
    size, rows = SIZE[p.dtype], p.batch * p.tokens
    projection = p.kv_heads * p.head_dim * p.bits * SIZE[p.projection_dtype]
    encode = rows * p.heads * p.head_dim * p.bits
    if p.op == "encode":
        vectors = rows * p.heads
        return Work(vectors * (p.head_dim * size + p.bits // 8) + projection, encode)
    scan = p.batch * p.kv_heads * p.slots * (p.bits // 8 + 2 * p.norms)
    popcounts = rows * p.heads * p.slots * p.bits / 64
    if p.op == "hamming_topk":
        return Work(scan, 0, popcounts)
    taken = rows * min(p.k, p.slots) * (p.head_dim + p.value_dim)
    gather, attend = taken * p.kv_heads * size, taken * p.heads
    if p.op == "sparse_attend":
        return Work(gather, attend, gather=gather)
    return Work(scan + gather + projection, attend + encode, popcounts, gather)


def floor_us(problem: Problem, machine: Machine) -> float:
    """Microseconds that no configuration can be much below."""
    todo = work(problem)
    return machine.launch_us + max(todo.read / machine.bandwidth, todo.flops / machine.flops)


def predict_us(problem: Problem, config: Config, machine: Machine) -> float:
    """Microseconds that a configuration should take. Knobs without a known meaning are free."""
    predict = _predict_gpu_us if problem.device == "cuda" else _predict_cpu_us
    return predict(problem, config, machine)


def _predict_gpu_us(problem: Problem, config: Config, machine: Machine) -> float:
    """What memory and arithmetic take, stretched where there are too few programs to fill a GPU."""
    todo = work(problem)
    heads = problem.heads if problem.per_head else problem.kv_heads
    rows = problem.batch * problem.tokens * heads
    # Where a selection is per head, rows are gathered for each of them.
    gather = todo.gather / problem.kv_heads * heads / machine.bandwidth
    streamed = max(todo.read / machine.bandwidth - gather, todo.flops / machine.flops)

    def stretched(us: float, name: str) -> float:
        pieces = config.get(name)
        # 0: as many as fit.
        if not isinstance(pieces, int) or pieces < 1:
            return us
        # Two programs on a multiprocessor keep enough loads under way.
        programs, room = rows * pieces, 2 * machine.workers
        waves = math.ceil(programs / room) * room / programs
        return us * waves + pieces * _SHARE_US

    us = stretched(streamed, "num_splits") + stretched(gather, "attend_splits")
    return machine.launch_us + us


def _predict_cpu_us(problem: Problem, config: Config, machine: Machine) -> float:
    todo = work(problem)
    workers = machine.workers if config.get("threads", "all") == "all" else 1
    share = workers / machine.workers
    # Two of the additions that stand for three popcounts cost about as much as one popcount.
    group = max(1, problem.heads // max(1, problem.kv_heads))
    planes = 1.0 if config.get("variant") == "direct" else (group.bit_length() + 0.3) / group
    popcount_us = todo.popcounts * min(planes, 1.0) * 2 / machine.flops
    # Cores do not compute while they wait for scattered rows, so the two add up.
    busy = (todo.read / machine.bandwidth + todo.flops / machine.flops + popcount_us) / share
    # Knobs that say into how large pieces work is cut, and along what.
    taken = min(problem.k, problem.slots)
    along = {"chunk": problem.slots, "block": problem.tokens, "tile": taken}
    cut_us = 0.0
    for name, length in along.items():
        value = config.get(name)
        if type(value) is int and value > 0 and length:
            pieces = problem.batch * problem.kv_heads * math.ceil(length / value)
            waves = math.ceil(pieces / workers)
            # The last wave may leave workers idle, and a piece is never smaller than it is.
            cut_us += busy * (waves * workers / pieces - 1) + pieces * _PIECE_US / workers
    return machine.launch_us * (1 if workers == 1 else 2) + busy + cut_us


def calibrate(backend: Backend, device: str) -> Machine:
    """Measure the constants of this machine, in about two seconds."""
    # The smallest call of the backend, compiled and warm, as the clock sees it.
    dtype = "float32" if "float32" in backend.dtypes else sorted(backend.dtypes)[0]
    problem = Problem("encode", device, dtype, dtype, head_dim=16, bits=32)
    inputs, config = Inputs(backend, problem, pool=0), backend.default(problem)
    with running(backend, problem.op, config):
        inputs.calls[0]()
    launch = median(race(backend, [(inputs, config)], seconds=0.2)[0])
    if device == "cuda":
        return _calibrate_cuda(launch)
    sweep, a = CPUSweep(), np.ones((768, 768), np.float32)
    return Machine(
        bandwidth=sweep.bytes / (_best(sweep, 0.5) * 1e6),
        flops=768**3 / (_best(lambda: a @ a, 0.3) * 1e6),
        launch_us=launch,
        workers=sweep.cores,
    )


def _calibrate_cuda(launch: float) -> Machine:
    torch = importlib.import_module("torch")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    x = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    a = torch.ones((4096, 4096), dtype=torch.bfloat16, device="cuda")

    def seconds(call: Callable[[], object]) -> float:
        def run() -> None:
            # So many that waiting for the last of them does not count.
            for _ in range(16):
                call()
            torch.cuda.synchronize()

        return _best(run, 0.4) / 16

    return Machine(
        bandwidth=(1 << 30) / (seconds(lambda: x[: 1 << 29].copy_(x[1 << 29 :])) * 1e6),
        flops=4096**3 / (seconds(lambda: a @ a) * 1e6),
        launch_us=launch,
        workers=properties.multi_processor_count,
    )


def _best(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, after one that warms up."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
