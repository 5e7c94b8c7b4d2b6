// hash_attend: one decode step (arXiv 2506.02572, Algorithm 3), in one launch, or in one after that of
// the codes.
//
// The blocks of a row scan its codes, meet to find the threshold, put down the positions of the
// selected keys, and where a part has not many more of them than others, attend to those of their own
// part; else they meet again and attend to equal shares. A row that sees no more keys than its
// budget, or than `dense_below`, attends to all of them; which regime holds is decided here, so that
// one captured graph serves both.
//
// LISTED: where the positions of a block's share lie in its shared memory; 0: all of a row's lie in
// global memory.

// Where memory is idle for long enough, keys to select by are at hand, and enough warps (of those that
// do not look at sums, 62 digits a warp) to ask for all in time.
#define FETCHES (JOINED == 2 && ROUNDS == 1 && !SPILL && (BINS + 61) / 62 + 4 <= THREADS / 32)

#include "ptx.cu"
#include "vectors.cu"
#include "row.cu"
#include "select.cu"
#include "attend.cu"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hash_attend(const __grid_constant__ Params p) {
    end_phase(STARTED);
    bool open = false;
#if !FUSED
    // For the codes, which the launch before makes.
    wait_for_previous();
#endif
    Row row = name_row(p);
    const Span span = ask_for_span(p, row);
    Hashing hashing;
    begin_hashing(p, row, hashing);
    Queries queries;
    load_queries(p, row, 0, queries);
    look_at_row(p, row, span);
    end_phase(LENGTH_HAS_COME, row.stop);
    int* list = p.positions + row.index * p.k;
    const Own own = select(p, row, hashing, list, most_apart(row));
    keep_queries(queries);
    Share share = find_share(p, row, list);
#if LISTED
    share.list = own_list() - share.first;
    if (own.apart) {
        share.first = 0, share.end = own.count;
        share.list = own_list();
    } else
#endif
    if (!row.everything) {
        meet(p, row);
        // Other blocks have read this one's sums.
        open = true;
#if LISTED && JOINED == 2
        // Put down by all blocks of the row.
        for (int i = share.first + threadIdx.x; i < share.end; i += THREADS)
            own_list()[i - share.first] = __ldcg(list + i);
#endif
    }
    end_phase(ATTENTION_STARTED);
    attend(p, row, share, open);
}
