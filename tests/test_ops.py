"""The ops as such: their documentation, their checks, and what is remembered of a call."""

import contextlib
import doctest
import inspect
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import hata
from hata import arguments, arrays, dispatch, ops, registry
from hata.testing.faults_torch import SCHEMAS

OPS = ("encode", "hamming_topk", "sparse_attend", "hash_attend")


def call(op="hash_attend", kind=np.asarray, **changes):
    """A small call of an op, with some of its arguments changed."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 1, 16), np.float32)
    cache = rng.standard_normal((1, 1, 8, 16), np.float32)
    projection = rng.standard_normal((1, 16, 32), np.float32)
    codes = rng.integers(0, 256, (1, 1, 8, 4), np.uint8)
    given = {
        "encode": {"x": q, "projection": projection},
        "hamming_topk": {"q_codes": codes[:, :, :1], "k_codes": codes, "k": 3},
        "sparse_attend": {
            "q": q, "keys": cache, "values": cache, "indices": np.int32([[[[0, 5, -1]]]])
        },
        "hash_attend": {
            "q": q, "keys": cache, "values": cache, "key_codes": codes, "projection": projection,
            "k": 3,
        },
    }[op]  # fmt: skip
    given = {name: kind(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    return getattr(hata, op)(**{**given, **changes})


# Documentation.


def test_examples_in_the_docstrings():
    finder = doctest.DocTestFinder(exclude_empty=False)
    runner = doctest.DocTestRunner()
    names = []
    for test in finder.find(ops, "hata.ops", globs={**vars(ops), "numpy": np}):
        runner.run(test)
        names += [test.name] if test.examples else []
    assert names == sorted(f"hata.ops.{op}" for op in (*OPS, "prepare"))
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("op", OPS)
def test_every_argument_is_documented(op):
    function = getattr(ops, op)
    documented = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in documented
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert f"\n{section}" in documented


def test_signatures_are_those_of_the_contract():
    positional = {
        "encode": "x projection bias",
        "hamming_topk": "q_codes k_codes k",
        "sparse_attend": "q keys values indices",
        "hash_attend": "q keys values key_codes projection k",
    }
    keywords = {
        "encode": "out norms",
        "hamming_topk": "lengths starts ratio k_min sink recent key_norms per_head",
        "sparse_attend": "scale softcap sink_logits return_lse",
        "hash_attend": "bias query_projection query_bias q_codes fresh dense_below lengths starts "
        "ratio k_min sink recent key_norms scale softcap sink_logits return_lse",
    }
    for op in OPS:
        parameters = inspect.signature(getattr(hata, op)).parameters.values()
        kinds = {"POSITIONAL_OR_KEYWORD": [], "KEYWORD_ONLY": []}
        for parameter in parameters:
            kinds[parameter.kind.name].append(parameter.name)
        assert " ".join(kinds["POSITIONAL_OR_KEYWORD"]) == positional[op]
        assert " ".join(kinds["KEYWORD_ONLY"]) == keywords[op]


def test_custom_ops_take_what_the_ops_take():
    torch = pytest.importorskip("torch")
    import hata.torch_ops  # noqa: F401  registers them

    for op, (names, options) in SCHEMAS.items():
        schema = getattr(torch.ops.hata, op).default._schema
        assert [argument.name for argument in schema.arguments] == [*names, *options]


# prepare


def test_prepare_knows_the_ops_alone():
    for wrong in ("attend", "prepare", "__import__", None, 3):
        with pytest.raises(ValueError, match=r"op: got .* expected one of 'encode'"):
            hata.prepare(wrong)


def test_prepare_checks_as_the_op_does():
    with pytest.raises(hata.HataDTypeError, match=r"^x: got"):
        hata.prepare("encode", [1.0], None)
    with pytest.raises(hata.HataShapeError, match="k must be"):
        hata.prepare("hamming_topk", np.zeros((1, 1, 1, 4), "u1"), np.zeros((1, 1, 2, 4), "u1"), 0)
    # A failure leaves no trace: the next call runs.
    assert call().shape == (1, 2, 1, 16)


# A projection that is left out.


def codes_given(kind=np.asarray, **changes):
    """A call of `hash_attend` that encodes nothing."""
    codes = np.random.default_rng(1).integers(0, 256, (1, 3, 1, 4), np.uint8)
    return call(kind=kind, **{"q_codes": kind(codes), **changes})


def test_projection_left_out_of_jax_calls(jax):
    kind = jax.numpy.asarray
    got = codes_given(kind, projection=None)
    assert isinstance(got, jax.Array)
    np.testing.assert_array_equal(got, codes_given())
    with pytest.raises(hata.HataDTypeError, match="projection: got None"):
        codes_given(kind, projection=None, q_codes=None)


def test_projection_left_out_is_no_other_call():
    """Neither is what passed without one taken for a call that needs one."""
    for _ in range(2):
        np.testing.assert_array_equal(codes_given(projection=None), codes_given())
        for match, wrong in (
            ("^projection: got None.*q_codes", {"q_codes": None}),
            ("^projection: got None.*fresh=0", {"fresh": 1}),
            ("^bias: got an array", {"bias": np.zeros((1, 32), np.float32)}),
        ):
            with pytest.raises(hata.HataDTypeError, match=match):
                codes_given(projection=None, **wrong)


def test_projection_left_out_of_a_fake_call_is_checked():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:

        def fake(array):
            return mode.from_tensor(torch.tensor(array))

        assert codes_given(fake, projection=None).shape == (1, 2, 1, 16)
        with pytest.raises(hata.HataDTypeError, match="projection: got None"):
            codes_given(fake, projection=None, q_codes=None)


# What is remembered of a call must not let through what the full check refuses.


def test_masked_arrays_are_refused_after_plain_ones():
    call()
    for name in ("q", "keys"):
        wrong = np.ma.masked_array(np.zeros((1, 2 if name == "q" else 1, 1, 16), np.float32))
        with pytest.raises(hata.HataDTypeError, match=f"{name}: a masked array"):
            call(**{name: wrong})


def test_memory_mapped_arrays_are_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "keys", np.float32, "w+", shape=(1, 1, 8, 16))
    mapped[:] = np.random.default_rng(0).standard_normal(mapped.shape)
    expected = call(keys=np.array(mapped), values=np.array(mapped))
    np.testing.assert_array_equal(call(keys=mapped, values=mapped), expected)
    # A subclass goes in, a plain array comes out.
    assert type(call("encode", x=mapped)) is np.ndarray


def test_scalars_are_no_lengths_after_arrays():
    call(lengths=np.array(3))
    with pytest.raises(hata.HataDTypeError, match=r"^lengths: got numpy.int64"):
        call(lengths=np.int64(3))


def test_read_only_codes_are_refused_after_writable_ones():
    codes = np.zeros((1, 1, 8, 4), np.uint8)
    call(key_codes=codes, fresh=1)
    codes.flags.writeable = False
    with pytest.raises(hata.HataDTypeError, match="read-only"):
        call(key_codes=codes, fresh=1)
    call(key_codes=codes)


def test_negated_tensors_are_refused_after_plain_ones():
    torch = pytest.importorskip("torch")
    call(kind=torch.tensor)
    cache = torch.zeros(1, 1, 8, 16)
    for name in ("keys", "values"):
        with pytest.raises(hata.HataDTypeError, match=f"{name}: .*resolve_neg"):
            call(kind=torch.tensor, **{name: torch.ops.aten._neg_view(cache)})


@pytest.mark.parametrize("name", ["x", "out"])
def test_tensors_without_memory_are_refused_after_plain_ones(name):
    torch = pytest.importorskip("torch")
    tensors = {"x": torch.zeros(1, 2, 1, 16), "out": torch.zeros(1, 2, 1, 4, dtype=torch.uint8)}
    call("encode", kind=torch.tensor, **tensors)
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(hata.HataDTypeError, match=f"{name}: .*no memory"):
        call("encode", kind=torch.tensor, **tensors)


def test_functional_tensors_are_refused_after_plain_ones():
    torch = pytest.importorskip("torch")
    x, projection = torch.zeros(1, 2, 1, 16), torch.zeros(1, 16, 32)
    hata.encode(x, projection)
    with pytest.raises(hata.HataDTypeError, match=r"x: .*no memory"):
        torch.func.functionalize(lambda x: hata.encode(x, projection))(x)


def test_real_tensors_in_a_fake_mode():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, projection = torch.zeros(1, 2, 1, 16), torch.zeros(1, 16, 32)
    hata.encode(x, projection)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(hata.encode(x, projection)) is not torch.Tensor
    # torch's own refusal
    with FakeTensorMode(), pytest.raises(AssertionError, match="FakeTensors"):
        hata.encode(x, projection)


@pytest.mark.parametrize(
    ("op", "error", "match", "change"),
    [
        ("encode", hata.HataShapeError, "x: .*4 dimensions", {"x": (16,)}),
        ("encode", hata.HataShapeError, "projection: .*head size", {"projection": (1, 32, 32)}),
        ("hamming_topk", hata.HataDTypeError, "q_codes: got float32", {"q_codes": (1, 1, 1, 4)}),
        ("hamming_topk", hata.HataShapeError, "k must be", {"k": 0}),
        ("sparse_attend", hata.HataShapeError, "softcap: got", {"softcap": -1.0}),
        ("sparse_attend", hata.HataShapeError, "values: got", {"values": (1, 1, 7, 16)}),
        ("hash_attend", hata.HataShapeError, "at most k", {"sink": 4}),
        ("hash_attend", hata.HataShapeError, "keys: got", {"keys": (1, 1, 7, 32), "fresh": 1}),
    ],
)
def test_fakes_are_checked(op, error, match, change):
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:

        def fake(array):
            return mode.from_tensor(torch.tensor(array))

        wrong = {
            name: fake(np.zeros(x, np.float32)) if isinstance(x, tuple) else x
            for name, x in change.items()
        }
        call(op, kind=fake)
        with pytest.raises(error, match=match):
            call(op, kind=fake, **wrong)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_custom_op_that_writes_nothing_refuses_fresh_keys(device):
    torch = pytest.importorskip("torch")
    # It registers the ops.
    import hata.torch_ops

    q, keys = torch.zeros(1, 2, 1, 16, device=device), torch.zeros(1, 1, 8, 16, device=device)
    codes = torch.full((1, 1, 8, 4), 7, dtype=torch.uint8, device=device)
    arrays = [q, keys, keys, codes, keys.new_zeros(1, 16, 32), *[None] * 8]
    options = [*SCHEMAS["hash_attend"][1].values()]
    options[0], options[-1] = 3, 1
    with pytest.raises(hata.HataShapeError, match=r"fresh: got 1, expected 0.*hash_attend_"):
        torch.ops.hata.hash_attend(*arrays, *options)
    if device == "cpu":
        assert (codes == 7).all()


@pytest.mark.parametrize("name", ["fresh", "dense_below", "return_lse", "per_head"])
def test_flags_and_counts_are_checked_in_compiled_code(name):
    torch = pytest.importorskip("torch")
    q, keys, projection = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 8, 16), torch.zeros(1, 16, 32)
    codes = torch.zeros(1, 1, 8, 4, dtype=torch.uint8)
    wrong = {name: 1 if name in ("return_lse", "per_head") else True}

    @torch.compile(backend="eager")
    def step():
        if name == "per_head":
            return hata.hamming_topk(codes, codes, 3, **wrong)
        return hata.hash_attend(q, keys, keys, codes, projection, 3, **wrong)

    with pytest.raises(hata.HataDTypeError, match=f"{name}: got"):
        step()
    torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
def test_compiled_code_never_looks_at_the_modules_of_the_process(op):
    """There are more of them at each import, and an import may come while Dynamo looks."""
    torch = pytest.importorskip("torch")
    seen = []

    def note(guards):
        seen.extend(guard.name for guard in guards)
        return [True] * len(guards)

    tensors = []

    def keep(array):
        tensors.append(torch.tensor(array))
        return tensors[-1]

    expected = call(op, kind=keep)
    options = {"k": 3} if op in ("hamming_topk", "hash_attend") else {}

    @torch.compile(backend="eager", fullgraph=True, options={"guard_filter_fn": note})
    def compiled():
        return getattr(hata, op)(*tensors, **options)

    torch._dynamo.reset()
    assert torch.equal(compiled(), expected)
    torch._dynamo.reset()
    assert any("hata" in name for name in seen)
    assert not [name for name in seen if "sys" in name or "modules" in name]


@pytest.mark.parametrize("depth", [1, 2])
def test_dispatch_modes_see_the_op(depth):
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, projection = torch.randn(1, 2, 3, 16), torch.randn(1, 16, 32)
    expected = hata.encode(x, projection)
    with contextlib.ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(Watch())
        got = hata.encode(x, projection)
        # A mode is active, and what it would see is switched off.
        python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
        stack.enter_context(torch._C._ExcludeDispatchKeyGuard(python))
        unseen = hata.encode(x, projection)
    assert seen == ["hata.encode.default"] * depth
    assert torch.equal(got, expected)
    assert torch.equal(unseen, expected)


def test_graphs_of_make_fx_hold_the_op():
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    x, projection = torch.randn(1, 2, 3, 16), torch.randn(1, 16, 32)
    graph = make_fx(lambda x: hata.encode(x, projection))(x)
    assert torch.equal(graph(-x), hata.encode(-x, projection))


def test_traces_of_torchscript_are_refused():
    torch = pytest.importorskip("torch")
    projection = torch.zeros(1, 16, 32)
    with warnings.catch_warnings():
        # torch deprecates it.
        warnings.simplefilter("ignore")
        with pytest.raises(hata.HataDTypeError, match=r"x: torch\.jit\.trace"):
            torch.jit.trace(lambda x: hata.encode(x, projection), torch.zeros(1, 2, 1, 16))


def test_gradients_are_refused_after_no_grad():
    torch = pytest.importorskip("torch")
    projection = torch.nn.Parameter(torch.zeros(1, 16, 32))
    with torch.no_grad():
        call(kind=torch.tensor, projection=projection)
    with pytest.raises(hata.HataAutogradError, match=r"^projection"):
        call(kind=torch.tensor, projection=projection)


def test_tangents_are_refused_after_plain_tensors():
    torch = pytest.importorskip("torch")
    from torch.autograd import forward_ad

    x, projection = torch.ones(1, 2, 1, 16), torch.ones(1, 16, 32)
    with forward_ad.dual_level():
        hata.encode(x, projection)
        with pytest.raises(hata.HataAutogradError, match=r"^x: "):
            hata.encode(forward_ad.make_dual(x, x), projection)
        hata.encode(x, projection)


def test_devices_without_a_number_are_told_apart():
    torch = pytest.importorskip("torch")
    codes = torch.zeros(1, 1, 0, 4, dtype=torch.uint8)
    hata.hamming_topk(codes, codes, 2)
    with pytest.raises(hata.HataDeviceError, match="k_codes: got an array on meta"):
        hata.hamming_topk(codes, codes.to("meta"), 2)


@pytest.mark.parametrize(
    ("error", "name", "make"),
    [
        (hata.HataDTypeError, "k", lambda k: True),
        (hata.HataDTypeError, "k", str),
        (hata.HataDTypeError, "scale", lambda scale: True),
        (hata.HataDTypeError, "lengths", lambda lengths: [3]),
        (hata.HataDTypeError, "keys", lambda keys: None),
        (hata.HataDeviceError, "keys", lambda keys: keys.to("meta")),
        (hata.HataAutogradError, "q", lambda q: q.clone().requires_grad_()),
    ],
)
def test_a_dispatch_mode_changes_no_error(error, name, make):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    q, projection = torch.zeros(1, 2, 1, 16), torch.zeros(2, 16, 32)
    given = {"q": q, "keys": q, "values": q, "key_codes": q[..., :4].byte(), "k": 2}
    given |= {"projection": projection, "scale": 1.0, "lengths": None}
    hata.hash_attend(**given)
    given[name] = make(given[name])
    with pytest.raises(error) as plain:
        hata.hash_attend(**given)
    with FlopCounterMode(display=False), pytest.raises(error) as watched:
        hata.hash_attend(**given)
    assert str(watched.value) == str(plain.value)


def test_prepare_works_in_a_dispatch_mode():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    q, indices = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 4, dtype=torch.int32)
    with FlopCounterMode(display=False):
        hata.prepare("sparse_attend", q, q, q, indices)
        hata.prepare("encode", q, torch.zeros(2, 16, 32))


def test_shared_memory_is_refused_after_memory_of_ones_own():
    memory = np.zeros((1, 2, 1, 24), np.uint8)
    codes, norms = memory.reshape(-1)[:8].reshape(1, 2, 1, 4), np.zeros((1, 2, 1), np.float16)
    call("encode", out=codes, norms=norms)
    wrong = memory.reshape(-1)[4:8].view(np.float16).reshape(1, 2, 1)
    with pytest.raises(hata.HataShapeError, match="out: got memory that norms lies in too"):
        call("encode", out=codes, norms=wrong)
    projection = np.zeros((1, 16, 32), np.float32)
    for at in (0, 100, 2040):
        inside = projection.reshape(-1).view(np.uint8)[at : at + 8].reshape(1, 2, 1, 4)
        with pytest.raises(hata.HataShapeError, match="out: got memory that projection lies in"):
            call("encode", projection=projection, out=inside)
    keys = np.zeros((1, 1, 8, 16), np.float32)
    within = keys.reshape(-1)[:8].view(np.uint8).reshape(1, 1, 8, 4)
    with pytest.raises(hata.HataShapeError, match="key_codes: got memory that keys lies in too"):
        call(keys=keys, key_codes=within, fresh=1)
    call(keys=keys, key_codes=within)


@pytest.mark.parametrize(
    ("strides", "dense"),
    [
        ((64, 32, 16, 1), True),
        ((48, 16, 16, 1), True),
        ((0, 8, 8, 1), True),
        ((128, 32, 16, 1), False),
        # As many elements as places, for overlapping rows weigh up the holes.
        ((96, 8, 8, 1), False),
    ],
)
def test_extent_of_an_array(strides, dense):
    memory = np.zeros(1000, np.uint8)
    x = np.lib.stride_tricks.as_strided(memory, (2, 2, 2, 16), strides)
    places = {sum(map(int.__mul__, at, strides)) for at in np.ndindex(x.shape)}
    size, found = arguments.extent(arrays.framework("x", x), x)
    assert size == max(places) + 1
    assert found == dense == (len(places) == size)


def test_memory_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_MEMO_LIMIT", 10)
    for slots in range(1, 40):
        codes = np.zeros((1, 1, slots, 4), np.uint8)
        assert hata.hamming_topk(codes[:, :, :1], codes, 1).item() == 0
    assert len(registry.in_force()[1].routes) <= 10


def test_numbers_of_other_kinds_are_looked_at_in_every_call():
    torch = pytest.importorskip("torch")
    for k in (np.int64(3), np.array(3), torch.tensor(3)):
        assert call("hamming_topk", k=k).shape == (1, 1, 1, 3)
    for k in (np.array(3), torch.tensor(3)):
        call("hamming_topk", k=k)
        k[...] = 2
        assert call("hamming_topk", k=k).shape == (1, 1, 1, 2)
    for wrong in (np.float64(3), torch.tensor(3.0), True, 3.0, np.bool_(True), [3]):
        with pytest.raises(hata.HataDTypeError, match=r"^k: got"):
            call("hamming_topk", k=wrong)
    call(scale=np.float32(0.5))
    for wrong in (True, np.bool_(True), "1", [1.0]):
        with pytest.raises(hata.HataDTypeError, match=r"^scale: got"):
            call(scale=wrong)


def test_checks_of_values_are_off_by_default(monkeypatch):
    class Unreadable(np.ndarray):
        def tolist(self):
            raise AssertionError("lengths were read")

    lengths = np.array([3], np.int32).view(Unreadable)
    call(lengths=lengths, starts=lengths)
    monkeypatch.setenv("HATA_CHECK", "1")
    with pytest.raises(AssertionError, match="lengths were read"):
        call(lengths=lengths)


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "yes", "on"])
def test_words_that_switch_checks_on(monkeypatch, word):
    monkeypatch.setenv("HATA_CHECK", word)
    with pytest.raises(hata.HataShapeError, match="lengths: got 9"):
        call(lengths=np.array(9))


@pytest.mark.parametrize("word", ["", "0", "false", "No", "off"])
def test_words_that_switch_checks_off(monkeypatch, word):
    monkeypatch.setenv("HATA_CHECK", word)
    call(lengths=np.array([8]))


@pytest.mark.parametrize("word", ["ture", "2", "none"])
def test_words_that_say_nothing_about_checks(monkeypatch, word):
    monkeypatch.setenv("HATA_CHECK", word)
    with pytest.raises(hata.HataError, match=f"HATA_CHECK: got '{word}', expected one of 1, true"):
        call()


def test_check_names_scalar_lengths_too(monkeypatch):
    monkeypatch.setenv("HATA_CHECK", "1")
    with pytest.raises(hata.HataShapeError, match="lengths: got 9 in row 0, expected 0 to S = 8"):
        call(lengths=np.array(9))
    call(lengths=np.array(8))


# JAX


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_jax_arrays_cannot_be_written(jax):
    given = {"out": np.zeros((1, 2, 1, 4), "u1"), "norms": np.zeros((1, 2, 1), "f2")}
    for name, values in given.items():
        with pytest.raises(hata.HataDTypeError, match=f"{name}: got a jax array.*written"):
            call("encode", jax.numpy.asarray, **{name: jax.numpy.asarray(values)})
    with pytest.raises(hata.HataDTypeError, match="key_codes: got a jax array"):
        call("hash_attend", jax.numpy.asarray, fresh=1)


def test_jax_tracers_are_refused(jax):
    with pytest.raises(hata.HataDTypeError, match=r"x: it is traced by jax.jit"):
        jax.jit(lambda x: call("encode", jax.numpy.asarray, x=x))(np.zeros((1, 2, 1, 16), "f4"))


def test_jax_arrays_that_are_gone_are_refused(jax):
    x = jax.numpy.zeros((1, 2, 1, 16))
    call("encode", jax.numpy.asarray, x=x)
    x.delete()
    with pytest.raises(hata.HataDTypeError, match="x: it was deleted or donated"):
        hata.encode(x, jax.numpy.zeros((1, 16, 32)))


def test_jax_arrays_on_several_devices_are_refused(jax):
    adapter = arrays.framework("x", jax.numpy.zeros(1))
    # What JAX gives for the device of a sharded array is its sharding.
    sharded = SimpleNamespace(device=object(), is_deleted=lambda: False)
    assert "several devices" in adapter.refusal(sharded)


def test_jax_results_stay_on_their_device(jax):
    out, lse = call("hash_attend", jax.numpy.asarray, return_lse=True)
    for array in (out, lse):
        assert isinstance(array, jax.Array)
        assert array.devices() == {jax.devices("cpu")[0]}
    assert call("encode", jax.numpy.asarray).dtype == jax.numpy.uint8


def test_numpy_calls_do_not_load_other_frameworks(repo_root):
    code = (
        "import sys, hata, numpy as np\n"
        "hata.encode(np.ones((1, 1, 1, 16), 'f4'), np.ones((1, 16, 32), 'f4'))\n"
        "loaded = {'torch', 'jax', 'cupy', 'triton', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Numbers


@pytest.mark.parametrize("number", [np.float32(0.25), np.float16(0.25), 0.25, np.float64(0.25)])
def test_numpy_numbers_are_numbers(number):
    expected = call(scale=0.25, softcap=0.25, ratio=0.25)
    np.testing.assert_array_equal(call(scale=number, softcap=number, ratio=number), expected)
    assert arguments.real("scale", np.int64(3)) == 3.0


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.int32(3)])
def test_numpy_integers_are_integers(number):
    np.testing.assert_array_equal(call(k=number, sink=np.int8(1)), call(k=3, sink=1))
