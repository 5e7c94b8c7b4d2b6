// sparse_attend: attention over given positions, in one launch. See attend.cu.

#include "ptx.cu"
#include "vectors.cu"
#include "row.cu"
#include "attend.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
sparse_attend(const __grid_constant__ Params p) {
    u32 met = 0;
    Row row = find_row(p);
    row.everything = false;
    const int* list = p.positions + row.batch * p.positions_b + row.head * p.positions_h
        + row.token * p.positions_t;
    Share share = find_share(p, row, list, p.k);
    keep_queries(p, share, 0);
    attend(p, row, share, met);
}
