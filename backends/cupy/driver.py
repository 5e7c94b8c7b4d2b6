"""The CUDA driver, reached through ctypes: its library, its structures, its errors."""

from __future__ import annotations

import ctypes
import functools

from hata.device import cuda_driver, cuda_reason
from hata.errors import KernelError

# CUdevice_attribute, CUfunction_attribute, CUlaunchAttributeID and CUresult numbers.
SMS, MAJOR, MINOR, SHARED = 16, 75, 76, 97
MOST_SHARED, CARVEOUT, LARGE_CLUSTERS = 8, 9, 14
COOPERATIVE, CLUSTER, PDL = 2, 4, 6
NO_CONTEXT = 201
# CUstreamCaptureMode.
RELAXED = 2


class _Value(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("dims", ctypes.c_uint * 3), ("flag", ctypes.c_int))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", _Value))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


# Kernels take one argument, a struct by value.
OneArgument = ctypes.c_char_p * 1


@functools.lru_cache
def library() -> ctypes.CDLL:
    """The driver's library, initialised."""
    found = cuda_driver()
    found.cuLaunchKernelEx.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        OneArgument,
        ctypes.c_void_p,
    )
    return found


def version() -> int:
    """Major version of the CUDA that the driver speaks."""
    found = ctypes.c_int()
    checked(library(), library().cuDriverGetVersion(ctypes.byref(found)), "cuDriverGetVersion")
    return found.value // 1000


def checked(library: ctypes.CDLL, code: int, what: str) -> None:
    """Raise if the driver refused something."""
    if code:
        raise KernelError(
            f"backend 'cupy': the CUDA driver refused {what} ({cuda_reason(library, code)}); check "
            "nvidia-smi, or use another backend"
        )
