"""The file that studies lie in: where it is, and what to do when it is damaged."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from hata.errors import HataError
from hata.profile import user_path

# What SQLite files begin with.
_HEAD = b"SQLite format 3\0"
# Some of the tables that Optuna makes.
_TABLES = frozenset({"studies", "version_info"})


class StorageError(HataError, RuntimeError):
    """The database of the studies cannot be used."""


def storage_url(given: str | None, default: Path) -> str:
    """The database URL that `--storage` means: a URL, or the path of an SQLite file."""
    if given is None or "://" not in given:
        return _sqlite_url(default if given is None else user_path(given).absolute())
    path = sqlite_path(given)
    if path is None and given.lower().startswith("sqlite"):
        raise StorageError(
            f"--storage: got {given}, which names no file, so that nothing would be kept; name "
            "one, such as studies.db"
        )
    if str(path).startswith("file:"):
        raise StorageError(f"--storage: got {given}, a URI within a URL; give the path of the file")
    return given


def _sqlite_url(path: Path) -> str:
    url = URL.create("sqlite", database=str(path)).render_as_string()
    if sqlite_path(url) != path:
        # SQLAlchemy before 2.1 writes a `?` as it is, and reads it as the end of the path.
        raise StorageError(f"--storage: {path} makes no URL; name another with --storage")
    return url


def sqlite_path(url: str) -> Path | None:
    """The file behind a URL, if it is one."""
    try:
        found = make_url(url)
    except ArgumentError:
        return None
    name = found.database
    if not found.drivername.lower().startswith("sqlite") or not name or name == ":memory:":
        return None
    return Path(name)


def foreign(path: Path) -> str:
    """Why to leave a file alone, in words; `""` if it holds studies, or nothing, or is absent."""
    other = "is no database of studies"
    try:
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError:
        # Absent or not readable; whoever opens it next says it better.
        return ""
    if head != _HEAD:
        return other if head else ""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, timeout=10, uri=True)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            return ""
        raise StorageError(
            f"--storage: {path} has been locked by another program for 10 s; end that, or name "
            "another file"
        ) from None
    except sqlite3.DatabaseError as error:
        return f"is too damaged to tell whether it holds studies ({error})"
    return other if names and not names >= _TABLES else ""


def damage(path: Path) -> str:
    """What is wrong with an SQLite file; `""` if nothing is, or there is none."""
    if not path.exists() or not path.stat().st_size:
        return ""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        return "" if found == "ok" else str(found).splitlines()[0]
    except sqlite3.OperationalError:
        # Locked or not readable: not damaged, and whoever opens it next says it better.
        return ""
    except sqlite3.DatabaseError as error:
        return str(error)


def move_aside(path: Path) -> Path:
    """Rename a database to `.bad`, with what belongs to it; returns its new name."""
    names = (f"{path.name}.bad{number}" for number in itertools.chain([""], itertools.count(2)))
    bad = next(new for name in names if not (new := path.with_name(name)).exists())
    path.rename(bad)
    for suffix in ("-journal", "-wal", "-shm"):
        # A journal belongs to the file it was written for.
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(bad.with_name(bad.name + suffix))
    return bad
