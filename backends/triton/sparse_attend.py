"""sparse_attend: attention over given positions (arXiv 2506.02572, section 3).

    logit = scale * q . k, softcap * tanh(logit / softcap),  softmax over the given positions

A row's positions are cut in splits, one program each; a second launch merges them. The pieces are
in `attend`.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from hata.call import SparseAttend
from hata.launches import LaunchList

from .attend import attend_positions, finish_split, launch_merge, results_of, splits_of, tiling
from .launch import Pointer, group, launch
from .layout import cache_strides, data_pointer, strides, vector
from .pieces import at_head, griddepcontrol_launch_dependents, place_of


@triton.jit
def _attend_kernel(arrays, sizes, strides, C: tl.constexpr):
    """A split of the positions of one row, for up to M of the heads that share them.

    `arrays`: q, key_cache, value_cache, indices, results (`results_of`). `sizes`: index_heads,
    members (heads an index head), share (index heads a KV head), tokens, slots, k, log_splits,
    scale, softcap and flags. `strides`: of the first four.
    """
    splits = 1 << sizes.log_splits
    split = tl.program_id(0) & (splits - 1)
    rest = tl.program_id(0) >> sizes.log_splits
    column = rest % C.COLUMNS * C.BLOCK_V
    block = rest // C.COLUMNS % C.BLOCKS
    row = rest // C.COLUMNS // C.BLOCKS
    batch, index_head, token = place_of(row, sizes.index_heads, sizes.tokens, C.SINGLE)
    head = index_head * sizes.members + block * C.M
    size = tl.cdiv((sizes.k + splits - 1) >> sizes.log_splits, C.N) * C.N
    kv_head = index_head // sizes.share
    state = attend_positions(
        (
            arrays.q + (at_head(strides.q, batch, head) + token * strides.q.t) * C.VECTOR,
            arrays.key_cache + at_head(strides.key_cache, batch, kv_head) * C.VECTOR,
            arrays.value_cache + at_head(strides.value_cache, batch, kv_head) * C.VECTOR,
            arrays.indices + at_head(strides.indices, batch, index_head)
            + token * strides.indices.t,
        ),
        (split * size, tl.minimum(split * size + size, sizes.k), 0, 0),
        sizes.members - block * C.M, column, sizes, strides, C,
    )  # fmt: skip
    griddepcontrol_launch_dependents(C.PDL)
    line = (batch * sizes.index_heads * sizes.members + head) * sizes.tokens + token
    here = tl.minimum(sizes.members - block * C.M, C.M)
    finish_split(state, (line, head, here, split, splits, column), arrays, sizes, C)


def write(launches: LaunchList, call: SparseAttend) -> None:
    """Write the splits, and where there are several, their merge."""
    views, problem, config = launches.views, call.problem, call.config
    batch, heads, tokens, _ = call.q.shape
    index_heads, k = call.indices.shape[1], call.indices.shape[3]
    members = heads // index_heads
    q, keys, values = views["q"], views["keys"], views["values"]
    wide = vector(q, keys, values)
    pdl = bool(config["pdl"]) and launches.gpu.has_pdl
    # The first launch of a call waits for none.
    constants = group(
        **tiling(problem, members, config, k), VECTOR=wide, CHECKED=True, WAITS=False, PDL=pdl
    )
    splits, stages = splits_of(config, k)
    results = results_of(launches, call, splits)
    data = data_pointer(problem.dtype, wide)
    groups = (
        group(
            q=Pointer(launches.address("q"), data),
            key_cache=Pointer(launches.address("keys"), data),
            value_cache=Pointer(launches.address("values"), data),
            indices=Pointer(launches.address("indices"), "*i32"),
            **results[0],
        ),
        group(
            index_heads=index_heads, members=members, share=index_heads // problem.kv_heads,
            tokens=tokens, slots=call.keys.shape[2], k=k, log_splits=splits.bit_length() - 1,
            scale=float(call.scale), softcap=float(call.softcap or 0), **results[1],
        ),
        group(
            q=strides(q, "bht", wide), key_cache=cache_strides(keys, wide),
            value_cache=cache_strides(values, wide), indices=strides(views["indices"], "bht"),
        ),
    )  # fmt: skip
    grid = batch * index_heads * tokens * constants.BLOCKS * constants.COLUMNS * splits
    launch(launches, _attend_kernel, grid, groups, constants, config["warps"], max(stages, 1))
    launch_merge(launches, call, results, splits, pdl)
