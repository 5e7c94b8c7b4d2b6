"""The knobs of every op, and the configuration of a problem that was not tuned.

columns, encode_warps   bits a block of the encode makes, and its warps
tiles, loops            sets of 8 vectors that a warp takes at once, and rounds that it makes
parts                   blocks that share a row: its scan, its selection and its attention; 0: as
                        many as all rows find room for at the same time
threads                 of such a block
joined                  blocks of a row meet as a cluster, or by counters in global memory
ahead                   vectors of codes that a thread loads ahead
fused                   codes of a step are made by the blocks that need them, not by a launch
overlap                 the second launch starts while the first one drains (sm_90 and newer)
"""

from __future__ import annotations

from hata.backend import Config
from hata.problem import Problem

ENCODE = {
    "columns": (32, 64, 128),
    "encode_warps": (2, 4, 8),
    "tiles": (1, 2, 4),
    "loops": (1, 2, 4, 8),
}
STEP = {"columns": ENCODE["columns"], "encode_warps": ENCODE["encode_warps"]}
ROWS = {
    "parts": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
    "threads": (128, 256, 512, 1024),
    "joined": ("cluster", "counters"),
}
SCAN = {"ahead": (1, 2, 4, 8)}
KNOBS = {
    "encode": ENCODE,
    "hamming_topk": {**ROWS, **SCAN},
    "sparse_attend": ROWS,
    "hash_attend": {**STEP, **ROWS, **SCAN, "fused": (False, True), "overlap": (False, True)},
}

# Rows that blocks of 512 threads serve best, one a multiprocessor; more have smaller blocks.
_FEW = 128


def share(total: int, most: int) -> int:
    """The power of two from 1 to `most` that is nearest below or at `total`."""
    return min(1 << max(total, 1).bit_length() - 1, most)


def of(problem: Problem) -> Config:
    """The default configuration: blocks that fill a large GPU once."""
    if problem.op == "encode":
        vectors = problem.batch * problem.heads * problem.tokens
        return {
            "columns": 128,
            "encode_warps": 4,
            "tiles": 2,
            "loops": share(vectors // 65536, 8),
        }
    lists = problem.heads if problem.per_head else problem.kv_heads
    rows = problem.batch * lists * problem.tokens
    config = {"parts": 0, "threads": 512 if rows <= _FEW else 256, "joined": "cluster"}
    if problem.op == "sparse_attend":
        return config
    config["ahead"] = 4
    if problem.op == "hamming_topk":
        return config
    return {"columns": 32, "encode_warps": 4, **config, "fused": True, "overlap": True}
