"""Property tests: every op, over drawn cases, against the reference."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import hata
from hata import checks
from hata.backend import use_config
from hata.call import CALLS
from hata.measure import reference, tolerance
from hata.measure.arrays import LAYOUTS, Arrays, JAXKit, Kit, NumPyKit, numpy_dtype
from hata.measure.tolerance import hold
from hata.problem import OPS, Problem
from hata.testing.harness import Harness, arrays_of, as_tuple, given_values, visible
from hata.testing.strategies import Case, make_values, place

# One case that uses most options, where a test needs one rather than many.
RICH = Case(
    seed=1, dtype="float32", batch=2, kv_heads=2, group=4, tokens=2, slots=150, head_dim=64,
    value_dim=32, bits=128, k=20, lengths=(150, 77), starts=(0, 9), fresh=5, norms=True,
    flavour="few", code_group=4, sink=2, recent=3, bias=True,
)  # fmt: skip


# Parts of the test that runs every configuration.
CONFIG_PARTS = 8
NORMS = pytest.mark.parametrize("norms", [False, True], ids=["hamming", "norms"])


class Properties(Harness):
    """The ops, one by one and together."""

    def test_declaration(self) -> None:
        """Name, devices, dtypes and frameworks are declared; hashes name the sources."""
        backend = self.loaded
        assert backend.name == self.backend
        assert type(backend).missing() is None
        assert self.device in backend.devices
        assert backend.devices <= {"cpu", "cuda"}
        assert backend.dtypes <= {"float32", "float16", "bfloat16"}
        assert backend.frameworks <= {"numpy", "torch", "cupy", "jax"}
        for op in OPS:
            assert re.fullmatch("[0-9a-f]{64}", backend.kernel_hash(op))
            assert backend.kernel_hash(op) == backend.kernel_hash(op)

    def test_encode(self, kit: Kit, dtype: str) -> None:
        """Codes and norms equal the reference's, with and without `out=` and `norms=`."""
        self.for_cases(dtype, partial(self.check_encode, kit))

    def test_hamming_topk(self, kit: Kit) -> None:
        """Indices equal the reference's, bit for bit."""
        self.for_cases("float32", partial(self.check_hamming_topk, kit))

    def test_sparse_attend(self, kit: Kit, dtype: str) -> None:
        """Outputs and lse are as near to float64 as a plain computation in the same dtype."""
        self.for_cases(dtype, partial(self.check_sparse_attend, kit))

    @pytest.mark.parametrize("softcap", [0.05, 1e3, 1e6])
    def test_soft_caps_of_any_size(self, kit: Kit, softcap: float) -> None:
        """Far below the logits a soft cap makes them equal, and far above it changes nothing."""
        self.check_sparse_attend(kit, replace(RICH, softcap=softcap))

    def test_hash_attend(self, kit: Kit, dtype: str) -> None:
        """Equals the three ops in sequence; writes the codes and norms of fresh keys alone."""
        self.for_cases(dtype, partial(self.check_hash_attend, kit))

    @pytest.mark.parametrize("where", ["first", "middle", "last", "spread"])
    def test_winners_in_one_stretch(self, kit: Kit, dtype: str, where: str) -> None:
        """The shares of a row are right wherever in it the selected keys gather."""
        case = replace(
            RICH, dtype=dtype, batch=1, tokens=1, slots=1_200, k=200, lengths=None, starts=None,
            norms=False, code_group=1, group=1, given_codes=True, fresh=0, sink=0, recent=0,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        first = {"first": 0, "middle": 500, "last": 1_000}.get(where)
        near = np.arange(0, 1_200, 6) if first is None else np.arange(first, first + 200)
        q_codes = np.zeros((1, case.kv_heads, 1, case.bits // 8), np.uint8)
        key_codes = rng.integers(0, 256, (1, case.kv_heads, 1_200, case.bits // 8), np.uint8)
        # At most one bit a byte differs.
        key_codes[:, :, near] = 1 << rng.integers(0, 8, key_codes[:, :, near].shape)
        self.check_hash_attend(kit, case, q_codes=q_codes, key_codes=key_codes)

    @NORMS
    def test_long_rows_of_which_all_is_taken(self, kit: Kit, norms: bool) -> None:
        """A row may have far more keys than a part of it has room to score."""
        case = replace(
            RICH, dtype="float16", batch=1, group=2, tokens=1, slots=8_192, head_dim=16,
            value_dim=16, bits=64, lengths=None, starts=None, fresh=3, norms=norms, code_group=1,
            k=64, dense_below=8_192,
        )  # fmt: skip
        self.check_hash_attend(kit, case)

    def test_encode_depends_on_the_vector_alone(self, kit: Kit, dtype: str) -> None:
        """A vector has the same code alone as in company, in any layout."""

        def check(case: Case) -> None:
            placed, _ = self.arguments(kit, case, "encode")
            codes = self.got(kit, "encode", placed)
            rng = np.random.default_rng(case.seed)
            b, h, t = (int(rng.integers(n)) for n in codes.shape[:3])
            head = h * case.kv_heads // codes.shape[1]
            values = given_values(placed)
            alone = {n: x if x is None else x[head : head + 1] for n, x in values.items()}
            alone["x"] = values["x"][b : b + 1, h : h + 1, t : t + 1]
            code = self.got(kit, "encode", self.put(kit, **alone))
            np.testing.assert_array_equal(code[0, 0, 0], codes[b, h, t])

        self.for_cases(dtype, check)

    def test_codes_in_doubt_are_the_same_everywhere(self, kit: Kit, dtype: str) -> None:
        """Where rounding alone decides the bits, they still depend on the vector alone.

        Whatever the number of vectors, their layout and the route: `encode` or fresh keys.
        """
        rng = np.random.default_rng(0)
        x = rng.standard_normal(96).astype(numpy_dtype(dtype))
        projection = rng.standard_normal((1, 96, 128)).astype(np.float32)
        # The last weight of each column makes its sum zero but for rounding.
        sums = tolerance.wide(x[:-1]) @ tolerance.wide(projection[0, :-1])
        projection[0, -1] = -sums / tolerance.wide(x[-1])
        doubtful = tolerance.doubtful_bits(x[None, None, None], projection)
        assert doubtful.mean() > 0.9, "the test is blunt"

        def same(*shape: int) -> np.ndarray:
            return np.broadcast_to(x, (*shape, 96)).copy()

        codes = []
        sizes = ((1, 1, 1), (1, 1, 7), (1, 5, 1), (2, 3, 50), (1, 1, 300))
        for size, layout in itertools.product(sizes, LAYOUTS):
            placed = {"x": kit.place(same(*size), layout), **self.put(kit, projection=projection)}
            codes.append(self.got(kit, "encode", placed).reshape(-1, 16))
        for fresh in (1, 2, 40):
            placed = self.put(
                kit, q=same(1, 1, 1), keys=same(1, 1, 40), values=same(1, 1, 40),
                key_codes=np.zeros((1, 1, 40, 16), np.uint8), projection=projection,
            )  # fmt: skip
            self.call(kit, "hash_attend", placed, k=3, fresh=fresh)
            codes.append(kit.get(placed["key_codes"].array)[0, 0, -fresh:])
        assert len(np.unique(np.concatenate(codes), axis=0)) == 1

    def test_rows_do_not_see_one_another(self, kit: Kit, dtype: str) -> None:
        """A batch row's output bits are the same whatever the other rows hold."""

        def check(case: Case) -> None:
            plain = {"fresh": 0, "scale": None, "softcap": None, "layouts": ("dense",)}
            case = replace(case, given_codes=False, **plain)
            values = make_values(case)
            rng = np.random.default_rng(case.seed)
            row = int(rng.integers(case.batch))
            others = np.arange(case.batch) != row

            def output() -> bytes:
                placed, options = self.arguments(kit, case, "hash_attend", **values)
                return self.got(kit, "hash_attend", placed, **options)[row].tobytes()

            before = output()
            for name in ("q", "keys", "values"):
                values[name][others] = np.nan
            values["key_codes"][others] ^= 0x5A
            if values["lengths"] is not None and values["lengths"].ndim:
                values["lengths"][others] = rng.integers(0, case.slots + 1)
            assert output() == before

        self.for_cases(dtype, check)

    @pytest.mark.parametrize("ratio", [2**-20, 0.1, 1 / 3, 0.5, 1.0])
    def test_budget_is_exact(self, kit: Kit, ratio: float) -> None:
        """The budget of a ratio is counted in integers; a float would be one off here and there."""
        lengths = np.arange(61, dtype=np.int64)
        case = replace(RICH, batch=len(lengths), slots=60, tokens=1, lengths=None, starts=None)
        for k, k_min, sink, recent in ((60, 0, 0, 0), (30, 0, 1, 2), (12, 5, 0, 0), (9, 20, 0, 0)):
            case = replace(case, k=k, k_min=k_min, sink=sink, recent=recent, ratio=ratio)
            placed, options = self.arguments(kit, case, "hamming_topk", lengths=lengths)
            indices = self.got(kit, "hamming_topk", placed, **options)
            taken = (indices >= 0).sum(axis=-1)[:, 0, 0]
            for n, got in zip(lengths.tolist(), taken.tolist(), strict=True):
                share = (n * round(ratio * 2**32)) >> 32
                assert got == min(n, k, max(1, k_min, sink + recent, share))

    # In parts, so that several processes can share what compiles a kernel for each configuration.
    @pytest.mark.parametrize("part", range(CONFIG_PARTS))
    @pytest.mark.parametrize("op", OPS)
    def test_every_configuration_is_right(self, kit: Kit, op: str, part: int) -> None:
        """The default is among the allowed values; each allowed value gives right results."""
        problem = self.problem_of(kit, RICH, op)
        knobs = self.loaded.tunables(op, problem)
        default = dict(self.loaded.default(problem))
        assert set(default) == set(knobs)
        assert all(default[name] in allowed for name, allowed in knobs.items())
        configs = [default]
        for knob, values in knobs.items():
            configs += [{**default, knob: value} for value in values if value != default[knob]]
        for config in configs[part::CONFIG_PARTS]:
            with use_config(self.backend, op, config):
                getattr(self, "check_" + op)(kit, RICH)

    @pytest.mark.parametrize("op", OPS)
    def test_jax_arrays(self, op: str, dtype: str) -> None:
        """JAX arrays go in, JAX arrays with NumPy's results come out."""
        jax = JAXKit(self.device)
        reason = jax.missing(dtype)
        if self.device != "cpu" or not {"numpy", "jax"} & self.loaded.frameworks:
            reason = "only tested through NumPy, on the CPU"
        if reason:
            pytest.skip(reason)
        case = replace(RICH, dtype=dtype, fresh=0)
        results = []
        for kit in (NumPyKit(), jax):
            arrays, options = self.arguments(kit, case, op)
            result = as_tuple(self.call(kit, op, arrays, **options))
            assert all(map(kit.is_same_kind, result))
            results.append([kit.get(array) for array in result])
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("op", OPS)
    def test_prepare_runs_nothing(self, kit: Kit, op: str) -> None:
        """`prepare` returns nothing and writes nothing, not even fresh codes."""
        arrays, options = self.arguments(kit, RICH, op)
        before = {name: kit.get(p.memory).tobytes() for name, p in arrays.items() if p}
        assert hata.prepare(op, **arrays_of(arrays), **options) is None
        assert before == {n: kit.get(p.memory).tobytes() for n, p in arrays.items() if p}

    @NORMS
    def test_hash_attend_without_a_projection(self, kit: Kit, dtype: str, norms: bool) -> None:
        """Where nothing is encoded the projection may be left out, which changes no bit."""
        case = replace(
            RICH, dtype=dtype, given_codes=True, code_group=3, fresh=0, bias=False, norms=norms,
            dense_below=70, sinks=True,
        )  # fmt: skip
        placed, options = self.arguments(kit, case, "hash_attend")
        options["return_lse"] = True
        expected = self.got(kit, "hash_attend", placed, **options)
        placed["projection"] = None
        assert hata.prepare("hash_attend", **arrays_of(placed), **options) is None
        got = self.got(kit, "hash_attend", placed, **options)
        assert [x.tobytes() for x in got] == [x.tobytes() for x in expected]

    # What is held against one case. `given` replaces values of the case.

    def check_encode(self, kit: Kit, case: Case, **given: np.ndarray) -> None:
        """Codes and norms are the reference's, and are written nowhere else."""
        placed, _ = self.arguments(kit, case, "encode", **given)
        norms = np.zeros(placed["x"].values.shape[:3], np.float16)
        values = given_values(placed)
        expected = reference().encode(**values, norms=norms)
        codes = self.call(kit, "encode", placed)
        assert kit.is_same_kind(codes)
        doubtful = partial(tolerance.doubtful_bits, **values)
        hold(tolerance.codes_fault(kit.get(codes), expected, doubtful))

        if not case.norms:
            return
        # What is written must not overlap.
        layouts = [name for name in case.layouts if name != "expanded"] or ["dense"]
        out = kit.place(np.full(expected.shape, 0x7F, np.uint8), layouts[0])
        lengths = kit.place(np.full(norms.shape, np.nan, np.float16), layouts[-1])
        before = kit.get(out.memory).copy(), kit.get(lengths.memory).copy()
        returned = self.call(kit, "encode", {**placed, "out": out, "norms": lengths})
        assert returned is out.array
        written = kit.get(lengths.array)
        hold(tolerance.norms_fault(written, norms))
        for array, old, new in ((out, before[0], kit.get(codes)), (lengths, before[1], written)):
            np.testing.assert_array_equal(kit.get(array.memory), array.buffer_after(old, new))

    def check_hamming_topk(self, kit: Kit, case: Case, **given: np.ndarray) -> None:
        """Indices are the reference's."""
        placed, options = self.arguments(kit, case, "hamming_topk", **given)
        indices = self.call(kit, "hamming_topk", placed, **options)
        assert kit.is_same_kind(indices)
        expected = reference().hamming_topk(**given_values(placed), **options)
        hold(tolerance.selection_fault(kit.get(indices), expected))

    def check_sparse_attend(self, kit: Kit, case: Case, **given: np.ndarray) -> None:
        """Output and lse are right for the given indices."""
        placed, options = self.arguments(kit, case, "sparse_attend", **given)
        result = self.call(kit, "sparse_attend", placed, **options, return_lse=True)
        self.check_attention(kit, result, placed, placed["indices"].values, case)
        alone = self.got(kit, "sparse_attend", placed, **options)
        assert alone.tobytes() == kit.get(result[0]).tobytes()

    def check_hash_attend(self, kit: Kit, case: Case, **given: np.ndarray) -> None:
        """`hash_attend` equals the backend's own three ops."""
        placed, options = self.arguments(kit, case, "hash_attend", **given)
        codes = {name: placed[name] for name in ("key_codes", "key_norms") if placed[name]}
        before = {name: kit.get(p.memory).copy() for name, p in codes.items()}
        result = self.call(kit, "hash_attend", placed, **options, return_lse=True)
        if case.fresh:
            for name, new in self.codes_after(kit, case, placed).items():
                p = codes[name]
                expected = p.buffer_after(before[name], new)
                np.testing.assert_array_equal(kit.get(p.memory), expected, err_msg=name)
                codes[name] = kit.place(new)
        indices = self.selected(kit, case, {**placed, **codes})
        self.check_attention(kit, result, placed, indices, case)

    def codes_after(self, kit: Kit, case: Case, placed: Arrays) -> dict[str, Any]:
        """Key codes, and norms if there are some, once those of fresh keys are written."""
        names = ("key_codes", "key_norms")
        new = {name: placed[name].values.copy() for name in names if placed[name]}
        given = {"x": placed["keys"], **{name: placed[name] for name in ("projection", "bias")}}
        if "key_norms" in new:
            given["norms"] = kit.place(np.zeros_like(new["key_norms"]))
        made = {"key_codes": self.got(kit, "encode", given)}
        if "key_norms" in new:
            made["key_norms"] = kit.get(given["norms"].array)
        first, last = visible(case)
        for b in range(case.batch):
            # The last query sees all that any query of the row sees.
            fresh = np.s_[b, :, max(first[b, -1], last[b, -1] - case.fresh) : last[b, -1]]
            for name, values in new.items():
                values[fresh] = made[name][fresh]
        return new

    def selected(self, kit: Kit, case: Case, placed: Arrays) -> np.ndarray:
        """What `hash_attend` must attend to, `[B, Hkv, T, max(k, S)]`, by the ops one by one."""
        q_codes = placed.get("q_codes")
        if q_codes is None:
            given = {
                "x": placed["q"],
                "projection": placed["query_projection"] or placed["projection"],
                "bias": placed["query_bias"] or placed["bias"],
            }
            q_codes = kit.place(self.got(kit, "encode", given))
        given = {name: placed.get(name) for name in ("lengths", "starts", "key_norms")}
        given |= {"q_codes": q_codes, "k_codes": placed["key_codes"]}
        options = case.options("hamming_topk") | {"per_head": False}
        chosen = self.got(kit, "hamming_topk", given, **options)
        most = max(case.k, case.slots)
        indices = np.full((case.batch, case.kv_heads, case.tokens, most), -1, np.int32)
        indices[..., : case.k] = chosen
        first, last = visible(case)
        for b, t in np.ndindex(case.batch, case.tokens):
            seen = int(last[b, t] - first[b, t])
            if seen <= case.dense_below:
                indices[b, :, t] = -1
                indices[b, :, t, :seen] = first[b, t] + np.arange(seen)
        return indices

    def arguments(
        self, kit: Kit, case: Case, op: str, **given: np.ndarray
    ) -> tuple[Arrays, dict[str, Any]]:
        """The arrays, in place, and the other arguments of an op for a case."""
        values = make_values(case, CALLS[op]._fields)
        if op == "hash_attend" and not case.given_codes:
            del values["q_codes"]
        placed, options = place(kit, case, op, values | given), case.options(op)
        for name in CALLS[op](**placed, **options).written():
            # What is written must not overlap.
            if placed.get(name) is not None:
                placed[name] = kit.place(placed[name].values)
        return placed, options

    def result(
        self, kit: Kit, case: Case, op: str, given: dict[str, np.ndarray] | None = None, **more: Any
    ) -> Any:
        """What an op gives for a case, as NumPy arrays; `more` replaces options."""
        arrays, options = self.arguments(kit, case, op, **(given or {}))
        return self.got(kit, op, arrays, **{**options, **more})

    def problem_of(self, kit: Kit, case: Case, op: str) -> Problem:
        """The problem that a case's call of an op is looked up by."""
        arrays, options = self.arguments(kit, case, op)
        return checks.check(CALLS[op](**arrays_of(arrays), **options)).problem
