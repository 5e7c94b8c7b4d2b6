// A warp's part of the attention: tiles of gathered keys, for all heads that share them.
//
// On the tensor cores keys are the rows and heads the columns, S' = K q' and out' = V' P', so a gathered
// row goes straight into the operands, in 16-byte loads. Rows come through STAGES of asynchronous copies
// of each warp or, where they have no room or are no whole vectors, by plain loads. With fp32 data a warp
// takes a key at a time, in IEEE products.
#pragma once

#include "row.cuh"
#include "vectors.cuh"

constexpr bool STAGED = C::STAGES > 0;
// Keys that a warp takes at once.
constexpr int WARP_KEYS = C::DTYPE == FP32 ? 1 : 16;
// Tiles of 8 heads, and blocks of 64 value dimensions.
constexpr int TILES = (C::PASS_HEADS + 7) / 8, BLOCKS = C::PASS_DIM / 64;
// Chunks of keys that are loaded together.
constexpr int CHUNKS_AT_ONCE = CHUNKS < 4 ? CHUNKS : 4;
// Floats between heads of a warp's output.
constexpr int ACC_STRIDE = C::PASS_DIM + 4;

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
#define NEG_INF (-__int_as_float(0x7f800000))

// What a block gathers: ranks [first, end), where their positions are, and the arrays.
struct Gather {
    int first, end;
    const int* positions;
    const data_t *q, *keys, *values;
};

INLINE const data_t* queries_of(const Params& params, const Row& row) {
    return reinterpret_cast<const data_t*>(params.q) + row.batch * params.q_b
        + i64(row.head) * C::GROUP * params.q_h + row.token * params.q_t;
}

INLINE const data_t* keys_of(const Params& params, const Row& row) {
    return reinterpret_cast<const data_t*>(params.keys) + row.batch * params.keys_b
        + row.kv_head * params.keys_h;
}

INLINE const data_t* values_of(const Params& params, const Row& row) {
    return reinterpret_cast<const data_t*>(params.values) + row.batch * params.values_b
        + row.kv_head * params.values_h;
}

INLINE int position_at(const Params& params, const Row& row, const Gather& gather, int rank) {
    if (rank >= gather.end) return -1;
    if constexpr (C::POSITIONS_AT) return row.dense ? row.start + rank : gather.positions[rank];
    int position = row.dense ? row.start + rank : __ldcg(gather.positions + rank);
    return position < params.slots ? position : -1;
}

// Where the row of a key begins; of the first one, if there is no key.
INLINE i64 offset_of(int position, i64 step) {
    if constexpr (C::OFFSETS_32BIT) return i64(u64(u32(max(position, 0))) * u32(step));
    return max(position, 0) * step;
}

// A logit in units of log 2.
INLINE float logit_of(const Params& params, float dot) {
    float logit = dot * params.scale;
    if (C::SOFTCAP) logit = params.softcap * tanhf(logit / params.softcap);
    return logit * LOG2E;
}

// All logits -inf so far: any finite reference gives weights of zero, not NaN.
INLINE float reference_of(float m) { return m == NEG_INF ? 0.f : m; }

// Queries of a pass in the order in which lanes take them, [TILES, CHUNKS, 32 lanes].
INLINE uint4* smem_queries() { return reinterpret_cast<uint4*>(smem + C::EXCHANGE_BYTES); }

constexpr int QUERY_VECTORS = C::DTYPE == FP32 ? 0 : TILES * CHUNKS * 32;
constexpr int THREAD_QUERIES = (QUERY_VECTORS + C::THREADS - 1) / C::THREADS;

// Queries of the heads from `head` on are loaded first and written to shared memory later.
struct Queries {
    uint4 at[THREAD_QUERIES > 0 ? THREAD_QUERIES : 1];

    INLINE void load(const Params& params, const Row& row, int head) {
        const u16* q = reinterpret_cast<const u16*>(queries_of(params, row));
        UNROLL for (int n = 0; n < THREAD_QUERIES; ++n) {
            int i = threadIdx.x + n * C::THREADS, lane = i % 32;
            int h = head + i / 32 / CHUNKS * 8 + lane / 4, d = i / 32 % CHUNKS * 32 + 8 * (lane % 4);
            at[n] = load_eight(q + h * params.q_h + d,
                               i < QUERY_VECTORS && h < C::GROUP && d < C::HEAD_DIM);
        }
    }

    INLINE void write() const {
        UNROLL for (int n = 0; n < THREAD_QUERIES; ++n) {
            int i = threadIdx.x + n * C::THREADS;
            if (i < QUERY_VECTORS) smem_queries()[i] = at[n];
        }
    }
};

