"""What a mask hides.

`hash_attend` can leave out keys before a row's first visible one, which is what left padding asks
for. A mask with holes (right padding that generation has passed, packed sequences) cannot be put
that way: such a cache is decoded dense. Deciding needs the mask's values, and reading values from
an accelerator stalls it, so there a mask is looked at when it arrives with several tokens, or the
first time a cache is seen; decode steps then trust what was found, since each only appends to it.
On a CPU every step looks.
"""

from __future__ import annotations

from typing import Any

import torch


def is_left_padding(mask: torch.Tensor, total: int) -> bool:
    """Whether a mask hides nothing but the first keys of a row; reads it.

    Args:
        mask: `[B, n]` (non-zero: visible), or `[B, 1, T, S]` boolean, of which the last query's
            row counts.
        total: Keys so far, those of this step included.
    """
    if mask.dim() == 4:
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return False
        mask = mask[:, 0, -1]
    elif mask.dim() != 2:
        return False
    if mask.shape[-1] < total:
        return False
    seen = mask[:, :total].bool()
    return bool(seen[:, -1].all() & ~(seen[:, :-1] & ~seen[:, 1:]).any())


def full_attention_mask(mask: Any) -> Any:
    """The mask of the full-attention layers, where masks come as one per layer type."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def judge(layer: Any, mask: Any, tokens: int, planned: bool) -> bool:
    """Whether this step may hash, as far as its mask goes; remembers it on the cache layer.

    Args:
        layer: The first hashed layer of the cache, before this step's keys are in it.
        mask: What the base model was given.
        tokens: Tokens of this step.
        planned: What was found where the mask was made; used while compiling.
    """
    mask = full_attention_mask(mask)
    if mask is None:
        if tokens > 1:
            layer.left_padded = True
        return True
    if torch.compiler.is_compiling():
        if tokens > 1:
            layer.left_padded = planned
        return layer.left_padded is True
    if tokens > 1 or layer.left_padded is None or mask.device.type == "cpu":
        total = int(layer.get_seq_length()) + tokens
        layer.left_padded = is_left_padding(mask, total)
    return layer.left_padded
