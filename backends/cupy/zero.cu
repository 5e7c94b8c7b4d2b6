// Zero some counters for the launch after this one, which may start at once: it waits before it
// counts. What came before this launch has finished when this launch has.
//
// OVERLAP.

#include "ptx.cu"

struct Params {
    u32* counters;
    i64 count;
};

extern "C" __global__ void __launch_bounds__(256) zero(const __grid_constant__ Params p) {
    let_next_start();
    i64 i = i64(blockIdx.x) * 256 + threadIdx.x;
    if (i < p.count) p.counters[i] = 0;
    wait_for_previous();
}
