"""hash_attend: launcher of a decode step, one or two launches (arXiv 2506.02572, Algorithm 3).

1. `encode.cu`: codes of the queries, and codes and norms of the fresh keys in place. Left out where
   they are few and short (`fused`): then the blocks that need them make them.
2. `hash_attend.cu`: everything else. It starts while the first one drains, where a GPU can do that.
"""

from __future__ import annotations

from typing import Any

from hata.call import HashAttend
from hata.launches import NONE, LaunchList, View

from .encode import Job, dense_codes, launch_jobs
from .row import (
    attending,
    attention_fields,
    budget_fields,
    kind,
    launch_rows,
    selecting,
    span_fields,
    steps,
)
from .shapes import room_of, shape_of

# Fresh keys of a row, bits of a code and weights of a projection that blocks hash by themselves.
MOST_FRESH = 8
MOST_BITS = 512
MOST_WEIGHTS = 128 * 256
# Bytes of shared memory beside those weights and what a scan needs, at least.
ROOM_LEFT = 24 * 1024


def write(launches: LaunchList, call: HashAttend) -> None:
    """Write the launches of a decode step."""
    problem, views, gpu = call.problem, launches.views, launches.gpu
    batch, heads, tokens, depth = call.q.shape
    kv_heads, bits, slots = problem.kv_heads, problem.bits, call.keys.shape[2]
    given, key_codes, fresh = views["q_codes"], views["key_codes"], call.fresh
    assert key_codes is not None
    attention = attention_fields(launches, call)
    spans = span_fields(launches)
    rows = batch * kv_heads * tokens

    group = (heads if given is None else given.shape[1]) // kv_heads
    scanned = selecting(launches, call, "key_codes", group)
    chunks = -(-depth // 32)
    # Queries of 8 heads at least.
    fixed = scanned.fixed + chunks * 512
    weights = chunks * 64 * bits
    fused = bool(call.config["fused"]) and given is None and fresh <= MOST_FRESH
    fused = fused and may_fuse(problem.dtype, group, views)
    fused = fused and fixed + weights + ROOM_LEFT <= room_of(gpu)
    weights *= fused
    fixed += weights
    pdl = bool(call.config["pdl"]) and gpu.architecture >= 90 and not fused
    jobs = []
    if given is not None:
        code_steps, query_codes = given.strides[:3], launches.address("q_codes")
    else:
        code_steps = dense_codes(heads, tokens, bits)
        query_codes = NONE if fused else launches.piece(batch * heads * tokens * bits // 8, 1)
        query = "query_projection", "query_bias"
        jobs.append(Job("q", *query, query_codes, code_steps, True))
    if fresh:
        words, codes = key_codes.in_units_of(4), launches.address("key_codes")
        key = "projection", "bias"
        steps_of = key_codes.strides[:3]
        jobs.append(Job("keys", *key, codes, steps_of, words, "key_norms", fresh))
    if not fused:
        launch_jobs(launches, call, jobs, {**spans, "slots": slots}, True, pdl)

    fields: dict[str, Any] = {
        **attention,
        "q_codes": query_codes,
        "codes": launches.address("key_codes"),
        "norms": launches.address("key_norms"),
        "positions": launches.piece(rows * call.k),
        **spans,
        **dict(zip(("q_codes_0", "q_codes_1", "q_codes_2"), code_steps, strict=True)),
        **steps("codes", key_codes),
        **steps("norms", views["key_norms"]),
        **budget_fields(call),
        "heads": kv_heads,
        "rows_per_kv_head": 1,
        "dense_below": call.dense_below,
    }
    if fused:
        weighted = ("query_projection", "query_bias", "projection", "bias")
        for name in weighted:
            fields |= {name: launches.address(name), **steps(name, views[name], 1)}
        for name in weighted[1::2]:
            fields[f"{name}_kind"] = kind(views[name], problem.dtype)
    same = call.route.given.isdisjoint({"query_projection", "query_bias"})
    more = {"FUSED": fused, "FRESH": fresh * fused, "SAME_PROJECTION": same and fused}
    shape = shape_of(gpu, call, problem.batch * kv_heads * tokens, fixed)
    attended = attending(
        launches, call, shape, heads // kv_heads, max(shape.threads // 64, 1), scanned, weights
    )
    launch_rows(launches, call, shape, rows, fields, scanned, attended, (more, pdl, weights))


def may_fuse(dtype: str, group: int, views: dict[str, View | None]) -> bool:
    """Whether the blocks of a row can make the codes: on tensor cores, from heads copied whole."""
    weights = views["projection"], views["query_projection"]
    if dtype == "float32" or group > 16 or None in weights:
        return False
    return all(
        x is not None
        and x.shape[2] <= MOST_BITS
        and x.shape[1] * x.shape[2] <= MOST_WEIGHTS
        and x.dtype == dtype
        and x.in_units_of(16)
        and x.strides[1] == x.shape[2]
        for x in weights
    )
