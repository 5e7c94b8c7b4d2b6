"""The tuner: its rules on simulated costs, its worker on bad kernels, its command line for real."""

import contextlib
import json
import math
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

from hata import registry
from hata.errors import BackendUnavailable
from hata.problem import Problem
from hata.profile import Profile
from tune import capture, cost, database, propose, search, session, space, studies
from tune.__main__ import main, parser
from tune.space import Space
from tune.task import make_task
from tune.worker import CRASH, ERROR, HANG, MEMORY, WRONG, CandidateFailed, Failure, Worker

KNOBS = (("threads", ("one", "all")), ("block", (16, 32, 64, 128)), ("split", (1, 2, 4)))
SPACE = Space(KNOBS)
DEFAULT = {"threads": "all", "block": 64, "split": 1}
PROBLEM = Problem(
    op="encode", device="cpu", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)
LIMITS = space.Limits(trials=100, seconds=60, sample_seconds=0.0)


class Simulated:
    """Runs configurations on paper: `us` says how long, `bad` which fail."""

    def __init__(self, us, bad=None, noise=0.0, rounds=15):
        self.us, self.bad = us, bad or (lambda config: None)
        self.noise, self.rounds = noise, rounds
        self.rng = np.random.default_rng(0)
        self.checked = []
        self.expected = []

    def expect(self, configs):
        self.expected += [SPACE.number(config) for config in configs]

    def check(self, config):
        self.checked.append(SPACE.number(config))
        return self.bad(config)

    def race(self, configs, seconds):
        base = np.array([self.us(config) for config in configs], float)
        return (
            base[:, None] * (1 + self.noise * self.rng.standard_normal((len(configs), self.rounds)))
        ).tolist()


def bowl(config):
    """Fastest with all threads, blocks of 32, 4 splits: number 17."""
    return (
        100.0
        * (1 if config["threads"] == "all" else 2)
        * (1 + 0.2 * abs(math.log2(config["block"] / 32)))
        * (1 + 0.1 * abs(math.log2(config["split"] / 4)))
    )


@pytest.fixture
def storage(tmp_path):
    return studies.open_storage(f"sqlite:///{tmp_path}/studies.db")[0]


def tune(storage, evaluator, *, resume=False, **options):
    study = studies.open_study(storage, "s", resume=resume)
    options.setdefault("limits", LIMITS)
    return search.Search(study, SPACE, DEFAULT, evaluator, **options).run()


def test_numbers_and_configurations_are_one_to_one():
    assert SPACE.size == 24
    for number in range(SPACE.size):
        assert SPACE.number(SPACE.config(number)) == number
        assert SPACE.number_at(SPACE.places(number)) == number
    assert SPACE.config(0) == {"threads": "one", "block": 16, "split": 1}
    with pytest.raises(ValueError, match="block"):
        SPACE.number({**DEFAULT, "block": 17})
    assert Space(()).config(0) == {}


def test_the_best_configuration_is_found(storage):
    found = tune(storage, Simulated(bowl))
    assert found.config == {"threads": "all", "block": 32, "split": 4}
    assert found.us.median == 100
    assert found.default_us.median == pytest.approx(bowl(DEFAULT))
    assert found.stopped == "every configuration was measured"


def test_the_default_is_tried_first_and_nothing_twice(storage):
    evaluator = Simulated(bowl)
    tune(storage, evaluator, suggestions=[5, 5, 7])
    assert evaluator.checked[:3] == [SPACE.number(DEFAULT), 5, 7]
    assert sorted(evaluator.checked) == list(range(SPACE.size))


def test_the_search_ends_after_its_trials(storage):
    evaluator = Simulated(bowl)
    limits = space.Limits(trials=9, seconds=60, sample_seconds=0)
    found = tune(storage, evaluator, limits=limits)
    assert found.trials == len(set(evaluator.checked)) == 9


