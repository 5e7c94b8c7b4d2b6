import itertools
import json
import pickle
import struct

import numpy as np
import pytest
import torch

import hata
from hata import cli
from hata.convert import convert

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
        ([1, 2], "AttributeError"),
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
