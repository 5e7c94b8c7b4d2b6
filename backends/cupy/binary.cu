// Distances on binary tensor cores.
//
// With c as in planes.cu, distance = sum of c + sum over the bits of a key of G - 2 c. The latter,
// halved where the group is even, is written in planes of two's complement, so the distance is a
// weighted sum of popcount(k & V_j). The first operand of a product is 32 vectors of 128 bits, row g
// vectors g and 16 + g. Of the second one, columns 0 to 3 are the planes for one key of a row, and
// columns 4 to 7 for another, with zeros for the row's other bits: codes of 128 bits take one product,
// codes of 64, of which a vector holds two, take one for each half of a row.
//
// R (64 or 128), KEYS (codes in a vector), GROUP, BITS (planes, 4 at most), HALVE.

// Planes, and words of shared memory that they take; sums of c follow them.
#define PLANE_COUNT BITS
#define PLANE_WORDS ((BITS + 1) * W)

// What a lane has of the planes: an operand, or halves of two, weights of its two columns, and where
// its sum starts.
struct Planes {
    u32 low, high;
    int first, second, start;
};

__host__ __device__ constexpr int weight_of(int plane) {
    return plane >= BITS ? 0 : plane == BITS - 1 ? -(1 << plane) : 1 << plane;
}

// The bits of all planes where `count` queries have a bit set.
INLINE u32 plane_bits(int count) { return u32(HALVE ? GROUP / 2 - count : GROUP - 2 * count); }

// The distance of a key of no bits.
INLINE int sum_of_counts(const u32* shared) {
    u32 sum = 0;
    // Halves of words are sums of their own.
    for (int i = 0; i < W; ++i) sum += shared[BITS * W + i];
    return int((sum & 0xffff) + (sum >> 16) >> HALVE);
}

INLINE Planes planes_of(const u32* shared) {
    const int column = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
    const u32 word = column % 4 < BITS ? shared[column % 4 * W + j % W] : 0;
#if KEYS == 1
    const u32 low = column < 4 ? word : 0, high = column < 4 ? 0 : word;
#else
    const u32 low = column / 4 == j / 2 ? word : 0, high = low;
#endif
    return {low, high, weight_of(j % 2 * 2), weight_of(j % 2 * 2 + 1),
            j % 2 ? 0 : sum_of_counts(shared)};
}

// Of a warp's 32 KEYS keys, the first that a lane finds the distance of; the other is 32 further on.
INLINE int own_key() {
    const int lane = threadIdx.x % 32, vector = lane / 4 + lane % 2 * 8;
    return KEYS == 1 ? vector + lane % 4 / 2 * 16 : 2 * vector + lane % 4 / 2;
}

// Two lanes share the columns of a key: each sums up its own for the keys of both.
INLINE u32 sum_of_columns(const int (&sum)[4], const Planes& planes) {
    // The first column of even lanes has weight 1: their sums start with the constant.
    const int first = sum[0] * planes.first + sum[1] * planes.second;
    const int second = sum[2] * planes.first + sum[3] * planes.second;
    const bool odd = threadIdx.x % 2;
    return u32((odd ? second : first) + across(odd ? first : second, 1));
}

// The distances of the lane's own keys (halved as in planes.cu), from the vectors of its warp, of
// which it knows where its own one as a thread lies.
INLINE void find_distances(u32 (&distance)[KEYS], const uint4* code, const Planes& planes) {
    u32 keys[4];
    int sum[4];
    load_matrices(keys, code);
#if KEYS == 1
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, planes.high, planes.start, 0);
    distance[0] = sum_of_columns(sum, planes);
#else
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, 0, planes.start, 0);
    distance[0] = sum_of_columns(sum, planes);
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], 0, planes.high, planes.start, 0);
    distance[1] = sum_of_columns(sum, planes);
#endif
}

// The distance of a key that a whole warp asks for, by counting.
INLINE u32 distance_by_warp(const u32* code, const Planes& planes, const u32* shared) {
    const int i = threadIdx.x % 32;
    const int mine = i < BITS * W ? weight_of(i / W) * int(__popc(code[i % W] & shared[i])) : 0;
    // The first lane's sum starts with that of a key of no bits.
    return u32(from_lane(planes.start, 0)) + sum_of_warp(u32(mine));
}
