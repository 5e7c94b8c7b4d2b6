"""Profiles: strict reading, safe writing, the look-up rule, the look-up order."""

import dataclasses
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hata import Selection, device
from hata.device import Fingerprint
from hata.errors import HataDeviceError, ProfileError
from hata.problem import Problem
from hata.profile import (
    EncoderKey,
    Entry,
    Measured,
    ModelKey,
    Profile,
    ProfileWarning,
    Quality,
    SelectionSet,
    Timing,
    _log_once,
    _warn_once,
    default_output,
    find,
    named_path,
    resolve,
    safe_output,
    schema,
    store,
)

SHA = "0e5" * 21 + "f"
HERE = Fingerprint("cpu", "Test CPU", 4, kernels={"numba": {"hash_attend": SHA}})
KNOBS = {"block": (64, 128, 256), "unroll": (1, 2, 4), "variant": ("a", "b"), "wide": (False, True)}
CONFIG = {"block": 128, "unroll": 2, "variant": "a", "wide": True}
MEASURED = Measured("2026-11-21", "perf_counter", 50, True, 1.8, 150, 0)
MODEL = ModelKey("codelm", "llama", 3, 8, 2, 128)
SELECTION = Selection(bits=128, k=64, ratio=0.0625, sink=4, recent=16)


def problem(**fields):
    """A decode step of an 8B model; `fields` replace some of it."""
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128, "bits": 128}
    common = {"op": "hash_attend", "device": "cpu", "dtype": "float32", "k": 512, "slots": 32768}
    return Problem(**{**common, "projection_dtype": "float32", **sizes, **fields})


def entry(config=CONFIG, median=10.0, **fields):
    """An entry for `problem(**fields)`."""
    times = Timing(median, median - 0.5, median + 0.5)
    return Entry("numba", problem(**fields), config, times, 2 * median)


def selections(name="codelm", layers=(None, SELECTION, SELECTION), source="measured"):
    """Selections of a model of three layers."""
    model = replace(MODEL, name=name)
    return SelectionSet(model, EncoderKey("random", 256, 0), source, Quality(0.9, 0.93), layers)


def profile(*entries, here=HERE, sets=(), **fields):
    """A profile of this made-up machine."""
    return Profile(here, replace(MEASURED, **fields), entries, tuple(sets))


def look_up(found, here=HERE, sha=SHA, knobs=KNOBS, refuse=None, **fields):
    """Look `problem(**fields)` up."""
    return found.lookup("numba", sha, problem(**fields), knobs, refuse=refuse, here=here)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """Each test has its own cache folder and hears each warning anew."""
    monkeypatch.setenv("HATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HATA_PROFILE", raising=False)
    _log_once.cache_clear()
    _warn_once.cache_clear()


@pytest.fixture
def file(tmp_path):
    """A sound profile with two entries and one model."""
    path = tmp_path / "p.yaml"
    profile(entry(), entry(slots=131072, k=2048), sets=[selections()]).save(path)
    return path


def line_of(text, words):
    """Number of the first line of `text` that holds `words`."""
    return next(i for i, line in enumerate(text.splitlines(), 1) if words in line)


# Reading and writing


def test_what_is_written_is_read_back(file):
    found = Profile.load(file)
    assert found.entries == (entry(), entry(slots=131072, k=2048))
    assert found.selections == (selections(),)
    assert (found.fingerprint, found.measured, found.path) == (HERE, MEASURED, file)


def test_the_file_is_sorted_minimal_and_stable(file):
    before = file.read_text()
    assert profile(entry(slots=131072, k=2048), entry(), sets=[selections()]).save(file)
    assert file.read_text() == before
    assert "per_head" not in before
    assert "hata.use_profile" in before
    assert sorted(p.name for p in file.parent.iterdir() if p.suffix == ".tmp") == []


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30) | st.sampled_from(
    ["no", "on", "1e3", "12:30:45", "010", "0x1F", "1_000", ".5", "~", "null", "<<", "=", "580.15",
     "2026-11-21", "a: b", "# c", "- d", "*e", "&f", "!!g", "{h}", "%i", "'j", '"k', "  l  ", ""]
)  # fmt: skip


