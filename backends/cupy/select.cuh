// From counts to positions: the threshold of a row, and where each split's selected keys go.
//
// Sums over the histograms of all splits give the threshold and how many keys at it win; those of the
// splits before give the rank of a split's first selected key (ranks count selected keys by position).
#pragma once

#include "scan.cuh"

// Aligned, so that the compiler's vector loads take in none of its neighbours in shared memory, which
// a checker of races would report.
struct alignas(32) Threshold {
    // Scores below it win, and the first `ties` of the row that equal it.
    u32 score;
    int ties;
    // Scores below it and at it in the splits before this one.
    int below, equal;
    // No split has more scores at most as large.
    int most;
};

// Of a split, for every digit and the end of all: how many scores have a smaller one.
typedef conditional_t<C::COUNTS_16BIT, u16, u32> count_t;
constexpr int SUMS = C::BINS + 8;
INLINE const count_t* sums(const char* exchange, int digit) {
    return reinterpret_cast<const count_t*>(exchange) + digit * SUMS;
}

// Two sums of a split, as they are read. COOPERATIVE: they are larger by 1, and zero until they come.
typedef conditional_t<C::COUNTS_16BIT, u32, uint2> pair_t;
INLINE u32 half_of(u32 v, int i) { return i ? v >> 16 : v & 0xffff; }
INLINE u32 half_of(uint2 v, int i) { return i ? v.y : v.x; }
INLINE u32 smaller(u32 v, u32 w) { return __vminu2(v, w); }
INLINE u32 larger(u32 v, u32 w) { return __vmaxu2(v, w); }
INLINE uint2 smaller(uint2 v, uint2 w) { return {min(v.x, w.x), min(v.y, w.y)}; }
INLINE uint2 larger(uint2 v, uint2 w) { return {max(v.x, w.x), max(v.y, w.y)}; }

// What pairs add up to; of halves of a word, the first ones carry into the second.
struct Total {
    u32 first, second;
    INLINE void add(u32 v) { first += v, second += v >> 16; }
    INLINE void add(uint2 v) { first += v.x, second += v.y; }
    INLINE u32 half(int i) const {
        return i ? second : C::COUNTS_16BIT ? first - (second << 16) : first;
    }
};

// Publish the sums of this split for all, and keep them in this block's shared memory.
INLINE void publish_sums(const Params& params, const Row& row, int digit) {
    constexpr int EACH = (C::BINS + C::THREADS - 1) / C::THREADS;
    count_t* own = const_cast<count_t*>(sums(smem, digit));
    const int first = threadIdx.x * EACH;
    u32 mine[EACH], sum = 0, all;
    UNROLL for (int i = 0; i < EACH; ++i) {
        mine[i] = first + i < C::BINS ? histogram(digit)[first + i] : 0;
        sum += mine[i];
    }
    u32 before = exclusive_sum(sum, all);
    count_t* shared = const_cast<count_t*>(sums(exchange_area(params, row, row.split), digit));
    auto publish = [&](int bin, u32 count) {
        own[bin] = count_t(count);
        if constexpr (COOPERATIVE) st_relaxed(shared + bin, count_t(count + 1));
    };
    UNROLL for (int i = 0; i < EACH; ++i) {
        if (first + i < C::BINS) publish(first + i, before);
        before += mine[i];
    }
    // The end, twice, since two are read at once.
    if (threadIdx.x < 2) publish(C::BINS + threadIdx.x, all);
}

