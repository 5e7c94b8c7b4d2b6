// Attention over gathered keys, by all blocks of a row; the heads of a group share every key.
//
// Each block takes an equal share of the row's ranks, whichever parts of the row they lie in, or what its
// own part selects (`most_apart`). Warps (gather.cu), then parts, leave a maximum, a sum and an unnormalised
// output, which are merged in a fixed order. Of a row's output every part merges a slice: within a cluster
// the others write what it needs into its memory, elsewhere it fetches that.
//
// JOINED 2: from AREA on, an exchange area holds what is merged, of every pass.

#include "gather.cu"

// Floats of shared memory before the peaks: of what warps leave, and of an exchange area.
#define PEAKS (WARPS * HEADS * ROW_STRIDE)
// Elements that a part merges: whole warps, so of one head each.
#define SLICE ((HEADS * LANES / 32 + PARTS - 1) / PARTS * 32)
#if JOINED == 1
#define AREA_PEAKS (PARTS * SLICE)
#else
#define AREA_PEAKS (HEADS * LANES)
#endif
// What a block leaves in a pass, in floats.
#define PASS (AREA_PEAKS + 2 * HEADS)

// Join the sink, normalise and store one element of the result.
INLINE void finish(const Params& p, const Row& row, int h, int d, float acc, float peak, float sum,
                   bool any) {
    i64 head = i64(row.head) * G + h;
    i64 at = (i64(row.batch) * p.heads * G + head) * p.tokens + row.token;
    float sink = NOTHING;
    if (p.sinks_kind) sink = optional(p.sinks, p.sinks_kind, head) * LOG2E;
    float grown = fmaxf(peak, sink), reference = reference_of(grown);
    float shrink = exp2_fast(peak - reference);
    sum = sum * shrink + exp2_fast(sink - reference);
    put(reinterpret_cast<data_t*>(p.out) + at * DV + d,
        any ? acc * __fdividef(shrink, sum) : 0.f);
    if (d == 0 && p.lse != nullptr)
        p.lse[at] = any ? (reference + log2_fast(sum)) * LN2 : NOTHING;
}

// The lanes that take turns in looking at `n` of something, a power of two.
INLINE constexpr int spread(int n) { return n > 16 ? 32 : n > 8 ? 16 : n > 4 ? 8 : n > 2 ? 4 : n; }

// How COUNT parts of a softmax are joined, of which lane i knows the i-th; so does lane
// i + spread(COUNT), and so on.
struct Weighed {
    // What the lane's part counts, and the peak and the sum of all.
    float weight, peak, sum;
};
template <int COUNT> INLINE Weighed weigh(float peak, float sum) {
    const bool counts = int(threadIdx.x % spread(COUNT)) < COUNT;
    Weighed all;
    all.peak = peak;
#pragma unroll
    for (int mask = 1; mask < spread(COUNT); mask *= 2)
        all.peak = fmaxf(all.peak, across(all.peak, mask));
    all.weight = exp2_fast(peak - reference_of(all.peak));
    all.sum = counts ? all.weight * sum : 0.f;
#pragma unroll
    for (int mask = 1; mask < spread(COUNT); mask *= 2) all.sum += across(all.sum, mask);
    return all;
}

#if PARTS > 1

// What a part without keys leaves as its sum.
#define NO_KEYS -1.f

// The bits of a float, of zero those of -0.
INLINE u32 never_zero(float x) {
    const u32 bits = __float_as_uint(x);
    return bits ? bits : 0x80000000u;
}

// Leave an element, and with the first of a head its peak and sum, for the parts that merge them.
INLINE void leave(const Params& p, const Row& row, int pass, int i, float acc, float peak,
                  float sum) {
    const int h = i / LANES, last = i % LANES == 0 ? PARTS : 0;
#if JOINED == 1
    const int to = i / SLICE;
    reinterpret_cast<float*>(in_block(memory, to))[row.part * SLICE + i - to * SLICE] = acc;
    for (int n = 0; n < last; ++n) {
        float* peaks = reinterpret_cast<float*>(in_block(memory, n)) + AREA_PEAKS + row.part * 2 * HEADS;
        peaks[h] = peak, peaks[HEADS + h] = sum;
    }
#else
    u32* area = reinterpret_cast<u32*>(exchange_of(p, row, row.part) + AREA) + pass * PASS;
    tell(area + i, never_zero(acc));
    if (last) {
        tell(area + AREA_PEAKS + h, never_zero(peak));
        tell(area + AREA_PEAKS + HEADS + h, never_zero(sum));
    }
#endif
}

// What part `n` left of element i. JOINED 2: zero until it has come.
INLINE u32 take(const Params& p, const Row& row, int pass, int n, int i) {
#if JOINED == 1
    return reinterpret_cast<const u32*>(memory)[n * SLICE + i - row.part * SLICE];
#else
    return look(reinterpret_cast<const u32*>(exchange_of(p, row, n) + AREA) + pass * PASS + i);
#endif
}

// The same of its sum or peak of a head: HEADS of the latter come first.
INLINE u32 take_peak(const Params& p, const Row& row, int pass, int n, int h) {
#if JOINED == 1
    return reinterpret_cast<const u32*>(memory)[AREA_PEAKS + n * 2 * HEADS + h];
#else
    return take(p, row, pass, n, AREA_PEAKS + h);
#endif
}

#endif