@given(
    words=st.lists(WORDS, min_size=4, max_size=4),
    config=st.dictionaries(
        st.sampled_from(["block", "x", "no", "1e3"]),
        st.integers(1, 1 << 20) | st.booleans() | WORDS,
    ),
    median=st.floats(0, 1e9),
    seed=st.none() | st.integers(0, 1 << 53),
)
def test_any_words_and_numbers_survive_a_round_trip(words, config, median, seed):
    median = round(median, 3)
    here = Fingerprint("cpu", words[0], 4, driver=words[1], versions={words[2]: words[3]})
    here = replace(here, kernels={"numba": {"hash_attend": SHA}})
    one = replace(entry(), config=config, us=Timing(median, median, median))
    chosen = replace(selections(), encoder=EncoderKey(words[1], 256, seed))
    written = profile(one, here=here, sets=[chosen])
    assert Profile(*schema.read(written.text(), "p.yaml")) == written


def test_hashes_look_alike_whatever_they_begin_with():
    for sha in ("e22ca930" * 8, "460e2889" * 8, "1234567890" * 6 + "1234"):
        here = Fingerprint("cpu", "CPU", 4, kernels={"numba": {"hash_attend": sha}})
        assert f"\n      hash_attend: '{sha}'\n" in profile(here=here).text()


def test_one_selection_may_stand_for_all_layers(tmp_path):
    whole = selections(layers=SELECTION)
    assert profile(sets=[whole]).save(tmp_path / "p.yaml").selections == (whole,)


HOSTILE = {
    "python tag": "schema: !!python/object/apply:os.system ['touch pwned']",
    "tag": "schema: !!str hata.profile/1",
    "alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "recursive alias": "&a [*a]",
    "merge key": "schema: hata.profile/1\n<<: {x: 1}",
    "deep flow": "[" * 100_000,
    "deep flow tables": "{a: " * 50_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(100)),
    "5 MB": "a" * 5_000_000,
    "two documents": "schema: hata.profile/1\n---\nschema: hata.profile/1",
    "no text": "\0\1\2",
    "not UTF-8": b"schema: hata.profile/1\n\xff\xfe",
    "not YAML": "schema: [",
    "tab": "schema: hata.profile/1\n\tx: 1",
    "empty": "",
    "a comment": "# nothing",
    "a scalar": "hata.profile/1",
    "a list": "[schema]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_fault_50_hostile_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = HOSTILE[name]
    path = tmp_path / "p.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProfileError, match=r"p\.yaml"):
        Profile.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.yaml"]


def test_fault_50_size_is_checked_before_parsing(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "read", lambda *_: pytest.fail("parsed"))
    (tmp_path / "p.yaml").write_text("a" * (store.MAX_BYTES + 1))
    with pytest.raises(ProfileError, match="1,000,001 bytes, expected at most 1,000,000"):
        Profile.load(tmp_path / "p.yaml")


def test_fault_50_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", tmp_path, "/dev/zero"):
        with pytest.raises(ProfileError, match="no plain file"):
            Profile.load(path)
    with pytest.raises(ProfileError, match="No such file"):
        Profile.load(tmp_path / "absent.yaml")


