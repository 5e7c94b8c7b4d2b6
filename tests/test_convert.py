import collections
import io
import itertools
import json
import pickle
import re
import struct
import sys
import warnings

import numpy as np
import pytest
import torch

import hata
from hata import cli
from hata.encoder.convert import convert
from hata.encoder.pickles import array, load_plain

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = {layer: torch.randn(2, 16, 64).bfloat16() for layer in (1, 2)}
    for layer, tensor in made.items():
        torch.save(tensor, tmp_path / f"hash_weight_layer_{layer:02d}.pt")
    return tmp_path, made


def test_round_trip(weights, tmp_path, capsys):
    folder, made = weights
    out = tmp_path / "encoder.safetensors"
    assert cli.main(["convert", str(folder), "--config", str(folder), "--out", str(out)]) == 0
    assert "layers=3" in capsys.readouterr().out
    encoder = hata.Encoder.load(out)
    assert encoder.dense_layers == (0,)
    for layer, tensor in made.items():
        np.testing.assert_array_equal(encoder.projection(layer), tensor.float().numpy())


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_that_would_run_code_is_refused(weights, capsys):
    folder, _ = weights
    (folder / "hash_weight_layer_01.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(hata.EncoderError, match="cannot be read as one tensor"):
        convert(folder, folder)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "weights of layer 2"),
        ({"num_key_value_heads": 4}, "expected \\(4, 16, 64\\)"),
        ({"head_dim": None}, "config"),
    ],
)
def test_weights_of_another_model(weights, change, message):
    folder, _ = weights
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(hata.EncoderError, match=message):
        convert(folder, folder)


def test_nothing_to_convert(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "encoder.safetensors"
    code = cli.main(["convert", str(tmp_path), "--config", str(tmp_path), "--out", str(out)])
    assert code != 0
    assert "holds no hash_weight_layer_N.pt" in capsys.readouterr().err
    assert not out.exists()


def networks(heads, widths, shared):
    """Weights `[H, in, out]` and biases `[H, out]` of every layer; equal in a group if shared."""
    rng = np.random.default_rng(len(widths))
    found = []
    for a, b in itertools.pairwise(widths):
        weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((a, b), (b,)))
        one = [weight + (0 if shared else h) for h in range(heads)]
        found.append((np.stack(one), np.stack([bias] * heads)))
    return found


def state(layers):
    """HashAttention's state dictionary of `{layer: {"q": networks, "k": networks}}`."""
    return {
        f"{layer}.learning_to_hash_transformation_{side}.{head}.{2 * number}.{part}": torch.tensor(
            array[head].T if part == "weight" else array[head]
        )
        for layer, sides in layers.items()
        for side, found in sides.items()
        for number, arrays in enumerate(found)
        for part, array in zip(("weight", "bias"), arrays, strict=True)
        for head in range(len(array))
    }


def pickled(layers):
    """HashAttention's other form."""
    names = {"q": "query", "k": "key"}
    return {
        layer: {
            f"{names[side]}_{part}": [arrays[i] for arrays in found]
            for side, found in sides.items()
            for i, part in enumerate(("matrix", "bias"))
        }
        for layer, sides in layers.items()
    }


