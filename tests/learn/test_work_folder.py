"""Folders of `hata learn`: what is deleted, what is refused, who may use one, what is damaged."""

import errno
import json
import shutil
import subprocess
import sys

import filelock
import numpy as np
import pytest
import torch
import transformers

from hata import cli
from hata.calibration import recorder
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.hf.models import LATENT
from hata.learn import capture, folders
from hata.learn.plan import Capture
from hata.learn.weights import fingerprint


@pytest.fixture
def learn(tiny, text, tmp_path, monkeypatch, capsys):
    """Run in an empty folder: options as written -> status and what was told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.py").write_text(text.read_text())

    def run(words="", *, model=tiny):
        options = ["--model", str(model), "--text", "text.py", "--sequences", "2"]
        options += ["--tokens", "256", "--queries", "64", "--steps", "2", "--device", "cpu"]
        status = cli.main(["learn", *options, "--bits", "32", *words.split()])
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return status, told

    return run


@pytest.fixture
def other(tiny, tmp_path):
    """Another model in a folder of the same name, of the same sizes."""
    folder = tmp_path / "other" / tiny.name
    shutil.copytree(tiny, folder)
    config = transformers.AutoConfig.from_pretrained(tiny)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "words",
    [
        "--out w/enc.safetensors --work w",
        "--out e.safetensors --work w --plot w/deep/p.png",
        "--out w/../w/enc.safetensors --work ../{here}/w",
    ],
)
def test_what_is_written_is_not_deleted_with_the_working_folder(learn, tmp_path, words):
    status, told = learn(words.format(here=tmp_path.name))
    assert status == 2
    assert "lies inside the working folder" in told
    assert files(tmp_path) == ["text.py"]


@pytest.mark.parametrize("mark", ['{"tasks": []}', "", "3", "[" * 100000, '{"format": {}}'])
@pytest.mark.parametrize("option", ["--work", "--capture"])
def test_a_folder_of_something_else_stays_as_it_is(learn, tmp_path, option, mark):
    (tmp_path / "project" / "layers").mkdir(parents=True)
    (tmp_path / "project" / "layers" / "layer_000.safetensors").write_text("mine")
    (tmp_path / "project" / "plan.json").write_text(mark)
    for more in ("", " --resume"):
        status, told = learn(f"--out e.safetensors {option} project{more}")
        assert status == 2
        assert f"{option}: got project, which holds files of something else" in told
    assert files(tmp_path / "project") == ["layers/layer_000.safetensors", "plan.json"]


def test_only_what_trainings_wrote_is_deleted(learn, tmp_path):
    work = tmp_path / "w"
    assert learn("--out e.safetensors --work w --keep")[0] == 0
    mine = ["capture/layer_000/notes.txt", "layers/layer_0.txt", "notes.txt"]
    for name in mine:
        (work / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sequence_000.safetensors").write_text("mine")
    (work / "capture" / "layer_007").symlink_to(tmp_path / "elsewhere")
    # Without a mark of its own what was captured is still known as ours, and not used.
    (work / "capture" / "plan.json").write_text("")
    assert learn("--out e.safetensors --work w")[0] == 0
    assert files(work) == mine
    assert learn("--out e.safetensors --work w")[0] == 2
    assert files(tmp_path / "elsewhere") == ["sequence_000.safetensors"]


def test_a_kept_capture_is_never_deleted(learn, tmp_path):
    assert learn("--out e.safetensors --capture cap")[0] == 0
    kept = files(tmp_path / "cap")
    assert len(kept) == 10
    status, told = learn("--out e.safetensors --work cap")
    assert status == 2
    assert "of another kind" in told
    for words in ("--work w --capture w/cap", "--work cap --capture cap", "--work cap/w"):
        words += "" if "--capture" in words else " --capture cap"
        status, told = learn(f"--out e.safetensors {words}")
        assert status == 2
        assert "neither lies inside the other" in told
    assert files(tmp_path / "cap") == kept


def test_a_link_to_a_working_folder_is_followed_and_stays(learn, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "w").symlink_to("disk")
    (tmp_path / "gone").symlink_to("nowhere")
    assert learn("--out e.safetensors --work w")[0] == 0
    assert (tmp_path / "w").is_symlink()
    status, told = learn("--out e.safetensors --work gone")
    assert status == 2
    assert "--work: gone cannot be used" in told


@pytest.mark.parametrize("option", ["--work", "--capture"])
def test_a_folder_in_use_is_refused(learn, tmp_path, option):
    assert learn(f"--out e.safetensors {option} d --keep")[0] == 0
    before = files(tmp_path)
    for more in ("", " --resume"):
        with filelock.FileLock(tmp_path / "d" / folders.LOCK):
            status, told = learn(f"--out e.safetensors {option} d{more}")
        assert status == 2
        assert f"{option}: d is in use by another run" in told
        (tmp_path / "d" / folders.LOCK).unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "e.work", ignore_errors=True)
    assert [name for name in before if "e.work" not in name] == files(tmp_path)


def test_a_lock_that_a_killed_run_left_holds_nobody_off(learn, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / folders.LOCK).write_text("")
    (tmp_path / "w" / "plan.part17").write_text("")
    assert learn("--out e.safetensors --work w")[0] == 0
    assert not (tmp_path / "w").exists()


def test_another_model_of_the_same_name_is_refused(learn, tiny, other):
    assert learn("--out a.safetensors --capture cap --work w --keep")[0] == 0
    for words in ("--capture cap", "--work w --resume --capture cap"):
        status, told = learn(f"--out b.safetensors {words}", model=other)
        assert status == 2
        assert told.count("the weights or the config.json of --model are other ones") == 1
    assert fingerprint(tiny) != fingerprint(other)


def test_a_fingerprint_sees_all_parts_of_a_large_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = np.zeros(1 << 20, np.uint8)
    found = set()
    for place in (None, 0, 1 << 19, (1 << 20) - 1):
        changed = weights.copy()
        if place is not None:
            changed[max(place - 9000, 0) : place + 9000] = 1
        changed.tofile(tmp_path / "model.safetensors")
        found.add(fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert len(found | {fingerprint(tmp_path)}) == 5
    with pytest.raises(CaptureError, match="cannot be read"):
        fingerprint(tmp_path / "nowhere")


def test_resuming_says_where_there_is_nothing_and_what_differs(learn):
    status, told = learn("--out e.safetensors --work w --resume --keep")
    assert status == 0
    assert "--resume: nothing to go on with in w; starting anew" in told
    status, told = learn("--out e.safetensors --work w --resume --seed 3")
    assert status == 2
    assert told.count("seed: 0 there, 3 asked") == 1


@pytest.mark.parametrize(
    "name",
    [
        "capture/sequence_001.json",
        "capture/layer_001/sequence_000.safetensors",
        "layers/layer_001.safetensors",
    ],
)
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_file_is_named_and_made_again(learn, tmp_path, name, share):
    assert learn("--out a.safetensors --work w --keep")[0] == 0
    path = tmp_path / "w" / name
    whole = path.read_bytes() if "json" not in name else b"{}{}"
    path.write_bytes(whole[: int(len(whole) * share) + (share > 0)])
    if "capture" in name:
        (tmp_path / "w" / "layers" / "layer_001.safetensors").unlink()
    status, told = learn("--out b.safetensors --work w --resume")
    assert status == 1
    assert f"error: w/{name} is damaged" in told
    assert "delete it" in told
    path.unlink()
    assert learn("--out b.safetensors --work w --resume")[0] == 0
    a, b = (Encoder.load(tmp_path / f"{x}.safetensors") for x in "ab")
    np.testing.assert_array_equal(a.projection(1, 32), b.projection(1, 32))


def test_a_damaged_capture_mark_is_named(learn, tmp_path):
    assert learn("--out a.safetensors --work w --keep")[0] == 0
    (tmp_path / "w" / "capture" / "plan.json").write_text("")
    status, told = learn("--out a.safetensors --work w --resume")
    assert status == 2
    assert "--capture: got w/capture" in told
    assert "plan.json is damaged" in told


def test_a_full_disk_is_said_and_leaves_no_part(learn, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_text("begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(capture, "save_file", full)
    status, told = learn("--out a.safetensors")
    assert status == 1
    assert "sequence_000.safetensors cannot be written (No space left on device)" in told
    assert files(tmp_path / "a.work") == ["capture/plan.json", "plan.json"]


def test_an_interruption_before_there_is_a_folder(learn, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hata.calibration.text.load_config", dies)
    assert learn("--out a.safetensors") == (130, "hata learn: interrupted\n")


def test_an_interruption_while_torch_is_loaded(tmp_path):
    """What is half loaded cannot be loaded again to say what is left."""
    code = (
        "import sys\n"
        "class Cut:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Cut())\n"
        "from hata import cli\n"
        "cli._need_torch = lambda: None\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    (tmp_path / "a.work").mkdir()
    (tmp_path / "a.work" / "plan.json").write_text("{}")
    words = ["learn", "--model", "m", "--text", "t", "--out", "a.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == (
        "hata learn: interrupted; the same command with --resume goes on with what lies in a.work\n"
    )


def broken(tiny, folder, change):
    """The tiny model with other weights in its first layer."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        change(model.model.layers[0].self_attn)
    model.save_pretrained(folder)
    shutil.copy(tiny / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.k_proj.weight[3, 3].fill_(torch.nan), "keys that are NaN"),
        (lambda a: a.q_proj.weight.fill_(torch.inf), "queries that are NaN"),
        (lambda a: a.k_proj.weight[16:].zero_(), "keys that are all zero in KV head 1"),
        (lambda a: a.q_proj.weight.zero_(), "queries that are all zero in KV head 0"),
    ],
)
def test_a_layer_without_numbers_is_named(learn, tiny, tmp_path, change, expected):
    status, told = learn("--out a.safetensors", model=broken(tiny, tmp_path / "m", change))
    assert status == 2
    assert f"layer 0 attends with {expected}" in told


