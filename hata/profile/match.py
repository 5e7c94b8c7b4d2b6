"""Which entry of a profile serves a problem.

A configuration never crosses a hard difference: the kind of device, its compute capability, the
sources of the kernel, and `HARD_FIELDS` of the problem. Among the entries that are left the
nearest in log2 space over `SOFT_FIELDS` serves, if it is near enough. A default is a rule for all
problems, so where it was the best nearby it is the problem's own default that serves, and not the
neighbour's. What is refused is said once, with the command that tunes anew; what differs harmlessly
(driver, versions, the machine's name) is logged once.
"""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from hata import device
from hata.device import Fingerprint
from hata.errors import HataDeviceError
from hata.problem import HARD_FIELDS, SOFT_FIELDS, Problem
from hata.profile.records import Entry
from hata.profile.store import is_shipped

if TYPE_CHECKING:
    from hata.profile import Profile

# How far an entry may be, in factors of two over all soft fields together.
_FAR = 2.0
_logger = logging.getLogger("hata.profile")
_said: set[tuple[str, str]] = set()


class ProfileWarning(UserWarning):
    """A profile, or an entry of one, is not used; the message says why."""


class Match(NamedTuple):
    """Answer of a look-up.

    Attributes:
        config: The configuration to run with; `None`: use the backend's default.
        entry: The nearest entry; `None` where none may serve. It may leave the problem its default.
        reason: Why this is the answer, for people.
    """

    config: Mapping[str, int | str | bool] | None
    entry: Entry | None
    reason: str


def lookup(
    profile: Profile,
    backend: str,
    kernel_hash: str,
    problem: Problem,
    tunables: Mapping[str, tuple],
    refuse: Callable[[Mapping[str, int | str | bool]], str | None] | None = None,
    here: Fingerprint | None = None,
) -> Match:
    """See `Profile.lookup`."""
    reason = _foreign(profile, problem.device, here)
    if reason is not None:
        return Match(None, None, reason)
    candidates = [
        entry
        for entry in profile.entries
        if entry.backend == backend
        and all(getattr(entry.key, name) == getattr(problem, name) for name in HARD_FIELDS)
    ]
    if not candidates:
        return Match(None, None, f"no entry for {backend} {problem.op} with these sizes")
    # min keeps the first of equals; rounding makes mirrored distances equal.
    entry = min(candidates, key=lambda entry: round(_distance(entry.key, problem), 9))
    if entry.config and not tunables:
        # It had knobs once: on a CPU `reference` was what `numba` is now.
        return Match(None, None, f"{backend} has nothing to tune")
    if profile.fingerprint.kernels.get(backend, {}).get(problem.op) != kernel_hash:
        reason = f"the {backend} kernels of {problem.op} have changed since it was tuned"
    else:
        reason = _outside(entry.config, tunables) or (refuse and refuse(entry.config))
    if reason:
        reason = f"{reason}; the default is used; tune anew with: {retune(profile, backend)}"
        warn_once(profile, f"entry {backend} {problem.op} refused: {reason}")
        return Match(None, None, reason)
    apart = [
        f"{name} {getattr(entry.key, name)} for {getattr(problem, name)}"
        for name in SOFT_FIELDS
        if getattr(entry.key, name) != getattr(problem, name)
    ]
    if not apart:
        return Match(entry.config, entry, "exact")
    nearest = f"nearest: {', '.join(apart)}"
    if entry.us.median >= entry.default_us:
        return Match(None, entry, f"{nearest}; the default is best there, so here it is used too")
    if round(_distance(entry.key, problem), 9) > _FAR:
        return Match(None, entry, f"{nearest}; too far, so the default is used")
    return Match(entry.config, entry, nearest)


