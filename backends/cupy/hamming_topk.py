"""hamming_topk: launcher of `hamming_topk.cu`."""

from __future__ import annotations

from hata.call import HammingTopK
from hata.launches import LaunchList

from .row import budget_fields, launch_rows, selecting, span_fields, steps
from .shapes import shape_of


def write(launches: LaunchList, call: HammingTopK) -> None:
    """Write the launch of `hata.hamming_topk`."""
    problem, views = call.problem, launches.views
    batch, heads, tokens, _ = call.q_codes.shape
    kv_heads = problem.kv_heads
    lists = heads if call.per_head else kv_heads
    chosen = selecting(launches, call, "k_codes", heads // lists)
    shape = shape_of(launches.gpu, call, problem.batch * lists * tokens, chosen.fixed)
    fields = {
        "q_codes": launches.address("q_codes"),
        "codes": launches.address("k_codes"),
        "norms": launches.address("key_norms"),
        "positions": launches.output("indices"),
        **span_fields(launches),
        **steps("q_codes", views["q_codes"]),
        **steps("codes", views["k_codes"]),
        **steps("norms", views["key_norms"]),
        **budget_fields(call),
        "heads": lists,
        "rows_per_kv_head": lists // kv_heads,
        "tokens": tokens,
        "slots": call.k_codes.shape[2],
    }
    launch_rows(launches, call, shape, batch * lists * tokens, fields, chosen)
