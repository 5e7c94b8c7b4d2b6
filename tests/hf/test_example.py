"""The example: what it is asked and cannot do is told in one line."""

import importlib.util
import sys

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hata import registry  # noqa: E402


@pytest.fixture
def example(repo_root, monkeypatch):
    """Run it with some words; returns its exit status."""
    spec = importlib.util.spec_from_file_location("example", repo_root / "examples/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        try:
            return module.main()
        except SystemExit as stop:
            return stop.code
        finally:
            registry.reset()

    run.module = module
    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model", "/nowhere"],
            "--model: got /nowhere, expected a folder with config.json",
        ),
        (["--model", "x", "--device", "bogus"], "--device: got 'bogus', expected cpu"),
        (["--model", "x", "--device", "cuda:99"], "--device: got 'cuda:99', but torch sees"),
        (["--model", "x", "--backend", "nope"], "backend: got 'nope'"),
        (["--model", "x", "--profile", "./nope.yaml"], "nope.yaml: cannot be read"),
        (["--model", "x", "--dtype", "bogus"], "--dtype: invalid choice"),
        (["--model", "x", "--k", "0"], "--k: got 0, expected 1 or more"),
        (["--model", "x", "--ratio", "0"], "--ratio: got 0.0, expected a share"),
        (["--model", ""], "--model: got an empty value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_faults_are_one_line(example, capsys, words, expected):
    assert example(*words) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.splitlines()[-1].startswith("generate.py: error: ")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("model.safetensors", b"torn", "--model: {model} cannot be loaded: "),
        ("tokenizer_config.json", b"{}", "--model: the tokenizer of {model} cannot be loaded: "),
    ],
)
def test_a_broken_model_is_one_line(example, capsys, tmp_path, file, content, expected):
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    capsys.readouterr()
    assert example("--model", str(tmp_path)) == 2
    told = capsys.readouterr().err
    assert told.startswith("generate.py: error: " + expected.format(model=tmp_path))
    assert told.count("\n") == 1


def test_an_interruption_is_one_line(example, capsys, monkeypatch):
    def cut(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(example.module, "load", cut)
    assert example("--model", "x") == 130
    assert capsys.readouterr().err == "interrupted\n"
