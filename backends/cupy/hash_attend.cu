// hash_attend: one decode step (arXiv 2506.02572, Algorithm 3), in one launch, or in one after that of
// the codes.
//
// The blocks of a row scan its codes, meet to find the threshold, write down the positions of the
// selected keys, meet again, and attend to equal shares of them. A row that sees no more keys than
// its budget, or than `dense_below`, attends to all of them; which regime holds is decided here, so
// that one captured graph serves both.

#include "ptx.cu"
#include "vectors.cu"
#include "row.cu"
#include "codes.cu"
#include "scan.cu"
#include "select.cu"
#include "attend.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hash_attend(const __grid_constant__ Params p) {
    u32 met = 0;
    wait_for_previous();
    Row row = find_row(p);
    int* list = p.positions + row.index * p.k;
    Share share = find_share(p, row, list, row.taken);
    keep_queries(p, share, 0);
    select(p, row, list, met);
    if (!row.everything) meet(p, row, met);
    attend(p, row, share, met);
}
