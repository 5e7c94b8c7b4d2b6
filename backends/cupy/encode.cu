// encode: the packed signs of projected vectors.
//
//     code_j = 1  iff  (x . projection + bias)_j > 0
//
// Bits are the rows and vectors the columns of a product on the tensor cores. A block keeps BLOCK_BITS
// columns of a projection in shared memory, in the order in which lanes take them. Its warps go over
// vectors, 8 TILES at once, which come through STAGES of asynchronous copies. The signs that a lane makes
// of a vector are neighbours. With fp32 vectors or weights (IEEE) every sum is a chain of fused products.
//
// A job is a set of vectors with one projection: those of the op, the queries of a decode step, or its
// fresh keys, whose positions follow from the lengths. A launch does one or two.

#include "vectors.cuh"

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

// The argument; addresses come first.
struct Params {
    Arrays arrays[2];
    const int *lengths, *starts;
    Job jobs[2];
    int kv_heads, length_step, start_step, slots;
};

constexpr bool IEEE = C::DTYPE == FP32 || C::FP32_WEIGHTS;
constexpr int VECTORS = 8 * C::TILES;

typedef conditional_t<C::FP32_WEIGHTS, float, data_t> weight_t;

struct Vector {
    const data_t* x;
    i64 code, norm;
    bool valid;
};

INLINE Vector find(const Params& params, const Arrays& its, const Job& job, int kv_head, int v) {
    Vector found;
    found.valid = v < job.vectors;
    v = found.valid ? v : 0;
    i64 batch = v / job.per_batch;
    int rest = v % job.per_batch;
    int token = rest % job.tokens;
    int head = kv_head * job.group + rest / job.tokens;
    if (job.fresh) {
        int length = params.length_step < 0 ? params.slots : params.lengths[batch * params.length_step];
        int start = params.start_step < 0 ? 0 : params.starts[batch * params.start_step];
        token += min(max(length, 0), params.slots) - job.tokens;
        found.valid = found.valid && token >= max(start, 0);
        token = max(token, 0);
    }
    found.x = reinterpret_cast<const data_t*>(its.x) + batch * job.x_b + head * job.x_h
        + token * job.x_t;
    found.code = batch * job.codes_b + head * job.codes_h + token * job.codes_t;
    found.norm = batch * job.norms_b + head * job.norms_h + token * job.norms_t;
    return found;
}

INLINE void store_word(char* p, u32 word) {
    if constexpr (C::ALIGNED_CODES) *reinterpret_cast<u32*>(p) = word;
    else
        for (int i = 0; i < 4; ++i) p[i] = char(word >> (8 * i));
}

// IEEE: the bits of VECTORS vectors from `first` on; a lane makes one bit of a word.
INLINE void project_ieee(const Params& params, const Arrays& its, const Job& job, int kv_head,
                         int column, int first) {
    int lane = threadIdx.x % 32;
    const weight_t* weights = reinterpret_cast<const weight_t*>(its.projection)
        + kv_head * job.projection_h + column + lane;
    Vector found[VECTORS];
    for (int v = 0; v < VECTORS; ++v) found[v] = find(params, its, job, kv_head, first + v);
    for (int word = 0; word < C::BLOCK_BITS / 32; ++word) {
        float sum[VECTORS] = {};
#pragma unroll 4
        for (int d = 0; d < C::HEAD_DIM; ++d) {
            float w = to_float(weights[word * 32 + d * job.projection_d]);
            UNROLL for (int v = 0; v < VECTORS; ++v) sum[v] = fmaf(to_float(found[v].x[d]), w, sum[v]);
        }
        float bias = load_optional(its.bias, job.bias_kind,
                                   kv_head * job.bias_h + column + word * 32 + lane);
        for (int v = 0; v < VECTORS; ++v) {
            u32 bits = ballot(sum[v] + bias > 0.f);
            if (lane == 0 && found[v].valid)
                store_word(its.codes + found[v].code + (column / 32 + word) * 4, bits);
        }
    }
    for (int t = 0; t < C::TILES; ++t) {
        const Vector mine = find(params, its, job, kv_head, first + 8 * t + lane / 4);
        if (its.norms == nullptr || column != 0) continue;
        float squares = squares_of(mine.x, mine.valid, lane % 4);
        if (mine.valid && lane % 4 == 0) its.norms[mine.norm] = norm_of(squares);
    }
}

extern __shared__ __align__(16) char smem[];

