"""How the blocks of a row share its work, and how keys are counted: arithmetic on sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.problem import Problem

from .device import Described

# Counters of one histogram at most; more values than this are found digit by digit.
MOST_BINS = 4608
DIGIT_BINS = 2048
# Parts of a row that are chosen by themselves: at most so many, and of so many keys at least.
MOST_PARTS, LEAST_KEYS = 16, 512
# Parts of a row, and bytes of codes of each, from which on they better meet through global memory.
FAR_PARTS, FAR = 4, 1 << 15


class Counting(NamedTuple):
    """How the keys to select by are counted.

    Attributes:
        rounds: Histograms one after the other (1, or 3 digits).
        bins: Counters of each.
        halve: 1 where keys are halved distances, since all have one parity.
        itemsize: Bytes of a key.
    """

    rounds: int
    bins: int
    halve: int
    itemsize: int


def counting(group: int, bits: int, norms: bool) -> Counting:
    """How to count keys for groups of `group` codes of `bits` bits."""
    halve = int(group % 2 == 0 and not norms)
    # 0 stands for keys that win anyway, and distances begin at 1.
    bins = -(-((group * bits >> halve) + 2) // 8) * 8
    if norms or bins > MOST_BINS:
        return Counting(3, DIGIT_BINS, halve, 4)
    return Counting(1, bins, halve, 2)


class Shape(NamedTuple):
    """How the blocks of a row share its work.

    Attributes:
        parts: Blocks a row.
        joined: How they meet: 0 alone, 1 as a cluster, 2 through global memory; see row.cuh.
        threads: Threads a block.
        resident: Blocks that a multiprocessor holds at once.
        room: Bytes of shared memory that each of them may have.
    """

    parts: int
    joined: int
    threads: int
    resident: int
    room: int


def shape_of(device: Described, call: Any, rows: int, fixed: int = 0) -> Shape:
    """The shape of a call's rows on a device, of which there are at most `rows`.

    A block needs `fixed` bytes of shared memory whatever its shape is.
    """
    problem, config = call.problem, call.config
    threads = config["threads"]
    # Rings of all warps take the shared memory of a second block.
    ringed = problem.op == "sparse_attend" and config["stages"]
    resident = max((256 if ringed else 512) // threads, 1)
    while resident > 1 and room_of(device, resident) < fixed:
        resident -= 1
    parts, through_memory = config["num_splits"], config["cluster"] == "cooperative"
    if not parts:
        parts, through_memory = _parts(device, problem, rows, resident, config["cluster"])
    # An explicit number of parts may be a cluster that fits nowhere.
    whole = parts <= device.clusters and (parts == 1 or device.at_once(parts, resident) > 0)
    joined = 0 if parts == 1 else 2 if through_memory or not whole else 1
    if joined == 2:
        # They wait for one another, so all of them must be there.
        parts = max(min(parts, device.sms * resident // max(rows, 1)), 1)
        joined = 2 if parts > 1 else 0
    return Shape(parts, joined, threads, resident, room_of(device, resident))


def room_of(device: Described, resident: int = 1) -> int:
    """Bytes of shared memory for each of `resident` blocks of a multiprocessor."""
    # Without a block's own kilobyte, and what kernels declare statically.
    return (device.shared + 1024) // resident - 1024 - 2048


def _parts(
    device: Described, problem: Problem, rows: int, resident: int, joined: str
) -> tuple[int, bool]:
    """Most parts with which all rows find room at the same time, and none is too small.

    Clusters must lie within groups of multiprocessors, so some of a GPU may not serve them.

    Returns:
        `(parts, through_memory)`: also whether they meet through global memory, as no clusters.
    """
    attends = problem.op == "sparse_attend"
    keys, least = (problem.k, 64) if attends else (problem.slots, LEAST_KEYS)
    most = min(MOST_PARTS, keys // least)
    anywhere = max(min(most, device.sms * resident // max(rows, 1)), 1)
    if joined == "cooperative" or device.clusters == 1:
        return anywhere, True
    together = next((n for n in range(most, 1, -1) if device.at_once(n, resident) >= rows), 1)
    far = joined == "auto" and not attends and keys * problem.bits >= 8 * FAR * anywhere
    if far and anywhere >= FAR_PARTS:
        return anywhere, True
    return together, False


def capacity_of(shape: Shape, slots: int) -> int:
    """Keys to select by that a part has room for, whatever the lengths are."""
    return -(-max(slots, 1) // shape.parts // 64) * 64
