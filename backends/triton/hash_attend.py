"""hash_attend: one decode step in five short launches (arXiv 2506.02572, Algorithm 3).

1. `encode_step._step_kernel`: codes of the fresh keys in place, bit planes of the queries, zeroed
   counters.
2. `scan._scan_kernel`: scores and their histogram, one pass over the codes. (With
   key norms two short launches refine the threshold.)
3. `select._select_kernel`: the positions of a row's selected keys, in ascending order.
4. `_hash_attend_kernel`: each program takes an equal share of a row's *selected* keys, whichever
   splits they lie in, and attends to them.
5. `attend._merge_kernel`: the shares of a row, in their order.

From sm_90 on, every launch after the first starts while the one before it drains, reads what does
not depend on it, and then waits. A launch costs some 0.7 us in a graph, less than the shared work
of a fused kernel did; see docs/perf/triton.md.

A query that sees no more keys than its budget, or than `dense_below`, takes all of them: nothing is
scored for it, and the attention walks its keys in place. Which regime holds is decided on the
device, so one captured graph serves both.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import HashAttend
from hata.launches import LaunchList

from .attend import attend_positions, finish_split, launch_merge, results_of, splits_of, tiling
from .counting import budget_group, counting, lay_out, num_splits_of
from .encode_step import write_step
from .hamming_topk import launch_planes
from .launch import Pointer, group, launch
from .layout import cache_strides, data_pointer, spans, strides, vector
from .pieces import at_head, budget_of, griddepcontrol_launch_dependents, place_of, visible
from .scan import launch_scan
from .select import launch_select


@triton.jit
def _hash_attend_kernel(arrays, sizes, budget, strides, C: tl.constexpr):
    """A split of the keys of one row: of the selected ones, or of all, for up to M of its heads.

    `arrays`: q, key_cache, value_cache, results (`results_of`), positions, lengths, starts.
    `sizes`: kv_heads, members (heads a KV head), tokens, slots, log_splits, steps of lengths and
    starts, scale, softcap and flags. `strides`: of the first three.
    """
    griddepcontrol_launch_dependents(C.PDL & C.EARLY)
    splits = 1 << sizes.log_splits
    split = tl.program_id(0) & (splits - 1)
    rest = tl.program_id(0) >> sizes.log_splits
    column = rest % C.COLUMNS * C.BLOCK_V
    block = rest // C.COLUMNS % C.BLOCKS
    row = rest // C.COLUMNS // C.BLOCKS
    batch, kv_head, token = place_of(row, sizes.kv_heads, sizes.tokens, C.SINGLE)
    head = kv_head * sizes.members + block * C.M
    start, stop = visible(arrays, sizes, batch, token)
    seen = stop - start
    selected = budget_of(seen, budget)
    everything = seen <= tl.maximum(selected, budget.dense_below)
    taken = seen if everything else selected
    size = tl.maximum(tl.cdiv((taken + splits - 1) >> sizes.log_splits, C.N) * C.N, C.N)
    first = split * size
    state = attend_positions(
        (
            arrays.q + (at_head(strides.q, batch, head) + token * strides.q.t) * C.VECTOR,
            arrays.key_cache + at_head(strides.key_cache, batch, kv_head) * C.VECTOR,
            arrays.value_cache + at_head(strides.value_cache, batch, kv_head) * C.VECTOR,
            arrays.positions + row.to(tl.int64) * budget.k,
        ),
        (first, tl.minimum(first + size, taken), everything.to(tl.int32), start),
        sizes.members - block * C.M, column, sizes, strides, C,
    )  # fmt: skip
    griddepcontrol_launch_dependents(C.PDL & (not C.EARLY))
    line = (batch * sizes.kv_heads * sizes.members + head) * sizes.tokens + token
    here = tl.minimum(sizes.members - block * C.M, C.M)
    finish_split(state, (line, head, here, split, splits, column), arrays, sizes, C)


def write(launches: LaunchList, call: HashAttend) -> None:
    """Write the launches of a decode step."""
    views, problem, config = launches.views, call.problem, call.config
    batch, heads, tokens, _ = call.q.shape
    kv_heads = problem.kv_heads
    rows, members = batch * kv_heads * tokens, heads // kv_heads
    given, q, keys, values = (views[name] for name in ("q_codes", "q", "keys", "values"))
    pdl = bool(config["pdl"]) and launches.gpu.has_pdl
    how = counting(
        members if given is None else given.shape[1] // kv_heads, problem.bits, problem.norms
    )
    most = max(call.k, call.dense_below)
    splits, stages = splits_of(config, most)
    row_sizes = rows, kv_heads, num_splits_of(config, call.keys.shape[2])
    at = lay_out(launches, how, rows, call, row_sizes[2])
    positions = launches.piece(rows * call.k)
    results = results_of(launches, call, splits)

    if given is not None:
        launch_planes(launches, call, at, how, kv_heads)
    if given is None or call.fresh:
        write_step(launches, call, at, how.planes, pdl)
    launch_scan(launches, call, at, how, row_sizes, "key_codes", pdl)
    launch_select(launches, call, at, how, row_sizes, positions, pdl)

    wide = vector(q, keys, values)
    constants = group(
        **tiling(problem, members, config, most), VECTOR=wide, CHECKED=False, WAITS=pdl,
        EARLY=config["early"] != "none", PDL=pdl,
    )  # fmt: skip
    data, (pointers, steps) = data_pointer(problem.dtype, wide), spans(launches)
    groups = (
        group(
            q=Pointer(launches.address("q"), data),
            key_cache=Pointer(launches.address("keys"), data),
            value_cache=Pointer(launches.address("values"), data),
            **results[0],
            positions=Pointer(positions, "*i32"),
            **pointers,
        ),
        group(
            kv_heads=kv_heads, members=members, tokens=tokens, slots=call.keys.shape[2],
            log_splits=splits.bit_length() - 1, **steps, scale=float(call.scale),
            softcap=float(call.softcap or 0), **results[1],
        ),
        budget_group(call),
        group(
            q=strides(q, "bht", wide), key_cache=cache_strides(keys, wide),
            value_cache=cache_strides(values, wide),
        ),
    )  # fmt: skip
    grid = rows * constants.BLOCKS * constants.COLUMNS * splits
    launch(
        launches, _hash_attend_kernel, grid, groups, constants, config["warps"], max(stages, 1), pdl
    )
    launch_merge(launches, call, results, splits, pdl)
