"""The file that studies lie in: where it is, and what to do when it is damaged."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from hata.errors import HataError
from hata.profile import user_path

# What SQLite files begin with.
_HEAD = b"SQLite format 3\0"


class StorageError(HataError, RuntimeError):
    """The database of the studies cannot be used."""


def storage_url(given: str | None, default: Path) -> str:
    """The database URL that `--storage` means: a URL, or the path of an SQLite file.

    Raises:
        StorageError: It means a database that nothing is kept in.
    """
    if given is None:
        return f"sqlite:///{default}"
    if "://" in given:
        if given.startswith("sqlite") and sqlite_path(given) is None:
            raise StorageError(
                f"--storage: got {given}, which names no file, so that nothing would be kept; name "
                "one, such as studies.db"
            )
        return given
    return f"sqlite:///{user_path(given).absolute()}"


def sqlite_path(url: str) -> Path | None:
    """The file behind a URL, if it is one."""
    head, _, rest = url.partition(":///")
    if not head.startswith("sqlite") or not rest or rest.startswith(":memory:"):
        return None
    return Path(rest.partition("?")[0])


def is_foreign(path: Path) -> bool:
    """Whether there is a file that is no SQLite database, or one that holds no studies."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError:
        # Absent or not readable; whoever opens it next says it better.
        return False
    if not head:
        return False
    if head != _HEAD:
        return True
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, timeout=20, uri=True)) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            names = {name for (name,) in tables}
    except sqlite3.Error:
        # Locked or damaged.
        return False
    return bool(names) and "studies" not in names


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
    bad = path.with_name(path.name + ".bad")
    number = 1
    while bad.exists():
        number += 1
        bad = path.with_name(f"{path.name}.bad{number}")
    path.rename(bad)
    for suffix in ("-journal", "-wal", "-shm"):
        # A journal belongs to the file it was written for.
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(bad.with_name(bad.name + suffix))
    return bad
