"""Which entry of a profile serves a problem.

A configuration never crosses a hard difference: the kind of device, its compute capability, the
sources of the kernel, and `HARD_FIELDS` of the problem. Among the entries that are left the
nearest in log2 space over `SOFT_FIELDS` serves, if it is near enough. A default is a rule for all
problems, so where it was the best nearby it is the problem's own default that serves, and not the
neighbour's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hata.device import Fingerprint
from hata.problem import HARD_FIELDS, SOFT_FIELDS, Problem
from hata.profile.entries import Entry

# How far an entry may be, in factors of two over all soft fields together.
_FAR = 2.0


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


def nearest(entries: Iterable[Entry], backend: str, problem: Problem) -> Entry | None:
    """The nearest entry without a hard difference, whether it is near enough or not."""
    candidates = [
        entry
        for entry in entries
        if entry.backend == backend
        and all(getattr(entry.key, name) == getattr(problem, name) for name in HARD_FIELDS)
    ]
    # min keeps the first of equals.
    return min(candidates, key=lambda entry: _distance(entry.key, problem), default=None)


def served(entry: Entry, problem: Problem) -> Match:
    """What the nearest entry means for a problem, if nothing is wrong with it."""
    apart = [
        f"{name} {getattr(entry.key, name)} for {getattr(problem, name)}"
        for name in SOFT_FIELDS
        if getattr(entry.key, name) != getattr(problem, name)
    ]
    if not apart:
        return Match(entry.config, entry, "exact")
    nearest = f"nearest: {', '.join(apart)}"
    if _distance(entry.key, problem) > _FAR:
        return Match(None, None, f"{nearest}; too far, so the default is used")
    if entry.us.median >= entry.default_us:
        return Match(None, entry, f"{nearest}; the default is best there, so here it is used too")
    return Match(entry.config, entry, nearest)


def leader(entries: Iterable[Entry]) -> str | None:
    """The backend that was fastest on most problems on which several were measured, if one was."""
    times: dict[Problem, dict[str, float]] = {}
    for entry in entries:
        times.setdefault(entry.key, {})[entry.backend] = entry.us.median
    wins = Counter(min(of, key=lambda name: of[name]) for of in times.values() if len(of) > 1)
    most = max(wins.values(), default=0)
    leaders = [name for name, count in wins.items() if count == most]
    return leaders[0] if len(leaders) == 1 else None


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
    steps = (
        abs(math.log2(max(getattr(a, name), 1)) - math.log2(max(getattr(b, name), 1)))
        for name in SOFT_FIELDS
    )
    # Mirrored distances are equal.
    return round(sum(steps), 9)


def outside(config: Mapping[str, int | str | bool], tunables: Mapping[str, tuple]) -> str | None:
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
