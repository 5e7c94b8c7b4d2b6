// A row: what one query, or the queries of a group, sees, and the blocks that work on it.
//
// A row's visible keys are cut in PARTS of equal size by their own number, whatever S is; a block
// takes one part. The blocks of a row meet at barriers, and what they tell one another lies in their
// exchange areas. JOINED says how they meet:
//   0  there is one block;
//   1  they are a cluster: the hardware starts them together, exchange areas are shared memory;
//   2  they count arrivals in global memory (see zero.cu). Blocks start in the order of their numbers
//      and a row's are neighbours, so at most one row of a launch waits for blocks that have not
//      started.
//
// PARTS, JOINED, THREADS, RESIDENT (blocks that a multiprocessor holds at once), LINE (bytes). Shared
// memory holds EXCHANGE bytes that other blocks may see (from LISTED on, positions), QUERIES bytes of
// queries, then counters, codes on their way and the keys to select by, and after them, in the same
// place, what warps have to merge, and rings of keys and values.

// Words of a code.
#define W (R / 32)

struct Params {
    const char *q_codes, *codes;
    const u16* norms;
    const char *q, *keys, *values, *sinks;
    const char *query_projection, *query_bias, *projection, *bias;
    char* out;
    float* lse;
    // Positions [row, k], ascending: what hamming_topk returns, or what is attended to.
    int* positions;
    const int *lengths, *starts;
    char *exchange, *scores;
    u32* arrivals;
    i64 q_codes_b, q_codes_h, q_codes_t, codes_b, codes_h, codes_s, norms_b, norms_h, norms_s;
    i64 q_b, q_h, q_t, keys_b, keys_h, keys_s, values_b, values_h, values_s;
    i64 positions_b, positions_h, positions_t, ratio;
    i64 query_projection_h, query_projection_d, query_bias_h, projection_h, projection_d, bias_h;
    // Rows of a batch row and token; of those, rows of a KV head.
    int heads, share, tokens, slots, length_step, start_step;
    int k, least, sink, recent, dense_below, capacity, sinks_kind;
    int query_bias_kind, bias_kind;
    float scale, softcap;
};

// Its parts begin at whole lines: asynchronous copies that straddle lines are slower.
extern __shared__ __align__(LINE) char memory[];

struct Row {
    i64 index, batch;
    int head, kv_head, token, part;
    int start, stop, budget, taken;
    bool everything;
};

// Which row this block works on; reads nothing.
INLINE Row name_row(const Params& p) {
    Row row;
    row.part = blockIdx.x % PARTS;
    u32 index = blockIdx.x / PARTS;
    row.index = index;
    row.token = index % p.tokens;
    row.head = index / p.tokens % p.heads;
    row.kv_head = row.head / p.share;
    row.batch = index / p.tokens / p.heads;
    return row;
}

// What the row sees, and how much of it is taken.
INLINE void look_at_row(const Params& p, Row& row) {
    // Lengths are read as int32: the low half of an int64.
    int length = p.length_step < 0 ? p.slots : p.lengths[row.batch * p.length_step];
    int start = p.start_step < 0 ? 0 : p.starts[row.batch * p.start_step];
    row.start = max(start, 0);
    row.stop = max(min(length, p.slots) - (p.tokens - 1 - row.token), row.start);
    int seen = row.stop - row.start;
    row.budget = p.k;
    if (p.ratio >= 0) {
        i64 part = (i64(seen) * p.ratio) >> 32;
        part = part < p.least ? p.least : part;
        row.budget = part < p.k ? int(part) : p.k;
    }
    row.everything = seen <= max(row.budget, p.dense_below);
    row.taken = row.everything ? seen : row.budget;
}

// Ranks of selected keys that a block attends to, in whole tiles of a warp.
INLINE int share_size(const Row& row) { return ((row.taken + PARTS - 1) / PARTS + 15) & ~15; }

#if LISTED
// Positions that a block attends to.
INLINE int* own_list() { return reinterpret_cast<int*>(memory + LISTED); }
#endif

// The exchange area of a part of this row; what others wrote is seen after a barrier.
INLINE char* exchange_of(const Params& p, const Row& row, int part) {
#if JOINED == 1
    return in_block(memory, part);
#elif JOINED == 2
    return p.exchange + (row.index * PARTS + part) * i64(EXCHANGE);
#else
    return memory;
#endif
}

template <typename T> INLINE T peer(const T* p) {
#if JOINED == 2
    return __ldcg(p);
#else
    return *p;
#endif
}

// Let the other parts see `bytes` of this block's exchange area from `offset` on.
INLINE void publish(const Params& p, const Row& row, int offset, int bytes) {
#if JOINED == 2
    __syncthreads();
    u32* to = reinterpret_cast<u32*>(exchange_of(p, row, row.part) + offset);
    const u32* from = reinterpret_cast<const u32*>(memory + offset);
#pragma unroll 1
    for (int i = threadIdx.x; i < bytes / 4; i += THREADS) to[i] = from[i];
#endif
}

// A barrier of all threads of a row; `met` counts the barriers so far.
INLINE void meet(const Params& p, const Row& row, u32& met) {
#if JOINED == 1
    sync_cluster();
#else
    __syncthreads();
#endif
#if JOINED == 2
    if (threadIdx.x == 0) {
        // The counters are zeroed by the launch before.
        if (met == 0) wait_for_previous();
        arrive_and_wait(p.arrivals + row.index, met + PARTS);
    }
    met += PARTS;
    __syncthreads();
#endif
}

// Sums over the block's threads before this one, and over all. All threads call it.
INLINE u64 sum_before(u64 mine, u64& all) {
    __shared__ u64 sums[THREADS / 32 + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
        u64 below = from_below(sum, distance);
        if (lane >= distance) sum += below;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    // Each warp sums up the others' sums for itself.
    u64 other = lane < THREADS / 32 ? sums[lane] : 0, upto = other;
    for (int distance = 1; distance < THREADS / 32; distance *= 2) {
        u64 below = from_below(upto, distance);
        if (lane >= distance) upto += below;
    }
    all = from_lane(upto, THREADS / 32 - 1);
    return from_lane(upto - other, warp) + sum - mine;
}
