// From counts to positions: the threshold of a row, and where each part's keys go.
//
// No further pass over the codes: sums over the histograms of all parts give the threshold and how
// many keys at it win, those of the parts before give the rank of a part's first selected key, and the
// largest says whether parts select alike. Ranks count selected keys in ascending order of position.
//
// FETCHES: while parts wait for one another's sums, keys and values of likely winners come nearer.

#include "scan.cu"

struct Threshold {
    // Keys below it win, and the first `ties` of the row that equal it.
    u32 key;
    int ties;
    // Keys below it and at it in the parts before this one.
    int below, equal;
    // No part has more keys at most as large.
    int most;
};

// Of a part, for every digit and the end of all: how many keys have a smaller one.
#define SUMS (BINS + 8)
INLINE const count_t* sums(const char* exchange, int round) {
    return reinterpret_cast<const count_t*>(exchange) + round * SUMS;
}

// Two sums of a part, as they are read. JOINED 2: they are larger by 1, and zero until they come.
#if NARROW
typedef u32 pair_t;
INLINE u32 one_of(pair_t v, int i) { return i ? v >> 16 : v & 0xffff; }
INLINE pair_t smaller(pair_t v, pair_t w) { return __vminu2(v, w); }
INLINE pair_t larger(pair_t v, pair_t w) { return __vmaxu2(v, w); }
// What pairs add up to; sums of the first ones carry into those of the second.
struct Total { u32 both, second; };
INLINE void add(Total& total, pair_t v) { total.both += v, total.second += v >> 16; }
INLINE u32 one_of(const Total& total, int i) {
    return i ? total.second : total.both - (total.second << 16);
}
#else
typedef uint2 pair_t;
INLINE u32 one_of(pair_t v, int i) { return i ? v.y : v.x; }
INLINE pair_t smaller(pair_t v, pair_t w) { return {min(v.x, w.x), min(v.y, w.y)}; }
INLINE pair_t larger(pair_t v, pair_t w) { return {max(v.x, w.x), max(v.y, w.y)}; }
struct Total { u32 first, second; };
INLINE void add(Total& total, pair_t v) { total.first += v.x, total.second += v.y; }
INLINE u32 one_of(const Total& total, int i) { return i ? total.second : total.first; }
#endif

// Leave the sums of this part for all, and in this block's shared memory.
INLINE void leave_sums(const Params& p, const Row& row, int round) {
    constexpr int EACH = (BINS + THREADS - 1) / THREADS;
    count_t* to = const_cast<count_t*>(sums(memory, round));
    const int first = threadIdx.x * EACH;
    u32 mine[EACH], sum = 0, all;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        mine[i] = first + i < BINS ? counters(round)[first + i] : 0;
        sum += mine[i];
    }
    u32 before = sum_before(sum, all);
#if JOINED == 2
    count_t* seen = const_cast<count_t*>(sums(exchange_of(p, row, row.part), round));
#endif
    auto leave = [&](int bin, u32 keys) {
        to[bin] = count_t(keys);
#if JOINED == 2
        tell(seen + bin, count_t(keys + 1));
#endif
    };
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (first + i < BINS) leave(first + i, before);
        before += mine[i];
    }
    // The end, twice, since two are read at once.
    if (threadIdx.x < 2) leave(BINS + threadIdx.x, all);
}

// Warps that look at sums of all parts, two digits a lane.
#define LOOKING min((BINS + 61) / 62, THREADS / 32)

#if FETCHES

INLINE void fetch_row(const data_t* row, int size) {
#pragma unroll
    for (int i = 0; i < size; i += 128 / sizeof(data_t)) fetch_line(row + i);
}

// While others' sums are on their way, and memory is idle, warps that do not look at them have keys and
// values come nearer: those of a part's likely winners, which are as many of its best as an equal share.
// More would not come in time, and would only be in the way.
INLINE void fetch_likely(const Params& p, const Row& row, const Part& part) {
    const int first = int(threadIdx.x) - 32 * LOOKING, lane = threadIdx.x % 32;
    const u32 likely = row.budget / PARTS;
    if (first < 0 || likely > 128 || part.count > 1 << 14) return;
    const count_t* below = sums(memory, 0);
    // How many keys to select by have no more below them; one less is the largest of these.
    u32 key = 0;
#pragma unroll
    for (int bin = 0; bin <= BINS; bin += 32)
        key += __popc(ballot(bin + lane <= BINS && below[min(bin + lane, BINS)] <= likely));
    const data_t* keys = reinterpret_cast<const data_t*>(p.keys) + row.batch * p.keys_b
        + row.kv_head * p.keys_h;
    const data_t* values = reinterpret_cast<const data_t*>(p.values) + row.batch * p.values_b
        + row.kv_head * p.values_h;
#pragma unroll 1
    for (int i = first; i * VECTOR < part.count; i += THREADS - 32 * LOOKING) {
        Marks marks = {};
        mark<true>(marks, reinterpret_cast<const uint4*>(part.keys)[i], 0, key - 1);
#pragma unroll 1
        for (u32 left = word_of(marks); left; left &= left - 1) {
            const i64 position = part.low + i * VECTOR + __ffs(left) - 1;
            fetch_row(keys + position * p.keys_s, D);
            fetch_row(values + position * p.values_s, DV);
        }
    }
}

