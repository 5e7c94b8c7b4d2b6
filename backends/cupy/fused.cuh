// Codes of a row's queries and fresh keys, made by the blocks that need them.
//
// A decode step is then one launch: every block of a row hashes the row's queries, and the block whose
// split holds fresh keys hashes those beside them and writes their codes. The products are those of
// encode.cu, with the same dimensions in the same order, so the codes are the same. Bits are the rows and
// vectors the columns. Weights come through shared memory, where the scores will be. Data have 16 bits.
#pragma once

#include "codes.cuh"
#include "vectors.cuh"

constexpr int QUERY_TILES = (C::CODE_GROUP + 7) / 8;
// Vectors of 16 bytes in a row of weights.
constexpr int BIT_VECTORS = C::BITS / 8;

// Vectors as columns: lane 4g + j has a part of the g-th of each 8.
template <int TILES> struct Columns {
    uint4 at[TILES][CHUNKS];
};

// Bits of a tile. Lane 4g + j has those of columns 8t + 2j + i, as bits 2t + i: in `low` bit g of the
// tile, in `high` bit g + 8.
struct Signs {
    u32 low, high;
};

// Weights and biases of a head.
struct Projection {
    const u16* weights;
    const char* bias;
    int bias_kind;
    i64 bias_at;

    // Where a dimension's weights of 8 bits lie, so that the 8 rows of a matrix meet all banks.
    static INLINE uint4* place_of(u32 d, u32 eight) {
        const u32 bank = BIT_VECTORS % 8 ? d / 8 % 4 : d / 8 % 4 * 2 + d % 2;
        return reinterpret_cast<uint4*>(smem + SCORES_AT) + d * BIT_VECTORS + (eight ^ bank);
    }

    // Start the copies of the weights, a row for every dimension; beyond the last there are zeros.
    INLINE void copy() const {
        constexpr u32 VALID = C::HEAD_DIM * BIT_VECTORS, ALL = 32 * CHUNKS * BIT_VECTORS;
#pragma unroll 8
        for (u32 n = 0; n < (ALL + C::THREADS - 1) / C::THREADS; ++n) {
            const u32 i = n * C::THREADS + threadIdx.x;
            if (ALL % C::THREADS && i >= ALL) continue;
            uint4* to = place_of(i / BIT_VECTORS, i % BIT_VECTORS);
            if (ALL == VALID) cp_async(to, weights + 8 * i);
            else cp_async(to, weights + 8 * min(i, VALID - 1), i < VALID);
        }
        cp_async_commit();
    }

    // Bits of a tile, [16 bits, 8 TILES vectors].
    template <int TILES> INLINE Signs signs_of(const Columns<TILES>& x, int tile) const {
        float sum[TILES][4] = {};
        // Lane 4g + j has dimensions 8j..8j + 7 of a column, half of them in each product: rows 2j and
        // 2j + 1 of a matrix of weights are the first or the second two of a half.
        const int lane = threadIdx.x % 32, d = lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2;
        UNROLL for (int u = 0; u < CHUNKS; ++u)
            UNROLL for (int half = 0; half < 2; ++half) {
                u32 w[4];
                ldmatrix_x4_trans(w, place_of(32 * u + d + 4 * half, 2 * tile + lane / 8 % 2));
                UNROLL for (int t = 0; t < TILES; ++t) {
                    const uint4 v = x.at[t][u];
                    mma_m16n8k16(sum[t], w[0], w[1], w[2], w[3], half ? v.z : v.x,
                                 half ? v.w : v.y, C::DTYPE);
                }
            }
        const i64 bit = bias_at + 16 * tile + threadIdx.x % 32 / 4;
        const float low = load_optional(bias, bias_kind, bit);
        const float high = load_optional(bias, bias_kind, bit + 8);
        Signs signs = {};
        UNROLL for (int t = 0; t < TILES; ++t)
            UNROLL for (int i = 0; i < 2; ++i) {
                signs.low |= u32(sum[t][i] + low > 0.f) << (2 * t + i);
                signs.high |= u32(sum[t][2 + i] + high > 0.f) << (2 * t + i);
            }
        return signs;
    }
};

