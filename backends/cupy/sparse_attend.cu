// sparse_attend: attention over given positions, in one launch. See attend.cuh.

#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM)
sparse_attend(const __grid_constant__ Params params) {
    Row row = find_row(params);
    Queries queries;
    queries.load(params, row, 0);
    load_span(params, row);
    set_span(params, row);
    row.dense = false;
    const int* positions = params.positions + row.batch * params.positions_b
        + row.head * params.positions_h + row.token * params.positions_t;
    row.selected = params.k;
    Gather gather = find_gather(params, row, positions);
    if constexpr (C::POSITIONS_AT) {
        for (int i = gather.first + threadIdx.x; i < gather.end; i += C::THREADS)
            smem_positions()[i - gather.first] = positions[i] < params.slots ? positions[i] : -1;
        gather.positions = smem_positions() - gather.first;
    }
    queries.write();
    wait_exchange(clear_exchange(params, row));
    attend(params, row, gather, false);
}
