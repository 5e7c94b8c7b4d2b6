// The scan: one pass over a part's codes that leaves a key to select by per stored key, and counts.
//
// The keys to select by, of which the smallest win: 0 for the first and last keys that win anyway,
// else 1 + distance, halved where all distances of a group have one parity; with key norms (or very
// long codes) 32 bits wide, and found digit by digit (ROUNDS).
//
// R, GROUP, BINARY (distances by binary.cu, else by planes.cu), NORMS, ROUNDS, BINS, HALVE, UNIT (bytes
// that codes are read by: 16, 4, 1), KEYS (codes in a 16-byte vector, where they are shorter), AHEAD
// (reads that a thread is ahead), RING (bytes), SPILL (keys to select by lie in global memory, capacity a
// row), COUNTERS (bytes of counters), FUSED (see codes.cu).

// Vectors of 16 bytes that a lane's keys take, and where the n-th of them lies among those of its warp:
// so that as many lanes as can be meet all banks.
#define VECTORS (KEYS * W / 4)
INLINE int place_of(int lane, int n) {
    return lane * VECTORS + (VECTORS % 2 ? n : n ^ lane * VECTORS / 8 % VECTORS);
}

#include "order.cu"
#if BINARY
#include "binary.cu"
#else
#include "planes.cu"
#endif
#include "codes.cu"

// The part of a row that this block scans.
struct Part {
    // Its first key, and how many.
    int low, count;
    order_t* keys;
    uint4* ring;
};

INLINE Part find_part(const Params& p, const Row& row) {
    Part part;
    const int origin = origin_of(row), size = part_size(row);
    part.low = min(i64(origin) + i64(size) * row.part, i64(row.stop));
    // A row of which all is taken is not scanned.
    part.count = row.everything ? 0 : min(size, row.stop - part.low);
#if SPILL
    part.keys = reinterpret_cast<order_t*>(p.scores) + row.index * p.capacity + (part.low - origin);
#else
    part.keys = reinterpret_cast<order_t*>(memory + EXCHANGE + QUERIES + COUNTERS + RING);
#endif
    part.ring = reinterpret_cast<uint4*>(memory + EXCHANGE + QUERIES + COUNTERS);
    return part;
}

// Codes come in vectors of 16 bytes through a ring in shared memory, in which every warp has slots of
// its own. Its lanes copy consecutive vectors, so if those of a lane's own keys are several, or another
// lane's are read (BINARY), what a lane reads others have copied. Codes that are not so aligned are
// read when they are needed.
#define RINGED (UNIT == 16)
#define SHARES_CODES (BINARY || VECTORS > 1)
// How far apart the keys are that a lane scores in a round.
#define APART (BINARY ? 32 : 1)

INLINE uint4* slot_of(const Part& part, int slot) {
    return part.ring + (slot * THREADS + threadIdx.x / 32 * 32) * VECTORS;
}

// Copy codes to a slot. `from` is where the lane's own begin, `left` how many keys there are from its
// own on, and those of the next lane are `step` bytes further on.
INLINE void copy_codes(uint4* slot, const char* from, i64 step, int left) {
#if RINGED
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = 32 * i + threadIdx.x % 32, lane = vector / VECTORS, n = vector % VECTORS;
        const int further = lane - int(threadIdx.x % 32);
        if (further * KEYS < left) copy_ahead(slot + place_of(lane, n), from + further * step + 16 * n);
    }
#endif
}

INLINE void read_codes(u32 (&words)[KEYS * W], const uint4* slot, const char* from, bool inside) {
#if RINGED
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        uint4 v = slot[place_of(threadIdx.x % 32, i)];
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
    return distance + 1;
#endif
}

// Fill the part's keys to select by, up to a multiple of 64, and count their first digits. After it all
// areas are clear.
INLINE void scan(const Params& p, const Row& row, const Part& part, Hashing& hashing) {
    __shared__ u32 shared_planes[PLANE_WORDS];
    const char* codes = p.codes + row.batch * p.codes_b + row.kv_head * p.codes_h;
    u32* bins = counters(0);
    const int count = part.count, padded = (count + 63) & ~63, stride = THREADS * KEYS;
    int mine = threadIdx.x * KEYS;
    int unscanned = row.stop;
#if FUSED && FRESH > 0
    // Before codes, which are many.
    __shared__ u32 fresh_codes[FRESH * W];
    __shared__ u16 fresh_norms[8];
    const Fresh fresh = find_fresh(p, row, part.low, part.low + part.count);
    unscanned = fresh.from;
#if BESIDE
    load_fresh(p, row, fresh, GROUP % 8, hashing.queries.at[QUERY_TILES - 1]);
#else
    Columns<1> fresh_keys = {};
    load_fresh(p, row, fresh, 0, fresh_keys.at[0]);
#endif
#endif
    // The first codes are on their way while planes are made.
    const char* from = codes + (part.low + mine) * p.codes_s;
    const i64 hop = stride * p.codes_s;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        copy_codes(slot_of(part, a), from + a * hop, p.codes_s * KEYS, count - mine - a * stride);
        end_batch();
    }
    end_phase(CODES_ASKED_FOR);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROUNDS * BINS; i += THREADS) bins[i] = 0;
