"""The registry: which backend and which profile are in force. The one mutable global.

Requirements this module meets:

- backends are named as strings and imported at first use; nothing here imports a framework;
- an explicit choice never falls back silently, and a choice that fails changes nothing;
- `"auto"` (the default) chooses per op and problem: the fastest backend that the profile in force
  has measured, else the one that it found fastest most often, else the first of `AUTO_ORDER` that
  can run it, then third parties by name;
- `set_backend` is process-wide and seen by all threads; `use_backend` is context-local;
- a broken third-party backend is reported and harms no other.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from hata import device as devices
from hata import plugins
from hata.arrays import Framework
from hata.backend import Backend, Config
from hata.checks import reads_values
from hata.errors import BackendUnavailable, HataDTypeError, HataError, UnknownBackend
from hata.problem import Problem

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hata.profile import Match, Profile

BUILT_IN = {
    "reference": "hata.backends.reference:ReferenceBackend",
    "numba": "hata.backends.numba:NumbaBackend",
    "triton": "hata.backends.triton:TritonBackend",
    "cupy": "hata.backends.cupy:CuPyBackend",
}
# Untuned, on an H200: `triton` takes up to 1.4 times as long, and less with groups of 16; on other
# architectures neither was measured.
AUTO_ORDER = ("triton", "cupy", "numba", "reference")
ENTRY_POINTS = "hata.backends"


class BackendInfo(NamedTuple):
    """What is known of a backend: its name, whether it can run here, and if not, why."""

    name: str
    available: bool
    reason: str


@dataclass(slots=True)
class Memo:
    """What `hata.dispatch` remembers, for as long as the choices in force stay.

    Attributes:
        routes: Signature -> route.
        last: The signature and the route of the last call.
    """

    routes: dict[tuple, Any] = field(default_factory=dict)
    last: tuple[tuple, Any] = ((), None)


class _State:
    """What can change: the default backend, loaded backends, the profile."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        named = os.environ.get("HATA_BACKEND", "").strip()
        self.default = named or "auto"
        # Said by errors, for nothing in the program names this backend.
        self.by_environment = bool(named)
        self.backends: dict[str, Backend] = {}
        self.profile: Profile | None = None
        self.profile_known = False
        # Memos of decisions, emptied whenever anything above changes: of `resolve`, and of
        # `hata.dispatch`.
        self.chosen: dict[tuple, Backend] = {}
        self.memo = Memo()


_state = _State()
_local: ContextVar[str | None] = ContextVar("hata_backend", default=None)


def _plugins() -> dict[str, EntryPoint]:
    return plugins.named(ENTRY_POINTS, {*BUILT_IN, "auto"})


def class_of(name: str) -> type[Backend]:
    """Import the class of a backend, whether or not it can run here.

    Raises:
        UnknownBackend: no backend has this name.
        BackendUnavailable: it cannot be imported, or is no backend.
    """
    if name in BUILT_IN:
        from importlib.metadata import EntryPoint

        known = {name: EntryPoint(name, BUILT_IN[name], ENTRY_POINTS)}
    else:
        known = _plugins()
    if name not in known:
        names = ["auto", *BUILT_IN, *known]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownBackend(
            f"backend: got {name!r}, expected one of {', '.join(map(repr, names))}.{hint}"
        )
    with plugins.blamed(f"backend {name!r} failed to load", BackendUnavailable):
        found = known[name].load()
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendUnavailable(
            f"backend {name!r}: its entry point names {found!r}, expected a subclass of "
            "hata.backend.Backend"
        )
    if getattr(found, "name", None) != name:
        raise BackendUnavailable(
            f"backend {name!r}: its class {found.__qualname__} has the name "
            f"{getattr(found, 'name', None)!r}, expected that of its entry point"
        )
    return found


def missing(name: str) -> str | None:
    """Why a backend says that it cannot run on this machine; `None` if it can.

    Raises:
        UnknownBackend: no backend has this name.
        BackendUnavailable: it does not even load, fails to say, or is abstract; that is a fault of
            the backend and not of the machine.
    """
    backend_class = class_of(name)
    with plugins.blamed(f"backend {name!r}: its missing() failed", BackendUnavailable):
        reason = backend_class.missing()
    if reason is None and inspect.isabstract(backend_class):
        absent = ", ".join(sorted(backend_class.__abstractmethods__))
        raise BackendUnavailable(
            f"backend {name!r}: its class is abstract: it does not implement {absent}"
        )
    return reason


