"""From sources to machine code: NVRTC, and a folder that keeps what it made.

A cubin is kept under a digest of all that it follows from: sources, options, architecture and the
version of NVRTC. A file says what it is and holds a digest of its contents; one that is truncated,
foreign or damaged is made again. Files appear whole or not at all, so processes may share the
folder.
Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path

from hata.errors import HataError, KernelError
from hata.profile.store import cache_root

FOLDER = Path(__file__).parent
# Sources that others include.
INCLUDED = (
    "ptx.cu",
    "vectors.cu",
    "row.cu",
    "order.cu",
    "codes.cu",
    "planes.cu",
    "binary.cu",
    "scan.cu",
    "select.cu",
    "stage.cu",
    "gather.cu",
    "attend.cu",
)
# More options for NVRTC, of kernels that are loaded from then on; see benchmarks/phases.py.
MORE_OPTIONS: list[str] = []
_MAGIC = b"hata-cubin-1\n"

Macros = tuple[tuple[str, int], ...]


@functools.lru_cache
def read(name: str) -> str:
    """The text of a source."""
    return (FOLDER / name).read_text(encoding="utf-8")


def cubin(name: str, macros: Macros, architecture: int) -> bytes:
    """Machine code of `name`.cu, compiled with `macros` for sm_`architecture`; kept in a folder."""
    options = (
        f"--gpu-architecture=sm_{architecture}",
        "--std=c++17",
        *(f"-D{key}={value}" for key, value in macros),
        *MORE_OPTIONS,
    )
    digest = hashlib.sha256()
    for part in (*map(read, (f"{name}.cu", *INCLUDED)), *options, str(version())):
        digest.update(part.encode() + b"\0")
    path = _folder()
    path = None if path is None else path / f"{name}-{digest.hexdigest()[:32]}.cubin"
    code = None if path is None else _kept(path, digest.digest())
    if code is None:
        code = _compile(name, options)
        if path is not None:
            _keep(path, digest.digest(), code)
    return code


def version() -> tuple[int, int]:
    """Version of NVRTC."""
    import cupy  # noqa: F401  makes its parts importable
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc.getVersion()


def _compile(name: str, options: tuple[str, ...]) -> bytes:
    import cupy  # noqa: F401  makes its parts importable
    from cupy_backends.cuda.libs import nvrtc

    headers = [read(included).encode() for included in INCLUDED]
    program = nvrtc.createProgram(
        read(f"{name}.cu"), f"{name}.cu", headers, [included.encode() for included in INCLUDED]
    )
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes off the last byte, as of a text; it is the highest of an alignment, so zero.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        raise KernelError(
            f"backend 'cupy' failed to compile {name}.cu with {' '.join(options)}: {error}\n"
            f"{nvrtc.getProgramLog(program)}\nreport this with the options above, or use another "
            "backend"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _folder() -> Path | None:
    """Where cubins are kept; `None` where there is no place for them."""
    try:
        folder = cache_root() / "cubins"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, HataError):
        return None
    return folder


def _kept(path: Path, key: bytes) -> bytes | None:
    """The code in a file, if the file is whole and made for this key."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 64
    code = data[head:]
    if data[:head] != _MAGIC + key + hashlib.sha256(code).digest() or not code:
        return None
    return code


def _keep(path: Path, key: bytes, code: bytes) -> None:
    """Write a file under its name at once; a folder that cannot be written keeps nothing."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + key + hashlib.sha256(code).digest() + code)
        Path(temporary).replace(path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
