"""The knobs of every op, and the configuration of a problem that was not tuned.

Knobs, in the order in which a decode step meets them:

    rows, encode_warps    vectors a program of the prefill encode takes, and its warps
    columns               bits a program of the decode encode makes
    parts                 shares a row's visible keys are scanned in (fixed, so a share is L / parts)
    tile, scan_*          keys a step of the scan, warps, depth of its pipeline
    histogram             counters: by warp ballots, or by atomics in shared memory
    select                whether a launch of its own finds the selected positions
    select_tile, select_warps  stored keys a step of the search for positions
    splits, keys          shares of the selected keys, and keys a step of the attention
    warps, stages         of the attention
    merge                 whether a launch of its own merges splits
    overlap               launches start while the one before them drains (sm_90 and newer)
"""

from __future__ import annotations

from hata.backend import Config
from hata.problem import Problem, pow2

ENCODE = {"rows": (64, 128, 256), "encode_warps": (4, 8)}
SCAN = {
    "parts": (4, 8, 16, 32, 64, 128, 256),
    "tile": (128, 256, 512, 1024, 2048),
    "scan_warps": (1, 2, 4, 8),
    "scan_stages": (1, 2, 3, 4),
    "histogram": ("ballot", "shared"),
    "select_tile": (1024, 2048, 4096, 8192),
}
SELECT = {"select_warps": (1, 2, 4, 8)}
ATTEND = {
    "keys": (16, 32, 64, 128),
    "splits": (1, 2, 4, 8, 16, 32, 64),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
}
FUSE = {"select": (False, True), "select_warps": (1, 2, 4, 8), "merge": (False, True)}
STEP = {"columns": (32, 64, 128), "encode_warps": (4, 8)}

KNOBS = {
    "encode": ENCODE,
    "hamming_topk": {**SCAN, **SELECT},
    "sparse_attend": ATTEND,
    "hash_attend": {**STEP, **SCAN, **FUSE, **ATTEND, "overlap": (False, True)},
}


def share(total: int, most: int) -> int:
    """The power of two from 1 to `most` that is nearest below or at `total`."""
    return min(1 << max(total, 1).bit_length() - 1, most)


def of(problem: Problem) -> Config:
    """The default configuration: shares for about 2,000 scanning and 500 attending programs."""
    ieee = "float32" in (problem.dtype, problem.projection_dtype)
    if problem.op == "encode":
        return {"rows": 128, "encode_warps": 8 if not ieee else 4}
    heads = problem.heads if problem.per_head else problem.kv_heads
    rows = max(problem.batch * heads * problem.tokens, 1)
    wide = max(problem.bits // 32, 4)
    scan = {
        "parts": max(share(2048 // rows, 256), 4),
        "tile": max(4096 // pow2(wide), 128),
        "scan_warps": 4,
        "scan_stages": 1,
        "histogram": "shared",
        "select_tile": 2048,
    }
    if problem.op == "hamming_topk":
        return {**scan, "select_warps": 4}
    keys = 32 if problem.dtype == "float32" or problem.value_dim > 256 else 64
    attend = {
        "keys": keys,
        "splits": share(1024 // rows, 32),
        "warps": 4,
        "stages": 2,
    }
    if problem.op == "sparse_attend":
        return attend
    return {
        "columns": 32,
        "encode_warps": 4,
        **scan,
        **attend,
        "select": False,
        "select_warps": 4,
        "merge": False,
        "overlap": False,
    }
