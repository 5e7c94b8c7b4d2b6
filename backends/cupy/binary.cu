// Distances on binary tensor cores.
//
// With c as in planes.cu, distance = sum of c + sum over the bits of a key of G - 2 c. The latter,
// halved where the group is even, is written in planes of two's complement, so the distance is a
// weighted sum of popcount(k & V_j). The first operand of a product is 16 rows of 256 bits, of the
// second one the columns are planes:
//
// - codes of 128 bits: row g is vectors g and 16 + g. Columns 0 to 3 are the planes for the first of
//   them, and columns 4 to 7 for the second, with zeros for the other;
// - codes of 64 bits: the same rows, of two keys a vector, and a product for each half of a row;
// - WIDE: codes of 128 bits with more than 4 planes, in a product for each half of the same rows; or
//   codes of 256 bits, a row each.
//
// R (64, 128 or 256), KEYS (codes in a vector), GROUP, WIDE, BITS (planes: 4 at most, 8 if WIDE), HALVE.

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
#if WIDE
    const u32* plane = shared + column * W;
    const u32 low = column < BITS ? plane[j] : 0, high = column < BITS ? plane[W - 4 + j] : 0;
    return {low, high, weight_of(j * 2), weight_of(j * 2 + 1), j ? 0 : sum_of_counts(shared)};
#else
    const u32 word = column % 4 < BITS ? shared[column % 4 * W + j % W] : 0;
#if KEYS == 1
    const u32 low = column < 4 ? word : 0, high = column < 4 ? 0 : word;
#else
    const u32 low = column / 4 == j / 2 ? word : 0, high = low;
#endif
    return {low, high, weight_of(j % 2 * 2), weight_of(j % 2 * 2 + 1),
            j % 2 ? 0 : sum_of_counts(shared)};
#endif
}

// Of a warp's 32 KEYS keys, the first that a lane finds the distance of; the other is 32 further on.
INLINE int own_key() {
    const int lane = threadIdx.x % 32;
#if WIDE
    return lane / 4 + lane % 4 * 8;
#else
    const int vector = lane / 4 + lane % 2 * 8;
    return KEYS == 1 ? vector + lane % 4 / 2 * 16 : 2 * vector + lane % 4 / 2;
#endif
}

// A lane's sum over its columns, of which the first of even (if WIDE, of the first) lanes has weight 1:
// their sums start with the constant.
INLINE int weighted(int first, int second, const Planes& planes) {
    return first * planes.first + second * planes.second;
}

#if WIDE

// Four lanes share the columns of four keys, and each takes a key: of rows g and g + 8 of two products.
INLINE u32 sum_of_columns(const int (&a)[4], const int (&b)[4], const Planes& planes) {
    const int sums[4] = {weighted(a[0], a[1], planes), weighted(a[2], a[3], planes),
                         weighted(b[0], b[1], planes), weighted(b[2], b[3], planes)};
    const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
    const int low = (odd ? sums[1] : sums[0]) + across(odd ? sums[0] : sums[1], 1);
    const int high = (odd ? sums[3] : sums[2]) + across(odd ? sums[2] : sums[3], 1);
    return u32((upper ? high : low) + across(upper ? low : high, 2));
}

#else

// Two lanes share the columns of a key: each sums up its own for the keys of both.
INLINE u32 sum_of_columns(const int (&sum)[4], const Planes& planes) {
    const int first = weighted(sum[0], sum[1], planes), second = weighted(sum[2], sum[3], planes);
    const bool odd = threadIdx.x % 2;
    return u32((odd ? second : first) + across(odd ? first : second, 1));
}

#endif

// The distances of the lane's own keys (halved as in planes.cu), from the codes of its warp in a slot.
INLINE void find_distances(u32 (&distance)[KEYS], const uint4* slot, const Planes& planes) {
    const int lane = threadIdx.x % 32;
    u32 keys[4];
    int sum[4];
#if WIDE
    int other[4];
#if R == 256
    // Rows of 16 keys: their first halves, then their second ones.
    load_matrices(keys, slot + place_of(lane % 16, lane / 16));
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, planes.high, planes.start, 0);
    load_matrices(keys, slot + place_of(lane % 16 + 16, lane / 16));
    mma_bits(other, keys[0], keys[1], keys[2], keys[3], planes.low, planes.high, planes.start, 0);
#else
    load_matrices(keys, slot + lane);
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, 0, planes.start, 0);
    mma_bits(other, keys[0], keys[1], keys[2], keys[3], 0, planes.low, planes.start, 0);
#endif
    distance[0] = sum_of_columns(sum, other, planes);
#else
    load_matrices(keys, slot + lane);
#if KEYS == 1
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, planes.high, planes.start, 0);
    distance[0] = sum_of_columns(sum, planes);
#else
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], planes.low, 0, planes.start, 0);
    distance[0] = sum_of_columns(sum, planes);
    mma_bits(sum, keys[0], keys[1], keys[2], keys[3], 0, planes.high, planes.start, 0);
    distance[1] = sum_of_columns(sum, planes);
#endif
#endif
}

// The distance of a key that a whole warp asks for, by counting.
INLINE u32 distance_by_warp(const u32* code, const Planes& planes, const u32* shared) {
    int mine = 0;
    for (int i = threadIdx.x % 32; i < BITS * W; i += 32)
        mine += weight_of(i / W) * int(__popc(code[i % W] & shared[i]));
    // The first lane's sum starts with that of a key of no bits.
    return u32(from_lane(planes.start, 0)) + sum_of_warp(u32(mine));
}
