"""How much attention a selection keeps, and which selection a layer should have.

For a probe (`tune.capture`) and a selection the *retained mass* is the share of the softmax mass of
a GQA group, summed over its query heads, that lies on the keys which `hata.hamming_topk` selects;
*quality* is that mass over the one that exact top-k (on the sum over the group of q.k) keeps with
the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hata import checks
from hata.backend import Backend
from hata.call import Encode, HammingTopK
from hata.encoder import Encoder
from hata.encoder.layer import Hidden, features
from hata.evaluate.mass import group_mass, hidden_keys
from hata.measure.arrays import kit_for
from hata.measure.inputs import public, running
from hata.selection import Selection
from tune.capture import Probe

# Budgets as shares of the context, 1/64 being what HATA uses for long ones.
SHARES = (64, 32, 16, 8, 4)
# Pairs of sink and recent; each must leave half of the budget to the hash.
GUARDS = ((0, 0), (4, 28), (4, 60))


class Point(NamedTuple):
    """A selection at the captured length, its retained mass, and that of exact top-k."""

    bits: int
    k: int
    sink: int
    recent: int
    kept: float
    exact: float

    @property
    def quality(self) -> float:
        """Retained mass over that of exact top-k."""
        return self.kept / self.exact if self.exact else 1.0


class Gauge:
    """Measures what selections keep on one probe."""

    def __init__(
        self, backend: Backend, device: str, probe: Probe, encoder: Encoder, layer: int
    ) -> None:
        self._backend, self._kit = backend, kit_for(backend, device, "float32")
        self._probe, self._encoder, self._layer = probe, encoder, layer
        self._mass, self._exact = _masses(probe)
        self._codes: dict[int, tuple[Any, Any, Any]] = {}

    def point(self, bits: int, k: int, sink: int, recent: int) -> Point:
        """What one selection keeps."""
        if bits not in self._codes:
            self._codes[bits] = self._encode(bits)
        q_codes, k_codes, norms = self._codes[bits]
        call = HammingTopK(q_codes, k_codes, key_norms=norms, k=k, sink=sink, recent=recent)
        indices = self._kit.get(self._run(call))
        kept = np.take_along_axis(self._mass, np.maximum(indices, 0).astype(np.int64), axis=-1)
        retained = float(np.where(indices >= 0, kept, 0).sum(-1).mean())
        return Point(bits, k, sink, recent, retained, float(self._exact[k - 1]))

    def _encode(self, bits: int) -> tuple[Any, Any, Any]:
        """Codes of the probe's queries and keys, and norms of its keys."""
        heads = self._probe.keys.shape[1]
        encoder, layer, put = self._encoder, self._layer, self._kit.put
        query = encoder.query(layer, bits)
        keys = (encoder.projection(layer, bits), encoder.bias(layer, bits), encoder.hidden[layer])
        own = keys if query is None else (query.projection, query.bias, query.hidden)
        shape = self._probe.keys.shape[:3]
        norms = put(np.zeros(shape, np.float16)) if encoder.key_norms else None

        def codes(x: np.ndarray, side: tuple[Any, Any, Any], norms: Any = None) -> Any:
            projection, bias, hidden = side
            # The synthetic set has the first KV heads only.
            cut = slice(len(projection) * heads // encoder.shape.kv_heads)
            before = [Hidden(weight[cut], offset[cut]) for weight, offset in hidden]
            given = put(features(x, before, len(projection[cut])))
            offset = None if bias is None else put(bias[cut].astype(np.float32))
            made = put(projection[cut].astype(np.float32))
            return self._run(Encode(given, made, offset, norms=norms))

        return codes(self._probe.q, own), codes(self._probe.keys, keys, norms), norms

    def _run(self, call: Any) -> Any:
        """A call on this backend with its default, whatever profile is in force."""
        problem = checks.check(call).problem
        with running(self._backend, problem.op, self._backend.default(problem)):
            return public(call)()


def _masses(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Softmax mass `[sequences, Hkv, Tq, S]` of each group on each key, each row adding up to 1.

    And what exact top-k retains, `[S]`, for k = 1, 2, ...
    """
    count, heads, queries, size = probe.q.shape
    kv_heads, slots = probe.keys.shape[1:3]
    groups = probe.q.reshape(count, kv_heads, heads // kv_heads, queries, size)
    mass = np.empty((count, kv_heads, queries, slots), np.float32)
    exact = np.zeros(slots)
    hidden = hidden_keys(queries, slots, probe.q)
    for at in np.ndindex(count, kv_heads):
        mass[at], total = group_mass(groups[at], probe.keys[at], probe.scale, hidden)
        order = np.argsort(-total, axis=-1)
        exact += np.cumsum(np.take_along_axis(mass[at], order, -1), -1).mean(0)
    return mass, exact / (count * kv_heads)


def budgets(tokens: int) -> list[int]:
    """Budgets of the grid for a context."""
    return [max(tokens // share, 16) for share in SHARES]


def grid(gauge: Gauge, bits: int, tokens: int, guards: Sequence[tuple[int, int]]) -> list[Point]:
    """Every budget and guard of the grid with one number of bits."""
    return [
        gauge.point(bits, k, sink, recent)
        for k in budgets(tokens)
        for sink, recent in guards
        if 2 * (sink + recent) <= k
    ]


def choose(
    points: Sequence[Point], us: Mapping[tuple[int, int], float], required: float, noise: float
) -> Point | None:
    """The fastest point that keeps `required` of what exact top-k keeps at its budget, if any does.

    Time depends on bits and budget alone; of points equally fast, within `noise`, the one that
    keeps most is taken.
    """
    able = [point for point in points if point.quality >= required]
    fastest = min((us[point.bits, point.k] for point in able), default=0.0)
    equal = [point for point in able if us[point.bits, point.k] <= fastest * (1 + noise)]
    return max(equal, key=lambda point: (point.kept, -point.bits, -point.k), default=None)


def selection_of(point: Point, tokens: int, context: int, dense_layers: int = 0) -> Selection:
    """The policy that a point stands for, in contexts of any length.

    The budget that was measured is the least; a longer context gets the same share of its keys.
    """
    ratio = point.k / tokens
    return Selection(
        bits=point.bits, k=max(math.ceil(ratio * max(context, tokens)), point.k), ratio=ratio,
        k_min=point.k, sink=point.sink, recent=point.recent, dense_layers=dense_layers,
    )  # fmt: skip
