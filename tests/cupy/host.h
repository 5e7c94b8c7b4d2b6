// A CPU in place of a GPU: what ptx.cu and CUDA provide, for kernels compiled as host C++.
//
// Every CUDA thread is a fiber, every block an operating-system thread, and the blocks of a row run
// side by side. A warp-wide operation is a meeting of 32 fibers: each leaves its operand, waits until
// all have come, and reads those of the others. A meeting to which some lane never comes stops the
// process with a message, where a GPU would hang or guess.

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)
#define __shared__ static thread_local
#define INLINE static inline
#define FULL 0xffffffffu

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
static inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { return __uint_as_float(u32(x)); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __ffs(u32 x) { return __builtin_ffs(int(x)); }
static inline u32 __byte_perm(u32 a, u32 b, u32 pick) {
    u64 both = u64(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= u32(both >> (8 * (pick >> (4 * i) & 7)) & 255) << (8 * i);
    return out;
}

template <typename F> u32 for_halves(u32 x, u32 y, F f) {
    return f(x & 0xffff, y & 0xffff) | f(x >> 16, y >> 16) << 16;
}
static inline u32 __vminu2(u32 x, u32 y) { return for_halves(x, y, min<u32>); }
static inline u32 __vmaxu2(u32 x, u32 y) { return for_halves(x, y, max<u32>); }

struct Index { u32 x; };
static thread_local Index threadIdx, blockIdx;
static thread_local char* memory;

// Fibers.

struct Meeting {
    u32 come = 0, number = 0, size = 32;
    u64 left[2][1024][3];
};

struct Cluster {
    std::mutex lock;
    std::condition_variable changed;
    u32 size = 1, come = 0, number = 0;
    std::atomic<u32> arrivals{0};
    std::vector<std::vector<char>> memories;
    // The number of the meeting that a block has come to.
    u32 arrive() {
        std::unique_lock<std::mutex> held(lock);
        u32 mine = number;
        if (++come == size) {
            come = 0, ++number;
            changed.notify_all();
        }
        return mine;
    }
    void wait(u32 mine) {
        std::unique_lock<std::mutex> held(lock);
        changed.wait(held, [&] { return number != mine; });
    }
};

// Copies of a thread that are on their way.
struct Copy { void* to; const void* from; };
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> batches;
};

// A context is what it starts with. From then on jumps switch, since these ask nothing of the system.
struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf at;
};

struct Block {
    Cluster* cluster;
    std::vector<Copies> copies;
    std::vector<Fiber> fibers;
    std::vector<Meeting*> warps;
    Meeting* all;
    jmp_buf home;
    u64 steps = 0;
    // The meeting of the cluster that this block has come to and not waited for, else none.
    u32 meeting = ~0u;
};

static thread_local Block* here;

static void yield() {
    u32 me = threadIdx.x;
    if (_setjmp(here->fibers[me].at) == 0) _longjmp(here->home, 1);
    threadIdx.x = me;
}

// Come to a meeting with an operand; returns the number of the meeting, whose operands stay until
// the meeting after the next.
static u32 come(Meeting* m, u32 seat, u64 a, u64 b = 0, u64 c = 0) {
    u32 number = m->number;
    u64* mine = m->left[number % 2][seat];
    mine[0] = a, mine[1] = b, mine[2] = c;
    ++here->steps;
    if (++m->come == m->size) {
        m->come = 0, ++m->number;
    } else {
        while (m->number == number) yield();
    }
    return number % 2;
}

static Meeting* warp() { return here->warps[threadIdx.x / 32]; }
static u32 lane_id() { return threadIdx.x % 32; }

static void __syncthreads() { come(here->all, threadIdx.x, 0); }
static bool __syncthreads_or(bool x) {
    Meeting* m = here->all;
    u32 n = come(m, threadIdx.x, x);
    bool any = false;
    for (u32 i = 0; i < m->size; ++i) any |= m->left[n][i][0] != 0;
    return any;
}

// ptx.cu.

