"""The knobs of every op, and the configuration of a problem that was not tuned.

Knobs, in the order in which a decode step meets them:

    rows, loops           vectors a tile of the prefill encode, and tiles a program takes
    encode_warps          warps of either encode
    columns               bits a program of the decode encode makes
    parts                 shares that a row's visible keys are scanned in, whatever their number
    tile, scan_warps      keys a step of the scan, and its warps
    ahead                 tiles that the scan has on their way while it works on one
    binary                distances on binary tensor cores, where there are any (sm_80 to sm_90)
                          and a tile has enough keys for each warp: 64, but 128 where codes of 64
                          bits lie one after the other, and 256 where codes of 32 bits do. Those the
                          defaults have only for many rows of long caches; else popcounts serve
    adders                whether bits are added up before popcounts count them
    histogram             counters: by warp ballots, or by atomics in shared memory
    select_tile, select_warps  stored keys a step of the search for positions
    fetch                 whether that asks for selected keys, so that the attention finds them in
                          the second-level cache
    splits, keys          shares of the selected keys, and keys a step of the attention
    warps                 of the attention
    stages                tiles of keys and values that it has on their way; 1: in registers, both
                          before either is used; 0: the same without a loop, where a share is a tile
    early                 which launches start as soon as the one before them has started, to wait.
                          With overlap the scan always does; beside it all others do, the merge of
                          shares alone, or none
    overlap               launches start while the one before them drains (from sm_90 on)
"""

from __future__ import annotations

from hata.arrays import ITEMSIZE
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
    "ahead": (0, 1, 2, 3, 4),
    "adders": (False, True),
    "binary": (False, True),
    "histogram": ("ballot", "shared"),
    "select_tile": (1024, 2048, 4096, 8192),
    "select_warps": (1, 2, 4, 8),
}
OVERLAP = {"overlap": (False, True)}
ATTEND = {
    "keys": (16, 32, 64, 128),
    "splits": (1, 2, 4, 8, 16, 32, 64),
    "warps": (1, 2, 4, 8),
    "stages": (0, 1, 2, 3, 4),
}
STEP = {"columns": (32, 64, 128), "encode_warps": (4, 8)}

KNOBS = {
    "encode": ENCODE,
    "hamming_topk": SCAN,
    "sparse_attend": {**ATTEND, **OVERLAP},
    "hash_attend": {
        **STEP,
        **SCAN,
        "fetch": (False, True),
        **ATTEND,
        **OVERLAP,
        "early": ("none", "merge", "all"),
    },
}

# Selected keys that fit the second-level cache of a large GPU, with room for what else is read.
_FETCHED = 20 << 20


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
    few, long = rows < 32, rows * problem.slots > 1 << 21
    # Programs of the scan: 512, or where rows are many, up to 2,048 of 2,048 keys each.
    scanning = 512 if few else max(share(rows * problem.slots // 2048, 2048), 512)
    parts = max(share(scanning // rows, 256), 4)
    if few:
        # Beyond 32 parts, none has fewer than 2,048 keys.
        parts = min(parts, share(max(problem.slots // 2048, 32), 256))
    select_tile = max(share(problem.slots // parts, 4096), 1024) if few else 1024
    if few and problem.bits == 256:
        # Their programs take nearly twice the registers: half as many, beyond 32 parts.
        parts = min(parts, max(share(256 // rows, 256), 32))
    # A tile of many words or planes would take the registers that keep other programs running.
    most = 1024 if long and problem.heads // heads <= 4 else 512
    tile = min(max(4096 // max(pow2(problem.bits // 32), 1), 128), most)
    scan = {
        "parts": parts,
        "tile": tile,
        "scan_warps": min(tile // 128, 8 if few else 4),
        "ahead": 2 if few and tile <= 512 else 1,
        "adders": True,
        "binary": True,
        "histogram": "shared",
        "select_tile": select_tile,
        "select_warps": 1 if select_tile == 1024 else 4,
    }
    if problem.op == "hamming_topk":
        return scan
    heavy = problem.dtype == "float32" or max(problem.head_dim, problem.value_dim) > 128
    short = few and problem.k <= 2048
    keys = 32 if heavy else 64 if rows <= 32 else 128
    splits = min(max(share(512 // rows, 64), 4), 64)
    tiles = pow2(-(-problem.k // keys))
    if not few and rows * tiles <= 1024:
        splits = tiles
    attending = rows * min(splits, tiles)
    # Buffers for a second tile are in the way of programs that all run at once.
    stages = 0 if tiles <= splits else 1 if attending <= 256 else 2
    attend = {
        "keys": keys,
        "splits": splits,
        "warps": 8 if short and not heavy else 4,
        "stages": stages,
        "overlap": True,
    }
    if problem.op == "sparse_attend":
        return attend
    # Bytes of selected keys. Many more would still be on their way, and others in the way of them.
    size = rows * problem.k * problem.head_dim * ITEMSIZE[problem.dtype]
    step = {"columns": 32, "encode_warps": 8, **scan, "fetch": size <= _FETCHED, **attend}
    if short:
        # Without the loop, too many programs that wait would find room on one multiprocessor.
        return {**step, "stages": 1, "early": "all"}
    return {**step, "early": "none" if few else "merge"}
