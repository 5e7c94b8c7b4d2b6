// hamming_topk: the positions of the keys whose codes differ least.
//
// In one launch, or in the one after `score` (SPLIT), whose blocks do not meet. See row.cu for how the
// blocks of a row meet, scan.cu, select.cu and ranks.cu for what they do.

#define FUSED 0
#define FRESH 0

#include "ptx.cu"
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

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hamming_topk(const __grid_constant__ Params p) {
    Row row = name_row(p);
    look_at_row(p, row);
    int* list = p.positions + row.index * p.k;
    int taken = min(row.taken, p.k);
    // Ranks that hold no key, and all ranks where every visible key is selected.
    int first = row.everything ? 0 : taken;
    for (i64 i = first + row.part * THREADS + threadIdx.x; i < p.k; i += PARTS * THREADS)
        list[i] = i < taken ? row.start + i : -1;
#if SPLIT
    __shared__ u32 totals[BINS];
    const int size = (taken + PARTS - 1) / PARTS, begin = min(i64(size) * row.part, i64(taken));
    const int end = min(begin + size, taken);
    for (int i = threadIdx.x; i < BINS; i += THREADS) totals[i] = 0;
    __syncthreads();
    // Also where there is nothing to do: what follows this launch must follow the one before.
    wait_for_previous();
    if (row.everything || begin == end) return;
    Range found = find_range(p, row, begin, end, totals);
    write_ranks(p, row, found, begin, end, list + begin);
#else
    u32 met = 0;
    Weights weights;
    select(p, row, weights, list, met);
#if JOINED == 1
    // Exchange areas must last until all parts have read them.
    meet(p, row, met);
#endif
#endif
}