INLINE float widen_bf16(u16 x) { return __uint_as_float(u32(x) << 16); }
INLINE float widen_fp16(u16 x) { _Float16 y; memcpy(&y, &x, 2); return float(y); }
INLINE u16 narrow_fp16(float x) { _Float16 y = _Float16(x); u16 z; memcpy(&z, &y, 2); return z; }
INLINE u16 narrow_bf16(float x) {
    u32 y = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return u16((y + 0x7fff + (y >> 16 & 1)) >> 16);
}
INLINE u32 narrow_pair(float low, float high, int data) {
    return data == 1 ? narrow_fp16(low) | u32(narrow_fp16(high)) << 16
                     : narrow_bf16(low) | u32(narrow_bf16(high)) << 16;
}
INLINE u32 pair_at_most(u32 x, u32 y) {
    u32 z = 0;
    for (int i = 0; i < 32; i += 16)
        z |= u32(widen_fp16(u16(x >> i)) <= widen_fp16(u16(y >> i))) * 0xffff << i;
    return z;
}
INLINE u32 pair_below(u32 x, u32 y) {
    u32 z = 0;
    for (int i = 0; i < 32; i += 16)
        z |= u32(widen_fp16(u16(x >> i)) < widen_fp16(u16(y >> i))) * 0xffff << i;
    return z;
}
INLINE u32 is_below_zero(float x) { return x < 0.f; }
INLINE float exp2_fast(float x) { return exp2f(x); }
INLINE float log2_fast(float x) { return log2f(x); }
static inline float __fdividef(float x, float y) { return x / y; }

INLINE u32 ballot(bool x) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x), bits = 0;
    for (int i = 0; i < 32; ++i) bits |= u32(m->left[n][i][0] != 0) << i;
    return bits;
}
static u64 exchanged(u64 x, int from) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x);
    return m->left[n][from & 31][0];
}
INLINE u32 from_lane(u32 x, int lane) { return u32(exchanged(x, lane)); }
INLINE int from_lane(int x, int lane) { return int(exchanged(u32(x), lane)); }
INLINE u64 from_lane(u64 x, int lane) { return exchanged(x, lane); }
INLINE float from_lane(float x, int lane) {
    return __uint_as_float(u32(exchanged(__float_as_uint(x), lane)));
}
INLINE float across(float x, int mask) { return from_lane(x, lane_id() ^ mask); }
INLINE int across(int x, int mask) { return from_lane(x, lane_id() ^ mask); }
INLINE u32 across(u32 x, int mask) { return from_lane(x, lane_id() ^ mask); }
INLINE u32 from_below(u32 x, int distance) {
    int from = int(lane_id()) - distance;
    return u32(exchanged(x, from < 0 ? lane_id() : from));
}
INLINE u32 sum_of_warp(u32 x) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x), sum = 0;
    for (int i = 0; i < 32; ++i) sum += u32(m->left[n][i][0]);
    return sum;
}
INLINE void sync_warp() { come(warp(), lane_id(), 0); }

static float half_of(u32 pair, int i, int data) {
    u16 x = u16(pair >> (16 * i));
    return data == 1 ? widen_fp16(x) : widen_bf16(x);
}

INLINE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int data) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), a0 | u64(a1) << 32, a2 | u64(a3) << 32, b0 | u64(b1) << 32);
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = g, column = 2 * j + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
            u64 a = m->left[n][row * 4 + k % 8 / 2][k / 8], b = m->left[n][column * 4 + k % 8 / 2][2];
            float x = half_of(u32(i / 2 ? a >> 32 : a), k % 2, data);
            float y = half_of(u32(k / 8 ? b >> 32 : b), k % 2, data);
            sum += double(x) * y;
        }
        c[i] = float(double(c[i]) + sum);
    }
}

INLINE void mma_bits(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int c0, int c1) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), a0 | u64(a1) << 32, a2 | u64(a3) << 32, b0 | u64(b1) << 32);
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = g, column = 2 * j + i % 2, sum = i % 2 ? c1 : c0;
        for (int k = 0; k < 8; ++k) {
            // Words 0 to 3 of a row are in the first registers of four lanes, 4 to 7 in the others.
            u64 a = m->left[n][row * 4 + k % 4][k / 4], b = m->left[n][column * 4 + k % 4][2];
            sum += __builtin_popcount(u32(i / 2 ? a >> 32 : a) & u32(k / 4 ? b >> 32 : b));
        }
        d[i] = sum;
    }
}

INLINE void load_matrices(u32 (&x)[4], const uint4* row) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), u64(row));
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = reinterpret_cast<const u32*>(m->left[n][8 * i + g][0])[j];
}

INLINE void load_transposed(u32 (&x)[4], const uint4* row) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), u64(row));
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        u32 low = reinterpret_cast<const u16*>(m->left[n][8 * i + 2 * j][0])[g];
        u32 high = reinterpret_cast<const u16*>(m->left[n][8 * i + 2 * j + 1][0])[g];
        x[i] = low | high << 16;
    }
}

