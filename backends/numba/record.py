"""Records: what kernels are told of a call, as int64 words in memory, and plans that fill them in.

A record has parts. A `Part` describes its words once: for kernels, which see them as fields, and
for plans, which find their values. Behind the parts stands the control memory of the call (tickets
and counters), on cache lines of its own.

A `Plan` is what all calls with one signature have in common: the record but for its addresses, the
size of the workspace, and which results are allocated. It keeps none of their arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types
from numba.extending import intrinsic

from hata.arrays import ITEMSIZE

from .intrinsics import DTYPES
from .schedule import Worker, address_of, control_words, workers

_LINE = 64
# Behind the arrays of a call and its results.
_WORKSPACE, _RECORD = -2, -1


class View(NamedTuple):
    """How an array lies: in which memory of a run, how many bytes in; strides in bytes."""

    memory: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def dense(cls, memory: int, offset: int, shape: tuple[int, ...], dtype: str) -> View:
        """An array without gaps."""
        strides = (ITEMSIZE[dtype] * prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(memory, offset, shape, tuple(strides), dtype)

    def swapped(self) -> View:
        """The same with the second and the third axis swapped."""
        (a, b, c, *rest), (i, j, k, *more) = self.shape, self.strides
        return self._replace(shape=(a, c, b, *rest), strides=(i, k, j, *more))


# By the names of arrays: `View`s, or none where an array is not given.
Views = Mapping[str, Any]


class Part:
    """Words of a record: of arrays, each with a letter for each of its first axes, and of numbers.

    `q="bht"` stands for `q` (the address, 0 for no array), `q_b`, `q_h`, `q_t` (strides in bytes)
    and `q_dtype`.
    """

    def __init__(self, arrays: dict[str, str], numbers: str) -> None:
        self._arrays, self._numbers = arrays, numbers.split()
        self.fields: list[str] = []
        for name, axes in arrays.items():
            self.fields += [name, *(f"{name}_{axis}" for axis in axes), name + "_dtype"]
        self.fields += self._numbers

    def fill(self, words: list[int], places: list[tuple[int, View]], views: Views, **numbers: int):
        """Add the words of a call, 0 for addresses, and at which words arrays have theirs."""
        for name, axes in self._arrays.items():
            view = views.get(name)
            if view is None:
                words += [0] * (len(axes) + 2)
                continue
            places.append((len(words), view))
            # Lengths of all rows alike have no axis.
            words += [0, *(*view.strides, 0)[: len(axes)], DTYPES.index(view.dtype)]
        words += [int(numbers[name]) for name in self._numbers]


# Of every record the first part.
RUN = Part({"control": "", "scratch": ""}, "scratch_bytes")


def views_of(*parts: Part) -> list[Any]:
    """Functions for kernels: the fields of each part of the record at an address, `RUN`'s first."""
    found, start = [], 0
    for part in (RUN, *parts):
        found.append(_view(part.fields, start))
        start += 8 * len(part.fields)
    return found


def _view(fields: list[str], start: int) -> Any:
    kind = from_dtype(np.dtype([(name, np.int64) for name in fields]))

    @intrinsic
    def view(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = builder.add(values[0], context.get_constant(types.int64, start))
            return builder.inttoptr(place, context.get_value_type(kind))

        return kind(types.int64), generate

    return view


class Plan:
    """What calls with one signature have in common; `views` has the arrays of the call."""

    def __init__(self, call: Any, worker: Worker) -> None:
        fw = call.fw
        self.views: dict[str, Any] = {}
        for n, (name, x) in enumerate(call.arrays().items()):
            self.views[name] = None
            if x is not None:
                dtype = fw.dtype(x)
                strides = tuple(ITEMSIZE[dtype] * stride for stride in fw.strides(x))
                self.views[name] = View(n, 0, fw.shape(x), strides, dtype)
        self._worker, self._threads = worker, workers(call.config["threads"])
        # Those of `RUN` are known at the end.
        self._words, self._places = [0] * len(RUN.fields), []
        dtype = call.problem.dtype
        self._results = {r.name: (r.shape, r.dtype or dtype) for r in call.results()}
        self._outputs: list[tuple[tuple[int, ...], str]] = []
        self._workspace = 0

    def output(self, name: str) -> View:
        """A result of the call, which every run allocates; runs return them in order."""
        self._outputs.append(self._results[name])
        return View.dense(len(self.views) + len(self._outputs) - 1, 0, *self._results[name])

    def piece(self, *shape: int, dtype: str = "uint8") -> View:
        """An array in the workspace, with undefined contents."""
        found = View.dense(_WORKSPACE, self._workspace, shape, dtype)
        # A cache line between pieces, for vector loads that overlap the end of one.
        self._workspace += _lines(ITEMSIZE[dtype] * prod(shape) + _LINE)
        return found

    def part(self, part: Part, views: Views, **numbers: int) -> None:
        """Add a part to the record."""
        part.fill(self._words, self._places, views, **numbers)

    def close(self, scratch: int, counters: int) -> Plan:
        """Make the record; `scratch` is in bytes, for each thread."""
        # With a line between what is read and what is written.
        control = _lines(8 * len(self._words) + _LINE)
        views = {
            "control": View(_RECORD, control, (), (), "int64"),
            "scratch": self.piece(self._threads * scratch),
        }
        words: list[int] = []
        RUN.fill(words, self._places, views, scratch_bytes=scratch)
        words += self._words[len(words) :]
        words += [0] * (control // 8 - len(words))
        self._record = np.array([*words, *control_words(counters, self._threads)])
        places = [(word, view.memory, view.offset) for word, view in self._places]
        self._at, self._memory, self._offset = np.array(places).T.copy()
        del self._words, self._places, self._results
        return self

    def run(self, call: Any) -> list[Any]:
        """Run a call like the one that was planned for; returns the arrays that it allocates."""
        fw = call.fw
        made = [fw.empty(shape, dtype, call[0]) for shape, dtype in self._outputs]
        hold, record = np.empty(self._workspace + _LINE, np.uint8), self._record.copy()
        workspace, address = _lines(address_of(hold)), address_of(record)
        memories = np.array([*call.addresses, *map(fw.pointer, made), workspace, address])
        record[self._at] = memories[self._memory] + self._offset
        self._worker.run(address, self._threads)
        return made


def _lines(size: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-size // _LINE) * _LINE
