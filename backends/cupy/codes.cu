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
// FUSED: codes are made here. FRESH:
// how many fresh keys there are. SAME: keys and queries have one projection.

#define COLUMNS (GROUP + FRESH)
#define COLUMN_TILES ((COLUMNS + 7) / 8)

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

#if FUSED

#define WEIGHT_CHUNKS ((D + 31) / 32)

// Of a tile of 16 bits: the lane's pairs of bits for the dimensions of each chunk.
struct Weights {
    u32 at[WEIGHT_CHUNKS][8];
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

// The first weights are on their way before anything else is known of a row.
INLINE void load_weights(const Params& p, const Row& row, Weights& weights) {
    if (threadIdx.x / 32 < R / 16)
        load_tile(p.query_projection, row.kv_head * p.query_projection_h, p.query_projection_d,
                  threadIdx.x / 32, weights);
}

INLINE const data_t* column_at(const Params& p, const Row& row, const Fresh& fresh, int column) {
    if (column < GROUP)
        return reinterpret_cast<const data_t*>(p.q) + row.batch * p.q_b
            + (i64(row.head) * GROUP + column) * p.q_h + row.token * p.q_t;
    i64 position = fresh.first + column - GROUP;
    return column < COLUMNS && position < fresh.end
        ? reinterpret_cast<const data_t*>(p.keys) + row.batch * p.keys_b + row.kv_head * p.keys_h
            + position * p.keys_s
        : nullptr;
}

// Codes of the columns [first, end) into `codes`, words of a column after those of the one before;
// `weights` are those of the warp's first tile.
INLINE void hash_columns(const Params& p, const Row& row, const Fresh& fresh, int first, int end,
                         Weights& weights, const char* projection, i64 projection_h,
                         i64 projection_d, const char* bias, int bias_kind, i64 bias_h,
                         u32* codes) {
    int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const data_t* x[COLUMN_TILES];
    for (int t = 0; t < COLUMN_TILES; ++t) {
        int column = 8 * t + g;
        x[t] = column >= first && column < end ? column_at(p, row, fresh, column) : nullptr;
    }
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < R / 16; tile += THREADS / 32) {
        if (tile >= THREADS / 32)
            load_tile(projection, row.kv_head * projection_h, projection_d, tile, weights);
        float sum[COLUMN_TILES][4] = {};
#pragma unroll
        for (int u = 0; u < WEIGHT_CHUNKS; ++u) {
            u32(&w)[8] = weights.at[u];
#pragma unroll
            for (int t = 0; t < COLUMN_TILES; ++t) {
                int d = 32 * u + 8 * j;
                uint4 v = load_eight(x[t] + d, x[t] != nullptr && d < D);
                mma(sum[t], low_halves(w[0], w[1]), high_halves(w[0], w[1]), low_halves(w[2], w[3]),
                    high_halves(w[2], w[3]), v.x, v.y, DATA);
                mma(sum[t], low_halves(w[4], w[5]), high_halves(w[4], w[5]), low_halves(w[6], w[7]),
                    high_halves(w[6], w[7]), v.z, v.w, DATA);
            }
        }
        float even = optional(bias, bias_kind, row.kv_head * bias_h + 16 * tile + 2 * g);
        float odd = optional(bias, bias_kind, row.kv_head * bias_h + 16 * tile + 2 * g + 1);
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int column = 8 * t + 2 * j + i;
                u32 bits = u32(sum[t][i] + even > 0.f) << (2 * g)
                    | u32(sum[t][2 + i] + odd > 0.f) << (2 * g + 1);
                for (int mask = 4; mask < 32; mask *= 2) bits |= across(bits, mask);
                if (g == 0 && column >= first && column < end)
                    reinterpret_cast<u16*>(codes + column * W)[tile] = u16(bits);
            }
    }
}

// Codes [COLUMNS][W] of the queries, then of the block's fresh keys, whose norms go to `norms`. The
// codes and norms of fresh keys are written to memory too, by the last token's blocks.
INLINE void make_codes(const Params& p, const Row& row, const Fresh& fresh, Weights& weights,
                       u32* codes, u16* norms) {
    hash_columns(p, row, fresh, 0, SAME ? COLUMNS : GROUP, weights, p.query_projection,
                 p.query_projection_h, p.query_projection_d, p.query_bias, p.query_bias_kind,
                 p.query_bias_h, codes);
    if (!SAME && FRESH > 0) {
        load_tile(p.projection, row.kv_head * p.projection_h, p.projection_d,
                  min(int(threadIdx.x / 32), R / 16 - 1), weights);
        hash_columns(p, row, fresh, GROUP, COLUMNS, weights, p.projection, p.projection_h,
                     p.projection_d, p.bias, p.bias_kind, p.bias_h, codes);
    }
#if FRESH > 0 && NORMS
    if (threadIdx.x < 32) {
        int column = GROUP + threadIdx.x / 4;
        const data_t* x = column_at(p, row, fresh, column);
        float squares = squares_of(x, x != nullptr, threadIdx.x % 4);
        if (threadIdx.x % 4 == 0) norms[threadIdx.x / 4] = norm_of(squares);
    }
#endif
    __syncthreads();
    if (FRESH > 0 && row.token == p.tokens - 1)
#pragma unroll 1
        for (int i = threadIdx.x; i < (fresh.end - fresh.first) * W; i += THREADS) {
            i64 position = fresh.first + i / W;
            u32 word = codes[GROUP * W + i];
            char* to = const_cast<char*>(p.codes) + row.batch * p.codes_b + row.kv_head * p.codes_h
                + position * p.codes_s + i % W * 4;
            for (int b = 0; b < 4; ++b) to[b] = char(word >> (8 * b));
#if NORMS
            if (i % W == 0)
                const_cast<u16*>(p.norms)[row.batch * p.norms_b + row.kv_head * p.norms_h
                                          + position * p.norms_s] = norms[i / W];
#endif
        }
}

#else

struct Weights {};
INLINE void load_weights(const Params& p, const Row& row, Weights& weights) {}

#endif
