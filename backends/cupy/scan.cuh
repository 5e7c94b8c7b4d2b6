// The scan: one pass over a split's codes that leaves a score of each key and counts scores.
//
// The smallest scores win: 0 for the first and last keys, which win anyway, else 1 + distance. With key
// norms (or very long codes) scores have 32 bits and are selected digit by digit.
#pragma once

#include "codes.cuh"
#include "trace.cuh"

typedef conditional_t<C::DIGITS == 1, u16, u32> score_t;
constexpr u32 NEVER = C::DIGITS == 1 ? 0x7fffu : 0xffffffffu;
// Scores in 16 bytes.
constexpr int VECTOR_SCORES = 16 / sizeof(score_t);

// The keys of a row that this block scans, `count` from `low` on.
struct Split {
    int low, count;
    score_t* scores;
};

INLINE Split find_split(const Params& params, const Row& row) {
    Split split;
    // Whole vectors of codes and of scores.
    const int origin = row.start & ~15;
    const int size = ((row.stop - origin + C::NUM_SPLITS - 1) / C::NUM_SPLITS + 63) & ~63;
    split.low = min(i64(origin) + i64(size) * row.split, i64(row.stop));
    // A dense row is not scanned.
    split.count = row.dense ? 0 : min(size, row.stop - split.low);
    if constexpr (C::SPILL)
        split.scores = reinterpret_cast<score_t*>(params.scores) + row.index * params.capacity
            + (split.low - origin);
    else
        split.scores = reinterpret_cast<score_t*>(smem + SCORES_AT);
    return split;
}

// Unsigned integers in the reversed order of floats; -0 equals 0, NaN counts as 0.
INLINE u32 reversed(float x) {
    x = x == x ? __fadd_rn(x, 0.f) : 0.f;
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

INLINE int digit_of(u32 score, int digit) {
    return C::DIGITS == 1 ? score : digit == 0 ? score >> 21 : digit == 1 ? score >> 10 & 2047 : score & 1023;
}

// The block's own histograms.
INLINE u32* histogram(int digit) {
    return reinterpret_cast<u32*>(smem + HISTOGRAMS_AT) + digit * C::BINS;
}

INLINE u32 score_of(u32 distance, u16 norm) {
    if constexpr (C::KEY_NORMS) {
        const int dot = C::CODE_GROUP * C::BITS - 2 * int(distance);
        return reversed(__fmul_rn(float(dot), fp16_to_float(norm)));
    }
    return distance + 1;
}

// Fill the split's scores, up to a multiple of 64, and count their first digits. After it all exchange
// areas are clear.
template <class Codes>
INLINE void scan(const Params& params, const Row& row, const Split& split, Codes& queries) {
    __shared__ u32 shared_planes[Planes::WORDS];
    const char* codes = params.codes + row.batch * params.codes_b + row.kv_head * params.codes_h;
    u32* bins = histogram(0);
    const int count = split.count, padded = (count + 63) & ~63;
    // Keys of a round, and how far apart those of a lane are.
    constexpr int STRIDE = C::THREADS * C::VECTOR_KEYS, KEY_STRIDE = C::BINARY_MMA ? 32 : 1;
    int mine = threadIdx.x * C::VECTOR_KEYS;
    const int unscanned = queries.begin_fresh(params, row, split.low, split.low + split.count);
    // The first codes are in flight while planes are made.
    const char* from = codes + (split.low + mine) * params.codes_s;
    const i64 hop = STRIDE * params.codes_s, step = params.codes_s * C::VECTOR_KEYS;
    UNROLL for (int a = 0; a < C::PREFETCH; ++a) {
        copy_codes(slot_of(a), from + a * hop, step, count - mine - a * STRIDE);
        cp_async_commit();
    }
    trace(CODES_REQUESTED);
    NO_UNROLL for (int i = threadIdx.x; i < C::DIGITS * C::BINS; i += C::THREADS) bins[i] = 0;
    queries.wait();
    const u32 arrival = clear_exchange(params, row);
    queries.make_planes(params, row, shared_planes);
    trace(QUERIES_HASHED);
    Planes planes;
    planes.load(shared_planes);
    const u16* norms;
    if constexpr (C::KEY_NORMS)
        norms = params.norms + row.batch * params.norms_b + row.kv_head * params.norms_h;
    auto norm_at = [&](int position) -> u16 {
        if constexpr (C::KEY_NORMS) return norms[position * params.norms_s];
        else return 0;
    };
    // Between these, keys are scored; elsewhere they win anyway, are not visible, or come later.
    const int low = row.start + params.sink, high = min(row.stop - params.recent, unscanned);
    const int scored = max(high - low, 0);
    const int shift = Planes::own_key();
    score_t* to = split.scores + mine + shift;
    const char* next = from + C::PREFETCH * hop;
    int slot = 0;
#pragma unroll (C::VECTOR_KEYS > 1 ? 2 : 1)
    for (int before = 0; before < padded; before += STRIDE, mine += STRIDE, to += STRIDE) {
        cp_async_wait<C::PREFETCH - 1>();
        u32 distances[C::VECTOR_KEYS];
        if (SHARES_CODES) syncwarp();
        planes.distances_of(distances, slot_of(slot), from, mine < count);
        from += hop;
        // The slot that was read last time.
        copy_codes(slot_of(slot > 0 ? slot - 1 : C::PREFETCH), next, step,
                   count - mine - C::PREFETCH * STRIDE);
        cp_async_commit();
        next += hop;
        slot = slot < C::PREFETCH ? slot + 1 : 0;
        // How far behind `low` this round begins, and the lane's first key is.
        const int round = split.low + before - low, behind = split.low + mine + shift - low;
        if (round >= 0 && round + STRIDE <= scored && before + STRIDE <= count) {
            // Nearly every round.
            UNROLL for (int i = 0; i < C::VECTOR_KEYS; ++i) {
                const u32 score = score_of(distances[i], norm_at(behind + KEY_STRIDE * i + low));
                to[KEY_STRIDE * i] = score;
                atomicAdd(bins + digit_of(score, 0), 1);
            }
        } else if (mine < padded) {
            UNROLL for (int i = 0; i < C::VECTOR_KEYS; ++i) {
                const int far = behind + KEY_STRIDE * i, position = far + low;
                u32 score = 0;
                if (u32(far) < u32(scored)) {
                    score = score_of(distances[i], norm_at(position));
                } else if (position < row.start || position >= row.stop) {
                    to[KEY_STRIDE * i] = NEVER;
                    continue;
                } else if (position >= unscanned) {
                    continue;
                }
                to[KEY_STRIDE * i] = score;
                atomicAdd(bins + digit_of(score, 0), 1);
            }
        }
    }
    wait_exchange(arrival);
    if constexpr (Codes::FRESH > 0) {
        // A warp takes a fresh key.
        NO_UNROLL for (int i = threadIdx.x / 32; i < queries.end - queries.first; i += C::THREADS / 32) {
            const int position = queries.first + i;
            const u32 distance = planes.distance_by_warp(queries.codes + i * CODE_WORDS, shared_planes);
            // A dense row has no scores, nor room for so many.
            if (threadIdx.x % 32 > 0 || row.dense) continue;
            const bool counts = position >= low && position < row.stop - params.recent;
            const u32 score = counts ? score_of(distance, queries.norms[i]) : 0;
            split.scores[position - split.low] = score;
            atomicAdd(bins + digit_of(score, 0), 1);
        }
        queries.store_fresh(params, row);
    }
}