def test_the_search_ends_near_the_floor(storage):
    found = tune(storage, Simulated(bowl), suggestions=[17], floor_us=97.0)
    assert found.stopped == "within 5% of the floor"
    assert found.trials == search.LEAST_TRIALS


def test_a_gain_within_the_noise_is_hardly_ever_believed():
    wrong = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        default, again, *others = 100 * (1 + 0.03 * rng.standard_normal((5, 21)))
        wrong += search.decide(default, again, dict(enumerate(others)), 9)[0] != 9
    assert wrong <= 4


def test_a_search_without_a_gain_keeps_the_default(storage):
    found = tune(storage, Simulated(lambda config: 100.0))
    assert found.config == DEFAULT
    assert found.us == found.default_us


def test_of_equals_the_lowest_number_wins():
    rng = np.random.default_rng(0)

    def samples(us):
        return us * (1 + 0.01 * rng.standard_normal(31))

    others = {9: samples(80.0), 4: samples(80.3), 2: samples(95.0)}
    winner, noise = search.decide(samples(100), samples(100), others, 7)
    assert winner == 4
    assert 0.01 <= noise < 0.05
    assert search.decide(samples(100), samples(100), {2: samples(120.0)}, 7)[0] == 7
    assert search.decide(samples(100), samples(100), {}, 7)[0] == 7


def test_a_default_unlike_itself_makes_noise():
    base = [100.0] * 15
    winner, noise = search.decide(base, [120.0] * 15, {1: [90.0] * 15}, 0)
    assert winner == 0
    assert noise == pytest.approx(0.2)


def test_fault_58_failures_are_typed_recorded_and_never_chosen(storage):
    kinds = {16: WRONG, 17: HANG, 5: CRASH, 6: MEMORY}

    def bad(config):
        kind = kinds.get(SPACE.number(config))
        return Failure(kind, "planted") if kind else None

    seen = []
    found = tune(
        storage, Simulated(bowl, bad), on_trial=lambda n, best, failure: seen.append(failure)
    )
    assert {number: failure.kind for number, failure in found.failures.items()} == kinds
    assert SPACE.number(found.config) not in kinds
    assert len([failure for failure in seen if failure]) == 4
    study = studies.open_study(storage, "s", resume=True)
    recorded = [trial.user_attrs["result"]["failure"] for trial in study.trials]
    assert [WRONG, "planted"] in recorded
    assert all(set(trial.constraints) == {"failed"} for trial in study.trials)


def test_fault_58_a_failing_default_is_an_answer(storage):
    with pytest.raises(search.DefaultFailed, match="wrong_result: planted"):
        tune(storage, Simulated(bowl, lambda config: Failure(WRONG, "planted")))


def test_fault_58_one_that_fails_in_the_last_race_is_dropped(storage):
    class Late(Simulated):
        failing = False

        def race(self, configs, seconds):
            if len(configs) > 2 and any(SPACE.number(c) == 17 for c in configs):
                self.failing = True
                raise CandidateFailed(Failure(CRASH, "late"))
            return super().race(configs, seconds)

        def check(self, config):
            late = self.failing and SPACE.number(config) == 17
            return Failure(CRASH, "late") if late else None

    found = tune(storage, Late(bowl))
    assert found.failures[17].kind == CRASH
    assert found.config == SPACE.config(16)


def test_fault_57_an_interrupted_search_goes_on(storage):
    class Interrupted(Simulated):
        def check(self, config):
            if len(self.checked) == 4:
                raise KeyboardInterrupt
            return super().check(config)

    first = Interrupted(bowl)
    with pytest.raises(KeyboardInterrupt):
        tune(storage, first)
    second = Simulated(bowl)
    found = tune(storage, second, resume=True)
    assert not set(first.checked) & set(second.checked)
    assert sorted(first.checked + second.checked) == list(range(SPACE.size))
    assert found.config == SPACE.config(17)
    third = Simulated(bowl)
    assert tune(storage, third, resume=True) == found
    assert not third.checked
    # Without --resume a new run begins beside the old one.
    fourth = Simulated(bowl)
    tune(storage, fourth)
    assert len(fourth.checked) == 24


