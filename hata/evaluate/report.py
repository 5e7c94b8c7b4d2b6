"""Tables in Markdown, and plots, of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hata.evaluate.retained import Kept


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def retained_tables(found: Sequence[Kept]) -> str:
    """Kept mass and recall: a row per selector, a column per length and budget."""
    places = sorted({(one.tokens, one.k) for one in found})
    names = list(dict.fromkeys((one.selector, one.bits) for one in found))
    cells = {(one.selector, one.bits, one.tokens, one.k): one for one in found}
    head = ["keys chosen by", "bits", *(f"{k} of {tokens:,}" for tokens, k in places)]
    # A mean over some of the layers cannot be compared with one over all.
    whole = max((len(one.kept) for one in found), default=0)
    some = {
        (one.selector, one.bits): f" ({len(one.kept)} of {whole} layers)"
        for one in found
        if len(one.kept) < whole
    }
    parts = []
    for title, value in (
        ("Mass kept, as a share of what exact top-k keeps, mean over layers", "mean"),
        ("Recall of exact top-k's keys, mean over layers", "mean_recall"),
    ):
        rows = [
            [
                name + some.get((name, bits), ""),
                str(bits or "-"),
                *(_number(cells.get((name, bits, *place)), value) for place in places),
            ]
            for name, bits in names
        ]
        parts.append(f"{title}:\n\n{table(head, rows)}")
    for tokens, k in places:
        here = [one for one in found if (one.tokens, one.k) == (tokens, k)]
        layers = sorted({layer for one in here for layer in one.kept})
        rows = [
            [
                one.selector,
                str(one.bits or "-"),
                *(f"{one.kept[layer]:.3f}" if layer in one.kept else "-" for layer in layers),
            ]
            for one in here
        ]
        exact = next((one.mass for one in here if one.selector == "exact top-k"), None)
        told = f"Mass kept per layer, {k} of {tokens:,} keys"
        if exact is not None:
            kept = ", ".join(f"{exact[layer]:.3f}" for layer in layers)
            told += f" (exact top-k itself holds {kept} of all mass)"
        head_layers = ["keys chosen by", "bits", *(f"layer {layer}" for layer in layers)]
        parts.append(f"{told}:\n\n{table(head_layers, rows)}")
    return "\n\n".join(parts)


def _number(one: Kept | None, value: str) -> str:
    return "-" if one is None else f"{getattr(one, value):.4f}"


def plot(path: Path, found: Sequence[Kept]) -> bool:
    """Draw kept mass, a column per length and budget; whether matplotlib is there.

    Above: the mean over layers against the bits of a code. Below: layer by layer.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    places = sorted({(one.tokens, one.k) for one in found})
    figure = Figure(figsize=(5 * len(places), 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, len(places), squeeze=False, sharey="row")
    for mean, layers, (tokens, k) in zip(above, below, places, strict=True):
        here = [
            one
            for one in found
            if (one.tokens, one.k) == (tokens, k) and one.selector != "exact top-k"
        ]
        for i, name in enumerate(dict.fromkeys(one.selector for one in here)):
            same = sorted((one.bits, one.mean) for one in here if one.selector == name)
            if same[0][0]:
                mean.plot(*zip(*same, strict=True), marker="o", color=f"C{i}", label=name)
            else:
                mean.axhline(same[0][1], linestyle=":", color=f"C{i}", label=name)
        for one in here:
            label = f"{one.selector}, {one.bits} bits" if one.bits else one.selector
            layers.plot(list(one.kept), list(one.kept.values()), marker=".", label=label)
        bits = sorted({one.bits for one in here if one.bits})
        mean.set(title=f"{k} of {tokens:,} keys", xlabel="bits")
        if bits:
            mean.set_xscale("log", base=2)
            mean.set_xticks(bits, [str(n) for n in bits])
        layers.set(xlabel="layer")
        for panel in (mean, layers):
            panel.axhline(1.0, color="black", linewidth=0.5)
    above[0].set_ylabel("mass kept, share of exact top-k's, mean over layers")
    below[0].set_ylabel("mass kept, share of exact top-k's")
    above[-1].legend(fontsize=7)
    below[-1].legend(fontsize=6)
    figure.savefig(path)
    return True
