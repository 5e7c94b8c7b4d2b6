"""The folders that a training works in: whose they are, who uses them, and what may be deleted.

A folder of ours has a *mark*, `plan.json`, that says what is done in it and what kind of folder it
is: one to work in, or one of what was captured. Only a folder whose mark is of the kind that is
asked for is taken up, and only files that a training writes are ever deleted, by their names; a
folder goes once nothing else is left in it.

Whoever works in a folder holds its lock, so that a second run is told instead of both writing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from hata.errors import LearnError
from hata.learn.plan import Capture, Plan
from hata.profile import user_path

MARK = "plan.json"
LOCK = ".hata-lock"
CAPTURE = "capture"
# Of a mark: a folder of one kind is never taken for one of the other.
_FORMATS: dict[type, str] = {Plan: "hata.learn.work/1", Capture: "hata.learn.capture/1"}
_FINGERPRINTS = {
    "weights": "the weights or the config.json of --model are",
    "text": "the tokens read of --text or --dataset are",
}
_MARKS = re.compile(r"plan\.(json|part\d+)")
_LAYER_FILES = re.compile(r"layer_\d+\.safetensors|\.layer_\d+\.safetensors\.[\w.]+")
_LAYER_FOLDERS = re.compile(r"layer_\d+")
_SEQUENCE_FILES = re.compile(r"sequence_\d+\.(safetensors|json|part\d*)")


def work_of(options: argparse.Namespace) -> Path:
    """The working folder that a command line means."""
    return user_path(options.work) if options.work else user_path(options.out).with_suffix(".work")


@contextmanager
def held(folder: Path, kind: type, option: str) -> Iterator[None]:
    """Make a folder where there is none, and keep other runs out of it meanwhile.

    Its kind is `Plan` for one to work in, `Capture` for one of what was captured; the option is
    what names the folder, for errors.

    Raises:
        LearnError: It cannot be made, holds something else, or another run uses it.
    """
    found_mark(folder, kind, option)
    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise LearnError(
            f"{option}: {folder} is in use by another run; wait until that ends, or name another "
            "folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise _unusable(folder, option, error) from None
    try:
        yield
    finally:
        # While we hold it: nobody else can have taken it yet.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        _drop(folder)


def prepare(
    folder: Path, plan: Plan | Capture, *, resume: bool, option: str, fresh: bool = False
) -> bool:
    """Make a folder for a plan, or take up the one there: whether that can be gone on with.

    Args:
        folder: For this plan alone.
        plan: What is done in it.
        resume: Go on with what lies there; else what a training wrote there is deleted.
        option: What names the folder, for errors.
        fresh: It lies in a folder of ours that was begun anew; what else is left there may stay.

    Raises:
        LearnError: What lies there is of another plan, or of something else.
    """
    fresh = fresh and not folder.is_symlink()
    before = None if fresh else found_mark(folder, type(plan), option)
    now = {"format": _FORMATS[type(plan)]}
    now |= json.loads(json.dumps(dataclasses.asdict(plan)))
    if before is not None and resume:
        differ = list(dict.fromkeys(_differences(before, now)))
        if differ:
            anew = ", or leave --resume out to begin anew" if type(plan) is Plan else ""
            raise LearnError(
                f"{option}: {folder} is of another training ({'; '.join(differ[:3])}); ask for the "
                f"same, name another folder{anew}"
            )
        return True
    mark = folder / MARK
    try:
        if before is not None:
            clear(folder, type(plan))
        folder.mkdir(parents=True, exist_ok=True)
        part = mark.with_suffix(f".part{os.getpid()}")
        part.write_text(json.dumps(now, indent=1))
        part.replace(mark)
    except OSError as error:
        raise _unusable(folder, option, error) from None
    return False


def found_mark(folder: Path, kind: type, option: str) -> dict[str, Any] | None:
    """What the mark of a folder says; `None` where the folder is absent or empty.

    Raises:
        LearnError: It holds something else, or is no folder.
    """
    try:
        if not os.path.lexists(folder):
            return None
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise _unusable(folder, option, error) from None
    # A run that was killed as it began leaves these.
    if all(name == LOCK or re.fullmatch(r"plan\.part\d+", name) for name in names):
        return None
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        known = found.keys() if isinstance(found, dict) else set()
    except (OSError, ValueError, RecursionError):
        found, known = {}, set()
    expected = {field.name for field in dataclasses.fields(kind)}
    if not expected <= known or found.get("format") != _FORMATS[kind]:
        raise LearnError(
            f"{option}: got {folder}, which holds files of something else, or whose {MARK} is "
            "damaged or of another kind; name another folder, or delete it yourself"
        )
    return found


def clear(folder: Path, kind: type) -> None:
    """Delete what trainings wrote into a folder of ours, and the folder once it is empty."""
    if kind is Plan:
        _empty(folder / "layers", _LAYER_FILES)
        # By its place it is ours, whatever its mark says; what lies behind a link stays.
        store = folder / CAPTURE
        if store.is_dir() and not store.is_symlink():
            clear(store, Capture)
    else:
        for below in folder.iterdir():
            if _LAYER_FOLDERS.fullmatch(below.name):
                _empty(below, _SEQUENCE_FILES)
        _delete(folder, _SEQUENCE_FILES)
    # Last: until then the folder is known to be ours.
    _delete(folder, _MARKS)
    _drop(folder)


def _delete(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files right below a folder that have such names."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if names.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def _empty(folder: Path, names: re.Pattern[str]) -> None:
    """The same for a folder of ours below another; what lies behind a link stays."""
    if not folder.is_symlink():
        _delete(folder, names)
        _drop(folder)


def _drop(folder: Path) -> None:
    """Remove a folder if it is empty; a link to one stays."""
    with suppress(OSError):
        folder.rmdir()


def _unusable(folder: Path, option: str, error: BaseException) -> LearnError:
    why = (error.strerror if isinstance(error, OSError) else None) or error
    return LearnError(
        f"{option}: {folder} cannot be used as a folder to write to ({why}); name another, or free "
        "space"
    )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value)
        elif old != value and name in _FINGERPRINTS:
            found.append(f"{_FINGERPRINTS[name]} other ones")
        elif old != value:
            found.append(f"{name}: {old!r} there, {value!r} asked")
    return found
