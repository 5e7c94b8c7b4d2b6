"""Profiles: what the tuner found out, in one YAML file a person can read and compare.

A profile belongs to one device. It holds kernel configurations (*entries*), found by
`Profile.lookup`, and policies of models (*selections*), found by `Profile.selection_for`. Only
this package knows that it is YAML: `text` reads and writes strict YAML, `fields` types and ranges,
`entries` and `selections` are the two halves, `schema` the file of both, `match` is the look-up
rule of entries, `store` the places and the locked writing.

The profile in force is the first of: `HATA_PROFILE` (a path, a name, or `none`), the user's cache
folder, those shipped with hata; else the backends' defaults. A fault in a file the user named is
an error; a fault in one that was merely found is a warning, and the next place is tried.
"""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from hata import device as _device
from hata.device import Fingerprint
from hata.errors import HataDeviceError, ProfileError
from hata.problem import Problem
from hata.profile import match, schema, selections, store
from hata.profile.entries import Entry, Measured, Timing
from hata.profile.match import Match, soft_differences
from hata.profile.schema import SCHEMA, Parts
from hata.profile.selections import EncoderKey, ModelKey, Quality, SelectionSet
from hata.profile.store import cache_root, named_path, resolve, safe_output, user_path

__all__ = [
    "SCHEMA",
    "EncoderKey",
    "Entry",
    "Fingerprint",
    "Match",
    "Measured",
    "ModelKey",
    "Profile",
    "ProfileError",
    "ProfileWarning",
    "Quality",
    "SelectionSet",
    "Timing",
    "cache_root",
    "default_output",
    "find",
    "named_path",
    "resolve",
    "safe_output",
    "soft_differences",
    "user_path",
]

_logger = logging.getLogger("hata.profile")


class ProfileWarning(UserWarning):
    """A profile, or an entry of one, is not used; the message says why."""


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, ProfileWarning, 3)


@cache
def _log_once(label: str, differences: str) -> None:
    _logger.info("profile %s is used although %s", label, differences)


