"""`Problem`: the frozen, hashable description of a call.

A problem is what a kernel configuration is looked up by. It holds what changes the best
configuration and nothing that changes from step to step: no lengths, no raw strides; batch,
tokens and slots are bucketed to powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

OPS = ("encode", "hamming_topk", "sparse_attend", "hash_attend")


@dataclass(frozen=True, slots=True)
class Problem:
    """What a kernel configuration depends on.

    Attributes:
        op: One of `OPS`.
        device: Kind of device, `"cpu"` or `"cuda"`.
        dtype: dtype name of x or q; `"uint8"` for `hamming_topk`.
        projection_dtype: dtype name of the projection; `""` where the op has none.
        batch: B, rounded up to a power of two.
        heads: H (`encode`: heads of x; `hamming_topk`: heads of the query codes).
        kv_heads: Hkv.
        head_dim: D; 0 where the op has none.
        value_dim: Dv; 0 where the op has none.
        bits: r; 0 where the op has none.
        k: The key budget K; 0 where the op has none.
        tokens: T (`encode`: rounded up to a power of two).
        slots: S, rounded up to a power of two; 0 for `encode`.
        norms: Whether key norms are used (`encode`: wanted).
        per_head: Whether keys are selected per query head.
        aligned: Whether rows are 16-byte aligned and a head's keys contiguous over S.
        wide: Whether element offsets need 64 bits.
    """

    op: str
    device: str
    dtype: str
    projection_dtype: str = ""
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 0
    value_dim: int = 0
    bits: int = 0
    k: int = 0
    tokens: int = 1
    slots: int = 0
    norms: bool = False
    per_head: bool = False
    aligned: bool = True
    wide: bool = False


# In these the nearest tuned neighbour in log2 space serves.
SOFT_FIELDS = ("batch", "tokens", "slots", "k")
# A configuration never crosses a difference in these, since kernels are specialised on them.
HARD_FIELDS = tuple(name for name in Problem.__annotations__ if name not in SOFT_FIELDS)


def pow2(n: int) -> int:
    """Round n up to a power of two; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