# What to replace in the sound file, by what, and what the message must say.
WRONG = {
    "duplicate key": ("  seed: 0", "  seed: 0\n  seed: 1", "duplicate key 'seed', first on line"),
    "unknown key": ("trials: ", "trails: ", "unknown key 'trails'; did you mean 'trials'?"),
    "unknown key at the top": ("schema: ", "bogus: 1\nschema: ", ": unknown key 'bogus'; known: "),
    "unknown key of an entry": ("config: {", "confg: {", "did you mean 'config'?"),
    "unknown field of a problem": ("heads: 32", "heds: 32", "did you mean 'heads'?"),
    "missing key": ("  method: perf_counter\n", "", "measured: method missing"),
    "no as a string": ("device: cpu\n", "device: no\n", "got no, expected a string"),
    "yes as a bool": ("cold_cache: true", "cold_cache: yes", "got yes, expected true or false"),
    "on as a bool": ("wide: true", "wide: on", "got on, expected an integer, true, false"),
    "no as a knob": ("variant: a", "variant: no", "got no, expected"),
    "1e3 as a number": ("default_us: 20.0", "default_us: 1e3", "got 1e3, expected a number"),
    "1e3 as an integer": ("repeats: 50", "repeats: 1e3", "got 1e3, expected a decimal integer"),
    "1e3 as a string": ("method: perf_counter", "method: 1e3", "got 1e3, expected a string"),
    "sexagesimal": ("trials: 150", "trials: 2:30", "got 2:30, expected a decimal integer"),
    "octal": ("repeats: 50", "repeats: 050", "got 050, expected"),
    "hexadecimal": ("repeats: 50", "repeats: 0x32", "got 0x32, expected"),
    "underscore": ("slots: 32768", "slots: 32_768", "got 32_768, expected"),
    "quoted number": ("k: 512", "k: '512'", "got '512', expected"),
    "bool as a number": ("k: 512", "k: true", "got true, expected"),
    "infinity": ("default_us: 20.0", "default_us: .inf", "got .inf, expected"),
    "nothing": ("noise_pct: 1.8", "noise_pct: ", "got nothing, expected"),
    "unquoted date": ("date: '2026-11-21'", "date: 2026-11-21", "expected a string"),
    "list for a table": ("versions: {}", "versions: []", "got a list, expected a table"),
    "table for a word": ("variant: a", "variant: {a: b}", "got a table, expected"),
    "block 0": ("block: 128", "block: 0", "expected an integer from 1"),
    "block too large": ("block: 128", "block: 999999999", "expected an integer from 1"),
    "unknown op": ("op: hash_attend", "op: hash_atend", "did you mean 'hash_attend'?"),
    "odd slots": ("slots: 32768", "slots: 32767", "a power of two"),
    "bits": ("key: {device: cpu", "key: {bits: 33, device: cpu", None),
    "budget": ("sink: 4", "sink: 400", "expected at most k = 64"),
    "quality": ("required: 0.9,", "required: 9.0,", "a number from 0 to 1"),
    "source": ("source: measured", "source: guessed", "one of 'measured', 'synthetic'"),
    "layers": ("layers: 3", "layers: 4", "got 3, expected 4"),
    "encoder too small": ("bits: 256", "bits: 64", "at most the encoder's 64"),
    "times": ("p10: 9.5", "p10: 10.1", "p10 <= median <= p90"),
    "another device": ("key: {device: cpu", "key: {device: cuda", "a profile is for one device"),
    "no day": ("date: '2026-11-21'", "date: yesterday", "ISO 8601"),
    "heads": ("heads: 32", "heads: 33", "33 heads for"),
    "head size": ("head_dim: 128", "head_dim: 129", "got head size 129"),
    "dtype of another op": ("dtype: float32", "dtype: uint8", "uint8 is hamming_topk's alone"),
    "no kernel hash": ("    hash_attend: '", "    encode: '", "numba.hash_attend"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fault_51_doubtful_text_is_an_error_with_its_line(name, file):
    old, new, message = WRONG[name]
    sound = file.read_text()
    assert old in sound
    file.write_text(sound.replace(old, new, 1))
    with pytest.raises(ProfileError, match=r"p\.yaml:\d+: ") as caught:
        Profile.load(file)
    assert message is None or message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["duplicate key", "unknown key", "unknown field of a problem", "no as a string", "octal",
     "1e3 as a number", "block 0", "quality"],
)  # fmt: skip
def test_fault_51_the_line_is_exact(name, file):
    old, new, _ = WRONG[name]
    text = file.read_text().replace(old, new, 1)
    file.write_text(text)
    words = new.strip().splitlines()[-1]
    with pytest.raises(ProfileError, match=f":{line_of(text, words)}: "):
        Profile.load(file)


def test_an_entry_or_a_model_that_stands_twice_is_refused():
    with pytest.raises(ProfileError, match="the same key as the entry on line"):
        schema.read(profile(entry(), entry(median=3.0)).text(), "p.yaml")
    one = (
        "{op: hash_attend, backend: numba, key: {device: cpu, dtype: float32}, config: {}, "
        "us: {median: 1.0, p10: 1.0, p90: 1.0}, default_us: 1.0}"
    )
    text = profile(entry()).text()
    on_one_line = re.sub(r"(?s)entries:.*?(?=selections)", f"entries: [{one}, {one}]\n", text)
    with pytest.raises(ProfileError, match="the same key as the entry on line"):
        schema.read(on_one_line, "p.yaml")
    with pytest.raises(ProfileError, match="stands twice"):
        schema.read(profile(sets=[selections(), selections()]).text(), "p.yaml")


# Look-up


def test_an_exact_entry_serves():
    found = look_up(profile(entry(slots=1024), entry()))
    assert (found.config, found.entry, found.reason) == (CONFIG, entry(), "exact")


def test_the_nearest_entry_in_log2_space_serves():
    near, far = entry(slots=8192, median=1.0), entry(slots=131072, median=2.0)
    assert look_up(profile(far, near), slots=16384).entry == near
    assert look_up(profile(far, near), slots=65536).entry == far
    assert look_up(profile(entry(k=500), entry(k=1100)), k=760).entry == entry(k=1100)
    assert "k 1100 for 760" in look_up(profile(entry(k=1100)), k=760).reason


def test_a_neighbour_serves_only_where_it_beat_the_default():
    slow = replace(entry(), default_us=entry().us.median)
    assert look_up(profile(slow)).config == CONFIG
    found = look_up(profile(slow), slots=2 * slow.key.slots)
    assert (found.config, found.entry) == (None, slow)
    assert "the default is best there" in found.reason


def test_a_neighbour_serves_only_where_it_is_near():
    slots = entry().key.slots
    assert look_up(profile(entry()), slots=4 * slots).config == CONFIG
    found = look_up(profile(entry()), slots=4 * slots, k=2 * entry().key.k)
    # Nor does its time say anything of the problem.
    assert (found.config, found.entry) == (None, None)
    assert "too far" in found.reason


def test_of_equally_near_entries_the_first_serves():
    low, high = entry(k=300), entry(k=1200)
    assert look_up(profile(low, high), k=600).entry == low
    assert look_up(profile(high, low), k=600).entry == high


@pytest.mark.parametrize(
    "change",
    [
        {"op": "sparse_attend"}, {"dtype": "bfloat16"}, {"projection_dtype": "bfloat16"},
        {"heads": 64}, {"kv_heads": 32}, {"head_dim": 64}, {"value_dim": 64}, {"bits": 256},
        {"norms": True}, {"per_head": True}, {"aligned": False}, {"wide": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_hard_fields_are_never_crossed(change):
    found = look_up(profile(entry()), **change)
    assert found.config is None
    assert "no entry" in found.reason


def test_a_changed_kernel_refuses_the_entry_and_says_how_to_renew_it(tmp_path):
    found = profile(entry()).save(tmp_path / "p.yaml")
    with pytest.warns(ProfileWarning, match="kernels of hash_attend have changed") as caught:
        assert look_up(found, sha="f" * 64)[:2] == (None, None)
    out = tmp_path / "p.yaml"
    assert f"hata tune --gpu cpu --backend numba --out {out}" in str(caught[0].message)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({**CONFIG, "block": 3}, "block=3 is not allowed here"),
        ({**CONFIG, "warps": 7}, "warps is no knob"),
        ({**CONFIG, "unroll": True}, "unroll=True is not allowed here"),
        ({**CONFIG, "wide": 1}, "wide=1 is not allowed here"),
        ({k: v for k, v in CONFIG.items() if k != "wide"}, "wide is missing"),
    ],
)
def test_fault_52_a_config_outside_the_space_is_refused_with_one_warning(config, why):
    found = profile(entry(config))
    with pytest.warns(ProfileWarning, match=why):
        assert look_up(found).config is None
    # A second warning would be an error here.
    assert look_up(found).config is None


def test_fault_52_a_config_over_a_joint_limit_is_refused():
    with pytest.warns(ProfileWarning, match="needs 300 KB of shared memory"):
        found = look_up(profile(entry()), refuse=lambda config: "needs 300 KB of shared memory")
    assert found.config is None
    assert look_up(profile(entry()), refuse=lambda config: None).config == CONFIG


GPU = Fingerprint("cuda", "NVIDIA H200", 132, sm=90, driver="580.159", cuda="13.0",
                  kernels={"numba": {"hash_attend": SHA}})  # fmt: skip


def test_fault_53_a_profile_for_another_sm_is_ignored_with_the_reason():
    found = profile(entry(device="cuda"), here=GPU)
    assert look_up(found, here=GPU, device="cuda").config == CONFIG
    with pytest.warns(ProfileWarning, match=r"it is for .*sm_90.*, this is .*sm_80"):
        got = look_up(found, here=replace(GPU, sm=80), device="cuda")
    assert got.config is None
    assert "sm_90" in got.reason


def test_fault_53_a_profile_for_a_gpu_is_ignored_without_one(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    with pytest.warns(ProfileWarning, match=r"it is for NVIDIA H200 .*, not for cpu; no GPU"):
        assert look_up(profile(entry(device="cuda"), here=GPU)).config is None


@pytest.mark.parametrize("line", ["schema: hata.profile/2", "schema: other/1", "schem: x"])
def test_fault_53_another_schema_is_never_overwritten(line, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(line + "\nunheard_of: [1]\n")
    with pytest.raises(ProfileError, match=r"p\.yaml:1: .*hata\.profile/1.* left as it is"):
        profile(entry()).save(path)
    assert path.read_text() == line + "\nunheard_of: [1]\n"


@pytest.mark.parametrize("change", [{"name": "Other"}, {"cores": 8}])
def test_fault_53_another_device_is_never_overwritten(change, file):
    before = file.read_bytes()
    with pytest.raises(ProfileError, match="choose another file"):
        profile(entry(), here=replace(HERE, **change)).save(file)
    assert file.read_bytes() == before


def test_fault_53_a_cached_file_of_another_schema_is_ignored_with_a_warning():
    path = default_output()
    path.parent.mkdir(parents=True)
    path.write_text("schema: hata.profile/2\n")
    with pytest.warns(ProfileWarning, match=r"profile ignored: .*:1: schema: got hata.profile/2"):
        assert find("cpu") is None
    assert find("cpu") is None
    assert path.read_text() == "schema: hata.profile/2\n"


def test_soft_differences_are_logged_once_and_used(caplog):
    caplog.set_level(logging.INFO, "hata.profile")
    found = profile(entry(), here=replace(HERE, versions={"numba": "0.1"}))
    here = replace(HERE, name="Another CPU", versions={"numba": "0.2"})
    for _ in range(2):
        assert look_up(found, here=here).config == CONFIG
    assert len(caplog.records) == 1
    assert "numba was 0.1, is 0.2" in caplog.text
    assert "name was Test CPU, is Another CPU" in caplog.text


def test_selections_are_found_by_model_then_by_sizes_then_synthetic():
    mine, twin = selections(), selections("finetune")
    made_up = replace(
        selections("any", SELECTION, "synthetic"), model=ModelKey("any", "any", 1, 1, 1, 64)
    )
    found = profile(sets=[made_up, twin, mine])
    assert found.selection_for(MODEL) == mine
    assert found.selection_for(replace(MODEL, name="new")) == twin
    assert found.selection_for(replace(MODEL, layers=4)) == made_up
    assert profile(sets=[mine]).selection_for(replace(MODEL, layers=4)) is None


# Places


@pytest.mark.parametrize("path", ["../../etc/x", "../x.yaml", "a/../../x.yaml", "/tmp/../x.yaml"])
def test_fault_54_an_output_with_dots_is_refused(path, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ProfileError, match=r"without '\.\.'"):
        profile(entry()).save(path)
    with pytest.raises(ProfileError):
        Profile.load(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_fault_54_a_link_out_of_the_folder_is_refused(tmp_path, monkeypatch):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    monkeypatch.chdir(root)
    (root / "folder").symlink_to(outside)
    (root / "file.yaml").symlink_to(outside / "file.yaml")
    for path in ("folder/p.yaml", "file.yaml", root / "file.yaml"):
        with pytest.raises(ProfileError, match="link"):
            profile(entry()).save(path)
    assert list(outside.iterdir()) == []
    assert safe_output(root / "folder" / "p.yaml").parent == root / "folder"


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "a/b", "a" * 65, "", "a b", "x\n", "é"])
def test_fault_54_a_name_never_leaves_the_cache_folder(name):
    with pytest.raises(ProfileError, match="profile name"):
        named_path(name)


def test_fault_54_a_link_in_the_cache_folder_does_not_lead_out(tmp_path):
    root = tmp_path / "cache" / "profiles"
    root.mkdir(parents=True)
    (root / "x.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(ProfileError, match="is a link to"):
        named_path("x")


def test_fault_54_an_output_must_be_a_plain_file(tmp_path):
    for path in (tmp_path, "/dev/null", "/"):
        with pytest.raises(ProfileError, match="output"):
            profile(entry()).save(path)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert named_path("x") == tmp_path / "cache" / "profiles" / "x.yaml"
    assert named_path("x.yaml") == named_path("x")
    monkeypatch.delenv("HATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_root() == tmp_path / "xdg" / "hata"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_root() == tmp_path / "home" / ".cache" / "hata"


def test_the_look_up_order(monkeypatch, tmp_path):
    here = replace(device.fingerprint("cpu"), kernels=HERE.kernels)
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(store, "SHIPPED", shipped)
    assert find("cpu") is None

    profile(here=here).save(shipped / f"{here.slug}.yaml")
    assert find("cpu").origin == "shipped"
    profile(here=here).save(default_output(here))
    assert find("cpu").origin == "user cache"
    assert find("cpu").path == default_output(here)

    profile().save(tmp_path / "p.yaml")
    monkeypatch.setenv("HATA_PROFILE", str(tmp_path / "p.yaml"))
    assert (find("cpu").origin, find("cpu").path) == ("HATA_PROFILE", tmp_path / "p.yaml")
    profile().save(named_path("mine"))
    monkeypatch.setenv("HATA_PROFILE", "mine")
    assert find("cpu").path == named_path("mine") == resolve("mine")
    monkeypatch.setenv("HATA_PROFILE", "none")
    assert find("cpu") is None
    monkeypatch.setenv("HATA_PROFILE", str(tmp_path / "absent.yaml"))
    with pytest.raises(ProfileError, match=r"HATA_PROFILE: .*absent"):
        find("cpu")


def test_the_fingerprint_of_this_machine():
    here = device.fingerprint("cpu")
    assert (here.device, here.sm) == ("cpu", None)
    assert here.cores >= 1
    assert here.versions["numpy"]
    assert named_path(here.slug)
    for wrong in ("gpu", "cuda:x", "cpu0"):
        with pytest.raises(HataDeviceError, match="expected 'cpu', 'cuda'"):
            device.fingerprint(wrong)


@pytest.mark.parametrize(
    ("kind", "name", "slug"),
    [
        ("cuda", "NVIDIA H200", "nvidia-h200-8"),
        ("cpu", "AMD EPYC 9654 96-Core Processor", "cpu-amd-epyc-9654-8"),
        ("cpu", "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "cpu-intel-core-i7-9750h-8"),
        ("cpu", "../../etc/" + "x" * 99, "cpu-etc-" + "x" * 40 + "-8"),
    ],
)
def test_a_device_has_a_slug_that_is_a_safe_name(kind, name, slug):
    assert Fingerprint(kind, name, 8).slug == slug
    assert named_path(slug)


@pytest.mark.gpu
def test_the_fingerprint_of_a_gpu_agrees_with_torch():
    import torch

    here, known = device.fingerprint("cuda"), torch.cuda.get_device_properties(0)
    assert device.has_cuda()
    assert here.name == known.name
    assert (here.cores, here.sm) == (known.multi_processor_count, known.major * 10 + known.minor)
    assert here.smem_optin == known.shared_memory_per_block_optin
    assert here.driver
    assert here.cuda


# Writing together


def test_a_merge_replaces_equal_keys_and_keeps_the_others(file):
    better = entry(median=5.0)
    merged = profile(better, entry(k=64), sets=[selections("other")]).save(file)
    assert {e.us.median for e in merged.entries} == {5.0, 10.0}
    assert len(merged.entries) == 3
    assert [found.model.name for found in merged.selections] == ["codelm", "other"]
    assert merged == Profile.load(file)


def test_a_merge_drops_entries_of_kernels_that_have_changed(file):
    here = replace(HERE, kernels={"numba": {"hash_attend": "f" * 64}})
    merged = profile(entry(k=64), here=here).save(file)
    assert [e.key.k for e in merged.entries] == [64]


def test_predictions_and_measurements_do_not_mix(tmp_path):
    path = tmp_path / "p.yaml"
    profile(entry(), predicted=True).save(path)
    assert Profile.load(path).measured.predicted
    assert look_up(Profile.load(path)).config == CONFIG
    assert [e.key.k for e in profile(entry(k=64)).save(path).entries] == [64]
    with pytest.raises(ProfileError, match="was measured, the new one is predicted"):
        profile(entry(), predicted=True).save(path)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ProfileError, match="expected an integer from 1"):
        profile(entry({"block": 0})).save(tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()


def start(code, *args):
    """Run `code` in a process that has `profile`, `entry` and `path` at hand."""
    fields = json.dumps([dataclasses.asdict(HERE), dataclasses.asdict(MEASURED)])
    prelude = f"""
        import json, os, resource, signal, sys
        from hata.device import Fingerprint
        from hata.problem import Problem
        from hata.profile import Entry, Measured, Profile, Timing
        here, measured = json.loads({fields!r})
        path = sys.argv[1]

        def profile(k):
            key = Problem("hash_attend", "cpu", "float32", k=k)
            entry = Entry("numba", key, {{"block": 64}}, Timing(1.0, 1.0, 1.0), 2.0)
            return Profile(Fingerprint(**here), Measured(**measured), (entry,))
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_fault_55_six_writers_lose_nothing(tmp_path):
    path = tmp_path / "p.yaml"
    code = "for k in range(12): profile(100 * int(sys.argv[2]) + k).save(path)"
    writers = [start(code, path, i) for i in range(6)]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 6, errors
    keys = {e.key.k for e in Profile.load(path).entries}
    assert keys == {100 * i + k for i in range(6) for k in range(12)}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_fault_55_a_killed_writer_leaves_the_old_file(moment, file):
    before = file.read_bytes()
    code = f"""
        from pathlib import Path
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "fsync":
            os.fsync = die
        else:
            Path.replace = die
        profile(7).save(path)
    """
    writer = start(code, file)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert file.read_bytes() == before
    assert len(list(file.parent.glob(".p.yaml.*.tmp"))) == 1

    # The lock died with its owner, and the next writer clears what it left.
    profile(entry(k=7)).save(file)
    assert len(Profile.load(file).entries) == 3
    assert list(file.parent.glob(".p.yaml.*.tmp")) == []


def test_fault_55_a_full_disk_leaves_the_old_file(file):
    before = file.read_bytes()
    code = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        profile(7).save(path)
    """
    writer = start(code, file)
    errors = writer.communicate()[1]
    assert writer.returncode == 1
    assert "cannot be written (File too large), what was there is unchanged" in errors
    assert file.read_bytes() == before
    assert list(file.parent.glob(".p.yaml.*.tmp")) == []


def test_fault_55_a_disk_that_fills_at_sync_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match="No space left on device"):
        profile(entry(k=7)).save(file)
    assert file.read_bytes() == before


def test_a_lock_that_is_never_released_is_named(file, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0)
    with filelock.FileLock(f"{file}.lock"), pytest.raises(ProfileError, match=r"p\.yaml\.lock"):
        profile(entry()).save(file)


def test_a_profile_that_would_grow_too_large_is_not_written(file, monkeypatch):
    monkeypatch.setattr(store, "MAX_BYTES", file.stat().st_size + 10)
    before = file.read_bytes()
    with pytest.raises(ProfileError, match="would grow beyond"):
        profile(entry(k=7)).save(file)
    assert file.read_bytes() == before


def test_a_look_up_without_faults_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look_up(profile(entry())).config == CONFIG
        assert look_up(profile()).config is None


@pytest.mark.parametrize("given", ["~no-such-user/p.yaml", "a\0b.yaml", 3, b"x", {}])
def test_what_is_no_path(given):
    with pytest.raises(ProfileError, match="path: got"):
        Profile.load(given)
