"""The first launch of a decode step: queries and fresh keys are hashed together.

Codes and norms of the fresh keys are written in place. Codes of queries are never written: what the
scan reads are the weighted bit planes of each group (see `hamming_topk`), so those are made here,
and the step's counters are zeroed beside them.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import HashAttend
from hata.launches import LaunchList
from hata.problem import pow2

from .counting import Rows
from .encode import arithmetic, columns, norm_of, project
from .launch import Pointer, group, launch
from .layout import code_pointer, data_pointer, optional, spans, strides, vector, words
from .pieces import (
    columns_of,
    griddepcontrol_launch_dependents,
    pack,
    store_planes,
    store_words,
    visible,
)


@triton.jit
def _step_kernel(arrays, sizes, strides, C: tl.constexpr):
    """`N` bits of one head: of the queries of some groups, or of some fresh keys.

    Vectors of many batch rows share a tile, so a projection is read once for all of them. Arguments
    come by lines of 64 bytes, so those stand together that are read together.

    `arrays`: lengths, starts, projection, key_cache, query_projection, q, codes, planes, counters,
    norms, and the biases of queries and keys. `sizes`: steps of lengths and starts, rows, tokens,
    slots, fresh, query_tiles, jobs (tiles of either kind), shares (tiles a batch row), flags,
    counters_row. `strides`: of all but counters and planes.
    """
    griddepcontrol_launch_dependents(C.PDL)
    BLOCKS: tl.constexpr = C.R // C.N
    block = tl.program_id(0) % BLOCKS
    rest = tl.program_id(0) // BLOCKS
    job = rest // C.KV_HEADS
    head = rest - job * C.KV_HEADS
    word = block * (C.N // 32) + tl.arange(0, C.N // 32)
    # First what takes longest: lengths come before the keys that they say the place of.
    if (job >= sizes.query_tiles) & (job < sizes.jobs):
        # A tile holds the one fresh key of many batch rows, or many fresh keys of one batch row.
        tile = job - sizes.query_tiles
        if sizes.fresh == 1:
            batch = tile * C.M + tl.arange(0, C.M)
            index = tl.zeros([C.M], tl.int32)
        else:
            batch = tile // sizes.shares + tl.zeros([C.M], tl.int32)
            index = tile % sizes.shares * C.M + tl.arange(0, C.M)
        mask = (batch * sizes.tokens < sizes.rows) & (index < sizes.fresh)
        batch = tl.where(mask, batch, 0)
        start, stop = visible(arrays, sizes, batch, sizes.tokens - 1)
        position = stop - sizes.fresh + index
        mask &= (position >= start) & (position < stop)
        position = position.to(tl.int64)
        values, squares = project(
            arrays.key_cache + head * strides.key_cache.h * C.VECTOR,
            (batch * strides.key_cache.b + position * strides.key_cache.s) * C.VECTOR,
            mask,
            (
                arrays.projection + head * strides.projection.h * C.VECTOR,
                strides.projection.d * C.VECTOR,
                arrays.bias_x + head * strides.bias.h,
                arrays.bias_f + head * strides.bias.h,
                sizes.has_bias,
            ),
            block * C.N, C.OF_KEYS, C,
        )  # fmt: skip
        code = batch * strides.codes.b + head * strides.codes.h + position * strides.codes.s
        store_words(
            arrays.codes + code[:, None] + word[None, :] * (4 // C.UNIT),
            pack(values > 0, C.M, C.N),
            mask[:, None] & (word >= 0)[None, :],
            C.UNIT,
        )
        if C.OF_KEYS.NORMS:
            norm = batch * strides.norms.b + head * strides.norms.h + position * strides.norms.s
            tl.store(arrays.norms + norm, norm_of(squares), mask=mask & (block == 0))
    elif job == sizes.jobs:
        # One program a head and block beyond the tiles zeroes a share of all counters.
        size = (tl.zeros([], tl.int64) + sizes.counters_row) * sizes.rows * C.KV_HEADS
        share = (head * BLOCKS + block).to(tl.int64)
        for first in range(share * C.COUNTERS, size, C.KV_HEADS * BLOCKS * C.COUNTERS):
            at = first + tl.arange(0, C.COUNTERS)
            tl.store(arrays.counters + at, tl.zeros([C.COUNTERS], tl.int32), mask=at < size)
    else:
        MEMBERS: tl.constexpr = C.MEMBERS
        GROUPS: tl.constexpr = C.M // MEMBERS
        WORDS: tl.constexpr = GROUPS * (C.N // 32)
        # A group is a batch row and a token; its members are the heads that share `head`.
        of_row = job * GROUPS + tl.arange(0, C.M) // MEMBERS
        member = tl.arange(0, C.M) % MEMBERS
        mask = (of_row < sizes.rows) & (member < C.GROUP)
        offset = member * strides.q.h
        if C.SINGLE:
            offset += of_row * strides.q.b
        else:
            offset += (of_row // sizes.tokens) * strides.q.b
            offset += (of_row % sizes.tokens) * strides.q.t
        values, _ = project(
            arrays.q + head * C.GROUP * strides.q.h * C.VECTOR,
            offset * C.VECTOR,
            mask,
            (
                arrays.query_projection + head * strides.query_projection.h * C.VECTOR,
                strides.query_projection.d * C.VECTOR,
                arrays.query_bias_x + head * strides.query_bias.h,
                arrays.query_bias_f + head * strides.query_bias.h,
                sizes.query_has_bias,
            ),
            block * C.N, C.OF_QUERIES, C,
        )  # fmt: skip
        words = tl.reshape(pack(values > 0, C.M, C.N), [GROUPS, MEMBERS, C.N // 32])
        words = tl.reshape(tl.permute(words, (0, 2, 1)), [WORDS, MEMBERS])
        words = columns_of(words, WORDS, MEMBERS)
        of_group = job * GROUPS + tl.arange(0, GROUPS)
        inside = of_group < sizes.rows
        if C.SINGLE:
            target = of_group * C.KV_HEADS + head
        else:
            target = (of_group // sizes.tokens) * C.KV_HEADS + head
            target = target * sizes.tokens + of_group % sizes.tokens
        at = target.to(tl.int64) * (C.PLANES * C.R // 32)
        at = arrays.planes + at[:, None] + word[None, :]
        store_planes(
            tl.reshape(at, [WORDS]),
            words[: C.GROUP],
            tl.reshape(inside[:, None] & (word >= 0)[None, :], [WORDS]),
            C.R // 32,
        )


def write_step(
    launches: LaunchList, call: HashAttend, at: Rows, plane_count: int, pdl: bool
) -> None:
    """Write the first launch of a decode step: queries, unless their codes are given, and keys."""
    views, problem = launches.views, call.problem
    batch, heads, tokens, _ = call.q.shape
    kv_heads, bits, dtype, fresh = problem.kv_heads, problem.bits, problem.dtype, call.fresh
    encode_queries = views["q_codes"] is None
    q, keys, codes, norms = (views[name] for name in ("q", "keys", "key_codes", "key_norms"))
    projection, query_projection = views["projection"], views["query_projection"]
    assert codes is not None
    assert query_projection is not None
    wide = vector(q, keys, projection, query_projection)
    unit, together = words(codes)
    of_keys = arithmetic(dtype, problem.projection_dtype, problem.head_dim, problem.norms)
    of_queries = arithmetic(dtype, query_projection.dtype, problem.head_dim, False)
    members = pow2(heads // kv_heads)
    # 16 rows make the codes that 64 make where both come from the same kind of matrix unit; sm_100
    # to sm_110 have one of its own for 64 rows. Ordinary arithmetic does not care.
    apart = launches.gpu.sm // 10 in (10, 11) and not (of_keys.IEEE and of_queries.IEEE)
    rows = max(64 if apart else 16, members)
    block = columns(bits, call.config["columns"])
    constants = group(
        KV_HEADS=kv_heads, R=bits, M=rows, N=block, GROUP=heads // kv_heads, MEMBERS=members,
        PLANES=plane_count, COUNTERS=1024, OF_KEYS=of_keys, OF_QUERIES=of_queries,
        VECTOR=wide, UNIT=unit, SINGLE=tokens == 1, PDL=pdl,
    )  # fmt: skip
    query_tiles = -(-batch * tokens * members // rows) if encode_queries else 0
    # Tiles of fresh keys: of many batch rows where each brings one, else so many a batch row.
    shares = -(-fresh // rows)
    key_tiles = -(-batch // rows) if fresh == 1 else batch * shares
    query_bias_x, query_bias_f, query_has_bias = optional(launches, "query_bias", dtype)
    bias_x, bias_f, has_bias = optional(launches, "bias", dtype)
    pointers, steps = spans(launches)
    data, weights = data_pointer(dtype, wide), data_pointer(problem.projection_dtype, wide)
    query_weights = data_pointer(query_projection.dtype, wide)
    groups = (
        group(
            **pointers,
            projection=Pointer(launches.address("projection"), weights),
            key_cache=Pointer(launches.address("keys"), data),
            query_projection=Pointer(launches.address("query_projection"), query_weights),
            q=Pointer(launches.address("q"), data),
            codes=Pointer(launches.address("key_codes"), code_pointer(unit, together)),
            planes=Pointer(at.planes, "*i32"),
            counters=Pointer(at.counters, "*i32"),
            norms=Pointer(launches.address("key_norms"), "*fp16"),
            query_bias_x=query_bias_x,
            query_bias_f=query_bias_f,
            bias_x=bias_x,
            bias_f=bias_f,
        ),
        group(
            **steps, rows=batch * tokens, tokens=tokens, slots=call.keys.shape[2], fresh=fresh,
            query_tiles=query_tiles, jobs=query_tiles + key_tiles, shares=max(shares, 1),
            query_has_bias=query_has_bias, has_bias=has_bias, counters_row=at.counters_row,
        ),
        group(
            projection=strides(projection, "hd", wide), key_cache=strides(keys, "bhs", wide),
            query_projection=strides(query_projection, "hd", wide), q=strides(q, "bht", wide),
            codes=strides(codes, "bhs", unit), norms=strides(norms, "bhs"),
            query_bias=strides(views["query_bias"], "h"), bias=strides(views["bias"], "h"),
        ),
    )  # fmt: skip
    # Whoever makes the planes zeroes the counters.
    grid = kv_heads * (query_tiles + key_tiles + int(encode_queries)) * (bits // block)
    launch(launches, _step_kernel, grid, groups, constants, call.config["encode_warps"])
