import json
import pickle

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
