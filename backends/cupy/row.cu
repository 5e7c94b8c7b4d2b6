// A row: what one query, or the queries of a group, sees, and the blocks that work on it.
//
// A row's visible keys are cut in PARTS of equal size by their own number, whatever S is; a block
// takes one part. The blocks of a row meet at barriers, and what they tell one another lies in their
// exchange areas. JOINED says how they meet:
//   0  there is one block;
//   1  they are a cluster: the hardware starts them together, exchange areas are shared memory;
//   2  all blocks of the launch run at the same time, and their areas, of SEEN bytes, lie in global
//      memory. A block clears its own, and once all have, what others look for is there when it is not
//      zero: no barrier stands between, and no way there and back but that of the words themselves.
//
// PARTS, JOINED, THREADS, RESIDENT (blocks that a multiprocessor holds at once), LINE (bytes). Shared
// memory holds EXCHANGE bytes that blocks of a cluster may see (from LISTED on, positions), QUERIES
// bytes of queries, then counters, codes on their way and the keys to select by, and after them, in
// the same place, what warps have to merge, and rings of keys and values.

// Words of a code.
#define W (R / 32)

// In the order in which a block asks for it: a cold line of constant memory takes as long as any other
// load, and keeps a warp from asking for more.
struct Params {
    const int *lengths, *starts;
    const char *query_projection, *projection, *q, *keys, *codes, *values, *query_bias, *bias;
    char* exchange;
    u32* arrivals;
    // Positions [row, k], ascending: what hamming_topk returns, or what is attended to.
    int* positions;
    const char* q_codes;
    const u16* norms;
    char* scores;
    const char* sinks;
    char* out;
    float* lse;
    // Rows of a batch row and token; of those, rows of a KV head.
    int heads, share, tokens, slots, length_step, start_step;
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

// Its parts begin at whole lines: asynchronous copies that straddle lines are slower.
extern __shared__ __align__(LINE) char memory[];

struct Row {
    i64 index;
    int batch, head, kv_head, token, part;
    int start, stop, budget, taken;
    bool everything;
};

// Which row this block works on; reads nothing.
INLINE Row name_row(const Params& p) {
    Row row;
    row.part = blockIdx.x % PARTS;
    u32 index = blockIdx.x / PARTS;
    row.index = index;
    // Everything waits for it, and what a usual row needs is no division.
    row.token = row.batch = 0;
    if (p.tokens > 1) row.token = index % p.tokens, index /= p.tokens;
    if (index >= u32(p.heads)) row.batch = index / p.heads, index %= p.heads;
    row.head = row.kv_head = index;
    if (p.share > 1) row.kv_head = index / u32(p.share);
    return row;
}

// Where the keys of a batch row begin and end, as the caller says.
struct Span {
    int start, length;
};

// On its way until `look_at_row`. Lengths are read as int32: the low half of an int64.
INLINE Span ask_for_span(const Params& p, const Row& row) {
    Span span = {0, p.slots};
    if (p.length_step >= 0) span.length = p.lengths[i64(row.batch) * p.length_step];
    if (p.start_step >= 0) span.start = p.starts[i64(row.batch) * p.start_step];
    // Else the compiler puts them behind what is asked for next.
    sync_warp();
    return span;
}

// What the row sees, and how much of it is taken.
INLINE void look_at_row(const Params& p, Row& row, const Span& span) {
    row.start = max(span.start, 0);
    // Below zero is none; from far below, what is subtracted would lead past the other end.
    row.stop = max(min(max(span.length, 0), p.slots) - (p.tokens - 1 - row.token), row.start);
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

// The exchange area of a part of this row.
INLINE char* exchange_of(const Params& p, const Row& row, int part) {
#if JOINED == 1
    return in_block(memory, part);
#elif JOINED == 2
    return p.exchange + (row.index * PARTS + part) * i64(SEEN);
#else
    return memory;
#endif
}

template <typename T> INLINE T peer(const T* p) {
#if JOINED == 2
    return look(p);
#else
    return *p;
#endif
}

// A barrier of all threads of a row; after it is seen what others wrote before. JOINED 2: once a launch
// at most.
INLINE void meet(const Params& p, const Row& row) {
#if JOINED == 1
    sync_cluster();
#else
    __syncthreads();
#endif
#if JOINED == 2
    if (threadIdx.x == 0) arrive_and_wait(p.arrivals + row.index, PARTS);
    __syncthreads();
#endif
}

// JOINED 2: the last warp clears the block's area, and says so. Returns what to wait with for others.
INLINE u32 clear_area(const Params& p, const Row& row) {
#if JOINED == 2
    if (threadIdx.x >= THREADS - 32) {
        const int lane = threadIdx.x % 32;
        uint4* area = reinterpret_cast<uint4*>(exchange_of(p, row, row.part));
        for (int i = lane; i < SEEN / 16; i += 32) area[i] = make_uint4(0, 0, 0, 0);
        if (lane == 0 && row.part == 0) p.arrivals[row.index] = 0;
        sync_warp();
        if (lane == 0) return arrive_at_grid();
    }
#endif
    return 0;
}

// Wait until all have; threads may look at areas after the next barrier of the block.
INLINE void wait_for_areas(u32 arrival) {
#if JOINED == 2
    if (threadIdx.x == THREADS - 32) wait_for_grid(arrival);
#endif
}

// Sums over the block's threads before this one, and over all; so also of two numbers of 16 bits at
// once. All threads call it, and come to a barrier before they call it again.
INLINE u32 sum_before(u32 mine, u32& all) {
    __shared__ u32 sums[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
        u32 below = from_below(sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    const u32 other = lane < THREADS / 32 ? sums[lane] : 0;
    all = sum_of_warp(other);
    return sum_of_warp(lane < warp ? other : 0) + sum - mine;
}
