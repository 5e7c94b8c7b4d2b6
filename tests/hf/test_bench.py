"""What the benchmark of whole models runs, counts and writes; not how fast."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import hata
from hata import cli
from hata.bench import generation
from hata.bench.generation import DENSE, EAGER, HASH, OWN, STATIC, Step

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    generate = importlib.import_module("benchmarks.generate")
finally:
    del sys.path[0]

SELECTION = hata.Selection(bits=64, k=16, dense_layers=0)


@pytest.mark.parametrize("way", generation.WAYS)
def test_every_way_takes_its_steps(fresh, monkeypatch, way):
    model = fresh("llama")
    attached = []
    attach = hata.hf.attach

    def watched(*args, **kwargs):
        attached.append(attach(*args, **kwargs))
        return attached[-1]

    monkeypatch.setattr(hata.hf, "attach", watched)
    step = generation.measure(model, way, 2, 100, SELECTION, steps=6)
    assert step.way == way
    assert 0 < step.ms < 1e3 * step.first + 1e-9
    hashed = [layer.hashed for one in attached for layer in one.report().layers]
    assert hashed == {OWN: [], DENSE: [0] * 3}.get(way, [6] * 3)
    assert (step.codes > 0) == (way in (HASH, STATIC, EAGER))
    assert "_hata_handle" not in vars(model.get_decoder())


def test_the_table_compares_with_what_there_is():
    steps = [Step(OWN, 80.0, 1.0, 1.0), Step(DENSE, 20.0, 1.0, 1.0), Step(HASH, 5.0, 1.0, 1.0)]
    head, *rows = generation.rows(steps, 8)
    assert [row[head.index(f"x {OWN}")] for row in rows] == ["1.00", "4.00", "16.00"]
    assert [row[head.index("tokens/s")] for row in rows] == ["100.0", "400.0", "1600.0"]
    _, row = generation.rows(steps[2:], 8)
    assert row[head.index(f"x {DENSE}")] == "-"


def test_a_way_that_needs_too_much_memory_is_left_out(monkeypatch):
    def measure(model, way, *args, **more):
        if way == DENSE:
            raise torch.OutOfMemoryError
        return Step(way, 1.0, 1.0, 1.0)

    monkeypatch.setattr(generation, "measure", measure)
    told = []
    found = generation.compare(None, [OWN, DENSE, HASH], 1, 100, SELECTION, told.append)
    assert [step.way for step in found] == [OWN, HASH]
    assert told[1] == f"{DENSE}: out of memory"


def test_the_command_measures_a_model(fresh, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    fresh("llama").save_pretrained(tmp_path / "m")
    written, drawn = tmp_path / "figures.json", tmp_path / "plot.svg"
    arguments = ["bench", "--model", str(tmp_path / "m"), "--context", "200", "--bits", "64", "--k",
                 "16", "--json", str(written), "--plot", str(drawn)]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 x 200 keys, 64 bits, k 16" in out
    assert [step["way"] for step in json.loads(written.read_text())] == [OWN, DENSE, HASH]
    assert drawn.stat().st_size > 1000


def test_models_of_the_repository_are_made(monkeypatch):
    for file in generate.MODELS.glob("*.json"):
        with torch.device("meta"):
            model = generate.build(file.stem, 1, "meta")
        assert len(model.get_decoder().layers) == 1
    assert {name for name, *_ in generate.BARS} <= {f.stem for f in generate.MODELS.glob("*.json")}


def test_targets_are_those_of_the_shape():
    options = generate.parser().parse_args(["8x32K"])
    assert options.shapes == [(8, 32 << 10)]
    steps = [Step(OWN, 80.0, 1.0, 1.0), Step(DENSE, 14.0, 1.0, 1.0), Step(HASH, 8.0, 1.0, 1.0)]
    found = generate.bars(options, 8, 32 << 10, steps)
    assert [(bar.wanted, bar.measured, bar.met) for bar in found] == [
        (6.6, 8.0, False), (12.0, 10.0, False), (2.1, 1.75, False), (5.0, 80 / 14, True),
    ]  # fmt: skip
    assert generate.bars(options, 2, 1024, steps) == []
    options.layers = 2
    assert generate.bars(options, 8, 32 << 10, steps) == []


@pytest.mark.parametrize("wrong", ["8", "x32K", "8x", "0x32K", "8x-1"])
def test_shapes_that_are_none(wrong):
    with pytest.raises((argparse.ArgumentTypeError, SystemExit)):
        generate.parser().parse_args([wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert generate.main(["8x32K"]) == 2
    assert "no GPU is here" in capsys.readouterr().err
