"""Distances on binary tensor cores, with the instructions of a warp done in NumPy.

The interpreter knows no PTX, so nothing else checks the arithmetic of `distance` without a GPU. PTX
is taken from its source; the loops around it are written once more here.
"""

import importlib
import inspect
import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="the Triton backend needs it")

counting = importlib.import_module("hata.backends.triton.counting")
SOURCE = inspect.getsource(importlib.import_module("hata.backends.triton.distance"))
LANE = np.arange(32)


def popcount(x):
    return np.bitwise_count(x).astype(np.int64)


def own_column(even, odd):
    """The PTX of `_own_column` for all lanes."""
    (text,) = re.findall(r'"""\{(.*?)\}"""', SOURCE, re.DOTALL)
    held = {"%laneid": LANE, "$1": even, "$2": odd}
    do = {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "shr": lambda a, b: a >> b,
        "setp.eq": lambda a, b: a == b,
        "setp.ne": lambda a, b: a != b,
        "selp": lambda a, b, where: np.where(where, a, b),
    }
    for line in text.strip().split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith("."):
            to, *given = (x.strip() for x in operands.split(","))
            values = [held[x] if x in held else int(x) for x in given]
            held[to] = do[name.rpartition(".")[0]](*values)
    return held["$0"].astype(np.uint32)


def product(a, b, c):
    """`mma.m16n8k256` of bits: registers of all lanes, where the PTX manual has them."""
    row, j = LANE // 4, LANE % 4
    left, right = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)
    sums = np.zeros((16, 8), np.int64)
    for i in range(4):
        left[row + i % 2 * 8, j + i // 2 * 4] = a[i]
        sums[row + i // 2 * 8, 2 * j + i % 2] = c[i]
    for i in range(2):
        right[j + i * 4, row] = b[i]
    sums += popcount(left[:, :, None] & right).sum(axis=1)
    return [sums[row + i // 2 * 8, 2 * j + i % 2] for i in range(4)]


def add_product(*given):
    """The PTX of `_add_product`; arrays are [lanes, 2], or [lanes] of what all keys share."""
    (text,) = re.findall(r'"(\{\$0.*?);"', SOURCE)
    to, *operands = (re.findall(r"\$(\d+)", part) for part in re.findall(r"\{(.*?)\}", text))
    pairs = [x if x.ndim == 2 else np.stack([x, x], axis=1) for x in given]
    # Registers 0 to 3 are the results, two keys of one after two of the other.
    held = dict(enumerate(np.concatenate(pairs, axis=1).T, start=4))
    found = product(*([held[int(i)] for i in part] for part in operands))
    results = {int(i): x for i, x in zip(to, found, strict=True)}
    return np.stack([results[0], results[1]], 1), np.stack([results[2], results[3]], 1)


def planes_of(words):
    """Planes of a group by weight: `words` [group, words] through full adders."""
    planes, left = [], list(words)
    while left:
        carries = []
        while len(left) > 2:
            a, b, c, *left = left
            left.append(a ^ b ^ c)
            carries.append((a & b) | (c & (a | b)))
        planes.append(left)
        left = carries
    return planes


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("bits", [32, 64, 96, 128, 256, 512])
def test_every_lane_gets_the_distances_of_its_own_keys(group, bits):
    rng = np.random.default_rng(group * bits)
    count = bits // 32
    queries, keys = (
        rng.integers(0, 2**32, (*size, count), np.uint32) for size in ((group,), (32, 2))
    )
    planes = planes_of(queries)
    how = counting.counting(group, bits, norms=False)
    assert [len(level) for level in planes] == [
        how.weights >> 2 * i & 3 for i in range(len(planes))
    ]
    flat = [plane for level in planes for plane in level]
    flat.append(np.full(count, 2**32 - 1, np.uint32))
    if len(flat) % 2:
        flat.append(np.zeros(count, np.uint32))
    sums = []
    for even_plane, odd_plane in zip(flat[::2], flat[1::2], strict=True):
        columns = [own_column(*words) for words in zip(even_plane, odd_plane, strict=True)]
        sum_even = sum_odd = np.zeros((32, 2), np.int64)
        for w in range(0, count, 2):
            high = keys[:, :, w + 1] if w + 1 < count else np.zeros((32, 2), np.uint32)
            column_high = columns[min(w + 1, count - 1)]
            sum_even, sum_odd = add_product(
                keys[:, :, w], high, columns[w], column_high, sum_even, sum_odd
            )
        sums += [sum_even, sum_odd]
    weights = [1 << i for i, level in enumerate(planes) for _ in level]
    at_zero = sum(w * popcount(plane).sum() for w, plane in zip(weights, flat, strict=False))
    total = (at_zero >> how.halve) + sums[len(weights)] * (group >> how.halve)
    for weight, one in zip(weights, sums, strict=False):
        total -= (2 * weight >> how.halve) * one
    expected = popcount(queries[:, None, None] ^ keys).sum(axis=(0, 3)) >> how.halve
    np.testing.assert_array_equal(total, expected)
