"""The backend's kernels on a CPU: compiled as host C++ and run with a fiber for every thread.

What a launcher writes is run as it is, on NumPy arrays: plans, arguments, grids, shared memory,
barriers. See host.h for what stands in for a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

cuda = importlib.import_module("hata.backends.cupy.compiler")
devices = importlib.import_module("hata.backends.cupy.device")

HERE = Path(__file__).parent
# Its alignment is a matter of speed; the emulator has an array of its own.
_SHARED_ARRAY = re.compile(r"extern __shared__ __align__\(\w+\) char smem\[\];")


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++")


# Fibers jump from stack to stack, which a fortified library takes for a fault. Variables of inline
# functions must be a library's own, not one for all kernels.
_COMMAND = (
    "g++", "-std=c++20", "-O0", "-w", "-fPIC", "-ffp-contract=off", "-pthread", "-U_FORTIFY_SOURCE",
    "-fno-gnu-unique",
)  # fmt: skip


@functools.lru_cache
def _folder() -> tempfile.TemporaryDirectory:
    """A folder for what is built: with host.h precompiled, and what runs kernels compiled."""
    folder = tempfile.TemporaryDirectory(prefix="hata-host-")
    for name in ("host.h", "host_main.cpp"):
        shutil.copy(HERE / name, folder.name)
    _run(*_COMMAND, "-x", "c++-header", "host.h", folder=folder.name)
    _run(*_COMMAND, "-c", "host_main.cpp", folder=folder.name)
    return folder


def _run(*command: str, folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:6000]


def flat(name: str, seen: set[str]) -> str:
    """A source with its includes in place, each once; host.h stands for ptx.cuh."""

    def included(match: re.Match) -> str:
        new = match[1] not in seen
        seen.add(match[1])
        return flat(match[1], seen) if new else ""

    return re.sub(r'^#include "(\w+\.cuh)"$', included, cuda.read(name), flags=re.MULTILINE)


def build(name: str, constants) -> ctypes.CDLL:
    """A kernel as a shared library."""
    text = "\n".join(
        (
            '#include "host.h"',
            cuda.config(constants),
            _SHARED_ARRAY.sub("", flat(f"{name}.cu", {"config.cuh", "ptx.cuh"})),
            'extern "C" void run_kernel(const void* params) '
            f"{{ {name}(*static_cast<const Params*>(params)); }}",
        )
    )
    path = Path(_folder().name) / hashlib.sha256(text.encode()).hexdigest()[:32]
    library = path.with_suffix(".so")
    if not library.exists():
        source = path.with_suffix(".cpp")
        source.write_text(text)
        command = *_COMMAND, "-shared", "-Wl,-Bsymbolic", source.name, "host_main.o"
        _run(*command, "-o", library.name, folder=_folder().name)
    return ctypes.CDLL(str(library))


class Device(devices.Device):
    """Stands in for a GPU."""

    def __init__(self, architecture=90, sms=4, shared=227 * 1024, clusters=8) -> None:
        self.architecture, self.sms = architecture, sms
        self.shared, self.clusters = shared, clusters
        self.loaded: dict[tuple, ctypes.CDLL] = {}

    def load(self, kernel, stream=0):
        found = self.loaded.get(kernel)
        if found is None:
            found = self.loaded[kernel] = build(kernel.name, kernel.constants)
        return found

    def starter(self, launch, stream: int):
        library = self.load(launch.kernel)
        constants = dict(launch.kernel.constants)
        side = constants["NUM_SPLITS"] if constants.get("SYNC") else 1
        assert launch.grid % side == 0
        assert launch.shared <= self.shared
        sizes = launch.grid, launch.kernel.threads, launch.shared, side
        return lambda data: library.emulate(data, *sizes)

    def at_once(self, size, resident):
        return devices.Described.at_once(self, size, resident)