// Vectors of 16 bytes that weights take, [BLOCK_BITS / 16, 2 CHUNKS, 32 lanes]; biases follow them.
constexpr int WEIGHT_VECTORS = C::BLOCK_BITS / 16 * 2 * CHUNKS * 32;
// Signs that a lane makes of a vector, and lanes that make a word.
constexpr int OWN = C::BLOCK_BITS / 8, MAKERS = 32 / OWN;

INLINE float* smem_biases() { return reinterpret_cast<float*>(smem + WEIGHT_VECTORS * 16); }

// Keep columns of a projection in lane order, and the biases, negated. Rows g and g + 8 of a tile m are
// bits 2m and 2m + 1 of those of lanes 4g + j.
INLINE void load_weights(const Arrays& its, const Job& job, int kv_head, int column) {
    u16* operands = reinterpret_cast<u16*>(smem);
    float* biases = smem_biases();
    const u16* weights = reinterpret_cast<const u16*>(its.projection)
        + kv_head * job.projection_h + column;
#pragma unroll 2
    for (u32 i = threadIdx.x; i < CHUNKS * 32 * (C::BLOCK_BITS / 8); i += 32 * C::WARPS) {
        u32 d = i / (C::BLOCK_BITS / 8), bit = i % (C::BLOCK_BITS / 8) * 8;
        uint4 eight = load_eight(weights + d * job.projection_d + bit, d < C::HEAD_DIM);
        // Dimension d is one of a pair, of which a lane takes two in each product.
        u32 step = 2 * (d / 32) + d % 8 / 4, quad = d % 32 / 8, upper = d % 4 / 2;
        UNROLL for (int k = 0; k < 8; ++k) {
            u32 g = (bit + k) / OWN, own = (bit + k) % OWN;
            u32 at = (own / 2 * (2 * CHUNKS) + step) * 32 + g * 4 + quad;
            operands[at * 8 + (2 * upper + own % 2) * 2 + d % 2] =
                u16(word_of(eight, k / 2) >> (16 * (k % 2)));
        }
    }
    for (int i = threadIdx.x; i < C::BLOCK_BITS; i += 32 * C::WARPS)
        biases[i] = 0.f - load_optional(its.bias, job.bias_kind, kv_head * job.bias_h + column + i);
    __syncthreads();
}

// Start the copies of a stage; lane i knows vector i of it.
INLINE void copy_vectors(const Arrays& its, uint4* stage, const Vector& found) {
    const int lane = threadIdx.x % 32;
    const u64 mine = found.valid ? u64(found.x) : 0;
    // Memory that exists, for copies of nothing.
    const u16* base = reinterpret_cast<const u16*>(its.x);
#pragma unroll 4
    for (int n = 0; n < C::TILES * CHUNKS; ++n) {
        const u32 i = lane + 32 * n;
        int row = i / (4 * CHUNKS), eight = i % (4 * CHUNKS);
        const u16* from = reinterpret_cast<const u16*>(shfl(mine, row));
        bool valid = from != nullptr && 8 * eight < C::HEAD_DIM;
        copy_eight(stage + stage_place(row, eight), valid ? from + 8 * eight : base, valid);
    }
}

// Norms of the vectors of a stage, 8 at a time.
INLINE void store_norms(const Arrays& its, const uint4* stage, const Vector& found) {
    const int j = threadIdx.x % 4;
    NO_UNROLL for (int row = threadIdx.x % 32 / 4; row < VECTORS; row += 8) {
        float sum = 0.f;
        NO_UNROLL for (int u = 0; u < CHUNKS; ++u) {
            uint4 v = stage[stage_place(row, 4 * u + j)];
            UNROLL for (int i = 0; i < 8; ++i) {
                float y = to_float(u16(word_of(v, i / 2) >> (16 * (i % 2))));
                sum = fmaf(y, y, sum);
            }
        }
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
        i64 at = shfl(u64(found.norm), row);
        if (shfl(u32(found.valid), row) && j == 0) its.norms[at] = norm_of(sum);
    }
}

