// A warp's share of the attention: tiles of gathered keys, for all heads that share them.
//
// On the tensor cores keys are the rows and heads the 8 columns of two products, S' = K q' and
// out' = V' P', so a gathered row goes from memory straight into the operands, in 16-byte loads. With
// fp32 data a warp takes a key at a time, in IEEE products.
//
// Rows come through a ring of asynchronous copies of each warp (STAGES), or, where there is no room
// for one or they are no whole vectors, by plain loads.
//
// LISTED (positions lie in shared memory), G (heads that share keys), SOFTCAP (there is one), WARPS
// (that attend), HEADS and LANES (heads and value dimensions of a pass), STAGES (of 16 keys),
// KEPT_ROWS (where they lie in shared memory), NEAR (see `offset_of`), D, DV.

#define CHUNKS ((D + 31) / 32)
#define ROW_STRIDE (LANES + 4)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NOTHING (-__int_as_float(0x7f800000))

struct Share {
    int first, end;
    const int* list;
    const data_t *q, *keys, *values;
};

INLINE const data_t* queries_of(const Params& p, const Row& row) {
    return reinterpret_cast<const data_t*>(p.q) + row.batch * p.q_b + i64(row.head) * G * p.q_h
        + row.token * p.q_t;
}

INLINE int position_at(const Params& p, const Row& row, const Share& share, int rank) {
    if (rank >= share.end) return -1;
#if LISTED
    return row.everything ? row.start + rank : share.list[rank];
#else
    int position = row.everything ? row.start + rank : __ldcg(share.list + rank);
    return position < p.slots ? position : -1;
#endif
}

// Where the row of a key begins; of the first one, if there is no key. NEAR: rows are less than 2**31
// elements apart, and follow one another.
INLINE i64 offset_of(int position, i64 step) {
#if NEAR
    return i64(u64(u32(max(position, 0))) * u32(step));
#else
    return max(position, 0) * step;
#endif
}

// A logit in units of log 2.
INLINE float capped(const Params& p, float dot) {
    float logit = dot * p.scale;
    if (SOFTCAP) logit = p.softcap * tanhf(logit / p.softcap);
    return logit * LOG2E;
}

// All logits -inf so far: any finite reference gives weights of zero, not NaN.
INLINE float reference_of(float peak) { return peak == NOTHING ? 0.f : peak; }

#if DATA == 0

// Keys that a warp takes at once.
#define WARP_KEYS 1

struct Queries {};
INLINE void load_queries(const Params& p, const Row& row, int head, Queries& queries) {}
INLINE void keep_queries(const Queries& queries) {}

// The warp's share; lane i owns the value dimensions 4i..4i + 3 of the pass.
INLINE bool attend_warp(const Params& p, const Row& row, const Share& share, int head, int lane0,
                        float* partial, float* peaks) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float peak[HEADS], sum[HEADS], acc[HEADS][4];
    bool any = false;
    for (int h = 0; h < HEADS; ++h) {
        peak[h] = NOTHING, sum[h] = 0.f;
        for (int i = 0; i < 4; ++i) acc[h][i] = 0.f;
    }
#pragma unroll 1
    for (int rank = share.first + warp; rank < share.end; rank += WARPS) {
        i64 position = position_at(p, row, share, rank);
        if (position < 0) continue;
        any = true;
        int v = lane0 + 4 * lane;
        float4 value = load_four(share.values + position * p.values_s + v, 4 * lane < LANES && v < DV);
        float dot[HEADS] = {};
        for (int d = 4 * lane; d < D; d += 128) {
            float4 k = load_four(share.keys + position * p.keys_s + d, true);
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                float4 q = load_four(share.q + min(head + h, G - 1) * p.q_h + d, true);
                dot[h] += k.x * q.x + k.y * q.y + k.z * q.z + k.w * q.w;
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            for (int mask = 16; mask > 0; mask /= 2) dot[h] += across(dot[h], mask);
            float logit = capped(p, dot[h]), grown = fmaxf(peak[h], logit);
            float reference = reference_of(grown);
            float weight = exp2_fast(logit - reference), shrink = exp2_fast(peak[h] - reference);
            peak[h] = grown;
            sum[h] = sum[h] * shrink + weight;
            acc[h][0] = acc[h][0] * shrink + weight * value.x;
            acc[h][1] = acc[h][1] * shrink + weight * value.y;
            acc[h][2] = acc[h][2] * shrink + weight * value.z;
            acc[h][3] = acc[h][3] * shrink + weight * value.w;
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < 4; ++i)
            if (4 * lane < LANES) partial[h * ROW_STRIDE + 4 * lane + i] = acc[h][i];
        if (lane == 0) peaks[h] = peak[h], peaks[WARPS * HEADS + h] = sum[h];
    }
    return any;
}

