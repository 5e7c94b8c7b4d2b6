// hamming_topk: the positions of the keys whose codes differ least.
//
// See row.cuh for how the blocks of a row sync, scan.cuh and select.cuh for what they do.

#include "select.cuh"

extern "C" __global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM)
hamming_topk(const __grid_constant__ Params params) {
    trace(STARTED);
    Row row = find_row(params);
    load_span(params, row);
    GivenCodes queries;
    queries.begin(params, row);
    set_span(params, row);
    trace(LENGTH_LOADED, row.stop);
    int* list = params.positions + row.index * params.k;
    int selected = min(row.selected, params.k);
    // Ranks that hold no key, and all ranks of a dense row.
    int first = row.dense ? 0 : selected;
    for (i64 i = first + row.split * C::THREADS + threadIdx.x; i < params.k;
         i += C::NUM_SPLITS * C::THREADS)
        list[i] = i < selected ? row.start + i : -1;
    select(params, row, queries, list, 0, [](const Split&) {});
    // Exchange areas must last until all splits have read them.
    if constexpr (CLUSTER) row_sync(params, row);
}
