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
// `inside` exist. Lane i knows the position of the i-th row; `rows` begins with the first vector, and
// rows are `step` vectors apart, of which 32 bits count enough.
template <int EIGHTS, int (*PLACE)(int, int)>
INLINE void copy_side(const data_t* rows, u32 step, int known, int inside, uint4* stage) {
    const int lane = threadIdx.x % 32;
    // Where 8 keys more change nothing but the row, a lane's places are constants from these.
    constexpr int ROWS = 32 / EIGHTS, PERIOD = ROWS > 0 ? (8 + ROWS - 1) / ROWS : 1;
    uint4* places[PERIOD];
#pragma unroll
    for (int c = 0; c < PERIOD; ++c)
        places[c] = stage + PLACE(c * ROWS + lane / EIGHTS, lane % EIGHTS) - c * 32;
#pragma unroll
    for (int n = 0; n < EIGHTS / 2; ++n) {
        const int index = lane + 32 * n;
        const bool whole = 32 % EIGHTS == 0;
        const int key = whole ? n * ROWS + lane / EIGHTS : index / EIGHTS;
        const int eight = whole ? lane % EIGHTS : index % EIGHTS;
        const int position = from_lane(known, key), offset = 8 * eight < inside ? 8 * eight : 0;
        const uint4* row = reinterpret_cast<const uint4*>(rows + offset) + u32(max(position, 0)) * step;
        copy_ahead(whole ? places[n % PERIOD] + 32 * n : stage + PLACE(key, eight), row,
                   position >= 0 && 8 * eight < inside);
    }
}

INLINE void copy_rows(const Params& p, const Share& share, int known, int lane0, uint4* stage) {
    copy_side<4 * CHUNKS, key_place>(share.keys, u32(p.keys_s) / 8, known, D, stage);
    copy_side<LANES / 8, value_place>(share.values + lane0, u32(p.values_s) / 8, known, DV - lane0, stage);
    end_batch();
}
