// Rows of 16-bit data as tensor-core operands, straight from memory.
//
// A row's dimensions come in chunks of 32. Lane 4g + j loads dimensions 32u + 8j.. of a chunk u: one
// 16-byte load, and the operands of two products. Product 2u takes dimensions 8j..8j + 3 of lanes j,
// product 2u + 1 takes 8j + 4..8j + 7. Every kernel deals them out alike, so that a sum over the
// dimensions is the same sum wherever it is taken.
#pragma once

#include "ptx.cuh"

typedef conditional_t<C::DTYPE == FP32, float, u16> data_t;

constexpr int CHUNKS = (C::HEAD_DIM + 31) / 32;

INLINE float to_float(float x) { return x; }
INLINE float to_float(u16 x) { return C::DTYPE == FP16 ? fp16_to_float(x) : bf16_to_float(x); }

INLINE void store(float* p, float x) { *p = x; }
INLINE void store(u16* p, float x) { *p = u16(float_to_pair(x, 0.f, C::DTYPE)); }

// Eight 16-bit numbers; zeros unless `valid`.
INLINE uint4 load_eight(const u16* p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) {
        if constexpr (C::ALIGNED) {
            v = *reinterpret_cast<const uint4*>(p);
        } else {
            v.x = p[0] | u32(p[1]) << 16;
            v.y = p[2] | u32(p[3]) << 16;
            v.z = p[4] | u32(p[5]) << 16;
            v.w = p[6] | u32(p[7]) << 16;
        }
    }
    return v;
}

// The same, to shared memory; without waiting, if aligned.
INLINE void copy_eight(uint4* to, const u16* from, bool valid) {
    if constexpr (C::ALIGNED) cp_async(to, from, valid);
    else *to = load_eight(from, valid);
}

// Four floats; zeros unless `valid`.
INLINE float4 load_four(const float* p, bool valid) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (valid) {
        if constexpr (C::ALIGNED) v = *reinterpret_cast<const float4*>(p);
        else v = make_float4(p[0], p[1], p[2], p[3]);
    }
    return v;
}

INLINE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Low (or high) halves of two registers.
INLINE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
INLINE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// A bias or sink logit: absent (kind 0), in the dtype of the data (1), or fp32 (2).
INLINE float load_optional(const char* p, int kind, i64 at) {
    if (kind == 0) return 0.f;
    return kind == 1 ? to_float(reinterpret_cast<const data_t*>(p)[at])
                     : reinterpret_cast<const float*>(p)[at];
}

// Where 8 dimensions of a row lie in a stage [rows, 4 CHUNKS] of shared memory: lanes meet all banks.
INLINE int stage_place(int row, int eight) {
    return row * (4 * CHUNKS) + (CHUNKS % 2 ? eight : eight ^ (row & 1) << 2);
}

// Nearest fp16 to a norm, saturating; NaN as 0.
INLINE u16 norm_of(float squares) {
    float norm = __fsqrt_rn(squares);
    norm = norm == norm ? norm : 0.f;
    return float_to_fp16(fminf(norm, 65504.f));
}

// Sum of squares of a vector, of which this lane takes dimensions 8j.. of each chunk. The order is
// fixed, so a norm depends on its vector alone.
template <typename T> INLINE float squares_of(const T* x, bool valid, int j) {
    float sum = 0.f;
    NO_UNROLL for (int u = 0; u < CHUNKS; ++u)
        for (int i = 0; i < 8; ++i) {
            int d = 32 * u + 8 * j + i;
            float y = valid && d < C::HEAD_DIM ? to_float(x[d]) : 0.f;
            sum = fmaf(y, y, sum);
        }
    sum += shfl_xor(sum, 1);
    return sum + shfl_xor(sum, 2);
}