def test_fault_57_a_killed_trial_is_run_again_but_not_for_ever(tmp_path, storage):
    """The process dies inside one configuration, every time."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        import test_tune as t
        class Deadly(t.Simulated):
            def check(self, config):
                if t.SPACE.number(config) == 17:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().check(config)
        storage = t.studies.open_storage(sys.argv[1])[0]
        t.tune(storage, Deadly(t.bowl), resume=True, suggestions=[17])
        """
    )
    url = f"sqlite:///{tmp_path}/studies.db"
    here = str(Path(__file__).parent)
    for _ in range(studies.RETRIES + 1):
        done = subprocess.run([sys.executable, "-c", script, url, here], check=False)
        assert done.returncode == -signal.SIGKILL
    evaluator = Simulated(bowl)
    found = tune(storage, evaluator, resume=True)
    # The others were measured before, by the second process.
    assert not evaluator.checked
    assert found.failures[17].kind == CRASH
    assert found.config == SPACE.config(16)


@pytest.mark.parametrize("damage", ["torn", "garbage", "page"])
def test_fault_57_a_damaged_database_is_moved_aside(tmp_path, damage):
    file = tmp_path / "studies.db"
    url = f"sqlite:///{file}"
    storage, message = studies.open_storage(url)
    assert not message
    tune(storage, Simulated(bowl), limits=space.Limits(6, 60, 0))
    storage.engine.dispose()
    data = bytearray(file.read_bytes())
    if damage == "torn":
        data = data[: len(data) // 2 + 100]
    elif damage == "garbage":
        data = bytearray(b"not a database " * 100)
    else:
        data[8192:16384] = b"\xff" * 8192
    file.write_bytes(data)
    # SQLite looks for a journal first, and throws a torn one away.
    (tmp_path / "studies.db-journal").write_bytes(b"torn")
    if damage == "garbage":
        # Whose file it is, nobody can tell any more, unless by its place.
        with pytest.raises(database.StorageError, match="was left as it is"):
            studies.open_storage(url)
    storage, message = studies.open_storage(url, ours=True)
    assert "studies.db.bad" in message
    assert (tmp_path / "studies.db.bad").read_bytes() == bytes(data)
    assert tune(storage, Simulated(bowl)).config == SPACE.config(17)
    file.write_bytes(b"broken again" * 100)
    storage.engine.dispose()
    assert "studies.db.bad2" in studies.open_storage(url, ours=True)[1]


TABLES = {
    "other tables": "CREATE TABLE notes (text)",
    "a table of that name": "CREATE TABLE studies (student)",
    "a view": "CREATE VIEW one AS SELECT 1",
}


@pytest.mark.parametrize("kind", ["text", "zeros", *TABLES])
def test_a_file_of_something_else_is_no_storage(small, tmp_path, capsys, kind):
    file = tmp_path / "notes"
    if kind in TABLES:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute(TABLES[kind])
            connection.commit()
    else:
        file.write_bytes({"text": b"mine\n", "zeros": bytes(5000)}[kind])
    before = file.read_bytes()
    words = ["--gpu", "cpu", "--out", str(tmp_path / "p.yaml"), "--storage", str(file)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told == (
        f"hata tune: error: --storage: {file} is no database of studies, and was left as it is; "
        "name another file, or a new one\n"
    )
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_file_that_nobody_can_read_is_left_alone(tmp_path):
    file = tmp_path / "notes"
    data = b"SQLite format 3\0" + b"\xff" * 5000
    file.write_bytes(data)
    with pytest.raises(database.StorageError, match=r"too damaged to tell .* left as it is"):
        studies.open_storage(f"sqlite:///{file}")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [data]


def test_a_locked_file_of_something_else_is_told(tmp_path, monkeypatch):
    file = tmp_path / "notes"
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *_, **more: connect(*_, **more | {"timeout": 0}))
    with contextlib.closing(connect(file)) as connection:
        connection.execute("CREATE TABLE notes (text)")
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(database.StorageError, match="has been locked by another program"):
            studies.open_storage(f"sqlite:///{file}")


@pytest.mark.parametrize("name", ["a?b.db", "a#b%20c.db", "{a} ?.db"])
def test_a_path_is_no_url(tmp_path, name):
    (tmp_path / "a").write_text("mine")
    url = database.storage_url(str(tmp_path / name), tmp_path)
    assert database.storage_url(None, tmp_path / name) == url
    assert database.sqlite_path(url) == tmp_path / name
    for _ in range(2):
        storage, message = studies.open_storage(url)
        assert not message
        studies.open_study(storage, "s", resume=True)
        storage.engine.dispose()
    assert {path.name for path in tmp_path.iterdir()} == {"a", name}
    assert (tmp_path / "a").read_text() == "mine"


def test_a_busy_database_is_not_damaged(tmp_path):
    file = tmp_path / "studies.db"
    studies.open_storage(f"sqlite:///{file}")[0].engine.dispose()
    connection = sqlite3.connect(file)
    connection.execute("BEGIN IMMEDIATE")
    assert studies.open_storage(f"sqlite:///{file}")[1] == ""
    connection.close()


def test_a_sweep_evaluates_each_point_once(storage):
    points = [{"layer": layer, "bits": bits} for layer in range(3) for bits in (64, 128)]
    seen = []

    def evaluate(point):
        seen.append(dict(point))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return {"value": 1.0, "constraints": {"quality": -0.1}, "sum": point["layer"]}

    with pytest.raises(KeyboardInterrupt):
        studies.sweep(studies.open_study(storage, "q", resume=True), points, evaluate)
    found = studies.sweep(studies.open_study(storage, "q", resume=True), points, evaluate)
    assert [result["sum"] for result in found] == [0, 0, 1, 1, 2, 2]
    assert len(seen) == 7


# A third-party backend, installed by its entry point, with one good and several bad configurations.

BAD_BACKEND = """
import ctypes, os, time
import numpy as np
from hata.backend import Backend

class Bad(Backend):
    name = "bad"
    frameworks = frozenset({"numpy"})
    dtypes = frozenset({"float32"})

    def tunables(self, op, problem):
        return {"how": ("slow", "fast", "wrong", "crash", "raise", "memory", "hang")}

    def default(self, problem):
        return {"how": os.environ.get("BAD_DEFAULT", "slow")}

    def unsupported(self, problem):
        return [] if problem.op == "encode" else ["only encode"]

    def encode(self, call):
        x, projection, how = call.x, call.projection, call.config["how"]
        if how == "crash":
            ctypes.string_at(0)
        if how == "raise":
            raise RuntimeError("planted failure")
        if how == "memory":
            raise MemoryError("planted")
        if how == "hang":
            time.sleep(1000)
        if how == "slow":
            end = time.perf_counter() + 0.02
            while time.perf_counter() < end:
                pass
        group = x.shape[1] // projection.shape[0]
        bits = x @ projection.repeat(group, axis=0) > 0
        codes = np.packbits(bits, axis=-1, bitorder="little")
        if how == "wrong":
            codes[..., -1] ^= 1
        return codes

    hamming_topk = sparse_attend = encode
"""


@pytest.fixture
def bad_backend(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "bad_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "bad_backend.py").write_text(BAD_BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hata.backends]\nbad = bad_backend:Bad\n")
    monkeypatch.syspath_prepend(str(site))
    yield site
    registry.reset()
    sys.modules.pop("bad_backend", None)


@pytest.mark.parametrize("method", ["unsupported", "kernel_hash", "tunables"])
def test_a_plug_in_that_fails_is_left_out(bad_backend, method):
    failing = f"    def {method}(self, *given): raise SystemExit(3)\n"
    (bad_backend / "bad_backend.py").write_text(BAD_BACKEND + failing)
    task = make_task(parser().parse_args(["--gpu", "cpu", "--quick"]))
    assert [backend.name for backend in task.backends] == ["numba"]
    (told,) = [note for note in task.notes if "'bad'" in note]
    assert "SystemExit: 3" in told
    with pytest.raises(BackendUnavailable, match="SystemExit: 3"):
        make_task(parser().parse_args(["--gpu", "cpu", "--quick", "--backend", "bad"]))


def test_fault_58_the_worker_survives_every_candidate(bad_backend):
    with Worker("bad", first_seconds=60, check_seconds=8) as worker:
        assert worker.check(PROBLEM, {"how": "fast"}) is None
        found = {
            how: worker.check(PROBLEM, {"how": how})
            for how in ("wrong", "crash", "raise", "memory")
        }
        assert {how: failure.kind for how, failure in found.items()} == {
            "wrong": WRONG,
            "crash": CRASH,
            "raise": ERROR,
            "memory": MEMORY,
        }
        assert "bits of codes are wrong" in found["wrong"].detail
        assert "SIGSEGV" in found["crash"].detail
        assert "planted failure (bad_backend.py:" in found["raise"].detail
        assert worker.restarts == 2
        assert worker.check(PROBLEM, {"how": "fast"}) is None
        assert worker.check(PROBLEM, {"how": "hang"}).kind == HANG
        samples = worker.race([(PROBLEM, {"how": h}) for h in ("slow", "fast")], 0.1)
        assert np.median(samples[0]) > np.median(samples[1])
        with pytest.raises(CandidateFailed, match="crash"):
            worker.race([(PROBLEM, {"how": h}) for h in ("fast", "crash")], 0.1)


def test_fault_58_a_bad_backend_is_tuned_to_its_good_configuration(
    bad_backend, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(space, "problems", lambda *args, **kwargs: [PROBLEM])
    monkeypatch.setitem(session._CHECK_SECONDS, "cpu", 5.0)
    out = tmp_path / "p.yaml"
    arguments = ["--gpu", "cpu", "--backend", "bad", "--quick", "--out", str(out)]
    arguments += ["--storage", str(tmp_path / "s.db")]
    assert main(arguments) == 0
    (entry,) = Profile.load(out).entries
    assert entry.config == {"how": "fast"}
    assert entry.us.median < entry.default_us
    told = capsys.readouterr().err
    for kind in (WRONG, CRASH, ERROR, MEMORY, HANG):
        assert kind in told


def test_fault_58_a_backend_whose_default_fails_is_told(bad_backend, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAD_DEFAULT", "wrong")
    monkeypatch.setattr(space, "problems", lambda *args, **kwargs: [PROBLEM])
    out = tmp_path / "p.yaml"
    arguments = ["--gpu", "cpu", "--backend", "bad", "--quick", "--out", str(out)]
    assert main([*arguments, "--storage", str(tmp_path / "s.db")]) == 1
    assert "the default fails, wrong_result" in capsys.readouterr().err
    assert not out.exists()


# The command line.


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HATA_CACHE", str(tmp_path / "cache"))
    assert main(["--gpu", "cpu", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "hash_attend" in told
    assert "not written" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quality", "1.5"], "--quality: got 1.5"),
        (["--quality", "nan"], "--quality: got nan"),
        (["--trials", "0"], "--trials: got 0"),
        (["--budget", "-1"], "--budget: got -1"),
        (["--backend", "tritn"], "Did you mean 'triton'"),
        (["--backend", "cupy"], "cannot run here"),
        (["--storage", "sqlite://"], "--storage: got sqlite://, which names no file"),
        (["--storage", "sqlite:///:memory:"], "which names no file"),
        (["--storage", "sqlite:///file::memory:?uri=true"], "give the path of the file"),
        (["--storage", "sqlite:///file:/tmp/p.db?uri=true"], "give the path of the file"),
        (["--storage", "sqlite:///{here}.db"], "storage: sqlite:///{here}.db cannot be opened"),
        (["--out", "/proc/p.yaml"], "--out: /proc/p.yaml cannot be written"),
        (["--out", "/tmp/../p.yaml"], "--out: got '/tmp/../p.yaml', expected a file path without"),
        (["--model", "/nowhere", "--text", "x"], "--model: got /nowhere"),
        (["--model", "/nowhere"], "--text: got none"),
        (["--text", "x"], "no --model"),
        (["--gpu", "a100"], "--gpu auto"),
        (["--storage", "postgresql://nobody@127.0.0.1:1/x"], "storage:"),
        (["--storage", "nonsense://x"], "storage:"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, expected, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "p.yaml")]
    base = [] if "--gpu" in arguments else ["--gpu", "cpu"]
    assert main([*base, *arguments, *out]) == 2
    told = capsys.readouterr()
    assert expected in told.err
    assert told.err.startswith("hata tune: error: ")
    assert len(told.err.strip().splitlines()) == 1
    assert not told.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--gpu", "--storage", "--backend"])
def test_an_empty_value_is_not_one_left_out(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, "", "--dry-run"])
    assert stop.value.code == 2
    assert f"error: argument {option}: got an empty value" in capsys.readouterr().err


def test_devices_in_capitals_and_all_backends(small, capsys):
    assert main(["--gpu", "CPU", "--backend", "auto", "--dry-run"]) == 0
    assert " numba " in capsys.readouterr().out


def test_an_interruption_while_optuna_is_loaded(monkeypatch, capsys):
    class Cut:
        def find_spec(self, name, path=None, target=None):
            if name == "tune.session":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "tune.session")
    monkeypatch.delattr("tune.session")
    monkeypatch.setattr(sys, "meta_path", [Cut(), *sys.meta_path])
    assert main(["--gpu", "cpu"]) == 130
    assert capsys.readouterr().err.startswith("hata tune: interrupted; ")


def test_another_gpu_is_refused_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr("hata.device.has_cuda", lambda: False)
    assert main(["--gpu", "h200", "--dry-run"]) == 2
    told = capsys.readouterr().err
    for part in ("no GPU", "--gpu auto", "HATA_PROFILE"):
        assert part in told


def test_fault_54_an_output_that_leaves_the_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "work" / "p.yaml").symlink_to(tmp_path / "outside" / "p.yaml")
    for out in ("../outside/x.yaml", "link/x.yaml", "p.yaml", "../../etc/x"):
        assert main(["--gpu", "cpu", "--out", out]) == 2
        assert "--out: " in capsys.readouterr().err
    assert not list((tmp_path / "outside").iterdir())


def test_fault_54_a_foreign_profile_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "p.yaml"
    out.write_text("schema: hata.profile/2\n")
    assert main(["--gpu", "cpu", "--quick", "--out", str(out)]) == 2
    assert "hata.profile/1" in capsys.readouterr().err
    assert out.read_text() == "schema: hata.profile/2\n"


@pytest.fixture
def small(monkeypatch):
    """One small problem in place of the grid."""
    layout = space.Layout("tiny", "synthetic", 2, 4, 2, 16, "float32", 4096)
    problem = space.Grid(layout, "cpu").step("float32", 64, 512, 32)
    monkeypatch.setattr(space, "COMMON", layout)
    monkeypatch.setattr(space, "problems", lambda *args, **kwargs: [problem])
    monkeypatch.setattr(capture, "TOKENS", 1024)
    return problem


@pytest.mark.slow
def test_a_short_run_writes_a_profile_and_its_path(small, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HATA_CACHE", str(cache))
    arguments = ["--gpu", "cpu", "--quick", "--trials", "3"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    last = told.out.splitlines()[-1]
    written = Profile.load(last)
    assert last == str(next(cache.glob("profiles/*.yaml")))
    (entry,) = written.entries
    assert entry.key == small
    assert entry.us.median <= entry.default_us
    assert "hata.use_profile" in told.out
    (selections,) = written.selections
    assert selections.source == "synthetic"
    assert selections.quality.achieved >= 0.95
    backend = registry.load("numba")
    match = written.lookup(
        "numba",
        backend.kernel_hash("hash_attend"),
        small,
        backend.tunables("hash_attend", small),
    )
    assert match.reason == "exact"

    assert main([*arguments, "--resume"]) == 0
    assert Profile.load(last).entries == written.entries


def test_the_problems_are_those_that_calls_ask_for():
    """A key in the profile must be the `Problem` of a real call."""
    from hata import checks
    from hata.measure.inputs import Inputs

    backend = registry.load("numba")
    layout = space.Layout("tiny", "synthetic", 2, 4, 2, 16, "bfloat16", 4096)
    for problem in space.problems(space.Grid(layout, "cpu", True), ["float32", "float16"]):
        assert checks.check(Inputs(backend, problem, pool=0).sets[0]).problem == problem


def test_the_model_ranks_threads_and_floors_are_floors():
    machine = cost.Machine(bandwidth=10e3, flops=100e3, launch_us=10, workers=8)
    problem = space.Grid(space.COMMON, "cpu").step("float32", 128, 32768, 512)
    one = cost.predict_us(problem, {"threads": "one", "chunk": 4096}, machine)
    every = cost.predict_us(problem, {"threads": "all", "chunk": 4096}, machine)
    assert cost.floor_us(problem, machine) < every < one
    assert cost.work(problem).read == 8 * 32768 * 16 + 8 * 512 * 256 * 4 + 8 * 128 * 128 * 4
    configs = Space((("threads", ("one", "all")), ("chunk", (1024, 4096))))
    default = {"threads": "one", "chunk": 1024}
    first = propose.suggestions(problem, configs, machine, default)[0]
    assert configs.config(first)["threads"] == "all"


@pytest.mark.slow
def test_sigkill_and_resume_measure_nothing_twice(tmp_path):
    """The whole program, killed in the middle of its search."""
    script = textwrap.dedent(
        """
        import sys
        from tune import capture, space
        from tune.__main__ import main
        layout = space.Layout("tiny", "synthetic", 2, 4, 2, 16, "float32", 4096)
        problem = space.Grid(layout, "cpu").step("float32", 64, 512, 32)
        space.COMMON = layout
        space.problems = lambda *args, **kwargs: [problem]
        capture.TOKENS = 1024
        if __name__ == "__main__":
            raise SystemExit(main(sys.argv[1:]))
        """
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    database, out = tmp_path / "s.db", tmp_path / "p.yaml"
    command = [sys.executable, str(program), "--gpu", "cpu", "--quick", "--trials", "30"]
    command += ["--storage", str(database), "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(results(database)) < 4:
        assert first.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "it measured nothing"
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = results(database)
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    after = results(database)
    assert after[: len(before)] == before
    numbers = [result["number"] for result in after]
    assert len(set(numbers)) == 30
    # What stands twice was told from memory: the same samples.
    assert len({json.dumps(result) for result in after}) == 30
    assert done.stdout.splitlines()[-1] == str(out)
    assert len(Profile.load(out).entries) == 1


def results(database):
    """Results in a database, in the order of their trials, of finished trials only."""
    if not database.exists():
        return []
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20) as connection:
            rows = connection.execute(
                "select value_json from trial_user_attributes a join trials t using (trial_id) "
                "join studies s using (study_id) where a.key = 'result' and t.state = 'COMPLETE' "
                "and s.study_name like '%/hash_attend/%' order by t.number"
            ).fetchall()
    except sqlite3.OperationalError:
        return []
    return [json.loads(text) for (text,) in rows]