@pytest.fixture(params=["state", "pickle", "pickle-tensors"])
def hashattention(request, tmp_path):
    """`make(shared) -> path, networks`: a file of two layers in one of the published forms."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(shared):
        layers = {
            layer: {"q": networks(4, (16, 32, 32), False), "k": networks(4, (16, 16, 32), shared)}
            for layer in (0, 2)
        }
        if request.param == "state":
            path = tmp_path / "usa.pt"
            torch.save(state(layers), path)
            return path, layers
        path = tmp_path / "usa.pkl"
        content = pickled(layers)
        if request.param == "pickle-tensors":
            content = {
                layer: {name: [torch.tensor(x) for x in xs] for name, xs in parts.items()}
                for layer, parts in content.items()
            }
        path.write_bytes(pickle.dumps(content))
        return path, layers

    return make


@pytest.mark.parametrize("shared", [True, False], ids=["keys-shared", "keys-per-head"])
def test_hashattention_round_trip(hashattention, shared, tmp_path, capsys):
    source, layers = hashattention(shared)
    out = tmp_path / "encoder.safetensors"
    words = ["convert", str(source), "--config", str(tmp_path), "--out", str(out)]
    assert cli.main(words) == 0
    encoder = hata.Encoder.load(out)
    assert encoder.dense_layers == (1,)
    assert encoder.bits == 32
    for layer, sides in layers.items():
        query = encoder.query(layer)
        (first, last), heads = sides["q"], slice(None, None, 2 if shared else 1)
        np.testing.assert_array_equal(query.hidden[0].weight, first[0])
        np.testing.assert_array_equal(query.hidden[0].bias, first[1])
        np.testing.assert_array_equal(query.projection, last[0])
        np.testing.assert_array_equal(query.bias, last[1])
        first, last = sides["k"]
        np.testing.assert_array_equal(encoder.hidden[layer][0].weight, first[0][heads])
        np.testing.assert_array_equal(encoder.projection(layer), last[0][heads])
        np.testing.assert_array_equal(encoder.bias(layer), last[1][heads])


@pytest.mark.parametrize("name", ["usa.pkl", "usa.pt"])
def test_a_file_that_would_run_code_is_refused(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps({0: Hostile()}))
    with pytest.raises(hata.EncoderError, match=r"builtins\.print|cannot be read"):
        convert(tmp_path / name, tmp_path)
    # A pickle inside an array that a pickle holds is looked at as well.
    inner = np.empty(1, object)
    inner[0] = Hostile()
    (tmp_path / name).write_bytes(pickle.dumps({0: {"query_matrix": [inner]}}))
    with pytest.raises(hata.EncoderError):
        convert(tmp_path / name, tmp_path)
    storage = pickle.dumps(Hostile())
    (tmp_path / name).write_bytes(
        b"\x80\x02ctorch.storage\n_load_from_bytes\n(B"
        + struct.pack("<I", len(storage))
        + storage
        + b"tR."
    )
    with pytest.raises(hata.EncoderError):
        convert(tmp_path / name, tmp_path)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no network"),
        ({9: {}}, "KeyError"),
        ([1, 2], "expected a dictionary of layers"),
        ({0: {"query_matrix": [], "query_bias": [], "key_matrix": [], "key_bias": []}}, "networks"),
    ],
)
def test_a_pickle_of_something_else(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "usa.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(hata.EncoderError, match=message):
        convert(tmp_path / "usa.pkl", tmp_path)


def test_a_state_that_lacks_a_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = networks(4, (16, 16, 32), True)
    whole = state({0: {"q": found, "k": found}})
    for name in ("0.learning_to_hash_transformation_k.1.2.bias",):
        torch.save({key: x for key, x in whole.items() if key != name}, tmp_path / "usa.pt")
        with pytest.raises(hata.EncoderError, match="not whole"):
            convert(tmp_path / "usa.pt", tmp_path)
    torch.save({key: x for key, x in whole.items() if "_q." in key}, tmp_path / "usa.pt")
    with pytest.raises(hata.EncoderError, match="without the key networks"):
        convert(tmp_path / "usa.pt", tmp_path)


class Called:
    """Pickled as a call of a function, and a state for what it returns."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def dtype(code="f4", *, order="<", fields=None):
    return Called(np.dtype, code, False, True, state=(3, order, None, None, fields, -1, -1, 0))


def reconstructed(raw, kind, shape, fortran=False):
    from numpy._core.multiarray import _reconstruct

    return Called(_reconstruct, np.ndarray, (0,), b"b", state=(1, shape, kind, fortran, raw))


def buffer(raw, kind, shape, order="C"):
    from numpy._core.numeric import _frombuffer

    return Called(_frombuffer, raw, kind, shape, order)


def tensor(size, stride=(1,), offset=0, raw=None):
    whole = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = torch.arange(6.0).storage()
        torch.save(storage, whole, _use_new_zipfile_serialization=False)
    held = Called(torch.storage._load_from_bytes, whole.getvalue() if raw is None else raw)
    rebuild = torch._utils._rebuild_tensor_v2
    return Called(rebuild, held, offset, size, stride, False, collections.OrderedDict())


class Speaks:
    """Says so where it is taken for a number, as it is if its address is taken for an object."""

    def __float__(self):
        print("this must not run")
        return 1.0


