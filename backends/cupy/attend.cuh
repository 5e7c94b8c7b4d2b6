// Attention over gathered keys, by all blocks of a row; the heads of a group share every key.
//
// Each block takes an equal number of the row's ranks, or what its own split selects (`max_local`). Warps,
// then splits, leave a maximum, a sum and an unnormalised output, which are combined in a fixed order.
// Every split combines a slice of the row's output: in a cluster the others write it into its memory,
// elsewhere it reads it from their exchange areas (from MERGE_AT on, of every pass).
#pragma once

#include "gather.cuh"
#include "trace.cuh"

// Floats of shared memory that warps' outputs take; their stats follow.
constexpr int OUT_FLOATS = C::ATTEND_WARPS * C::PASS_HEADS * ACC_STRIDE;
constexpr int PASS_ELEMENTS = C::PASS_HEADS * C::PASS_DIM;
// Elements that a split combines: whole warps, so of one head each.
constexpr int SLICE = (PASS_ELEMENTS / 32 + C::NUM_SPLITS - 1) / C::NUM_SPLITS * 32;
// Floats of an exchange area before the stats, and of a pass.
constexpr int STATS_AT = CLUSTER ? C::NUM_SPLITS * SLICE : PASS_ELEMENTS;
constexpr int PASS_FLOATS = STATS_AT + 2 * C::PASS_HEADS;

// Join the sink, normalise and store one element of the result.
INLINE void store_output(const Params& params, const Row& row, int h, int d, float acc, float m_i,
                         float l_i, bool any) {
    i64 head = i64(row.head) * C::GROUP + h;
    i64 at = (i64(row.batch) * params.heads * C::GROUP + head) * params.tokens + row.token;
    float sink = NEG_INF;
    if (params.sinks_kind) sink = load_optional(params.sinks, params.sinks_kind, head) * LOG2E;
    float reference = reference_of(fmaxf(m_i, sink));
    float alpha = ex2_approx(m_i - reference);
    l_i = l_i * alpha + ex2_approx(sink - reference);
    store(reinterpret_cast<data_t*>(params.out) + at * C::VALUE_DIM + d,
          any ? acc * __fdividef(alpha, l_i) : 0.f);
    if (d == 0 && params.lse != nullptr)
        params.lse[at] = any ? (reference + lg2_approx(l_i)) * LN2 : NEG_INF;
}

// The lanes that take turns in reading `n` of something, a power of two.
INLINE constexpr int spread(int n) { return n > 16 ? 32 : n > 8 ? 16 : n > 4 ? 8 : n > 2 ? 4 : n; }

// How COUNT parts of a softmax are combined, of which lanes i, i + spread(COUNT).. know the i-th. `alpha`
// scales the lane's part.
struct Combined {
    float alpha, m_i, l_i;
};
template <int COUNT> INLINE Combined combine(float m_i, float l_i) {
    const bool counts = int(threadIdx.x % spread(COUNT)) < COUNT;
    Combined all;
    all.m_i = m_i;
    UNROLL for (int mask = 1; mask < spread(COUNT); mask *= 2)
        all.m_i = fmaxf(all.m_i, shfl_xor(all.m_i, mask));
    all.alpha = ex2_approx(m_i - reference_of(all.m_i));
    all.l_i = counts ? all.alpha * l_i : 0.f;
    UNROLL for (int mask = 1; mask < spread(COUNT); mask *= 2) all.l_i += shfl_xor(all.l_i, mask);
    return all;
}

// The sum of a split without keys.
constexpr float NO_KEYS = -1.f;

// The bits of a float; -0 for zero, since zero says that nothing has come.
INLINE u32 nonzero_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return bits ? bits : 0x80000000u;
}

