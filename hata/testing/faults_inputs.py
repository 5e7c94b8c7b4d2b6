"""Faults of input: calls outside the contract, each refused with a message that says what to do."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hata.call import CALLS
from hata.errors import HataDeviceError, HataDTypeError, HataShapeError
from hata.measure.arrays import Kit, NumPyKit, TorchKit
from hata.problem import OPS
from hata.testing.faults_values import SMALL
from hata.testing.harness import arrays_of
from hata.testing.properties import Properties

# A call that uses every kind of array.
LEGAL = replace(SMALL, norms=True, bias=True, sinks=True, lengths=(40, 9))
# Run on its own, since a wrong answer here is a crash: every array of every op, in turn, with each
# of its axes reversed. The op refuses it, or gets it right.
_NEGATIVE_STRIDES = """
import sys
import numpy as np
import hata
from hata.measure.arrays import NumPyKit
from hata.problem import OPS
from hata.testing.faults_values import SMALL
from hata.testing.properties import Properties

kit = NumPyKit()
with hata.use_backend(sys.argv[1]):
    for op in OPS:
        arrays, options = Properties().arguments(kit, SMALL, op)
        arrays = {name: p.array for name, p in arrays.items() if p is not None}
        for name, array in arrays.items():
            for axis in range(array.ndim):
                step = tuple(slice(None, None, -1 if a == axis else 1) for a in range(array.ndim))
                mirrored = {**arrays, name: array[step]}
                try:
                    got = getattr(hata, op)(**mirrored, **options)
                except ValueError:
                    continue
                dense = {**arrays, name: array[step].copy()}
                np.testing.assert_array_equal(got, getattr(hata, op)(**dense, **options))
print("survived")
"""


def zeros(kit: Kit, *shape: int, kind: str = "f4") -> Any:
    """A framework's array of zeros."""
    return kit.put(np.zeros(shape, kind))


class Each(tuple):
    """Values of an argument, each of them wrong in a call of its own."""


SELECT, ATTEND = "hamming_topk hash_attend", "sparse_attend hash_attend"


