"""What this machine is: the fingerprint that a profile is valid for.

Requirements this module meets:

- no framework is imported to find out; the CUDA driver is asked through ctypes;
- nothing is probed at import, each device once, and whether there is a GPU is asked of the
  management library, so that a process which may still fork does not initialise CUDA;
- a probe that fails says why and leaves the rest to answer.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from hata.errors import HataDeviceError

# Whose versions matter to a kernel's speed, by device kind.
_PACKAGES = {
    "cpu": ("hata-attention", "llvmlite", "numba", "numpy"),
    "cuda": ("cupy-cuda12x", "cupy-cuda13x", "hata-attention", "torch", "triton"),
}
# CUdevice_attribute numbers of the driver API.
_SM_COUNT, _MAJOR, _MINOR, _SMEM_OPTIN = 16, 75, 76, 97


@dataclass(frozen=True)
class Fingerprint:
    """A device and the software on it, as a profile records them.

    Attributes:
        device: Kind of device, `"cpu"` or `"cuda"`.
        name: What the driver or the kernel calls it, such as `"NVIDIA H200"`.
        cores: Streaming multiprocessors of a GPU; CPU cores this process may use.
        sm: Compute capability as one number (90 is 9.0); `None` for a CPU.
        smem_optin: Shared memory a block may opt in to, in bytes; `None` for a CPU.
        driver: Version of the GPU driver; `None` if there is none or it is unknown.
        cuda: Version of CUDA the driver speaks, such as `"13.0"`; `None` for a CPU.
        versions: Distribution name -> version, of what the kernels are compiled by.
        kernels: Backend -> op -> SHA-256 of the kernel sources that were measured.
    """

    device: str
    name: str
    cores: int
    sm: int | None = None
    smem_optin: int | None = None
    driver: str | None = None
    cuda: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str, int, int | None]:
        """What makes two devices the same for measurements: kind, name, cores, sm."""
        return self.device, self.name, self.cores, self.sm

    @property
    def slug(self) -> str:
        """The device as a file name, such as `nvidia-h200-132` or `cpu-amd-epyc-9654-96`."""
        words = re.sub(r"\((r|tm|c)\)", " ", self.name.lower())
        if self.device == "cpu":
            words = "cpu " + re.sub(r"@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b", " ", words)
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:48].rstrip("-") + f"-{self.cores}"

    def describe(self) -> str:
        """The device in a few words."""
        if self.device == "cpu":
            return f"{self.name} ({self.cores} cores)"
        return f"{self.name} (sm_{self.sm}, {self.cores} SMs)"


def fingerprint(device: str = "cpu") -> Fingerprint:
    """The fingerprint of a device of this machine, without kernels. Probed once per device.

    Args:
        device: `"cpu"`, `"cuda"` (the current GPU, else the first) or `"cuda:<index>"`.

    Raises:
        HataDeviceError: if there is no such device; the message says what the driver said.
    """
    kind, _, index = device.partition(":")
    if kind not in _PACKAGES or (index and not index.isdecimal()):
        raise HataDeviceError(
            f"device: got {device!r}, expected 'cpu', 'cuda' or 'cuda:<index>'; correct it"
        )
    if kind == "cpu":
        return _cpu()
    return _cuda(int(index) if index else _current_gpu())


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is visible to this process. Does not initialise CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    return _gpu_count() > 0


def default_device() -> str:
    """`"cuda"` where a GPU is visible, else `"cpu"`."""
    return "cuda" if has_cuda() else "cpu"


@lru_cache
def package_version(distribution: str) -> str | None:
    """Version of an installed distribution, `None` if absent. Imports nothing of it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions(kind: str) -> dict[str, str]:
    found = ((name, package_version(name)) for name in _PACKAGES[kind])
    return {name: version for name, version in found if version is not None}


@lru_cache
def _cpu() -> Fingerprint:
    return Fingerprint("cpu", _cpu_name(), _cpu_cores(), versions=_versions("cpu"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _cpu_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _driver() -> ctypes.CDLL:
    """The CUDA driver, initialised."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise HataDeviceError(
            f"device: no CUDA driver was found ({error}); install the NVIDIA driver, or use 'cpu'"
        ) from None
    _call(driver, "cuInit", ctypes.c_uint(0))
    return driver


def _call(driver: ctypes.CDLL, function: str, *args: object) -> None:
    code = getattr(driver, function)(*args)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode(errors="replace")
        raise HataDeviceError(
            f"device: the CUDA driver refused {function} ({code}: {reason}); check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use 'cpu'"
        )


def _current_gpu() -> int:
    ordinal = ctypes.c_int(0)
    # Without a context on this thread the driver refuses, and the first GPU is the default one.
    return ordinal.value if _driver().cuCtxGetDevice(ctypes.byref(ordinal)) == 0 else 0


@lru_cache
def _cuda(index: int) -> Fingerprint:
    driver = _driver()
    device, version = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
        return value.value

    return Fingerprint(
        device="cuda",
        name=name.value.decode(errors="replace"),
        cores=attribute(_SM_COUNT),
        sm=10 * attribute(_MAJOR) + attribute(_MINOR),
        smem_optin=attribute(_SMEM_OPTIN),
        driver=_driver_version(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        versions=_versions("cuda"),
    )


def _management() -> ctypes.CDLL | None:
    """The GPU management library, initialised; `None` where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


@lru_cache
def _gpu_count() -> int:
    library = _management()
    if library is None:
        return 0
    count = ctypes.c_uint()
    return count.value if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0


def _driver_version() -> str | None:
    library = _management()
    text = ctypes.create_string_buffer(96)
    if library is None or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) != 0:
        return None
    return text.value.decode(errors="replace") or None
