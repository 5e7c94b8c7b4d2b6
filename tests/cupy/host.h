// A CPU in place of a GPU: what ptx.cuh and CUDA provide, for kernels compiled as host C++.
//
// Every CUDA thread is a fiber, every block an operating-system thread, and the blocks of a row run
// side by side. A warp-wide operation is a meeting of 32 fibers: each leaves its operand, waits until
// all have come, and reads those of the others. A meeting to which some lane never comes stops the
// process with a message, where a GPU would hang or guess.
//
// What is the same for all kernels is in host_main.cpp, which is compiled once.

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
#include <type_traits>
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
#define INLINE inline
#define UNROLL
#define NO_UNROLL

using std::conditional_t;
enum DType { FP32, FP16, BF16 };

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
extern __thread Index threadIdx, blockIdx;
extern __thread char* smem;

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

// Copies of a thread that are in flight.
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

extern __thread Block* here;

// Let the block's other fibers run.
void yield();

// Come to a meeting with an operand; returns the number of the meeting, whose operands stay until
// the meeting after the next.
u32 come(Meeting* m, u32 seat, u64 a, u64 b = 0, u64 c = 0);

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

// ptx.cuh.

INLINE float bf16_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }
INLINE float fp16_to_float(u16 x) { _Float16 y; memcpy(&y, &x, 2); return float(y); }
INLINE u16 float_to_fp16(float x) { _Float16 y = _Float16(x); u16 z; memcpy(&z, &y, 2); return z; }
INLINE u16 float_to_bf16(float x) {
    u32 y = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return u16((y + 0x7fff + (y >> 16 & 1)) >> 16);
}
INLINE u32 float_to_pair(float low, float high, int dtype) {
    return dtype == FP16 ? float_to_fp16(low) | u32(float_to_fp16(high)) << 16
                         : float_to_bf16(low) | u32(float_to_bf16(high)) << 16;
}
INLINE u32 set_le_f16x2(u32 x, u32 y) {
    u32 z = 0;
    for (int i = 0; i < 32; i += 16)
        z |= u32(fp16_to_float(u16(x >> i)) <= fp16_to_float(u16(y >> i))) * 0xffff << i;
    return z;
}
INLINE u32 set_lt_f16x2(u32 x, u32 y) {
    u32 z = 0;
    for (int i = 0; i < 32; i += 16)
        z |= u32(fp16_to_float(u16(x >> i)) < fp16_to_float(u16(y >> i))) * 0xffff << i;
    return z;
}
INLINE u32 sign_bit(float x) { return x < 0.f; }
INLINE float ex2_approx(float x) { return exp2f(x); }
INLINE float lg2_approx(float x) { return log2f(x); }
static inline float __fdividef(float x, float y) { return x / y; }

INLINE u32 ballot(bool x) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x), bits = 0;
    for (int i = 0; i < 32; ++i) bits |= u32(m->left[n][i][0] != 0) << i;
    return bits;
}
template <typename T> T shfl(T x, int lane) {
    u64 bits = 0;
    memcpy(&bits, &x, sizeof(T));
    Meeting* m = warp();
    u32 n = come(m, lane_id(), bits);
    memcpy(&x, m->left[n][lane & 31], sizeof(T));
    return x;
}
template <typename T> T shfl_xor(T x, int mask) { return shfl(x, lane_id() ^ mask); }
template <typename T> T shfl_up(T x, int n) {
    int from = int(lane_id()) - n;
    return shfl(x, from < 0 ? int(lane_id()) : from);
}
INLINE u32 reduce_add(u32 x) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x), sum = 0;
    for (int i = 0; i < 32; ++i) sum += u32(m->left[n][i][0]);
    return sum;
}
INLINE void syncwarp() { come(warp(), lane_id(), 0); }

static float number_of(u32 pair, int i, int dtype) {
    u16 x = u16(pair >> (16 * i));
    return dtype == FP16 ? fp16_to_float(x) : bf16_to_float(x);
}

INLINE void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int dtype) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), a0 | u64(a1) << 32, a2 | u64(a3) << 32, b0 | u64(b1) << 32);
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = g, column = 2 * j + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
            u64 a = m->left[n][row * 4 + k % 8 / 2][k / 8], b = m->left[n][column * 4 + k % 8 / 2][2];
            float x = number_of(u32(i / 2 ? a >> 32 : a), k % 2, dtype);
            float y = number_of(u32(k / 8 ? b >> 32 : b), k % 2, dtype);
            sum += double(x) * y;
        }
        c[i] = float(double(c[i]) + sum);
    }
}