INLINE u32 transpose(u32 x) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x);
    int g = lane_id() / 4, j = lane_id() % 4;
    u32 low = u32(m->left[n][2 * j * 4 + g / 2][0]) >> (16 * (g % 2)) & 0xffff;
    u32 high = u32(m->left[n][(2 * j + 1) * 4 + g / 2][0]) >> (16 * (g % 2)) & 0xffff;
    return low | high << 16;
}

// An asynchronous copy happens at some time from its start to the wait for it: at once in blocks of
// even numbers, as late as may be in the others.
static void copy_now(const Copy& copy) {
    copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
}
INLINE void copy_ahead(void* to, const void* from, bool inside) {
    if (u64(to) % 16 || inside && u64(from) % 16) fprintf(stderr, "misaligned vector\n"), abort();
    Copy copy = {to, inside ? from : nullptr};
    if (blockIdx.x % 2) here->copies[threadIdx.x].open.push_back(copy);
    else copy_now(copy);
}
INLINE void copy_ahead(void* to, const void* from) { copy_ahead(to, from, true); }
INLINE void end_batch() {
    Copies& mine = here->copies[threadIdx.x];
    mine.batches.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int LEFT> void wait_for_batches() {
    Copies& mine = here->copies[threadIdx.x];
    for (; mine.batches.size() > LEFT; mine.batches.pop_front())
        for (const Copy& copy : mine.batches.front()) copy_now(copy);
}
template <typename T> T __ldcg(const T* p) { T x; memcpy(&x, (const void*)p, sizeof(T)); return x; }
static inline u32 atomicAdd(u32* p, int x) { u32 before = *p; *p += x; return before; }

INLINE void fetch_line(const void* at) {}

INLINE char* in_block(char* p, u32 rank) {
    return here->cluster->memories[rank].data() + (p - memory);
}
INLINE void arrive_at_cluster() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (here->meeting != ~0u) fprintf(stderr, "a cluster's barrier is passed twice\n"), abort();
    here->meeting = here->cluster->arrive();
}
INLINE void wait_for_cluster() {
    __syncthreads();
    if (threadIdx.x == 0) {
        if (here->meeting == ~0u) fprintf(stderr, "nobody came to a cluster's barrier\n"), abort();
        here->cluster->wait(here->meeting);
        here->meeting = ~0u;
    }
    __syncthreads();
}
INLINE void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}
// Blocks that run side by side, of one row: more than is needed need not have cleared their areas.
template <typename T> static T word(const T* p) {
    return std::atomic_ref<T>(*const_cast<T*>(p)).load(std::memory_order_relaxed);
}
template <typename T> static void tell_word(T* p, T x) {
    std::atomic_ref<T>(*p).store(x, std::memory_order_relaxed);
}
INLINE void tell(u32* to, u32 x) { tell_word(to, x); }
INLINE void tell(u16* to, u16 x) { tell_word(to, x); }
INLINE u32 look(const u32* p) { return word(p); }
INLINE uint2 look(const uint2* p) { return {word(&p->x), word(&p->y)}; }
// Other threads of this block, and other blocks, go on meanwhile.
INLINE void look_again(u32& tries) {
    if (++tries > (1u << 24)) fprintf(stderr, "what a block looks for never comes\n"), abort();
    ++here->steps;
    std::this_thread::yield();
    yield();
}
INLINE void arrive_and_wait(u32* counter, u32 target) {
    std::atomic_ref<u32> arrivals(*counter);
    arrivals.fetch_add(1);
    while (arrivals.load() < target) std::this_thread::yield();
}
INLINE u32 arrive_at_grid() {
    here->cluster->arrivals.fetch_add(1);
    return 0;
}
INLINE void wait_for_grid(u32 before) {
    for (u32 tries = 0; here->cluster->arrivals.load() < here->cluster->size;) look_again(tries);
}
INLINE void let_next_start() {}
INLINE void wait_for_previous() {}

// No clocks here.
enum Phase {
    STARTED, LENGTH_HAS_COME, CODES_ASKED_FOR, QUERIES_HASHED, SCANNED, SUMS_LEFT, THRESHOLD_FOUND,
    POSITIONS_PUT, ATTENTION_STARTED, ATTENDED, WARPS_MET, WARPS_MERGED, PARTS_MERGED
};
INLINE void end_phase(Phase, int = 0) {}
