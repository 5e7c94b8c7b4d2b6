// Distances on binary tensor cores.
//
// With c as in planes.cuh, distance = sum of c + sum over the bits of a key of G - 2 c. The latter,
// halved where the group is even, is written in planes V_j of two's complement, so the distance is a
// weighted sum of popcount(k & V_j). Rows of a product are [16 rows, 256 bits] of codes, and its columns
// are planes:
// - codes of 128 bits: row g is vectors g and 16 + g. Columns 0 to 3 are planes for the first of them,
//   columns 4 to 7 for the second, with zeros for the other;
// - codes of 64 bits: the same rows, of two keys a vector, and a product for each half of a row;
// - WIDE: codes of 128 bits with more than 4 planes, in a product for each half of the same rows; or
//   codes of 256 bits, a row each.
#pragma once

#include "code_ring.cuh"

struct MmaPlanes {
    // Sums of c follow the planes.
    static constexpr int COUNT = C::MMA_PLANES, WORDS = (COUNT + 1) * CODE_WORDS;

    // What a lane has: an operand or halves of two, weights of its two columns, where its sum starts.
    u32 low, high;
    int first, second, start;

    static INLINE constexpr int weight_of(int plane) {
        return plane >= COUNT ? 0 : plane == COUNT - 1 ? -(1 << plane) : 1 << plane;
    }

    // The bits of all planes where `count` queries have a bit set.
    static INLINE u32 bits_of(int count) {
        return u32(C::HALVE ? C::CODE_GROUP / 2 - count : C::CODE_GROUP - 2 * count);
    }

    // The lane's first key, counted from where its own vectors begin; its second is 32 further on.
    static INLINE int own_key() {
        const int lane = threadIdx.x % 32, vector = lane / 4 + lane % 2 * 8;
        const int key = C::WIDE ? lane / 4 + lane % 4 * 8
            : C::VECTOR_KEYS == 1 ? vector + lane % 4 / 2 * 16 : 2 * vector + lane % 4 / 2;
        return key - lane * C::VECTOR_KEYS;
    }

    // The distance of a key of no bits.
    static INLINE int sum_of_counts(const u32* shared) {
        u32 sum = 0;
        // Halves of words are sums of their own.
        for (int i = 0; i < CODE_WORDS; ++i) sum += shared[COUNT * CODE_WORDS + i];
        return int((sum & 0xffff) + (sum >> 16) >> C::HALVE);
    }

    INLINE void load(const u32* shared) {
        const int column = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
        if constexpr (C::WIDE) {
            const u32* plane = shared + column * CODE_WORDS;
            low = column < COUNT ? plane[j] : 0, high = column < COUNT ? plane[CODE_WORDS - 4 + j] : 0;
            first = weight_of(j * 2), second = weight_of(j * 2 + 1);
            start = j ? 0 : sum_of_counts(shared);
        } else {
            const u32 word = column % 4 < COUNT ? shared[column % 4 * CODE_WORDS + j % CODE_WORDS] : 0;
            if constexpr (C::VECTOR_KEYS == 1) low = column < 4 ? word : 0, high = column < 4 ? 0 : word;
            else low = high = column / 4 == j / 2 ? word : 0;
            first = weight_of(j % 2 * 2), second = weight_of(j % 2 * 2 + 1);
            start = j % 2 ? 0 : sum_of_counts(shared);
        }
    }

    INLINE int weighted(int a, int b) const { return a * first + b * second; }

    // Two lanes share the columns of two keys, and each takes a key.
    INLINE u32 sum_of_columns(const int (&sum)[4]) const {
        const int upper = weighted(sum[0], sum[1]), lower = weighted(sum[2], sum[3]);
        const bool odd = threadIdx.x % 2;
        return u32((odd ? lower : upper) + shfl_xor(odd ? upper : lower, 1));
    }

    // WIDE: four lanes share the columns of four keys, of two products, and each takes a key.
    INLINE u32 sum_of_columns(const int (&a)[4], const int (&b)[4]) const {
        const int sums[4] = {weighted(a[0], a[1]), weighted(a[2], a[3]), weighted(b[0], b[1]),
                             weighted(b[2], b[3])};
        const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
        const int low = (odd ? sums[1] : sums[0]) + shfl_xor(odd ? sums[0] : sums[1], 1);
        const int high = (odd ? sums[3] : sums[2]) + shfl_xor(odd ? sums[2] : sums[3], 1);
        return u32((upper ? high : low) + shfl_xor(upper ? low : high, 2));
    }

    // The distances of the lane's own keys (halved as in planes.cuh), from the codes of its warp.
    INLINE void distances_of(u32 (&distances)[C::VECTOR_KEYS], const uint4* slot, const char*, bool) const {
        const int lane = threadIdx.x % 32;
        u32 keys[4];
        int sum[4], other[4];
        if constexpr (C::BITS == 256) {
            // Rows of 16 keys: their first halves, then their second ones.
            ldmatrix_x4(keys, slot + place_of(lane % 16, lane / 16));
            mma_m16n8k256_and_popc(sum, keys, low, high, start);
            ldmatrix_x4(keys, slot + place_of(lane % 16 + 16, lane / 16));
            mma_m16n8k256_and_popc(other, keys, low, high, start);
            distances[0] = sum_of_columns(sum, other);
            return;
        }
        ldmatrix_x4(keys, slot + lane);
        if constexpr (C::WIDE) {
            mma_m16n8k256_and_popc(sum, keys, low, 0, start);
            mma_m16n8k256_and_popc(other, keys, 0, low, start);
            distances[0] = sum_of_columns(sum, other);
        } else if constexpr (C::VECTOR_KEYS == 1) {
            mma_m16n8k256_and_popc(sum, keys, low, high, start);
            distances[0] = sum_of_columns(sum);
        } else {
            mma_m16n8k256_and_popc(sum, keys, low, 0, start);
            distances[0] = sum_of_columns(sum);
            mma_m16n8k256_and_popc(sum, keys, 0, high, start);
            distances[C::VECTOR_KEYS - 1] = sum_of_columns(sum);
        }
    }

    // The distance of a key that a whole warp asks for, by counting.
    INLINE u32 distance_by_warp(const u32* code, const u32* shared) const {
        int mine = 0;
        for (int i = threadIdx.x % 32; i < COUNT * CODE_WORDS; i += 32)
            mine += weight_of(i / CODE_WORDS) * int(__popc(code[i % CODE_WORDS] & shared[i]));
        // The first lane's sum starts with that of a key of no bits.
        return u32(shfl(start, 0)) + reduce_add(u32(mine));
    }
};
