// Rows of data as tensor-core operands, straight from memory.
//
// A row's dimensions come in chunks of 32. Lane 4g + j loads the 8 dimensions from 32u + 8j on: one
// 16-byte load, and the operands of two products. Product 2u takes dimensions 8j..8j+3 of the lanes
// j, product 2u + 1 takes 8j+4..8j+7; every kernel deals them out alike, so that a sum over the
// dimensions is the same sum wherever it is taken.
//
// D; DATA: 0 fp32, 1 fp16, 2 bf16. ALIGNED: rows are made of whole 16-byte vectors.

#if DATA == 0
typedef float data_t;
#else
typedef u16 data_t;
#endif

INLINE float widen(float x) { return x; }
INLINE float widen(u16 x) {
#if DATA == 1
    return widen_fp16(x);
#else
    return widen_bf16(x);
#endif
}

INLINE void put(float* p, float x) { *p = x; }
INLINE void put(u16* p, float x) { *p = u16(narrow_pair(x, 0.f, DATA)); }

// Eight 16-bit numbers; zeros unless `inside`.
INLINE uint4 load_eight(const u16* p, bool inside) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (inside) {
#if ALIGNED
        v = *reinterpret_cast<const uint4*>(p);
#else
        v.x = p[0] | u32(p[1]) << 16;
        v.y = p[2] | u32(p[3]) << 16;
        v.z = p[4] | u32(p[5]) << 16;
        v.w = p[6] | u32(p[7]) << 16;
#endif
    }
    return v;
}

// Copy eight 16-bit numbers to shared memory, without waiting; zeros unless `inside`.
INLINE void copy_or_clear(uint4* to, const u16* from, bool inside) {
#if ALIGNED
    copy_ahead(to, from, inside);
#else
    *to = load_eight(from, inside);
#endif
}

// Four floats; zeros unless `inside`.
INLINE float4 load_four(const float* p, bool inside) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (inside) {
#if ALIGNED
        v = *reinterpret_cast<const float4*>(p);
#else
        v = make_float4(p[0], p[1], p[2], p[3]);
#endif
    }
    return v;
}

INLINE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Low (or high) halves of two registers.
INLINE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
INLINE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// A bias or sink logits: absent (0), in the dtype of the data (1), or fp32 (2).
INLINE float optional(const char* p, int kind, i64 at) {
    if (kind == 0) return 0.f;
    return kind == 1 ? widen(reinterpret_cast<const data_t*>(p)[at])
                     : reinterpret_cast<const float*>(p)[at];
}

// Nearest fp16 to a norm, saturating; NaN as 0.
INLINE u16 norm_of(float squares) {
    float norm = __fsqrt_rn(squares);
    norm = norm == norm ? norm : 0.f;
    return narrow_fp16(fminf(norm, 65504.f));
}

// Sum of squares of a vector, of which this lane takes the dimensions from 8j on in each chunk. The
// order is fixed: a norm depends on its vector alone.
INLINE float squares_of(const data_t* x, bool inside, int j) {
    float sum = 0.f;
#pragma unroll 1
    for (int u = 0; u < (D + 31) / 32; ++u)
        for (int i = 0; i < 8; ++i) {
            int d = 32 * u + 8 * j + i;
            float y = inside && d < D ? widen(x[d]) : 0.f;
            sum = fmaf(y, y, sum);
        }
    sum += across(sum, 1);
    return sum + across(sum, 2);
}
