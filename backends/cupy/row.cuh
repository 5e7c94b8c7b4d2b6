// A row: what one query, or the queries of a group, sees, and the blocks that work on it.
//
// A row's visible keys are cut in NUM_SPLITS of equal size, and a block takes one. Blocks of a row are a
// CLUSTER with their exchange areas in shared memory; or, COOPERATIVE, all blocks of a launch run at the
// same time, with areas of WORKSPACE_BYTES in global memory. There a block clears its own area. Once all
// have, a word of another block has come when it is not zero, so no barrier stands between.
//
// Shared memory: EXCHANGE_BYTES that a cluster may see (from POSITIONS_AT on, positions), QUERY_BYTES,
// HISTOGRAM_BYTES, RING_BYTES of codes and the scores; in the place of the latter three, later, outputs
// of warps and stages of keys and values.
#pragma once

#include "ptx.cuh"

constexpr bool CLUSTER = C::SYNC == 1, COOPERATIVE = C::SYNC == 2;

// The argument of kernels that work on rows; addresses come first. In the order in which a block needs
// it: a cold line of constant memory takes as long as any other load.
struct Params {
    const int *lengths, *starts;
    const char *query_projection, *projection, *q, *keys, *codes, *values, *query_bias, *bias;
    char* exchange;
    u32* arrivals;
    // [rows, k], ascending: what hamming_topk returns, or what is attended to.
    int* positions;
    const char* q_codes;
    const u16* norms;
    char* scores;
    const char* sinks;
    char* out;
    float* lse;
    // Rows of a batch row and token; of those, rows of a KV head.
    int heads, rows_per_kv_head, tokens, slots, length_step, start_step;
    int k, least, sink, recent, dense_below, capacity, sinks_kind;
    int query_bias_kind, bias_kind;
    float scale;
    i64 ratio, query_projection_h, projection_h;
    i64 q_b, q_h, q_t, keys_b, keys_h, keys_s, codes_b, codes_h, codes_s;
    i64 values_b, values_h, values_s, query_bias_h, bias_h;
    i64 q_codes_b, q_codes_h, q_codes_t, norms_b, norms_h, norms_s;
    i64 positions_b, positions_h, positions_t;
    float softcap;
};

// Aligned to lines: asynchronous copies that straddle lines are slower.
extern __shared__ __align__(128) char smem[];

struct Row {
    i64 index;
    int batch, head, kv_head, token, split;
    // Its visible keys, its budget, and how many keys are selected: all of them if dense.
    int start, stop, budget, selected;
    bool dense;
};

// Which row this block works on; reads nothing.
INLINE Row find_row(const Params& params) {
    Row row;
    row.split = blockIdx.x % C::NUM_SPLITS;
    u32 index = blockIdx.x / C::NUM_SPLITS;
    row.index = index;
    // Everything waits for it, and what a usual row needs is no division.
    row.token = row.batch = 0;
    if (params.tokens > 1) row.token = index % params.tokens, index /= params.tokens;
    if (index >= u32(params.heads)) row.batch = index / params.heads, index %= params.heads;
    row.head = row.kv_head = index;
    if (params.rows_per_kv_head > 1) row.kv_head = index / u32(params.rows_per_kv_head);
    return row;
}

// Load where the keys of the batch row begin and end; in flight until `set_span`. Lengths are read as
// int32: the low half of an int64.
INLINE void load_span(const Params& params, Row& row) {
    row.start = 0, row.stop = params.slots;
    if (params.length_step >= 0) row.stop = params.lengths[i64(row.batch) * params.length_step];
    if (params.start_step >= 0) row.start = params.starts[i64(row.batch) * params.start_step];
    // Else the compiler puts them behind what is loaded next.
    syncwarp();
}

// What the row sees, and how much of it is selected.
INLINE void set_span(const Params& params, Row& row) {
    row.start = max(row.start, 0);
    // Clamped first: from far below zero the subtraction would overflow.
    row.stop = max(min(max(row.stop, 0), params.slots) - (params.tokens - 1 - row.token), row.start);
    int visible = row.stop - row.start;
    row.budget = params.k;
    if (params.ratio >= 0) {
        i64 part = (i64(visible) * params.ratio) >> 32;
        part = part < params.least ? params.least : part;
        row.budget = part < params.k ? int(part) : params.k;
    }
    row.dense = visible <= max(row.budget, params.dense_below);
    row.selected = row.dense ? visible : row.budget;
}

// Ranks of selected keys that a block attends to, in whole tiles of 16.
INLINE int ranks_per_split(const Row& row) {
    return ((row.selected + C::NUM_SPLITS - 1) / C::NUM_SPLITS + 15) & ~15;
}

// Positions that a block attends to, if they lie in shared memory.
INLINE int* smem_positions() { return reinterpret_cast<int*>(smem + C::POSITIONS_AT); }

// The exchange area of a split of this row.
INLINE char* exchange_area(const Params& params, const Row& row, int split) {
    if constexpr (CLUSTER) return mapa(smem, split);
    else if constexpr (COOPERATIVE)
        return params.exchange + (row.index * C::NUM_SPLITS + split) * i64(C::WORKSPACE_BYTES);
    else return smem;
}

template <typename T> INLINE T load_exchanged(const T* p) {
    if constexpr (COOPERATIVE) return ld_relaxed(p);
    else return *p;
}

// A barrier of all threads of a row. COOPERATIVE: once a launch at most.
INLINE void row_sync(const Params& params, const Row& row) {
    if constexpr (CLUSTER) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    if constexpr (COOPERATIVE) {
        if (threadIdx.x == 0) {
            u32* arrivals = params.arrivals + row.index;
            red_release_add(arrivals, 1);
            for (u32 tries = 0; ld_acquire(arrivals) < C::NUM_SPLITS;) poll(tries);
        }
        __syncthreads();
    }
}

// COOPERATIVE: the last warp clears the block's area and arrives. Returns what to wait with.
INLINE u32 clear_exchange(const Params& params, const Row& row) {
    if constexpr (COOPERATIVE) {
        if (threadIdx.x >= C::THREADS - 32) {
            const int lane = threadIdx.x % 32;
            uint4* area = reinterpret_cast<uint4*>(exchange_area(params, row, row.split));
            for (int i = lane; i < C::WORKSPACE_BYTES / 16; i += 32) area[i] = make_uint4(0, 0, 0, 0);
            if (lane == 0 && row.split == 0) params.arrivals[row.index] = 0;
            syncwarp();
            if (lane == 0) return grid_arrive();
        }
    }
    return 0;
}

// Wait until all blocks have cleared theirs; the block may look at areas after its next barrier.
INLINE void wait_exchange(u32 arrival) {
    if constexpr (COOPERATIVE)
        if (threadIdx.x == C::THREADS - 32) grid_wait(arrival);
}

// Sum over the block's threads before this one, and over all; also of two 16-bit numbers a word. All
// threads call it, and come to a barrier before they call it again.
INLINE u32 exclusive_sum(u32 mine, u32& all) {
    __shared__ u32 sums[C::THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
        u32 below = shfl_up(sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    const u32 other = lane < C::THREADS / 32 ? sums[lane] : 0;
    all = reduce_add(other);
    return reduce_add(lane < warp ? other : 0) + sum - mine;
}
