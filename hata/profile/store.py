"""Where profiles lie, and how they are read and replaced without losing one.

Two kinds of place:

- a *name* (`[A-Za-z0-9_.-]`, at most 64 characters) is a file of the user's cache folder,
  `$HATA_CACHE/profiles/<name>.yaml`, and can never leave it, not even through a symbolic link;
- a *path* is the user's own choice. It is refused with a `..` component, where it is itself a
  symbolic link, and, if relative, where a link in it leaves the working folder: a command line
  copied from somewhere must not write where it does not seem to. An absolute path says plainly
  where it goes, so links among its folders are followed.

Writing takes the lock `<file>.lock`, reads again what is there, writes a temporary file in the
same folder, syncs it and renames it over the old one. A crash leaves the old file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import filelock

from hata.errors import ProfileError
from hata.files import write_whole
from hata.profile.text import MAX_BYTES

LOCK_SECONDS = 60
_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
SHIPPED = Path(__file__).resolve().parent.parent / "profiles"


def cache_root() -> Path:
    """The user's cache folder: `$HATA_CACHE`, else `$XDG_CACHE_HOME/hata`, else `~/.cache/hata`."""
    chosen = os.environ.get("HATA_CACHE")
    if chosen:
        return user_path(chosen).absolute()
    # A relative XDG_CACHE_HOME is to be ignored, says the XDG specification.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise ProfileError(
            f"HATA_CACHE: not set, and there is no home folder ({error}); set HATA_CACHE to a "
            "folder for caches"
        ) from None
    return base / "hata"


def named_path(name: str) -> Path:
    """The file of a profile in the user's cache folder; it need not exist.

    Raises:
        ProfileError: if `name` is no plain name, or leads out of the folder through a link.
    """
    if not _NAME.fullmatch(name):
        raise ProfileError(
            f"profile name: got {name!r}, expected 1 to 64 of A-Z a-z 0-9 _ . - with no leading "
            "dot; for a file elsewhere give its path, with a slash or ending in .yaml"
        )
    root = cache_root() / "profiles"
    path = root / (name if name.endswith(".yaml") else f"{name}.yaml")
    if path.resolve().parent != root.resolve():
        raise ProfileError(
            f"profile name: {name!r} is a link to {path.resolve()}, outside {root}; remove the "
            "link, or give the path itself"
        )
    return path


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, `~` included.

    Raises:
        ProfileError: it is no path at all, or names a home that does not exist.
    """
    try:
        path = Path(given).expanduser()
    except (RuntimeError, TypeError) as error:
        raise ProfileError(f"path: got {given!r} ({error}), expected the path of a file") from None
    if not str(given) or "\0" in str(path):
        raise ProfileError(f"path: got {str(given)!r}, expected the path of a file")
    return path


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a name or a path given by a user means, for reading.

    A name is looked for in the user's cache folder, then among the shipped profiles, and is a file
    of the working folder if it is in neither. Anything with a slash, and anything that ends in
    `.yaml` or `.yml`, is a path.
    """
    given = str(user_path(name_or_path))
    if not isinstance(name_or_path, str) or os.sep in given or given.endswith((".yaml", ".yml")):
        return user_path(given)
    path = named_path(given)
    return next((file for file in (path, SHIPPED / path.name, Path(given)) if file.is_file()), path)


def is_shipped(path: Path) -> bool:
    """Whether a file is one of hata's own profiles."""
    return path.resolve().parent == SHIPPED


def safe_output(path: str | os.PathLike[str]) -> Path:
    """The absolute path to write a profile to.

    Raises:
        ProfileError: for a `..` component, a symbolic link, a relative path that leaves the
            working folder through a link, or something that is not a plain file. Nothing is
            written or created.
    """
    given = user_path(path)
    if not given.name or ".." in given.parts:
        meant = given.resolve()
        raise ProfileError(
            f"output: got {str(path)!r}, expected a file path without '..'; write the path out"
            f"{'' if meant.is_dir() else f': {meant}'}"
        )
    target = given.absolute()
    if target.is_symlink():
        raise ProfileError(
            f"output: {str(path)!r} is a symbolic link to {target.resolve()}; give the path of "
            "the file itself"
        )
    parent = target.parent.resolve()
    if not given.is_absolute() and not parent.is_relative_to(Path.cwd().resolve()):
        raise ProfileError(
            f"output: {str(path)!r} leads through a link to {parent}; give the absolute path if "
            "that is where it should go"
        )
    if target.exists() and not target.is_file():
        raise ProfileError(f"output: {str(path)!r} is no plain file; choose another path")
    return target


def read(path: Path) -> str:
    """The text of a profile; its size is checked before anything else.

    Raises:
        ProfileError: if it is absent, no plain file, above `MAX_BYTES`, or not UTF-8.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ProfileError(f"{path}: this is no plain file, expected a profile; give its path")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(
            f"{path}: cannot be read ({error.strerror or error}); check the path, or write a "
            "profile with: hata tune"
        ) from None
    if len(data) > MAX_BYTES:
        size = max(info.st_size, len(data))
        raise ProfileError(
            f"{path}: got {size:,} bytes, expected at most {MAX_BYTES:,}; this is no profile"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ProfileError(f"{path}:{line}: this is not UTF-8 text; is it a profile?") from None


def replace(path: Path, make: Callable[[str | None], str]) -> None:
    """Replace a file by `make(its text)`, one process at a time, wholly or not at all.

    Args:
        path: What `safe_output` returned.
        make: Gets the present text, `None` if there is no file or an empty one; what it raises
            leaves everything as it was.

    Raises:
        ProfileError: if the file cannot be locked, read or written; it is unchanged then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS, poll_interval=0.01):
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                # We hold the lock, so whoever wrote it is dead.
                leftover.unlink(missing_ok=True)
            old = read(path) if path.exists() and path.stat().st_size else None
            new = make(old)
            if len(new.encode()) > MAX_BYTES:
                raise ProfileError(
                    f"{path}: would grow beyond {MAX_BYTES:,} bytes; write to another file"
                )
            if new != old:
                write_whole(path, new)
    except filelock.Timeout:
        raise ProfileError(
            f"{path}: another process has held {path.name}.lock for {LOCK_SECONDS} s; wait for "
            "it, or end it"
        ) from None
    except OSError as error:
        raise ProfileError(
            f"{path}: cannot be written ({error.strerror or error}), what was there is unchanged; "
            "free space or choose another path"
        ) from error