// Find the threshold, after the scan. COOPERATIVE: blocks call `meanwhile` while sums are in flight.
template <class Meanwhile>
INLINE Threshold find_threshold(const Params& params, const Row& row, const Split& split,
                                Meanwhile meanwhile) {
    __shared__ Threshold shared;
    Threshold found = {0, row.budget, 0, 0};
    NO_UNROLL for (int digit = 0; digit < C::DIGITS; ++digit) {
        if (digit > 0) {
            int shift = digit == 1 ? 21 : 10;
            __syncthreads();
            NO_UNROLL for (int i = threadIdx.x; i < split.count; i += C::THREADS) {
                u32 score = split.scores[i];
                if (score != NEVER && score >> shift == found.score)
                    atomicAdd(histogram(digit) + digit_of(score, digit), 1);
            }
        }
        __syncthreads();
        if (digit == 0) trace(SCANNED);
        publish_sums(params, row, digit);
        if (digit == 0) trace(SUMS_PUBLISHED);
        if constexpr (COOPERATIVE) meanwhile(split);
        else row_sync(params, row);
        // A lane reads two digits, and gets the end of the second from the next lane.
        const int lane = threadIdx.x % 32;
        NO_UNROLL for (int first = threadIdx.x / 32 * 62; first < C::BINS; first += C::THREADS / 32 * 62) {
            const int bin = min(first + 2 * lane, C::BINS);
            pair_t pairs[C::NUM_SPLITS], least;
            // All at once: what takes time is the round trip. Nothing else in the loop, or the compiler
            // loads the last when the first have come.
            for (u32 tries = 0;; poll(tries)) {
                UNROLL for (int i = 0; i < C::NUM_SPLITS; ++i)
                    pairs[i] = load_exchanged(reinterpret_cast<const pair_t*>(
                        sums(exchange_area(params, row, i), digit) + bin));
                least = pairs[0];
                UNROLL for (int i = 1; i < C::NUM_SPLITS; ++i) least = smaller(least, pairs[i]);
                if (!COOPERATIVE || !ballot(!half_of(least, 0) || !half_of(least, 1))) break;
            }
            Total of_all = {}, of_before = {};
            pair_t largest = pairs[0];
            UNROLL for (int i = 0; i < C::NUM_SPLITS; ++i) {
                of_all.add(pairs[i]);
                of_before.add(i < row.split ? pairs[i] : pair_t{});
                largest = larger(largest, pairs[i]);
            }
            u32 total[3], before[3], most[3];
            UNROLL for (int i = 0; i < 2; ++i) {
                total[i] = of_all.half(i) - COOPERATIVE * C::NUM_SPLITS;
                before[i] = of_before.half(i) - COOPERATIVE * row.split;
                most[i] = half_of(largest, i) - COOPERATIVE;
            }
            total[2] = shfl(total[0], lane + 1);
            before[2] = shfl(before[0], lane + 1);
            most[2] = shfl(most[0], lane + 1);
            const u32 need = found.ties;
            UNROLL for (int i = 0; i < 2; ++i)
                if (lane < 31 && total[i] < need && need <= total[i + 1])
                    shared = {u32(bin + i), int(need - total[i]), int(before[i]),
                              int(before[i + 1] - before[i]), int(most[i + 1])};
        }
        __syncthreads();
        int bits = digit == 0 ? 0 : digit == 1 ? 11 : 10;
        found = {found.score << bits | shared.score, shared.ties, found.below + shared.below,
                 shared.equal, shared.most};
    }
    return found;
}

// Marks of 32 consecutive scores that are below (or at most) some score.
struct Marks {
    u32 halves[2];
};

template <bool BELOW> INLINE void mark(Marks& marks, const uint4& v, int vector, u32 score) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    // Two scores a word, of whose marks one bit each is kept: those of even keys in the low half.
    const u32 pair = score * 0x10001u;
    const int shift = vector % 2 * 8;
    UNROLL for (int i = 0; i < 4; ++i)
        if constexpr (C::DIGITS == 1) {
            const u32 found = BELOW ? set_lt_f16x2(words[i], pair) : set_le_f16x2(words[i], pair);
            marks.halves[vector / 2] |= found & 0x00020001u << (shift + 2 * i);
        } else {
            marks.halves[0] |= u32(BELOW ? words[i] < score : words[i] <= score) << (4 * vector + i);
        }
}

// Bit i for the i-th score.
INLINE u32 word_of(const Marks& marks) {
    if constexpr (C::DIGITS > 1) return marks.halves[0];
    const u32 first = marks.halves[0] | marks.halves[0] >> 16;
    const u32 second = marks.halves[1] | marks.halves[1] >> 16;
    return __byte_perm(first, second, 0x5410);
}

// Writes positions, rank after rank: to memory, or where they are attended to in shared memory.
struct PositionWriter {
    static constexpr bool TO_CLUSTER = C::POSITIONS_AT && CLUSTER;

    int* list;
    int rank;
    // TO_CLUSTER: ranks of a split, which split that is, and the first rank of the next one.
    int size, split, end;

    // `local`: this block attends to what its own split selects, of which `first` is the first rank.
    INLINE PositionWriter(const Row& row, int* global, int rank, bool local, int first) : rank(rank) {
        if (C::POSITIONS_AT && (local || C::NUM_SPLITS == 1)) {
            list = smem_positions() - first, size = split = 0, end = -1;
        } else if constexpr (TO_CLUSTER) {
            size = ranks_per_split(row), split = rank / u32(size), end = (split + 1) * size;
            list = reinterpret_cast<int*>(mapa(smem + C::POSITIONS_AT, split)) - (end - size);
        } else {
            list = global;
        }
    }

