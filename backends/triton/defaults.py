"""The knobs of every op, and the configuration of a problem that was not tuned.

Knobs, in the order in which a decode step meets them:

    rows, loops           vectors a tile of the prefill encode, and tiles a program takes
    encode_warps          warps of either encode
    columns               bits a program of the decode encode makes
    parts                 shares that a row's visible keys are scanned in, whatever their number
    tile, scan_warps      keys a step of the scan, and its warps
    ahead                 whether the scan loads a tile while it works on the one before
    adders                whether the scan adds bits up before it counts them
    histogram             counters: by warp ballots, or by atomics in shared memory
    select_tile, select_warps  stored keys a step of the search for positions
    splits, keys          shares of the selected keys, and keys a step of the attention
    warps, stages         of the attention
    merge                 whether a launch of its own merges splits
    overlap               launches start while the one before them drains (sm_90 and newer)
"""

from __future__ import annotations

from hata.backend import Config
from hata.problem import Problem, pow2

ENCODE = {
    "rows": (64, 128, 256),
    "loops": (1, 2, 4, 8),
    "encode_warps": (4, 8),
    "stages": (1, 2, 3),
}
SCAN = {
    "parts": (4, 8, 16, 32, 64, 128, 256),
    "tile": (128, 256, 512, 1024, 2048),
    "scan_warps": (1, 2, 4, 8),
    "ahead": (False, True),
    "adders": (False, True),
    "histogram": ("ballot", "shared"),
    "select_tile": (1024, 2048, 4096, 8192),
    "select_warps": (1, 2, 4, 8),
}
OVERLAP = {"overlap": (False, True)}
ATTEND = {
    "keys": (16, 32, 64, 128),
    "splits": (1, 2, 4, 8, 16, 32, 64),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4),
}
STEP = {"columns": (32, 64, 128), "encode_warps": (4, 8)}

KNOBS = {
    "encode": ENCODE,
    "hamming_topk": SCAN,
    "sparse_attend": {**ATTEND, **OVERLAP},
    "hash_attend": {**STEP, **SCAN, **ATTEND, "merge": (False, True), **OVERLAP},
}


def share(total: int, most: int) -> int:
    """The power of two from 1 to `most` that is nearest below or at `total`."""
    return min(1 << max(total, 1).bit_length() - 1, most)


def of(problem: Problem) -> Config:
    """The default configuration: enough programs to fill a large GPU, and no more."""
    if problem.op == "encode":
        long = problem.batch * problem.heads * problem.tokens >= 65536
        return {"rows": 64, "loops": 8 if long else 1, "encode_warps": 4, "stages": 3}
    heads = problem.heads if problem.per_head else problem.kv_heads
    rows = max(problem.batch * heads * problem.tokens, 1)
    few = rows < 32
    # Where rows are few, parts are about 2,048 keys, so that they find room at the same time.
    parts = share(2048 // rows, 256)
    if few:
        parts = min(parts, max(share(problem.slots // 2048, 64), share(problem.slots // 4096, 256)))
    scan = {
        "parts": max(parts, 32 if few else 4),
        "tile": min(max(4096 // max(pow2(problem.bits // 32), 1), 128), 2048),
        "scan_warps": 4,
        "ahead": few or heads == problem.heads,
        "adders": True,
        "histogram": "shared",
        "select_tile": 1024,
        "select_warps": 1,
    }
    if problem.op == "hamming_topk":
        return scan
    heavy = problem.dtype == "float32" or max(problem.head_dim, problem.value_dim) > 128
    attend = {
        "keys": 32 if heavy else 64,
        "splits": max(share(512 // rows, 32), 2),
        "warps": 4 if heavy or few else 2,
        "stages": 1 if few else 2,
        "overlap": True,
    }
    if problem.op == "sparse_attend":
        return attend
    return {"columns": 32, "encode_warps": 4, **scan, **attend, "merge": True}
