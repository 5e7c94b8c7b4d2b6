// encode: the packed signs of projected vectors.
//
//     code_j = 1  iff  (x . projection + bias)_j > 0
//
// Bits are the rows and vectors the columns of a product on the tensor cores. A block keeps some
// columns of a projection in shared memory, in the order in which lanes take them, and its warps go
// over vectors, which come through a ring of asynchronous copies of each warp. Bits are dealt out so
// that the signs a lane makes of a vector are neighbours; nothing but codes is written. With fp32
// vectors or weights (IEEE) every sum is a chain of fused products over the dimensions.
//
// A job is a set of vectors with one projection: the vectors of the op, the queries of a decode
// step, or its fresh keys, whose positions follow from the lengths. A launch does one or two.
//
// D, R, N (bits a block makes), WARPS, TILES (of 8 vectors a warp takes at once), STAGES (of its
// ring), DATA, WIDE_WEIGHTS (fp32 projection beside 16-bit vectors), ALIGNED, WORDS (codes are
// written as aligned words).

#include "ptx.cu"
#include "vectors.cu"

struct Arrays {
    const char *x, *projection, *bias;
    char* codes;
    u16* norms;
};

struct Job {
    i64 x_b, x_h, x_t, projection_h, projection_d, bias_h;
    i64 codes_b, codes_h, codes_t, norms_b, norms_h, norms_t;
    // Vectors of a KV head; per batch row; heads of x per KV head; tokens, or fresh keys.
    int vectors, per_batch, group, tokens, fresh, bias_kind, blocks, loops;
};

struct Params {
    Arrays arrays[2];
    const int *lengths, *starts;
    Job jobs[2];
    int kv_heads, length_step, start_step, slots;
};

#define IEEE (DATA == 0 || WIDE_WEIGHTS)
#define CHUNKS ((D + 31) / 32)
#define VECTORS (8 * TILES)

#if WIDE_WEIGHTS
typedef float weight_t;
INLINE float weight(const weight_t* p) { return *p; }
#else
typedef data_t weight_t;
INLINE float weight(const weight_t* p) { return widen(*p); }
#endif

struct Vector {
    const data_t* x;
    i64 code, norm;
    bool inside;
};

INLINE Vector find(const Params& p, const Arrays& its, const Job& job, int kv_head, int v) {
    Vector found;
    found.inside = v < job.vectors;
    v = found.inside ? v : 0;
    i64 batch = v / job.per_batch;
    int rest = v % job.per_batch;
    int token = rest % job.tokens;
    int head = kv_head * job.group + rest / job.tokens;
    if (job.fresh) {
        int length = p.length_step < 0 ? p.slots : p.lengths[batch * p.length_step];
        int start = p.start_step < 0 ? 0 : p.starts[batch * p.start_step];
        token += min(max(length, 0), p.slots) - job.tokens;
        found.inside = found.inside && token >= max(start, 0);
        token = max(token, 0);
    }
    found.x = reinterpret_cast<const data_t*>(its.x) + batch * job.x_b + head * job.x_h
        + token * job.x_t;
    found.code = batch * job.codes_b + head * job.codes_h + token * job.codes_t;
    found.norm = batch * job.norms_b + head * job.norms_h + token * job.norms_t;
    return found;
}

INLINE void store_word(char* p, u32 word) {
#if WORDS
    *reinterpret_cast<u32*>(p) = word;
#else
    for (int i = 0; i < 4; ++i) p[i] = char(word >> (8 * i));
#endif
}

#if IEEE

INLINE void store_norm(const Arrays& its, const Vector& vector, int column, int j) {
    if (its.norms == nullptr || column != 0) return;
    float squares = squares_of(vector.x, vector.inside, j);
    if (vector.inside && j == 0) its.norms[vector.norm] = norm_of(squares);
}

// N bits of VECTORS vectors from `first` on; a lane makes one bit of a word.
INLINE void project(const Params& p, const Arrays& its, const Job& job, int kv_head, int column, int first) {
    int lane = threadIdx.x % 32;
    const weight_t* weights = reinterpret_cast<const weight_t*>(its.projection)
        + kv_head * job.projection_h + column + lane;
    Vector found[VECTORS];
    for (int v = 0; v < VECTORS; ++v) found[v] = find(p, its, job, kv_head, first + v);
    for (int word = 0; word < N / 32; ++word) {
        float sum[VECTORS] = {};
#pragma unroll 4
        for (int d = 0; d < D; ++d) {
            float w = weight(weights + word * 32 + d * job.projection_d);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) sum[v] = fmaf(widen(found[v].x[d]), w, sum[v]);
        }
        float bias = optional(its.bias, job.bias_kind,
                              kv_head * job.bias_h + column + word * 32 + lane);
        for (int v = 0; v < VECTORS; ++v) {
            u32 bits = ballot(sum[v] + bias > 0.f);
            if (lane == 0 && found[v].inside)
                store_word(its.codes + found[v].code + (column / 32 + word) * 4, bits);
        }
    }
    for (int t = 0; t < TILES; ++t)
        store_norm(its, find(p, its, job, kv_head, first + 8 * t + lane / 4), column, lane % 4);
}

