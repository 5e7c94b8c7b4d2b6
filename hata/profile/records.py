"""What a profile holds, as frozen values. Ranges are checked where a file is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hata.problem import Problem
from hata.selection import Selection

SCHEMA = "hata.profile/1"


@dataclass(frozen=True)
class Measured:
    """How the entries were measured.

    Attributes:
        date: Day or moment, ISO 8601, such as `"2026-11-21"`.
        method: The clock, such as `"perf_counter"` or `"cuda_graph"`.
        repeats: Timed runs behind each median.
        cold_cache: Whether caches were flushed before each run.
        noise_pct: Spread of repeated medians, in per cent; smaller gains were not believed.
        trials: Candidates tried, all entries together.
        seed: Seed of the search.
        predicted: Whether an analytic model stands in for the clock, as the device was not there.
    """

    date: str
    method: str
    repeats: int
    cold_cache: bool
    noise_pct: float
    trials: int
    seed: int
    predicted: bool = False


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Entry:
    """The best configuration found for one problem.

    Attributes:
        backend: Name of the backend.
        key: The problem it was measured on.
        config: Knob -> value, as the backend's `tunables` names them.
        us: Time with `config`.
        default_us: Median time with the default configuration, in microseconds.
    """

    backend: str
    key: Problem
    config: Mapping[str, int | str | bool]
    us: Timing
    default_us: float

    @property
    def op(self) -> str:
        """Name of the op."""
        return self.key.op


@dataclass(frozen=True)
class ModelKey:
    """The model that selections belong to.

    Attributes:
        name: What people call it: the last part of its path or hub id.
        model_type: `config.model_type` of transformers, such as `"llama"`.
        layers: Hidden layers.
        heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: Head size of q and k.
    """

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class EncoderKey:
    """The encoder that selections were chosen with.

    Attributes:
        name: `"random"`, or the encoder's file name.
        bits: Bits of its codes.
        seed: Seed of a random encoder.
    """

    name: str
    bits: int
    seed: int | None = None


@dataclass(frozen=True)
class Quality:
    """Share of the attention mass of exact top-k at the same budget, in [0, 1].

    Attributes:
        required: What the search had to keep.
        achieved: What the selections keep.
    """

    required: float
    achieved: float


@dataclass(frozen=True)
class SelectionSet:
    """The policy of a model.

    Attributes:
        model: Whose policy it is.
        encoder: With which encoder it was chosen.
        source: `"measured"` on the model's own q and k, or `"synthetic"`.
        quality: What was asked for and what was reached.
        layers: One `Selection` for all layers, or one a layer with `None` for a dense layer.
    """

    model: ModelKey
    encoder: EncoderKey
    source: str
    quality: Quality
    layers: Selection | tuple[Selection | None, ...]