// One pass: HEADS heads from `head` on, LANES value dimensions from `lane0` on. `open`: no block of the
// row needs what its exchange area holds.
INLINE void attend_pass(const Params& p, const Row& row, const Share& share, int head, int lane0,
                        bool open) {
#if JOINED == 1
    if (!open) arrive_at_cluster();
#endif
    const int pass = head / HEADS * ((DV + LANES - 1) / LANES) + lane0 / LANES;
    float* partials = reinterpret_cast<float*>(memory + EXCHANGE + QUERIES);
    float* peaks = partials + PEAKS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Warps that have keys.
    int used = min((share.end - share.first + WARP_KEYS - 1) / WARP_KEYS, WARPS);
    bool any = false;
    if (warp < used)
        any = attend_warp(p, row, share, head, lane0, partials + warp * HEADS * ROW_STRIDE,
                          peaks + warp * HEADS);
    end_phase(ATTENDED, any);
    any = __syncthreads_or(any);
    end_phase(WARPS_MET);
#if JOINED == 1
    if (!open) wait_for_cluster();
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < HEADS * LANES; i += THREADS) {
        const int h = i / LANES, d = i % LANES;
        // A lane weighs what one warp has left of the head.
        const int one = lane % spread(WARPS);
        const Weighed mine = weigh<WARPS>(one < used ? peaks[one * HEADS + h] : NOTHING,
                                          one < used ? peaks[(WARPS + one) * HEADS + h] : 0.f);
        float acc = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = from_lane(mine.weight, w);
            if (w < used) acc += weight * partials[(w * HEADS + h) * ROW_STRIDE + d];
        }
#if PARTS == 1
        if (head + h < G && lane0 + d < DV)
            finish(p, row, head + h, lane0 + d, acc, mine.peak, mine.sum, any);
#else
        leave(p, row, pass, i, acc, mine.peak, any ? mine.sum : NO_KEYS);
#endif
    }
    end_phase(WARPS_MERGED);
#if PARTS > 1
#if JOINED == 1
    meet(p, row);
#endif
    int end = min((row.part + 1) * SLICE, HEADS * LANES);
#pragma unroll 1
    for (int i = row.part * SLICE + threadIdx.x; i < end; i += THREADS) {
        const int h = i / LANES, d = i % LANES, n = min(lane % spread(PARTS), PARTS - 1);
        u32 peak, sum, acc[PARTS];
        // As above: all at once, and nothing but looks.
        for (u32 tries = 0;; look_again(tries)) {
            peak = take_peak(p, row, pass, n, h), sum = take_peak(p, row, pass, n, HEADS + h);
#pragma unroll
            for (int n = 0; n < PARTS; ++n) acc[n] = take(p, row, pass, n, i);
            bool come = peak && sum;
#pragma unroll
            for (int n = 0; n < PARTS; ++n) come &= acc[n] != 0;
            if (JOINED < 2 || !ballot(!come)) break;
        }
        const bool found = ballot(__uint_as_float(sum) != NO_KEYS);
        const Weighed all = weigh<PARTS>(__uint_as_float(peak), __uint_as_float(sum));
        float value = 0.f;
#pragma unroll
        for (int n = 0; n < PARTS; ++n)
            value += from_lane(all.weight, n) * __uint_as_float(acc[n]);
        if (head + h < G && lane0 + d < DV)
            finish(p, row, head + h, lane0 + d, value, all.peak, all.sum, found);
    }
    end_phase(PARTS_MERGED);
#endif
    // The next pass writes what warps have merged.
    if (JOINED != 1 && (head + HEADS < G || lane0 + LANES < DV)) __syncthreads();
}

// Keys of a part's own up to which its block attends to them rather than to an equal share: half more
// than that is, but not another round of its warps; where another meeting costs more than that, a
// quarter more and 64.
INLINE int most_apart(const Row& row) {
    const int size = share_size(row);
#if JOINED == 2
    return size + size / 4 + 64;
#else
    const int round = WARPS * 16;
    return min((size + round - 1) / round * round, size + size / 2 + 32);
#endif
}

INLINE Share find_share(const Params& p, const Row& row, const int* list) {
    int taken = row.taken, size = share_size(row);
    Share share;
    share.first = min(i64(row.part) * size, i64(taken));
    share.end = min(share.first + size, taken);
    share.list = list;
    share.q = queries_of(p, row);
    share.keys = reinterpret_cast<const data_t*>(p.keys) + row.batch * p.keys_b
        + row.kv_head * p.keys_h;
    share.values = reinterpret_cast<const data_t*>(p.values) + row.batch * p.values_b
        + row.kv_head * p.values_h;
    return share;
}

// Attend to this block's share of a row, whose first queries are kept already. `open`: see above.
INLINE void attend(const Params& p, const Row& row, const Share& share, bool open) {
    // Loops that need all registers need little of this.
    __shared__ Row kept;
    if (threadIdx.x == 0) kept = row;
#pragma unroll 1
    for (int head = 0; head < G; head += HEADS) {
        if (head > 0) {
            Queries queries;
            load_queries(p, kept, head, queries);
            keep_queries(queries);
        }
        __syncthreads();
#pragma unroll 1
        for (int lane0 = 0; lane0 < DV; lane0 += LANES)
            attend_pass(p, kept, share, head, lane0, open && head + lane0 == 0);
    }
}
