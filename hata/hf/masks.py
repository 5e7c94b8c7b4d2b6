"""What a mask hides.

`hash_attend` can leave out keys before a row's first visible one, which is what left padding asks
for. A mask with holes (right padding that generation has passed, packed sequences) cannot be put
that way: such a cache is decoded dense. Deciding needs the mask's values, and reading values from
an accelerator stalls it, so there a mask is looked at when it arrives with several tokens, or the
first time a cache is seen; decode steps then trust what was found, since each only appends to it.
On a CPU every step looks.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch


def is_known(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a mask is `[B, n]`, or `[B, 1, T, S]` for all heads, boolean or additive."""
    if not isinstance(mask, torch.Tensor):
        return False
    if mask.dim() == 4:
        return mask.shape[1] == 1 and (mask.dtype == torch.bool or mask.is_floating_point())
    return mask.dim() == 2


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Which keys the last query sees, `[B, n]` boolean, from a known mask."""
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        if mask.is_floating_point():
            return mask == 0
    return mask != 0


def is_left_padding(mask: torch.Tensor, total: int) -> bool:
    """Whether a known mask hides nothing but the first of `total` keys of a row; reads it."""
    if mask.shape[-1] < total:
        return False
    seen = _visible(mask)[:, :total]
    return bool(seen[:, -1].all() & ~(seen[:, :-1] & ~seen[:, 1:]).any())


def only_hides(mask: torch.Tensor) -> bool:
    """Whether an additive mask is 0 or very low everywhere, for the last query; reads it."""
    last = mask[:, 0, -1]
    return bool(((last == 0) | (last <= torch.finfo(mask.dtype).min / 2)).all())


def first_visible(mask: torch.Tensor) -> torch.Tensor:
    """`starts` for `hash_attend`, `[B]` or 0-d int64, from a mask that hides left padding alone."""
    starts = _visible(mask).to(torch.uint8).argmax(-1)
    # One row of a mask may stand for all rows of the batch.
    return starts.reshape(()) if starts.size(0) == 1 else starts


def can_look(mask: torch.Tensor) -> bool:
    """Whether values can be read now: not while code is compiled or a graph captured."""
    return not torch.compiler.is_compiling() and not (
        mask.is_cuda and torch.cuda.is_current_stream_capturing()
    )
