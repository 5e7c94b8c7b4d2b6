// hash_attend: one decode step (arXiv 2506.02572, Algorithm 3), in one launch, or in one after that of
// the codes, or (SPLIT) in the one after `score`.
//
// In one launch, the blocks of a row scan its codes, meet to find the threshold, write down the
// positions of the selected keys, meet again, and attend to equal shares of them. In a split step
// blocks find the positions of their shares by themselves. A row that sees no more keys than its
// budget, or than `dense_below`, attends to all of them; which regime holds is decided here, so that
// one captured graph serves both.
//
// LISTED: a block's positions lie in shared memory, else (and always in one launch) in global memory.

#include "ptx.cu"
#include "vectors.cu"
#include "row.cu"
#include "order.cu"
#if SPLIT
#include "ranks.cu"
#else
#include "codes.cu"
#if BINARY
#include "binary.cu"
#else
#include "planes.cu"
#endif
#include "scan.cu"
#include "select.cu"
#endif
#include "attend.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hash_attend(const __grid_constant__ Params p) {
    u32 met = 0;
#if SPLIT
    Row row = name_row(p);
    Queries queries;
    load_queries(p, row, 0, queries);
    look_at_row(p, row);
    u32* totals = reinterpret_cast<u32*>(memory + EXCHANGE + QUERIES);
    for (int i = threadIdx.x; i < BINS; i += THREADS) totals[i] = 0;
    keep_queries(queries);
    __syncthreads();
    // For keys to select by, histograms and counters. Nothing is written before.
    wait_for_previous();
    Share share = find_share(p, row, p.positions + row.index * p.k);
    if (!row.everything && share.first < share.end) {
        Range found = find_range(p, row, share.first, share.end, totals);
#if LISTED
        int* list = reinterpret_cast<int*>(memory + LISTED);
        share.list = list - share.first;
#else
        int* list = p.positions + row.index * p.k + share.first;
#endif
        write_ranks(p, row, found, share.first, share.end, list);
    }
    attend(p, row, share, met);
#else
#if !FUSED
    // For the codes, which the launch before makes.
    wait_for_previous();
#endif
    Row row = name_row(p);
    Weights weights;
    load_weights(p, row, weights);
    Queries queries;
    load_queries(p, row, 0, queries);
    look_at_row(p, row);
    int* list = p.positions + row.index * p.k;
    Share share = find_share(p, row, list);
    select(p, row, weights, list, met);
    keep_queries(queries);
    if (!row.everything) meet(p, row, met);
    attend(p, row, share, met);
#endif
}