// Vectors of a stage: [16, 4 CHUNKS] of keys, and [16, PASS_DIM / 8] of values.
constexpr int STAGE_VECTORS = 16 * (4 * CHUNKS + C::PASS_DIM / 8);

// Values follow keys.
INLINE int value_place(int key, int eight) {
    return 64 * CHUNKS + key * (C::PASS_DIM / 8) + (eight ^ (key / 2 & 3) << 1);
}

// Start the copies of 16 rows of EIGHTS vectors, of which those that begin below `size` exist. Lane i
// knows the position of the i-th row; rows are `step` vectors apart.
template <int EIGHTS, int (*PLACE)(int, int)>
INLINE void copy_rows(const u16* rows, u32 step, int positions, int size, uint4* stage) {
    const int lane = threadIdx.x % 32;
    // Where 8 keys more change nothing but the row, a lane's places are constants from these.
    constexpr int ROWS = 32 / EIGHTS, PERIOD = ROWS > 0 ? (8 + ROWS - 1) / ROWS : 1;
    uint4* places[PERIOD];
    UNROLL for (int c = 0; c < PERIOD; ++c)
        places[c] = stage + PLACE(c * ROWS + lane / EIGHTS, lane % EIGHTS) - c * 32;
    UNROLL for (int n = 0; n < EIGHTS / 2; ++n) {
        const int index = lane + 32 * n;
        const bool whole = 32 % EIGHTS == 0;
        const int key = whole ? n * ROWS + lane / EIGHTS : index / EIGHTS;
        const int eight = whole ? lane % EIGHTS : index % EIGHTS;
        const int position = shfl(positions, key), offset = 8 * eight < size ? 8 * eight : 0;
        const uint4* row = reinterpret_cast<const uint4*>(rows + offset) + u32(max(position, 0)) * step;
        cp_async(whole ? places[n % PERIOD] + 32 * n : stage + PLACE(key, eight), row,
                 position >= 0 && 8 * eight < size);
    }
}

// The warp's part in fp32; lane i owns value dimensions 4i..4i + 3 of the pass. A head's output goes to
// `out`, its maximum to `stats` and its sum to the second half of all warps' stats.
INLINE bool attend_warp_fp32(const Params& params, const Row& row, const Gather& gather, int head,
                             int dim0, float* out, float* stats) {
    const float* q = reinterpret_cast<const float*>(gather.q);
    const float* keys = reinterpret_cast<const float*>(gather.keys);
    const float* values = reinterpret_cast<const float*>(gather.values);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float m_i[C::PASS_HEADS], l_i[C::PASS_HEADS], acc[C::PASS_HEADS][4];
    bool any = false;
    for (int h = 0; h < C::PASS_HEADS; ++h) {
        m_i[h] = NEG_INF, l_i[h] = 0.f;
        for (int i = 0; i < 4; ++i) acc[h][i] = 0.f;
    }
    NO_UNROLL for (int rank = gather.first + warp; rank < gather.end; rank += C::ATTEND_WARPS) {
        i64 position = position_at(params, row, gather, rank);
        if (position < 0) continue;
        any = true;
        int d = dim0 + 4 * lane;
        float4 v = load_four(values + position * params.values_s + d,
                             4 * lane < C::PASS_DIM && d < C::VALUE_DIM);
        float dot[C::PASS_HEADS] = {};
        for (int d = 4 * lane; d < C::HEAD_DIM; d += 128) {
            float4 k = load_four(keys + position * params.keys_s + d, true);
            UNROLL for (int h = 0; h < C::PASS_HEADS; ++h) {
                float4 x = load_four(q + min(head + h, C::GROUP - 1) * params.q_h + d, true);
                dot[h] += k.x * x.x + k.y * x.y + k.z * x.z + k.w * x.w;
            }
        }
        UNROLL for (int h = 0; h < C::PASS_HEADS; ++h) {
            for (int mask = 16; mask > 0; mask /= 2) dot[h] += shfl_xor(dot[h], mask);
            float logit = logit_of(params, dot[h]), m = fmaxf(m_i[h], logit);
            float reference = reference_of(m);
            float p = ex2_approx(logit - reference), alpha = ex2_approx(m_i[h] - reference);
            m_i[h] = m;
            l_i[h] = l_i[h] * alpha + p;
            acc[h][0] = acc[h][0] * alpha + p * v.x;
            acc[h][1] = acc[h][1] * alpha + p * v.y;
            acc[h][2] = acc[h][2] * alpha + p * v.z;
            acc[h][3] = acc[h][3] * alpha + p * v.w;
        }
    }
    for (int h = 0; h < C::PASS_HEADS; ++h) {
        for (int i = 0; i < 4; ++i)
            if (4 * lane < C::PASS_DIM) out[h * ACC_STRIDE + 4 * lane + i] = acc[h][i];
        if (lane == 0) stats[h] = m_i[h], stats[C::ATTEND_WARPS * C::PASS_HEADS + h] = l_i[h];
    }
    return any;
}

