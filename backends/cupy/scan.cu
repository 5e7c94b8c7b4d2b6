// The scan: one pass over a part's codes that leaves a key to select by per stored key, and counts.
//
// For a group of G query codes, the distance of key k is the sum over its bits of G - c where the
// bit is set and of c where it is not, c being how many queries set it. Written in planes P_j of
// weights w_j that sum up to G, c = sum_j w_j P_j, so distance = sum_j w_j popcount(k ^ P_j): few
// planes stand for many queries. And as popcount is slow, words of one weight go through adders that
// leave one or two words a weight to be counted (Harley and Seal).
//
// The keys to select by, of which the smallest win: 0 for the first and last keys that win anyway,
// else 1 + distance, halved where all distances of a group have one parity; with key norms (or very
// long codes) 32 bits wide, and found digit by digit (ROUNDS).
//
// R, GROUP, PLANES, NORMS, ROUNDS, BINS, HALVE, UNIT (bytes that codes are read by: 16, 4, 1), KEYS
// (codes in a 16-byte vector, where they are shorter), AHEAD (reads that a thread is ahead), RING (bytes),
// SPILL (keys to select by lie in global memory), COUNTERS (bytes of counters), FUSED (see codes.cu).

#if ROUNDS == 1
typedef u16 order_t;
#define NEVER 0x7fffu
#else
typedef u32 order_t;
#define NEVER 0xffffffffu
#endif

// The part of a row that this block scans.
struct Part {
    int low, count;
    order_t* keys;
    uint4* ring;
};

INLINE Part find_part(const Params& p, const Row& row) {
    Part part;
    // Parts begin at whole vectors, of codes and of keys to select by.
    int origin = row.start & ~15;
    int size = (row.stop - origin + PARTS - 1) / PARTS;
    size = (size + 63) & ~63;
    part.low = min(i64(origin) + i64(size) * row.part, i64(row.stop));
    // A row of which all is taken is not scanned.
    part.count = row.everything ? 0 : min(size, row.stop - part.low);
#if SPILL
    part.keys = reinterpret_cast<order_t*>(p.scores) + (row.index * PARTS + row.part) * p.capacity;
#else
    part.keys = reinterpret_cast<order_t*>(memory + EXCHANGE + QUERIES + COUNTERS + RING);
#endif
    part.ring = reinterpret_cast<uint4*>(memory + EXCHANGE + QUERIES + COUNTERS);
    return part;
}

// Weight of a plane: powers of two, and for the last one what is missing to the group.
__host__ __device__ constexpr int weight_of(int plane) {
    return plane < PLANES - 1 ? 1 << plane : GROUP - (1 << (PLANES - 1)) + 1;
}

__host__ __device__ constexpr int planes_at(int level) {
    int count = 0;
    for (int plane = 0; plane < PLANES; ++plane) count += weight_of(plane) >> level & 1;
    return count;
}

// Sum over words of 2^LEVEL and higher weights, with CARRIED words from the adders below.
template <int LEVEL, int CARRIED>
INLINE u32 tally(const u32* code, const u32* planes, const u32* carried) {
    constexpr int OWN = planes_at(LEVEL) * W, COUNT = OWN + CARRIED;
    if constexpr (COUNT == 0 && (GROUP >> LEVEL) == 0) {
        return 0;
    } else {
        u32 words[COUNT > 0 ? COUNT : 1], carries[COUNT > 2 ? (COUNT - 1) / 2 : 1];
        int count = 0;
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
            if (weight_of(plane) >> LEVEL & 1)
#pragma unroll
                for (int i = 0; i < W; ++i) words[count++] = code[i] ^ planes[plane * W + i];
#pragma unroll
        for (int i = 0; i < CARRIED; ++i) words[count++] = carried[i];
        u32 left = COUNT > 0 ? words[0] : 0;
#pragma unroll
        for (int i = 0; i < (COUNT - 1) / 2; ++i) {
            u32 a = words[2 * i + 1], b = words[2 * i + 2];
            carries[i] = (left & a) | (left & b) | (a & b);
            left ^= a ^ b;
        }
        u32 sum = __popc(left);
        if constexpr (COUNT > 0 && COUNT % 2 == 0) sum += __popc(words[COUNT - 1]);
        constexpr int UP = COUNT > 2 ? (COUNT - 1) / 2 : 0;
        return sum + 2 * tally<LEVEL + 1, UP>(code, planes, carries);
    }
}

