// From counts to positions: the threshold of a row, and where each part's keys go.
//
// No further pass over the codes: the row's histogram gives the threshold and how many keys at it
// win, the histograms of the parts before give the rank of a part's first selected key. Ranks count
// selected keys in ascending order of position.

#include "scan.cu"

struct Threshold {
    // Keys below it win, and the first `ties` of the row that equal it.
    u32 key;
    int ties;
    // Keys below it and at it in the parts before this one.
    int below, equal;
};

// Counts that are read together.
#define TOGETHER 4

INLINE const count_t* counts(const char* exchange, int round) {
    return reinterpret_cast<const count_t*>(exchange) + round * BINS;
}

// Four counts of a part.
INLINE void peer_counts(const count_t* p, u32 (&found)[TOGETHER]) {
#if NARROW
    uint2 v = peer(reinterpret_cast<const uint2*>(p));
    found[0] = v.x & 0xffff, found[1] = v.x >> 16, found[2] = v.y & 0xffff, found[3] = v.y >> 16;
#else
    uint4 v = peer(reinterpret_cast<const uint4*>(p));
    found[0] = v.x, found[1] = v.y, found[2] = v.z, found[3] = v.w;
#endif
}

// Find the threshold. All threads call it, after the scan.
INLINE Threshold find_threshold(const Params& p, const Row& row, const Part& part, u32& met) {
    __shared__ Threshold shared;
    constexpr int EACH = (BINS + TOGETHER * THREADS - 1) / (TOGETHER * THREADS) * TOGETHER;
    Threshold found = {0, row.budget, 0, 0};
#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
        if (round > 0) {
            int shift = round == 1 ? 21 : 10;
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < part.count; i += THREADS) {
                u32 key = part.keys[i];
                if (key != NEVER && key >> shift == found.key)
                    atomicAdd(counters(round) + digit_of(key, round), 1);
            }
        }
        __syncthreads();
        count_t* own = const_cast<count_t*>(counts(memory, round));
        for (int i = threadIdx.x; i < BINS; i += THREADS) own[i] = count_t(counters(round)[i]);
        publish(p, row, round * BINS * int(sizeof(count_t)), BINS * int(sizeof(count_t)));
        meet(p, row, met);
        u32 total[EACH] = {}, before[EACH] = {};
        u64 both = 0;
#pragma unroll
        for (int b = 0; b < EACH; b += TOGETHER) {
            int bin = threadIdx.x * EACH + b;
            if (bin < BINS)
// All at once: what takes time is the way there and back.
#pragma unroll
                for (int i = 0; i < PARTS; ++i) {
                    u32 found[TOGETHER];
                    peer_counts(counts(exchange_of(p, row, i), round) + bin, found);
#pragma unroll
                    for (int c = 0; c < TOGETHER; ++c) {
                        total[b + c] += found[c];
                        if (i < row.part) before[b + c] += found[c];
                    }
                }
        }
#pragma unroll
        for (int b = 0; b < EACH; ++b) both += u64(total[b]) << 32 | before[b];
        u64 all, earlier = sum_before(both, all);
        u32 upto = earlier >> 32, need = found.ties;
        if (upto < need && need <= upto + u32(both >> 32)) {
            u32 below = u32(earlier);
#pragma unroll
            for (int b = 0; b < EACH; ++b) {
                if (upto < need && need <= upto + total[b])
                    shared = {u32(threadIdx.x * EACH + b), int(need - upto), int(below),
                              int(before[b])};
                upto += total[b];
                below += before[b];
            }
        }
        __syncthreads();
        int bits = round == 0 ? 0 : round == 1 ? 11 : 10;
        found = {found.key << bits | shared.key, shared.ties, found.below + shared.below,
                 shared.equal};
    }
    return found;
}

// Put down the position of a rank: in memory, or (LISTED) in that of the block that attends to it.
INLINE void put_position(const Row& row, int* list, int rank, int position) {
#if LISTED
    const u32 size = share_size(row), part = u32(rank) / size;
#if JOINED == 1
    list = reinterpret_cast<int*>(in_block(memory + LISTED, part)) - part * size;
#else
    list = reinterpret_cast<int*>(memory + LISTED);
#endif
#endif
    list[rank] = position;
}

// Put down the positions of the part's selected keys. A thread takes vectors that follow one another,
// an odd number of them, so that a warp meets every bank of shared memory. It looks at keys once, and
// marks them; ranks are counts of marks, so ties cost what others do. MASKS: words of marks of a kind
// that it holds at once.
INLINE void write_positions(const Row& row, const Part& part, const Threshold& found, int* list) {
    constexpr int GROUPED = 32 / VECTOR;
    const int vectors = (part.count + VECTOR - 1) / VECTOR;
    const int each = min((vectors + THREADS - 1) / THREADS | 1, MASKS * GROUPED - 1);
    const uint4* keys = reinterpret_cast<const uint4*>(part.keys);
    int below = found.below, equal = found.equal;
#pragma unroll 1
    for (int tile = 0; tile < vectors; tile += each * THREADS) {
        const int first = tile + threadIdx.x * each, last = min(first + each, vectors);
        u32 under[MASKS], upto[MASKS];
        u64 mine = 0;
#pragma unroll
        for (int m = 0; m < MASKS; ++m) {
            under[m] = upto[m] = 0;
#pragma unroll
            for (int v = 0; v < GROUPED; ++v) {
                int i = first + m * GROUPED + v;
                if (i >= last) break;
                const uint4 read = keys[i];
                upto[m] |= at_most(read, found.key) << (v * VECTOR);
                if (found.key > 0) under[m] |= at_most(read, found.key - 1) << (v * VECTOR);
            }
            mine += u64(__popc(under[m])) << 32 | u32(__popc(upto[m] ^ under[m]));
        }
        u64 all, before = sum_before(mine, all);
        int ties = equal + int(u32(before));
        int rank = below + int(before >> 32) + min(ties, found.ties);
#pragma unroll
        for (int m = 0; m < MASKS; ++m) {
            const int at = part.low + (first + m * GROUPED) * VECTOR - 1;
            // Of those at the threshold, the first few win.
            u32 left = ties < found.ties ? upto[m] : under[m];
#pragma unroll 1
            for (; left; left &= left - 1) {
                if (!(under[m] & left & -left) && ties++ >= found.ties) continue;
                put_position(row, list, rank++, at + __ffs(left));
            }
        }
        below += int(all >> 32), equal += int(u32(all));
    }
}

// Scan a row, unless all of its keys are taken, and leave the positions of the selected ones. Codes of
// fresh keys are made either way.
INLINE void select(const Params& p, const Row& row, Weights& weights, int* list, u32& met) {
    // Codes of fresh keys are written even so, by the first block of the last token.
    bool writes = FUSED && FRESH > 0 && row.part == 0 && row.token == p.tokens - 1;
    if (row.everything && !writes) return;
    Part part = find_part(p, row);
    scan(p, row, part, weights);
    if (row.everything) return;
    Threshold found = find_threshold(p, row, part, met);
    write_positions(row, part, found, list);
}