    INLINE void write(int position) {
        if constexpr (TO_CLUSTER)
            if (rank == end) {
                list = reinterpret_cast<int*>(mapa(smem + C::POSITIONS_AT, ++split)) - end;
                end += size;
            }
        list[rank++] = position;
    }
};

// Write the positions of the split's selected keys. A thread takes an odd number of consecutive vectors
// of scores, so that a warp meets all banks. It reads them once and marks them, MASKS words at once; ranks
// are counts of marks. Two counts share a word: before a marked one of up to 65536 keys there are fewer.
INLINE void write_positions(const Row& row, const Split& split, const Threshold& found, int* list,
                            bool local, int start) {
    constexpr int GROUPED = 32 / VECTOR_SCORES, MOST = C::MASKS * GROUPED - 1;
    const int vectors = (split.count + VECTOR_SCORES - 1) / VECTOR_SCORES;
    const int most =
        split.count > 65536 ? min(MOST, 65536 / (VECTOR_SCORES * C::THREADS) - 1) : MOST;
    const int each = min((vectors + C::THREADS - 1) / C::THREADS | 1, most);
    const uint4* scores = reinterpret_cast<const uint4*>(split.scores);
    int below = found.below, equal = found.equal;
    NO_UNROLL for (int tile = 0; tile < vectors; tile += each * C::THREADS) {
        const int first = tile + threadIdx.x * each, last = min(first + each, vectors);
        if (tile > 0) __syncthreads();
        u32 under[C::MASKS], upto[C::MASKS], mine = 0, all;
        UNROLL for (int m = 0; m < C::MASKS; ++m) {
            Marks low = {}, high = {};
            UNROLL for (int v = 0; v < GROUPED; ++v) {
                int i = first + m * GROUPED + v;
                if (i >= last) break;
                const uint4 read = scores[i];
                mark<true>(low, read, v, found.score);
                mark<false>(high, read, v, found.score);
            }
            under[m] = word_of(low), upto[m] = word_of(high);
            mine += __popc(under[m]) << 16 | __popc(upto[m] ^ under[m]);
        }
        const u32 before = exclusive_sum(mine, all);
        int ties = equal + int(before & 0xffff);
        const int rank = below + int(before >> 16) + min(ties, found.ties);
        PositionWriter writer(row, list, rank, local, start);
        UNROLL for (int m = 0; m < C::MASKS; ++m) {
            const int at = split.low + (first + m * GROUPED) * VECTOR_SCORES - 1;
            // Of those at the threshold, the first few win.
            u32 left = ties < found.ties ? upto[m] : under[m];
            NO_UNROLL for (; left; left &= left - 1) {
                if (!(under[m] & left & -left) && ties++ >= found.ties) continue;
                writer.write(at + __ffs(left));
            }
        }
        below += int(all >> 16), equal += int(all & 0xffff);
    }
}

// Whether a block attends to what its own split selects, and how many keys that is.
struct Local {
    bool local;
    int count;
};

// Scan a row, unless it is dense, and write positions. `most`: keys that a block attends to at most, if
// to its split's own. After it all exchange areas are clear.
template <class Codes, class Meanwhile>
INLINE Local select(const Params& params, const Row& row, Codes& queries, int* list, int most,
                    Meanwhile meanwhile) {
    // Codes of fresh keys are written even if it is dense, by the first block of the last token.
    bool writes = Codes::FRESH > 0 && row.split == 0 && row.token == params.tokens - 1;
    if (row.dense && !writes) {
        wait_exchange(clear_exchange(params, row));
        queries.discard();
        return {};
    }
    Split split = find_split(params, row);
    scan(params, row, split, queries);
    if (row.dense) return {};
    Threshold found = find_threshold(params, row, split, meanwhile);
    trace(THRESHOLD_FOUND);
    Local own = {C::POSITIONS_AT && C::DIGITS == 1 && C::NUM_SPLITS > 1 && found.most <= most};
    const count_t* below = sums(smem, 0);
    if (own.local)
        own.count = below[found.score]
            + max(min(found.ties - found.equal, int(below[found.score + 1] - below[found.score])), 0);
    write_positions(row, split, found, list, own.local, found.below + min(found.equal, found.ties));
    trace(POSITIONS_WRITTEN);
    return own;
}
