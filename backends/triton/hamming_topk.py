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

from hata.call import HammingTopK
from hata.launches import LaunchList

from .counting import Counting, Rows, counting, lay_out, parts_of
from .launch import bind, launch
from .layout import code_pointer, steps, words
from .pieces import load_words, store_planes, zero_counters
from .scan import launch_scan
from .select import launch_select


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


def launch_planes(launches: LaunchList, call: Any, at: Rows, how: Counting, heads: int) -> None:
    """Write the launch that makes planes of given query codes and zeroes counters."""
    q_codes = launches.views["q_codes"]
    assert q_codes is not None
    batch, q_heads, tokens, width = q_codes.shape
    unit, together = words(q_codes)
    kernel = bind(
        _planes_kernel,
        (code_pointer(unit, together), "*i32", "*i32", *["i32"] * 3, *["i64"] * 3),
        {"R": 8 * width, "GROUP": q_heads // heads, "PLANES": how.planes, "COUNTERS": 256,
         "UNIT": unit},
        1,
    )  # fmt: skip
    arrays = launches.address("q_codes"), at.planes, at.counters
    launch(
        launches, kernel, batch * heads * tokens * (width // 4), arrays,
        heads, tokens, at.counters_row, *steps(q_codes, unit),
    )  # fmt: skip


def write(launches: LaunchList, call: HammingTopK) -> None:
    """Write planes, scan, (refinement) and select."""
    heads = call.q_codes.shape[1] if call.per_head else call.problem.kv_heads
    how = counting(call.q_codes.shape[1] // heads, call.problem.bits, call.problem.norms)
    parts = parts_of(call.config, call.k_codes.shape[2])
    indices = launches.output("indices")
    rows = call.q_codes.shape[0] * heads * call.q_codes.shape[2]
    at = lay_out(launches, how, rows, call, parts)
    launch_planes(launches, call, at, how, heads)
    launch_scan(launches, call, at, how, (rows, heads, parts), "k_codes")
    launch_select(launches, call, at, how, (rows, heads, parts), indices)
