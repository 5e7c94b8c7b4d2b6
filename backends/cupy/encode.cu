// encode: the packed signs of projected vectors.
//
//     code_j = 1  iff  (x . projection + bias)_j > 0
//
// Bits are the rows and vectors the columns of a product on the tensor cores. A block keeps some
// columns of a projection in shared memory, in the order in which lanes take them, and its warps go
// over vectors; accumulators are compared with zero and packed, so nothing but codes is written.
// With fp32 vectors or weights (IEEE) every sum is a chain of fused products over the dimensions.
//
// A job is a set of vectors with one projection: the vectors of the op, the queries of a decode
// step, or its fresh keys, whose positions follow from the lengths. A launch does one or two.
//
// D, R, N (bits a block makes), WARPS, TILES (of 8 vectors a warp takes at once), DATA, WIDE_WEIGHTS
// (fp32 projection beside 16-bit vectors), ALIGNED, WORDS (codes are written as aligned words).

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
        token += min(length, p.slots) - job.tokens;
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

INLINE void store_norm(const Arrays& its, const Vector& vector, int column, int j) {
    if (its.norms == nullptr || column != 0) return;
    float squares = squares_of(vector.x, vector.inside, j);
    if (vector.inside && j == 0) its.norms[vector.norm] = norm_of(squares);
}

#if IEEE

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

// Keep N columns of a projection in lane order: [N / 16][2 CHUNKS][32 lanes] of 4 registers.
INLINE void keep_weights(const Arrays& its, const Job& job, int kv_head, int column) {
    u16* operands = reinterpret_cast<u16*>(memory);
    const data_t* weights = reinterpret_cast<const data_t*>(its.projection)
        + kv_head * job.projection_h + column;
    for (int i = threadIdx.x; i < CHUNKS * 32 * (N / 8); i += 32 * WARPS) {
        int d = i / (N / 8), bit = i % (N / 8) * 8;
        uint4 eight = load_eight(weights + d * job.projection_d + bit, d < D);
        // Dimension d is one of a pair, of which a lane takes two in each product.
        int step = 2 * (d / 32) + d % 8 / 4, quad = d % 32 / 8, upper = d % 4 / 2;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            int row = (bit + k) % 16;
            int at = ((bit + k) / 16 * (2 * CHUNKS) + step) * 32 + row % 8 * 4 + quad;
            operands[at * 8 + (2 * upper + row / 8) * 2 + d % 2] =
                u16(word_of(eight, k / 2) >> (16 * (k % 2)));
        }
    }
    __syncthreads();
}

// N bits of VECTORS vectors from `first` on; lane 4g + j loads from vector g of each tile.
INLINE void project(const Params& p, const Arrays& its, const Job& job, int kv_head, int column, int first) {
    int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const uint4* operands = reinterpret_cast<const uint4*>(memory);
    Vector found[TILES];
    float sum[TILES][N / 16][4] = {};
    for (int t = 0; t < TILES; ++t) found[t] = find(p, its, job, kv_head, first + 8 * t + g);
#pragma unroll
    for (int u = 0; u < CHUNKS; ++u) {
        uint4 x[TILES];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            x[t] = load_eight(found[t].x + 32 * u + 8 * j, found[t].inside && 32 * u + 8 * j < D);
#pragma unroll
        for (int m = 0; m < N / 16; ++m) {
            uint4 a = operands[(m * 2 * CHUNKS + 2 * u) * 32 + lane];
            uint4 b = operands[(m * 2 * CHUNKS + 2 * u + 1) * 32 + lane];
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma(sum[t][m], a.x, a.y, a.z, a.w, x[t].x, x[t].y, DATA);
                mma(sum[t][m], b.x, b.y, b.z, b.w, x[t].z, x[t].w, DATA);
            }
        }
    }
#pragma unroll
    for (int word = 0; word < N / 32; ++word) {
        float bias[4];
        for (int k = 0; k < 4; ++k)
            bias[k] = optional(its.bias, job.bias_kind,
                               kv_head * job.bias_h + column + 32 * word + 8 * k + g);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            u32 mine = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // Of vector 2j + i this lane has the bits g, g + 8, g + 16, g + 24.
                u32 bits = 0;
                for (int k = 0; k < 4; ++k)
                    bits |= u32(sum[t][2 * word + k / 2][k % 2 * 2 + i] + bias[k] > 0.f)
                        << (8 * k + g);
                for (int mask = 4; mask < 32; mask *= 2) bits |= across(bits, mask);
                bits = from_lane(bits, g / 2);
                if (g % 2 == i) mine = bits;
            }
            if (j == 0 && found[t].inside)
                store_word(its.codes + found[t].code + (column / 32 + word) * 4, mine);
        }
    }
    for (int t = 0; t < TILES; ++t) store_norm(its, found[t], column, j);
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
    for (int loop = 0; loop < job.loops; ++loop) {
        int first = ((tile * job.loops + loop) * WARPS + threadIdx.x / 32) * VECTORS;
        if (first < job.vectors) project(p, its, job, kv_head, column, first);
    }
}