// Publish element i, and with the first of a head its stats, for the splits that combine them.
INLINE void publish(const Params& params, const Row& row, int pass, int i, float acc, float m_i,
                    float l_i) {
    const int h = i / C::PASS_DIM;
    const bool first = i % C::PASS_DIM == 0;
    if constexpr (CLUSTER) {
        const int to = i / SLICE;
        reinterpret_cast<float*>(mapa(smem, to))[row.split * SLICE + i - to * SLICE] = acc;
        for (int n = 0; n < (first ? C::NUM_SPLITS : 0); ++n) {
            float* stats =
                reinterpret_cast<float*>(mapa(smem, n)) + STATS_AT + row.split * 2 * C::PASS_HEADS;
            stats[h] = m_i, stats[C::PASS_HEADS + h] = l_i;
        }
    } else {
        u32* area = reinterpret_cast<u32*>(exchange_area(params, row, row.split) + C::MERGE_AT)
            + pass * PASS_FLOATS;
        st_relaxed(area + i, nonzero_bits(acc));
        if (first) {
            st_relaxed(area + STATS_AT + h, nonzero_bits(m_i));
            st_relaxed(area + STATS_AT + C::PASS_HEADS + h, nonzero_bits(l_i));
        }
    }
}

// Element i of split `n`. COOPERATIVE: zero until it has come.
INLINE u32 load_element(const Params& params, const Row& row, int pass, int n, int i) {
    if constexpr (CLUSTER)
        return reinterpret_cast<const u32*>(smem)[n * SLICE + i - row.split * SLICE];
    return ld_relaxed(reinterpret_cast<const u32*>(exchange_area(params, row, n) + C::MERGE_AT)
                      + pass * PASS_FLOATS + i);
}

// The i-th of its stats: PASS_HEADS maxima, then sums.
INLINE u32 load_stat(const Params& params, const Row& row, int pass, int n, int i) {
    if constexpr (CLUSTER)
        return reinterpret_cast<const u32*>(smem)[STATS_AT + n * 2 * C::PASS_HEADS + i];
    return load_element(params, row, pass, n, STATS_AT + i);
}

