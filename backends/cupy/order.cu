// Keys to select by: what the scan leaves per stored key, and the smallest of which win.
//
// A row's visible keys, from the last multiple of 16 before the first one on, are cut in PARTS of
// equal size, by their own number and whatever S is.
//
// ROUNDS, NARROW (counts fit 16 bits).

#if ROUNDS == 1
typedef u16 order_t;
#define NEVER 0x7fffu
#else
typedef u32 order_t;
#define NEVER 0xffffffffu
#endif

// Keys to select by in 16 bytes.
#define VECTOR int(16 / sizeof(order_t))

// What others read of a histogram.
#if NARROW
typedef u16 count_t;
#else
typedef u32 count_t;
#endif

INLINE int origin_of(const Row& row) { return row.start & ~15; }

// Keys of a part: whole vectors of codes and of keys to select by.
INLINE int part_size(const Row& row) {
    int size = (row.stop - origin_of(row) + PARTS - 1) / PARTS;
    return (size + 63) & ~63;
}

// Marks of 32 keys that are at most, or below, some key: of vectors that follow one another.
struct Marks {
    u32 halves[2];
};

template <bool BELOW> INLINE void mark(Marks& marks, const uint4& v, int place, u32 key) {
#if ROUNDS == 1
    // Two keys a word, of whose marks one bit each is kept: those of even keys in the low half.
    const u32 pair = key * 0x10001u;
    const int shift = place % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 word = i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
        const u32 found = BELOW ? pair_below(word, pair) : pair_at_most(word, pair);
        marks.halves[place / 2] |= found & 0x00020001u << (shift + 2 * i);
    }
#else
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        marks.halves[0] |= u32(BELOW ? words[i] < key : words[i] <= key) << (4 * place + i);
#endif
}

// Bit i for the i-th key.
INLINE u32 word_of(const Marks& marks) {
#if ROUNDS == 1
    const u32 first = marks.halves[0] | marks.halves[0] >> 16;
    const u32 second = marks.halves[1] | marks.halves[1] >> 16;
    return __byte_perm(first, second, 0x5410);
#else
    return marks.halves[0];
#endif
}