// The bit planes of a row's query codes, which are `step` bytes apart, in shared memory.
INLINE void make_planes(const u8* codes, i64 step, u32* planes) {
#pragma unroll 1
    for (int bit = threadIdx.x; bit < (R + THREADS - 1) / THREADS * THREADS; bit += THREADS) {
        int count = 0;
        if (bit < R)
            for (int i = 0; i < GROUP; ++i) count += codes[i * step + bit / 8] >> bit % 8 & 1;
        bool above = count >= 1 << (PLANES - 1);
        if (above) count -= weight_of(PLANES - 1);
        for (int plane = 0; plane < PLANES; ++plane) {
            u32 word = ballot(plane == PLANES - 1 ? above : count >> plane & 1);
            if (bit < R && bit % 32 == 0) planes[plane * W + bit / 32] = word;
        }
    }
    __syncthreads();
}

// Codes come in vectors of 16 bytes through a ring in shared memory, in which every thread has slots
// of its own: what it reads it has copied itself, so it waits for nobody. Codes that are not so
// aligned are read when they are needed.
#define RINGED (UNIT == 16)
#define VECTORS (KEYS * W / 4)

INLINE uint4* slot_of(const Part& part, int slot) {
    return part.ring + slot * VECTORS * THREADS + threadIdx.x;
}

INLINE void copy_codes(uint4* slot, const char* from) {
#if RINGED
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) copy_ahead(slot + i * THREADS, from + 16 * i);
#endif
}

INLINE void read_codes(u32 (&words)[KEYS * W], const uint4* slot, const char* from, bool inside) {
#if RINGED
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        uint4 v = slot[i * THREADS];
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#else
#pragma unroll
    for (int i = 0; i < W; ++i) {
#if UNIT == 4
        words[i] = inside ? reinterpret_cast<const u32*>(from)[i] : 0;
#else
        const u8* b = reinterpret_cast<const u8*>(from) + 4 * i;
        words[i] = inside ? b[0] | u32(b[1]) << 8 | u32(b[2]) << 16 | u32(b[3]) << 24 : 0;
#endif
    }
#endif
}

