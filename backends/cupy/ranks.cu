// From histograms and keys to select by to positions, in the second launch of a split selection.
//
// Ranks count selected keys in ascending order of position. A block finds the positions of some
// ranks by itself: the sum of a row's histograms gives the threshold and how many keys at it win,
// counts below it and at it say in which tiles its ranks lie, and it looks at those tiles alone.
// Warps take rows of 256 neighbouring keys, a lane 8 of them.

#define WARPS (THREADS / 32)
// Rows of keys that a warp holds at once; its counts must fit 16 bits in a block.
#define HELD (THREADS > 512 ? 4 : 8)
#define COUNTS int(16 / sizeof(count_t))

// Where the ranks of a block lie.
struct Range {
    // Keys below it win, and the first `ties` of the row that equal it.
    u32 key;
    int ties;
    // Tiles, and keys below the threshold and at it before the first one.
    int first, last, below, equal;
};

INLINE void counts_of(const count_t* p, u32 (&found)[COUNTS]) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#if NARROW
        found[2 * i] = words[i] & 0xffff, found[2 * i + 1] = words[i] >> 16;
#else
        found[i] = words[i];
#endif
}

// Sums over the lanes before this one.
INLINE u32 lanes_before(u32 mine) {
    u32 sum = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        u32 below = from_below(sum, distance);
        if (int(threadIdx.x % 32) >= distance) sum += below;
    }
    return sum - mine;
}

// Sum up a row's histograms in shared memory, which is zero.
INLINE void sum_tallies(const count_t* tallies, u32* totals) {
    constexpr int VECTORS = BINS / COUNTS, SETS = VECTORS < THREADS ? THREADS / VECTORS : 1;
    for (int i = threadIdx.x; i < VECTORS * SETS; i += THREADS) {
        const count_t* from = tallies + i % VECTORS * COUNTS;
        u32 sum[COUNTS] = {};
#pragma unroll 4
        for (int tile = i / VECTORS; tile < ROW_TILES; tile += SETS) {
            u32 found[COUNTS];
            counts_of(from + tile * BINS, found);
#pragma unroll
            for (int c = 0; c < COUNTS; ++c) sum[c] += found[c];
        }
        u32 any = 0;
#pragma unroll
        for (int c = 0; c < COUNTS; ++c) any |= sum[c];
        if (any)
#pragma unroll
            for (int c = 0; c < COUNTS; ++c)
                atomicAdd(totals + i % VECTORS * COUNTS + c, int(sum[c]));
    }
}

// Where ranks [first, end) lie, which is not empty. All threads call it; every warp finds out for itself.
INLINE Range find_range(const Params& p, const Row& row, int first, int end, u32* totals) {
    __shared__ u32 tile_below[ROW_TILES], tile_equal[ROW_TILES];
    const count_t* tallies = tallies_of(p, row);
    const int lane = threadIdx.x % 32;
    sum_tallies(tallies, totals);
    __syncthreads();
    Range found;
    {
        // An odd number of bins a lane, so that a warp meets every bank of shared memory.
        constexpr int EACH = (BINS + 31) / 32 | 1;
        const u32 need = row.budget;
        u32 sum = 0;
#pragma unroll (EACH < 16 ? EACH : 4)
        for (int b = 0; b < EACH; ++b)
            if (lane * EACH + b < BINS) sum += totals[lane * EACH + b];
        u32 upto = lanes_before(sum);
        bool mine = upto < need && need <= upto + sum;
        int bin = lane * EACH;
        if (mine)
#pragma unroll 1
            for (; upto + totals[bin] < need; ++bin) upto += totals[bin];
        int who = __ffs(ballot(mine)) - 1;
        found.key = from_lane(u32(bin), who);
        found.ties = from_lane(int(need - upto), who);
    }
    // Eight lanes a tile: counts below the threshold by vectors, and the last few one by one.
    const int key = int(found.key), whole = key / COUNTS * COUNTS;
#pragma unroll 1
    for (int tile = threadIdx.x / 8; tile < (ROW_TILES + 3 & ~3); tile += THREADS / 8) {
        const count_t* counts = tallies + tile * BINS;
        u32 sum = 0, equal = 0;
        if (tile < ROW_TILES)
#pragma unroll 4
            for (int b = lane % 8 * COUNTS; b < whole; b += 8 * COUNTS) {
                uint4 v = *reinterpret_cast<const uint4*>(counts + b);
                sum += v.x + v.y + v.z + v.w;
            }
        // Halves do not overflow: all counts of a tile fit 16 bits.
        u32 below = NARROW ? (sum & 0xffff) + (sum >> 16) : sum;
        if (tile < ROW_TILES && lane % 8 < COUNTS && whole + lane % 8 <= key) {
            u32 count = counts[whole + lane % 8];
            (whole + lane % 8 < key ? below : equal) += count;
        }
        for (int mask = 1; mask < 8; mask *= 2)
            below += across(below, mask), equal += across(equal, mask);
        if (tile < ROW_TILES && lane % 8 == 0) tile_below[tile] = below, tile_equal[tile] = equal;
    }
    __syncthreads();
    constexpr int EACH = (ROW_TILES + 31) / 32;
    u32 below = 0, equal = 0;
#pragma unroll
    for (int tile = lane * EACH; tile < lane * EACH + EACH; ++tile)
        if (tile < ROW_TILES) below += tile_below[tile], equal += tile_equal[tile];
    below = lanes_before(below), equal = lanes_before(equal);
    u32 first_below = 0, first_equal = 0;
    int first_tile = -1, last_tile = -1;
#pragma unroll
    for (int tile = lane * EACH; tile < lane * EACH + EACH; ++tile) {
        int before = int(below + min(equal, u32(found.ties)));
        u32 next_below = below, next_equal = equal;
        if (tile < ROW_TILES) next_below += tile_below[tile], next_equal += tile_equal[tile];
        int after = int(next_below + min(next_equal, u32(found.ties)));
        if (before <= first && first < after)
            first_tile = tile, first_below = below, first_equal = equal;
        if (before < end && end <= after) last_tile = tile;
        below = next_below, equal = next_equal;
    }
    int who = __ffs(ballot(first_tile >= 0)) - 1;
    found.first = from_lane(first_tile, who);
    found.below = int(from_lane(first_below, who)), found.equal = int(from_lane(first_equal, who));
    found.last = from_lane(last_tile, __ffs(ballot(last_tile >= 0)) - 1);
    return found;
}

