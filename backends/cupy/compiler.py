"""From sources to machine code: NVRTC, and a folder that keeps what it made.

The compile-time constants of a kernel are a struct `C`, in a header `config.cuh` that is made for
each variant. A cubin is kept under a digest of all that it follows from: the sources that it
reaches without their comments, constants, options, architecture and the version of NVRTC. A file
says what it is and holds a digest of its contents; one that is truncated, foreign or damaged is
made again. Files appear whole or not at all, so processes may share the folder.
Nothing here needs a GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from hata import sources
from hata.errors import HataError, KernelError
from hata.profile.store import cache_root

FOLDER = Path(__file__).parent
# Address of the clocks of kernels that are loaded from then on, or 0; see benchmarks/phases.py.
TRACE = 0
_MAGIC = b"hata-cubin-1\n"
_CODES = {"i64": "q", "int": "i", "float": "f"}

Constants = tuple[tuple[str, int], ...]


def read(name: str) -> str:
    """The text of a source."""
    return (FOLDER / name).read_text(encoding="utf-8")


def reached(name: str) -> list[str]:
    """The files that a source is made of: itself, and what it reaches by `#include`."""
    return [name, *(path.name for path in sources.headers(FOLDER / name))]


def config(constants: Constants) -> str:
    """The header that gives a kernel its constants, typed as they are."""
    fields = [
        f"    static constexpr {type(value).__name__} {name} = {str(value).lower()};"
        for name, value in constants
    ]
    fields.append(f"    static constexpr unsigned long long TRACE = {TRACE}ull;")
    return "\n".join(("#pragma once", "struct Config {", *fields, "};", "typedef Config C;\n"))


def layout(name: str) -> dict[str, str]:
    """The fields of `struct Params` in a source: name -> `struct` code, "P" for addresses.

    Strides are numbered: `q_b, q_h, q_t` are `q_0, q_1, q_2`. In an array of structs, the fields of
    the i-th end in i.
    """
    structs = dict(re.findall(r"struct (\w+) \{([^{}]*)\};", sources.code(FOLDER / name)))

    def fields(struct: str) -> dict[str, str]:
        found: dict[str, str] = {}
        strides: dict[str, int] = {}
        for kind, names in re.findall(r"(?:const )?(\w+)([^;]+);", structs[struct]):
            for field in names.split(","):
                name, count = re.findall(r"\w+", f"{field}[1]")[:2]
                if kind in structs:
                    inner = fields(kind).items()
                    found |= {f"{key}{i}": code for i in range(int(count)) for key, code in inner}
                    continue
                if stride := re.fullmatch(r"(\w+)_[bhtsd]", name):
                    stem = stride[1]
                    strides[stem] = strides.get(stem, -1) + 1
                    name = f"{stem}_{strides[stem]}"
                found[name] = "P" if "*" in field else _CODES[kind]
        return found

    return fields("Params")


def key(name: str, constants: Constants, architecture: int) -> bytes:
    """The digest that the machine code of a variant is kept under."""
    digest = hashlib.sha256()
    code = (sources.code(FOLDER / file) for file in reached(f"{name}.cu"))
    for part in (*code, config(constants), *_options(architecture), str(version())):
        digest.update(part.encode() + b"\0")
    return digest.digest()


def cubin(name: str, constants: Constants, architecture: int) -> bytes:
    """Machine code of `name`.cu with these constants for sm_`architecture`; kept in a folder."""
    digest, path = key(name, constants, architecture), _folder()
    path = None if path is None else path / f"{name}-{digest.hex()[:32]}.cubin"
    code = None if path is None else _kept(path, digest)
    if code is None:
        code = _compile(name, constants, architecture)
        if path is not None:
            _keep(path, digest, code)
    return code


def version() -> tuple[int, int]:
    """Version of NVRTC."""
    import cupy  # noqa: F401  makes its parts importable
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc.getVersion()


def _options(architecture: int) -> tuple[str, str]:
    return f"--gpu-architecture=sm_{architecture}", "--std=c++17"


def _compile(name: str, constants: Constants, architecture: int) -> bytes:
    import cupy  # noqa: F401  makes its parts importable
    from cupy_backends.cuda.libs import nvrtc

    source, *headers = reached(f"{name}.cu")
    texts = [config(constants), *map(read, headers)]
    program = nvrtc.createProgram(
        read(source),
        source,
        [text.encode() for text in texts],
        [header.encode() for header in ("config.cuh", *headers)],
    )
    options = _options(architecture)
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes off the last byte, as of a text; it is the highest of an alignment, so zero.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        with_these = " ".join((*options, *(f"{key}={value}" for key, value in constants)))
        raise KernelError(
            f"backend 'cupy' failed to compile {source} with {with_these}: {error}\n"
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
