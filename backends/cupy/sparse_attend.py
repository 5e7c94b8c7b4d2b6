"""sparse_attend: launcher of `sparse_attend.cu`."""

from __future__ import annotations

from typing import Any

from hata.arrays import Framework
from hata.backend import Config
from hata.problem import Problem

from .plan import Plan, View, kind, planned
from .row import ITEMSIZE, attending, launch_rows, steps
from .shapes import shape_of


def is_aligned(dtype: str, *arrays: View) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    return all(x.in_units_of(16, ITEMSIZE[dtype]) for x in arrays)


def is_near(*arrays: View) -> bool:
    """Whether steps between tokens, and places of tokens in vectors of 8 elements, take 32 bits."""
    return all(0 <= x.strides[2] < 2**31 and x.shape[2] * x.strides[2] < 2**35 for x in arrays)


def write_sparse_attend(
    plan: Plan,
    problem: Problem,
    config: Config,
    q: View,
    keys: View,
    values: View,
    indices: View,
    sink_logits: View | None,
    scale: float,
    softcap: float | None,
    return_lse: bool,
) -> None:
    """Write the launch of `hata.sparse_attend` into a plan."""
    batch, heads, tokens, _ = q.shape
    _, kv_heads, slots, lanes = values.shape
    lists, k = indices.shape[1], indices.shape[3]
    out = plan.output((batch, heads, tokens, lanes), problem.dtype)
    lse = plan.output((batch, heads, tokens), "float32") if return_lse else None
    shape = shape_of(plan.device, problem, config, problem.batch * lists * tokens)
    aligned = is_aligned(problem.dtype, q, keys, values)
    fields = {
        "q": plan.address(q),
        "keys": plan.address(keys),
        "values": plan.address(values),
        "sinks": plan.address(sink_logits),
        "out": plan.address(out),
        "lse": plan.address(lse),
        "positions": plan.address(indices),
        "length_step": -1,
        "start_step": -1,
        **steps("q", q),
        **steps("keys", keys),
        **steps("values", values),
        **steps("positions", indices),
        "ratio": -1,
        "heads": lists,
        "share": lists // kv_heads,
        "tokens": tokens,
        "slots": slots,
        "k": k,
        "sinks_kind": kind(sink_logits, problem.dtype),
        "scale": scale,
        "softcap": softcap or 0.0,
    }
    near = is_near(keys, values)
    chosen = attending(
        shape, problem, heads // lists, aligned, near, softcap is not None, config["stages"],
        shape.threads // 32,
    )  # fmt: skip
    rows = batch * lists * tokens
    launch_rows(plan, "sparse_attend", problem, config, shape, rows, fields, attending=chosen)


def nothing(fw: Framework, q: Any, problem: Problem, return_lse: bool) -> tuple[Any, Any]:
    """The result of a call without queries."""
    shape = fw.shape(q)[:3]
    out = fw.empty((*shape, problem.value_dim), problem.dtype, q)
    return out, fw.empty(shape, "float32", q) if return_lse else None


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q: Any,
    keys: Any,
    values: Any,
    indices: Any,
    scale: float,
    softcap: float | None,
    sink_logits: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """Launch `hata.sparse_attend`."""
    batch, _, tokens, _ = fw.shape(q)
    if batch * tokens == 0:
        return nothing(fw, q, problem, return_lse)
    arrays = q, keys, values, indices, sink_logits
    options = scale, softcap, return_lse
    made = planned(write_sparse_attend, problem, config, fw, arrays, *options)
    return made[0], made[1] if return_lse else None