INLINE void mma_m16n8k256_and_popc(int (&d)[4], const u32 (&x)[4], u32 b0, u32 b1, int c0) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), x[0] | u64(x[1]) << 32, x[2] | u64(x[3]) << 32, b0 | u64(b1) << 32);
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        int row = g, column = 2 * j + i % 2, sum = i % 2 ? 0 : c0;
        for (int k = 0; k < 8; ++k) {
            // Words 0 to 3 of a row are in the first registers of four lanes, 4 to 7 in the others.
            u64 a = m->left[n][row * 4 + k % 4][k / 4], b = m->left[n][column * 4 + k % 4][2];
            sum += __builtin_popcount(u32(i / 2 ? a >> 32 : a) & u32(k / 4 ? b >> 32 : b));
        }
        d[i] = sum;
    }
}

INLINE void ldmatrix_x4(u32 (&x)[4], const uint4* row) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), u64(row));
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i)
        x[i] = reinterpret_cast<const u32*>(m->left[n][8 * i + g][0])[j];
}

INLINE void ldmatrix_x4_trans(u32 (&x)[4], const uint4* row) {
    Meeting* m = warp();
    u32 n = come(m, lane_id(), u64(row));
    int g = lane_id() / 4, j = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
        u32 low = reinterpret_cast<const u16*>(m->left[n][8 * i + 2 * j][0])[g];
        u32 high = reinterpret_cast<const u16*>(m->left[n][8 * i + 2 * j + 1][0])[g];
        x[i] = low | high << 16;
    }
}

INLINE u32 movmatrix_trans(u32 x) {
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
INLINE void cp_async(void* to, const void* from, bool valid) {
    if (u64(to) % 16 || valid && u64(from) % 16) fprintf(stderr, "misaligned vector\n"), abort();
    Copy copy = {to, valid ? from : nullptr};
    if (blockIdx.x % 2) here->copies[threadIdx.x].open.push_back(copy);
    else copy_now(copy);
}
INLINE void cp_async(void* to, const void* from) { cp_async(to, from, true); }
INLINE void cp_async_commit() {
    Copies& mine = here->copies[threadIdx.x];
    mine.batches.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int PENDING> void cp_async_wait() {
    Copies& mine = here->copies[threadIdx.x];
    for (; mine.batches.size() > PENDING; mine.batches.pop_front())
        for (const Copy& copy : mine.batches.front()) copy_now(copy);
}
template <typename T> T __ldcg(const T* p) { T x; memcpy(&x, (const void*)p, sizeof(T)); return x; }
static inline u32 atomicAdd(u32* p, int x) { u32 before = *p; *p += x; return before; }

INLINE void prefetch_l2(const void* at) {}

INLINE char* mapa(char* p, u32 rank) {
    return here->cluster->memories[rank].data() + (p - smem);
}
INLINE void cluster_arrive() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (here->meeting != ~0u) fprintf(stderr, "a cluster's barrier is passed twice\n"), abort();
    here->meeting = here->cluster->arrive();
}
INLINE void cluster_wait() {
    __syncthreads();
    if (threadIdx.x == 0) {
        if (here->meeting == ~0u) fprintf(stderr, "nobody came to a cluster's barrier\n"), abort();
        here->cluster->wait(here->meeting);
        here->meeting = ~0u;
    }
    __syncthreads();
}
// Blocks that run side by side, of one row: more than is needed need not have cleared their areas.
template <typename T> static T word(const T* p) {
    return std::atomic_ref<T>(*const_cast<T*>(p)).load(std::memory_order_relaxed);
}
template <typename T> static void store_word_of(T* p, T x) {
    std::atomic_ref<T>(*p).store(x, std::memory_order_relaxed);
}
INLINE void st_relaxed(u32* to, u32 x) { store_word_of(to, x); }
INLINE void st_relaxed(u16* to, u16 x) { store_word_of(to, x); }
INLINE u32 ld_relaxed(const u32* p) { return word(p); }
INLINE uint2 ld_relaxed(const uint2* p) { return {word(&p->x), word(&p->y)}; }
INLINE u32 ld_acquire(const u32* p) { return std::atomic_ref<u32>(*const_cast<u32*>(p)).load(); }
INLINE void red_release_add(u32* to, u32 x) { std::atomic_ref<u32>(*to).fetch_add(x); }
// Other threads of this block, and other blocks, go on meanwhile.
INLINE void poll(u32& tries) {
    if (++tries > (1u << 24)) fprintf(stderr, "what a block looks for never comes\n"), abort();
    ++here->steps;
    std::this_thread::yield();
    yield();
}
INLINE u32 grid_arrive() {
    here->cluster->arrivals.fetch_add(1);
    return 0;
}
INLINE void grid_wait(u32 arrival) {
    for (u32 tries = 0; here->cluster->arrivals.load() < here->cluster->size;) poll(tries);
}
INLINE void griddepcontrol_launch_dependents() {}
INLINE void griddepcontrol_wait() {}
// No clocks here.
INLINE u64 globaltimer(int after) { return 0; }
