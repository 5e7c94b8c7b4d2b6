"""`Meta`: results that hold no data, or no elements.

It stands in for a backend, whichever is in force, for tensors on torch's `meta` device and for
calls without queries: the call is checked like any other, the results have the right shapes, dtypes
and strides, and nothing is computed.
"""

from __future__ import annotations

from typing import Any


class Meta:
    """Allocates the results, with the methods of a `hata.backend.Backend`."""

    def prepare(self, call: Any) -> None:
        """Nothing runs, so nothing is prepared."""

    def encode(self, call: Any) -> Any:
        """The codes."""
        return self.sparse_attend(call)[0] if call.out is None else call.out

    def hamming_topk(self, call: Any) -> Any:
        """The indices."""
        return self.sparse_attend(call)[0]

    def sparse_attend(self, call: Any) -> tuple[Any, ...]:
        """The outputs and the lse."""
        return tuple(
            call.fw.empty(shape, dtype or call.problem.dtype, call[0])
            for _, shape, dtype in call.results()
        )

    hash_attend = sparse_attend