INLINE void load_column(const u16* x, bool valid, uint4 (&at)[CHUNKS]) {
    UNROLL for (int u = 0; u < CHUNKS; ++u) {
        int d = 32 * u + 8 * (threadIdx.x % 4);
        at[u] = load_eight(x + d, valid && d < C::HEAD_DIM);
    }
}

// How many queries set a bit of a tile: in lane i, bit i % 16.
INLINE int count_of_queries(const Signs& signs) {
    const int lane = threadIdx.x % 32;
    u32 queries = 0;
    UNROLL for (int t = 0; t < QUERY_TILES; ++t)
        UNROLL for (int i = 0; i < 2; ++i)
            queries |= u32(8 * t + lane % 4 * 2 + i < C::CODE_GROUP) << (2 * t + i);
    u32 both = __popc(signs.low & queries) | __popc(signs.high & queries) << 16;
    both += shfl_xor(both, 1);
    both += shfl_xor(both, 2);
    return int(shfl(both, lane % 8 * 4) >> lane % 16 / 8 * 16 & 0xffff);
}

// Write codes of the `count` columns from `first` on.
template <int TILES>
INLINE void write_codes(const Signs& signs, int tile, int first, int count, u32* codes) {
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
    UNROLL for (int t = 0; t < TILES; ++t)
        UNROLL for (int i = 0; i < 2; ++i) {
            const int shift = 2 * t + i, column = 8 * t + 2 * j + i - first;
            u32 bits = (signs.low >> shift & 1) << g | (signs.high >> shift & 1) << (g + 8);
            for (int mask = 4; mask < 32; mask *= 2) bits |= shfl_xor(bits, mask);
            if (g == 0 && column >= 0 && column < count)
                reinterpret_cast<u16*>(codes + column * CODE_WORDS)[tile] = u16(bits);
        }
}

