"""Files that are written wholly or not at all: a full disk or a crash leaves what was there."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path


def swap(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a temporary file beside a file, sync it, and rename it over that one.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; this one gets what `open` would have given it.
        mask = os.umask(0)
        os.umask(mask)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~mask
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The rename lasts through a power cut, where the file system can.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, content: str) -> None:
    """Write a text file. A link is followed; what is no plain file is written as it is.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    target = path.resolve()
    try:
        # Such as `/dev/stdout`.
        if target.exists() and not target.is_file():
            path.write_text(content, encoding="utf-8")
        else:
            swap(target, [content.encode()])
    except OSError as error:
        # A failing write names no file by itself, and a failing rename the temporary one.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