SPEAKS = Speaks()
ADDRESS = id(SPEAKS).to_bytes(8, "little")
OBJECTS = Called(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (reconstructed(ADDRESS, OBJECTS, (1,)), "dtype O8"),
        (buffer(ADDRESS, OBJECTS, (1,)), "dtype O8"),
        (reconstructed([SPEAKS], OBJECTS, (1,)), "Speaks"),
        (reconstructed(b"a" * 8, dtype("V8"), (1,)), "dtype V8"),
        (reconstructed(b"a" * 8, dtype("U2"), (1,)), "dtype U2"),
        (reconstructed(b"a" * 8, dtype("c8"), (1,)), "dtype c8"),
        (reconstructed(b"a" * 8, dtype("f4,O8"), (1,)), "dtype f4,O8"),
        (reconstructed(b"a" * 8, dtype("f8", fields={"x": 1}), (1,)), "parts"),
        (reconstructed(b"a" * 8, dtype("f8", order="?"), (1,)), "byte order"),
        (reconstructed(b"a" * 8, dtype("f4"), (3,)), "got 8 bytes"),
        (reconstructed(b"a" * 8, dtype("f4"), (1 << 40, 1 << 40)), "got 8 bytes"),
        (reconstructed(b"a" * 8, dtype("f4"), (-2,)), "whole numbers"),
        (reconstructed(b"", dtype("f4"), (0,) * 9), "whole numbers"),
        (reconstructed("a" * 8, dtype("f4"), (2,)), "got str"),
        (buffer(b"a" * 8, dtype("f4"), (3,)), "got 8 bytes"),
        (buffer(b"a" * 8, "f4", (2,)), "without a dtype"),
        (Called(np.dtype, "f4"), "got dtype where an array"),
        (Called(np.ndarray, (1 << 20,)), "got ndarray where an array"),
        (tensor((7,)), "in 6"),
        (tensor((2,), offset=5), "in 6"),
        (tensor((2,), (1 << 40,)), "in 6"),
        (tensor((1 << 40,), (0,)), "in 6"),
        (tensor((2, 2)), "strides"),
        (tensor((2,), offset=-1), "whole numbers"),
        (tensor((2,), (-1,)), "whole numbers"),
        (tensor((2,), raw=pickle.dumps(SPEAKS)), "asks for"),
        (tensor((2,), raw=pickle.dumps(1) * 5), "another format"),
        (tensor((2,), raw=b""), "EOFError|ValueError"),
        (3.0, "float"),
        ([[1.0]], "list"),
    ],
)
def test_arrays_of_a_pickle_are_not_made_by_it(hostile, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    parts = {
        f"{side}_{part}": [hostile] for side in ("query", "key") for part in ("matrix", "bias")
    }
    (tmp_path / "usa.pkl").write_bytes(pickle.dumps({0: parts}, protocol=4))
    with pytest.raises(hata.EncoderError, match=message) as raised:
        convert(tmp_path / "usa.pkl", tmp_path)
    assert str(raised.value).isprintable()
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        # A state for a function or a class, which all others would see.
        b"cnumpy\ndtype\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb.",
        b"ccollections\nOrderedDict\n(N}X\x05\x00\x00\x00itemsNstb.",
        # The opcodes that make an object of a class without calling it.
        b"cnumpy\nndarray\n)\x81.",
        b"\x80\x04cnumpy\ndtype\n)}\x92.",
        b"(inumpy\nnothing\n.",
        b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"cnumpy._core.multiarray\nscalar\n.",
        b"cnumpy\n\x1b[31mred\n.",
        # A memo of as many entries as it says.
        b"Nr\xff\xff\xff\xff.",
        b"Np4294967295\n.",
        b"\x82\x01.",
        b"X\x01\x00\x00\x00aQ.",
        b"\x80\x05\x97.",
        b"(" * 1000 + b"l" * 1000 + b".",
    ],
)
def test_opcodes_that_would_do_more_than_hold_data(code, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "usa.pkl").write_bytes(code)
    with pytest.raises(hata.EncoderError, match=r"usa\.pkl") as raised:
        convert(tmp_path / "usa.pkl", tmp_path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("code", ["<f4", ">f4", "<f2", ">f8", "<i4", "|i1", ">u2", "|b1"])
def test_arrays_of_a_pickle_are_read_as_they_were(protocol, code, tmp_path):
    x = np.arange(24).reshape(2, 3, 4).astype(code)
    for one in (x, np.asfortranarray(x), x.transpose(2, 0, 1), x[:, ::2]):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({0: one}, protocol=protocol))
        found = array(load_plain(tmp_path / "x.pkl")[0])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, one.astype(np.float32))


