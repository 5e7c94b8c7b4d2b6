// Planes of a row's queries, made of codes that the caller gives or that a launch before has made.
#pragma once

#include "binary.cuh"
#include "planes.cuh"

typedef conditional_t<C::BINARY_MMA, MmaPlanes, CarrySavePlanes> Planes;

// Write the planes of 32 bits, or of 16 that two lanes each know. `count` queries set the lane's bit; its
// planes are `bits`.
template <typename T> INLINE void write_planes(u32 bits, int count, bool writes, T* to) {
    constexpr int STRIDE = CODE_WORDS * 4 / sizeof(T);
    for (int plane = 0; plane < Planes::COUNT; ++plane) {
        u32 word = ballot(bits >> plane & 1);
        if (writes) to[plane * STRIDE] = T(word);
    }
    if constexpr (C::BINARY_MMA) {
        const u32 sum = reduce_add(u32(count)) / (4 / sizeof(T));
        if (writes) to[Planes::COUNT * STRIDE] = T(sum);
    }
}

struct GivenCodes {
    static constexpr int FRESH = 0;

    // How many queries set the thread's bit.
    int count;

    static INLINE const u8* codes_of(const Params& params, const Row& row) {
        return reinterpret_cast<const u8*>(params.q_codes) + row.batch * params.q_codes_b
            + i64(row.head) * C::CODE_GROUP * params.q_codes_h + row.token * params.q_codes_t;
    }

    static INLINE int count_of(const u8* codes, i64 step, int bit) {
        int count = 0;
        if (bit < C::BITS)
            for (int i = 0; i < C::CODE_GROUP; ++i) count += codes[i * step + bit / 8] >> bit % 8 & 1;
        return count;
    }

    // On its way before the row's length and the many codes of keys.
    INLINE void begin(const Params& params, const Row& row) {
        count = count_of(codes_of(params, row), params.q_codes_h, threadIdx.x);
    }

    // Where the keys end that are scanned.
    INLINE int begin_fresh(const Params& params, const Row& row, int low, int high) { return row.stop; }

    INLINE void wait() {}
    INLINE void discard() {}

    // Planes of the queries in shared memory.
    INLINE void make_planes(const Params& params, const Row& row, u32* planes) {
        NO_UNROLL for (int bit = threadIdx.x; bit < (C::BITS + C::THREADS - 1) / C::THREADS * C::THREADS;
             bit += C::THREADS) {
            const int queries =
                bit < C::THREADS ? count : count_of(codes_of(params, row), params.q_codes_h, bit);
            write_planes(Planes::bits_of(queries), queries, bit < C::BITS && bit % 32 == 0,
                         planes + bit / 32);
        }
        __syncthreads();
    }
};
