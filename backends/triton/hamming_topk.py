"""hamming_topk: the keys whose codes differ least from a group's (arXiv 2506.02572, Algorithm 3).

    distance_s = sum over the codes q of a group of popcount(q ^ k_s)

Weighted planes. Full adders turn three words of one weight into one of that weight and one of twice
it, and because sum and majority are self-dual they may be applied to the queries before the key is
known: if sum_i w_i P_ij counts the queries that set bit j, then distance_s = sum_i w_i
popcount(P_i ^ k_s). Adders over a group leave one or two planes of each weight: three for G = 4,
four for G = 8, instead of G words. How planes and keys become distances, by popcounts or by binary
tensor cores, stands in `distance`.

Counting select. Distances are small integers (and of one parity if G is even, so half of them
serve), so a histogram gives the exact threshold. `_scan_kernel` streams the codes once: each row
(of a query, or of a group of queries) is cut in `parts` by its own length, whatever S is; a part
writes its keys to select by, adds to the row's histogram and leaves its own, cumulated. Then
`_select_kernel` needs no further pass: it reads the threshold off the histogram, sums the parts'
counts below and at it, and so knows where in the output each part's keys go.

With key norms the key to select by is the reversed bits of the float score: 32 bits, found digit by
digit; `_refine_kernel` counts the second and the third digit among keys that match so far.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005 (jitted bodies: the compiler knows fewer forms than Python)

from typing import Any

import triton
import triton.language as tl

from hata.arrays import Framework
from hata.backend import Budget, Config
from hata.problem import Problem

from .counting import Counting, budget_scalars, counting, lay_out, parts_of
from .launch import Bound, bind, multiplies_bits
from .pieces import load_words, store_planes, zero_counters
from .plan import (
    Plan,
    Scratch,
    code_pointer,
    code_steps,
    norm_steps,
    planned,
    row_step,
    scanned_words,
    steps,
    words,
)
from .scan import bind_scan
from .select import bind_select


@triton.jit
def _planes_kernel(
    q_codes, planes, counters, heads, tokens, counters_row, q_b, q_h, q_t,
    R: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, COUNTERS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Planes of given query codes; zeroes the counters. One program a row and word."""
    program = tl.program_id(0)
    word = program % (R // 32)
    row = program // (R // 32)
    batch = (row // tokens // heads).to(tl.int64)
    head = row // tokens % heads
    token = row % tokens
    base = q_codes + batch * q_b + token * q_t + word * (4 // UNIT)
    words = ()
    for member in tl.static_range(GROUP):
        words = words + (load_words(base + (head * GROUP + member) * q_h, True, UNIT),)
    store_planes(planes + row.to(tl.int64) * (PLANES * R // 32) + word, words, True, R // 32)
    zero_counters(counters, row, counters_row, word, R // 32, COUNTERS)


def bind_planes(how: Counting, bits: int, group: int, unit: int, together: int) -> Bound:
    """The launch that makes planes of given query codes and zeroes counters."""
    return bind(
        _planes_kernel,
        (code_pointer(unit, together), "*i32", "*i32", *["i32"] * 3, *["i64"] * 3),
        {"R": bits, "GROUP": group, "PLANES": how.planes, "COUNTERS": 256,
         "UNIT": unit},
        1,
    )  # fmt: skip


def write_hamming_topk(
    plan: Plan,
    problem: Problem,
    config: Config,
    fw: Framework,
    q_codes: Any,
    k_codes: Any,
    lengths: Any,
    starts: Any,
    key_norms: Any,
    budget: Budget,
    per_head: bool,
) -> None:
    """Write planes, scan, (refinement) and select into a plan."""
    batch, q_heads, tokens, _ = fw.shape(q_codes)
    _, kv_heads, slots, width = fw.shape(k_codes)
    heads = q_heads if per_head else kv_heads
    indices = plan.output((batch, heads, tokens, budget.k), "int32")
    rows = batch * heads * tokens
    bits, group = width * 8, q_heads // heads
    how = counting(group, bits, key_norms is not None)
    parts = parts_of(config, slots)
    scratch = Scratch()
    at = lay_out(scratch, how, rows, slots, bits, parts)
    memory = plan.output((scratch.size,), "uint8")
    q_unit, q_together = words(fw, q_codes)
    unit, together, per_vector = scanned_words(fw, k_codes)
    planes, counters, scores, cumulated, state, below = at.references(plan, memory, how)
    spans = plan.address(lengths, "*i32"), plan.address(starts, "*i32")
    span_steps = row_step(fw, lengths), row_step(fw, starts)
    limits = budget_scalars(budget)
    sizes = at.scores_row, at.counters_row
    single = tokens == 1
    code_strides = steps(fw, k_codes, code_steps(unit, together))
    scan, rounds = bind_scan(
        config, how, bits, group, heads, heads // kv_heads, key_norms is not None, parts, single,
        unit, together, per_vector, code_strides[2],
        multiplies_bits(config["binary"], q_codes), False,
    )  # fmt: skip
    plan.launch(
        bind_planes(how, bits, group, q_unit, q_together),
        rows * (bits // 32),
        plan.address(q_codes, code_pointer(q_unit, q_together)), planes, counters,
        heads, tokens, at.counters_row, *steps(fw, q_codes, q_unit),
    )  # fmt: skip
    plan.launch(
        scan,
        rows * parts,
        plan.address(k_codes, code_pointer(unit, together)), planes,
        plan.address(key_norms, "*fp16"), scores, counters, cumulated, *spans,
        tokens, slots, 0, *span_steps, *limits, 0, *sizes,
        *code_strides, *norm_steps(fw, key_norms),
    )  # fmt: skip
    for refine in rounds:
        plan.launch(
            refine,
            rows * parts,
            scores, counters, cumulated, state, below, *spans,
            heads, tokens, slots, *span_steps, *limits, 0, *sizes,
        )  # fmt: skip
    plan.launch(
        bind_select(config, how, heads, parts, single, True, False),
        rows * parts,
        plan.address(indices, "*i32"), plan.address(memory, "*i32:16", at.scores), counters,
        cumulated, state, below, *spans, plan.address(None, "*i32"), tokens, slots, *span_steps,
        limits[0], at.scores_row, *limits[1:], *[0] * 4,
    )  # fmt: skip


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
    batch, q_heads, tokens, _ = fw.shape(q_codes)
    if batch * tokens == 0:
        heads = q_heads if per_head else fw.shape(k_codes)[1]
        return fw.empty((batch, heads, tokens, budget.k), "int32", q_codes)
    arrays = (q_codes, k_codes, lengths, starts, key_norms)
    return planned(write_hamming_topk, problem, config, fw, arrays, budget, per_head)[0]