#else

#if STAGES
#include "stage.cu"
#endif

#define WARP_KEYS 16
#define TILES ((HEADS + 7) / 8)
#define BLOCKS (LANES / 64)
// Chunks of keys that are loaded together.
#define STRETCH (CHUNKS < 4 ? CHUNKS : 4)

// Queries of a pass in the order in which lanes take them: [TILES][CHUNKS][32 lanes].
INLINE uint4* kept_queries() { return reinterpret_cast<uint4*>(memory + EXCHANGE); }

#define KEPT (TILES * CHUNKS * 32)

struct Queries {
    uint4 at[(KEPT + THREADS - 1) / THREADS];
};

// Queries of the heads from `head` on are loaded first and kept later.
INLINE void load_queries(const Params& p, const Row& row, int head, Queries& queries) {
    const data_t* q = queries_of(p, row);
#pragma unroll
    for (int n = 0; n < (KEPT + THREADS - 1) / THREADS; ++n) {
        int i = threadIdx.x + n * THREADS, lane = i % 32;
        int h = head + i / 32 / CHUNKS * 8 + lane / 4, d = i / 32 % CHUNKS * 32 + 8 * (lane % 4);
        queries.at[n] = load_eight(q + h * p.q_h + d, i < KEPT && h < G && d < D);
    }
}

INLINE void keep_queries(const Queries& queries) {
#pragma unroll
    for (int n = 0; n < (KEPT + THREADS - 1) / THREADS; ++n) {
        int i = threadIdx.x + n * THREADS;
        if (i < KEPT) kept_queries()[i] = queries.at[n];
    }
}

// The warp's share. Lane 4g + j has keys g and g + 8 of a tile, heads 2j and 2j + 1 of each 8, and
// the value dimensions 8g..8g + 7 of each 64.
INLINE bool attend_warp(const Params& p, const Row& row, const Share& share, int head, int lane0,
                        float* partial, float* peaks) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
    float peak[TILES][2], sum[TILES][2], acc[TILES][BLOCKS * 4][4] = {};
    bool any = false;
    for (int t = 0; t < TILES; ++t) {
        peak[t][0] = peak[t][1] = NOTHING;
        sum[t][0] = sum[t][1] = 0.f;
    }
    int rank = share.first + 16 * warp;
#if STAGES
    uint4* ring = reinterpret_cast<uint4*>(memory + KEPT_ROWS) + warp * STAGES * STAGE;
    // Tiles are copied STAGES - 1 rounds ahead; lanes i and i + 16 know the i-th key of the next one.
    int copied = 1 - STAGES, slot = 0, ahead = rank;
    int next = position_at(p, row, share, ahead + lane % 16);
#else
#if !LISTED
    int next[2] = {position_at(p, row, share, rank + g), position_at(p, row, share, rank + 8 + g)};
#endif
#endif
#pragma unroll 1
    while (rank < share.end) {
        float s[TILES][4] = {};
#if STAGES
        copy_rows(p, share, next, lane0, ring + slot * STAGE);
        slot = slot + 1 < STAGES ? slot + 1 : 0;
        ahead += 16 * WARPS;
        next = position_at(p, row, share, ahead + lane % 16);
        if (++copied <= 0) continue;
        const int at[2] = {position_at(p, row, share, rank + g),
                           position_at(p, row, share, rank + 8 + g)};
        any |= at[0] >= 0 || at[1] >= 0;
        wait_for_batches<STAGES - 1>();
        sync_warp();
        // The oldest one, which the next copy takes the place of.
        const uint4* stage = ring + slot * STAGE;
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            uint4 k[2] = {stage[key_place(g, 4 * u + j)], stage[key_place(g + 8, 4 * u + j)]};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                uint4 q = kept_queries()[(t * CHUNKS + u) * 32 + lane];
                mma(s[t], k[0].x, k[1].x, k[0].y, k[1].y, q.x, q.y, DATA);
                mma(s[t], k[0].z, k[1].z, k[0].w, k[1].w, q.z, q.w, DATA);
            }
        }
#else
#if LISTED
        const int at[2] = {position_at(p, row, share, rank + g),
                           position_at(p, row, share, rank + 8 + g)};
#else
        int at[2] = {next[0], next[1]};
        for (int i = 0; i < 2; ++i)
            next[i] = position_at(p, row, share, rank + 16 * WARPS + 8 * i + g);