@dataclass(frozen=True)
class Profile:
    """A profile.

    Attributes:
        fingerprint: The device and the kernels it is valid for.
        measured: How the entries were measured.
        entries: Kernel configurations.
        selections: Policies of models.
        schema: Always `"hata.profile/1"`.
        path: The file it was read from or written to.
        origin: Which rule of `find` found it; `""` where a path was given.
    """

    fingerprint: Fingerprint
    measured: Measured
    entries: tuple[Entry, ...] = ()
    selections: tuple[SelectionSet, ...] = ()
    schema: str = SCHEMA
    path: Path | None = field(default=None, compare=False)
    origin: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """What to call it in messages: its path, or the device it is for."""
        return str(self.path) if self.path else f"for {self.fingerprint.describe()}"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile, strictly. Nothing a file says is executed.

        Args:
            path: The file, or the name of one in the user's cache folder (see `resolve`).

        Raises:
            ProfileError: with file and line, for anything that is not a `hata.profile/1` file:
                tags, aliases, duplicate or unknown keys, doubtful scalars, values out of range.
        """
        file = resolve(path)
        return cls(*schema.read(store.read(file), str(file)), path=file.absolute())

    def save(self, path: str | os.PathLike[str]) -> Profile:
        """Write this profile, merged into what the file holds (see `merged_with`).

        Safe against other writers (a lock beside the file), crashes and a full disk (the old file
        stays). A file of another schema or another device is never overwritten.

        Returns:
            What the file holds now.

        Raises:
            ProfileError: if the file may not or cannot be written; it is unchanged then.
        """
        target = safe_output(path)
        written: list[Profile] = []

        def make(old: str | None) -> str:
            merged = self
            if old is not None:
                try:
                    merged = self.merged_with(Profile(*schema.read(old, str(target))))
                except ProfileError as error:
                    raise ProfileError(f"{error}; {target} was left as it is") from None
            text = merged.text()
            # What would be refused tomorrow is refused today.
            written.append(Profile(*schema.read(text, str(target)), path=target))
            return text

        store.replace(target, make)
        return written[-1]

    def text(self) -> str:
        """What is written of it."""
        return schema.write(Parts(self.fingerprint, self.measured, self.entries, self.selections))

    def merged_with(self, older: Profile) -> Profile:
        """This profile, with what `older` knows and this one does not.

        Entries with equal backend and key, and selections of an equal model, are this profile's;
        entries of kernels that have changed since are dropped, for they could never be used.
        Measured entries drop all predicted ones.

        Raises:
            ProfileError: if `older` is of another device, or if predictions would be mixed into
                measurements.
        """
        mine, theirs = self.fingerprint, older.fingerprint
        if mine.identity != theirs.identity:
            raise ProfileError(
                f"the profile there is for {theirs.describe()}, the new one for "
                f"{mine.describe()}; choose another file"
            )
        if self.measured.predicted and not older.measured.predicted and older.entries:
            raise ProfileError(
                "the profile there was measured, the new one is predicted; choose another file"
            )
        kernels = {
            backend: {**theirs.kernels.get(backend, {}), **mine.kernels.get(backend, {})}
            for backend in {**theirs.kernels, **mine.kernels}
        }
        merged = replace(self, fingerprint=replace(mine, kernels=kernels))
        known = {(entry.backend, entry.key) for entry in self.entries}
        kept = (
            entry
            for entry in older.entries
            if (entry.backend, entry.key) not in known
            and older.kernel_hash(entry) == merged.kernel_hash(entry)
            and older.measured.predicted == self.measured.predicted
        )
        models = {one.model for one in self.selections}
        others = (one for one in older.selections if one.model not in models)
        return replace(
            merged, entries=(*self.entries, *kept), selections=(*self.selections, *others)
        )

    def kernel_hash(self, entry: Entry) -> str | None:
        """Hash of the sources that an entry was measured with."""
        return self.fingerprint.kernels.get(entry.backend, {}).get(entry.op)

    def lookup(
        self,
        backend: str,
        kernel_hash: str,
        problem: Problem,
        tunables: Mapping[str, tuple],
        *,
        refuse: Callable[[Mapping[str, int | str | bool]], str | None] | None = None,
        here: Fingerprint | None = None,
    ) -> Match:
        """The configuration for a problem. Not memoised: ask once a problem.

        Args:
            backend: Name of the backend.
            kernel_hash: `Backend.kernel_hash(problem.op)` of the sources here.
            problem: What is to run.
            tunables: `Backend.tunables(problem.op, problem)`; an entry that steps outside is
                refused.
            refuse: Says why a configuration cannot run for a reason that no single knob shows,
                such as shared memory over the limit; `None` if it can.
            here: The device at hand; `None`: that of `problem.device`.

        Returns:
            The match. A refused entry or profile is warned of once (`ProfileWarning`), a soft
            difference logged once.
        """
        reason = self._foreign(problem.device, here)
        if reason is not None:
            return Match(None, None, reason)
        entry = match.nearest(self.entries, backend, problem)
        if entry is None:
            return Match(None, None, f"no entry for {backend} {problem.op} with these sizes")
        if entry.config and not tunables:
            # It had knobs once: on a CPU `reference` was what `numba` is now.
            return Match(None, None, f"{backend} has nothing to tune")
        if self.kernel_hash(entry) != kernel_hash:
            reason = f"the {backend} kernels of {problem.op} have changed since it was tuned"
        else:
            reason = match.outside(entry.config, tunables) or (refuse and refuse(entry.config))
        if reason:
            reason = f"{reason}; the default is used; tune anew with: {self.retune(backend)}"
            _warn_once(f"profile {self.label}: entry {backend} {problem.op} refused: {reason}")
            return Match(None, None, reason)
        return match.served(entry, problem)

    def leader(
        self, op: str, kind: str, hashes: Mapping[str, str], here: Fingerprint | None = None
    ) -> str | None:
        """The backend that was fastest on most problems of an op on which several were measured.

        Args:
            op: Name of the op.
            kind: Kind of device.
            hashes: `Backend.kernel_hash(op)` of the backends that may be named, by name.
            here: The device at hand; `None`: that of `kind`.

        Returns:
            Its name; `None` if the profile is of another device or kernels, or none leads.
        """
        if self._foreign(kind, here) is not None:
            return None
        return match.leader(
            entry
            for entry in self.entries
            if entry.op == op and self.kernel_hash(entry) == hashes.get(entry.backend, "")
        )

    def retune(self, backend: str) -> str:
        """The command that renews its entries of a backend."""
        gpu = "cpu" if self.fingerprint.device == "cpu" else "auto"
        command = f"hata tune --gpu {gpu} --backend {backend}"
        # What is found by itself needs no name, and a file of the package is not to be written.
        if self.path is None or self.origin == "user cache" or store.is_shipped(self.path):
            return command
        return f"{command} --out {shlex.quote(str(self.path))}"

    def selection_for(self, model: ModelKey) -> SelectionSet | None:
        """The policy for a model: of that model, else of one with equal sizes, else synthetic.

        Callers warn of the second (compare `.model.name`) and the third (`.source`).
        """
        return selections.policy_of(model, self.selections)

    def _foreign(self, kind: str, here: Fingerprint | None) -> str | None:
        """Why it is of another device; `None` if it may serve."""
        recorded = self.fingerprint
        if recorded.device != kind:
            reason = f"it is for {recorded.describe()}, not for {kind}"
            if not _device.is_here(recorded.device):
                what = "GPU" if recorded.device == "cuda" else f"{recorded.device} device"
                _warn_once(f"profile {self.label}: not used: {reason}; no {what} is visible here")
            return reason
        try:
            here = here or _device.fingerprint(kind)
        except HataDeviceError as error:
            return str(error)
        if recorded.sm != here.sm:
            reason = f"it is for {recorded.describe()}, this is {here.describe()}"
            _warn_once(f"profile {self.label}: not used: {reason}; tune with: hata tune --gpu auto")
            return reason
        apart = soft_differences(recorded, here)
        if apart:
            _log_once(self.label, "; ".join(apart))
        return None


def find(device: str | None = None) -> Profile | None:
    """The profile in force by the look-up order, `None` for defaults.

    Args:
        device: Kind of device it should be for; `None`: a GPU where one is visible, else the CPU.

    Raises:
        ProfileError: if `HATA_PROFILE` names something that is not a profile.
    """
    named = os.environ.get("HATA_PROFILE", "").strip()
    if named == "none":
        return None
    if named:
        try:
            return replace(Profile.load(named), origin="HATA_PROFILE")
        except ProfileError as error:
            raise ProfileError(f"HATA_PROFILE: {error}") from None
    try:
        slug = _device.fingerprint(device or _device.default_device()).slug
    except HataDeviceError:
        return None
    for origin in ("user cache", "shipped"):
        try:
            path = named_path(slug) if origin == "user cache" else store.SHIPPED / f"{slug}.yaml"
            if path.is_file():
                return replace(Profile.load(path), origin=origin)
        except ProfileError as error:
            _warn_once(f"profile ignored: {error}")
    return None


def default_output(device: Fingerprint | None = None) -> Path:
    """Where a profile of this device is found without being named: the user's cache folder."""
    return named_path((device or _device.fingerprint(_device.default_device())).slug)