def load(name: str) -> Backend:
    """The instance of a backend, imported and checked at its first use.

    Raises:
        UnknownBackend: no backend has this name.
        BackendUnavailable: it cannot run here; the message says why.
    """
    if not isinstance(name, str):
        raise HataDTypeError(
            f"backend: got {name!r} of type {type(name).__name__}, expected a name (str)"
        )
    found = _state.backends.get(name)
    if found is not None:
        return found
    with _state.lock:
        if name not in _state.backends:
            reason = missing(name)
            if reason is not None:
                raise BackendUnavailable(
                    f"backend {name!r} cannot run here: {reason}; "
                    "`hata info` lists every backend and what it needs"
                )
            with plugins.blamed(f"backend {name!r} failed to start", BackendUnavailable):
                backend = class_of(name)()
            backend.look_up_with(_config_of)
            _state.backends[name] = backend
        return _state.backends[name]


def set_backend(name: str) -> None:
    """Choose the backend of the whole process.

    Args:
        name: `"auto"`, `"numba"`, `"triton"`, `"cupy"`, `"reference"`, or that of a plug-in.

    Raises:
        UnknownBackend: no backend has this name (a `ValueError`, with the nearest name).
        BackendUnavailable: it cannot run here. The choice in force is unchanged.
    """
    if name != "auto":
        load(name)
    with _state.lock:
        _state.default = name
        _state.by_environment = False


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of this context (thread or task) for the length of a `with` block.

    Raises:
        UnknownBackend, BackendUnavailable: as `set_backend`.
    """
    if name != "auto":
        load(name)
    token = _local.set(name)
    try:
        yield
    finally:
        _local.reset(token)


def get_backend() -> str:
    """Name of the backend in force here, `"auto"` unless one was chosen."""
    return _local.get() or _state.default


def environment_faults() -> list[str]:
    """What `HATA_BACKEND` and `HATA_CHECK` say that cannot be followed, in words.

    The ops say the same, as an error, at their first call.
    """
    found = []
    try:
        if _state.by_environment and _state.default != "auto":
            load(_state.default)
    except (UnknownBackend, BackendUnavailable) as error:
        found.append(f"HATA_BACKEND: {error}")
    try:
        reads_values()
    except HataError as error:
        found.append(str(error))
    return found


def list_backends() -> list[BackendInfo]:
    """Every known backend, and why it cannot run here where it cannot."""
    found = []
    for name in (*BUILT_IN, *_plugins()):
        try:
            reason = missing(name)
        except BackendUnavailable as error:
            reason = str(error)
        found.append(BackendInfo(name, reason is None, reason or ""))
    return found


def use_profile(profile: str | os.PathLike[str] | Profile | None) -> None:
    """Use a profile in the whole process from now on.

    Args:
        profile: A path, a loaded `hata.profile.Profile`, or `None` for the usual look-up:
            `HATA_PROFILE`, the user's cache folder, the shipped profiles, defaults.

    Raises:
        ProfileError: the file is malformed or of another schema. The profile in force is unchanged.
    """
    from hata.profile import Profile

    loaded = profile
    if not (loaded is None or isinstance(loaded, Profile)):
        loaded = Profile.load(loaded)
    with _state.lock:
        _state.profile = loaded
        _state.profile_known = loaded is not None
        _forget()


def profile_in_force() -> Profile | None:
    """The profile in force, found at first use; `None` if there is none."""
    if not _state.profile_known:
        from hata.profile import find

        with _state.lock:
            if not _state.profile_known:
                _state.profile = find()
                _state.profile_known = True
                _forget()
    return _state.profile


def stale(profile: Profile) -> list[str]:
    """What in a profile is of kernels that have changed since it was tuned, in words.

    Entries of those are not used. Backends that are not here, or do not load, are left out.
    """
    found = []
    for name in dict.fromkeys(entry.backend for entry in profile.entries):
        entries = [entry for entry in profile.entries if entry.backend == name]
        try:
            backend = class_of(name)()
            hashes = {op: backend.kernel_hash(op) for op in {entry.op for entry in entries}}
            old = [e.op for e in entries if hashes[e.op] != profile.kernel_hash(e)]
        # Code of a plug-in; whether it loads, `list_backends` tells.
        except Exception:
            continue
        if old and type(backend).tunables is Backend.tunables:
            found.append(f"{name} has nothing to tune, so entries of it ({len(old)}) are not used")
        elif old:
            found.append(
                f"the {name} kernels of {', '.join(sorted({*old}))} have changed since, so "
                f"entries of them ({len(old)}) are not used; tune anew with: {profile.retune(name)}"
            )
    return found


def _forget() -> None:
    # New ones: a thread that is choosing by what was in force writes into the old ones. Memos come
    # last, for what enters a new one must not be made of old configurations.
    for backend in _state.backends.values():
        backend.look_up_with(_config_of)
    _state.chosen = {}
    _state.memo = Memo()


def _match(backend: Backend, problem: Problem) -> Match | None:
    profile = profile_in_force()
    if profile is None:
        return None

    def refuse(config: Config) -> str | None:
        """Why its kernels do not fit the GPU that is here, if so."""
        here = devices.fingerprint(problem.device)
        if here.sm is None:
            return None
        return backend.refusal(problem, config, here.sm, here.smem_optin or 0)

    sources, knobs = backend.kernel_hash(problem.op), backend.tunables(problem.op, problem)
    return profile.lookup(backend.name, sources, problem, knobs, refuse=refuse)


def _config_of(backend: Backend, problem: Problem) -> Config | None:
    match = _match(backend, problem)
    return None if match is None else match.config


def _automatic(problem: Problem, fw: Framework, device: str) -> Backend:
    """The backend `"auto"` stands for: measured fastest, here or mostly, else the first one."""
    reasons, able = [], {}
    kind, profile = device.partition(":")[0], profile_in_force()
    for name in (*AUTO_ORDER, *_plugins()):
        try:
            # First the device, which costs nothing to compare: to ask a backend whether it could
            # run at all may import a framework that this caller does not use.
            devices = class_of(name).devices
            if kind not in devices:
                reasons.append(f"backend {name!r} runs on {' or '.join(sorted(devices))} alone")
                continue
            backend = load(name)
            backend.accept(problem, fw, device)
            backend.config(problem)
            able[name] = backend, _match(backend, problem), backend.kernel_hash(problem.op)
        except HataError as error:
            reasons.append(str(error))
        except (Exception, SystemExit) as error:
            # Code of a plug-in, such as its unsupported(): it must not harm the others.
            reasons.append(f"backend {name!r} failed: {type(error).__name__}: {error}")
    if not able:
        raise BackendUnavailable(
            f"no backend can run {problem.op} on {device}:\n  " + "\n  ".join(reasons)
        )
    entries = {name: match.entry for name, (_, match, _) in able.items() if match is not None}
    measured = {name: entry.us.median for name, entry in entries.items() if entry is not None}
    leader = None
    if not measured and profile is not None and len(able) > 1:
        # Sizes like these were not measured; others were.
        hashes = {name: sources for name, (*_, sources) in able.items()}
        leader = profile.leader(problem.op, kind, hashes)
    # The first of equals.
    return able[leader or min(able, key=lambda name: measured.get(name, math.inf))][0]


def in_force() -> tuple[str, Memo]:
    """The name of the backend in force here, and the memo."""
    state = _state
    return _local.get() or state.default, state.memo


def resolve(problem: Problem, fw: Framework, device: str, name: str | None = None) -> Backend:
    """The backend that runs this problem now.

    Args:
        problem: What is to run.
        fw: The framework of its arrays.
        device: Where they lie, such as `"cuda:0"`.
        name: The backend that `in_force` named; `None`: that of now.

    Raises:
        BackendUnavailable, HataDeviceError, HataDTypeError: the backend in force cannot run it
            (`UnsupportedProblem` where it has reasons against this problem alone).
        UnknownBackend: `HATA_BACKEND` names none.
    """
    name = name or get_backend()
    key = (name, problem, fw.name, device)
    chosen = _state.chosen
    backend = chosen.get(key)
    if backend is None:
        if name == "auto":
            backend = _automatic(problem, fw, device)
        else:
            try:
                backend = load(name)
            except (UnknownBackend, BackendUnavailable) as error:
                if _local.get() is None and _state.by_environment:
                    raise type(error)(f"HATA_BACKEND: {error}") from error
                raise
            backend.accept(problem, fw, device)
        if len(chosen) >= 4096:
            chosen.clear()
        chosen[key] = backend
    return backend


def reset() -> None:
    """Forget every choice, as in a new process (for tests)."""
    global _state
    _state = _State()
