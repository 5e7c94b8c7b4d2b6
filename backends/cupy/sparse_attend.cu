// sparse_attend: attention over given positions, in one launch. See attend.cu.

#include "ptx.cu"
#include "vectors.cu"
#include "row.cu"
#include "attend.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
sparse_attend(const __grid_constant__ Params p) {
    Row row = name_row(p);
    Queries queries;
    load_queries(p, row, 0, queries);
    look_at_row(p, row, ask_for_span(p, row));
    row.everything = false;
    const int* list = p.positions + row.batch * p.positions_b + row.head * p.positions_h
        + row.token * p.positions_t;
    row.taken = p.k;
    Share share = find_share(p, row, list);
#if LISTED
    for (int i = share.first + threadIdx.x; i < share.end; i += THREADS)
        own_list()[i - share.first] = list[i] < p.slots ? list[i] : -1;
    share.list = own_list() - share.first;
#endif
    keep_queries(queries);
    wait_for_areas(clear_area(p, row));
    attend(p, row, share, false);
}
