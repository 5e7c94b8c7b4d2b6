// Codes of a row's queries and fresh keys, made by the blocks that need them.
//
// A decode step then takes one launch: every block of a row hashes the row's queries for itself (a
// projection is small, and comes from the second-level cache), and the block whose part holds fresh
// keys hashes those beside them and writes their codes. The products are those of encode.cu, with the
// same dimensions in the same order, so the codes are the same; those of queries become planes at once.
//
// Bits are the rows of the products and vectors the columns. Weights come through shared memory, where
// the keys to select by will be.
//
// FUSED: codes are made here. FRESH: how many fresh keys there are. SAME: keys and queries have one
// projection.

// Fresh keys of a part.
struct Fresh {
    // Positions [first, end) in this block's care; of the row, the fresh ones begin at `from`.
    int from, first, end;
};

INLINE Fresh find_fresh(const Params& p, const Row& row, int low, int high) {
    Fresh fresh;
    int last = row.stop + (p.tokens - 1 - row.token);
    fresh.from = max(min(last, p.slots) - FRESH, row.start);
    // A row that is not scanned leaves all of them to its first block.
    if (row.everything) low = row.part == 0 ? row.start : row.stop, high = row.stop;
    fresh.first = min(max(fresh.from, low), high);
    fresh.end = max(high, fresh.first);
    return fresh;
}

#if FUSED

#define WEIGHT_CHUNKS ((D + 31) / 32)
#define QUERY_TILES ((GROUP + 7) / 8)
// Vectors of 16 bytes, so of weights of 8 bits, in a row.
#define BIT_VECTORS (R / 8)
// Whether fresh keys take columns that queries leave free, and so cost no products of their own.
#define BESIDE (FRESH > 0 && SAME && 8 * QUERY_TILES - GROUP >= FRESH)

// Vectors as columns: lane 4g + j has a part of the g-th of each 8.
template <int TILES> struct Columns {
    uint4 at[TILES][WEIGHT_CHUNKS];
};

// What a warp begins with.
struct Hashing {
    Columns<QUERY_TILES> queries;
};

// Weights and biases of a head.
struct Projection {
    const data_t* weights;
    const char* bias;
    int bias_kind;
    i64 bias_at;
};

INLINE Projection of_queries(const Params& p, const Row& row) {
    return {reinterpret_cast<const data_t*>(p.query_projection) + row.kv_head * p.query_projection_h,
            p.query_bias, p.query_bias_kind, row.kv_head * p.query_bias_h};
}

// Where a dimension's weights of 8 bits lie, so that the 8 rows of a matrix (see `signs_of`) meet all banks.
INLINE uint4* place_of_weights(u32 d, u32 eight) {
    uint4* weights = reinterpret_cast<uint4*>(memory + EXCHANGE + QUERIES + COUNTERS + RING);
    return weights + d * BIT_VECTORS + (eight ^ (BIT_VECTORS % 8 ? d / 8 % 4 : d / 8 % 4 * 2 + d % 2));
}

// Start the copies of a head's weights, a row for every dimension; beyond the last there are zeros.
INLINE void copy_weights(const Projection& projection) {
    constexpr u32 THERE = D * BIT_VECTORS, ALL = 32 * WEIGHT_CHUNKS * BIT_VECTORS;
#pragma unroll 8
    for (u32 n = 0; n < (ALL + THREADS - 1) / THREADS; ++n) {
        const u32 i = n * THREADS + threadIdx.x;
        if (ALL % THREADS && i >= ALL) continue;
        uint4* to = place_of_weights(i / BIT_VECTORS, i % BIT_VECTORS);
        if (ALL == THERE) copy_ahead(to, projection.weights + 8 * i);
        else copy_ahead(to, projection.weights + 8 * min(i, THERE - 1), i < THERE);
    }
    end_batch();
}

INLINE void load_column(const data_t* x, bool inside, uint4 (&at)[WEIGHT_CHUNKS]) {
#pragma unroll
    for (int u = 0; u < WEIGHT_CHUNKS; ++u) {
        int d = 32 * u + 8 * (threadIdx.x % 4);
        at[u] = load_eight(x + d, inside && d < D);
    }
}

