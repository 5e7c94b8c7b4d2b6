"""Jitted functions that several kernels share: words of codes, visible keys, budgets, counting.

Codes are read and written as 32-bit words, least significant bit first (`unit` 4), or byte by byte
where an array is not aligned to words (`unit` 1). Scores are unsigned integers of which the
smallest win: summed distances, or reversed order-preserving bits of a float score.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

# ruff: noqa: RUF005 (jitted bodies: the compiler knows fewer forms than Python)

import triton
import triton.language as tl

from .launch import INTERPRETED

# First positions of splits are multiples of this, so that rows of scores are read in whole vectors.
ALIGN = tl.constexpr(128)
# Weights of planes are powers of two below 2^LEVELS.
LEVELS = tl.constexpr(11)
# The interpreter knows no PTX.
NATIVE = tl.constexpr(not INTERPRETED)


@triton.jit
def popcount(x):
    """Bits set in each 32-bit word."""
    if NATIVE:
        # The generic form compiles to the same instruction only while nothing is folded into it.
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def defer(x):
    """`x`, as loaded; it is not waited for before this.

    What goes to shared memory for a product is copied there right after it is loaded, and so waited
    for, before whatever is loaded next. This is an operation in between, of no instruction.
    """
    if NATIVE:
        if x.dtype.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 1)
    return x


@triton.jit
def keep_order():
    """Loads before this are issued before what follows, which may have to wait.

    A barrier of a warp costs nothing, but loads are not moved over it.
    """
    if NATIVE:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [0], tl.int32, False, 1
        )


@triton.jit
def prefetch_rows(rows, chosen, BYTES: tl.constexpr):
    """Prefetch the `chosen` ones of `rows`, of `BYTES` bytes each, to the second-level cache."""
    if NATIVE:
        address = rows.to(tl.int64, bitcast=True)
        for line in tl.static_range((BYTES + 127) // 128):
            tl.inline_asm_elementwise(
                "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; "
                "@wanted prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r", [address + line * 128, chosen], tl.int32, False, 1,
            )  # fmt: skip


@triton.jit
def full_adder(a, b, c):
    """Sum and carry of three bits at every place of 32-bit words."""
    if NATIVE:
        # As one instruction each: the compiler would rather mix them with what made the words.
        total = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [a, b, c], tl.uint32, True, 1
        )
        carry = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe8;", "=r,r,r,r", [a, b, c], tl.uint32, True, 1
        )
        return total, carry
    return a ^ b ^ c, (a & b) | (c & (a | b))


@triton.jit
def columns_of(x, M: tl.constexpr, N: tl.constexpr):
    """The `N` columns of `x` [M, N], in order, as a tuple of [M]; N is a power of two.

    A thread that holds a row holds its elements of all columns, so nothing moves.
    """
    if N == 1:
        return (tl.reshape(x, [M]),)
    else:
        even, odd = tl.split(tl.reshape(x, [M, N // 2, 2]))
        even = columns_of(even, M, N // 2)
        odd = columns_of(odd, M, N // 2)
        found = ()
        for i in tl.static_range(N // 2):
            found = found + (even[i], odd[i])
        return found


@triton.jit
def interleave(columns, M: tl.constexpr, N: tl.constexpr):
    """The way back from `columns_of`, to one dimension: [M * N], for N of 1, 2 or 4."""
    if N == 1:
        return columns[0]
    elif N == 2:
        return tl.reshape(tl.join(columns[0], columns[1]), [M * N])
    else:
        even, odd = tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3])
        return tl.reshape(tl.join(even, odd), [M * N])


@triton.jit
def pack(bits, M: tl.constexpr, N: tl.constexpr):
    """Pack `bits` [M, N] into words [M, N / 32], bit j at weight 2^j."""
    weights = (tl.full([32], 1, tl.int32) << tl.arange(0, 32)).to(tl.uint32, bitcast=True)
    spread = tl.reshape(bits, [M, N // 32, 32]).to(tl.uint32)
    return tl.sum(spread * weights[None, None, :], axis=2)


@triton.jit
def add_up(words):
    """Words of one weight through full adders: the one or two that stay at it, and carries."""
    carries = ()
    for _ in tl.static_range((len(words) - 1) // 2):
        total, carry = full_adder(words[0], words[1], words[2])
        words = words[3:] + (total,)
        carries = carries + (carry,)
    return words, carries


@triton.jit
def store_planes(planes, words, mask, WORDS: tl.constexpr):
    """Write the weighted planes of the codes of a group: `words`, one word of each member.

    A plane has `WORDS` words; `planes` point to the first plane's. See `hamming_topk`.
    """
    index = 0
    for _ in tl.static_range(LEVELS):
        here, words = add_up(words)
        for i in tl.static_range(len(here)):
            tl.store(planes + index * WORDS, here[i].to(tl.int32, bitcast=True), mask=mask)
            index += 1


@triton.jit
def zero_counters(counters, row, size, share, shares, BLOCK: tl.constexpr):
    """Zero one of `shares` shares of a row's counters."""
    for first in range(share * BLOCK, size, shares * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(
            counters + row.to(tl.int64) * size + at, tl.zeros([BLOCK], tl.int32), mask=at < size
        )


@triton.jit
def load_words(pointers, mask, UNIT: tl.constexpr):
    """Words at `pointers` (to int32, or to the first byte of each word), as uint32.

    `mask`: which of them; the others are 0. `None`: all.
    """
    other: tl.constexpr = None if mask is None else 0
    if UNIT == 4:
        words = tl.load(pointers, mask=mask, other=other).to(tl.uint32, bitcast=True)
    else:
        words = tl.load(pointers, mask=mask, other=other).to(tl.uint32)
        for i in tl.static_range(1, 4):
            words |= tl.load(pointers + i, mask=mask, other=other).to(tl.uint32) << (8 * i)
    return words


@triton.jit
def store_words(pointers, words, mask, UNIT: tl.constexpr):
    """Store uint32 words where `load_words` finds them."""
    if UNIT == 4:
        tl.store(pointers, words.to(tl.int32, bitcast=True), mask=mask)
    else:
        for i in tl.static_range(4):
            tl.store(pointers + i, ((words >> (8 * i)) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def visible(arrays, sizes, batch, token):
    """First visible position of a query and the one after its last.

    `arrays` has `lengths` and `starts`, read as int32 (the low half of an int64); `sizes` their
    steps from row to row, -1 where there are none, and `tokens` and `slots`.
    """
    length = tl.load(
        arrays.lengths + batch * sizes.length_step, mask=sizes.length_step >= 0, other=sizes.slots
    )
    start = tl.load(arrays.starts + batch * sizes.start_step, mask=sizes.start_step >= 0, other=0)
    start = tl.maximum(start, 0)
    # Below zero is none; from far below, what is subtracted would lead past the other end.
    stop = tl.minimum(tl.maximum(length, 0), sizes.slots) - (sizes.tokens - 1 - token)
    return start, tl.maximum(stop, start)


@triton.jit
def budget_of(seen, budget):
    """Keys to select for a query that sees `seen` keys (it may exceed `seen`)."""
    share = (seen.to(tl.int64) * budget.ratio) >> 32
    share = tl.minimum(tl.maximum(share, budget.least), budget.k).to(tl.int32)
    return tl.where(budget.ratio < 0, budget.k, share)


@triton.jit
def split_range(start, stop, split, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Where a split of the visible keys begins and ends; splits are whole tiles."""
    origin = start // ALIGN * ALIGN
    size = tl.cdiv(tl.cdiv(stop - origin, NUM_SPLITS), TILE) * TILE
    low = tl.minimum(origin + split * size, stop)
    return low, tl.minimum(low + size, stop)


@triton.jit
def place_of(row, heads, tokens, SINGLE: tl.constexpr):
    """Batch row (int64), head and token of a row of a step; `SINGLE`: there is one token."""
    token = 0
    if not SINGLE:
        token = row % tokens
        row = row // tokens
    batch = row // heads
    return batch.to(tl.int64), row - batch * heads, token


@triton.jit
def at_head(strides, batch, head):
    """Where a head of a batch row begins."""
    return batch * strides.b + head * strides.h


@triton.jit
def float_key(score):
    """Unsigned integers in the reversed order of float scores; -0 equals 0, NaN counts as 0."""
    score = tl.where(score == score, score, 0.0) + 0.0
    bits = score.to(tl.uint32, bitcast=True)
    # Larger scores make smaller keys: flip positive ones below the sign, keep negative ones.
    return tl.where((bits >> 31) == 1, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def shared_bins(SHARED: tl.constexpr, BINS: tl.constexpr):
    """Address of zeroed counters in shared memory; `SHARED` is PTX that declares one more."""
    address = tl.inline_asm_elementwise(SHARED, "=r,r", [BINS], tl.int32, False, 1)
    tl.inline_asm_elementwise(
        "mov.u32 $0, 0; st.shared.u32 [$1], $0;",
        "=r,r", [address + 4 * tl.arange(0, BINS)], tl.int32, False, 1,
    )  # fmt: skip
    tl.debug_barrier()
    return address


@triton.jit
def count_shared(address, digits, mask, BINS: tl.constexpr):
    """Count each digit below `BINS` where `mask` holds, by atomics in shared memory."""
    # What does not count goes to a counter that is never read: that costs less than a branch.
    digits = tl.where(mask, tl.minimum(digits.to(tl.int32), BINS), BINS)
    tl.inline_asm_elementwise(
        "mov.u32 $0, 0; red.shared.add.u32 [$1], 1;",
        "=r,r", [address + 4 * digits], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def read_shared(address, BINS: tl.constexpr):
    """The counters, after every thread has counted."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];",
        "=r,r", [address + 4 * tl.arange(0, BINS)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def find_bin(histogram, need):
    """The bin that holds the `need`-th smallest key, and how many to take from it.

    A bin more than there are stands for all that lies above the counted ones.
    """
    upto = tl.cumsum(histogram, axis=0)
    # Bins that end before the key sought come first, and their counts only grow.
    before = upto < need
    return tl.sum(before.to(tl.int32)), need - tl.max(tl.where(before, upto, 0))


@triton.jit
def griddepcontrol_wait(PDL: tl.constexpr):
    """With programmatic dependent launch: wait until the launch before has finished."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def griddepcontrol_launch_dependents(PDL: tl.constexpr):
    """With programmatic dependent launch: the next launch may start where there is room."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