// Write the positions of ranks [first, end) to a list that begins with them.
INLINE void write_ranks(const Params& p, const Row& row, const Range& found, int first, int end,
                        int* list) {
    __shared__ u32 sums[2][WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int origin = origin_of(row), size = tile_size(row);
    const order_t* keys = order_of(p, row);
    int low = found.first * size, turn = 0;
    const int high = min((found.last + 1) * size, row.stop - origin);
    int below = found.below, equal = found.equal;
#pragma unroll 1
    for (; low < high; turn ^= 1) {
        // Each warp has as many rows.
        const int each = min(((high - low + 255) / 256 + WARPS - 1) / WARPS, HELD);
        const int at = low + warp * each * 256 + lane * 8;
        u32 marks[HELD], before[HELD], sum = 0;
        uint4 v[HELD];
#pragma unroll
        for (int r = 0; r < HELD; ++r)
            if (r < each && at + 256 * r < high)
                v[r] = *reinterpret_cast<const uint4*>(keys + at + 256 * r);
#pragma unroll
        for (int r = 0; r < HELD; ++r) {
            if (r >= each) break;
            u32 under = 0, upto = 0;
            if (at + 256 * r < high) {
                under = found.key ? at_most(v[r], found.key - 1) : 0;
                upto = at_most(v[r], found.key);
            }
            // Marks of keys below the threshold, then of those at it; counts likewise.
            marks[r] = under | (upto ^ under) << 8;
            u32 mine = __popc(under) | __popc(upto ^ under) << 16, earlier = lanes_before(mine);
            before[r] = sum + earlier;
            sum += from_lane(earlier + mine, 31);
        }
        if (lane == 0) sums[turn][warp] = sum;
        __syncthreads();
        u32 mine = lane < WARPS ? sums[turn][lane] : 0, earlier = lanes_before(mine);
        const u32 start = from_lane(earlier, warp), all = from_lane(earlier + mine, 31);
#pragma unroll 1
        for (int r = 0; r < each; ++r) {
            u32 counted = start + before[r];
            int ties = equal + int(counted >> 16);
            int rank = below + int(counted & 0xffff) + min(ties, found.ties);
            u32 left = (marks[r] | marks[r] >> 8) & 0xff;
            // Of keys at the threshold, the first few win.
            if (ties >= found.ties) left = marks[r] & 0xff;
            if (rank >= end) left = 0;
            const int position = origin + at + 256 * r;
#pragma unroll 1
            for (; left; left &= left - 1) {
                int i = __ffs(left) - 1;
                if (marks[r] >> (8 + i) & 1 && ties++ >= found.ties) continue;
                if (rank >= first && rank < end) list[rank - first] = position + i;
                ++rank;
            }
        }
        below += int(all & 0xffff), equal += int(all >> 16);
        low += each * WARPS * 256;
    }
}
