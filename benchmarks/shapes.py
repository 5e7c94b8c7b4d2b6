"""What is measured: shapes, and the suites they form."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
SHARE = 1 / 64  # budget as a share of the keys, 1.56%
LEAST_BUDGET = 512
_SPEC = re.compile(r"(\d+)x(\d+)/(\d+)x(\d+)([kKmM]?)")


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer.

    Attributes:
        keys: Visible keys per row, the fresh one included.
        slots, budget: Of the cache, and k; 0: as many as keys, and 1/64 of them, at least 512.
        head_dim: D = Dv.
    """

    batch: int
    heads: int
    kv_heads: int
    keys: int
    slots: int = 0
    head_dim: int = 128
    bits: int = 128
    budget: int = 0
    dtype: str = "float32"

    @property
    def s(self) -> int:
        """Slots of the cache."""
        return self.slots or self.keys

    @property
    def k(self) -> int:
        """The key budget in force."""
        return self.budget or max(LEAST_BUDGET, round(self.keys * SHARE))

    @property
    def name(self) -> str:
        """A readable id, such as `1x32/8x32K r128 k512 float32`."""
        slots = f" in {short(self.s)} slots" if self.s != self.keys else ""
        dim = f" D{self.head_dim}" if self.head_dim != 128 else ""
        return (
            f"{self.batch}x{self.heads}/{self.kv_heads}x{short(self.keys)}{slots}{dim} "
            f"r{self.bits} k{self.k} {self.dtype}"
        )

    @property
    def resident(self) -> int:
        """Bytes of keys, values and codes."""
        return self._rows(self.s) + self.batch * self.kv_heads * self.s * self.bits // 8

    def _rows(self, count: int) -> int:
        """Bytes of so many rows of keys, and as many of values, for each KV head."""
        row = 2 * self.head_dim * ITEMSIZE[self.dtype]
        return self.batch * self.kv_heads * count * row

    # What one step must move at least, in bytes. Queries and outputs are counted where they matter.

    @property
    def encode_bytes(self) -> int:
        """The step's queries and fresh keys, the projection, and the codes written."""
        vectors, size = self.batch * (self.heads + self.kv_heads), ITEMSIZE[self.dtype]
        projection = self.kv_heads * self.head_dim * self.bits * size
        return vectors * (self.head_dim * size + self.bits // 8) + projection

    @property
    def code_bytes(self) -> int:
        """The codes of the visible keys."""
        return self.batch * self.kv_heads * self.keys * self.bits // 8

    @property
    def gather_bytes(self) -> int:
        """The selected rows of keys and values."""
        return self._rows(min(self.k, self.keys))

    @property
    def step_bytes(self) -> int:
        """All of that: a step of hash attention."""
        return self.encode_bytes + self.code_bytes + self.gather_bytes

    @property
    def dense_bytes(self) -> int:
        """All visible rows of keys and values."""
        return self._rows(self.keys)


def short(n: int) -> str:
    """A number of keys as people write it: `32K`, `1M`, or plain."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def parse(spec: str) -> Shape:
    """Read `BxH/HkvxKEYS`, such as `1x32/8x128K`; raises `ValueError` for anything else."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"shape: got {spec!r}, expected BxH/HkvxKEYS, such as 1x32/8x128K")
    batch, heads, kv_heads, keys = map(int, match.groups()[:4])
    keys *= {"": 1, "k": 2**10, "m": 2**20}[match[5].lower()]
    if not all((batch, kv_heads, keys)) or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"shape: got {spec!r}, expected positive numbers with H a multiple of Hkv, such as "
            "1x32/8x128K"
        )
    return Shape(batch, heads, kv_heads, keys)


def _design(batch: int, heads: int, kv_heads: int, thousands: int, bits: int = 128) -> Shape:
    return Shape(batch, heads, kv_heads, thousands * 1024, bits=bits, dtype="bfloat16")


_DECODE = Shape(1, 32, 8, 32 * 1024)

# A suite is a list of groups; the shapes of a group are timed together, interleaved.
SUITES: dict[str, list[list[Shape]]] = {
    "cpu": [
        *([replace(_DECODE, keys=n * 1024)] for n in (4, 16, 32, 128)),
        [replace(_DECODE, dtype="bfloat16")],
        [replace(_DECODE, bits=64)],
    ],
    "design": [
        *([_design(*shape)] for shape in (
            (1, 32, 8, 8), (1, 32, 8, 16), (1, 32, 8, 32), (1, 32, 8, 128), (1, 32, 8, 512),
            (8, 32, 8, 32), (8, 32, 8, 128), (32, 32, 8, 32), (1, 64, 8, 128), (1, 32, 32, 128),
            (8, 32, 32, 32), (1, 16, 8, 128), (1, 32, 2, 128), (1, 28, 4, 128),
            (1, 32, 8, 128, 64), (1, 32, 8, 128, 256), (1, 32, 8, 1024), (8, 32, 8, 128, 64),
            (8, 64, 8, 64),
        )),
        [_design(1, 32, 8, 4), replace(_design(1, 32, 8, 4), slots=131_072)],
    ],
    "slots": [[Shape(1, 32, 8, 4096), Shape(1, 32, 8, 4096, slots=131_072)]],
}  # fmt: skip
