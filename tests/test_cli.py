"""The `hata` command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hata
from hata import Selection, cli, device, registry
from hata.device import Fingerprint
from hata.problem import Problem
from hata.profile import (
    EncoderKey,
    Entry,
    Measured,
    ModelKey,
    Profile,
    Quality,
    SelectionSet,
    Timing,
    default_output,
    store,
)

HERE = Fingerprint("cpu", "Test CPU", 4, kernels={"numba": {"encode": "ab" * 32}})
KEY = Problem("encode", "cpu", "float32", "float32", heads=8, kv_heads=8, head_dim=128, bits=128)
ENTRY = Entry("numba", KEY, {"block": 64}, Timing(10.0, 9.0, 11.0), 25.0)
LAYER = Selection(bits=128, k=64)
MODEL = SelectionSet(
    ModelKey("codelm", "llama", 3, 8, 2, 128),
    EncoderKey("random", 256, 0),
    "measured",
    Quality(0.9, 0.93),
    (None, LAYER, LAYER),
)
PROFILE = Profile(
    HERE, Measured("2026-11-21", "perf_counter", 50, True, 1.8, 150, 0), (ENTRY,), (MODEL,)
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """No profile is found unless a test puts one there."""
    monkeypatch.setenv("HATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HATA_PROFILE", raising=False)


@pytest.fixture
def file(tmp_path):
    """A sound profile."""
    return str(PROFILE.save(tmp_path / "a.yaml").path)


def run(capsys, *arguments):
    """Exit status, what was printed, and the errors."""
    status = cli.main(arguments)
    return status, *capsys.readouterr()


def test_info_says_what_can_run_and_what_is_in_force(capsys):
    status, text, _ = run(capsys, "info")
    assert status == 0
    assert text.startswith(f"hata {hata.__version__}, Python ")
    names = "numpy", "numba", "reference", "triton", "cupy"
    for words in (*names, "in force: auto", "HATA_PROFILE"):
        assert words in text
    assert device.fingerprint("cpu").describe() in text
    assert f"none, defaults; hata tune writes {default_output(device.fingerprint())}" in text


def test_info_for_machines(capsys, monkeypatch):
    monkeypatch.setenv("HATA_SOMETHING", "1")
    facts = json.loads(run(capsys, "info", "--json")[1])
    assert facts["packages"]["numpy"]
    assert facts["packages"].keys() >= {"torch", "triton", "optuna"}
    assert {one["name"] for one in facts["backends"]} >= {"numba", "reference", "triton", "cupy"}
    assert all(one["available"] or one["reason"] for one in facts["backends"])
    assert facts["devices"][0]["slug"] == device.fingerprint().slug
    assert facts["environment"]["HATA_SOMETHING"] == "1"


def test_info_names_the_profile_in_force_and_where_it_came_from(capsys, monkeypatch, tmp_path):
    here = replace(device.fingerprint("cpu"), kernels=HERE.kernels)
    found = replace(PROFILE, fingerprint=here).save(default_output(here))
    assert f"{found.path} (user cache, 1 entry, 1 model)" in run(capsys, "info")[1]

    gpu = Fingerprint("cuda", "NVIDIA H200", 132, sm=90)
    other = replace(PROFILE, fingerprint=gpu, entries=()).save(tmp_path / "gpu.yaml")
    monkeypatch.setenv("HATA_PROFILE", str(other.path))
    assert "not used, it is for NVIDIA H200 (sm_90, 132 SMs)" in run(capsys, "info")[1]
    monkeypatch.setenv("HATA_PROFILE", "none")
    assert "none (HATA_PROFILE=none), defaults" in run(capsys, "info")[1]
    monkeypatch.setenv("HATA_PROFILE", str(tmp_path / "absent.yaml"))
    status, text, _ = run(capsys, "info")
    assert (status, "profile: error: HATA_PROFILE: " in text) == (0, True)


def test_info_says_what_in_the_environment_cannot_be_followed(capsys, monkeypatch):
    assert json.loads(run(capsys, "info", "--json")[1])["errors"] == []
    monkeypatch.setenv("HATA_BACKEND", "bogus")
    monkeypatch.setenv("HATA_CHECK", "maybe")
    registry.reset()
    try:
        status, text, _ = run(capsys, "info")
    finally:
        monkeypatch.undo()
        registry.reset()
    assert status == 0
    assert "  error: HATA_BACKEND: backend: got 'bogus', expected one of 'auto'" in text
    assert "  error: HATA_CHECK: got 'maybe', expected one of 1, true" in text


def test_show_prints_tables(capsys, file):
    status, text, _ = run(capsys, "profile", "show", file)
    assert status == 0
    for words in ("Test CPU (4 cores)", "block=64", "2.50x", "10.0", "9.0-11.0", "1-2"):
        assert words in text
    assert "keeps 93.0% of exact top-k, 90.0% was asked" in text
    assert "predicted" not in text


def test_show_flags_predictions(capsys, tmp_path):
    predicted = replace(PROFILE, measured=replace(PROFILE.measured, predicted=True))
    path = predicted.save(tmp_path / "p.yaml").path
    assert "These times were predicted by a model" in run(capsys, "profile", "show", str(path))[1]


def test_show_without_a_file_shows_the_profile_in_force(capsys, file, monkeypatch):
    assert "no profile is in force" in run(capsys, "profile", "show")[1]
    monkeypatch.setenv("HATA_PROFILE", file)
    assert run(capsys, "profile", "show")[1].startswith(file)


def test_validate_exits_with_1_and_the_line(capsys, file, tmp_path):
    assert run(capsys, "profile", "validate", file)[:2] == (0, f"{file}: ok, 1 entry, 1 model\n")
    bad = tmp_path / "bad.yaml"
    bad.write_text("schema: hata.profile/1\nfingerprnt: 1\n")
    status, text, errors = run(capsys, "profile", "validate", str(bad), file)
    assert (status, ": ok" in text) == (1, True)
    assert f"{bad}:2: " in errors
    assert "did you mean 'fingerprint'?" in errors


def test_a_name_that_the_terminal_cannot_show_is_escaped(file, tmp_path):
    other = tmp_path / "\N{GREEK SMALL LETTER ALPHA}.yaml"
    other.write_bytes(Path(file).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "hata.cli", "profile", "validate", str(other)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert b"\\u03b1.yaml: ok" in done.stdout


def test_changed_kernels_are_told(capsys, tmp_path, monkeypatch):
    sources = registry.class_of("numba")().kernel_hash("encode")
    kernels = {"numba": {"encode": sources}, "absent": {"encode": sources}}
    here = replace(device.fingerprint("cpu"), kernels=kernels)
    plug_in = replace(ENTRY, backend="absent")
    current = replace(PROFILE, fingerprint=here, entries=(ENTRY, plug_in))
    old = replace(current, fingerprint=replace(here, kernels={**kernels, **HERE.kernels}))
    for profile, message in (
        (current, ""),
        (
            old,
            "the numba kernels of encode have changed since, so entries of them (1) are "
            "not used; tune anew with: hata tune --gpu cpu --backend numba --out",
        ),
    ):
        path = tmp_path / f"{bool(message)}.yaml"
        profile.save(path)
        status, text, errors = run(capsys, "profile", "validate", str(path))
        assert (status, text) == (0, f"{path}: ok, 2 entries, 1 model\n")
        assert errors.startswith(f"{path}: warning: {message}" if message else errors)
        assert bool(errors) == bool(message)
        assert run(capsys, "profile", "show", str(path))[::2] == (0, errors)
        monkeypatch.setenv("HATA_PROFILE", str(path))
        text = run(capsys, "info")[1]
        assert str(path) in text
        assert ("have changed since" in text) == bool(message)
        assert message in text


def test_a_shipped_profile_is_not_to_be_written(capsys, file, monkeypatch):
    path = Path(file)
    assert PROFILE.retune("numba") == "hata tune --gpu cpu --backend numba"
    found = Profile.load(path)
    assert found.retune("numba").endswith(f" --backend numba --out {path}")
    monkeypatch.setattr(store, "SHIPPED", path.parent.resolve())
    assert found.retune("numba") == PROFILE.retune("numba")


@pytest.mark.parametrize(
    "command", ["info", "check", "learn", "eval", "convert", "profile", "tune"]
)
def test_every_command_says_what_it_is_for(capsys, monkeypatch, command):
    # `hata tune` runs it as a program of its own.
    monkeypatch.delitem(sys.modules, "tune.__main__", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    usage, said = capsys.readouterr().out.split("\n\n")[:2]
    assert usage.startswith(f"usage: hata {command} ")
    assert said.strip().endswith(".")


def test_python_runs_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hata", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"hata {hata.__version__}\n"


def test_diff_says_what_changed(capsys, file, tmp_path):
    assert run(capsys, "profile", "diff", file, file)[:2] == (0, "no difference\n")
    other = replace(
        PROFILE,
        fingerprint=replace(HERE, kernels={"numba": {"encode": "cd" * 32}}, cores=8),
        entries=(
            replace(ENTRY, config={"block": 128}, us=Timing(5.0, 5.0, 5.0)),
            replace(ENTRY, key=replace(KEY, tokens=8)),
        ),
        selections=(replace(MODEL, layers=(None, LAYER, replace(LAYER, k=32))),),
    )
    path = str(other.save(tmp_path / "b.yaml").path)
    status, text, _ = run(capsys, "profile", "diff", file, path)
    assert status == 1
    assert text.splitlines()[:2] == ["cores: 4 -> 8", "kernel numba encode: sources differ"]
    assert "10.0 -> 5.0 us (0.50x), block 64 -> 128" in text
    assert "+ numba encode" in text
    assert "tokens=8" in text
    assert "    layer 2: bits=128 k=64 -> bits=128 k=32" in text


def test_a_fault_in_a_file_is_one_line_and_no_traceback(capsys, tmp_path):
    status, text, errors = run(capsys, "profile", "show", str(tmp_path / "absent.yaml"))
    assert (status, text) == (1, "")
    assert errors.startswith("hata profile: error: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [""],
        ["profile"],
        ["profile", "show", "a", "b"],
        ["profile", "show", ""],
        ["convert", "a", "--config", "b", "--out", ""],
        ["tun"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_tune_is_the_tuner_with_all_its_arguments(monkeypatch, tmp_path):
    (tmp_path / "tuner").mkdir()
    (tmp_path / "tuner" / "__init__.py").touch()
    (tmp_path / "tuner" / "__main__.py").write_text(
        "import sys\nassert __name__ == '__main__'\nsys.exit(sys.argv[1:] != ['--help', '-x'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "_TUNER", "tuner")
    before = list(sys.argv)
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--help", "-x"])
    assert caught.value.code == 0
    assert sys.argv == before


def test_tune_without_the_tuner_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_TUNER", "absent_tuner")
    status, _, errors = run(capsys, "tune")
    assert (status, "pip install" in errors) == (2, True)


def test_profile_commands_import_no_framework(file):
    code = (
        "import sys; from hata.cli import main; status = main(sys.argv[1:]); "
        "print(sorted({'torch', 'triton', 'cupy', 'jax', 'optuna', 'transformers', 'tune'} "
        "& sys.modules.keys())); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "profile", "validate", file],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
