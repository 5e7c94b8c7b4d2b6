// Distances by planes and adders.
//
// The distance of a key to a group of G query codes is the sum over its bits of G - c where the bit is
// set and of c where it is not, c being how many queries set it. Written in planes P_j of weights w_j
// that sum up to G, c = sum_j w_j P_j, so distance = sum_j w_j popcount(k ^ P_j): few planes stand for
// many queries. As popcount is slow, words of one weight go through carry-save adders that leave one
// or two words a weight to be counted (Harley and Seal).
#pragma once

#include "code_ring.cuh"

struct CarrySavePlanes {
    static constexpr int COUNT = C::PLANES, WORDS = COUNT * CODE_WORDS;

    u32 words[WORDS];

    // Powers of two, and for the last plane what is missing to the group.
    static INLINE constexpr int weight_of(int plane) {
        return plane < COUNT - 1 ? 1 << plane : C::CODE_GROUP - (1 << (COUNT - 1)) + 1;
    }

    static INLINE constexpr int planes_at(int level) {
        int count = 0;
        for (int plane = 0; plane < COUNT; ++plane) count += weight_of(plane) >> level & 1;
        return count;
    }

    // The bits of all planes where `count` queries have a bit set.
    static INLINE u32 bits_of(int count) {
        const u32 above = count >= 1 << (COUNT - 1);
        return u32(count - int(above) * weight_of(COUNT - 1)) | above << (COUNT - 1);
    }

    // The lane's first key, counted from where its own vectors begin.
    static INLINE int own_key() { return 0; }

    INLINE void load(const u32* shared) {
        UNROLL for (int i = 0; i < WORDS; ++i) words[i] = shared[i];
    }

    // Sum over words of 2^LEVEL and higher weights, with CARRIED words from the adders below.
    template <int LEVEL, int CARRIED> INLINE u32 tally(const u32* code, const u32* carried) const {
        constexpr int COUNTED = planes_at(LEVEL) * CODE_WORDS + CARRIED;
        if constexpr (COUNTED == 0 && (C::CODE_GROUP >> LEVEL) == 0) {
            return 0;
        } else {
            constexpr int UP = COUNTED > 2 ? (COUNTED - 1) / 2 : 0;
            u32 counted[COUNTED > 0 ? COUNTED : 1], carries[UP > 0 ? UP : 1];
            int count = 0;
            UNROLL for (int plane = 0; plane < COUNT; ++plane)
                if (weight_of(plane) >> LEVEL & 1)
                    UNROLL for (int i = 0; i < CODE_WORDS; ++i)
                        counted[count++] = code[i] ^ words[plane * CODE_WORDS + i];
            UNROLL for (int i = 0; i < CARRIED; ++i) counted[count++] = carried[i];
            u32 left = COUNTED > 0 ? counted[0] : 0;
            UNROLL for (int i = 0; i < (COUNTED - 1) / 2; ++i) {
                u32 a = counted[2 * i + 1], b = counted[2 * i + 2];
                carries[i] = (left & a) | (left & b) | (a & b);
                left ^= a ^ b;
            }
            u32 sum = __popc(left);
            if constexpr (COUNTED > 0 && COUNTED % 2 == 0) sum += __popc(counted[COUNTED - 1]);
            return sum + 2 * tally<LEVEL + 1, UP>(code, carries);
        }
    }

    // Halved if HALVE: all distances of a group have one parity.
    INLINE u32 distance_of(const u32* code) const { return tally<0, 0>(code, nullptr) >> C::HALVE; }

    // The distances of the lane's keys.
    INLINE void distances_of(u32 (&distances)[C::VECTOR_KEYS], const uint4* slot, const char* from,
                             bool valid) const {
        u32 codes[C::VECTOR_KEYS * CODE_WORDS];
        read_codes(codes, slot, from, valid);
        UNROLL for (int i = 0; i < C::VECTOR_KEYS; ++i) distances[i] = distance_of(codes + i * CODE_WORDS);
    }

    // The distance of a key that a whole warp asks for.
    INLINE u32 distance_by_warp(const u32* code, const u32* shared) const { return distance_of(code); }
};
