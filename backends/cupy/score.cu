// score: the first launch of a split selection: keys to select by, and histograms of tiles.
//
// Blocks of a row do not meet: the second launch (ranks.cu) reads what all of them left. Codes of
// queries and fresh keys are made here, as in a fused step.

#include "ptx.cu"
#if FUSED
#include "vectors.cu"
#endif
#include "row.cu"
#include "order.cu"
#include "codes.cu"
#if BINARY
#include "binary.cu"
#else
#include "planes.cu"
#endif
#include "scan.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
score(const __grid_constant__ Params p) {
    let_next_start();
#if !FUSED
    // For the codes, which the launch before makes.
    wait_for_previous();
#endif
    Row row = name_row(p);
    Weights weights;
    load_weights(p, row, weights);
    look_at_row(p, row);
#if COUNTED
    // Counters of the launch after this one.
    if (row.part == 0 && threadIdx.x == 0) p.arrivals[row.index] = 0;
#endif
    // Codes of fresh keys are written even if all is taken, by the first block of the last token.
    bool writes = FUSED && FRESH > 0 && row.part == 0 && row.token == p.tokens - 1;
    if (row.everything && !writes) return;
    Part part = find_part(p, row);
    scan(p, row, part, weights);
    if (row.everything) return;
    __syncthreads();
    const u32* bins = counters(0);
    count_t* to = tallies_of(p, row) + row.part * (PER * BINS);
#if NARROW
    u32* pairs = reinterpret_cast<u32*>(to);
    for (int i = threadIdx.x; i < PER * BINS / 2; i += THREADS)
        pairs[i] = bins[2 * i] | bins[2 * i + 1] << 16;
#else
    for (int i = threadIdx.x; i < PER * BINS; i += THREADS) to[i] = bins[i];
#endif
}