// On their way before a row's length has come.
INLINE void begin_hashing(const Params& p, const Row& row, Hashing& hashing) {
    copy_weights(of_queries(p, row));
    if (threadIdx.x / 32 >= R / 16) return;
    const data_t* q = reinterpret_cast<const data_t*>(p.q) + row.batch * p.q_b
        + i64(row.head) * GROUP * p.q_h + row.token * p.q_t;
    int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int t = 0; t < QUERY_TILES; ++t)
        load_column(q + (8 * t + g) * p.q_h, 8 * t + g < GROUP, hashing.queries.at[t]);
}

// Bits of a tile. Lane 4g + j has those of the columns 8t + 2j + i, as bits 2t + i: in `low` bit g of
// the tile, in `high` bit g + 8.
struct Signs {
    u32 low, high;
};

template <int TILES>
INLINE Signs signs_of(const Columns<TILES>& x, const Projection& projection, int tile) {
    float sum[TILES][4] = {};
    // Of a chunk, lane 4g + j has the dimensions 8j..8j + 7 of a column, half of them in each product:
    // rows 2j and 2j + 1 of a matrix of weights are the first or the second two of a half.
    const int lane = threadIdx.x % 32, d = lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2;
#pragma unroll
    for (int u = 0; u < WEIGHT_CHUNKS; ++u)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 w[4];
            load_transposed(w, place_of_weights(32 * u + d + 4 * half, 2 * tile + lane / 8 % 2));
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint4 v = x.at[t][u];
                mma(sum[t], w[0], w[1], w[2], w[3], half ? v.z : v.x, half ? v.w : v.y, DATA);
            }
        }
    const i64 bit = projection.bias_at + 16 * tile + threadIdx.x % 32 / 4;
    const float low = optional(projection.bias, projection.bias_kind, bit);
    const float high = optional(projection.bias, projection.bias_kind, bit + 8);
    Signs signs = {};
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            signs.low |= u32(sum[t][i] + low > 0.f) << (2 * t + i);
            signs.high |= u32(sum[t][2 + i] + high > 0.f) << (2 * t + i);
        }
    return signs;
}

// How many queries set a bit of a tile: in lane i, bit i % 16.
INLINE int count_of_queries(const Signs& signs) {
    const int lane = threadIdx.x % 32;
    u32 queries = 0;
#pragma unroll
    for (int t = 0; t < QUERY_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            queries |= u32(8 * t + lane % 4 * 2 + i < GROUP) << (2 * t + i);
    u32 both = __popc(signs.low & queries) | __popc(signs.high & queries) << 16;
    both += across(both, 1);
    both += across(both, 2);
    return int(from_lane(both, lane % 8 * 4) >> lane % 16 / 8 * 16 & 0xffff);
}

// Codes of the columns from `first` on, `count` of them, words of one after those of the one before.
template <int TILES>
INLINE void put_codes(const Signs& signs, int tile, int first, int count, u32* codes) {
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int shift = 2 * t + i, column = 8 * t + 2 * j + i - first;
            u32 bits = (signs.low >> shift & 1) << g | (signs.high >> shift & 1) << (g + 8);
            for (int mask = 4; mask < 32; mask *= 2) bits |= across(bits, mask);
            if (g == 0 && column >= 0 && column < count)
                reinterpret_cast<u16*>(codes + column * W)[tile] = u16(bits);
        }
}

// Planes of the queries, and codes of `beside` fresh keys that stand beside them.
INLINE void hash_queries(const Params& p, const Row& row, const Hashing& hashing, int beside,
                         u32* planes, u32* codes) {
    const Projection projection = of_queries(p, row);
    const bool writes = threadIdx.x % 32 == 0;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < R / 16; tile += THREADS / 32) {
        const Signs signs = signs_of(hashing.queries, projection, tile);
        const int count = count_of_queries(signs);
        const u32 bits = plane_bits(count);
        // A tile is half a word.
        u16* to = reinterpret_cast<u16*>(planes) + tile;
        for (int plane = 0; plane < PLANE_COUNT; ++plane) {
            u32 word = ballot(bits >> plane & 1);
            if (writes) to[plane * 2 * W] = u16(word);
        }
#if BINARY
        // Two lanes have every bit.
        const u32 sum = sum_of_warp(u32(count)) / 2;
        if (writes) to[BITS * 2 * W] = u16(sum);
#endif
        if (beside > 0) put_codes<QUERY_TILES>(signs, tile, GROUP, beside, codes);
    }
    __syncthreads();
}

#if FRESH > 0

INLINE const data_t* fresh_key(const Params& p, const Row& row, const Fresh& fresh, int i) {
    return reinterpret_cast<const data_t*>(p.keys) + row.batch * p.keys_b + row.kv_head * p.keys_h
        + i64(fresh.first + i) * p.keys_s;
}

