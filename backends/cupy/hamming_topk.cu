// hamming_topk: the positions of the keys whose codes differ least.
//
// See row.cu for how the blocks of a row meet, scan.cu and select.cu for what they do.

#define FUSED 0
#define FRESH 0

#include "ptx.cu"
#include "row.cu"
#include "select.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hamming_topk(const __grid_constant__ Params p) {
    end_phase(STARTED);
    Row row = name_row(p);
    const Span span = ask_for_span(p, row);
    Hashing hashing;
    begin_hashing(p, row, hashing);
    look_at_row(p, row, span);
    end_phase(LENGTH_HAS_COME, row.stop);
    int* list = p.positions + row.index * p.k;
    int taken = min(row.taken, p.k);
    // Ranks that hold no key, and all ranks where every visible key is selected.
    int first = row.everything ? 0 : taken;
    for (i64 i = first + row.part * THREADS + threadIdx.x; i < p.k; i += PARTS * THREADS)
        list[i] = i < taken ? row.start + i : -1;
    select(p, row, hashing, list, 0);
#if JOINED == 1
    // Exchange areas must last until all parts have read them.
    meet(p, row);
#endif
}
