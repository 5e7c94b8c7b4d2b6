"""What the reference says of a call, in the rows and heads of it that are looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hata.measure import reference, tolerance
from hata.measure.arrays import Kit

# What is wrong with a result; `None` if nothing is.
Judge = Callable[[Any], str | None]


class Expected:
    """A part of a call, held against the reference.

    Args:
        kit: Reads its arrays.
        call: Of `hata.call`, as the caller wrote it.
        dtype: dtype name of its data, where it attends.
        rows: Batch rows that are looked at.
        heads: KV heads that are looked at, and with each all query heads of its group.
    """

    def __init__(
        self, kit: Kit, call: Any, dtype: str, rows: npt.ArrayLike, heads: npt.ArrayLike
    ) -> None:
        self.kit, self.call, self.dtype = kit, call, dtype
        self.rows, self.heads = np.array(rows), np.array(heads)
        self.kv_heads = call[1].shape[0 if call.OP == "encode" else 1]
        group = np.arange(call[0].shape[1] // self.kv_heads)
        self.members = (self.heads[:, None] * len(group) + group).reshape(-1)

    def part(self, x: Any) -> np.ndarray:
        """The rows and heads of an array that are looked at; floating-point data as float32."""
        heads = self.heads if x.shape[1] == self.kv_heads else self.members
        return self.kit.read(x[self.kit.put(self.rows[:, None]), self.kit.put(heads[None])])

    def codes(self, places: Any = slice(None)) -> Judge:
        """Codes of `encode` at some tokens; norms, if the call has some, are judged with them."""
        call = self.call
        x, projection = self.part(call.x[:, :, places]), self.kit.read(call.projection)[self.heads]
        norms = np.zeros(x.shape[:3], np.float16)
        expected = reference().encode(x, projection, norms=norms)
        doubtful = functools.cache(lambda: tolerance.doubtful_bits(x, projection))

        def judge(codes: Any) -> str | None:
            fault = tolerance.codes_fault(self.part(codes[:, :, places]), expected, doubtful)
            if fault is None and call.norms is not None:
                got = self.part(call.norms[:, :, places]).astype(np.float16)
                return tolerance.norms_fault(got, norms)
            return fault

        return judge

    def selection(self, **given: Any) -> np.ndarray:
        """What is selected by `hamming_topk`; `given` are other arrays, read and in part."""
        call = self.call
        for name in ("q_codes", "k_codes", "key_norms"):
            if name not in given:
                x = getattr(call, name)
                given[name] = None if x is None else self.part(x)
        lengths = None if call.lengths is None else self.kit.get(call.lengths)[self.rows]
        return reference().hamming_topk(
            **given, k=call.k, lengths=lengths, sink=call.sink, recent=call.recent,
            per_head=getattr(call, "per_head", False),
        )  # fmt: skip

    def attention(self, indices: np.ndarray) -> Judge:
        """Attention to `indices`, of the rows and heads that are looked at."""
        call, kit, (batch, picks, tokens, k) = self.call, self.kit, indices.shape

        def by_selection(x: np.ndarray) -> np.ndarray:
            """`[B, H, T, D]` as `[selections, heads of one, 1, D]`."""
            split = x.reshape(batch, picks, -1, tokens, x.shape[3]).swapaxes(2, 3)
            return split.reshape(batch * picks * tokens, -1, 1, x.shape[3])

        q = by_selection(self.part(call.q))
        # Selected rows only, one small cache a selection, so that a long cache costs nothing.
        places = np.full((len(q), 1, 1, k), -1, np.int32)
        keys, values = (np.zeros((len(q), 1, k, x.shape[3]), "f4") for x in call[1:3])
        for number, (b, pick, t) in enumerate(np.ndindex(batch, picks, tokens)):
            chosen = indices[b, pick, t]
            chosen = chosen[chosen >= 0].astype(np.int64)
            at = int(self.rows[b]), int(self.heads[pick * len(self.heads) // picks])
            for cache, x in ((keys, call.keys), (values, call.values)):
                cache[number, 0, : len(chosen)] = kit.read(x[(*at, kit.put(chosen))])
            places[number, 0, 0, : len(chosen)] = np.arange(len(chosen))
        expected = reference().sparse_attend(q, keys, values, places)
        plain = tolerance.plain_attention(q, keys, values, places, dtype=self.dtype)
        shape = (*call.q.shape[:3], call.values.shape[3])

        def judge(out: Any) -> str | None:
            if tuple(out.shape) != shape:
                return f"shape {tuple(out.shape)}, expected {shape}"
            # All of it, where only a part is compared.
            if not (abs(out) < np.inf).all():
                return "the output is not finite"
            return tolerance.attention_fault(by_selection(self.part(out)), expected, plain)

        return judge
