"""Studies: what Optuna keeps of a search in an SQLite file, or any database that it speaks to.

A study is named after the device, the kernel sources and the problem, so that it can be continued:
trials of a process that is gone (no heartbeat, or no such process) are queued again, a few times.
Only this file and `tune.search` know Optuna.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from tune.database import StorageError, damage, foreign, move_aside, sqlite_path

SEED = 0
RETRIES = 2
HEARTBEAT_SECONDS = 5


def _quietly(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Heartbeats and their callback are marked experimental; everything else may still warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*(heartbeat|Heartbeat).*experimental", category=ExperimentalWarning
        )
        return make(*args, **options)


_retry = _quietly(RetryHeartbeatStaleTrialCallback, max_retry=RETRIES)


def open_storage(url: str, *, ours: bool = False) -> tuple[RDBStorage, str]:
    """Open a database of `storage_url`; returns it, and what people should be told, if anything.

    A broken SQLite file is moved aside; if it is `ours`, one of the user's cache folder, whatever
    else lies there too. Raises `StorageError` for what cannot be opened, or is something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    message = ""
    path = sqlite_path(url)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"storage: {path.parent} cannot be made ({error.strerror}); name another with "
                "--storage"
            ) from None
        if not ours and (why := foreign(path)):
            raise StorageError(
                f"--storage: {path} {why}, and was left as it is; name another file, or a new one"
            )
        if broken := damage(path):
            moved = move_aside(path)
            message = f"{path} is damaged ({broken}); it was moved to {moved}, a new one begins"
    try:
        storage = _quietly(
            RDBStorage, url, heartbeat_interval=HEARTBEAT_SECONDS,
            heartbeat_stale_trial_callback=_retry,
        )  # fmt: skip
    except (SQLAlchemyError, OptunaError, ImportError, LookupError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise StorageError(
            f"storage: {url} cannot be opened ({reason}); check it, or name another with --storage"
        ) from None
    if path is not None:
        # A kill loses nothing without the syncs, and after a power cut a broken file is replaced.
        off = "PRAGMA synchronous = OFF"
        event.listen(storage.engine, "connect", lambda connection, _: connection.execute(off))
        storage.engine.dispose()
    return storage, message


def digest(*parts: object) -> str:
    """A short name for values that print the same wherever they are equal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def open_study(storage: RDBStorage, name: str, *, resume: bool, notes: str = "") -> optuna.Study:
    """The study of a name: the latest run of it, to `resume`, or a new run beside the others.

    `notes` say what it is about, for people who look into the database.
    """
    study, run = latest(storage, name)
    if resume and study is not None:
        # The seed's first draws were made before.
        study.sampler = optuna.samplers.TPESampler(seed=SEED + len(study.trials))
        _requeue_dead(study)
        return study
    sampler = optuna.samplers.TPESampler(seed=SEED)
    while True:
        run += 1
        with contextlib.suppress(DuplicatedStudyError):
            study = optuna.create_study(
                study_name=f"{name}#{run}", storage=storage, sampler=sampler, direction="minimize"
            )
            study.set_user_attr("about", notes)
            return study


def latest(storage: RDBStorage, name: str) -> tuple[optuna.Study | None, int]:
    """The latest run of a study, and its number; `None` and 0 if there is none."""
    split = [found.rpartition("#") for found in optuna.get_all_study_names(storage)]
    run = max((int(run) for base, _, run in split if base == name and run.isdecimal()), default=0)
    return optuna.load_study(study_name=f"{name}#{run}", storage=storage) if run else None, run


def owner() -> list[object]:
    """This process, as a trial notes it."""
    return [socket.gethostname(), os.getpid(), _started(os.getpid())]


def _started(pid: int) -> str:
    """When a process started, so that a new process under an old number is told apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _requeue_dead(study: optuna.Study) -> None:
    """Queue trials again whose process is gone, without waiting for their heartbeat to be late."""
    if not Path("/proc/self").exists():
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, pid, started = trial.user_attrs.get("owner") or ("", 0, "")
        if host == socket.gethostname() and _started(pid) != started:
            study.tell(trial.number, state=TrialState.FAIL)
            _retry(study, trial)


def result_of(trial: FrozenTrial) -> dict[str, Any] | None:
    """What a trial came to, if it is finished."""
    return trial.user_attrs.get("result") if trial.state == TrialState.COMPLETE else None


def sweep(
    study: optuna.Study,
    points: Sequence[Mapping[str, int]],
    evaluate: Callable[[Mapping[str, int]], dict[str, Any]],
    on_point: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """What `evaluate` returns for every point of a grid, each run once in the life of a study.

    A point says knob -> value. `evaluate` returns JSON values: `value` (smaller is better),
    `constraints` (name -> number, positive where violated), and anything else. `on_point` is called
    with how many are done.
    """
    values = {name: sorted({point[name] for point in points}) for name in points[0]}
    found = filter(None, map(result_of, study.get_trials(deepcopy=False)))
    done: dict[tuple, dict[str, Any]] = {tuple(result["point"]): result for result in found}

    def objective(trial: Trial) -> float:
        trial.set_user_attr("owner", owner())
        point = {n: int(trial.suggest_categorical(n, values[n]) or 0) for n in values}
        key = tuple(point.values())
        result = done.get(key) or evaluate(point) | {"point": list(key)}
        done[key] = result
        trial.set_user_attr("result", result)
        for name, amount in result["constraints"].items():
            trial.set_constraint(name, amount)
        return result["value"]

    keys = [tuple(point[name] for name in values) for point in points]
    for point, key in zip(points, keys, strict=True):
        # A trial of a process that died may stand before this one in the queue.
        while key not in done:
            study.enqueue_trial(dict(point))
            study.optimize(objective, n_trials=1)
            on_point(len(done))
    return [done[key] for key in keys]