#endif

// Find the threshold. All threads call it, after the scan.
INLINE Threshold find_threshold(const Params& p, const Row& row, const Part& part) {
    __shared__ Threshold shared;
    Threshold found = {0, row.budget, 0, 0};
#pragma unroll 1
    for (int round = 0; round < ROUNDS; ++round) {
        if (round > 0) {
            int shift = round == 1 ? 21 : 10;
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < part.count; i += THREADS) {
                u32 key = part.keys[i];
                if (key != NEVER && key >> shift == found.key)
                    atomicAdd(counters(round) + digit_of(key, round), 1);
            }
        }
        __syncthreads();
        if (round == 0) end_phase(SCANNED);
        leave_sums(p, row, round);
        if (round == 0) end_phase(SUMS_LEFT);
#if JOINED < 2
        meet(p, row);
#elif FETCHES
        __syncthreads();
        fetch_likely(p, row, part);
#endif
        // A lane looks at two digits, and gets the end of the second from the next lane.
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int first = threadIdx.x / 32 * 62; first < BINS; first += THREADS / 32 * 62) {
            const int bin = min(first + 2 * lane, BINS);
            pair_t pairs[PARTS], least;
            // All at once: what takes time is the way there and back. And nothing but looks whether
            // they have come, else the compiler asks for the last when the first have.
            for (u32 tries = 0;; look_again(tries)) {
#pragma unroll
                for (int i = 0; i < PARTS; ++i)
                    pairs[i] = peer(reinterpret_cast<const pair_t*>(
                        sums(exchange_of(p, row, i), round) + bin));
                least = pairs[0];
#pragma unroll
                for (int i = 1; i < PARTS; ++i) least = smaller(least, pairs[i]);
                if (JOINED < 2 || !ballot(!one_of(least, 0) || !one_of(least, 1))) break;
            }
            Total of_all = {}, of_before = {};
            pair_t largest = pairs[0];
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                add(of_all, pairs[i]);
                add(of_before, i < row.part ? pairs[i] : pair_t{});
                largest = larger(largest, pairs[i]);
            }
            u32 total[3], before[3], most[3];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                total[c] = one_of(of_all, c) - (JOINED == 2) * PARTS;
                before[c] = one_of(of_before, c) - (JOINED == 2) * row.part;
                most[c] = one_of(largest, c) - (JOINED == 2);
            }
            total[2] = from_lane(total[0], lane + 1);
            before[2] = from_lane(before[0], lane + 1);
            most[2] = from_lane(most[0], lane + 1);
            const u32 need = found.ties;
#pragma unroll
            for (int c = 0; c < 2; ++c)
                if (lane < 31 && total[c] < need && need <= total[c + 1])
                    shared = {u32(bin + c), int(need - total[c]), int(before[c]),
                              int(before[c + 1] - before[c]), int(most[c + 1])};
        }
        __syncthreads();
        int bits = round == 0 ? 0 : round == 1 ? 11 : 10;
        found = {found.key << bits | shared.key, shared.ties, found.below + shared.below,
                 shared.equal, shared.most};
    }
    return found;
}

// What puts down positions, rank after rank: in memory, or (LISTED) where they are attended to.
struct Pen {
    int* list;
    int rank;
#if LISTED && JOINED == 1
    // Ranks of a part, which part that is, and the first rank of the next one.
    int size, part, end;
#endif
};

// `apart`: this block attends to what its own part selects, of which `first` is the first rank.
INLINE Pen pen_at(const Row& row, int* list, int rank, bool apart, int first) {
#if LISTED && JOINED == 1
    if (apart) return {own_list() - first, rank, 0, 0, -1};
    const int size = share_size(row), part = rank / u32(size), end = (part + 1) * size;
    list = reinterpret_cast<int*>(in_block(memory + LISTED, part)) - (end - size);
    return {list, rank, size, part, end};
#elif LISTED
    return {JOINED == 0 || apart ? own_list() - first : list, rank};
#else
    return {list, rank};
#endif
}