def test_a_model_that_cannot_read_is_refused(learn, monkeypatch):
    """As one is whose configuration names other KV heads than it has."""

    def load_model(*args):
        model = original(*args)
        model.base_model.forward = None
        return model

    original = recorder.load_model
    monkeypatch.setattr(recorder, "load_model", load_model)
    status, told = learn("--out a.safetensors")
    assert status == 2
    assert "--model: LlamaForCausalLM cannot read with its cache" in told


def test_latent_attention_is_refused(learn, latent):
    status, told = learn("--out a.safetensors", model=latent)
    assert status == 2
    assert f"no layer of DeepseekV3ForCausalLM can be hashed: {LATENT}\n" in told


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"num_attention_heads": 0},
        {"hidden_size": "64", "head_dim": None},
        {"num_hidden_layers": [2]},
        {"rope_parameters": 3},
        {"num_key_value_heads": 3},
    ],
)
def test_a_broken_configuration_is_refused(learn, tiny, tmp_path, change):
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "m").mkdir()
    found = 3 if change is None else config | change
    (tmp_path / "m" / "config.json").write_text(json.dumps(found))
    status, told = learn("--out a.safetensors", model=tmp_path / "m")
    assert status == 2
    assert told.startswith("hata learn: error: --")
    assert told.count("\n") == 1


def test_kinds_of_folders_differ(tmp_path):
    plan = Capture("m", "w", "s", "t", 2, 64, 8, 0, 0, "cpu")
    assert not folders.prepare(tmp_path / "c", plan, resume=True, option="--capture")
    assert folders.prepare(tmp_path / "c", plan, resume=True, option="--capture")
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["format"].startswith("hata.")
