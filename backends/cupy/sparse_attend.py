"""sparse_attend: launcher of `sparse_attend.cu`."""

from __future__ import annotations

from hata.call import SparseAttend
from hata.launches import LaunchList

from .row import attending, attention_fields, launch_rows, steps
from .shapes import shape_of


def write(launches: LaunchList, call: SparseAttend) -> None:
    """Write the launch of `hata.sparse_attend`."""
    batch, heads, tokens, _ = call.q.shape
    kv_heads, lists = call.problem.kv_heads, call.indices.shape[1]
    shape = shape_of(launches.gpu, call, call.problem.batch * lists * tokens)
    fields = {
        **attention_fields(launches, call),
        "positions": launches.address("indices"),
        "length_step": -1,
        "start_step": -1,
        **steps("positions", launches.views["indices"]),
        "ratio": -1,
        "heads": lists,
        "rows_per_kv_head": lists // kv_heads,
        "k": call.indices.shape[3],
    }
    attended = attending(launches, call, shape, heads // lists, shape.threads // 32)
    launch_rows(launches, call, shape, batch * lists * tokens, fields, attending=attended)
