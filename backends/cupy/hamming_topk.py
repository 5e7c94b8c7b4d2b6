"""hamming_topk: launcher of `hamming_topk.cu`."""

from __future__ import annotations

from typing import Any

from hata.arrays import Framework
from hata.backend import Budget, Config
from hata.problem import Problem

from .plan import Plan, View, planned
from .row import budget_fields, is_binary, launch_rows, selecting, span_fields, steps
from .shapes import shape_of


def write_hamming_topk(
    plan: Plan,
    problem: Problem,
    config: Config,
    q_codes: View,
    k_codes: View,
    lengths: View | None,
    starts: View | None,
    key_norms: View | None,
    budget: Budget,
    per_head: bool,
) -> None:
    """Write the launch of `hata.hamming_topk` into a plan."""
    batch, heads, tokens, width = q_codes.shape
    _, kv_heads, slots, _ = k_codes.shape
    lists = heads if per_head else kv_heads
    indices = plan.output((batch, lists, tokens, budget.k), "int32")
    group, norms = heads // lists, key_norms is not None
    binary = is_binary(plan.device, config)
    chosen = selecting(group, 8 * width, k_codes, norms, config["ahead"], binary)
    most = problem.batch * lists * tokens
    shape = shape_of(plan.device, problem, config, most, chosen.fixed)
    fields = {
        "q_codes": plan.address(q_codes),
        "codes": plan.address(k_codes),
        "norms": plan.address(key_norms),
        "positions": plan.address(indices),
        **span_fields(plan, lengths, starts),
        **steps("q_codes", q_codes),
        **steps("codes", k_codes),
        **steps("norms", key_norms),
        **budget_fields(budget, slots),
        "heads": lists,
        "share": lists // kv_heads,
        "tokens": tokens,
        "slots": slots,
    }
    launch_rows(
        plan, "hamming_topk", problem, config, shape, batch * lists * tokens, fields, chosen
    )


def launch(
    problem: Problem,
    config: Config,
    fw: Framework,
    q_codes: Any,
    k_codes: Any,
    lengths: Any,
    starts: Any,
    budget: Budget,
    key_norms: Any,
    per_head: bool,
) -> Any:
    """Launch `hata.hamming_topk`."""
    batch, heads, tokens, _ = fw.shape(q_codes)
    if batch * tokens == 0:
        lists = heads if per_head else fw.shape(k_codes)[1]
        return fw.empty((batch, lists, tokens, budget.k), "int32", q_codes)
    arrays = q_codes, k_codes, lengths, starts, key_norms
    return planned(write_hamming_topk, problem, config, fw, arrays, budget, per_head)[0]
