"""Faults of values, sizes and memory: calls within the contract that are easily got wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hata
from hata.errors import UnsupportedProblem
from hata.measure.arrays import Kit, NumPyKit, TorchKit, numpy_dtype
from hata.problem import OPS
from hata.testing.harness import arrays_of
from hata.testing.properties import NORMS, Properties
from hata.testing.strategies import Case, make_values

SMALL = Case(
    seed=3, dtype="float32", batch=2, kv_heads=2, group=2, code_group=2, slots=40, head_dim=32,
    value_dim=16, bits=64, k=6,
)  # fmt: skip
# More keys than a 16-bit counter can count.
MANY = 70_001
# What arrays that 32-bit offsets cannot reach take: 4.3 GB each of keys and values, and more.
WIDE_BYTES = 14 << 30


class ValueFaults(Properties):
    """Rows whose input is legal."""

    def needs_float16(self) -> None:
        """Skip where the backend has none."""
        if "float16" not in self.loaded.dtypes:
            pytest.skip("the backend takes no float16")

    def check_all(self, kit: Kit, case: Case) -> None:
        """All four ops on a case."""
        for op in OPS:
            getattr(self, "check_" + op)(kit, case)

    def test_fault_01_budget_beyond_the_keys(self, kit: Kit) -> None:
        case = replace(SMALL, k=SMALL.slots + 7, lengths=(40, 5))
        self.check_all(kit, case)
        indices = self.result(kit, case, "hamming_topk")
        assert (indices[1] == [*range(5), *[-1] * 42]).all()
        # "All keys" is what a huge budget means; it must cost nothing by itself.
        dense = self.result(kit, case, "hash_attend")
        huge = self.result(kit, case, "hash_attend", k=2**31 - 1)
        np.testing.assert_allclose(huge, dense, rtol=1e-5, atol=1e-6)

    def test_fault_04_no_slots_no_keys_no_tokens(self, kit: Kit) -> None:
        self.check_all(kit, replace(SMALL, slots=0))
        self.check_all(kit, replace(SMALL, tokens=0))
        self.check_all(kit, replace(SMALL, lengths=(0, 0), fresh=3))
        self.check_sparse_attend(kit, replace(SMALL, k=0))
        out, lse = self.result(kit, replace(SMALL, slots=0), "hash_attend", return_lse=True)
        assert (out == 0).all()
        assert (lse == -np.inf).all()

    def test_fault_05_batch_of_none(self, kit: Kit) -> None:
        self.check_all(kit, replace(SMALL, batch=0, lengths=(), fresh=2))

    def test_fault_06_one_row_of_length_zero(self, kit: Kit) -> None:
        case = replace(SMALL, batch=3, lengths=(40, 0, 17), fresh=2, sinks=True)
        self.check_all(kit, case)
        out = self.result(kit, case, "hash_attend")
        assert (out[1] == 0).all()
        assert (out[[0, 2]] != 0).any()

    @pytest.mark.parametrize("length_dtype", ["int32", "int64"])
    def test_fault_07_rows_shorter_than_the_budget(self, kit: Kit, length_dtype: str) -> None:
        lengths, starts = (40, 3, 6, 7), (39, 1, 0, 0)
        case = replace(SMALL, batch=4, lengths=lengths, starts=starts, lengths_dtype=length_dtype)
        self.check_all(kit, case)
        self.check_all(kit, replace(case, tokens=3, fresh=5))
        self.check_all(kit, replace(case, lengths=5, starts=2))
        # Far below zero, where what is taken off a length for earlier queries must not wrap around.
        lengths = (-(2**31), 1 - 2**31, -1, 40)
        self.check_all(kit, replace(case, lengths=lengths, tokens=3, fresh=5))
        # Starts behind all slots, up to the largest, from which on nothing may be counted up.
        self.check_all(kit, replace(case, starts=(2**31 - 1, 2**31 - 2, 5, 0), tokens=3, fresh=5))

    def test_fault_09_row_that_sees_nothing(self, kit: Kit) -> None:
        case = replace(SMALL, lengths=(40, 10), starts=(40, 30), sinks=True, tokens=2, fresh=3)
        self.check_all(kit, case)
        nothing = np.full((2, 2, 2, 6), -1, np.int32)
        self.check_sparse_attend(kit, case, indices=nothing)

    def test_fault_10_nan_in_q(self, kit: Kit) -> None:
        q = make_values(SMALL)["q"]
        q[0, 1, 0, 3] = np.nan
        out = self.result(kit, SMALL, "hash_attend", {"q": q})
        bad = np.zeros(out.shape, bool)
        bad[0, 1, 0] = True
        assert (np.isnan(out) == bad).all()
        codes = self.result(kit, SMALL, "encode", {"x": q})
        assert (codes[0, 1, 0] == 0).all(), "NaN > 0 is false: every bit is 0"
        self.check_encode(kit, SMALL, x=q)

    def test_fault_11_nan_in_a_selected_slot(self, kit: Kit) -> None:
        rows = np.array([0, 20], np.int32).reshape(2, 1, 1, 1)
        indices = np.repeat(rows + np.arange(6, dtype=np.int32), 2, axis=1)
        for name in ("keys", "values"):
            poisoned = make_values(SMALL)[name]
            # Row 0 selects slot 2 of head 1, row 1 does not.
            poisoned[:, 1, 2] = np.nan
            given = {name: poisoned, "indices": indices}
            out = self.result(kit, SMALL, "sparse_attend", given)
            bad = np.zeros(out.shape, bool)
            bad[0, 2:] = True
            assert (np.isnan(out) == bad).all()

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    def test_fault_12_nan_in_unselected_slots(self, kit: Kit, dtype: str, poison: float) -> None:
        case = replace(SMALL, dtype=dtype, lengths=(33, 29), starts=(2, 4), tokens=2)
        values = make_values(case)
        arrays, options = self.arguments(kit, case, "hash_attend")
        indices = self.selected(kit, case, arrays)
        clean = self.got(kit, "hash_attend", arrays, **options)
        given = {name: values[name] for name in ("keys", "values")}
        for b, head in np.ndindex(2, 2):
            unselected = np.setdiff1d(np.arange(case.slots), indices[b, head])
            for x in given.values():
                x[b, head, unselected] = poison
        assert self.result(kit, case, "hash_attend", given).tobytes() == clean.tobytes()
        self.check_sparse_attend(kit, case, **given, indices=indices)

    def test_fault_13_infinity_in_keys(self, kit: Kit, dtype: str) -> None:
        case = replace(SMALL, dtype=dtype, fresh=SMALL.slots, norms=True)
        keys = make_values(case)["keys"]
        keys[0, 0, 5, 7] = np.inf
        keys[1, 1, 9, 0] = -np.inf
        # inf - inf is NaN, and so 0.
        keys[0, 1, 3, :2] = np.inf, -np.inf
        self.check_encode(kit, case, x=keys)
        self.check_hash_attend(kit, case, keys=keys)

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_fault_14_zeros_give_bit_zero(self, kit: Kit, dtype: str, zero: float) -> None:
        case = replace(SMALL, dtype=dtype)
        zeros = {n: np.full_like(make_values(case)[n], zero) for n in ("projection", "x")}
        bias = np.full((2, 64), zero, numpy_dtype(dtype))
        for name, more in (("projection", {}), ("x", {}), ("x", {"bias": bias})):
            given = {name: zeros[name], **more}
            assert (self.result(kit, case, "encode", given) == 0).all()

    @pytest.mark.parametrize("slots", [40, MANY, 2**20, 2**22 - 1])
    @NORMS
    def test_fault_15_all_keys_identical(self, kit: Kit, slots: int, norms: bool) -> None:
        given = {
            "q_codes": np.full((1, 4, 1, 4), 0x0F, np.uint8),
            "k_codes": np.full((1, 1, slots, 4), 0xF1, np.uint8),
            "key_norms": np.full((1, 1, slots), 2.0, np.float16) if norms else None,
        }
        placed = self.put(kit, **given)
        indices = self.got(kit, "hamming_topk", placed, k=11)
        assert indices[0, 0, 0].tolist() == list(range(11))
        indices = self.got(kit, "hamming_topk", placed, k=11, sink=2, recent=3)
        assert indices[0, 0, 0].tolist() == [*range(8), slots - 3, slots - 2, slots - 1]

    @NORMS
    def test_fault_16_tie_at_the_last_place(self, kit: Kit, norms: bool) -> None:
        k_codes = np.full((1, 1, 3_000, 4), 0x11, np.uint8)
        k_codes[0, 0, [70, 2_900]] = 0
        given = {
            "q_codes": np.zeros((1, 3, 1, 4), np.uint8),
            "k_codes": k_codes,
            "key_norms": np.ones((1, 1, 3_000), np.float16) if norms else None,
        }
        indices = self.got(kit, "hamming_topk", self.put(kit, **given), k=5)
        assert indices[0, 0, 0].tolist() == [0, 1, 2, 70, 2_900]
        case = replace(SMALL, batch=1, slots=5_000, k=700, flavour="few", norms=norms)
        self.check_hamming_topk(kit, case)

    def test_fault_17_hundred_equal_calls(self, kit: Kit) -> None:
        case = replace(SMALL, slots=600, k=100, flavour="few", tokens=2, norms=True)
        for op in ("hamming_topk", "hash_attend"):
            arrays, options = self.arguments(kit, case, op)
            results = {self.got(kit, op, arrays, **options).tobytes() for _ in range(100)}
            assert len(results) == 1

    @pytest.mark.parametrize("size", [21.5, 30.0], ids=["below", "above"])
    def test_fault_18_float16_logits_near_65504(self, kit: Kit, size: float) -> None:
        self.needs_float16()
        case = replace(SMALL, dtype="float16", head_dim=128, scale=1.0)
        given = {n: np.full_like(make_values(case)[n], size) for n in ("q", "keys")}
        self.check_sparse_attend(kit, case, **given)
        for x in self.result(kit, case, "hash_attend", given, return_lse=True):
            assert np.isfinite(x).all()

    def test_fault_19_zero_q_or_keys(self, kit: Kit, dtype: str) -> None:
        case = replace(SMALL, dtype=dtype, fresh=SMALL.slots, norms=True)
        values = make_values(case)
        chosen = (values["indices"] >= 0).sum(axis=-1).repeat(2, axis=1)
        for name in ("q", "keys"):
            zeros = {name: np.zeros_like(values[name])}
            self.check_hash_attend(kit, case, **zeros)
            lse = self.result(kit, case, "sparse_attend", zeros, return_lse=True)[1]
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(lse, np.log(chosen), rtol=1e-6, atol=1e-6)

    def test_fault_20_offsets_beyond_31_bits(self, kit: Kit) -> None:
        self.needs_float16()
        slots = self.wide_slots
        needed = WIDE_BYTES * slots >> 21
        if kit.free_bytes() < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the device")
        # 4.3 GB each of keys and values, 2 GB of codes, of which a few rows are ever touched.
        keys, values = (kit.empty((1, 8, slots, 128), "float16") for _ in range(2))
        key_codes = kit.empty((1, 8, slots, 128), "uint8")[..., :16]
        rng = np.random.default_rng(0)
        first = slots - 20
        # The same rows in arrays of their own. What the call writes is taken from here on, in pages
        # of up to 2 MiB each.
        near = {n: kit.normal(rng, (1, 8, 20, 128), "float16") for n in ("keys", "values")}
        near["key_codes"] = kit.put(np.zeros((1, 8, 20, 16), np.uint8))
        given = {"keys": keys, "values": values, "key_codes": key_codes}
        for name, array in given.items():
            array[:, :, first:] = near[name]
        given["q"] = kit.normal(rng, (1, 8, 1, 128), "float16")
        given["projection"] = kit.normal(rng, (8, 128, 128), "float32")
        starts = kit.put(np.array(first))
        # Half of what a copy of the codes, the smallest of them, would take: a part of it may lie
        # in memory that was taken before.
        most = 8 * slots * 16 // 2
        options = {"k": 8, "fresh": 20, "starts": starts, "return_lse": True}
        (out, lse), known = self.frugal(kit, most, "hash_attend", **given, **options)

        codes = near["key_codes"]
        expected = hata.hash_attend(**{**given, **near}, k=8, fresh=20, return_lse=True)
        for got, right in zip((out, lse), expected, strict=True):
            np.testing.assert_allclose(kit.get(got), kit.get(right), rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(kit.get(key_codes[:, :, first:]), kit.get(codes))

        q_codes = hata.encode(given["q"], given["projection"])
        codes_at = {"q_codes": q_codes, "k_codes": key_codes}
        far, _ = self.frugal(kit, most, "hamming_topk", **codes_at, k=8, starts=starts)
        close = kit.get(hata.hamming_topk(q_codes, codes, 8))
        np.testing.assert_array_equal(kit.get(far), close + first)
        arrays = {"q": given["q"], "keys": keys, "values": values, "indices": far}
        got, _ = self.frugal(kit, most, "sparse_attend", **arrays)
        np.testing.assert_allclose(kit.get(got), kit.get(out), rtol=2e-3, atol=2e-3)
        if not known:
            pytest.skip("all is right, but nothing here tells how much memory a call takes")

    def frugal(self, kit: Kit, most: int, op: str, **arguments: Any) -> tuple[Any, bool]:
        """The result of a prepared call that takes less than `most` bytes, if that can be told."""
        try:
            hata.prepare(op, **arguments)
        except UnsupportedProblem as error:
            pytest.skip(str(error))
        with kit.growth() as growth:
            result = self.run(op, **arguments)
        took = growth.bytes
        assert took is None or took < most, f"{op} took {took} bytes: something was copied"
        return result, took is not None

    def test_fault_21_more_rows_than_a_grid_holds(self, kit: Kit) -> None:
        if self.device == "cpu":
            pytest.skip("a CPU has no launch grid")
        rows = 70_000
        rng = np.random.default_rng(0)
        sizes = {"q": (rows, 1, 1, 16), "keys": (rows, 1, 4, 16), "values": (rows, 1, 4, 16)}
        steps = {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}
        all_codes = rng.integers(0, 256, (rows, 1, 4, 4), np.uint8)
        weights = kit.put(rng.standard_normal((1, 16, 32)).astype(np.float32))

        def results(part: slice) -> list[np.ndarray]:
            given = {name: kit.put(x[part]) for name, x in steps.items()}
            key_codes = kit.put(all_codes[part])
            codes = self.run("encode", x=given["q"], projection=weights)
            picked = self.run("hamming_topk", q_codes=codes, k_codes=key_codes, k=2)
            sparse = self.run("sparse_attend", **given, indices=picked)
            given |= {"key_codes": key_codes, "projection": weights}
            step = self.run("hash_attend", **given, k=2)
            return [kit.get(x) for x in (codes, picked, sparse, step)]

        everything = results(slice(None))
        # A row's bits depend on the row alone, so a few rows by themselves are the expectation.
        for part in (slice(0, 30), slice(65_500, 65_600), slice(rows - 30, rows)):
            for got, right in zip(everything, results(part), strict=True):
                np.testing.assert_array_equal(got[part], right)

    @pytest.mark.parametrize("head_dim", [80, 96, 192, 256, 576])
    def test_fault_22_unusual_head_sizes(self, kit: Kit, dtype: str, head_dim: int) -> None:
        sizes = {"head_dim": head_dim, "value_dim": head_dim}
        self.check_all(kit, replace(SMALL, dtype=dtype, **sizes))

    @pytest.mark.parametrize("value_dim", [16, 48, 512])
    def test_fault_23_values_of_another_size(self, kit: Kit, dtype: str, value_dim: int) -> None:
        case = replace(SMALL, dtype=dtype, head_dim=96, value_dim=value_dim, tokens=2)
        self.check_sparse_attend(kit, case)
        self.check_hash_attend(kit, case)

    @pytest.mark.parametrize("layout", ["tokens_first", "padded", "sliced"])
    def test_fault_27_strides(self, kit: Kit, dtype: str, layout: str) -> None:
        layouts = (layout,)
        self.check_all(kit, replace(SMALL, dtype=dtype, layouts=layouts, norms=True, tokens=2))

    def test_fault_29_expanded(self, kit: Kit, dtype: str) -> None:
        self.test_fault_27_strides(kit, dtype, "expanded")

    def test_fault_31_read_only(self, numpy_kit: NumPyKit) -> None:
        for op in OPS:
            arrays, options = self.arguments(numpy_kit, SMALL, op)
            expected = self.call(numpy_kit, op, arrays, **options)
            for p in filter(None, arrays.values()):
                p.array.flags.writeable = False
            np.testing.assert_array_equal(self.call(numpy_kit, op, arrays, **options), expected)
            if op == "hash_attend":
                with pytest.raises(hata.HataDTypeError, match=r"key_codes.*read-only"):
                    self.call(numpy_kit, op, arrays, **{**options, "fresh": 1})

    def test_fault_32_two_byte_alignment(self, kit: Kit, dtype: str) -> None:
        self.test_fault_27_strides(kit, dtype, "offset")

    def test_fault_39_another_current_device(self, kit: Kit) -> None:
        if self.device == "cpu":
            pytest.skip("there is one CPU")
        torch = TorchKit().lib
        if torch.cuda.device_count() < 2 or kit.name != "torch":
            here = f"{torch.cuda.device_count()} GPUs, {kit.name}"
            pytest.skip(f"needs two GPUs and torch tensors; here: {here}")
        other = type(kit)("cuda:1")
        with torch.cuda.device(0):
            self.check_all(other, SMALL)
            for op in OPS:
                arrays, options = self.arguments(other, SMALL, op)
                hata.prepare(op, **arrays_of(arrays), **options)
                result = self.call(other, op, arrays, **options)
                assert result.device == torch.device("cuda:1")
            assert torch.cuda.current_device() == 0

    def test_fault_40_two_threads(self, kit: Kit) -> None:
        cases = [replace(SMALL, seed=seed, slots=500 + seed, k=50) for seed in (1, 2)]
        calls = [self.arguments(kit, case, "hash_attend") for case in cases]
        expected = [self.got(kit, "hash_attend", a, **o).tobytes() for a, o in calls]

        def work(turn: int) -> set[bytes]:
            arrays, options = calls[turn]
            with hata.use_backend(self.backend), kit.stream():
                results = (self.got(kit, "hash_attend", arrays, **options) for _ in range(50))
                return {result.tobytes() for result in results}

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, (0, 1))) == [{right} for right in expected]
