"""hash_attend: launcher of a decode step, one or two launches (arXiv 2506.02572, Algorithm 3).

1. `encode.cu`: codes of the queries, and codes and norms of the fresh keys in place. Left out where
   they are few and short (`fused`): then the blocks that need them make them.
2. `hash_attend.cu`: everything else. It starts while the first one drains, where a GPU can do that.
"""

from __future__ import annotations

from typing import Any

from hata.arrays import Framework
from hata.backend import Budget, Config
from hata.problem import Problem

from .encode import Job, launch_jobs
from .plan import NONE, Plan, View, kind, planned
from .row import (
    attending,
    budget_fields,
    is_binary,
    launch_rows,
    selecting,
    span_fields,
    steps,
)
from .shapes import room_of, shape_of
from .sparse_attend import is_aligned, is_near, nothing

# Fresh keys of a row, bits of a code and weights of a projection that blocks hash by themselves.
MOST_FRESH = 8
MOST_BITS = 512
MOST_WEIGHTS = 128 * 256
# Bytes of shared memory beside those weights and what a scan needs, at least.
ROOM_LEFT = 24 * 1024


def write_hash_attend(
    plan: Plan,
    problem: Problem,
    config: Config,
    q: View,
    keys: View,
    values: View,
    key_codes: View,
    projection: View,
    bias: View | None,
    query_projection: View,
    query_bias: View | None,
    q_codes: View | None,
    lengths: View | None,
    starts: View | None,
    key_norms: View | None,
    sink_logits: View | None,
    fresh: int,
    dense_below: int,
    budget: Budget,
    scale: float,
    softcap: float | None,
    return_lse: bool,
    same: bool,
) -> None:
    """Write the launches of a decode step into a plan; `same`: one projection for all."""
    batch, heads, tokens, _ = q.shape
    _, kv_heads, slots, lanes = values.shape
    dtype, bits = problem.dtype, projection.shape[2]
    width = bits // 8
    out = plan.output((batch, heads, tokens, lanes), dtype)
    lse = plan.output((batch, heads, tokens), "float32") if return_lse else None
    # A budget of more keys than there are slots is one of all of them, and costs no more.
    budget = budget._replace(k=max(min(budget.k, slots), 1))
    fresh = min(fresh, slots)
    spans = span_fields(plan, lengths, starts)
    rows = batch * kv_heads * tokens

    group = (heads if q_codes is None else q_codes.shape[1]) // kv_heads
    binary = is_binary(plan.device, config)
    scanned = selecting(group, bits, key_codes, key_norms is not None, config["ahead"], binary)
    chunks = -(-problem.head_dim // 32)
    # Queries of 8 heads at least.
    fixed = scanned.fixed + chunks * 512
    weights = chunks * 64 * bits
    fused = bool(config["fused"]) and q_codes is None and fresh <= MOST_FRESH
    fused = fused and may_fuse(dtype, group, projection, query_projection)
    fused = fused and fixed + weights + ROOM_LEFT <= room_of(plan.device)
    weights *= fused
    fixed += weights
    overlap = bool(config["overlap"]) and plan.device.architecture >= 90 and not fused
    jobs = []
    if q_codes is not None:
        code_steps, query_codes = q_codes.strides[:3], plan.address(q_codes)
    else:
        code_steps = heads * tokens * width, tokens * width, width
        query_codes = NONE if fused else plan.piece(batch * heads * tokens * width)
        jobs.append(Job(q, query_projection, query_bias, query_codes, code_steps, True, None))
    if fresh:
        words = key_codes.in_units_of(4, 1)
        codes = plan.address(key_codes)
        steps_of = key_codes.strides[:3]
        jobs.append(Job(keys, projection, bias, codes, steps_of, words, key_norms, fresh))
    if not fused:
        step = {**config, "tiles": 1, "loops": 1}
        launch_jobs(plan, dtype, jobs, step, spans, slots, overlap)

    fields = {
        "q_codes": query_codes,
        "codes": plan.address(key_codes),
        "norms": plan.address(key_norms),
        "q": plan.address(q),
        "keys": plan.address(keys),
        "values": plan.address(values),
        "sinks": plan.address(sink_logits),
        "out": plan.address(out),
        "lse": plan.address(lse),
        "positions": plan.piece(rows * budget.k * 4),
        **spans,
        **dict(zip(("q_codes_0", "q_codes_1", "q_codes_2"), code_steps, strict=True)),
        **steps("codes", key_codes),
        **steps("norms", key_norms),
        **steps("q", q),
        **steps("keys", keys),
        **steps("values", values),
        **budget_fields(budget, slots),
        "heads": kv_heads,
        "share": 1,
        "tokens": tokens,
        "slots": slots,
        "dense_below": min(dense_below, slots),
        "sinks_kind": kind(sink_logits, dtype),
        "scale": scale,
        "softcap": softcap or 0.0,
    }
    if fused:
        fields |= {
            "query_projection": plan.address(query_projection),
            "query_bias": plan.address(query_bias),
            "projection": plan.address(projection),
            "bias": plan.address(bias),
            **steps("query_projection", query_projection, 1),
            **steps("query_bias", query_bias, 1),
            **steps("projection", projection, 1),
            **steps("bias", bias, 1),
            "query_bias_kind": kind(query_bias, dtype),
            "bias_kind": kind(bias, dtype),
        }
    more = {"FUSED": int(fused), "FRESH": fresh * fused, "SAME": int(same and fused)}
    shape = shape_of(plan.device, problem, config, problem.batch * kv_heads * tokens, fixed)
    aligned = is_aligned(dtype, q, keys, values)
    attended = attending(
        shape, problem, heads // kv_heads, aligned, is_near(keys, values), softcap is not None,
        config["stages"], max(shape.threads // 64, 1), scanned, weights,
    )  # fmt: skip
    launch_rows(
        plan, "hash_attend", problem, config, shape, rows, fields, scanned, attended, more, overlap,
        weights,
    )  # fmt: skip


def may_fuse(dtype: str, group: int, projection: View, query_projection: View) -> bool:
    """Whether the blocks of a row can make the codes: on tensor cores, from heads copied whole."""
    _, depth, bits = projection.shape
    return (
        dtype != "float32"
        and group <= 16
        and bits <= MOST_BITS
        and depth * bits <= MOST_WEIGHTS
        and all(
            x.dtype == dtype and x.in_units_of(16, 2) and x.strides[1] == bits
            for x in (projection, query_projection)
        )
    )


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    key_codes: Any,
    projection: Any,
    bias: Any,
    query_projection: Any,
    query_bias: Any,
    q_codes: Any,
    fresh: int,
    dense_below: int,
    lengths: Any,
    starts: Any,
    budget: Budget,
    key_norms: Any,
    scale: float,
    softcap: float | None,
    sink_logits: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """Launch `hata.hash_attend`."""
    batch, _, tokens, _ = fw.shape(q)
    if batch * tokens == 0:
        return nothing(fw, q, problem, return_lse)
    arrays = (
        q, keys, values, key_codes, projection, bias, query_projection, query_bias, q_codes,
        lengths, starts, key_norms, sink_logits,
    )  # fmt: skip
    same = query_projection is projection and query_bias is bias
    options = fresh, dense_below, budget, scale, softcap, return_lse, same
    made = planned(write_hash_attend, problem, config, fw, arrays, *options)
    return made[0], made[1] if return_lse else None
