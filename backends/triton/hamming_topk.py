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
(of a query, or of a group of queries) is cut in splits by its own length, whatever S is; a split
writes its scores, adds to the row's histogram and leaves its own, cumulated. Then
`_select_kernel` needs no further pass: it reads the threshold off the histogram, sums the splits'
counts below and at it, and so knows where in the output each split's keys go.

With key norms the score is the reversed bits of the float score: 32 bits, found digit by
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

from .counting import Counting, Rows, counting, lay_out, num_splits_of
from .launch import Pointer, group, launch
from .layout import code_pointer, strides, words
from .pieces import load_words, store_planes, zero_counters
from .scan import launch_scan
from .select import launch_select


@triton.jit
def _planes_kernel(arrays, sizes, strides, C: tl.constexpr):
    """Planes of given query codes; zeroes the counters. One program a row and word.

    `arrays`: q_codes, planes, counters. `sizes`: heads, tokens, counters_row. `strides`: of
    q_codes.
    """
    WORDS: tl.constexpr = C.R // 32
    program = tl.program_id(0)
    word = program % WORDS
    row = program // WORDS
    batch = (row // sizes.tokens // sizes.heads).to(tl.int64)
    head = row // sizes.tokens % sizes.heads
    token = row % sizes.tokens
    base = arrays.q_codes + batch * strides.b + token * strides.t + word * (4 // C.UNIT)
    words = ()
    for member in tl.static_range(C.GROUP):
        at = base + (head * C.GROUP + member) * strides.h
        words = words + (load_words(at, True, C.UNIT),)
    planes = arrays.planes + row.to(tl.int64) * (C.PLANES * WORDS) + word
    store_planes(planes, words, True, WORDS)
    zero_counters(arrays.counters, row, sizes.counters_row, word, WORDS, C.COUNTERS)


def launch_planes(launches: LaunchList, call: Any, at: Rows, how: Counting, heads: int) -> None:
    """Write the launch that makes planes of given query codes and zeroes counters."""
    q_codes = launches.views["q_codes"]
    assert q_codes is not None
    batch, q_heads, tokens, width = q_codes.shape
    unit, together = words(q_codes)
    constants = group(
        R=8 * width, GROUP=q_heads // heads, PLANES=how.planes, COUNTERS=256, UNIT=unit
    )
    groups = (
        group(
            q_codes=Pointer(launches.address("q_codes"), code_pointer(unit, together)),
            planes=Pointer(at.planes, "*i32"),
            counters=Pointer(at.counters, "*i32"),
        ),
        group(heads=heads, tokens=tokens, counters_row=at.counters_row),
        strides(q_codes, "bht", unit),
    )
    grid = batch * heads * tokens * (width // 4)
    launch(launches, _planes_kernel, grid, groups, constants, warps=1)


def write(launches: LaunchList, call: HammingTopK) -> None:
    """Write planes, scan, (refinement) and select."""
    heads = call.q_codes.shape[1] if call.per_head else call.problem.kv_heads
    how = counting(call.q_codes.shape[1] // heads, call.problem.bits, call.problem.norms)
    num_splits = num_splits_of(call.config, call.k_codes.shape[2])
    indices = launches.output("indices")
    rows = call.q_codes.shape[0] * heads * call.q_codes.shape[2]
    at = lay_out(launches, how, rows, call, num_splits)
    launch_planes(launches, call, at, how, heads)
    launch_scan(launches, call, at, how, (rows, heads, num_splits), "k_codes")
    launch_select(launches, call, at, how, (rows, heads, num_splits), indices)
