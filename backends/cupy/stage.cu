// Keys and values of a warp on their way to shared memory: rings of stages of 16 rows.
//
// D, DV, LANES (value dimensions of a pass), CHUNKS (of 32 dimensions of a key), STAGES.

// Vectors of a stage: of 16 keys, and of as many values for the dimensions of a pass.
#define STAGE (16 * (4 * CHUNKS + LANES / 8))

// Where 8 dimensions of a row lie in a stage, so that lanes meet all banks.
INLINE int key_place(int key, int eight) {
    return key * (4 * CHUNKS) + (CHUNKS % 2 ? eight : eight ^ (key & 1) << 2);
}
INLINE int value_place(int key, int eight) {
    return 64 * CHUNKS + key * (LANES / 8) + (eight ^ (key / 2 & 3) << 1);
}

// Start the copies of one side of a stage: 16 rows of EIGHTS vectors, of which those that begin below
// `inside` exist. Lane i knows the position of the i-th row; `rows` begins with the first vector.
template <int EIGHTS, int (*PLACE)(int, int)>
INLINE void copy_side(const data_t* rows, u32 step, int known, int inside, uint4* stage) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < EIGHTS / 2; ++n) {
        int key, eight;
        if constexpr (32 % EIGHTS == 0)
            key = n * (32 / EIGHTS) + lane / EIGHTS, eight = lane % EIGHTS;
        else
            key = (lane + 32 * n) / EIGHTS, eight = (lane + 32 * n) % EIGHTS;
        int position = from_lane(known, key), offset = 8 * eight < inside ? 8 * eight : 0;
        copy_or_clear(stage + PLACE(key, eight), rows + offset + u64(max(position, 0)) * step,
                      position >= 0 && 8 * eight < inside);
    }
}

INLINE void copy_rows(const Params& p, const Share& share, int known, int lane0, uint4* stage) {
    copy_side<4 * CHUNKS, key_place>(share.keys, u32(p.keys_s), known, D, stage);
    copy_side<LANES / 8, value_place>(share.values + lane0, u32(p.values_s), known, DV - lane0, stage);
    end_batch();
}
