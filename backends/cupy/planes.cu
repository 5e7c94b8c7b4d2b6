// Distances by planes and adders.
//
// The distance of a key to a group of G query codes is the sum over its bits of G - c where the bit is
// set and of c where it is not, c being how many queries set it. Written in planes P_j of weights w_j
// that sum up to G, c = sum_j w_j P_j, so distance = sum_j w_j popcount(k ^ P_j): few planes stand for
// many queries. And as popcount is slow, words of one weight go through adders that leave one or two
// words a weight to be counted (Harley and Seal).
//
// R, GROUP, PLANES, HALVE (distances are halved: all those of a group have one parity).

// Words of shared memory that planes take.
#define PLANE_COUNT PLANES
#define PLANE_WORDS (PLANES * W)

struct Planes {
    u32 words[PLANE_WORDS];
};

// Weight of a plane: powers of two, and for the last one what is missing to the group.
__host__ __device__ constexpr int weight_of(int plane) {
    return plane < PLANES - 1 ? 1 << plane : GROUP - (1 << (PLANES - 1)) + 1;
}

__host__ __device__ constexpr int planes_at(int level) {
    int count = 0;
    for (int plane = 0; plane < PLANES; ++plane) count += weight_of(plane) >> level & 1;
    return count;
}

// Sum over words of 2^LEVEL and higher weights, with CARRIED words from the adders below.
template <int LEVEL, int CARRIED>
INLINE u32 tally(const u32* code, const u32* planes, const u32* carried) {
    constexpr int OWN = planes_at(LEVEL) * W, COUNT = OWN + CARRIED;
    if constexpr (COUNT == 0 && (GROUP >> LEVEL) == 0) {
        return 0;
    } else {
        u32 words[COUNT > 0 ? COUNT : 1], carries[COUNT > 2 ? (COUNT - 1) / 2 : 1];
        int count = 0;
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
            if (weight_of(plane) >> LEVEL & 1)
#pragma unroll
                for (int i = 0; i < W; ++i) words[count++] = code[i] ^ planes[plane * W + i];
#pragma unroll
        for (int i = 0; i < CARRIED; ++i) words[count++] = carried[i];
        u32 left = COUNT > 0 ? words[0] : 0;
#pragma unroll
        for (int i = 0; i < (COUNT - 1) / 2; ++i) {
            u32 a = words[2 * i + 1], b = words[2 * i + 2];
            carries[i] = (left & a) | (left & b) | (a & b);
            left ^= a ^ b;
        }
        u32 sum = __popc(left);
        if constexpr (COUNT > 0 && COUNT % 2 == 0) sum += __popc(words[COUNT - 1]);
        constexpr int UP = COUNT > 2 ? (COUNT - 1) / 2 : 0;
        return sum + 2 * tally<LEVEL + 1, UP>(code, planes, carries);
    }
}

// The bits of all planes where `count` queries have a bit set.
INLINE u32 plane_bits(int count) {
    const u32 above = count >= 1 << (PLANES - 1);
    return u32(count - int(above) * weight_of(PLANES - 1)) | above << (PLANES - 1);
}

INLINE Planes planes_of(const u32* shared) {
    Planes planes;
#pragma unroll
    for (int i = 0; i < PLANE_WORDS; ++i) planes.words[i] = shared[i];
    return planes;
}

// Half the distance where all have one parity, else the distance.
INLINE u32 distance_of(const u32* code, const Planes& planes, const u32* shared) {
    return tally<0, 0>(code, planes.words, nullptr) >> HALVE;
}

// The same of a key that a whole warp asks for.
INLINE u32 distance_by_warp(const u32* code, const Planes& planes, const u32* shared) {
    return distance_of(code, planes, shared);
}
