"""Summed distances of keys to a group: by popcounts, or by binary tensor cores.

A group is a few planes, words that its queries have been added up to (`pieces.store_planes`); with
w_i the weight of plane P_i, the distance of a key k is sum_i w_i popcount(P_i ^ k).

A binary product multiplies 16 rows of 256 bits by 8 columns, and counts. Its operands lie spread
over a warp: four neighbouring lanes hold the words of a row, one for either half. So it would seem
that a key has to be spread over lanes as well. But where a column is zero beside the words of one
lane, it counts bits of that lane's words alone; and of the sums of a row, the product leaves two to
each of the four lanes. With the columns

    words of lane          4r           4r + 1       4r + 2       4r + 3     sums left to lane
    columns 0 and 1    two planes         0            0            0             4r
    columns 2 and 3         0        the same two      0            0             4r + 1
    columns 4 and 5         0             0        the same two     0             4r + 2
    columns 6 and 7         0             0            0        the same two      4r + 3

of row r, a lane gets the sums of its own keys, whichever those are: of two, since it holds words of
row r + 8 as well.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# ruff: noqa: RUF005 (jitted bodies: the compiler knows fewer forms than Python)

import triton
import triton.language as tl

from .pieces import LEVELS, add_up, popcount


@triton.jit
def distance(words, planes, WORDS: tl.constexpr, WEIGHTS: tl.constexpr, ADDERS: tl.constexpr):
    """Summed distance of keys, whose `words` are a tuple, to a group with these planes.

    As few popcounts as adders across words allow: they are the scarce instruction, 16 a clock and
    multiprocessor on Hopper beside 64 logical ones.
    """
    total = tl.zeros(words[0].shape, tl.int32)
    carried = ()
    # Carries of 16 words or fewer a plane go some weights beyond the last plane's.
    for level in tl.static_range(LEVELS + 5):
        here = carried
        carried = ()
        for _ in tl.static_range((WEIGHTS >> (2 * level)) & 3):
            for w in tl.static_range(WORDS):
                here = here + (words[w] ^ planes[w],)
            planes = planes[WORDS:]
        if ADDERS:
            here, carried = add_up(here)
        for i in tl.static_range(len(here)):
            total += popcount(here[i]) << level
    return total


@triton.jit
def _own_column(even, odd):
    """This lane's word of a product's columns, made of one word of an even and of an odd plane.

    Of the eight columns, lane 4c + j holds word j of column c. Even columns are of the even plane,
    odd ones of the odd plane; columns 2j and 2j + 1 have their plane's word as word j, and zeros
    elsewhere, so that their sums are left to lane j of each row.

    `even` and `odd` must be scalars, which every lane holds alike. The compiler takes the result
    for one as well, though each lane has its own: it may only become an operand of `_add_product`.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane, leads, second; .reg .pred mine, is_odd;
        mov.u32 lane, %laneid;
        and.b32 second, lane, 4;
        setp.ne.u32 is_odd, second, 0;
        shr.u32 leads, lane, 3;
        and.b32 lane, lane, 3;
        setp.eq.u32 mine, lane, leads;
        selp.b32 leads, $2, $1, is_odd;
        selp.b32 $0, leads, 0, mine;
        }""",
        "=r,r,r", [even, odd], tl.uint32, True, 1,
    )  # fmt: skip


@triton.jit
def lane_columns(planes, PLANES: tl.constexpr, WORDS: tl.constexpr):
    """This lane's columns for all planes and a last one of ones: by pairs of planes, then words."""
    zero = tl.zeros([], tl.uint32)
    for _ in tl.static_range(WORDS):
        planes = planes + (~zero,)
    if PLANES % 2 == 0:
        for _ in tl.static_range(WORDS):
            planes = planes + (zero,)
    columns = ()
    for pair in tl.static_range(PLANES // 2 + 1):
        for w in tl.static_range(WORDS):
            even, odd = planes[2 * pair * WORDS + w], planes[(2 * pair + 1) * WORDS + w]
            columns = columns + (_own_column(even, odd),)
    return columns


@triton.jit
def _add_product(low, high, column_low, column_high, sum_even, sum_odd):
    """Add what words `low` and `high` of keys have in common with two planes to a sum for each."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{$0, $2, $1, $3}, {$4, $5, $6, $7}, {$8, $10}, {$12, $14, $13, $15};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [low, high, column_low, column_high, sum_even, sum_odd], (tl.int32, tl.int32), False, 2,
    )  # fmt: skip


@triton.jit
def binary_distance(
    words, columns, at_zero, WORDS: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr,
    HALVE: tl.constexpr,
):  # fmt: skip
    """Summed distance of keys to a group, halved if `HALVE`, on binary tensor cores.

    popcount(P ^ k) = popcount(P) + popcount(k) - 2 popcount(P & k), and weights add up to the size
    of the group. `at_zero` holds the first of these three (halved if `HALVE`), the plane of ones
    counts the second. A thread has an even number of keys.
    """
    sums = ()
    for _ in tl.static_range(len(columns) // WORDS):
        sum_even = tl.zeros(words[0].shape, tl.int32)
        sum_odd = tl.zeros(words[0].shape, tl.int32)
        for w in tl.static_range(0, WORDS, 2):
            if w + 1 < WORDS:
                high, column_high = words[w + 1], columns[w + 1]
            else:
                high, column_high = words[w] ^ words[w], columns[w]
            sum_even, sum_odd = _add_product(
                words[w], high, columns[w], column_high, sum_even, sum_odd
            )
        sums = sums + (sum_even, sum_odd)
        columns = columns[WORDS:]
    total = at_zero
    for level in tl.static_range(LEVELS):
        for _ in tl.static_range((WEIGHTS >> (2 * level)) & 3):
            total -= sums[0] << (level + 1 - HALVE)
            sums = sums[1:]
    return total + sums[0] * (GROUP >> HALVE)
