"""Selections: what is captured of a model, what a selection keeps, and which one is chosen."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

import hata
from hata import registry
from hata.calibration.text import read_text
from hata.encoder import Encoder
from hata.profile import Profile
from hata.selection import Selection
from tune import capture, quality, space
from tune.__main__ import main
from tune.capture import CaptureError, Probe
from tune.quality import Point

H, HKV, D, S, T = 4, 2, 16, 96, 8


@pytest.fixture(scope="module")
def backend():
    return registry.load("numba")


@pytest.fixture(scope="module")
def probe():
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((2, H, T, D)).astype(np.float32)
    return Probe(q, rng.standard_normal((2, HKV, S, D)).astype(np.float32), D**-0.5)


@pytest.fixture(scope="module")
def encoder():
    shape = {"num_hidden_layers": 1, "num_attention_heads": H, "num_key_value_heads": HKV}
    return Encoder.random(SimpleNamespace(**shape, head_dim=D), 64, 0)


def attention(probe, b, h, t):
    """Softmax of one query head in float64, over the keys it sees."""
    seen = S - (T - 1 - t)
    keys = probe.keys[b, h * HKV // H, :seen].astype(np.float64)
    logits = probe.scale * keys @ probe.q[b, h, t].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_retained_mass_is_what_a_loop_over_queries_finds(backend, probe, encoder):
    gauge = quality.Gauge(backend, "cpu", probe, encoder, 0)
    found = gauge.point(64, 12, 2, 3)
    group, kept, exact = H // HKV, [], []
    with hata.use_backend("numba"):
        projection = encoder.projection(0)
        codes = [hata.encode(x, projection) for x in (probe.q, probe.keys)]
        indices = hata.hamming_topk(*codes, 12, sink=2, recent=3)
    for b, kv, t in np.ndindex(2, HKV, T):
        heads = range(kv * group, (kv + 1) * group)
        mass = np.mean([attention(probe, b, h, t) for h in heads], axis=0)
        kept.append(mass[indices[b, kv, t]].sum())
        total = sum(probe.keys[b, kv, : len(mass)] @ probe.q[b, h, t] for h in heads)
        exact.append(mass[np.argsort(-total)[:12]].sum())
    assert found.kept == pytest.approx(np.mean(kept), abs=1e-5)
    assert found.exact == pytest.approx(np.mean(exact), abs=1e-5)
    assert 0 < found.quality < 1.2


def test_a_budget_of_all_keys_keeps_all(backend, probe, encoder):
    gauge = quality.Gauge(backend, "cpu", probe, encoder, 0)
    point = gauge.point(32, S, 0, 0)
    assert point.kept == pytest.approx(1, abs=1e-5)
    assert point.quality == pytest.approx(1, abs=1e-5)


def test_key_norms_are_used(backend, probe, encoder):
    with_norms = Encoder(encoder.shape, 64, encoder.projections, (None,), True)
    plain = quality.Gauge(backend, "cpu", probe, encoder, 0).point(64, 12, 0, 0)
    normed = quality.Gauge(backend, "cpu", probe, with_norms, 0).point(64, 12, 0, 0)
    assert plain.kept != normed.kept
    assert plain.exact == normed.exact


def test_queries_may_be_hashed_otherwise(backend, probe, encoder):
    """Several codes per query head behind a hidden layer: the gauge and `hata eval` agree."""
    torch = pytest.importorskip("torch")
    from hata.encoder import Hidden, QueryHash
    from hata.evaluate.mass import hidden_keys
    from hata.evaluate.retained import measure
    from hata.evaluate.selectors import Asked, Coded

    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    query = QueryHash(normal(8, 32, 64), normal(8, 64), (Hidden(normal(8, D, 32), normal(8, 32)),))
    rich = Encoder(encoder.shape, 64, encoder.projections, queries=(query,))
    point = quality.Gauge(backend, "cpu", probe, rich, 0).point(64, 12, 0, 0)
    kept, exact = [], []
    for q, keys in zip(torch.from_numpy(probe.q), torch.from_numpy(probe.keys), strict=True):
        asked = Asked(0, q.unflatten(0, (HKV, -1)), keys, hidden_keys(T, S, keys))
        (found,) = measure(asked, probe.scale, [Coded("rich", rich)], [12]).values()
        kept.append(found[0])
        exact.append(found[1])
    assert point.kept == pytest.approx(np.mean(kept), abs=1e-5)
    assert point.exact == pytest.approx(np.mean(exact), abs=1e-5)


def test_the_synthetic_set_behaves_like_attention(backend):
    captured = capture.synthetic(space.COMMON, sequences=1)
    gauge = quality.Gauge(
        backend,
        "cpu",
        captured.probes[0],
        Encoder.random({"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 128}, 256, 0),
        0,
    )
    few, many = gauge.point(128, 64, 0, 0), gauge.point(128, 1024, 0, 0)
    assert 0.4 < few.exact < 0.9 < many.exact < 1
    assert few.kept < many.kept
    assert gauge.point(64, 64, 0, 0).kept < few.kept < gauge.point(256, 64, 0, 0).kept


def test_the_fastest_point_that_keeps_enough_is_chosen():
    points = [
        Point(64, 64, 0, 0, 0.80, 1.0),
        Point(64, 128, 0, 0, 0.95, 1.0),
        Point(128, 64, 0, 0, 0.96, 1.0),
        Point(128, 64, 4, 28, 0.97, 1.0),
        Point(256, 64, 0, 0, 0.99, 1.0),
    ]
    us = {(64, 64): 10.0, (64, 128): 14.0, (128, 64): 12.0, (256, 64): 12.1}
    assert quality.choose(points, us, 0.95, 0.001) == points[3]
    # Equally fast within the noise: the one that keeps most.
    assert quality.choose(points, us, 0.95, 0.02) == points[4]
    assert quality.choose(points, us, 0.5, 0.02) == points[0]
    assert quality.choose(points, us, 0.995, 0.02) is None


def test_a_selection_grows_with_the_context():
    point = Point(128, 256, 4, 28, 0.9, 0.9)
    selection = quality.selection_of(point, 4096, 32768)
    assert selection == Selection(128, 2048, 1 / 16, 256, 4, 28, dense_layers=0)


def test_text_is_read_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert read_text([str(tmp_path)]) == "first\nsecond"
    for names, expected in (
        ([str(tmp_path / "none")], "cannot be read"),
        ([str(tmp_path / "c.bin")], "is not UTF-8"),
    ):
        with pytest.raises(CaptureError, match=expected):
            read_text(names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match="without text files"):
        read_text([str(tmp_path / "empty")])


def save_tiny(folder, kind="Llama", **changes):
    """Save a random model of two layers that reads bytes."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    settings = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "num_key_value_heads": HKV,
        "head_dim": D,
        "max_position_embeddings": 2048,
        **changes,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_the_captured_queries_and_keys_are_those_of_the_model(tiny):
    """Their softmax is the model's own attention."""
    import torch
    from transformers import AutoModelForCausalLM

    text = "def f(x):\n    return x * 3\n" * 200
    captured = capture.capture(str(tiny), text, device="cpu", sequences=1)
    assert captured.tokens == 2048
    assert not captured.dense
    ids = torch.from_numpy(capture.token_sequences(str(tiny), text, 1, 2048))
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(ids, output_attentions=True).attentions
    for layer, probe in captured.probes.items():
        mass, _ = quality._masses(probe)
        group = expected[layer][0, :, -probe.q.shape[2] :].unflatten(0, (HKV, -1)).mean(1)
        np.testing.assert_allclose(mass[0], group.numpy(), atol=1e-5)