// The bits of a stage's vectors; lane 4g + j has the signs of vectors 2j and 2j + 1 of each 8.
INLINE void project(const Arrays& its, const uint4* stage, const Vector& found, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const uint4* operands = reinterpret_cast<const uint4*>(smem);
    const float* biases = smem_biases() + g * OWN;
    float sum[C::TILES][C::BLOCK_BITS / 16][4] = {};
#pragma unroll (CHUNKS > 4 ? 2 : CHUNKS)
    for (int u = 0; u < CHUNKS; ++u) {
        uint4 x[C::TILES];
        UNROLL for (int t = 0; t < C::TILES; ++t) x[t] = stage[stage_place(8 * t + g, 4 * u + j)];
        UNROLL for (int m = 0; m < C::BLOCK_BITS / 16; ++m) {
            uint4 a = operands[(m * 2 * CHUNKS + 2 * u) * 32 + lane];
            uint4 b = operands[(m * 2 * CHUNKS + 2 * u + 1) * 32 + lane];
            UNROLL for (int t = 0; t < C::TILES; ++t)
                mma_m16n8k16(sum[t][m], a.x, a.y, a.z, a.w, x[t].x, x[t].y, C::DTYPE);
            UNROLL for (int t = 0; t < C::TILES; ++t)
                mma_m16n8k16(sum[t][m], b.x, b.y, b.z, b.w, x[t].z, x[t].w, C::DTYPE);
        }
    }
    u32 signs[C::TILES][2] = {};
    UNROLL for (int own = OWN - 1; own >= 0; --own) {
        const float bias = biases[own];
        UNROLL for (int t = 0; t < C::TILES; ++t)
            UNROLL for (int i = 0; i < 2; ++i)
                signs[t][i] = signs[t][i] << 1 | sign_bit(bias - sum[t][own / 2][own % 2 * 2 + i]);
    }
    UNROLL for (int t = 0; t < C::TILES; ++t) {
        u32 mine = 0;
        UNROLL for (int i = 0; i < 2; ++i) {
            u32 word = signs[t][i] << (g % MAKERS * OWN);
            for (int mask = 1; mask < MAKERS; mask *= 2) word |= shfl_xor(word, 4 * mask);
            if (g % MAKERS == i) mine = word;
        }
        const int vector = 8 * t + 2 * j + g % MAKERS % 2;
        char* to = its.codes + i64(shfl(u64(found.code), vector)) + column / 8 + g / MAKERS * 4;
        if (shfl(u32(found.valid), vector) && g % MAKERS < 2) store_word(to, mine);
    }
    if (its.norms != nullptr && column == 0) store_norms(its, stage, found);
}

// A warp's vectors: those of every round from `first` on, `step` apart.
INLINE void project_all(const Params& params, const Arrays& its, const Job& job, int kv_head,
                        int column, int first, int step) {
    constexpr int SIZE = VECTORS * 4 * CHUNKS, AHEAD = C::STAGES - 1;
    const int lane = threadIdx.x % 32;
    uint4* stages = reinterpret_cast<uint4*>(smem + WEIGHT_VECTORS * 16 + C::BLOCK_BITS * 4)
        + threadIdx.x / 32 * (C::STAGES * SIZE);
    for (int loop = 0; loop < AHEAD; ++loop) {
        if (loop < job.loops)
            copy_vectors(its, stages + loop * SIZE,
                         find(params, its, job, kv_head, first + loop * step + lane));
        cp_async_commit();
    }
    int slot = 0;
    NO_UNROLL for (int loop = 0; loop < job.loops && first < job.vectors; ++loop, first += step) {
        if (loop + AHEAD < job.loops)
            copy_vectors(its, stages + (slot + AHEAD) % C::STAGES * SIZE,
                         find(params, its, job, kv_head, first + AHEAD * step + lane));
        cp_async_commit();
        cp_async_wait<AHEAD>();
        syncwarp();
        project(its, stages + slot * SIZE, find(params, its, job, kv_head, first + lane), column);
        syncwarp();
        slot = (slot + 1) % C::STAGES;
    }
    cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(32 * C::WARPS)
encode(const __grid_constant__ Params params) {
    griddepcontrol_launch_dependents();
    int block = blockIdx.x, second = block >= params.jobs[0].blocks;
    const Arrays& its = params.arrays[second];
    const Job& job = params.jobs[second];
    if (second) block -= params.jobs[0].blocks;
    int column = block % (C::BITS / C::BLOCK_BITS) * C::BLOCK_BITS;
    int kv_head = block / (C::BITS / C::BLOCK_BITS) % params.kv_heads;
    int tile = block / (C::BITS / C::BLOCK_BITS) / params.kv_heads;
    if constexpr (!IEEE) load_weights(its, job, kv_head, column);
    const int step = C::WARPS * VECTORS;
    const int first = (tile * job.loops * C::WARPS + threadIdx.x / 32) * VECTORS;
    if constexpr (IEEE)
        for (int loop = 0; loop < job.loops && first + loop * step < job.vectors; ++loop)
            project_ieee(params, its, job, kv_head, column, first + loop * step);
    else
        project_all(params, its, job, kv_head, column, first, step);
}
