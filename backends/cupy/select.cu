// From counts to positions: the threshold of a row, and where each part's keys go.
//
// No further pass over the codes: the row's histogram gives the threshold and how many keys at it
// win, the histograms of the parts before give the rank of a part's first selected key. Ranks count
// selected keys in ascending order of position.

struct Threshold {
    // Keys below it win, and the first `ties` of the row that equal it.
    u32 key;
    int ties;
    // Keys below it and at it in the parts before this one.
    int below, equal;
};

// Find the threshold. All threads call it, after the scan.
INLINE Threshold find_threshold(const Params& p, const Row& row, const Part& part, u32& met) {
    __shared__ Threshold shared;
    constexpr int EACH = (BINS + THREADS - 1) / THREADS;
    Threshold found = {0, row.budget, 0, 0};
    for (int round = 0; round < ROUNDS; ++round) {
        if (round > 0) {
            int shift = round == 1 ? 21 : 10;
            __syncthreads();
            for (int i = threadIdx.x; i < part.count; i += THREADS) {
                u32 key = part.keys[i];
                if (key != NEVER && key >> shift == found.key)
                    atomicAdd(counters(memory, round) + digit_of(key, round), 1);
            }
        }
        publish(p, row, round * BINS * 4, BINS * 4);
        meet(p, row, met);
        u32 total[EACH] = {}, before[EACH] = {};
        u64 both = 0;
#pragma unroll
        for (int b = 0; b < EACH; ++b) {
            int bin = threadIdx.x * EACH + b;
            if (bin < BINS)
#pragma unroll
                for (int i = 0; i < PARTS; ++i) {
                    u32 count = peer(counters(exchange_of(p, row, i), round) + bin);
                    total[b] += count;
                    if (i < row.part) before[b] += count;
                }
            both += u64(total[b]) << 32 | before[b];
        }
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

#define VECTOR int(16 / sizeof(order_t))

// Which of the keys in a vector are at most `key` (which may be -1): bit i for the i-th.
INLINE u32 at_most(const uint4& v, u32 key) {
#if ROUNDS == 1
    // Two 15-bit keys a word: the difference to 0x8000 more than `key` keeps its highest bit.
    u32 most = ((key & 0xffffu) * 0x10001u) ^ 0x80008000u;
    if (key == 0xffffffffu) most = 0x7fff7fffu;
    u32 m = ((most - v.x) & 0x80008000u) >> 15 | ((most - v.y) & 0x80008000u) >> 13
        | ((most - v.z) & 0x80008000u) >> 11 | ((most - v.w) & 0x80008000u) >> 9;
    return (m | m >> 15) & 0xffu;
#else
    if (key == 0xffffffffu) return 0;
    return u32(v.x <= key) | u32(v.y <= key) << 1 | u32(v.z <= key) << 2 | u32(v.w <= key) << 3;
#endif
}

// Write the positions of the part's selected keys to the row's list. A thread takes vectors that
// follow one another, an odd number of them, so that a warp meets every bank of shared memory.
INLINE void write_positions(const Part& part, const Threshold& found, int* list) {
    int vectors = (part.count + VECTOR - 1) / VECTOR;
    int each = (vectors + THREADS - 1) / THREADS | 1;
    int first = threadIdx.x * each, last = min(first + each, vectors);
    const uint4* keys = reinterpret_cast<const uint4*>(part.keys);
    u32 below = 0, equal = 0;
    for (int i = first; i < last; ++i) {
        uint4 v = keys[i];
        u32 chosen = at_most(v, found.key);
        if (chosen) {
            u32 winners = at_most(v, found.key - 1);
            below += __popc(winners);
            equal += __popc(chosen & ~winners);
        }
    }
    u64 all, before = sum_before(u64(below) << 32 | equal, all);
    if (below + equal == 0) return;
    int ties = found.equal + int(u32(before));
    int rank = found.below + int(before >> 32) + min(ties, found.ties);
    for (int i = first; i < last; ++i) {
        uint4 v = keys[i];
        u32 chosen = at_most(v, found.key);
        if (!chosen) continue;
        u32 winners = at_most(v, found.key - 1);
        for (; chosen; chosen &= chosen - 1) {
            if (!(winners & chosen & (0u - chosen)) && ties++ >= found.ties) continue;
            list[rank++] = part.low + i * VECTOR + __ffs(chosen) - 1;
        }
    }
}

// Scan a row, unless all of its keys are taken, and leave the positions of the selected ones. Codes of
// fresh keys are made either way.
INLINE void select(const Params& p, const Row& row, int* list, u32& met) {
    if (row.everything) {
#if FUSED && FRESH > 0
        __shared__ u32 made[COLUMNS * W];
        __shared__ u16 made_norms[8];
        if (row.part == 0 && row.token == p.tokens - 1)
            make_codes(p, row, find_fresh(p, row, 0, 0), made, made_norms);
#endif
        return;
    }
    Part part = find_part(p, row);
    scan(p, row, part);
    Threshold found = find_threshold(p, row, part, met);
    write_positions(part, found, list);
}