def leader(
    profile: Profile, op: str, kind: str, hashes: Mapping[str, str], here: Fingerprint | None = None
) -> str | None:
    """See `Profile.leader`."""
    if _foreign(profile, kind, here) is not None:
        return None
    times: dict[Problem, dict[str, float]] = {}
    for entry in profile.entries:
        recorded = profile.fingerprint.kernels.get(entry.backend, {}).get(op)
        if entry.op == op and recorded is not None and recorded == hashes.get(entry.backend):
            times.setdefault(entry.key, {})[entry.backend] = entry.us.median
    wins = Counter(min(of, key=lambda name: of[name]) for of in times.values() if len(of) > 1)
    most = max(wins.values(), default=0)
    leaders = [name for name, count in wins.items() if count == most]
    return leaders[0] if len(leaders) == 1 else None


def _foreign(profile: Profile, kind: str, here: Fingerprint | None) -> str | None:
    """Why the profile is of another device; `None` if it may serve."""
    recorded = profile.fingerprint
    if recorded.device != kind:
        reason = f"it is for {recorded.describe()}, not for {kind}"
        if recorded.device == "cuda" and not device.has_cuda():
            warn_once(profile, f"not used: {reason}; no GPU is visible here")
        return reason
    try:
        here = here or device.fingerprint(kind)
    except HataDeviceError as error:
        return str(error)
    if recorded.sm != here.sm:
        reason = f"it is for {recorded.describe()}, this is {here.describe()}"
        warn_once(profile, f"not used: {reason}; tune with: hata tune --gpu auto")
        return reason
    apart = soft_differences(recorded, here)
    if apart and _first(profile, "soft"):
        _logger.info("profile %s is used although %s", profile.label, "; ".join(apart))
    return None


def soft_differences(recorded: Fingerprint, here: Fingerprint) -> list[str]:
    """Differences under which a profile still serves, in words."""
    apart = [
        f"{name} was {getattr(recorded, name)}, is {getattr(here, name)}"
        for name in ("name", "cores", "smem_optin", "driver", "cuda")
        if getattr(recorded, name) != getattr(here, name)
    ]
    for package, version in recorded.versions.items():
        if here.versions.get(package) != version:
            apart.append(f"{package} was {version}, is {here.versions.get(package, 'absent')}")
    return apart


def _distance(a: Problem, b: Problem) -> float:
    return sum(
        abs(math.log2(max(getattr(a, name), 1)) - math.log2(max(getattr(b, name), 1)))
        for name in SOFT_FIELDS
    )


def _outside(config: Mapping[str, int | str | bool], tunables: Mapping[str, tuple]) -> str | None:
    """Why a configuration is not one of the backend's; `None` if it is."""
    for name in [*config, *tunables]:
        if name not in tunables:
            return f"{name} is no knob of this kernel"
        if name not in config:
            return f"{name} is missing"
        value = config[name]
        # True == 1, yet a kernel specialised on one is not specialised on the other.
        if not any(type(value) is type(other) and value == other for other in tunables[name]):
            allowed = ", ".join(map(str, tunables[name]))
            return f"{name}={value} is not allowed here (allowed: {allowed})"
    return None


def retune(profile: Profile, backend: str) -> str:
    """The command that renews a profile's entries of a backend."""
    gpu = "cpu" if profile.fingerprint.device == "cpu" else "auto"
    command = f"hata tune --gpu {gpu} --backend {backend}"
    # What is found by itself needs no name, and a file of the package is not to be written.
    if profile.path is None or profile.origin == "user cache" or is_shipped(profile.path):
        return command
    return f"{command} --out {shlex.quote(str(profile.path))}"


def warn_once(profile: Profile | None, message: str) -> None:
    """Warn of a profile, once a process for each profile and message."""
    label = profile.label if profile is not None else ""
    if _first(profile, message):
        warnings.warn(f"profile {label}: {message}" if label else message, ProfileWarning, 3)


def _first(profile: Profile | None, message: str) -> bool:
    said = (profile.label if profile is not None else "", message)
    if said in _said:
        return False
    _said.add(said)
    return True
