// Codes of a row's queries and fresh keys, made by the blocks that need them.
//
// A decode step then takes one launch: every block of a row hashes the row's queries for itself (a
// projection is small, and comes from the second-level cache), and the block whose part holds fresh
// keys hashes those beside them and writes their codes. The products are those of encode.cu, with the
// same dimensions in the same order, so the codes are the same.
//
// Bits are the rows of the products and vectors the columns; of a tile of 16 bits lane 4g + j loads
// bits 2g and 2g + 1 of the dimensions 8j..8j + 7 of each chunk.
//
// FUSED: codes are made here. FRESH: how many fresh keys there are. SAME: keys and queries have one
// projection.

// Fresh keys of a part: codes and norms, and where they stand.
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

// How many codes of a group have a bit set; they are `step` bytes apart.
INLINE int count_of(const u8* codes, i64 step, int bit) {
    int count = 0;
    if (bit < R)
        for (int i = 0; i < GROUP; ++i) count += codes[i * step + bit / 8] >> bit % 8 & 1;
    return count;
}

#if FUSED

#define WEIGHT_CHUNKS ((D + 31) / 32)
#define QUERY_TILES ((GROUP + 7) / 8)
// Whether fresh keys take columns that queries leave free, and so cost no products of their own.
#define BESIDE (FRESH > 0 && SAME && 8 * QUERY_TILES - GROUP >= FRESH)
// Whether a warp has one tile of bits at most, and so keeps its weights.
#define ONE_TILE (R / 16 <= THREADS / 32)

// Vectors as columns: lane 4g + j has a part of the g-th of each 8.
template <int TILES> struct Columns {
    uint4 at[TILES][WEIGHT_CHUNKS];
};

// What a warp begins with: weights of a tile of 16 bits, and the queries.
struct Weights {
    u32 at[WEIGHT_CHUNKS][8];
    Columns<QUERY_TILES> queries;
};

INLINE void load_tile(const char* projection, i64 head, i64 step, int tile, Weights& weights) {
    int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const data_t* at = reinterpret_cast<const data_t*>(projection) + head + 16 * tile + 2 * g;
#pragma unroll
    for (int u = 0; u < WEIGHT_CHUNKS; ++u)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int d = 32 * u + 8 * j + i;
            weights.at[u][i] = d < D ? *reinterpret_cast<const u32*>(at + d * step) : 0;
        }
}

INLINE void load_column(const data_t* x, bool inside, uint4 (&at)[WEIGHT_CHUNKS]) {
#pragma unroll
    for (int u = 0; u < WEIGHT_CHUNKS; ++u) {
        int d = 32 * u + 8 * (threadIdx.x % 4);
        at[u] = load_eight(x + d, inside && d < D);
    }
}

// On their way before anything else is known of a row.
INLINE void load_weights(const Params& p, const Row& row, Weights& weights) {
    if (threadIdx.x / 32 >= R / 16) return;
    load_tile(p.query_projection, row.kv_head * p.query_projection_h, p.query_projection_d,
              threadIdx.x / 32, weights);
    const data_t* q = reinterpret_cast<const data_t*>(p.q) + row.batch * p.q_b
        + i64(row.head) * GROUP * p.q_h + row.token * p.q_t;
    int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int t = 0; t < QUERY_TILES; ++t)
        load_column(q + (8 * t + g) * p.q_h, 8 * t + g < GROUP, weights.queries.at[t]);
}

INLINE const data_t* fresh_key(const Params& p, const Row& row, const Fresh& fresh, int i) {
    return reinterpret_cast<const data_t*>(p.keys) + row.batch * p.keys_b + row.kv_head * p.keys_h
        + i64(fresh.first + i) * p.keys_s;
}

// Codes of `count` columns, words of one after those of the one before. `weights` are those of the
// warp's first tile unless `load`.
template <int TILES>
INLINE void hash_columns(const Row& row, const Columns<TILES>& x, int count, Weights& weights,
                         bool load, const char* projection, i64 projection_h, i64 projection_d,
                         const char* bias, int bias_kind, i64 bias_h, u32* codes) {
    int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < R / 16; tile += THREADS / 32) {
        if (load || !ONE_TILE && tile >= THREADS / 32)
            load_tile(projection, row.kv_head * projection_h, projection_d, tile, weights);
        float sum[TILES][4] = {};
#pragma unroll
        for (int u = 0; u < WEIGHT_CHUNKS; ++u) {
            const u32(&w)[8] = weights.at[u];
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                uint4 v = x.at[t][u];
                mma(sum[t], low_halves(w[0], w[1]), high_halves(w[0], w[1]), low_halves(w[2], w[3]),
                    high_halves(w[2], w[3]), v.x, v.y, DATA);
                mma(sum[t], low_halves(w[4], w[5]), high_halves(w[4], w[5]), low_halves(w[6], w[7]),
                    high_halves(w[6], w[7]), v.z, v.w, DATA);
            }
        }
        float even = optional(bias, bias_kind, row.kv_head * bias_h + 16 * tile + 2 * g);
        float odd = optional(bias, bias_kind, row.kv_head * bias_h + 16 * tile + 2 * g + 1);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int column = 8 * t + 2 * j + i;
                u32 bits = u32(sum[t][i] + even > 0.f) << (2 * g)
                    | u32(sum[t][2 + i] + odd > 0.f) << (2 * g + 1);
                for (int mask = 4; mask < 32; mask *= 2) bits |= across(bits, mask);
                if (g == 0 && column < count)
                    reinterpret_cast<u16*>(codes + column * W)[tile] = u16(bits);
            }
    }
}

// Codes of the queries, and of what fresh keys stand beside them: of `count` columns.
INLINE void hash_queries(const Params& p, const Row& row, Weights& weights, int count, u32* codes) {
    hash_columns(row, weights.queries, count, weights, false, p.query_projection,
                 p.query_projection_h, p.query_projection_d, p.query_bias, p.query_bias_kind,
                 p.query_bias_h, codes);
    __syncthreads();
}

#if FRESH > 0

// Columns from `column` on become the block's fresh keys.
INLINE void load_fresh(const Params& p, const Row& row, const Fresh& fresh, int column,
                       uint4 (&at)[WEIGHT_CHUNKS]) {
    const int i = int(threadIdx.x % 32 / 4) - column;
    if (i >= 0 && i < fresh.end - fresh.first) load_column(fresh_key(p, row, fresh, i), true, at);
}

// Codes of fresh keys that do not stand beside the queries.
INLINE void hash_fresh(const Params& p, const Row& row, const Fresh& fresh, const Columns<1>& keys,
                       Weights& weights, u32* codes) {
    int count = fresh.end - fresh.first;
    if (count == 0) return;
    hash_columns(row, keys, count, weights, !SAME || !ONE_TILE, p.projection, p.projection_h,
                 p.projection_d, p.bias, p.bias_kind, p.bias_h, codes);
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

struct Weights {};
INLINE void load_weights(const Params& p, const Row& row, Weights& weights) {}

#endif
