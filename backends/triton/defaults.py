"""The knobs of every op, and the configuration of a problem that was not tuned.

Knobs, in the order in which a decode step meets them:

    rows, loops           vectors a tile of the prefill encode, and tiles a program takes
    encode_warps          warps of either encode
    columns               bits a program of the decode encode makes
    num_splits            shares that a row's visible keys are scanned in, whatever their number
    tile, scan_warps      keys a step of the scan, and its warps
    prefetch              tiles that the scan has in flight while it works on one
    binary_mma            distances on binary tensor cores, where there are any (sm_80 to sm_90) and
                          a tile has enough keys for each warp: 64, but 128 where codes of 64 bits
                          lie one after the other, and 256 where codes of 32 bits do
    adders                whether bits are added up before popcounts count them
    histogram             counters: by warp ballots, or by atomics in shared memory
    select_tile, select_warps  scores a step of the search for positions
    prefetch_keys         whether that prefetches selected keys to the second-level cache, where the
                          attention finds them
    attend_splits, keys   shares of the selected keys, and keys a step of the attention
    warps                 of the attention
    stages                tiles of keys and values that it has in flight; 1: in registers, both
                          before either is used; 0: the same without a loop, where a split is a tile
    pdl                   launches start while the one before them drains (programmatic dependent
                          launch, sm_90 and newer)
    early                 with pdl: which launches let the next one start as soon as they have
                          started, not when they are nearly done. The encode of a step always does;
                          all others do, the attention before its merge alone, or none
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
    "num_splits": (4, 8, 16, 32, 64, 128, 256),
    "tile": (128, 256, 512, 1024, 2048),
    "scan_warps": (1, 2, 4, 8),
    "prefetch": (0, 1, 2, 3, 4),
    "adders": (False, True),
    "binary_mma": (False, True),
    "histogram": ("ballot", "shared"),
    "select_tile": (1024, 2048, 4096, 8192),
    "select_warps": (1, 2, 4, 8),
}
PDL = {"pdl": (False, True)}
ATTEND = {
    "keys": (16, 32, 64, 128),
    "attend_splits": (1, 2, 4, 8, 16, 32, 64),
    "warps": (1, 2, 4, 8),
    "stages": (0, 1, 2, 3, 4),
}
STEP = {"columns": (32, 64, 128), "encode_warps": (4, 8)}

KNOBS = {
    "encode": ENCODE,
    "hamming_topk": SCAN,
    "sparse_attend": {**ATTEND, **PDL},
    "hash_attend": {
        **STEP,
        **SCAN,
        "prefetch_keys": (False, True),
        **ATTEND,
        **PDL,
        "early": ("none", "merge", "all"),
    },
}

# Selected keys that fit the second-level cache of a large GPU, with room for what else is read.
_PREFETCHED = 20 << 20


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
    num_splits = max(share(scanning // rows, 256), 4)
    if few:
        # Beyond 32 splits, none has fewer than 2,048 keys.
        num_splits = min(num_splits, share(max(problem.slots // 2048, 32), 256))
    select_tile = max(share(problem.slots // num_splits, 4096), 1024) if few else 1024
    if few and problem.bits == 256:
        # Their programs take nearly twice the registers: half as many, beyond 32 splits.
        num_splits = min(num_splits, max(share(256 // rows, 256), 32))
    # A tile of many words or planes would take the registers that keep other programs running.
    most = 1024 if long and problem.heads // heads <= 4 else 512
    tile = min(max(4096 // max(pow2(problem.bits // 32), 1), 128), most)
    scan = {
        "num_splits": num_splits,
        "tile": tile,
        "scan_warps": min(tile // 128, 8 if few else 4),
        "prefetch": 2 if few and tile <= 512 else 1,
        "adders": True,
        "binary_mma": True,
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
        "attend_splits": splits,
        "warps": 8 if short and not heavy else 4,
        "stages": stages,
        "pdl": True,
    }
    if problem.op == "sparse_attend":
        return attend
    # Bytes of selected keys. Many more would still be in flight, and others in the way of them.
    size = rows * problem.k * problem.head_dim * ITEMSIZE[problem.dtype]
    step = {
        "columns": 32,
        "encode_warps": 8,
        **scan,
        "prefetch_keys": size <= _PREFETCHED,
        **attend,
    }
    if short:
        # Without the loop, too many programs that wait would find room on one multiprocessor.
        return {**step, "stages": 1, "early": "all"}
    return {**step, "early": "none" if few else "merge"}