// The warp's part on tensor cores. Lane 4g + j has keys g and g + 8 of a tile, heads 2j and 2j + 1 of
// each 8, and value dimensions 8g..8g + 7 of each 64.
INLINE bool attend_warp_mma(const Params& params, const Row& row, const Gather& gather, int head,
                            int dim0, float* out, float* stats) {
    const u16* keys = reinterpret_cast<const u16*>(gather.keys);
    const u16* values = reinterpret_cast<const u16*>(gather.values);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
    float m_i[TILES][2], l_i[TILES][2], acc[TILES][BLOCKS * 4][4] = {};
    bool any = false;
    for (int t = 0; t < TILES; ++t) {
        m_i[t][0] = m_i[t][1] = NEG_INF;
        l_i[t][0] = l_i[t][1] = 0.f;
    }
    int rank = gather.first + 16 * warp;
    auto position = [&](int rank) { return position_at(params, row, gather, rank); };
    // STAGED: tiles are copied STAGES - 1 rounds ahead; lanes i and i + 16 know the i-th key of the next.
    uint4* stages = reinterpret_cast<uint4*>(smem + C::STAGES_AT) + warp * C::STAGES * STAGE_VECTORS;
    int copied = 1 - C::STAGES, slot = 0, ahead = rank, next[2];
    if constexpr (STAGED) next[0] = position(ahead + lane % 16);
    else if constexpr (!C::POSITIONS_AT) next[0] = position(rank + g), next[1] = position(rank + 8 + g);
    NO_UNROLL while (rank < gather.end) {
        float s[TILES][4] = {};
        if constexpr (STAGED) {
            uint4* stage = stages + slot * STAGE_VECTORS;
            copy_rows<4 * CHUNKS, stage_place>(keys, u32(params.keys_s) / 8, next[0], C::HEAD_DIM, stage);
            copy_rows<C::PASS_DIM / 8, value_place>(values + dim0, u32(params.values_s) / 8, next[0],
                                                    C::VALUE_DIM - dim0, stage);
            cp_async_commit();
            slot = slot + 1 < C::STAGES ? slot + 1 : 0;
            ahead += 16 * C::ATTEND_WARPS;
            next[0] = position(ahead + lane % 16);
            if (++copied <= 0) continue;
        }
        int at[2];
        if constexpr (STAGED || C::POSITIONS_AT) {
            at[0] = position(rank + g), at[1] = position(rank + 8 + g);
        } else {
            at[0] = next[0], at[1] = next[1];
            for (int i = 0; i < 2; ++i) next[i] = position(rank + 16 * C::ATTEND_WARPS + 8 * i + g);
        }
        any |= at[0] >= 0 || at[1] >= 0;
        // S' = K q' of a chunk.
        auto add_scores = [&](int chunk, uint4 k0, uint4 k1) {
            UNROLL for (int t = 0; t < TILES; ++t) {
                uint4 q = smem_queries()[(t * CHUNKS + chunk) * 32 + lane];
                mma_m16n8k16(s[t], k0.x, k1.x, k0.y, k1.y, q.x, q.y, C::DTYPE);
                mma_m16n8k16(s[t], k0.z, k1.z, k0.w, k1.w, q.z, q.w, C::DTYPE);
            }
        };
        // The oldest stage, which the next copy takes the place of.
        const uint4* stage;
        // Values of keys 2j, 2j + 1 and 8 more.
        uint4 v[4][BLOCKS];
        if constexpr (STAGED) {
            cp_async_wait<C::STAGES - 1>();
            syncwarp();
            stage = stages + slot * STAGE_VECTORS;
            UNROLL for (int u = 0; u < CHUNKS; ++u)
                add_scores(u, stage[stage_place(g, 4 * u + j)], stage[stage_place(g + 8, 4 * u + j)]);
        } else {
            const u16* rows[2] = {keys + offset_of(at[0], params.keys_s),
                                  keys + offset_of(at[1], params.keys_s)};
            uint4 k[2][CHUNKS_AT_ONCE];
            auto load_keys = [&](int first) {
                UNROLL for (int u = 0; u < CHUNKS_AT_ONCE; ++u)
                    UNROLL for (int i = 0; i < 2; ++i) {
                        int d = 32 * (first + u) + 8 * j;
                        k[i][u] = load_eight(rows[i] + d, at[i] >= 0 && d < C::HEAD_DIM);
                    }
            };
            load_keys(0);
            UNROLL for (int i = 0; i < 4; ++i) {
                int position = shfl(at[i / 2], 4 * (2 * j + i % 2));
                const u16* value = values + offset_of(position, params.values_s);
                UNROLL for (int b = 0; b < BLOCKS; ++b) {
                    int d = dim0 + 64 * b + 8 * g;
                    v[i][b] = load_eight(value + d, position >= 0 && d < C::VALUE_DIM);
                }
            }
            UNROLL for (int first = 0; first < CHUNKS; first += CHUNKS_AT_ONCE) {
                if (first > 0) load_keys(first);
                UNROLL for (int u = 0; u < CHUNKS_AT_ONCE; ++u)
                    if (first + u < CHUNKS) add_scores(first + u, k[0][u], k[1][u]);
            }
        }
        u32 weights[TILES][2];
        UNROLL for (int t = 0; t < TILES; ++t) {
            float p[4], alpha[2];
            UNROLL for (int i = 0; i < 2; ++i) {
                float upper = at[0] >= 0 ? logit_of(params, s[t][i]) : NEG_INF;
                float lower = at[1] >= 0 ? logit_of(params, s[t][2 + i]) : NEG_INF;
                float m = fmaxf(m_i[t][i], fmaxf(upper, lower));
                for (int mask = 4; mask < 32; mask *= 2) m = fmaxf(m, shfl_xor(m, mask));
                float reference = reference_of(m);
                p[i] = ex2_approx(upper - reference), p[2 + i] = ex2_approx(lower - reference);
                alpha[i] = ex2_approx(m_i[t][i] - reference);
                m_i[t][i] = m;
                l_i[t][i] = l_i[t][i] * alpha[i] + p[i] + p[2 + i];
            }
            UNROLL for (int n = 0; n < BLOCKS * 4; ++n)
                UNROLL for (int c = 0; c < 4; ++c) acc[t][n][c] *= alpha[c % 2];
            weights[t][0] = movmatrix_trans(float_to_pair(p[0], p[1], C::DTYPE));
            weights[t][1] = movmatrix_trans(float_to_pair(p[2], p[3], C::DTYPE));
        }
        if constexpr (STAGED)
            UNROLL for (int i = 0; i < 4; ++i)
                UNROLL for (int b = 0; b < BLOCKS; ++b)
                    v[i][b] = stage[value_place(i / 2 * 8 + 2 * j + i % 2, 8 * b + g)];
        // out' = V' P'.
        UNROLL for (int b = 0; b < BLOCKS; ++b)
            UNROLL for (int n = 0; n < 4; ++n) {
                u32 v0 = word_of(v[0][b], n), v1 = word_of(v[1][b], n);
                u32 v2 = word_of(v[2][b], n), v3 = word_of(v[3][b], n);
                UNROLL for (int t = 0; t < TILES; ++t)
                    mma_m16n8k16(acc[t][4 * b + n], low_halves(v0, v1), high_halves(v0, v1),
                                 low_halves(v2, v3), high_halves(v2, v3), weights[t][0], weights[t][1],
                                 C::DTYPE);
            }
        if constexpr (STAGED) syncwarp();
        rank += 16 * C::ATTEND_WARPS;
    }
    if constexpr (STAGED) cp_async_wait<0>();
    UNROLL for (int t = 0; t < TILES; ++t)
        UNROLL for (int i = 0; i < 2; ++i) {
            float l = l_i[t][i];
            for (int mask = 4; mask < 32; mask *= 2) l += shfl_xor(l, mask);
            int h = 8 * t + 2 * j + i;
            if (h >= C::PASS_HEADS) continue;
            if (g == 0) stats[h] = m_i[t][i], stats[C::ATTEND_WARPS * C::PASS_HEADS + h] = l;
            UNROLL for (int b = 0; b < BLOCKS; ++b) {
                float4* to = reinterpret_cast<float4*>(out + h * ACC_STRIDE + 64 * b + 8 * g);
                float(*a)[4] = acc[t] + 4 * b;
                to[0] = make_float4(a[0][i], a[0][2 + i], a[1][i], a[1][2 + i]);
                to[1] = make_float4(a[2][i], a[2][2 + i], a[3][i], a[3][2 + i]);
            }
        }
    return any;
}
