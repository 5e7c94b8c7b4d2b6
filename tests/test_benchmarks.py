"""The benchmark, on sizes that take no time: what it checks, computes and writes; not how fast."""

import errno
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import hata
from hata import registry
from hata.measure import clock
from hata.profile import Timing

# Benchmarks are not installed: they are imported from the top of the tree, which is then taken off
# the path again.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    bars, contenders, ops, phases, shapes, tables, verify = (
        importlib.import_module(f"benchmarks.{name}")
        for name in ("bars", "contenders", "ops", "phases", "shapes", "tables", "verify")
    )
finally:
    del sys.path[0]

Shape = shapes.Shape
TINY = Shape(2, 4, 2, 192, head_dim=32, bits=64, budget=24)


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Untuned, on the fast backend of a CPU, with pauses that tests need not sit through."""
    monkeypatch.setenv("HATA_PROFILE", "none")
    monkeypatch.setattr(clock, "SETTLE_S", 0.0)
    monkeypatch.setattr(clock, "BLOCK_CALLS", 2)
    registry.reset()
    threads = torch.get_num_threads()
    with hata.use_backend("numba"), torch.no_grad():
        yield
    torch.set_num_threads(threads)
    registry.reset()


def row(shape, name, family, us, size=1000):
    return bars.Row(shape, name, family, Timing(us, us, us), size)


def rows_of(shape, dense, hashed, scan=1.0):
    return [
        row(shape, "encode", "op", 1.0),
        row(shape, "hamming_topk", "op", shape.code_bytes / 1e3 / scan, shape.code_bytes),
        row(shape, "sparse_attend", "op", 1.0),
        row(shape, "hash_attend", "op", hashed),
        row(shape, "sdpa enable_gqa", "dense", dense * 2),
        row(shape, "sdpa packed", "dense", dense),
        row(shape, "read step", "read", 1.0),
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1x32/8x128K", Shape(1, 32, 8, 131_072)),
        ("4x8/8x1m", Shape(4, 8, 8, 2**20)),
        ("2x4/1x77", Shape(2, 4, 1, 77)),
    ],
)
def test_shape_is_read(spec, expected):
    assert shapes.parse(spec) == expected


@pytest.mark.parametrize("spec", ["", "32K", "1x32/8", "1x32/5x4K", "0x32/8x4K", "1x32/8x4G"])
def test_shape_of_another_form_is_refused(spec):
    with pytest.raises(ValueError, match="1x32/8x128K"):
        shapes.parse(spec)


def test_budget_is_a_share_with_a_floor():
    assert Shape(1, 32, 8, 131_072).k == 2048
    assert Shape(1, 32, 8, 4096).k == 512
    assert Shape(1, 32, 8, 4096, budget=7).k == 7


def test_bytes_of_a_step():
    shape = Shape(1, 32, 8, 131_072, dtype="bfloat16")
    assert shape.code_bytes == 8 * 131_072 * 16
    assert shape.gather_bytes == 8 * 2048 * 2 * 256
    assert shape.dense_bytes == 8 * 131_072 * 2 * 256


def test_names_tell_the_shapes_of_all_suites_apart():
    found = {shape for suite in shapes.SUITES.values() for group in suite for shape in group}
    assert len({shape.name for shape in found}) == len(found)


def test_cpu_suite_answers_every_speed_bar():
    [*found] = (shape for [shape] in shapes.SUITES["cpu"])
    rows = [one for shape in found for one in rows_of(shape, 1.0, 1.0)]
    wanted = [bar for bar, *_ in bars.bars(rows, "cpu")]
    assert len(wanted) == 2 * len(bars.SPEED_BARS)


@pytest.mark.parametrize("dtype", shapes.ITEMSIZE)
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_every_contender_is_timed(dtype, cold, monkeypatch):
    monkeypatch.setattr(clock, "last_level_bytes", lambda: 2**16)
    shape = shapes.replace(TINY, dtype=dtype)
    rows = ops.measure([shape], "cpu", rounds=2, cold=cold)
    names = [*contenders.OPS, *contenders.DENSE["cpu"], *contenders.READS]
    assert [one.name for one in rows] == names
    for one in rows:
        assert 0 < one.us.p10 <= one.us.median <= one.us.p90
        assert one.bytes > 0
        assert one.samples >= 2


def test_empty_slots_are_paired_with_a_full_cache():
    full, spare = Shape(1, 4, 2, 64, budget=16), Shape(1, 4, 2, 64, slots=512, budget=16)
    rows = ops.measure([full, spare], "cpu", rounds=1)
    assert set(bars.slot_ratios(rows)) == set(contenders.OPS)
    assert {name.partition(":")[0] for name, *_ in bars.bars(rows, "cpu")} == {
        f"empty slots, {op}" for op in contenders.OPS
    }


def test_a_case_leaves_the_empty_slots_unreadable():
    case = contenders.build(Shape(1, 4, 2, 64, slots=128, budget=16), "cpu")
    assert case.keys[:, :, 64:].isnan().all()
    assert not case.keys[:, :, :64].isnan().any()


def wrong_indices(*args, **kwargs):
    indices = hata.ops.hamming_topk(*args, **kwargs)
    indices[0, 0, 0, 0] += 1
    return indices


def wrong_codes(*args, **kwargs):
    codes = hata.ops.encode(*args, **kwargs)
    codes ^= 1
    return codes


def forgotten_code(*args, fresh, **kwargs):
    return hata.ops.hash_attend(*args, **kwargs)


def wrong_output(name):
    def call(*args, **kwargs):
        out = getattr(hata.ops, name)(*args, **kwargs)
        out[-1, -1] += 0.5
        return out

    return call


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("encode", wrong_codes),
        ("hamming_topk", wrong_indices),
        ("sparse_attend", wrong_output("sparse_attend")),
        ("hash_attend", wrong_output("hash_attend")),
        ("hash_attend", forgotten_code),
    ],
    ids=["codes", "indices", "sparse output", "output", "fresh code"],
)
def test_a_wrong_op_is_not_timed(name, wrong, monkeypatch):
    monkeypatch.setattr(hata, name, wrong)
    monkeypatch.setattr(ops, "times", None)
    with pytest.raises(verify.WrongResult, match=name):
        ops.measure([TINY], "cpu", rounds=1)


@pytest.mark.parametrize("poison", [0.5, float("nan")])
def test_a_wrong_dense_contender_is_not_timed(poison, monkeypatch):
    def wrong(case):
        good = contenders.sdpa_packed(case)
        return contenders.Contender("sdpa packed", "dense", lambda: good.call() + poison, 1)

    monkeypatch.setitem(contenders.DENSE["cpu"], "sdpa packed", wrong)
    with pytest.raises(verify.WrongResult, match="sdpa packed"):
        ops.measure([TINY], "cpu", rounds=1)


def test_best_dense_is_the_faster_one():
    rows = rows_of(TINY, dense=30.0, hashed=10.0)
    assert bars.best_dense(rows, TINY).us.median == 30.0


def test_bars_are_met_or_not():
    shape = Shape(1, 32, 8, 32_768)
    met = {bar: ok for bar, _, _, ok in bars.bars(rows_of(shape, 100.0, 9.0, 7.9), "cpu")}
    assert list(met.values()) == [True, False]
    assert bars.bars(rows_of(shape, 100.0, 9.0, 7.9), "cuda") == []
    half = shapes.replace(shape, bits=64)
    assert bars.bars(rows_of(half, 100.0, 9.0), "cpu") == []


def test_markdown_has_a_line_a_shape():
    lines = tables.markdown(rows_of(Shape(1, 32, 8, 32_768), 20_000.0, 1000.0, 9.5)).splitlines()
    assert lines[2:] == ["| 32K | float32, 128, 512 | 20.00 ms | 1.00 ms | **20.0x** | 9.5 GB/s |"]


@pytest.mark.parametrize("samples", [[3.0], [1.0, 2.0], [float(n) for n in range(101)]])
def test_timing_of_samples(samples):
    found = clock.timing_of(samples)
    assert found.p10 <= found.median <= found.p90
    if len(samples) == 101:
        assert (found.p10, found.median, found.p90) == (10.0, 50.0, 90.0)


def small(*more):
    return ["--backend", "numba", "--shapes", "1x4/2x96", "--rounds", "1", *more]


def test_command_writes_all_figures(tmp_path, capsys):
    file = tmp_path / "new" / "figures.json"
    assert ops.main(small("--json", str(file), "--markdown", "--bits", "32", "--k", "8")) == 0
    found = json.loads(file.read_text())
    assert found["schema"] == tables.SCHEMA
    assert found["settings"]["backend"] == "numba"
    assert found["machine"]["cores"] >= 1
    assert {line["family"] for line in found["rows"]} == {"op", "dense", "read"}
    for line in found["rows"]:
        assert line["shape"]["bits"] == 32
        assert line["shape"]["budget"] == 8
        assert line["us"]["p10"] <= line["us"]["median"] <= line["us"]["p90"]
        assert line["us"]["samples"] >= 1
    printed = capsys.readouterr().out
    for name in (*contenders.OPS, *contenders.DENSE["cpu"], "| 96 |", str(file)):
        assert name in printed


def test_command_fails_on_a_wrong_result(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hata, "hamming_topk", wrong_indices)
    file = tmp_path / "figures.json"
    assert ops.main(small("--json", str(file))) == 1
    assert "hamming_topk" in capsys.readouterr().err
    assert not file.exists()


def test_a_full_disk_leaves_the_old_figures(monkeypatch, capsys, tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "figures.json"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    assert ops.main(small("--json", str(file))) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: --json: [Errno 28] No space left on device: '{file}'"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shapes", "bogus"], "--shapes: shape: got 'bogus', expected BxH"),
        (["--shapes", ""], "--shapes: shape: got ''"),
        (["--op", ""], "--op: got an empty value"),
        (["--scans", "/proc/scans.json"], "--scans: /proc/scans.json cannot be written"),
    ],
)
def test_phases_refuses_wrong_arguments(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        phases.main(words)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (hata.BackendUnavailable("cupy: planted"), 1, "error: cupy: planted\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["unavailable", "interrupted"],
)
def test_phases_tells_its_end_in_a_line(error, status, told, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(phases, "show", fails)
    assert phases.main([]) == status
    assert capsys.readouterr().err == told


def test_command_skips_what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(ops, "_too_large", lambda group, device: "1x4/2x96 needs 9 GB")
    assert ops.main(small()) == 1
    assert "needs 9 GB" in capsys.readouterr().err


def test_command_refuses_a_backend_that_cannot_run(capsys):
    assert ops.main(["--backend", "triton", "--shapes", "1x4/2x96"]) == 1
    assert "triton" in capsys.readouterr().err


def test_command_changes_knobs(tmp_path, capsys, monkeypatch):
    kind = registry.class_of("numba")
    seen = set()
    run = kind.hash_attend

    def spied(backend, call):
        seen.update(call.config.items())
        return run(backend, call)

    monkeypatch.setattr(kind, "hash_attend", spied)
    file = tmp_path / "figures.json"
    assert ops.main(small("--json", str(file), "--set", "chunk=2048", "variant=direct")) == 0
    assert {("chunk", 2048), ("variant", "direct")} <= seen
    assert json.loads(file.read_text())["settings"]["set"] == {"chunk": 2048, "variant": "direct"}
    assert "chunk=2048, variant=direct" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["chunk=3", "chunk=true", "colour=2048"])
def test_command_refuses_knobs_that_are_not_there(change, capsys):
    assert ops.main(small("--set", change)) == 1
    told = capsys.readouterr().err
    assert change.partition("=")[0] in told
    assert "expected" in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "tpu"],
        ["--set", "chunk"],
        ["--set", "chunk=2048", "--backend", "auto"],
        ["--set", "chunk=2048", "--backend", "numba", "--profile", "p.yaml"],
        ["--device", "cpu:foo"],
        ["--rounds", "0"],
        ["--k", "0"],
        ["--bits", "7"],
        ["--profile", "nope"],
        ["--profile", ""],
        ["--json", "/proc/figures.json"],
        ["--json", "/"],
        ["--shapes", "1x32/5x4K"],
        ["--shapes", "1x4/2x96", "--suite", "cpu"],
        ["--suite", "none"],
    ],
    ids=" ".join,
)
def test_command_refuses_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        ops.arguments(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_interruption_is_told_in_a_line(monkeypatch, capsys):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "measure", cut)
    assert ops.main(small()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("load", [0.4, 0.6])
def test_ratios_of_a_busy_machine_are_marked(load, monkeypatch, capsys, tmp_path):
    shape = Shape(1, 32, 8, 32_768)
    monkeypatch.setattr(ops.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(ops, "measure", lambda *_: rows_of(shape, 20_000.0, 1000.0))
    file = tmp_path / "figures.json"
    assert ops.main(small("--markdown", "--json", str(file))) == 0
    told = capsys.readouterr()
    busy = load > 0.5
    assert json.loads(file.read_text())["settings"]["busy"] is busy
    assert ("the machine is not quiet" in told.err) is busy
    # Under the shape's table, the gains and the targets; and under the Markdown.
    assert told.out.count(tables.BUSY[:13]) == (4 if busy else 0)
    assert ("20.00*" in told.out) is busy
    assert ("20.0x* " in told.out) is busy
    assert ("**20.0x**\\* |" in told.out) is busy


def test_changes_that_make_groups_equal_are_run_once():
    plain = ops.groups_of(ops.arguments(["--suite", "cpu"]))
    same = ops.groups_of(ops.arguments(["--suite", "cpu", "--dtype", "float32", "--bits", "64"]))
    assert len(same) == len(plain) - 2
    assert all(shape.bits == 64 for [shape] in same)


def test_bars_of_a_gpu():
    shape = Shape(8, 32, 8, 128 * 1024, dtype="bfloat16")
    rows = [
        *rows_of(shape, dense=900.0, hashed=70.0),
        bars.Row(shape, bars.SCAN_KERNEL, "kernel", Timing(40.0, 40.0, 40.0), 1),
        bars.Row(shape, bars.READ_KERNEL, "kernel", Timing(31.0, 31.0, 31.0), 1),
    ]
    found = {backend: bars.bars(rows, "cuda", backend) for backend in ("triton", "cupy")}
    # One step of 84 µs or less, faster than dense, the scan at 75% of reading; cupy: 60 and 88%.
    assert [met for *_, met in found["triton"]] == [True, True, True]
    assert [met for *_, met in found["cupy"]] == [False, True, False]
    assert [wanted for _, wanted, *_ in found["triton"]] == pytest.approx([84.0, 1.0, 0.75])
    slow = rows_of(shape, dense=900.0, hashed=901.0)
    assert [met for *_, met in bars.bars(slow, "cuda", "triton")] == [False, False]


def test_design_suite_answers_every_bar_of_a_step():
    found = [shape for group in shapes.SUITES["design"] for shape in group]
    places = {(s.batch, s.heads, s.kv_heads, s.keys // 1024) for s in found if s.bits == 128}
    assert set(bars.STEP_BARS_US) <= places
    many = {s.heads // s.kv_heads for s in found if s.code_bytes >= bars.MANY_CODES}
    assert set(bars.SCAN_BARS_OTHER) <= many


def test_kernels_of_a_step_stand_beside_a_read(monkeypatch):
    def profiler(calls):
        for call in calls:
            call()
        one = [1.0, 2.0, 3.0]
        return [[("step", one), ("scan", one)], [("read", [4.0] * 20)]]

    monkeypatch.setitem(ops.PROFILERS, "cpu", profiler)
    rows = ops.measure([TINY], "cpu", 1)
    found = {row.name: row for row in rows if row.family == "kernel"}
    assert [row.samples for row in found.values()] == [3, 3, 20]
    assert list(found) == ["kernel step", bars.SCAN_KERNEL, bars.READ_KERNEL]
    assert found[bars.READ_KERNEL].us.median == 4.0
    assert found[bars.SCAN_KERNEL].bytes == TINY.code_bytes
    assert found["kernel step"].bytes == 0
    # The op of a name is never taken for the kernel of that name.
    assert bars.find(rows, TINY, "hash_attend").family == "op"
    printed = Console(width=120, record=True)
    for table in tables.closing_tables(rows, bars.bars(rows, "cpu")):
        printed.print(table)
    assert "kernels of a step" in printed.export_text()


def test_benchmarks_and_tuner_do_not_know_one_another(repo_root):
    for folder, other in (("benchmarks", "tune"), ("tune", "benchmarks")):
        for file in (repo_root / folder).glob("*.py"):
            assert not re.search(rf"\b(from|import) {other}\b", file.read_text()), file
