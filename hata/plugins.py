"""Plug-ins: what other distributions name by entry points."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hata.errors import HataError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def named(group: str, taken: Container[str]) -> dict[str, EntryPoint]:
    """The entry points of a group by name, in order, without names that are taken."""
    # It takes as long to import as all of hata.
    from importlib.metadata import entry_points

    points = sorted(entry_points(group=group), key=lambda point: point.name)
    return {point.name: point for point in points if point.name not in taken}


@contextmanager
def blamed(
    what: str, error: type[HataError], meant: type[HataError] | tuple[()] = ()
) -> Iterator[None]:
    """Somebody else's code: whatever it raises, unless it is `meant`, is a reason of ours.

    So is its wish to end the process.
    """
    try:
        yield
    except meant:
        raise
    except (Exception, SystemExit) as fault:
        reason = f"{type(fault).__name__}: {fault}"
        raise error(f"{what}: {reason}; repair or uninstall it") from fault
