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

// Which of the keys in a vector are at most `key`: bit i for the i-th.
INLINE u32 at_most(const uint4& v, u32 key) {
#if ROUNDS == 1
    // Two 15-bit keys a word: the difference to 0x8000 more than `key` keeps its highest bit. The
    // product moves four such bits to the top.
    u32 most = key * 0x10001u | 0x80008000u;
    u32 low = (__byte_perm(most - v.x, most - v.y, 0x7531) & 0x80808080u) * 0x00204081u >> 28;
    u32 high = (__byte_perm(most - v.z, most - v.w, 0x7531) & 0x80808080u) * 0x00204081u >> 28;
    return low | high << 4;
#else
    return u32(v.x <= key) | u32(v.y <= key) << 1 | u32(v.z <= key) << 2 | u32(v.w <= key) << 3;
#endif
}