def test_a_model_of_windows_only_is_refused(tmp_path):
    save_tiny(tmp_path, "Mistral", sliding_window=64)
    with pytest.raises(CaptureError, match="attends to a sliding window"):
        capture.capture(str(tmp_path), "some text " * 300, device="cpu", sequences=1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--text": "short.txt"}, "got 10 tokens"),
        ({"--encoder": "none.safetensors"}, "is not a file"),
        ({"--encoder": "other.safetensors"}, "does not fit the model"),
        ({"--text": "none.txt"}, "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    tiny, tmp_path, monkeypatch, capsys, change, expected
):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("ten bytes.")
    Path("long.txt").write_text("long enough " * 400)
    Encoder.random({"num_hidden_layers": 9, "num_attention_heads": 1, "head_dim": 16}, 32).save(
        "other.safetensors"
    )
    options = {
        "--model": str(tiny),
        "--text": "long.txt",
        "--gpu": "cpu",
        "--out": "p.yaml",
    } | change
    assert main([part for pair in options.items() for part in pair]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.strip().splitlines()) == 1
    assert not Path("p.yaml").exists()


def run(model, text, out, storage, *more):
    arguments = ["--gpu", "cpu", "--model", str(model), "--text", str(text), "--out", str(out)]
    return main([*arguments, "--storage", str(storage), "--quick", "--trials", "2", *more])


def test_a_model_gets_a_selection_for_every_layer(tiny, tmp_path, capsys):
    text, out, database = tmp_path / "text.py", tmp_path / "p.yaml", tmp_path / "s.db"
    text.write_text("for i in range(10):\n    print(i, i * i)\n" * 200)
    assert run(tiny, text, out, database, "--budget", "1", "--quality", "0.5") == 0
    written = Profile.load(out)
    (selections,) = written.selections
    assert selections.source == "measured"
    assert selections.model.name == tiny.name
    assert selections.encoder.name == "random"
    assert (selections.encoder.bits, selections.encoder.seed) == (256, 0)
    assert len(selections.layers) == 2
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == str(out)
    assert "quality" in told
    # Nothing reaches a bound that random keys cannot reach with so few of them, and what was
    # measured for the other bound is used again.
    assert run(tiny, text, out, database, "--budget", "1", "--quality", "1", "--resume") == 0
    (stricter,) = Profile.load(out).selections
    assert stricter.quality.required == 1
    assert sum(layer is None for layer in stricter.layers) >= sum(
        layer is None for layer in selections.layers
    )


@pytest.mark.slow
def test_the_main_job_on_a_real_model(model_path, tmp_path, capsys):
    """A real model reads real text: the first layers need more than the middle ones."""
    networkx = pytest.importorskip("networkx")
    text = Path(networkx.__file__).parent / "algorithms"
    out = tmp_path / "p.yaml"
    assert run(model_path, text, out, tmp_path / "s.db", "--budget", "1") == 0
    (selections,) = Profile.load(out).selections
    assert selections.quality.achieved >= 0.95
    hashed = [layer for layer in selections.layers if layer is not None]
    assert len(hashed) >= 6
    assert min(layer.ratio for layer in hashed) <= 1 / 16
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
