"""`hata learn`: from a model and text to an encoder file, cut off and resumed, on several ranks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hata import cli
from hata.calibration import recorder
from hata.calibration.text import python_sources, read_text, sequences
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.learn import capture
from hata.learn.arguments import parse_layers


def arguments(model, text, out, **changes):
    options = {
        "--model": model, "--text": text, "--out": out, "--bits": 64, "--sequences": 3,
        "--tokens": 512, "--queries": 64, "--steps": 4, "--device": "cpu",
    } | {"--" + name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    words = ["learn"]
    for name, value in options.items():
        words += [name] if value is True else [name, str(value)]
    return words


def weights(path):
    return load_file(path)


@pytest.fixture(scope="module")
def learned(tiny, text, tmp_path_factory):
    """The file that one uninterrupted run writes."""
    out = tmp_path_factory.mktemp("learned") / "enc.safetensors"
    assert cli.main(arguments(tiny, text, out)) == 0
    return out


def equal(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_an_encoder_for_every_layer(learned):
    encoder = Encoder.load(learned)
    assert (encoder.bits, encoder.dense_layers) == (64, ())
    assert encoder.made["recipe"] == "listwise"
    assert encoder.made["sequences"] == 3
    assert encoder.made["recall"] == 1
    # Eight codes for the two query heads of a KV head, of which the layer has two.
    assert encoder.query(1).projection.shape == (16, 16, 64)
    assert learned.with_suffix(".png").stat().st_size > 1000
    assert not learned.with_suffix(".work").exists()


def test_the_same_again(learned, tiny, text, tmp_path):
    out = tmp_path / "enc.safetensors"
    assert cli.main(arguments(tiny, text, out)) == 0
    equal(out, learned)


def test_a_run_that_was_cut_off_goes_on(learned, tiny, text, tmp_path, monkeypatch, capsys):
    """Killed in the second sequence, then in the second layer; the result is the same."""
    out, work = tmp_path / "enc.safetensors", tmp_path / "work"
    read, trained = [], []
    original_read, original = recorder.read, capture.load

    def dies_reading(model, ids, shown):
        read.append(1)
        if len(read) == 2:
            raise KeyboardInterrupt
        original_read(model, ids, shown)

    monkeypatch.setattr(recorder, "read", dies_reading)
    assert cli.main(arguments(tiny, text, out, work=work)) == 130
    assert f"with --resume goes on with what lies in {work}" in capsys.readouterr().err
    assert (work / "capture" / "sequence_000.json").is_file()
    assert not (work / "capture" / "sequence_001.json").exists()

    def dies_training(folder, layer, *args):
        trained.append(layer)
        if layer == 1:
            raise KeyboardInterrupt
        return original(folder, layer, *args)

    monkeypatch.setattr(capture, "load", dies_training)
    assert cli.main(arguments(tiny, text, out, work=work, resume=True)) == 130
    # The first sequence was not read again, and the first layer will not be trained again.
    assert len(read) == 5
    assert set(trained) == {0, 1}
    trained.clear()
    monkeypatch.setattr(capture, "load", original)
    assert cli.main(arguments(tiny, text, out, work=work, resume=True)) == 0
    assert len(read) == 5
    equal(out, learned)
    assert not work.exists()

    assert cli.main(arguments(tiny, text, out, work=work, keep=True)) == 0
    capsys.readouterr()
    other = tmp_path / "other.py"
    other.write_text(text.read_text() + "# the end\n")
    assert cli.main(arguments(tiny, other, out, work=work, resume=True, steps=5)) == 2
    told = capsys.readouterr().err
    assert "the tokens read of --text or --dataset are other ones; steps: 4 there, 5 ask" in told
    assert "or leave --resume out to begin anew" in told


def test_layers_side_by_side(learned, tiny, text, tmp_path, monkeypatch):
    """On two cores, two layers at once: the same result, and none goes on where one failed."""
    torch.set_num_threads(2)
    try:
        out = tmp_path / "enc.safetensors"
        assert cli.main(arguments(tiny, text, out)) == 0
        equal(out, learned)
        original = capture.load

        def dies(folder, layer, *args):
            if layer == 0:
                raise KeyboardInterrupt
            return original(folder, layer, *args)

        monkeypatch.setattr(capture, "load", dies)
        words = arguments(tiny, text, tmp_path / "cut.safetensors", steps=100000)
        assert cli.main(words) == 130
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_capture_serves_several_trainings(learned, tiny, text, tmp_path, monkeypatch):
    store = tmp_path / "capture"
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert (
        cli.main(arguments(tiny, text, a, capture=store, recipe="hashattention", bits=32, recall=1))
        == 0
    )
    monkeypatch.setattr(recorder, "load_model", None)
    assert cli.main(arguments(tiny, text, b, capture=store)) == 0
    equal(b, learned)
    encoder = Encoder.load(a)
    assert [one.weight.shape for one in encoder.hidden[0]] == [(2, 16, 16)] * 2
    assert encoder.query(0).projection.shape == (4, 16, 32)


def test_layers_that_are_not_asked_for_stay_dense(tiny, text, tmp_path):
    out = tmp_path / "enc.safetensors"
    assert cli.main(arguments(tiny, text, out, layers="1", recipe="hata", bits=32, steps=2)) == 0
    encoder = Encoder.load(out)
    assert encoder.dense_layers == (0,)
    assert encoder.query(1) is None


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(learned, tiny, text, tmp_path):
    out = tmp_path / "enc.safetensors"
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "hata", *arguments(tiny, text, out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Encoder(") == 1
    equal(out, learned)


def test_the_captured_are_the_models_own(tiny, tmp_path):
    """Keys and the kept queries of a layer make the attention that the model reports."""
    model = recorder.load_model(tiny, "cpu")
    ids = np.random.default_rng(0).integers(3, 259, (1, 300))
    capture.capture(model, ids, tmp_path, sequences=[0], layers=[1], queries=20, seed=5)
    assert capture.refused(tmp_path, 0) == {}
    assert capture.is_whole(tmp_path, 0, [1])
    assert not capture.is_whole(tmp_path, 0, [0, 1])
    assert not capture.file_of(tmp_path, 0, 0).exists()
    where, q, keys, scale = capture.load(tmp_path, 1, 0, "cpu")
    np.testing.assert_array_equal(where, capture.positions(300, 20, 5, 0))
    assert where.min() >= 150
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids), output_attentions=True).attentions[1][0]
    logits = (q @ keys[:, None].mT * scale).flatten(0, 1)
    hidden = torch.arange(300) > where[:, None]
    found = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected[:, where], rtol=1e-4, atol=1e-5)


def test_text(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "held_out").mkdir()
    (tmp_path / "kept" / "a.py").write_text("first")
    (tmp_path / "kept" / "b.py").write_bytes(b"\xff\xfe")
    (tmp_path / "held_out" / "c.py").write_text("second")
    assert read_text([tmp_path], without=["held_out"]) == "first"
    sources, absent = python_sources(20000, without=["numpy", "numpi"])
    assert len(sources) >= 20000
    assert absent == ["numpi"]
    assert python_sources(20000, without=["numpy", "numpi"]) == (sources, absent)
    assert sequences(lambda s: [ord(c) for c in s], "abc" * 100, 2, 8, 4).shape == (2, 8)


def test_layers_in_words():
    assert parse_layers(None, 3) == (0, 1, 2)
    assert parse_layers("0,2-4,3", 6) == (0, 2, 3, 4)
    for words in ("3", "x", "-1", "2-1", ""):
        with pytest.raises(CaptureError, match="expected numbers and ranges within 0-2"):
            parse_layers(words, 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"out": "enc.bin"}, "ends in .safetensors"),
        ({"model": "nowhere"}, "expected a folder with config.json"),
        ({"text": "none.py"}, "cannot be read"),
        ({"tokens": 20000}, "--tokens: got 20000, but the model reads up to 4096"),
        ({"tokens": 32}, "--tokens: got 32, expected 64 or more"),
        ({"tokens": 256, "recipe": "hashattention"}, "--tokens: got 256, expected 288 or more"),
        ({"tokens": 256, "recipe": "hata"}, "--tokens: got 256, expected 512 or more"),
        ({"sequences": 99}, "expected at least 51200 for 100"),
        ({"bits": 40}, "multiple of 32"),
        ({"bits": 544}, "--bits: got 544"),
        ({"seed": -1}, "--seed: got -1, expected 0 or more"),
        ({"seed": 2**40}, "--seed: got 1099511627776, expected 4294967295 or less"),
        ({"device": "meta"}, "--device: got 'meta', expected auto"),
        ({"device": "cuda:99"}, "GPUs here"),
        ({"layers": "0-9999999999999"}, "within 0-1"),
        ({"text": "x" * 300}, "cannot be read"),
        ({"model": "x" * 300}, "expected a folder with config.json"),
        ({"without": "text.py"}, "leaves nothing of it"),
        ({"without": "tests/"}, "--without: got 'tests/', but nothing of --text is named so"),
        ({"query_codes": 3}, "--query-codes: got 3, expected a multiple of 2"),
        ({"out": "folder.safetensors"}, "which is a folder"),
        ({"out": "mine.txt/enc.safetensors"}, "cannot be written"),
        ({"out": "x" * 300 + ".safetensors"}, "cannot be"),
        ({"plot": "folder.safetensors"}, "expected a name that ends in one of"),
        ({"plot": "mine.txt/a.png"}, "--plot: mine.txt/a.png cannot be written"),
        ({"plot": "a.xyz"}, "expected a name that ends in one of"),
        ({"work": "mine.txt"}, "--work: mine.txt cannot be used"),
        ({"work": "mine.txt/below"}, "--work: mine.txt/below cannot be used"),
        ({"work": "x" * 300}, "--work: x"),
        ({"capture": "mine.txt"}, "--capture: mine.txt cannot be used"),
        ({"capture": "."}, "--capture: got ."),
        ({"layers": "7"}, "within 0-1"),
        ({"dataset": "python"}, "--text and --dataset: got both"),
        ({"query_codes": 4, "recipe": "hata"}, "with recipe listwise"),
        ({"work": "."}, "which lies inside the working folder"),
        ({"sequences": 0}, "--sequences: got 0, expected 1 or more"),
        ({"steps": 0}, "--steps: got 0, expected 1 or more"),
        ({"queries": -3}, "--queries: got -3, expected 1 or more"),
        ({"recall": -1}, "--recall: got -1, expected 0 or more"),
    ],
)
def test_faults_are_named(tiny, text, tmp_path, monkeypatch, capsys, changes, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("do not touch")
    (tmp_path / "folder.safetensors").mkdir()
    model, given, out = tiny, text, tmp_path / "enc.safetensors"
    changes = dict(changes)
    out, model = changes.pop("out", out), changes.pop("model", model)
    given = changes.pop("text", given)
    assert cli.main(arguments(model, given, out, **changes)) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.startswith("hata learn: error: --")
    assert told.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "do not touch"
    assert not (tmp_path / "enc.safetensors").exists()


@pytest.mark.parametrize("command", ["learn", "eval"])
def test_that_no_text_is_named_is_told_at_once(command):
    code = (
        "import sys; from hata import cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(1 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--model", "x"], capture_output=True, text=True
    )
    told = f"hata {command}: error: --text: got none; name files, or a --dataset\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_only_nested_codes_can_be_trained_as_others(tiny, text, tmp_path, capsys):
    words = arguments(tiny, text, tmp_path / "enc.safetensors", recipe="hata")
    assert cli.main([*words, "--no-nested"]) == 2
    assert "--no-nested: got it for recipe hata" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--work", "--capture", "--plot", "--without"])
def test_an_empty_value_is_not_one_left_out(tiny, text, tmp_path, capsys, option):
    words = arguments(tiny, text, tmp_path / "enc.safetensors")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, option, ""])
    assert stop.value.code == 2
    assert f"hata learn: error: argument {option}: got an empty value" in capsys.readouterr().err


def test_a_name_that_no_package_has_is_told(tiny, tmp_path, capsys, monkeypatch):
    """Nothing of it can be read, but somebody may have meant another name."""
    monkeypatch.setattr(
        "hata.calibration.text.load_tokenizer", lambda _: lambda text: [3] * len(text)
    )
    words = arguments(tiny, "x", tmp_path / "e.safetensors", dataset="python", steps=1, layers=0)
    del words[words.index("--text") : words.index("--text") + 2]
    assert cli.main([*words, "--without", "numpy", "numpi"]) == 0
    told = capsys.readouterr().err
    assert "note: --without: no installed package has a file or folder named 'numpi', so" in told


def test_a_dataset_needs_its_library(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = arguments(tiny, "x", tmp_path / "e.safetensors", dataset="some/name")
    del words[words.index("--text") : words.index("--text") + 2]
    assert cli.main(words) == 2
    assert "needs the datasets library" in capsys.readouterr().err


def test_a_model_without_attention_to_see_is_refused(tmp_path, text, capsys):
    import transformers

    settings = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": 2048, "sliding_window": 64}  # fmt: skip
    config = transformers.MistralConfig(**settings)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    )
    assert cli.main(arguments(tmp_path / "m", text, tmp_path / "e.safetensors")) == 2
    assert "attends to a sliding window" in capsys.readouterr().err
    assert not (tmp_path / "e.work").exists()


def test_a_rehearsal_needs_a_configuration_only(tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    words = ["learn", "--model", str(tmp_path), "--rehearse", "1", "--sequences", "1"]
    words += ["--tokens", "300", "--steps", "2", "--bits", "32", "--queries", "40"]
    assert cli.main([*words, "--device", "cpu", "--work", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "measured: 1 of 2 layers, 2 sequences of 300 tokens" in told
    assert "extrapolated to 2 layers" in told
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert cli.main([*words, "--rehearse", "0"]) == 2
    assert cli.main(["learn", "--model", str(tiny), "--dataset", "python"]) == 2
    assert "--out: got none" in capsys.readouterr().err
