"""What this machine is: the fingerprint that a profile is valid for.

Requirements this module meets:

- no framework is imported to find out; the CUDA driver is asked through ctypes, and opened here
  alone;
- nothing is probed at import, each device once, and whether there is a GPU is asked of the
  management library, so that a process which may still fork does not initialise CUDA;
- a probe that fails says why and leaves the rest to answer;
- kinds of device beside CPU and CUDA are plug-ins, imported when they are asked for.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hata import plugins
from hata.errors import HataDeviceError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Whose versions matter to a kernel's speed, by device kind.
_PACKAGES = {
    "cpu": ("hata-attention", "llvmlite", "numba", "numpy"),
    "cuda": ("cupy-cuda12x", "cupy-cuda13x", "hata-attention", "torch", "triton"),
}
ENTRY_POINTS = "hata.devices"
# CUdevice_attribute numbers of the driver API.
_SM_COUNT, _MAJOR, _MINOR, _SMEM_OPTIN = 16, 75, 76, 97


@dataclass(frozen=True)
class Fingerprint:
    """A device and the software on it, as a profile records them.

    Attributes:
        device: Kind of device: `"cpu"`, `"cuda"`, or that of a plug-in.
        name: What the driver or the kernel calls it, such as `"NVIDIA H200"`.
        cores: Streaming multiprocessors of a GPU; CPU cores this process may use.
        sm: Compute capability as one number (90 is 9.0), across which no configuration is used;
            `None` for a CPU.
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

    def __post_init__(self) -> None:
        # Plug-ins make them too, and names of files are made of these.
        none = type(None)
        kinds = {"device": (str,), "name": (str,), "cores": (int,)}
        for name, allowed in (kinds | {"sm": (int, none), "smem_optin": (int, none)}).items():
            value = getattr(self, name)
            if type(value) not in allowed:
                expected = " or ".join(kind.__name__ for kind in allowed)
                raise TypeError(f"Fingerprint.{name}: got {value!r}, expected {expected}")

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
        if self.sm is None or self.device != "cuda":
            return f"{self.name} ({self.cores} cores)"
        return f"{self.name} (sm_{self.sm}, {self.cores} SMs)"


class Kind(ABC):
    """A kind of device beside CPU and CUDA. Name the class by an entry point of `hata.devices`."""

    @abstractmethod
    def fingerprint(self, index: int | None) -> Fingerprint:
        """Of the device of this number; of the current one, or the first, where it is `None`.

        Raises:
            HataDeviceError: if there is no such device; the message says why.
        """

    @abstractmethod
    def clock(self) -> Any:
        """A new `hata.measure.clock.Clock`, which times calls on the current device."""


@lru_cache
def _plugins() -> dict[str, EntryPoint]:
    return plugins.named(ENTRY_POINTS, _PACKAGES)


def kinds() -> list[str]:
    """Every kind of device that is known, whether one is here or not."""
    return [*_PACKAGES, *_plugins()]


@lru_cache
def plugin(kind: str) -> Kind:
    """What a plug-in says of its kind of device, imported at first use.

    Raises:
        HataDeviceError: it does not load, or is no `Kind`; no other kind is harmed.
    """
    with plugins.blamed(f"device: the plug-in of {kind!r} failed to load", HataDeviceError):
        found = _plugins()[kind].load()()
        if not isinstance(found, Kind):
            raise TypeError(f"got {found!r}, expected a subclass of hata.device.Kind")
    return found


def fingerprint(device: str = "cpu") -> Fingerprint:
    """The fingerprint of a device of this machine, without kernels. Probed once per device.

    Args:
        device: `"cpu"`, `"cuda"` (the current GPU, else the first), `"cuda:<index>"`, or likewise
            the kind of a plug-in.

    Raises:
        HataDeviceError: if there is no such device; the message says what the driver said.
    """
    kind, _, index = device.partition(":")
    if kind not in kinds() or (index and not index.isdecimal()):
        raise HataDeviceError(
            f"device: got {device!r}, expected {', '.join(map(repr, kinds()))}, or with an index "
            "as in 'cuda:<index>'; correct it"
        )
    number = int(index) if index else None
    if kind == "cpu":
        return _cpu()
    if kind == "cuda":
        return _cuda(_current_gpu() if number is None else number)
    made, failed = plugin(kind), f"device: the plug-in of {kind!r} failed"
    with plugins.blamed(failed, HataDeviceError, meant=HataDeviceError):
        found = made.fingerprint(number)
        if not isinstance(found, Fingerprint) or found.device != kind:
            raise TypeError(f"got {found!r}, expected a Fingerprint of {kind!r}")
    return found


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is visible to this process. Does not initialise CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    return _gpu_count() > 0


def is_here(kind: str) -> bool:
    """Whether a device of this kind is visible to this process."""
    if kind == "cuda":
        return has_cuda()
    try:
        return bool(fingerprint(kind))
    except HataDeviceError:
        return False


def default_device() -> str:
    """`"cuda"` where a GPU is visible, else the first plug-in's kind that is here, else `"cpu"`."""
    return next(kind for kind in ("cuda", *_plugins(), "cpu") if is_here(kind))


@lru_cache
def package_version(distribution: str) -> str | None:
    """Version of an installed distribution, `None` if absent. Imports nothing of it."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions(kind: str) -> dict[str, str]:
    found = ((name, package_version(name)) for name in _PACKAGES[kind])
    return {name: version for name, version in found if version is not None}


@lru_cache
def _cpu() -> Fingerprint:
    return Fingerprint("cpu", _cpu_name(), cpu_cores(), versions=_versions("cpu"))


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:[^\S\n]*(\S.*)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache
def cuda_driver() -> ctypes.CDLL:
    """The CUDA driver, initialised.

    Raises:
        HataDeviceError: if there is none, or it refuses to start.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise HataDeviceError(
            f"device: no CUDA driver was found ({error}); install the NVIDIA driver, or use 'cpu'"
        ) from None
    _call(driver, "cuInit", ctypes.c_uint(0))
    return driver


def cuda_reason(driver: ctypes.CDLL, code: int) -> str:
    """What the driver says of an error's code, code included."""
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"{code}: {(text.value or b'unknown error').decode(errors='replace')}"


def _call(driver: ctypes.CDLL, function: str, *args: object) -> None:
    code = getattr(driver, function)(*args)
    if code:
        raise HataDeviceError(
            f"device: the CUDA driver refused {function} ({cuda_reason(driver, code)}); check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or use 'cpu'"
        )


def _current_gpu() -> int:
    ordinal = ctypes.c_int(0)
    # Without a context on this thread the driver refuses, and the first GPU is the default one.
    return ordinal.value if cuda_driver().cuCtxGetDevice(ctypes.byref(ordinal)) == 0 else 0


@lru_cache
def _cuda(index: int) -> Fingerprint:
    driver = cuda_driver()
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


def _managed(function: str, *args: object) -> bool:
    """Ask the GPU management library something: whether it is here and answers."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return library.nvmlInit_v2() == 0 and getattr(library, function)(*args) == 0


@lru_cache
def _gpu_count() -> int:
    count = ctypes.c_uint()
    return count.value if _managed("nvmlDeviceGetCount_v2", ctypes.byref(count)) else 0


def _driver_version() -> str | None:
    text = ctypes.create_string_buffer(96)
    known = _managed("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
    return (text.value.decode(errors="replace") or None) if known else None