// Columns from `column` on become the block's fresh keys.
INLINE void load_fresh(const Params& p, const Row& row, const Fresh& fresh, int column,
                       uint4 (&at)[WEIGHT_CHUNKS]) {
    const int i = int(threadIdx.x % 32 / 4) - column;
    if (i >= 0 && i < fresh.end - fresh.first) load_column(fresh_key(p, row, fresh, i), true, at);
}

// Codes of fresh keys that do not stand beside the queries.
INLINE void hash_fresh(const Params& p, const Row& row, const Fresh& fresh, const Columns<1>& keys,
                       u32* codes) {
    const int count = fresh.end - fresh.first;
    if (count == 0) return;
    const Projection projection = {
        reinterpret_cast<const data_t*>(p.projection) + row.kv_head * p.projection_h, p.bias,
        p.bias_kind, row.kv_head * p.bias_h};
    if (!SAME) {
        // In the place of those of the queries.
        copy_weights(projection);
        wait_for_batches<0>();
        __syncthreads();
    }
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < R / 16; tile += THREADS / 32)
        put_codes<1>(signs_of(keys, projection, tile), tile, 0, count, codes);
    __syncthreads();
}

INLINE void measure_fresh(const Params& p, const Row& row, const Fresh& fresh, u16* norms) {
    if (threadIdx.x >= 32 || fresh.first == fresh.end) return;
    int i = threadIdx.x / 4;
    float squares =
        squares_of(fresh_key(p, row, fresh, i), i < fresh.end - fresh.first, threadIdx.x % 4);
    if (threadIdx.x % 4 == 0) norms[i] = norm_of(squares);
}

// The last token's blocks write codes and norms to memory.
INLINE void store_fresh(const Params& p, const Row& row, const Fresh& fresh, const u32* codes,
                        const u16* norms) {
    if (row.token < p.tokens - 1) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < (fresh.end - fresh.first) * W; i += THREADS) {
        i64 position = fresh.first + i / W;
        char* to = const_cast<char*>(p.codes) + row.batch * p.codes_b + row.kv_head * p.codes_h
            + position * p.codes_s + i % W * 4;
        for (int b = 0; b < 4; ++b) to[b] = char(codes[i] >> (8 * b));
#if NORMS
        if (i % W == 0)
            const_cast<u16*>(p.norms)[row.batch * p.norms_b + row.kv_head * p.norms_h
                                      + position * p.norms_s] = norms[i / W];
#endif
    }
}

#endif

#else

// How many codes of a group have a bit set; they are `step` bytes apart.
INLINE int count_of(const u8* codes, i64 step, int bit) {
    int count = 0;
    if (bit < R)
        for (int i = 0; i < GROUP; ++i) count += codes[i * step + bit / 8] >> bit % 8 & 1;
    return count;
}

// How many queries set the thread's bit.
struct Hashing {
    int count;
};

INLINE const u8* codes_of_queries(const Params& p, const Row& row) {
    return reinterpret_cast<const u8*>(p.q_codes) + row.batch * p.q_codes_b
        + i64(row.head) * GROUP * p.q_codes_h + row.token * p.q_codes_t;
}

// Before a row's length has come, and codes are on their way, which are many.
INLINE void begin_hashing(const Params& p, const Row& row, Hashing& hashing) {
    hashing.count = count_of(codes_of_queries(p, row), p.q_codes_h, threadIdx.x);
}

// Planes of the queries in shared memory.
INLINE void make_planes(const Params& p, const Row& row, const Hashing& hashing, u32* planes) {
#pragma unroll 1
    for (int bit = threadIdx.x; bit < (R + THREADS - 1) / THREADS * THREADS; bit += THREADS) {
        const int count =
            bit < THREADS ? hashing.count : count_of(codes_of_queries(p, row), p.q_codes_h, bit);
        const u32 bits = plane_bits(count);
        const bool writes = bit < R && bit % 32 == 0;
        for (int plane = 0; plane < PLANE_COUNT; ++plane) {
            u32 word = ballot(bits >> plane & 1);
            if (writes) planes[plane * W + bit / 32] = word;
        }
#if BINARY
        const u32 sum = sum_of_warp(u32(count));
        if (writes) planes[BITS * W + bit / 32] = sum;
#endif
    }
    __syncthreads();
}

#endif
