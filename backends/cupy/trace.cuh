// When the phases of a kernel that works on rows end, as benchmarks/phases.py reads it.
#pragma once

#include "ptx.cuh"

enum Phase {
    STARTED, LENGTH_LOADED, CODES_REQUESTED, QUERIES_HASHED, SCANNED, SUMS_PUBLISHED, THRESHOLD_FOUND,
    POSITIONS_WRITTEN, ATTENTION_STARTED, ATTENDED, WARPS_JOINED, WARPS_COMBINED, SPLITS_COMBINED
};

// TRACE: the address of 16 words for every block; 0: no trace. `after`: what must have come.
INLINE void trace(Phase phase, int after = 0) {
    if constexpr (C::TRACE != 0)
        if (threadIdx.x == 0)
            reinterpret_cast<volatile u64*>(C::TRACE)[blockIdx.x * 16 + phase] = globaltimer(after);
}