#endif
        any |= at[0] >= 0 || at[1] >= 0;
        const data_t* keys[2] = {share.keys + offset_of(at[0], p.keys_s),
                                 share.keys + offset_of(at[1], p.keys_s)};
        uint4 k[2][STRETCH], v[4][BLOCKS];
#pragma unroll
        for (int u = 0; u < STRETCH; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                k[i][u] = load_eight(keys[i] + 32 * u + 8 * j, at[i] >= 0 && 32 * u + 8 * j < D);
        // Values of keys 2j, 2j + 1 and 8 more.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int position = from_lane(at[i / 2], 4 * (2 * j + i % 2));
            const data_t* values = share.values + offset_of(position, p.values_s);
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                int d = lane0 + 64 * b + 8 * g;
                v[i][b] = load_eight(values + d, position >= 0 && d < DV);
            }
        }
#pragma unroll
        for (int first = 0; first < CHUNKS; first += STRETCH) {
            if (first > 0)
#pragma unroll
                for (int u = 0; u < STRETCH; ++u)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        int d = 32 * (first + u) + 8 * j;
                        k[i][u] = load_eight(keys[i] + d, at[i] >= 0 && d < D);
                    }
#pragma unroll
            for (int u = 0; u < STRETCH; ++u)
                if (first + u < CHUNKS)
#pragma unroll
                    for (int t = 0; t < TILES; ++t) {
                        uint4 q = kept_queries()[(t * CHUNKS + first + u) * 32 + lane];
                        mma(s[t], k[0][u].x, k[1][u].x, k[0][u].y, k[1][u].y, q.x, q.y, DATA);
                        mma(s[t], k[0][u].z, k[1][u].z, k[0][u].w, k[1][u].w, q.z, q.w, DATA);
                    }
        }
#endif
        u32 weights[TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            float w[4], shrink[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float upper = at[0] >= 0 ? capped(p, s[t][i]) : NOTHING;
                float lower = at[1] >= 0 ? capped(p, s[t][2 + i]) : NOTHING;
                float grown = fmaxf(peak[t][i], fmaxf(upper, lower));
                for (int mask = 4; mask < 32; mask *= 2) grown = fmaxf(grown, across(grown, mask));
                float reference = reference_of(grown);
                w[i] = exp2_fast(upper - reference), w[2 + i] = exp2_fast(lower - reference);
                shrink[i] = exp2_fast(peak[t][i] - reference);
                peak[t][i] = grown;
                sum[t][i] = sum[t][i] * shrink[i] + w[i] + w[2 + i];
            }
#pragma unroll
            for (int m = 0; m < BLOCKS * 4; ++m)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[t][m][c] *= shrink[c % 2];
            weights[t][0] = transpose(narrow_pair(w[0], w[1], DATA));
            weights[t][1] = transpose(narrow_pair(w[2], w[3], DATA));
        }
#if STAGES
        uint4 v[4][BLOCKS];
        // Values of keys 2j, 2j + 1 and 8 more.
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
                v[i][b] = stage[value_place(i / 2 * 8 + 2 * j + i % 2, 8 * b + g)];
#endif
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                u32 v0 = word_of(v[0][b], m), v1 = word_of(v[1][b], m);
                u32 v2 = word_of(v[2][b], m), v3 = word_of(v[3][b], m);
#pragma unroll
                for (int t = 0; t < TILES; ++t)
                    mma(acc[t][4 * b + m], low_halves(v0, v1), high_halves(v0, v1),
                        low_halves(v2, v3), high_halves(v2, v3), weights[t][0], weights[t][1], DATA);
            }
#if STAGES
        sync_warp();
#endif
        rank += 16 * WARPS;
    }
#if STAGES
    wait_for_batches<0>();
#endif
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float all = sum[t][i];
            for (int mask = 4; mask < 32; mask *= 2) all += across(all, mask);
            int h = 8 * t + 2 * j + i;
            if (h >= HEADS) continue;
            if (g == 0) peaks[h] = peak[t][i], peaks[WARPS * HEADS + h] = all;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                float4* to = reinterpret_cast<float4*>(partial + h * ROW_STRIDE + 64 * b + 8 * g);
                float(*a)[4] = acc[t] + 4 * b;
                to[0] = make_float4(a[0][i], a[0][2 + i], a[1][i], a[1][2 + i]);
                to[1] = make_float4(a[2][i], a[2][2 + i], a[3][i], a[3][2 + i]);
            }
        }
    return any;
}

#endif
