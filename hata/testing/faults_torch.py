"""Faults of torch: devices, gradients, fake tensors, graphs, compilation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hata
from hata.call import CALLS
from hata.errors import HataAutogradError, HataDeviceError, HataDTypeError, HataShapeError
from hata.measure.arrays import TorchKit
from hata.problem import OPS
from hata.testing.faults_values import SMALL
from hata.testing.harness import arrays_of, as_tuple
from hata.testing.properties import NORMS, Properties
from hata.testing.strategies import Case

# The arguments of the custom ops, in their order. Arrays first, then the rest with its defaults.
SCHEMAS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    op: (
        kind._fields[: kind.ARRAYS if op != "encode" else 3],
        {n: kind._field_defaults[n] for n in kind._fields[kind.ARRAYS : -2] if n != "return_lse"},
    )
    for op, kind in CALLS.items()
}

# What an op refuses, whatever kind of tensors it is given.
UNUSUAL: dict[str, list[tuple[type[Exception], str, dict[str, Any]]]] = {
    "encode": [(HataDTypeError, "projection: got", {"projection": None})],
    "hamming_topk": [
        (HataShapeError, "k must be", {"k": 0}),
        (HataDTypeError, "k: got 2.5", {"k": 2.5}),
        (HataDTypeError, "per_head: got", {"per_head": "yes"}),
    ],
    "sparse_attend": [
        (HataShapeError, "softcap: got", {"softcap": -1.0}),
        (HataDTypeError, "scale: got", {"scale": "1"}),
        (HataDTypeError, "return_lse: got", {"return_lse": 1}),
    ],
    "hash_attend": [
        (HataShapeError, "at most k", {"sink": 4, "recent": 4}),
        (HataShapeError, "fresh", {"fresh": -1}),
        (HataDTypeError, "keys: got", {"keys": np.zeros((2, 2, 40, 32), np.float32)}),
    ],
}


Tensors = dict[str, Any]


def _compiled(tensors: Tensors, options: dict[str, Any]) -> Any:
    """`hash_attend` of some tensors, compiled."""
    import torch

    def step() -> Any:
        return hata.hash_attend(**tensors, **options)

    return torch.compile(step, backend="aot_eager", fullgraph=True)


@functools.cache
def _subclass() -> type:
    """A kind of tensor that is a tensor all the same."""
    import torch

    return type("Named", (torch.Tensor,), {})


def _on_meta(tensors: Tensors) -> Tensors:
    return {name: None if x is None else x.to("meta") for name, x in tensors.items()}


def _faked(op: str, tensors: Tensors, options: dict[str, Any]) -> Any:
    """What an op gives for fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = {name: None if x is None else mode.from_tensor(x) for name, x in tensors.items()}
        return getattr(hata, op)(**fake, **options)