// One pass: PASS_HEADS heads from `head` on, PASS_DIM value dimensions from `dim0` on. `exchange_free`:
// no block of the row needs what its exchange area holds.
INLINE void attend_pass(const Params& params, const Row& row, const Gather& gather, int head,
                        int dim0, bool exchange_free) {
    if constexpr (CLUSTER)
        if (!exchange_free) cluster_arrive();
    const int pass =
        head / C::PASS_HEADS * ((C::VALUE_DIM + C::PASS_DIM - 1) / C::PASS_DIM) + dim0 / C::PASS_DIM;
    float* outs = reinterpret_cast<float*>(smem + C::EXCHANGE_BYTES + C::QUERY_BYTES);
    float* stats = outs + OUT_FLOATS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Warps that have keys.
    int used = min((gather.end - gather.first + WARP_KEYS - 1) / WARP_KEYS, C::ATTEND_WARPS);
    bool any = false;
    if (warp < used) {
        float *own = outs + warp * C::PASS_HEADS * ACC_STRIDE, *own_stats = stats + warp * C::PASS_HEADS;
        if constexpr (C::DTYPE == FP32)
            any = attend_warp_fp32(params, row, gather, head, dim0, own, own_stats);
        else any = attend_warp_mma(params, row, gather, head, dim0, own, own_stats);
    }
    trace(ATTENDED, any);
    any = __syncthreads_or(any);
    trace(WARPS_JOINED);
    if constexpr (CLUSTER)
        if (!exchange_free) cluster_wait();
    NO_UNROLL for (int i = threadIdx.x; i < PASS_ELEMENTS; i += C::THREADS) {
        const int h = i / C::PASS_DIM, d = i % C::PASS_DIM;
        // A lane weighs what one warp has left of the head.
        const int one = lane % spread(C::ATTEND_WARPS);
        const Combined mine = combine<C::ATTEND_WARPS>(
            one < used ? stats[one * C::PASS_HEADS + h] : NEG_INF,
            one < used ? stats[(C::ATTEND_WARPS + one) * C::PASS_HEADS + h] : 0.f);
        float acc = 0.f;
        UNROLL for (int w = 0; w < C::ATTEND_WARPS; ++w) {
            const float alpha = shfl(mine.alpha, w);
            if (w < used) acc += alpha * outs[(w * C::PASS_HEADS + h) * ACC_STRIDE + d];
        }
        if constexpr (C::NUM_SPLITS > 1)
            publish(params, row, pass, i, acc, mine.m_i, any ? mine.l_i : NO_KEYS);
        else if (head + h < C::GROUP && dim0 + d < C::VALUE_DIM)
            store_output(params, row, head + h, dim0 + d, acc, mine.m_i, mine.l_i, any);
    }
    trace(WARPS_COMBINED);
    if constexpr (C::NUM_SPLITS > 1) {
        if constexpr (CLUSTER) row_sync(params, row);
        int end = min((row.split + 1) * SLICE, PASS_ELEMENTS);
        NO_UNROLL for (int i = row.split * SLICE + threadIdx.x; i < end; i += C::THREADS) {
            const int h = i / C::PASS_DIM, d = i % C::PASS_DIM;
            const int n = min(lane % spread(C::NUM_SPLITS), C::NUM_SPLITS - 1);
            u32 m_i, l_i, acc[C::NUM_SPLITS];
            // As in select.cuh: all at once, and nothing but loads.
            for (u32 tries = 0;; poll(tries)) {
                m_i = load_stat(params, row, pass, n, h);
                l_i = load_stat(params, row, pass, n, C::PASS_HEADS + h);
                UNROLL for (int n = 0; n < C::NUM_SPLITS; ++n) acc[n] = load_element(params, row, pass, n, i);
                bool come = m_i && l_i;
                UNROLL for (int n = 0; n < C::NUM_SPLITS; ++n) come &= acc[n] != 0;
                if (!COOPERATIVE || !ballot(!come)) break;
            }
            const bool found = ballot(__uint_as_float(l_i) != NO_KEYS);
            const Combined all =
                combine<C::NUM_SPLITS>(__uint_as_float(m_i), __uint_as_float(l_i));
            float value = 0.f;
            UNROLL for (int n = 0; n < C::NUM_SPLITS; ++n)
                value += shfl(all.alpha, n) * __uint_as_float(acc[n]);
            if (head + h < C::GROUP && dim0 + d < C::VALUE_DIM)
                store_output(params, row, head + h, dim0 + d, value, all.m_i, all.l_i, found);
        }
        trace(SPLITS_COMBINED);
    }
    // The next pass writes what warps have combined.
    if (!CLUSTER && (head + C::PASS_HEADS < C::GROUP || dim0 + C::PASS_DIM < C::VALUE_DIM))
        __syncthreads();
}

// Keys of its own split up to which a block attends to those rather than to an equal number: half more,
// but not another round of its warps; COOPERATIVE, where another sync costs more, a quarter more and 64.
INLINE int max_local(const Row& row) {
    const int size = ranks_per_split(row);
    if constexpr (COOPERATIVE) return size + size / 4 + 64;
    const int round = C::ATTEND_WARPS * 16;
    return min((size + round - 1) / round * round, size + size / 2 + 32);
}

INLINE Gather find_gather(const Params& params, const Row& row, const int* positions) {
    int selected = row.selected, size = ranks_per_split(row);
    Gather gather;
    gather.first = min(i64(row.split) * size, i64(selected));
    gather.end = min(gather.first + size, selected);
    gather.positions = positions;
    gather.q = queries_of(params, row);
    gather.keys = keys_of(params, row);
    gather.values = values_of(params, row);
    return gather;
}

// Attend to what this block gathers; the first queries are in shared memory already.
INLINE void attend(const Params& params, const Row& row, const Gather& gather, bool exchange_free) {
    // Loops that need all registers need little of this.
    __shared__ Row kept;
    if (threadIdx.x == 0) kept = row;
    NO_UNROLL for (int head = 0; head < C::GROUP; head += C::PASS_HEADS) {
        if (head > 0) {
            Queries queries;
            queries.load(params, kept, head);
            queries.write();
        }
        __syncthreads();
        NO_UNROLL for (int dim0 = 0; dim0 < C::VALUE_DIM; dim0 += C::PASS_DIM)
            attend_pass(params, kept, gather, head, dim0, exchange_free && head + dim0 == 0);
    }
}
