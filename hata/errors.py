"""The errors of HATA.

Every message names the argument, what came, what is expected, and the fix. Each class also
derives from the built-in a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations


class HataError(Exception):
    """Base of all errors raised on purpose by HATA."""


class HataShapeError(HataError, ValueError):
    """A shape, a stride or a size does not fit the contract."""


class HataDTypeError(HataError, TypeError):
    """A dtype, a Python type or a framework does not fit the contract."""


class HataDeviceError(HataError, ValueError):
    """Arrays are on a device the backend cannot use, or on several devices."""


class HataAutogradError(HataError, RuntimeError):
    """A gradient was asked of an op that has no backward."""


class HataCaptureError(HataError, RuntimeError):
    """An unprepared call was made while a CUDA graph is being captured."""


class BackendUnavailable(HataError, RuntimeError):
    """A backend cannot run here, or cannot run this problem; the message says why."""


class UnsupportedProblem(BackendUnavailable):
    """A backend declares that it cannot run this problem; the message gives its reasons."""


class KernelError(HataError, RuntimeError):
    """A kernel that should run here cannot be compiled or loaded; the message says why."""


class UnknownBackend(HataError, ValueError):
    """No backend has this name; the message suggests the nearest one."""


class ProfileError(HataError, ValueError):
    """A profile is malformed, foreign or may not be written."""


class EncoderError(HataError, ValueError):
    """An encoder file is malformed or does not fit the model."""


class AttachError(HataError, ValueError):
    """A model cannot be attached to."""


class CaptureError(HataError, ValueError):
    """The model or the text cannot be used to learn or to choose from."""


class LearnError(HataError, ValueError):
    """A training cannot be started or resumed as asked."""