// Codes that this launch makes, with so many fresh keys. The interface is that of GivenCodes.
template <int FRESH_KEYS> struct FusedCodes {
    static constexpr int FRESH = FRESH_KEYS;
    // Whether fresh keys take columns that queries leave free, and so cost no products of their own.
    static constexpr bool BESIDE =
        FRESH > 0 && C::SAME_PROJECTION && 8 * QUERY_TILES - C::CODE_GROUP >= FRESH;

    Columns<QUERY_TILES> queries;
    Columns<1> keys;
    // Fresh keys [first, end) are in this block's care, and their codes and norms in shared memory.
    int first, end;
    u32* codes;
    u16* norms;

    static INLINE Projection of_queries(const Params& params, const Row& row) {
        return {reinterpret_cast<const u16*>(params.query_projection)
                    + row.kv_head * params.query_projection_h,
                params.query_bias, params.query_bias_kind, row.kv_head * params.query_bias_h};
    }

    INLINE void begin(const Params& params, const Row& row) {
        of_queries(params, row).copy();
        if (threadIdx.x / 32 >= C::BITS / 16) return;
        const u16* q = reinterpret_cast<const u16*>(params.q) + row.batch * params.q_b
            + i64(row.head) * C::CODE_GROUP * params.q_h + row.token * params.q_t;
        int g = threadIdx.x % 32 / 4;
        UNROLL for (int t = 0; t < QUERY_TILES; ++t)
            load_column(q + (8 * t + g) * params.q_h, 8 * t + g < C::CODE_GROUP, queries.at[t]);
    }

    INLINE const u16* fresh_key(const Params& params, const Row& row, int i) {
        return reinterpret_cast<const u16*>(params.keys) + row.batch * params.keys_b
            + row.kv_head * params.keys_h + i64(first + i) * params.keys_s;
    }

    // Columns from `column` on become the block's fresh keys.
    INLINE void load_fresh(const Params& params, const Row& row, int column, uint4 (&at)[CHUNKS]) {
        const int i = int(threadIdx.x % 32 / 4) - column;
        if (i >= 0 && i < end - first) load_column(fresh_key(params, row, i), true, at);
    }

    // Find and load the fresh keys of [low, high); they are not scanned.
    INLINE int begin_fresh(const Params& params, const Row& row, int low, int high) {
        if constexpr (FRESH == 0) {
            return row.stop;
        } else {
            __shared__ u32 fresh_codes[FRESH * CODE_WORDS];
            __shared__ u16 fresh_norms[8];
            codes = fresh_codes, norms = fresh_norms;
            const int last = row.stop + (params.tokens - 1 - row.token);
            const int from = max(min(last, params.slots) - FRESH, row.start);
            // A row that is not scanned leaves all of them to its first block.
            if (row.dense) low = row.split == 0 ? row.start : row.stop, high = row.stop;
            first = min(max(from, low), high);
            end = max(high, first);
            if constexpr (BESIDE) {
                load_fresh(params, row, C::CODE_GROUP % 8, queries.at[QUERY_TILES - 1]);
            } else {
                keys = {};
                load_fresh(params, row, 0, keys.at[0]);
            }
            return from;
        }
    }

    // Weights have come.
    INLINE void wait() {
        cp_async_wait<C::PREFETCH>();
        __syncthreads();
    }
    INLINE void discard() {
        cp_async_wait<0>();
        __syncthreads();
    }

    // Planes of the queries, and codes and norms of the fresh keys.
    INLINE void make_planes(const Params& params, const Row& row, u32* planes) {
        if constexpr (FRESH > 0 && C::KEY_NORMS) measure_fresh(params, row);
        const Projection projection = of_queries(params, row);
        const bool writes = threadIdx.x % 32 == 0;
        NO_UNROLL for (int tile = threadIdx.x / 32; tile < C::BITS / 16; tile += C::THREADS / 32) {
            const Signs signs = projection.signs_of(queries, tile);
            const int count = count_of_queries(signs);
            write_planes(Planes::bits_of(count), count, writes,
                         reinterpret_cast<u16*>(planes) + tile);
            if constexpr (BESIDE)
                if (end > first)
                    write_codes<QUERY_TILES>(signs, tile, C::CODE_GROUP, end - first, codes);
        }
        __syncthreads();
        if constexpr (FRESH > 0 && !BESIDE) hash_fresh(params, row);
    }

    // Codes of fresh keys that do not stand beside the queries.
    INLINE void hash_fresh(const Params& params, const Row& row) {
        const int count = end - first;
        if (count == 0) return;
        const Projection projection = {
            reinterpret_cast<const u16*>(params.projection) + row.kv_head * params.projection_h,
            params.bias, params.bias_kind, row.kv_head * params.bias_h};
        if constexpr (!C::SAME_PROJECTION) {
            // In the place of those of the queries.
            projection.copy();
            discard();
        }
        NO_UNROLL for (int tile = threadIdx.x / 32; tile < C::BITS / 16; tile += C::THREADS / 32)
            write_codes<1>(projection.signs_of(keys, tile), tile, 0, count, codes);
        __syncthreads();
    }

    INLINE void measure_fresh(const Params& params, const Row& row) {
        if (threadIdx.x >= 32 || first == end) return;
        int i = threadIdx.x / 4;
        float squares = squares_of(fresh_key(params, row, i), i < end - first, threadIdx.x % 4);
        if (threadIdx.x % 4 == 0) norms[i] = norm_of(squares);
    }

    // The last token's blocks write codes and norms to memory.
    INLINE void store_fresh(const Params& params, const Row& row) const {
        if (row.token < params.tokens - 1) return;
        NO_UNROLL for (int i = threadIdx.x; i < (end - first) * CODE_WORDS; i += C::THREADS) {
            i64 position = first + i / CODE_WORDS;
            char* to = const_cast<char*>(params.codes) + row.batch * params.codes_b
                + row.kv_head * params.codes_h + position * params.codes_s + i % CODE_WORDS * 4;
            for (int b = 0; b < 4; ++b) to[b] = char(codes[i] >> (8 * b));
            if (C::KEY_NORMS && i % CODE_WORDS == 0)
                const_cast<u16*>(params.norms)[row.batch * params.norms_b + row.kv_head * params.norms_h
                                               + position * params.norms_s] = norms[i / CODE_WORDS];
        }
    }
};
