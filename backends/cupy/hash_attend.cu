// hash_attend: one decode step (arXiv 2506.02572, Algorithm 3), in one launch, or in one after that of
// the codes.
//
// The blocks of a row scan its codes, sync to find the threshold, and write the positions of the
// selected keys. Where no split has many more of them than others, blocks attend to those of their own
// split; else they sync again and attend to equal numbers. A row that sees no more keys than its budget,
// or than `dense_below`, attends to all of them. Which case holds is decided here, so that one captured
// graph serves all.

#include "attend.cuh"
#include "fused.cuh"
#include "select.cuh"

typedef conditional_t<C::FUSED, FusedCodes<C::FRESH>, GivenCodes> Codes;

// Warps that read sums, 62 digits each.
constexpr int SUM_WARPS = (C::BINS + 61) / 62;
// Where memory is idle for long enough, scores are at hand, and enough other warps can ask for all in
// time.
constexpr bool PREFETCHES =
    COOPERATIVE && C::DIGITS == 1 && !C::SPILL && SUM_WARPS + 4 <= C::THREADS / 32;

INLINE void prefetch_row(const data_t* row, int size) {
    UNROLL for (int i = 0; i < size; i += 128 / sizeof(data_t)) prefetch_l2(row + i);
}

// Likely winners are as many of a split's best as an equal part of the budget. More would not come in
// time, and would only be in the way.
INLINE void prefetch_likely(const Params& params, const Row& row, const Split& split) {
    constexpr int FIRST = 32 * SUM_WARPS;
    const int first = int(threadIdx.x) - FIRST, lane = threadIdx.x % 32;
    const u32 likely = row.budget / C::NUM_SPLITS;
    if (first < 0 || likely > 128 || split.count > 1 << 14) return;
    const count_t* below = sums(smem, 0);
    // How many scores have no more below them; one less is the largest of these.
    u32 score = 0;
    UNROLL for (int bin = 0; bin <= C::BINS; bin += 32)
        score += __popc(ballot(bin + lane <= C::BINS && below[min(bin + lane, C::BINS)] <= likely));
    const data_t *keys = keys_of(params, row), *values = values_of(params, row);
    NO_UNROLL for (int i = first; i * VECTOR_SCORES < split.count; i += C::THREADS - FIRST) {
        Marks marks = {};
        mark<true>(marks, reinterpret_cast<const uint4*>(split.scores)[i], 0, score - 1);
        NO_UNROLL for (u32 left = word_of(marks); left; left &= left - 1) {
            const i64 position = split.low + i * VECTOR_SCORES + __ffs(left) - 1;
            prefetch_row(keys + position * params.keys_s, C::HEAD_DIM);
            prefetch_row(values + position * params.values_s, C::VALUE_DIM);
        }
    }
}

extern "C" __global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM)
hash_attend(const __grid_constant__ Params params) {
    trace(STARTED);
    bool exchange_free = false;
    // For the codes, which the launch before makes.
    if constexpr (!C::FUSED) griddepcontrol_wait();
    Row row = find_row(params);
    load_span(params, row);
    Codes codes;
    codes.begin(params, row);
    Queries queries;
    queries.load(params, row, 0);
    set_span(params, row);
    trace(LENGTH_LOADED, row.stop);
    int* positions = params.positions + row.index * params.k;
    const Local own = select(params, row, codes, positions, max_local(row), [&](const Split& split) {
        if constexpr (PREFETCHES) {
            __syncthreads();
            prefetch_likely(params, row, split);
        }
    });
    queries.write();
    Gather gather = find_gather(params, row, positions);
    if constexpr (C::POSITIONS_AT) gather.positions = smem_positions() - gather.first;
    if (C::POSITIONS_AT && own.local) {
        gather.first = 0, gather.end = own.count;
        gather.positions = smem_positions();
    } else if (!row.dense) {
        row_sync(params, row);
        // Other blocks have read this one's sums.
        exchange_free = true;
        // Written by all blocks of the row.
        if constexpr (C::POSITIONS_AT && COOPERATIVE)
            for (int i = gather.first + threadIdx.x; i < gather.end; i += C::THREADS)
                smem_positions()[i - gather.first] = __ldcg(positions + i);
    }
    trace(ATTENTION_STARTED);
    attend(params, row, gather, exchange_free);
}