// Unsigned integers in the reversed order of float scores; -0 equals 0, NaN counts as 0.
INLINE u32 reversed(float score) {
    score = score == score ? __fadd_rn(score, 0.f) : 0.f;
    u32 bits = __float_as_uint(score);
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

INLINE int digit_of(u32 key, int round) {
    return ROUNDS == 1 ? key : round == 0 ? key >> 21 : round == 1 ? key >> 10 & 2047 : key & 1023;
}

// The block's own histograms, after what others may see and the queries.
INLINE u32* counters(int round) {
    return reinterpret_cast<u32*>(memory + EXCHANGE + QUERIES) + round * BINS;
}

// The key to select by of a stored key that is scored.
INLINE u32 key_of(u32 distance, u16 norm) {
#if NORMS
    return reversed(__fmul_rn(float(GROUP * R - 2 * int(distance)), widen_fp16(norm)));
#else
    return (distance >> HALVE) + 1;
#endif
}

// Fill the part's keys to select by, up to a multiple of 64, and count their first digits.
INLINE void scan(const Params& p, const Row& row, const Part& part, Weights& weights) {
    __shared__ u32 shared_planes[PLANES * W];
    const char* codes = p.codes + row.batch * p.codes_b + row.kv_head * p.codes_h;
    u32* bins = counters(0);
    const int padded = (part.count + 63) & ~63, stride = THREADS * KEYS;
    int mine = threadIdx.x * KEYS;
    // The first codes are on their way while planes are made.
    const char* from = codes + (part.low + mine) * p.codes_s;
    const i64 hop = stride * p.codes_s;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        if (mine + a * stride < part.count) copy_codes(slot_of(part, a), from + a * hop);
        end_batch();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) bins[i] = 0;
    int unscanned = row.stop;
#if FUSED && FRESH > 0
    __shared__ u32 fresh_codes[FRESH * W];
    __shared__ u16 fresh_norms[8];
    const Fresh fresh = find_fresh(p, row, part.low, part.low + part.count);
    unscanned = fresh.from;
    Columns<1> fresh_keys;
    const int g = threadIdx.x % 32 / 4, count = fresh.end - fresh.first;
    if (count > 0) load_column(fresh_key(p, row, fresh, min(g, count - 1)), g < count, fresh_keys.at[0]);
#endif
#if FUSED
    __shared__ u32 query_codes[GROUP * W];
    hash_queries(p, row, weights, query_codes);
    make_planes(reinterpret_cast<const u8*>(query_codes), R / 8, shared_planes);
#else
    make_planes(reinterpret_cast<const u8*>(p.q_codes) + row.batch * p.q_codes_b
                    + i64(row.head) * GROUP * p.q_codes_h + row.token * p.q_codes_t,
                p.q_codes_h, shared_planes);
#endif
#if FUSED && FRESH > 0
    hash_fresh(p, row, fresh, fresh_keys, weights, fresh_codes, fresh_norms);
#endif
    u32 planes[PLANES * W];
#pragma unroll
    for (int i = 0; i < PLANES * W; ++i) planes[i] = shared_planes[i];
#if NORMS
    const u16* norms = p.norms + row.batch * p.norms_b + row.kv_head * p.norms_h;
#endif
    // Between these, keys are scored; elsewhere they win anyway, are not seen, or come later.
    const int low = row.start + p.sink, high = min(row.stop - p.recent, unscanned);
    const u32 scored = max(high - low, 0);
    int slot = 0, refilled = AHEAD;
#pragma unroll 2
    for (; mine < padded; mine += stride) {
        u32 words[KEYS * W];
        wait_for_batches<AHEAD - 1>();
        read_codes(words, slot_of(part, slot), from, mine < part.count);
        // The slot that was read last time.
        if (mine + AHEAD * stride < part.count)
            copy_codes(slot_of(part, refilled), from + AHEAD * hop);
        end_batch();
        slot = slot == AHEAD ? 0 : slot + 1;
        refilled = refilled == AHEAD ? 0 : refilled + 1;
        from += hop;
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            int at = mine + i, position = part.low + at;
            u32 distance = tally<0, 0>(words + i * W, planes, nullptr), key = 0;
            if (u32(position - low) < scored) {
#if NORMS
                key = key_of(distance, norms[position * p.norms_s]);
#else
                key = key_of(distance, 0);
#endif
            } else if (position < row.start || position >= row.stop) {
                part.keys[at] = NEVER;
                continue;
            } else if (position >= unscanned) {
                continue;
            }
            part.keys[at] = key;
            atomicAdd(bins + digit_of(key, 0), 1);
        }
    }
#if FUSED && FRESH > 0
#pragma unroll 1
    for (int position = fresh.first + int(threadIdx.x); position < fresh.end; position += THREADS) {
        int i = position - fresh.first;
        u32 distance = tally<0, 0>(fresh_codes + i * W, planes, nullptr);
        bool scored_too = position >= low && position < row.stop - p.recent;
        u32 key = scored_too ? key_of(distance, fresh_norms[i]) : 0;
        part.keys[position - part.low] = key;
        atomicAdd(bins + digit_of(key, 0), 1);
    }
#endif
}