#else

extern __shared__ __align__(16) char memory[];

#define OPERANDS (N / 16 * 2 * CHUNKS * 32)
// Signs that a lane makes of a vector, and lanes that make a word.
#define OWN (N / 8)
#define MAKERS (32 / OWN)

// Keep N columns of a projection in lane order, [N / 16][2 CHUNKS][32 lanes] of 4 registers, and the
// biases, negated. Rows g and g + 8 of a tile m are the bits 2m and 2m + 1 of those of lanes 4g + j.
INLINE void keep_weights(const Arrays& its, const Job& job, int kv_head, int column) {
    u16* operands = reinterpret_cast<u16*>(memory);
    float* biases = reinterpret_cast<float*>(memory + OPERANDS * 16);
    const data_t* weights = reinterpret_cast<const data_t*>(its.projection)
        + kv_head * job.projection_h + column;
#pragma unroll 2
    for (u32 i = threadIdx.x; i < CHUNKS * 32 * (N / 8); i += 32 * WARPS) {
        u32 d = i / (N / 8), bit = i % (N / 8) * 8;
        uint4 eight = load_eight(weights + d * job.projection_d + bit, d < D);
        // Dimension d is one of a pair, of which a lane takes two in each product.
        u32 step = 2 * (d / 32) + d % 8 / 4, quad = d % 32 / 8, upper = d % 4 / 2;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            u32 g = (bit + k) / OWN, own = (bit + k) % OWN;
            u32 at = (own / 2 * (2 * CHUNKS) + step) * 32 + g * 4 + quad;
            operands[at * 8 + (2 * upper + own % 2) * 2 + d % 2] =
                u16(word_of(eight, k / 2) >> (16 * (k % 2)));
        }
    }
    for (int i = threadIdx.x; i < N; i += 32 * WARPS)
        biases[i] = 0.f - optional(its.bias, job.bias_kind, kv_head * job.bias_h + column + i);
    __syncthreads();
}

// Where 8 dimensions of a vector lie in a stage: rows, in which lanes meet all banks.
INLINE int place(int row, int eight) {
    return row * (4 * CHUNKS) + (CHUNKS % 2 ? eight : eight ^ (row & 1) << 2);
}

// Start the copies of a stage; lane i knows vector i of it.
INLINE void copy_vectors(const Arrays& its, uint4* stage, const Vector& found) {
    const int lane = threadIdx.x % 32;
    const u64 mine = found.inside ? u64(found.x) : 0;
    // Of memory that there is, for copies of nothing.
    const data_t* base = reinterpret_cast<const data_t*>(its.x);
#pragma unroll 4
    for (int n = 0; n < TILES * CHUNKS; ++n) {
        const u32 i = lane + 32 * n;
        int row = i / (4 * CHUNKS), eight = i % (4 * CHUNKS);
        const data_t* from = reinterpret_cast<const data_t*>(from_lane(mine, row));
        bool inside = from != nullptr && 8 * eight < D;
        copy_or_clear(stage + place(row, eight), inside ? from + 8 * eight : base, inside);
    }
}

// Norms of the vectors of a stage, 8 at a time.
INLINE void store_norms(const Arrays& its, const uint4* stage, const Vector& found) {
    const int j = threadIdx.x % 4;
#pragma unroll 1
    for (int row = threadIdx.x % 32 / 4; row < VECTORS; row += 8) {
        float sum = 0.f;
#pragma unroll 1
        for (int u = 0; u < CHUNKS; ++u) {
            uint4 v = stage[place(row, 4 * u + j)];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float y = widen(u16(word_of(v, i / 2) >> (16 * (i % 2))));
                sum = fmaf(y, y, sum);
            }
        }
        sum += across(sum, 1);
        sum += across(sum, 2);
        i64 at = from_lane(u64(found.norm), row);
        if (from_lane(u32(found.inside), row) && j == 0) its.norms[at] = norm_of(sum);
    }
}

