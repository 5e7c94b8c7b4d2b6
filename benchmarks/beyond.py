"""What no step shows on a GPU: encoding a prompt, and selecting by itself.

Selecting is timed where all keys are equally good, and against torch, which finds its scores ready.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

import hata
from benchmarks.bars import Bar, least, most
from benchmarks.gpu import reader
from benchmarks.verify import WrongResult
from hata.measure.clock import times

# Batch rows, KV heads and keys of scores that torch selects from, and types of theirs.
_READY = ((1, 8, 1 << 17), (8, 8, 1 << 17), (1, 8, 1 << 20))
_TYPES = (torch.float16, torch.int32, torch.float32)


_bytes = partial(torch.randint, 0, 256, dtype=torch.uint8, device="cuda")


def _medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Microseconds of each call."""
    return [median(samples) for samples in times(calls, "cuda", rounds)]


def beside_torch(rounds: int) -> list[Bar]:
    """`hamming_topk`, scan included, against `torch.topk` of as many scores, which must agree.

    Scores are distances of drawn codes, in the type that torch is fastest with; the budget is 1/64
    of the keys, and torch need not sort.
    """
    found = []
    for batch, heads, slots in _READY:
        k = slots // 64
        q, codes = _bytes((batch, 4 * heads, 1, 16)), _bytes((batch, heads, slots, 16))
        scores = distances(q, codes)
        chosen = scores.gather(2, hata.hamming_topk(q, codes, k)[:, :, 0].long())
        best = torch.topk(scores, k, largest=False).values
        if not torch.equal(chosen.sort(-1).values, best):
            raise WrongResult(f"hamming_topk, {slots} keys: other distances than torch.topk's")
        ready = [scores.to(dtype) for dtype in _TYPES]
        calls = [partial(torch.topk, x, k, largest=False, sorted=False) for x in ready]
        ours, *theirs = _medians([partial(hata.hamming_topk, q, codes, k), *calls], rounds)
        dtype = str(_TYPES[theirs.index(min(theirs))]).removeprefix("torch.")
        name = (
            f"hamming_topk, {batch}x{heads} heads x {slots >> 10}K ({ours:.0f} µs): times faster "
            f"than torch.topk of {dtype} scores"
        )
        found.append(least(name, 3.0, min(theirs) / ours))
    return found


def distances(q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Summed distances `[B, Hkv, S]` (int32, in bits) of groups of query codes, bit by bit."""
    batch, heads, slots, width = codes.shape
    groups = q.view(batch, heads, -1, width)
    total = torch.zeros((batch, heads, slots), dtype=torch.int32, device=q.device)
    for byte in range(width):
        for bit in range(8):
            ones = (groups[..., byte] >> bit & 1).sum(-1, dtype=torch.int32)[..., None]
            differ = torch.where((codes[..., byte] >> bit & 1).bool(), groups.shape[2] - ones, ones)
            total += differ
    return total


def bars(rounds: int) -> list[Bar]:
    """All of it, from `rounds` samples of each time; raises `WrongResult`."""
    keys = torch.randn(1, 8, 128 * 1024, 128, dtype=torch.bfloat16, device="cuda")
    projection = torch.randn(8, 128, 128, dtype=torch.bfloat16, device="cuda")
    codes = torch.empty(1, 8, 128 * 1024, 16, dtype=torch.uint8, device="cuda")
    encode = partial(hata.encode, keys, projection, out=codes)
    encoded, read = _medians([encode, reader(keys.numel() * keys.element_size())], rounds)
    name = f"encode 128K keys x 8 heads ({encoded:.0f} µs): share of read speed"
    found = [least(name, 0.6, read / encoded)]
    for millions in (1, 4):
        slots = millions << 20
        q, drawn = _bytes((1, 32, 1, 16)), _bytes((1, 8, slots, 16))
        equal = drawn[:, :, :1].expand_as(drawn).contiguous()
        k = slots // 64
        first = hata.hamming_topk(q, equal, k)
        if not torch.equal(first, torch.arange(k, device="cuda").expand_as(first)):
            raise WrongResult(f"hamming_topk, {millions}M equal keys: not the first {k}")
        calls = [partial(hata.hamming_topk, q, x, k) for x in (equal, drawn)]
        ties, usual = _medians(calls, rounds)
        name = f"{millions}M keys, all tied ({ties:.0f} µs): times the time of drawn codes, most"
        found.append(most(name, 1.5, ties / usual))
    return found + beside_torch(rounds)
