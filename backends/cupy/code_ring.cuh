// Codes in flight to shared memory in vectors of 16 bytes: a ring in which every warp has slots. Codes
// that are not so aligned are read when they are needed.
#pragma once

#include "row.cuh"

constexpr int CODE_WORDS = C::BITS / 32;
constexpr bool RINGED = C::LOAD_BYTES == 16;
// Vectors that a lane's keys take.
constexpr int CODE_VECTORS = C::VECTOR_KEYS * CODE_WORDS >= 4 ? C::VECTOR_KEYS * CODE_WORDS / 4 : 1;
// Whether lanes read what other lanes have copied.
constexpr bool SHARES_CODES = C::BINARY_MMA || CODE_VECTORS > 1;
// Bytes of shared memory before histograms, the ring and the scores.
constexpr int HISTOGRAMS_AT = C::EXCHANGE_BYTES + C::QUERY_BYTES;
constexpr int RING_AT = HISTOGRAMS_AT + C::HISTOGRAM_BYTES, SCORES_AT = RING_AT + C::RING_BYTES;

// The warp's slot.
INLINE uint4* slot_of(int slot) {
    return reinterpret_cast<uint4*>(smem + RING_AT)
        + (slot * C::THREADS + threadIdx.x / 32 * 32) * CODE_VECTORS;
}

// Where the n-th vector of a lane's keys lies in a slot: as many lanes as can be meet all banks.
INLINE int place_of(int lane, int n) {
    return lane * CODE_VECTORS + (CODE_VECTORS % 2 ? n : n ^ lane * CODE_VECTORS / 8 % CODE_VECTORS);
}

// Copy codes to a slot; lanes copy consecutive vectors. The lane's own keys begin at `from`, those of the
// next lane `step` bytes further on; `left` keys are left from its own on.
INLINE void copy_codes(uint4* slot, const char* from, i64 step, int left) {
    if constexpr (RINGED)
        UNROLL for (int i = 0; i < CODE_VECTORS; ++i) {
            const int vector = 32 * i + threadIdx.x % 32;
            const int lane = vector / CODE_VECTORS, n = vector % CODE_VECTORS;
            const int further = lane - int(threadIdx.x % 32);
            if (further * C::VECTOR_KEYS < left)
                cp_async(slot + place_of(lane, n), from + further * step + 16 * n);
        }
}

INLINE void read_codes(u32 (&words)[C::VECTOR_KEYS * CODE_WORDS], const uint4* slot, const char* from,
                       bool valid) {
    if constexpr (RINGED)
        UNROLL for (int i = 0; i < CODE_VECTORS; ++i) {
            uint4 v = slot[place_of(threadIdx.x % 32, i)];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    else
        UNROLL for (int i = 0; i < CODE_WORDS; ++i)
            if constexpr (C::LOAD_BYTES == 4) {
                words[i] = valid ? reinterpret_cast<const u32*>(from)[i] : 0;
            } else {
                const u8* b = reinterpret_cast<const u8*>(from) + 4 * i;
                words[i] = valid ? b[0] | u32(b[1]) << 8 | u32(b[2]) << 16 | u32(b[3]) << 24 : 0;
            }
}