INLINE void put(Pen& pen, int position) {
#if LISTED && JOINED == 1
    if (pen.rank == pen.end) {
        pen.list = reinterpret_cast<int*>(in_block(memory + LISTED, ++pen.part)) - pen.end;
        pen.end += pen.size;
    }
#endif
    pen.list[pen.rank++] = position;
}

// Put down the positions of the part's selected keys. A thread takes vectors that follow one another,
// an odd number of them, so that a warp meets every bank of shared memory. It looks at keys once, and
// marks them; ranks are counts of marks, so ties cost what others do. MASKS: words of marks of a kind
// that it holds at once. Two counts share a word: what comes before a marked one of up to 65536 keys
// are fewer.
INLINE void write_positions(const Row& row, const Part& part, const Threshold& found, int* list,
                            bool apart, int start) {
    constexpr int GROUPED = 32 / VECTOR, MOST = MASKS * GROUPED - 1;
    const int vectors = (part.count + VECTOR - 1) / VECTOR;
    const int most = part.count > 65536 ? min(MOST, 65536 / (VECTOR * THREADS) - 1) : MOST;
    const int each = min((vectors + THREADS - 1) / THREADS | 1, most);
    const uint4* keys = reinterpret_cast<const uint4*>(part.keys);
    int below = found.below, equal = found.equal;
#pragma unroll 1
    for (int tile = 0; tile < vectors; tile += each * THREADS) {
        const int first = tile + threadIdx.x * each, last = min(first + each, vectors);
        if (tile > 0) __syncthreads();
        u32 under[MASKS], upto[MASKS], mine = 0, all;
#pragma unroll
        for (int m = 0; m < MASKS; ++m) {
            Marks low = {}, high = {};
#pragma unroll
            for (int v = 0; v < GROUPED; ++v) {
                int i = first + m * GROUPED + v;
                if (i >= last) break;
                const uint4 read = keys[i];
                mark<true>(low, read, v, found.key);
                mark<false>(high, read, v, found.key);
            }
            under[m] = word_of(low), upto[m] = word_of(high);
            mine += __popc(under[m]) << 16 | __popc(upto[m] ^ under[m]);
        }
        const u32 before = sum_before(mine, all);
        int ties = equal + int(before & 0xffff);
        Pen pen = pen_at(row, list, below + int(before >> 16) + min(ties, found.ties), apart, start);
#pragma unroll
        for (int m = 0; m < MASKS; ++m) {
            const int at = part.low + (first + m * GROUPED) * VECTOR - 1;
            // Of those at the threshold, the first few win.
            u32 left = ties < found.ties ? upto[m] : under[m];
#pragma unroll 1
            for (; left; left &= left - 1) {
                if (!(under[m] & left & -left) && ties++ >= found.ties) continue;
                put(pen, at + __ffs(left));
            }
        }
        below += int(all >> 16), equal += int(all & 0xffff);
    }
}

// What a block attends to, if to what its own part selects.
struct Own {
    bool apart;
    int count;
};

// Scan a row, unless all of its keys are taken, and leave the positions of the selected ones. Codes of
// fresh keys are made either way. `most`: keys that a block attends to at most, if to its part's own.
// After it all areas are clear.
INLINE Own select(const Params& p, const Row& row, Hashing& hashing, int* list, int most) {
    // Codes of fresh keys are written even so, by the first block of the last token.
    bool writes = FUSED && FRESH > 0 && row.part == 0 && row.token == p.tokens - 1;
    if (row.everything && !writes) {
        wait_for_areas(clear_area(p, row));
#if FUSED
        // Weights have come, where something else will be.
        wait_for_batches<0>();
        __syncthreads();
#endif
        return {};
    }
    Part part = find_part(p, row);
    scan(p, row, part, hashing);
    if (row.everything) return {};
    Threshold found = find_threshold(p, row, part);
    end_phase(THRESHOLD_FOUND);
    Own own = {LISTED && ROUNDS == 1 && PARTS > 1 && found.most <= most};
    const count_t* below = sums(memory, 0);
    if (own.apart)
        own.count = below[found.key]
            + max(min(found.ties - found.equal, int(below[found.key + 1] - below[found.key])), 0);
    write_positions(row, part, found, list, own.apart, found.below + min(found.equal, found.ties));
    end_phase(POSITIONS_PUT);
    return own;
}
