"""What every test of the suite stands on: kits, poisoned outputs, and checked calls of the ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings

import hata
from hata import arrays as adapters
from hata import registry
from hata.backend import Backend
from hata.call import CALLS
from hata.errors import UnsupportedProblem
from hata.measure import reference, tolerance
from hata.measure.arrays import KITS, Arrays, Kit, NumPyKit
from hata.measure.tolerance import hold
from hata.testing.strategies import Case, cases

# Where the arrays of a device can come from. JAX has tests of its own.
_FRAMEWORKS = {"cpu": ("numpy", "torch"), "cuda": ("torch", "cupy")}
# Kernels compile at their first call, and a backend may refuse many cases.
_PATIENCE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
DTYPES = ("float32", "float16", "bfloat16")


def _poisoned(empty: Any) -> Any:
    def poisoned_empty(self: Any, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        array = empty(self, shape, dtype, like)
        if not isinstance(array, adapters.Layout):
            size = adapters.ITEMSIZE[dtype]
            array[...] = np.nan if "float" in dtype else int.from_bytes(b"\x7f" * size, "little")
        return array

    return poisoned_empty


class Harness:
    """Shared machinery of the suite. See `hata.testing.BackendSuite` for the knobs."""

    backend: ClassVar[str] = ""
    device: ClassVar[str] = "cpu"
    frameworks: ClassVar[tuple[str, ...] | None] = None
    dtypes: ClassVar[tuple[str, ...] | None] = None
    max_slots: ClassVar[int] = 200
    max_head_dim: ClassVar[int] = 576
    max_examples: ClassVar[int] = 25
    wide_slots: ClassVar[int] = 2**21 + 64

    # Set-up.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test once per framework and dtype that the backend declares."""
        wanted = [name for name in ("kit", "dtype") if name in metafunc.fixturenames]
        if not wanted:
            return
        if registry.missing(self.backend) is not None:
            # One skip per test, not one per framework and dtype: of the fixture below.
            metafunc.parametrize(wanted, [[None] * len(wanted)], ids=[self.backend])
            return
        loaded = registry.load(self.backend)
        frameworks = self.frameworks or [
            name for name in _FRAMEWORKS[self.device] if name in loaded.frameworks
        ]
        dtypes = self.dtypes or [name for name in DTYPES if name in loaded.dtypes]
        found = []
        kits = [KITS[name](self.device) for name in frameworks] if "kit" in wanted else [None]
        for kit, dtype in itertools.product(kits, dtypes if "dtype" in wanted else [None]):
            reason = kit and kit.missing(dtype or "float32")
            marks = [pytest.mark.skip(reason)] if reason else []
            name = "-".join(filter(None, (kit and kit.name, dtype)))
            values = filter(None, (kit, dtype))
            found.append(pytest.param(*values, marks=marks, id=name))
        metafunc.parametrize(wanted, found)

    @pytest.fixture(autouse=True)
    def _backend_in_force(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Use the backend, and hand it poisoned memory instead of undefined memory."""
        for framework in adapters.Framework.__subclasses__():
            monkeypatch.setattr(framework, "empty", _poisoned(framework.empty))
        # A backend that this machine is no match for is no failure. One that cannot be imported, or
        # compiled, is.
        absent = registry.missing(self.backend)
        if absent is not None:
            pytest.skip(f"backend {self.backend!r}: {absent}")
        with hata.use_backend(self.backend):
            yield

    @pytest.fixture
    def numpy_kit(self) -> NumPyKit:
        """A NumPy kit, where the backend takes NumPy arrays."""
        if "numpy" not in self.loaded.frameworks:
            pytest.skip("only NumPy has such arrays")
        return NumPyKit()

    @property
    def loaded(self) -> Backend:
        """The backend under test."""
        return registry.load(self.backend)

    def for_cases(self, dtype: str, check: Callable[[Case], None]) -> None:
        """Hold `check(case)` against drawn cases; those the backend refuses do not count."""
        reasons: list[str] = []
        ran: list[Case] = []

        @settings(max_examples=self.max_examples, deadline=None, suppress_health_check=_PATIENCE)
        @given(cases(dtype, self.max_slots, self.max_head_dim))
        def run(case: Case) -> None:
            try:
                check(case)
            except pytest.skip.Exception as refused:
                reasons.append(str(refused))
                reject()
            ran.append(case)

        try:
            run()
        except Exception:
            if ran or not reasons:
                raise
        if not ran:
            pytest.skip(f"no case was accepted: {reasons[0]}")

    # Calls.

    def run(self, op: str, **arguments: Any) -> Any:
        """Call an op; what the backend declares that it cannot run is skipped."""
        try:
            return getattr(hata, op)(**arguments)
        except UnsupportedProblem as error:
            pytest.skip(str(error))

    def refused(
        self, op: str, error: type[Exception], match: str, *arguments: dict[str, Any]
    ) -> None:
        """An op refuses a call; of its arguments later ones replace earlier ones."""
        with pytest.raises(error, match=match):
            getattr(hata, op)(**{name: x for part in arguments for name, x in part.items()})

    def call(self, kit: Kit, op: str, placed: Arrays, **options: Any) -> Any:
        """Call an op with arrays placed by `kit`; nothing may change but what it writes."""
        arrays = arrays_of(placed)
        written = CALLS[op](**arrays, **options).written()
        kept = {name: p for name, p in placed.items() if p is not None and name not in written}
        before = {name: kit.get(p.memory).tobytes() for name, p in kept.items()}
        result = self.run(op, **arrays, **options)
        for name, p in kept.items():
            assert kit.get(p.memory).tobytes() == before[name], f"{op} changed {name}"
        return result

    def got(self, kit: Kit, op: str, placed: Arrays, **options: Any) -> Any:
        """What `call` returns, as NumPy arrays."""
        result = self.call(kit, op, placed, **options)
        return tuple(map(kit.get, result)) if isinstance(result, tuple) else kit.get(result)

    def put(self, kit: Kit, **values: Any) -> Arrays:
        """Place NumPy values as dense arrays."""
        return {name: None if x is None else kit.place(np.asarray(x)) for name, x in values.items()}

    # Checks.

    def check_attention(
        self, kit: Kit, result: tuple[Any, Any], placed: Arrays, indices: np.ndarray, case: Case
    ) -> None:
        """`(out, lse)` is right for the selection `indices`, within the tolerance."""
        q, keys, values = (placed[name].values for name in ("q", "keys", "values"))
        options: dict[str, Any] = {"sink_logits": given_values(placed).get("sink_logits")}
        options |= {"scale": case.scale, "softcap": case.softcap}
        assert all(map(kit.is_same_kind, result)), "another kind of array came back"
        out, lse = map(kit.get, result)
        assert out.dtype == q.dtype
        expected, expected_lse = reference().sparse_attend(
            q, keys, values, indices, **options, return_lse=True
        )
        plain = tolerance.plain_attention(q, keys, values, indices, **options)
        hold(tolerance.attention_fault(out, expected, plain))
        hold(tolerance.lse_fault(lse, expected_lse, plain.logit))


def as_tuple(result: Any) -> tuple[Any, ...]:
    """What an op returned, one array or several."""
    return result if isinstance(result, tuple) else (result,)


def arrays_of(placed: Arrays) -> dict[str, Any]:
    """The framework's arrays of placed arguments."""
    return {name: None if p is None else p.array for name, p in placed.items()}


def given_values(placed: Arrays) -> dict[str, Any]:
    """The NumPy values of placed arguments."""
    return {name: None if p is None else p.values for name, p in placed.items()}


def visible(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """First visible key, and the one after the last, of every query: `[B, T]` each."""
    first = np.broadcast_to(0 if case.starts is None else case.starts, case.batch)
    last = np.broadcast_to(case.slots if case.lengths is None else case.lengths, case.batch)
    ends = last[:, None] - np.arange(case.tokens)[::-1]
    return first[:, None] + 0 * ends, np.maximum(first[:, None], ends)