class InputFaults(Properties):
    """Rows whose input is illegal."""

    def misshapen(
        self, kit: Kit, ops: str, match: str, error: Any = HataShapeError, **wrong: Any
    ) -> None:
        """Ops refuse legal calls but for a wrong shape, stride or size."""
        choices = [x if isinstance(x, Each) else (x,) for x in wrong.values()]
        for op in ops.split():
            placed, options = self.arguments(kit, LEGAL, op)
            for values in itertools.product(*choices):
                given = dict(zip(wrong, values, strict=True))
                self.refused(op, error, match, arrays_of(placed), options, given)

    def mistyped(self, kit: Kit, ops: str, match: str, **wrong: Any) -> None:
        """Ops refuse legal calls but for a wrong dtype or type."""
        self.misshapen(kit, ops, match, HataDTypeError, **wrong)

    def given(self, kit: Kit) -> Iterator[tuple[str, str, np.ndarray]]:
        """The arrays of the legal calls: op, name and values."""
        for op in OPS:
            for name, p in self.arguments(kit, LEGAL, op)[0].items():
                if p is not None:
                    yield op, name, p.values

    def test_fault_02_budget_of_zero(self, kit: Kit) -> None:
        self.misshapen(kit, SELECT, "k must be ≥ 1", k=0)

    def test_fault_03_budget_of_a_wrong_kind(self, kit: Kit) -> None:
        self.misshapen(kit, SELECT, "k: got -3", k=-3)
        self.misshapen(kit, SELECT, r"less than 2\*\*31", k=2**31)
        wrong = Each((4.0, True, "4", None, [4], np.float32(4), np.bool_(True)))
        self.mistyped(kit, SELECT, "k: got", k=wrong)
        for name in ("k_min", "sink", "recent"):
            self.misshapen(kit, SELECT, name, **{name: -1})
            self.mistyped(kit, SELECT, name, **{name: 1.0})
        for name in ("k", "k_min", "sink", "recent"):
            huge = Each((10**5000, -(10**5000)))
            self.misshapen(kit, SELECT, f"{name}: got .*bits", **{name: huge})
        self.misshapen(kit, SELECT, "at most k = 6", sink=4, recent=3)
        ratios = Each((0.0, -0.5, 1.5, float("nan"), float("inf"), 10**400))
        self.misshapen(kit, SELECT, "ratio: got", ratio=ratios)
        self.mistyped(kit, SELECT, "ratio: got", ratio=Each(("0.5", True, [0.5], 1j)))

    def test_fault_08_beyond_the_slots(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HATA_CHECK", "1")
        for name in ("lengths", "starts"):
            for value in (41, -1):
                match = f"{name}: got {value} in row 1, expected 0 to S = 40"
                array = kit.put(np.array([3, value], np.int32))
                self.misshapen(kit, SELECT, match, **{name: array})
        indices = np.full((2, 2, 1, 6), -1, np.int32)
        indices[1, 0, 0, 2] = 40
        self.misshapen(kit, "sparse_attend", "got 40 in row 1", indices=kit.put(indices))
        # What is right passes as without the check.
        self.check_hash_attend(kit, replace(SMALL, lengths=(40, 0)))

    def test_fault_22_head_sizes_that_are_not_supported(self, kit: Kit) -> None:
        match = "multiples of 16 from 16 to 576"
        for head_dim in (59, 111, 8, 0, 592):
            x, projection = zeros(kit, 1, 2, 1, head_dim), zeros(kit, 2, head_dim, 32)
            self.misshapen(kit, "encode", match, x=x, projection=projection, bias=None)
            self.misshapen(kit, "sparse_attend", match, values=zeros(kit, 2, 2, 40, head_dim))

    def test_fault_24_heads_that_form_no_groups(self, kit: Kit) -> None:
        match, q = "3 heads for 2 KV heads", zeros(kit, 2, 3, 1, 32)
        self.misshapen(kit, "encode", match, x=q)
        self.misshapen(kit, ATTEND, match, q=q)
        self.misshapen(kit, SELECT, match, q_codes=zeros(kit, 2, 3, 1, 8, kind="u1"))

    def test_fault_25_bits_that_are_no_multiple_of_32(self, kit: Kit) -> None:
        for bits in (0, 16, 33, 80):
            projection = zeros(kit, 2, 32, bits)
            self.misshapen(kit, "encode hash_attend", f"{bits} bits", projection=projection)
        self.misshapen(kit, "hamming_topk", "48 bits", q_codes=zeros(kit, 2, 4, 1, 6, kind="u1"))

    def test_fault_26_codes_of_another_width(self, kit: Kit) -> None:
        codes = zeros(kit, 2, 2, 40, 16, kind="u1")
        match = r"16 bytes \(128 bits\).*64 bits \(8 bytes\)"
        self.misshapen(kit, "hamming_topk", match, k_codes=codes)
        self.misshapen(kit, "hash_attend", match, key_codes=codes)
        self.misshapen(kit, "hash_attend", match, q_codes=zeros(kit, 2, 4, 1, 16, kind="u1"))
        projection = zeros(kit, 2, 32, 128)
        self.misshapen(kit, "hash_attend", "128 bits.*64", query_projection=projection)
        # Without a projection query codes say how many bits there are.
        other = r"key_codes: got codes of 8 bytes \(64 bits\), but q_codes has 128 bits"
        for width, match in ((16, other), (6, "q_codes: got 48 bits")):
            q_codes = zeros(kit, 2, 4, 1, width, kind="u1")
            self.misshapen(kit, "hash_attend", match, q_codes=q_codes, projection=None, bias=None)

    def test_projection_left_out_where_something_is_encoded(self, kit: Kit) -> None:
        """The error says what to do."""
        match = r"projection: got None, expected an array .* q is to be encoded; .*q_codes"
        self.mistyped(kit, "hash_attend", match, projection=None)
        q_codes = zeros(kit, 2, 4, 1, 8, kind="u1")
        given: dict[str, Any] = {"projection": None, "bias": None, "q_codes": q_codes}
        match = "projection: got None, expected an array .* 2 fresh keys.* fresh=0"
        self.mistyped(kit, "hash_attend", match, **given, fresh=2)
        sizes = {"bias": (2, 64), "query_bias": (2, 64), "query_projection": (2, 32, 64)}
        for name, shape in sizes.items():
            match = f"{name}: got an array, expected None, .* leave {name} out"
            self.mistyped(kit, "hash_attend", match, **{**given, name: zeros(kit, *shape)})

    def test_fault_28_rows_that_are_not_dense(self, kit: Kit) -> None:
        for op, name, x in self.given(kit):
            array = kit.put(np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype))[..., ::2]
            self.misshapen(kit, op, f"{name}: got stride 2", **{name: array})

    @pytest.mark.usefixtures("numpy_kit")
    def test_fault_30_negative_strides(self) -> None:
        command = [sys.executable, "-c", _NEGATIVE_STRIDES, self.backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "survived"

    def test_fault_31_read_only_where_written(self, numpy_kit: NumPyKit) -> None:
        for op, name, shape, kind in (
            ("hash_attend", "key_codes", (2, 2, 40, 8), "u1"),
            ("hash_attend", "key_norms", (2, 2, 40), "f2"),
            ("encode", "out", (2, 4, 40, 8), "u1"),
            ("encode", "norms", (2, 4, 40), "f2"),
        ):
            array = np.zeros(shape, kind)
            array.flags.writeable = False
            wrong: dict[str, Any] = {name: array, **({"fresh": 1} if op == "hash_attend" else {})}
            self.mistyped(numpy_kit, op, f"{name}.*read-only", **wrong)

    def test_fault_31_overlapping_where_written(self, kit: Kit) -> None:
        codes = kit.put(np.zeros((2, 2, 40, 8), np.uint8), "expanded")
        self.misshapen(kit, "hash_attend", "key_codes.*overlapping", key_codes=codes, fresh=1)
        out = kit.put(np.zeros((2, 4, 40, 8), np.uint8), "expanded")
        self.misshapen(kit, "encode", "out.*overlapping", out=out)

    def test_fault_31_shared_where_written(self, kit: Kit) -> None:
        """What is written shares memory with nothing else, wherever that can be told."""
        half = zeros(kit, 1, kind="f2").dtype
        # Room for the codes of a head, then for its norms.
        memory = zeros(kit, 2, 4, 400, kind="u1")
        halves = memory.view(half)
        out = memory[:, :, :320].reshape(2, 4, 40, 8)
        match = "out: got memory that norms lies in too"
        self.misshapen(kit, "encode", match, out=out, norms=halves[:, :, :40])
        dense = memory.reshape(-1)[: 2 * 4 * 40 * 8].reshape(2, 4, 40, 8)
        self.misshapen(kit, "encode", match, out=dense, norms=halves[:, :, 80:120])
        given = arrays_of(self.arguments(kit, LEGAL, "encode")[0])
        expected = kit.get(self.run("encode", **given))
        # Heads of one in the gaps of the other.
        given |= {"out": out, "norms": halves[:, :, 160:]}
        np.testing.assert_array_equal(kit.get(self.run("encode", **given)), expected)

        codes = zeros(kit, 2 * 2 * 40 * 8, kind="u1")
        within = codes[320:640].view(half).reshape(2, 2, 40)
        wrong: dict[str, Any] = {"key_codes": codes.reshape(2, 2, 40, 8), "key_norms": within}
        match = "key_codes: got memory that key_norms lies in too"
        self.misshapen(kit, "hash_attend", match, **wrong, fresh=1)
        # Where nothing is written, nothing is wrong.
        placed, options = self.arguments(kit, LEGAL, "hash_attend")
        self.run("hash_attend", **{**arrays_of(placed), **options, **wrong})

    def test_fault_33_misaligned_pointer(self, numpy_kit: NumPyKit) -> None:
        for op, name, x in self.given(numpy_kit):
            if x.itemsize > 1:
                array = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
                self.misshapen(numpy_kit, op, f"{name}: got data at an address", **{name: array})

    def test_fault_34_wrong_dtypes(self, kit: Kit) -> None:
        foreign = ("int32", "float64", "complex64", "bool")
        no_lengths = ("float32", "uint8", "int16", "bool")
        shapes = {(op, name): x.shape for op, name, x in self.given(kit)}
        shapes["hamming_topk", "starts"] = (2,)
        for op, names, kinds, match in (
            ("encode", ("x",), foreign, "float32"),
            ("hash_attend", ("q", "keys", "projection"), foreign, "float32"),
            ("hamming_topk", ("lengths", "starts"), no_lengths, "int32 or int64"),
            ("sparse_attend", ("indices",), ("int64",), "int32"),
            ("hamming_topk", ("key_norms",), ("float32",), "float16"),
            ("hash_attend", ("keys",), ("float16",), ""),
        ):
            for name, kind in itertools.product(names, kinds):
                array = zeros(kit, *shapes[op, name], kind=kind)
                self.mistyped(kit, op, f"{name}: got {kind}.*{match}", **{name: array})

    def test_fault_34_float8(self, kit: Kit) -> None:
        shape = (2, 4, 1, 32)
        if isinstance(kit, TorchKit):
            array = kit.lib.zeros(shape, dtype=kit.lib.float8_e4m3fn, device=kit.device)
        elif isinstance(kit, NumPyKit):
            ml_dtypes = pytest.importorskip("ml_dtypes", reason="no float8 here")
            array = np.zeros(shape, ml_dtypes.float8_e4m3fn)
        else:
            pytest.skip("no float8 here")
        self.mistyped(kit, "sparse_attend", "float8_e4m3fn", q=array)

    @pytest.mark.parametrize("kind", ["int8", "int32", "int64"])
    def test_fault_35_codes_as_words(self, kit: Kit, kind: str) -> None:
        array = zeros(kit, 2, 2, 40, 8, kind=kind)
        match = re.escape(f"got {kind}") + ".*" + re.escape(".view(uint8)")
        self.mistyped(kit, "hamming_topk", match, k_codes=array)
        self.mistyped(kit, "hamming_topk", match, q_codes=array)
        self.mistyped(kit, "hash_attend", match, key_codes=array)

    @pytest.mark.parametrize("kind", [">f4", "O", "U4", "V0", "S4", "M8[s]"])
    def test_fault_36_foreign_numpy_dtypes(self, numpy_kit: NumPyKit, kind: str) -> None:
        array = np.zeros((2, 4, 1, 32), kind)
        self.mistyped(numpy_kit, "sparse_attend", "q: got", q=array)
        self.mistyped(numpy_kit, "encode", "x: got", x=array)

    def test_fault_38_arrays_on_another_kind_of_device(self, kit: Kit) -> None:
        problem = self.problem_of(kit, SMALL, "encode")
        other = "cuda:0" if self.device == "cpu" else "cpu"
        if other.partition(":")[0] in self.loaded.devices:
            pytest.skip("the backend runs on both")
        fix = "triton" if self.device == "cpu" else "numba"
        with pytest.raises(HataDeviceError, match=f"{self.backend}.*{other}.*{fix}"):
            self.loaded.accept(problem, kit.adapter(), other)

    def test_fault_41_mixed_frameworks(self, kit: Kit) -> None:
        other = TorchKit() if isinstance(kit, NumPyKit) else NumPyKit()
        if other.missing("float32"):
            pytest.skip(f"{other.name} is not installed")
        for op, name, x in self.given(kit):
            if name != CALLS[op]._fields[0]:
                match = f"{name}: got a {other.name} array, expected {kit.name}"
                self.mistyped(kit, op, match, **{name: other.put(x)})

    def test_arrays_that_are_none(self, kit: Kit) -> None:
        """Lists, numbers, strings and `None` are refused by name."""
        for op, name, _ in self.given(kit):
            wrong = Each(([[1.0]], 3, "array", object(), np.float32(1), np.int64(2)))
            self.mistyped(kit, op, f"^{name}: got", **{name: wrong})
            if name not in ("bias", "lengths", "key_norms", "sink_logits"):
                self.mistyped(kit, op, f"^{name}: got", **{name: None})

    def test_ranks_and_sizes(self, kit: Kit) -> None:
        """A missing, an extra, a longer axis: refused by name."""
        for op, name, x in self.given(kit):
            for shape in ((), (1,), (*x.shape, 1)):
                if name != "lengths" or shape != ():
                    array = kit.put(np.zeros(shape, x.dtype))
                    self.misshapen(kit, op, name, **{name: array})
            if name in ("q", "x", "q_codes", "projection", "indices"):
                continue
            for axis in range(x.ndim):
                longer = [n + (a == axis) for a, n in enumerate(x.shape)]
                self.misshapen(kit, op, "got", **{name: kit.put(np.zeros(longer, x.dtype))})

    def test_numbers_that_are_none(self, kit: Kit) -> None:
        """Scale, soft cap, fresh, dense_below: of the right kind, finite, in range."""
        # What is finite in float64 alone is not finite to a kernel.
        infinite = Each((float("nan"), float("inf"), 10**400, 1e39, -1e39))
        for name in ("scale", "softcap"):
            strange = Each(("1", True, [1.0], object()))
            self.mistyped(kit, ATTEND, f"{name}: got", **{name: strange})
            self.misshapen(kit, ATTEND, f"{name}: got", **{name: infinite})
        self.misshapen(kit, ATTEND, "softcap: got", softcap=Each((0.0, -1.0, 1e-39, 1e-46)))
        for name in ("fresh", "dense_below"):
            self.misshapen(kit, "hash_attend", name, **{name: -1})
            self.mistyped(kit, "hash_attend", name, **{name: Each((1.0, True, "1", None))})
        self.mistyped(kit, "hamming_topk", "per_head: got", per_head="yes")
        self.mistyped(kit, ATTEND, "return_lse: got 'no'", return_lse="no")

    def test_numbers_beyond_64_bits(self, kit: Kit) -> None:
        """Sizes without an upper limit mean "all", however large."""
        for op, name, all_of_it, more in (
            ("hash_attend", "fresh", SMALL.slots, {}),
            ("hash_attend", "dense_below", SMALL.slots, {}),
            ("hamming_topk", "k_min", SMALL.k, {"ratio": 0.01}),
        ):
            sizes: list[dict[str, Any]] = [{**more, name: n} for n in (all_of_it, 10**30)]
            most, huge = (self.result(kit, SMALL, op, **size) for size in sizes)
            np.testing.assert_array_equal(huge, most)
