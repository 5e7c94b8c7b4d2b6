"""What no step shows on a GPU: encoding a prompt, and selecting where all keys are equally good."""

from __future__ import annotations

import torch

import hata
from benchmarks.check import WrongResult
from benchmarks.cuda import clock, reader
from benchmarks.report import Bar


def bars(rounds: int) -> list[Bar]:
    """Both as bars: (bar, wanted, measured, met).

    Args:
        rounds: Samples of each time.

    Raises:
        WrongResult: all keys are equal, and others than the first are selected.
    """
    keys = torch.randn(1, 8, 128 * 1024, 128, dtype=torch.bfloat16, device="cuda")
    projection = torch.randn(8, 128, 128, dtype=torch.bfloat16, device="cuda")
    codes = torch.empty(1, 8, 128 * 1024, 16, dtype=torch.uint8, device="cuda")
    whole = reader(keys.numel() * keys.element_size(), "cuda")
    hata.encode(keys, projection, out=codes)
    encoded, read = clock(
        [lambda: hata.encode(keys, projection, out=codes), whole], rounds, True, lambda: None
    )
    share = read.median / encoded.median
    name = f"encode 128K keys x 8 heads ({encoded.median:.0f} µs): share of read speed"
    found = [(name, 0.6, share, share >= 0.6)]
    for millions in (1, 4):
        slots = millions << 20
        q = torch.randint(0, 256, (1, 32, 1, 16), dtype=torch.uint8, device="cuda")
        drawn = torch.randint(0, 256, (1, 8, slots, 16), dtype=torch.uint8, device="cuda")
        equal = drawn[:, :, :1].expand_as(drawn).contiguous()
        k = slots // 64
        first = hata.hamming_topk(q, equal, k)
        if not torch.equal(first, torch.arange(k, device="cuda").expand_as(first)):
            raise WrongResult(f"hamming_topk, {millions}M equal keys: not the first {k}")
        hata.hamming_topk(q, drawn, k)
        ties, usual = clock(
            [lambda: hata.hamming_topk(q, equal, k), lambda: hata.hamming_topk(q, drawn, k)],  # noqa: B023
            rounds, True, lambda: None,
        )  # fmt: skip
        ratio = ties.median / usual.median
        found.append(
            (f"{millions}M keys, all tied ({ties.median:.0f} µs): times the time of drawn codes, "
             "most", 1.5, ratio, ratio <= 1.5)
        )  # fmt: skip
    return found