#if FUSED
    // Weights have come.
    wait_for_batches<AHEAD>();
    __syncthreads();
#endif
    const u32 arrival = clear_area(p, row);
#if FUSED && FRESH > 0
#if NORMS
    measure_fresh(p, row, fresh, fresh_norms);
#endif
    hash_queries(p, row, hashing, BESIDE ? fresh.end - fresh.first : 0, shared_planes, fresh_codes);
#if !BESIDE
    hash_fresh(p, row, fresh, fresh_keys, fresh_codes);
#endif
#elif FUSED
    hash_queries(p, row, hashing, 0, shared_planes, nullptr);
#else
    make_planes(p, row, hashing, shared_planes);
#endif
    end_phase(QUERIES_HASHED);
    const Planes planes = planes_of(shared_planes);
#if NORMS
    const u16* norms = p.norms + row.batch * p.norms_b + row.kv_head * p.norms_h;
#define NORM_OF(position) norms[(position) * p.norms_s]
#else
#define NORM_OF(position) 0
#endif
    // Between these, keys are scored; elsewhere they win anyway, are not seen, or come later.
    const int low = row.start + p.sink, high = min(row.stop - p.recent, unscanned);
    const int scored = max(high - low, 0);
#if BINARY
    const int shift = own_key() - int(threadIdx.x % 32) * KEYS;
#else
    const int shift = 0;
#endif
    order_t* to = part.keys + mine + shift;
    const char* next = from + AHEAD * hop;
    int slot = 0;
#pragma unroll (KEYS > 1 ? 2 : 1)
    for (int before = 0; before < padded; before += stride, mine += stride, to += stride) {
        wait_for_batches<AHEAD - 1>();
        u32 distance[KEYS];
        if (SHARES_CODES) sync_warp();
#if BINARY
        find_distances(distance, slot_of(part, slot), planes);
#else
        u32 words[KEYS * W];
        read_codes(words, slot_of(part, slot), from, mine < count);
        from += hop;
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
            distance[i] = distance_of(words + i * W, planes, shared_planes);
#endif
        // The slot that was read last time.
        copy_codes(slot_of(part, slot > 0 ? slot - 1 : AHEAD), next, p.codes_s * KEYS,
                   count - mine - AHEAD * stride);
        end_batch();
        next += hop;
        slot = slot < AHEAD ? slot + 1 : 0;
        // How far behind `low` this round begins, and the lane's first key is.
        const int round = part.low + before - low, behind = part.low + mine + shift - low;
        if (round >= 0 && round + stride <= scored && before + stride <= count) {
            // Nearly every round.
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const u32 key = key_of(distance[i], NORM_OF(behind + APART * i + low));
                to[APART * i] = key;
                atomicAdd(bins + digit_of(key, 0), 1);
            }
        } else if (mine < padded) {
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const int far = behind + APART * i, position = far + low;
                u32 key = 0;
                if (u32(far) < u32(scored)) {
                    key = key_of(distance[i], NORM_OF(position));
                } else if (position < row.start || position >= row.stop) {
                    to[APART * i] = NEVER;
                    continue;
                } else if (position >= unscanned) {
                    continue;
                }
                to[APART * i] = key;
                atomicAdd(bins + digit_of(key, 0), 1);
            }
        }
    }
    wait_for_areas(arrival);
#if FUSED && FRESH > 0
    // A warp takes a fresh key.
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < fresh.end - fresh.first; i += THREADS / 32) {
        const int position = fresh.first + i;
        const u32 distance = distance_by_warp(fresh_codes + i * W, planes, shared_planes);
        // A row of which all is taken has no keys to select by, nor room for so many.
        if (threadIdx.x % 32 > 0 || row.everything) continue;
        const bool counts = position >= low && position < row.stop - p.recent;
        const u32 key = counts ? key_of(distance, fresh_norms[i]) : 0;
        part.keys[position - part.low] = key;
        atomicAdd(bins + digit_of(key, 0), 1);
    }
    store_fresh(p, row, fresh, fresh_codes, fresh_norms);
#endif
}
