"""The knobs of every op, and the configuration of a problem that was not tuned.

columns, encode_warps   bits a block of the encode makes, and its warps
tiles, loops            sets of 8 vectors that a warp takes at once, and rounds that it makes
num_splits              blocks that share a row: its scan, its selection and its attention; 0: as
                        many as all rows find room for at the same time
threads                 of such a block
cluster                 blocks of a row are a cluster, or sync through global memory, in a
                        cooperative launch; auto: the latter where rows are few and long
stages                  sets of 16 keys and values that a warp has in flight to shared memory
                        (in a step, half of the warps attend); 0: plain loads, by all warps
prefetch                vectors of codes that a thread loads ahead
binary_mma              distances on binary tensor cores, from sm_80 to sm_90: codes of 128 and 256
                        bits; codes of 64 bits of groups of up to 8, and of even ones of up to 14
fused                   codes of a step are made by the blocks that need them, not by a launch
pdl                     the second launch starts while the first one drains (programmatic
                        dependent launch, sm_90 and newer)
"""

from __future__ import annotations

from hata.backend import Config
from hata.problem import Problem

ENCODE = {
    "columns": (32, 64, 128),
    "encode_warps": (2, 4, 8),
    "tiles": (1, 2, 4),
    "loops": (1, 2, 4, 8, 16, 32),
}
STEP = {"columns": ENCODE["columns"], "encode_warps": ENCODE["encode_warps"]}
ROWS = {
    "num_splits": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
    "threads": (128, 256, 512, 1024),
    "cluster": ("auto", "cluster", "cooperative"),
}
RINGS = {"stages": (0, 2, 3)}
SCAN = {"prefetch": (1, 2, 4, 8, 16), "binary_mma": (False, True)}
KNOBS = {
    "encode": ENCODE,
    "hamming_topk": {**ROWS, **SCAN},
    "sparse_attend": {**ROWS, **RINGS},
    "hash_attend": {
        **STEP,
        **ROWS,
        **SCAN,
        **RINGS,
        "fused": (False, True),
        "pdl": (False, True),
    },
}

# Rows that blocks of 512 threads serve best, one a multiprocessor; more have smaller blocks.
_FEW = 128
# Keys of all rows from which on codes are best read far ahead.
_LONG = 1 << 20
# Vectors from which on blocks of the encode keep a whole projection, and go over many of them.
_MANY = 8192


def share(total: int, most: int) -> int:
    """The power of two from 1 to `most` that is nearest below or at `total`."""
    return min(1 << max(total, 1).bit_length() - 1, most)


def of(problem: Problem) -> Config:
    """The default configuration: blocks that fill a large GPU once."""
    if problem.op == "encode":
        vectors = problem.batch * problem.heads * problem.tokens
        if vectors < _MANY:
            return {"columns": 32, "encode_warps": 4, "tiles": 1, "loops": 1}
        return {
            "columns": 128,
            "encode_warps": 8,
            "tiles": 4,
            "loops": share(vectors // 32768, 32),
        }
    lists = problem.heads if problem.per_head else problem.kv_heads
    rows = problem.batch * lists * problem.tokens
    few = rows <= _FEW
    config = {"num_splits": 0, "threads": 512 if few else 256, "cluster": "auto"}
    if problem.op == "sparse_attend":
        # Rings of half as many threads hold as much.
        return {**config, "threads": config["threads"] // 2, "stages": 2}
    # Single heads have one plane, which plain arithmetic is as fast with.
    binary = problem.heads > lists
    config |= {"prefetch": 8 if rows * problem.slots >= _LONG else 4, "binary_mma": binary}
    if problem.op == "hamming_topk":
        # Many rows leave room for two such blocks if rings are short.
        return {**config, "threads": 512, "prefetch": config["prefetch"] if few else 4}
    return {
        "columns": 32, "encode_warps": 4, **config, "stages": 2, "fused": True, "pdl": True,
    }  # fmt: skip
