"""How the blocks of a row share its work, and how keys are counted: arithmetic on sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from hata.problem import Problem

from .device import Described

# Counters of one histogram at most; more values than this are found digit by digit.
MOST_BINS = 4608
DIGIT_BINS = 2048
# Splits of a row that are chosen by themselves: at most so many, and of so many keys at least.
MOST_SPLITS, LEAST_KEYS = 16, 512
# Splits of a row, and bytes of codes of each, from which on they sync through global memory.
FAR_SPLITS, FAR = 4, 1 << 15


class Counting(NamedTuple):
    """How scores are counted.

    Attributes:
        rounds: Histograms one after the other (1, or 3 digits).
        bins: Counters of each.
        halve: 1 where keys are halved distances, since all have one parity.
        itemsize: Bytes of a score.
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
        num_splits: Blocks a row.
        sync: How they sync: 0 alone, 1 as a cluster, 2 through global memory; see row.cuh.
        threads: Threads a block.
        resident: Blocks that a multiprocessor holds at once.
        room: Bytes of shared memory that each of them may have.
    """

    num_splits: int
    sync: int
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
    num_splits, cooperative = config["num_splits"], config["cluster"] == "cooperative"
    if not num_splits:
        num_splits, cooperative = _num_splits(device, problem, rows, resident, config["cluster"])
    # An explicit number of splits may be a cluster that fits nowhere.
    whole = num_splits == 1 or device.at_once(num_splits, resident) > 0
    whole = whole and num_splits <= device.clusters
    sync = 0 if num_splits == 1 else 2 if cooperative or not whole else 1
    if sync == 2:
        # They wait for one another, so all of them must be there.
        num_splits = max(min(num_splits, device.sms * resident // max(rows, 1)), 1)
        sync = 2 if num_splits > 1 else 0
    return Shape(num_splits, sync, threads, resident, room_of(device, resident))


def room_of(device: Described, resident: int = 1) -> int:
    """Bytes of shared memory for each of `resident` blocks of a multiprocessor."""
    # Without a block's own kilobyte, and what kernels declare statically.
    return (device.shared + 1024) // resident - 1024 - 2048


def _num_splits(
    device: Described, problem: Problem, rows: int, resident: int, cluster: str
) -> tuple[int, bool]:
    """Most splits with which all rows find room at the same time, and none is too small.

    Clusters must lie within groups of multiprocessors, so some of a GPU may not serve them.

    Returns:
        `(num_splits, cooperative)`: the latter: whether they sync through global memory.
    """
    attends = problem.op == "sparse_attend"
    keys, least = (problem.k, 64) if attends else (problem.slots, LEAST_KEYS)
    most = min(MOST_SPLITS, keys // least)
    anywhere = max(min(most, device.sms * resident // max(rows, 1)), 1)
    if cluster == "cooperative" or device.clusters == 1:
        return anywhere, True
    together = next((n for n in range(most, 1, -1) if device.at_once(n, resident) >= rows), 1)
    far = cluster == "auto" and not attends and keys * problem.bits >= 8 * FAR * anywhere
    if far and anywhere >= FAR_SPLITS:
        return anywhere, True
    return together, False


def capacity_of(shape: Shape, slots: int) -> int:
    """Scores that a split has room for, whatever the lengths are."""
    return -(-max(slots, 1) // shape.num_splits // 64) * 64