@pytest.mark.parametrize(
    "kind", ["float64", "float32", "float16", "bfloat16", "int64", "int16", "uint8", "bool"]
)
def test_tensors_of_a_pickle_are_read_as_they_were(kind, tmp_path):
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, kind))
    for one in (x, x.permute(2, 0, 1), x[:, 1:]):
        content = [one, torch.nn.Parameter(one, requires_grad=False)]
        if one.is_floating_point():
            content.append(torch.nn.Parameter(one.clone()))
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        for found in map(array, load_plain(tmp_path / "x.pkl")):
            np.testing.assert_array_equal(found, one.float().numpy())


def one_layer(**changes):
    found = networks(4, (16, 16, 32), True)
    return {**pickled({0: {"q": found, "k": found}})[0], **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({-1: one_layer()}, "number -1"),
        ({0: one_layer(), 0.5: one_layer()}, "number 0.5"),
        ({0: one_layer(), "0": one_layer()}, "layer 0 twice"),
        ({True: one_layer()}, "number True"),
        ({(0,): one_layer()}, "number tuple"),
        ({10**9: one_layer()}, "number 1000000000"),
        ({999: one_layer()}, "weights of layer 999"),
        ({0: [1]}, "a layer of type list"),
        ({0: one_layer(key_matrix=[np.ones((4, 16, 16), np.complex64)] * 2)}, "dtype c8"),
        ({0: one_layer(key_matrix=[np.ones((), np.float32)] * 2)}, r"shape \(\)"),
        ({0: one_layer(key_matrix=[np.ones((4, 16, 16))] * 99)}, "at most 17"),
        (
            {0: one_layer(key_matrix=[np.ones((4, 16, 16)), np.zeros((4, 16, 32))])},
            "projection of layer 0 is all zeros",
        ),
    ],
)
def test_layers_of_a_pickle_that_make_no_sense(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "usa.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(hata.EncoderError, match=message):
        convert(tmp_path / "usa.pkl", tmp_path)


K0 = "0.learning_to_hash_transformation_k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {key.replace("_q.3.", "_q.7."): t for key, t in x.items()}, r"\[0, 1, 2, 7\]"),
        (
            lambda x: {re.sub(r"\.2\.([wb])", r".4.\1", key): t for key, t in x.items()},
            r"layers \[0, 4\]",
        ),
        (lambda x: {**x, **{f"x.{key}": t for key, t in x.items()}}, "twice"),
        (lambda x: {key.replace("0.l", "-1.l"): t for key, t in x.items()}, "number -1"),
        (lambda x: {key.replace("0.l", "12345678.l"): t for key, t in x.items()}, "12345678"),
        (lambda x: {**x, f"{K0}.1.2.bias": 3}, "of int, expected a tensor"),
        (lambda x: {**x, f"{K0}.1.2.bias": x[f"{K0}.1.2.bias"] * 1j}, "complex"),
        (lambda x: {**x, f"{K0}.1.2.bias": x[f"{K0}.1.2.bias"].to_sparse()}, "sparse"),
        (lambda x: {**x, f"{K0}.1.2.bias": torch.ones(1).expand(32)}, "repeats"),
    ],
)
def test_state_dictionaries_that_make_no_sense(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = networks(4, (16, 16, 32), True)
    torch.save(change(state({0: {"q": found, "k": found}})), tmp_path / "usa.pt")
    with pytest.raises(hata.EncoderError, match=message):
        convert(tmp_path / "usa.pt", tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_parameters_are_converted_like_tensors(suffix, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = networks(4, (16, 16, 32), True)
    path = tmp_path / f"usa.{suffix}"
    if suffix == "pt":
        whole = state({0: {"q": found, "k": found}})
        torch.save({key: torch.nn.Parameter(x) for key, x in whole.items()}, path)
    else:
        layer = {
            name: [torch.nn.Parameter(torch.tensor(x)) for x in xs]
            for name, xs in one_layer().items()
        }
        path.write_bytes(pickle.dumps({0: layer}))
    np.testing.assert_array_equal(convert(path, tmp_path).query(0).projection, found[-1][0])


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(2, 16, 64), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.randn(2, 16, 64).to_sparse(), "sparse"),
        (lambda: torch.empty(2, 16, 64, device="meta"), "meta"),
        (quantized, "quantized|cannot be read"),
        (lambda: torch.randn(2, 16, 64, dtype=torch.complex64), "complex"),
        (lambda: torch.zeros(2, 16, 64), "layer 1 is all zeros"),
        (lambda: torch.ones(1).expand(2, 16, 64), "repeats"),
        (lambda: torch.randn(16, 64), r"expected one \[Hkv, D, r\]"),
        (lambda: [1], "of list, expected a tensor"),
    ],
)
def test_tensors_of_no_use(weights, made, message):
    folder, _ = weights
    torch.save(made(), folder / "hash_weight_layer_01.pt")
    with pytest.raises(hata.EncoderError, match=message):
        convert(folder, folder)
    torch.save(torch.nn.Parameter(torch.randn(2, 16, 64)), folder / "hash_weight_layer_01.pt")
    assert convert(folder, folder).bits == 64


