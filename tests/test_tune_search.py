"""Which configurations of a GPU's large spaces are tried, and what a model says they take."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")

from hata import registry
from hata.problem import Problem
from tune import cost, propose, search, session, space, studies
from tune.space import Space
from tune.worker import Failure

ENCODE = Problem(
    op="encode", device="cpu", dtype="float32", projection_dtype="float32", head_dim=16, bits=32
)
STEPS = space.Grid(space.COMMON, "cuda")
KNOBS = (*((f"n{i}", (1, 2, 4, 8, 16)) for i in range(6)), ("way", (False, True)))
LARGE = Space(KNOBS)
MIDDLE = {**{f"n{i}": 4 for i in range(6)}, "way": False}


def separable(config):
    """Some knobs matter and add up; the best is one or two steps off the default."""
    us = 100.0
    us += 6 * abs(np.log2(config["n0"]) - 3) + 5 * abs(np.log2(config["n1"]) - 4)
    us += 4 * abs(np.log2(config["n2"]) - 1) + (0 if config["way"] else 3)
    return us


def test_neighbours_differ_in_one_knob_by_one_step():
    found = list(propose.neighbours(LARGE, LARGE.number(MIDDLE)))
    assert len(found) == len(set(found)) == 13
    for number in found:
        config = LARGE.config(number)
        (name,) = (name for name in config if config[name] != MIDDLE[name])
        assert name == "way" or config[name] in (2, 8)
    corner = LARGE.number({**{f"n{i}": 1 for i in range(6)}, "way": True})
    assert len(list(propose.neighbours(LARGE, corner))) == 7


def test_gains_are_put_together_and_taken_further():
    default = LARGE.number(MIDDLE)
    ratios = {
        n: separable(LARGE.config(n)) / separable(MIDDLE)
        for n in (default, *propose.neighbours(LARGE, default))
    }
    asked = 0
    while more := propose.climb(LARGE, default, ratios):
        asked += len(more)
        ratios |= {n: separable(LARGE.config(n)) / separable(MIDDLE) for n in more}
    best = LARGE.config(min(ratios, key=ratios.__getitem__))
    assert {k: best[k] for k in ("n0", "n1", "n2", "way")} == {
        "n0": 8, "n1": 16, "n2": 2, "way": True,
    }  # fmt: skip
    # Few steps, and in the end all neighbours of the best.
    assert asked <= 20 + 14
    assert propose.climb(LARGE, default, {default: 1.0}) == []


def test_what_won_on_problems_like_it_is_tried_first():
    problem = replace(ENCODE, device="cuda", tokens=4096)
    won = {
        replace(problem, tokens=1): {**MIDDLE, "n0": 8},
        replace(problem, tokens=8192): {**MIDDLE, "n1": 8},
        replace(problem, tokens=4096, bits=64): {**MIDDLE, "n2": 8},
        # Not a configuration here, and another op.
        replace(problem, tokens=2048): {"other": 1},
        STEPS.step("bfloat16", 128, 4096, 512): {**MIDDLE, "n3": 8},
    }
    found = [LARGE.config(n) for n in propose.winners(problem, LARGE, won)]
    assert found == [{**MIDDLE, "n1": 8}, {**MIDDLE, "n0": 8}, {**MIDDLE, "n2": 8}]
    assert propose.winners(problem, LARGE, {}) == []


def test_where_time_is_short_every_backend_has_the_same_problems(monkeypatch):
    """Times of two backends are compared: neither may have entries that the other lacks."""
    problems = space.problems(space.Grid(space.COMMON, "cuda"), ["bfloat16"], quick=True)[:4]
    names = [SimpleNamespace(name=name) for name in ("a", "b")]
    run = object.__new__(session._Session)
    # One of them cannot run the second problem.
    of_b = [problems[0], *problems[2:]]
    run.task = SimpleNamespace(backends=names, problems={"a": problems, "b": of_b})  # type: ignore[assignment]
    run.limits, run.settled, run.skipped = space.Limits(1, 1e-9, 0.06), {}, []
    run.report = SimpleNamespace(advance=lambda: None)  # type: ignore[assignment]
    tuned: list[tuple[str, int]] = []
    monkeypatch.setattr(run, "_look_ahead", lambda queue: None)
    monkeypatch.setattr(run, "_finished", lambda backend, problem: problem == problems[3])
    run.ahead = None  # type: ignore[assignment]

    def tune(backend, problem, *_):
        tuned.append((backend.name, problems.index(problem)))
        run.settled[backend.name, problem] = None

    monkeypatch.setattr(run, "_tune", tune)
    queue = run._queue({"a", "b"})
    run._tune_all(queue, {"a": None, "b": None})  # type: ignore[dict-item]
    # The first whatever the time, and what an earlier run has settled.
    assert tuned == [("a", 0), ("b", 0), ("a", 3), ("b", 3)]
    assert len(run.skipped) == 3
    assert all(text.endswith(session._TIME_UP) for text in run.skipped)


class OnPaper:
    def __init__(self):
        self.checked, self.expected = [], []

    def expect(self, configs):
        self.expected += [LARGE.number(config) for config in configs]

    def check(self, config):
        self.checked.append(LARGE.number(config))
        # One knob has a value that never runs.
        return Failure("error", "too much shared memory") if config["n5"] == 8 else None

    def race(self, configs, seconds):
        return [[separable(config)] * 9 for config in configs]


def test_a_large_space_is_searched_from_the_default_and_nothing_is_wasted(tmp_path):
    storage = studies.open_storage(f"sqlite:///{tmp_path}/s.db")[0]
    study = studies.open_study(storage, "s", resume=False)
    problem = replace(ENCODE, device="cuda")
    machine = cost.Machine(4e6, 300e6, 3.0, 132)
    evaluator = OnPaper()
    verdict = search.Search(
        study, LARGE, MIDDLE, evaluator,
        suggestions=propose.suggestions(problem, LARGE, machine, MIDDLE),
        limits=space.Limits(30, 60, 0.0),
    ).run()  # fmt: skip
    assert {k: verdict.config[k] for k in ("n0", "n1", "n2", "way")} == {
        "n0": 8, "n1": 16, "n2": 2, "way": True,
    }  # fmt: skip
    assert verdict.trials <= 30
    assert evaluator.checked[0] == LARGE.number(MIDDLE)
    # What was proposed could be compiled ahead; the sampler's draws cannot be foreseen.
    assert set(evaluator.checked[:20]) <= set(evaluator.expected)
    assert {failure.kind for failure in verdict.failures.values()} == {"error"}


def test_shares_that_do_not_fill_a_gpu_look_slow():
    machine = cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132)
    problem = STEPS.step("bfloat16", 128, 131072, 2048)
    us = [
        cost.predict_us(problem, {"num_splits": n, "attend_splits": 32}, machine)
        for n in (1, 4, 16, 32)
    ]
    assert us == sorted(us, reverse=True)
    floor = cost.floor_us(problem, machine)
    assert 3.0 < floor < min(us)
    # The 16.8 MB of codes and 8.4 MB of rows, at 4 TB/s.
    assert floor == pytest.approx(3.0 + 6.4, abs=0.3)


@pytest.mark.parametrize("name", ["triton", "cupy"])
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "all"])
def test_the_model_has_a_time_for_whatever_a_backend_may_be_tuned_with(name, quick):
    """Values that stand for no number included, such as 0 for as many as fit."""
    pytest.importorskip("triton" if name == "triton" else "torch", reason="the backend needs it")
    backend = registry.class_of(name)()
    machine = cost.Machine(bandwidth=4e6, flops=300e6, launch_us=3.0, workers=132)
    for problem in space.problems(space.Grid(space.COMMON, "cuda"), ["bfloat16"], quick=quick):
        configs, default = Space.of(backend, problem), backend.default(problem)
        floor = cost.floor_us(problem, machine)
        for number in propose.suggestions(problem, configs, machine, default):
            us = cost.predict_us(problem, configs.config(number), machine)
            assert floor <= us * 1.001 < 1e6
