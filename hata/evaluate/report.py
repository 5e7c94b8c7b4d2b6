"""Tables in Markdown, and plots, of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hata.calibration.progress import blank_figure
from hata.evaluate.retained import Kept
from hata.words import ranges


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def retained_tables(found: Sequence[Kept]) -> str:
    """Kept mass and recall: a row per selector, a column per length and budget.

    Means are over the layers that all rows have: an encoder may leave some dense, and a mean over
    some layers cannot be compared with one over others.
    """
    places = sorted({(one.tokens, one.k) for one in found})
    names = list(dict.fromkeys((one.selector, one.bits) for one in found))
    cells = {(one.selector, one.bits, one.tokens, one.k): one for one in found}
    head = ["keys chosen by", "bits", *(f"{k} of {tokens:,}" for tokens, k in places)]
    layers = shared_layers(found)
    every = sorted({layer for one in found for layer in one.kept})
    over = f"mean over layers {ranges(layers)}"
    if layers != every:
        over += f", those of {ranges(every)} that all rows have"
    parts = []
    if not layers:
        parts.append("No layer is in all rows, so there are no means to compare.")
    else:
        for title, value in (
            ("Mass kept, as a share of what exact top-k keeps", "kept"),
            ("Recall of exact top-k's keys", "recall"),
        ):
            rows = [
                [
                    name,
                    str(bits or "-"),
                    *(_mean(cells.get((name, bits, *place)), value, layers) for place in places),
                ]
                for name, bits in names
            ]
            parts.append(f"{title}, {over}:\n\n{table(head, rows)}")
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


def shared_layers(found: Sequence[Kept]) -> list[int]:
    """The layers that every selector was measured in."""
    return sorted(set.intersection(*(set(one.kept) for one in found))) if found else []


def mean(values: Mapping[int, float], layers: Sequence[int]) -> float:
    """The mean over some layers."""
    return sum(values[layer] for layer in layers) / len(layers)


def _mean(one: Kept | None, value: str, layers: Sequence[int]) -> str:
    return "-" if one is None else f"{mean(getattr(one, value), layers):.4f}"


def plot(path: Path, found: Sequence[Kept]) -> bool:
    """Draw kept mass, a column per length and budget; whether matplotlib is there.

    Above: the mean over the layers that all selectors have, against the bits of a code. Below:
    layer by layer.
    """
    places = sorted({(one.tokens, one.k) for one in found})
    shared = shared_layers(found)
    figure = blank_figure(5 * len(places), 8)
    if figure is None:
        return False
    above, below = figure.subplots(2, len(places), squeeze=False, sharey="row")
    for means, layers, (tokens, k) in zip(above, below, places, strict=True):
        here = [
            one
            for one in found
            if (one.tokens, one.k) == (tokens, k) and one.selector != "exact top-k"
        ]
        for i, name in enumerate(dict.fromkeys(one.selector for one in here if shared)):
            same = sorted(
                (one.bits, mean(one.kept, shared)) for one in here if one.selector == name
            )
            if same[0][0]:
                means.plot(*zip(*same, strict=True), marker="o", color=f"C{i}", label=name)
            else:
                means.axhline(same[0][1], linestyle=":", color=f"C{i}", label=name)
        for one in here:
            label = f"{one.selector}, {one.bits} bits" if one.bits else one.selector
            layers.plot(list(one.kept), list(one.kept.values()), marker=".", label=label)
        bits = sorted({one.bits for one in here if one.bits})
        means.set(title=f"{k} of {tokens:,} keys", xlabel="bits")
        if bits:
            means.set_xscale("log", base=2)
            means.set_xticks(bits, [str(n) for n in bits])
        layers.set(xlabel="layer")
        for panel in (means, layers):
            panel.axhline(1.0, color="black", linewidth=0.5)
    above[0].set_ylabel("mass kept, share of exact top-k's, mean over shared layers")
    below[0].set_ylabel("mass kept, share of exact top-k's")
    for panel, size in ((above[-1], 7), (below[-1], 6)):
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=size)
    figure.savefig(path)
    return True