// N bits of the vectors of a stage; lane 4g + j has the signs of vectors 2j and 2j + 1 of each 8.
INLINE void project(const Arrays& its, const uint4* stage, const Vector& found, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const uint4* operands = reinterpret_cast<const uint4*>(memory);
    const float* biases = reinterpret_cast<const float*>(memory + OPERANDS * 16) + g * OWN;
    float sum[TILES][N / 16][4] = {};
#pragma unroll (CHUNKS > 4 ? 2 : CHUNKS)
    for (int u = 0; u < CHUNKS; ++u) {
        uint4 x[TILES];
#pragma unroll
        for (int t = 0; t < TILES; ++t) x[t] = stage[place(8 * t + g, 4 * u + j)];
#pragma unroll
        for (int m = 0; m < N / 16; ++m) {
            uint4 a = operands[(m * 2 * CHUNKS + 2 * u) * 32 + lane];
            uint4 b = operands[(m * 2 * CHUNKS + 2 * u + 1) * 32 + lane];
#pragma unroll
            for (int t = 0; t < TILES; ++t) mma(sum[t][m], a.x, a.y, a.z, a.w, x[t].x, x[t].y, DATA);
#pragma unroll
            for (int t = 0; t < TILES; ++t) mma(sum[t][m], b.x, b.y, b.z, b.w, x[t].z, x[t].w, DATA);
        }
    }
    u32 signs[TILES][2] = {};
#pragma unroll
    for (int own = OWN - 1; own >= 0; --own) {
        const float bias = biases[own];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                signs[t][i] = signs[t][i] << 1
                    | is_below_zero(bias - sum[t][own / 2][own % 2 * 2 + i]);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        u32 mine = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 word = signs[t][i] << (g % MAKERS * OWN);
            for (int mask = 1; mask < MAKERS; mask *= 2) word |= across(word, 4 * mask);
            if (g % MAKERS == i) mine = word;
        }
        const int vector = 8 * t + 2 * j + g % MAKERS % 2;
        char* to = its.codes + i64(from_lane(u64(found.code), vector)) + column / 8 + g / MAKERS * 4;
        if (from_lane(u32(found.inside), vector) && g % MAKERS < 2) store_word(to, mine);
    }
    if (its.norms != nullptr && column == 0) store_norms(its, stage, found);
}

// A warp's vectors: those of every round from `first` on, `step` apart.
INLINE void project_all(const Params& p, const Arrays& its, const Job& job, int kv_head, int column,
                        int first, int step) {
    const int lane = threadIdx.x % 32;
    uint4* ring = reinterpret_cast<uint4*>(memory + OPERANDS * 16 + N * 4)
        + threadIdx.x / 32 * (STAGES * VECTORS * 4 * CHUNKS);
    constexpr int SIZE = VECTORS * 4 * CHUNKS, AHEAD = STAGES - 1;
    for (int loop = 0; loop < AHEAD; ++loop) {
        if (loop < job.loops)
            copy_vectors(its, ring + loop * SIZE, find(p, its, job, kv_head, first + loop * step + lane));
        end_batch();
    }
    int slot = 0;
#pragma unroll 1
    for (int loop = 0; loop < job.loops && first < job.vectors; ++loop, first += step) {
        if (loop + AHEAD < job.loops)
            copy_vectors(its, ring + (slot + AHEAD) % STAGES * SIZE,
                         find(p, its, job, kv_head, first + AHEAD * step + lane));
        end_batch();
        wait_for_batches<STAGES - 1>();
        sync_warp();
        project(its, ring + slot * SIZE, find(p, its, job, kv_head, first + lane), column);
        sync_warp();
        slot = (slot + 1) % STAGES;
    }
    wait_for_batches<0>();
}

#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS) encode(const __grid_constant__ Params p) {
    let_next_start();
    int block = blockIdx.x, second = block >= p.jobs[0].blocks;
    const Arrays& its = p.arrays[second];
    const Job& job = p.jobs[second];
    if (second) block -= p.jobs[0].blocks;
    int column = block % (R / N) * N;
    int kv_head = block / (R / N) % p.kv_heads;
    int tile = block / (R / N) / p.kv_heads;
#if !IEEE
    keep_weights(its, job, kv_head, column);
#endif
    const int first = (tile * job.loops * WARPS + threadIdx.x / 32) * VECTORS, step = WARPS * VECTORS;
#if IEEE
    for (int loop = 0; loop < job.loops && first + loop * step < job.vectors; ++loop)
        project(p, its, job, kv_head, column, first + loop * step);
#else
    project_all(p, its, job, kv_head, column, first, step);
#endif
}