def test_two_files_of_one_layer(weights):
    folder, made = weights
    torch.save(made[1], folder / "hash_weight_layer_1.pt")
    with pytest.raises(hata.EncoderError, match=r"layer_01\.pt and hash_weight_layer_1\.pt"):
        convert(folder, folder)


@pytest.mark.parametrize("name", ["nope", "nope.pt", "nope.pkl"])
def test_a_source_that_is_not_there(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(hata.EncoderError, match=f"{name}, which does not exist"):
        convert(tmp_path / name, tmp_path)
    with pytest.raises(hata.EncoderError, match="neither a file nor a folder"):
        convert("/dev/null", tmp_path)
    for odd in ("nul\0.pt", "a" * 5000):
        with pytest.raises(hata.EncoderError, match="source: got"):
            convert(odd, tmp_path)
        with pytest.raises(hata.EncoderError, match="config: got"):
            convert(tmp_path, odd)


@pytest.mark.parametrize("name", ["hash_weight_layer_01.pt", "usa.pt"])
def test_nobody_is_told_to_load_a_hostile_file_otherwise(weights, name):
    folder, _ = weights
    torch.save({"x": Hostile()}, folder / name)
    source = folder / name if name == "usa.pt" else folder
    with pytest.raises(hata.EncoderError, match="could run code") as raised:
        convert(source, folder)
    assert "weights_only" not in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        '{"text_config": 3}',
        '{"text_config": null}',
        "[" * 100000,
        "[]",
        "{}",
        json.dumps({**CONFIG, "num_hidden_layers": 10**9}),
        json.dumps({**CONFIG, "num_attention_heads": 5}),
        json.dumps({**CONFIG, "head_dim": None, "hidden_size": "64"}),
    ],
    ids=lambda text: text[:20],
)
def test_configs_of_no_use(weights, text):
    folder, _ = weights
    (folder / "config.json").write_text(text)
    with pytest.raises(hata.EncoderError, match="config: got"):
        convert(folder, folder)


@pytest.mark.parametrize("name", ["folder.safetensors", "file/e.safetensors", "nul\0.safetensors"])
def test_an_out_that_cannot_be_written(weights, name, capsys):
    folder, _ = weights
    (folder / "folder.safetensors").mkdir()
    (folder / "file").write_text("x")
    before = sorted(folder.iterdir())
    words = ["convert", str(folder), "--config", str(folder), "--out", str(folder / name)]
    assert cli.main(words) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_without_torch_its_files_are_refused(weights, monkeypatch, capsys):
    folder, _ = weights
    monkeypatch.setitem(sys.modules, "torch", None)
    words = [
        "convert",
        str(folder),
        "--config",
        str(folder),
        "--out",
        str(folder / "e.safetensors"),
    ]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith("hata convert: error: source: got ")
    assert "torch is not installed; pip install" in told
    assert told.count("\n") == 1
