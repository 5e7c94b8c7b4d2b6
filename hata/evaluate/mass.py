"""How the attention of a GQA group is spread over the keys: what a selection is measured by.

Works on NumPy arrays and on torch tensors alike.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def hidden_keys(queries: int, slots: int, like: Any) -> Any:
    """`[queries, slots]`, true where one of the last queries does not see a key yet."""
    if isinstance(like, np.ndarray):
        places, last = np.arange(slots), np.arange(slots - queries, slots)
    else:
        torch = sys.modules["torch"]
        places = torch.arange(slots, device=like.device)
        last = torch.arange(slots - queries, slots, device=like.device)
    return places > last[:, None]


def group_mass(q: Any, keys: Any, scale: float, hidden: Any) -> tuple[Any, Any]:
    """Softmax mass of a group on each key, and the score that exact top-k ranks by.

    Args:
        q: `[G, Q, D]` float32: the queries of one KV head.
        keys: `[S, D]` float32.
        scale: Factor of the logits.
        hidden: `[Q, S]`: true where a query does not see a key.

    Returns:
        `mass [Q, S]`, the mean over the group, each row adding up to 1, and `total [Q, S]`, the sum
        of q.k over the group, -inf where hidden.
    """
    xp: Any = np if isinstance(q, np.ndarray) else sys.modules["torch"]
    group, queries, size = q.shape
    logits = (q.reshape(group * queries, size) @ keys.T).reshape(group, queries, keys.shape[0])
    total = logits.sum(0)
    total[hidden] = -np.inf
    logits *= scale
    logits[:, hidden] = -np.inf
    # torch takes NumPy's names of these two arguments.
    logits -= xp.amax(logits, axis=-1, keepdims=True)
    xp.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits.mean(axis=0), total