class TorchFaults(Properties):
    """Rows that only torch has."""

    @pytest.fixture
    def torch_kit(self) -> TorchKit:
        """A torch kit, where the backend takes torch tensors."""
        if "torch" not in self.loaded.frameworks:
            pytest.skip("the backend takes no torch tensors")
        pytest.importorskip("torch", reason="torch is not installed")
        return TorchKit(self.device)

    @pytest.fixture
    def gpu_kit(self, torch_kit: TorchKit) -> TorchKit:
        """A torch kit of a GPU."""
        if self.device == "cpu":
            pytest.skip("a CPU captures no graphs and is never waited for")
        return torch_kit

    def tensors(self, kit: TorchKit, case: Case, op: str) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and options of an op."""
        placed, options = self.arguments(kit, case, op)
        return arrays_of(placed), options

    def each(self, kit: TorchKit, case: Case = SMALL) -> Iterator[tuple[str, Tensors, Any]]:
        """Every op, with tensors and options."""
        for op in OPS:
            yield op, *self.tensors(kit, case, op)

    def op_arguments(self, op: str, tensors: Tensors, options: dict[str, Any]) -> tuple[Any, ...]:
        """What a custom op is called with."""
        names, defaults = SCHEMAS[op]
        rest = (options.get(name, default) for name, default in defaults.items())
        return (*(tensors.get(name) for name in names), *rest)

    def test_fault_37_two_devices(self, torch_kit: TorchKit) -> None:
        for op, tensors, options in self.each(torch_kit):
            for name, tensor in list(tensors.items())[1:]:
                if tensor is None:
                    continue
                for other in {"meta", "cpu"} - {self.device}:
                    match, moved = f"{name}: .*{other}.*{self.device}", {name: tensor.to(other)}
                    self.refused(op, HataDeviceError, match, tensors, options, moved)

    @pytest.mark.parametrize("length_dtype", ["int32", "int64"])
    def test_one_length_may_have_any_stride(self, torch_kit: TorchKit, length_dtype: str) -> None:
        case = replace(SMALL, batch=1, lengths=(5,), lengths_dtype=length_dtype)
        for op in ("hamming_topk", "hash_attend"):
            tensors, options = self.tensors(torch_kit, case, op)
            expected = self.run(op, **tensors, **options)
            tensors["lengths"] = tensors["lengths"].repeat(3)[::3]
            assert tensors["lengths"].stride() == (3,)
            assert torch_kit.lib.equal(self.run(op, **tensors, **options), expected)

    def test_fault_42_gradients(self, torch_kit: TorchKit) -> None:
        torch = torch_kit.lib
        for op in ("encode", "sparse_attend", "hash_attend"):
            tensors, options = self.tensors(torch_kit, SMALL, op)
            expected = self.run(op, **tensors, **options)
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                wanted = {**tensors, name: torch.nn.Parameter(tensor)}
                self.refused(op, HataAutogradError, f"{name}: .*no_grad", wanted, options)
                for mode in (torch.no_grad, torch.inference_mode):
                    with mode():
                        got = self.run(op, **wanted, **options)
                    assert torch.equal(got, expected)

    def test_fault_43_meta_and_fake_tensors(self, torch_kit: TorchKit) -> None:
        case = replace(SMALL, value_dim=48, tokens=2, norms=True)
        for op, tensors, options in self.each(torch_kit, case):
            if op.endswith("attend"):
                options["return_lse"] = True
            expected = self.run(op, **tensors, **options)
            on_meta = getattr(hata, op)(**_on_meta(tensors), **options)
            for result in (_faked(op, tensors, options), on_meta):
                for got, right in zip(as_tuple(result), as_tuple(expected), strict=True):
                    assert got.shape == right.shape
                    assert got.dtype == right.dtype
                    assert got.stride() == right.stride()

    def test_subclasses_of_tensors(self, torch_kit: TorchKit) -> None:
        """A subclass that is a tensor all the same gives what a tensor gives."""
        torch = torch_kit.lib
        for op, tensors, options in self.each(torch_kit):
            expected = self.run(op, **tensors, **options)
            for name, tensor in tensors.items():
                if tensor is not None:
                    named = {**tensors, name: tensor.as_subclass(_subclass())}
                    got = self.run(op, **named, **options)
                    assert type(got) is torch.Tensor
                    assert torch.equal(got, expected)

    @pytest.mark.parametrize("kind", ["subclass", "meta"])
    def test_faults_of_unusual_tensors(self, torch_kit: TorchKit, kind: str) -> None:
        """Subclasses, and tensors without data, are refused what tensors are."""
        for op, wrongs in UNUSUAL.items():
            tensors, options = self.tensors(torch_kit, SMALL, op)
            first = next(iter(tensors))
            if kind == "meta":
                tensors = _on_meta(tensors)
            else:
                tensors[first] = tensors[first].as_subclass(_subclass())
            lead: Any = tensors[first]
            told = [*wrongs, (HataShapeError, f"{first}: .*4 dimensions", {first: lead[0]})]
            if lead.is_floating_point():
                wanted = {first: lead.detach().requires_grad_()}
                told.append((HataAutogradError, f"{first}: .*no_grad", wanted))
            for error, match, wrong in told:
                self.refused(op, error, match, tensors, options, wrong)
            hata.prepare(op, **tensors, **options)

    def test_tensors_without_strides(self, torch_kit: TorchKit) -> None:
        """Sparse, conjugated and vmapped tensors are refused by name."""
        torch = torch_kit.lib
        tensors, options = self.tensors(torch_kit, SMALL, "sparse_attend")
        for name in ("q", "keys"):
            # A negated view is the same memory; shape and strides say nothing of its sign.
            negated = torch.ops.aten._neg_view(tensors[name])
            for wrong, fix in ((tensors[name].to_sparse(), "strides"), (negated, "resolve_neg")):
                match, given = f"{name}: .*{fix}", {**tensors, name: wrong}
                self.refused("sparse_attend", HataDTypeError, match, given, options)
        with pytest.raises(HataDTypeError, match=r"q: .*memory"):
            torch.vmap(lambda q: hata.sparse_attend(**{**tensors, "q": q}, **options))(
                tensors["q"][None]
            )

    def captured(self, op: str, tensors: Tensors, options: dict[str, Any]) -> Any:
        """A graph of one prepared call, and what the call returned."""
        import torch

        hata.prepare(op, **tensors, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = getattr(hata, op)(**tensors, **options)
        return graph, result

    @pytest.mark.parametrize("op", ["hamming_topk", "hash_attend"])
    @NORMS
    def test_fault_44_graph_capture(self, gpu_kit: TorchKit, op: str, norms: bool) -> None:
        torch = gpu_kit.lib
        case = replace(
            SMALL, slots=500, k=50, lengths=(100, 7), starts=(0, 3), fresh=1, norms=norms,
            dense_below=60,
        )  # fmt: skip
        tensors, options = self.tensors(gpu_kit, case, op)
        graph, out = self.captured(op, tensors, options)
        # Fewer keys than the budget, than dense_below, many, none: one graph for all of them.
        for lengths in ((100, 7), (101, 8), (55, 62), (500, 250), (0, 500)):
            tensors["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            assert torch.equal(out.clone(), getattr(hata, op)(**tensors, **options))

    @pytest.mark.parametrize("op", ["encode", "sparse_attend"])
    def test_fault_44_graph_capture_of_the_others(self, gpu_kit: TorchKit, op: str) -> None:
        torch = gpu_kit.lib
        tensors, options = self.tensors(gpu_kit, replace(SMALL, slots=500, k=50), op)
        graph, out = self.captured(op, tensors, options)
        first = next(iter(tensors.values()))
        for factor in (1, -1, 3):
            first.mul_(factor)
            graph.replay()
            assert torch.equal(out, getattr(hata, op)(**tensors, **options))

    def test_fault_44_prepared_query_codes(self, gpu_kit: TorchKit) -> None:
        """Query codes of other head counts than q's are scored by kernels of their own."""
        torch = gpu_kit.lib
        for group in (1, 3, 8):
            case = replace(SMALL, slots=90, given_codes=True, code_group=group, fresh=2)
            tensors, options = self.tensors(gpu_kit, case, "hash_attend")
            without = {**tensors, "projection": None}, {**options, "fresh": 0}
            for given, numbers in ((tensors, options), without):
                graph, out = self.captured("hash_attend", given, numbers)
                graph.replay()
                assert torch.equal(out, hata.hash_attend(**given, **numbers))

    def test_fault_44_nothing_waits_for_the_gpu(self, gpu_kit: TorchKit) -> None:
        torch = gpu_kit.lib
        case = replace(SMALL, lengths=(40, 9), starts=(0, 3), fresh=1, norms=True, ratio=0.5)
        calls = list(self.each(gpu_kit, case))
        for op, tensors, options in calls:
            self.run(op, **tensors, **options)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # torch says that it may not see every wait.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
            try:
                for op, tensors, options in calls:
                    getattr(hata, op)(**tensors, **options)
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def test_fault_17_hundred_replays(self, gpu_kit: TorchKit) -> None:
        """Bits do not depend on the run, the replay, or what the graph was replayed with before."""
        torch = gpu_kit.lib
        case = replace(SMALL, slots=3000, k=200, flavour="few", lengths=(3000, 40), norms=True)
        for op in ("hamming_topk", "hash_attend"):
            tensors, options = self.tensors(gpu_kit, case, op)
            graph, out = self.captured(op, tensors, options)
            found: dict[tuple[int, int], Any] = {}
            for turn in range(100):
                lengths = ((3000, 40), (1999, 3000), (201, 199))[turn % 3]
                tensors["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
                graph.replay()
                if lengths not in found:
                    found[lengths] = out.clone()
                    for _ in range(3):
                        assert torch.equal(out, getattr(hata, op)(**tensors, **options))
                assert torch.equal(out, found[lengths])

    @pytest.mark.parametrize("fresh", [0, 2])
    def test_fault_45_compiled(self, torch_kit: TorchKit, fresh: int) -> None:
        import torch
        from torch._dynamo.testing import CompileCounterWithBackend

        def step(*arrays: Any) -> Any:
            q, keys, values, key_codes, projection = arrays
            out, lse = hata.hash_attend(*arrays, k=6, fresh=fresh, return_lse=True)
            codes = hata.encode(q, projection)
            indices = hata.hamming_topk(codes, key_codes, 6)
            return out + hata.sparse_attend(q, keys, values, indices), lse

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=None)
        for slots in (40, 41, 55, 64, 130):
            case = replace(SMALL, slots=slots)
            results = []
            for function in (step, compiled):
                tensors, _ = self.tensors(torch_kit, case, "hash_attend")
                given = [tensors[name] for name in CALLS["hash_attend"]._fields[:5]]
                results.append([*function(*given), tensors["key_codes"]])
            assert all(map(torch.equal, *results))
        assert counter.frame_count <= 2
        torch._dynamo.reset()

    @pytest.mark.parametrize("op", [*OPS, "encode_", "hash_attend_"])
    def test_fault_45_opcheck(self, torch_kit: TorchKit, op: str) -> None:
        torch = torch_kit.lib
        import hata.torch_ops  # noqa: F401  registers the custom ops

        case = replace(SMALL, norms=True, bias=True, sinks=True, lengths=(40, 9), fresh=3)
        tensors, options = self.tensors(torch_kit, case, op.rstrip("_"))
        arguments = [*self.op_arguments(op.rstrip("_"), tensors, options)]
        if op == "encode_":
            shape = tensors["x"].shape[:3]
            out, norms = np.zeros((*shape, 8), np.uint8), np.zeros(shape, np.float16)
            arguments += [torch_kit.put(out), torch_kit.put(norms)]
        if op == "hash_attend":
            arguments[-1] = 0
        torch.library.opcheck(getattr(torch.ops.hata, op), tuple(arguments))

    def test_without_a_projection(self, torch_kit: TorchKit) -> None:
        """Compiled, fake and meta tensors leave it out as others do."""
        torch = torch_kit.lib
        # It registers the custom ops.
        import hata.torch_ops

        case = replace(SMALL, given_codes=True, norms=True)
        tensors, options = self.tensors(torch_kit, case, "hash_attend")
        expected = self.run("hash_attend", **tensors, **options)
        tensors["projection"] = None
        assert torch.equal(_compiled(tensors, options)(), expected)
        torch._dynamo.reset()
        on_meta = hata.hash_attend(**_on_meta(tensors), **options)
        for got in (_faked("hash_attend", tensors, options), on_meta):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        arguments = self.op_arguments("hash_attend", tensors, options)
        torch.library.opcheck(torch.ops.hata.hash_attend, arguments)

    def test_compiled_without_a_gradient(self, torch_kit: TorchKit) -> None:
        """Weights that ask for a gradient do no harm in a compiled step under no_grad."""
        torch = torch_kit.lib
        tensors, options = self.tensors(torch_kit, SMALL, "hash_attend")
        expected = self.run("hash_attend", **tensors, **options)
        tensors["projection"] = torch.nn.Parameter(tensors["projection"])
        with torch.no_grad():
            assert torch.equal(_compiled(tensors, options)(), expected)
        torch._dynamo.reset()

    def test_default_dtype_and_device_do_not_matter(self, torch_kit: TorchKit) -> None:
        """What the process sets as torch's defaults changes no output."""
        torch = torch_kit.lib
        tensors, options = self.tensors(torch_kit, SMALL, "hash_attend")
        expected = self.run("hash_attend", **tensors, **options, return_lse=True)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                got = hata.hash_attend(**tensors, **options, return_lse=True)
        finally:
            torch.set_default_dtype(torch.float32)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(torch_kit.get(ours), torch_kit.get(theirs))
