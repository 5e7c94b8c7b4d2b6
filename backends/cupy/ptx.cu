// What C++ has no words for: types, warp-wide operations, tensor-core products, clusters.
//
// Kernels use nothing of the machine but what stands here and a few CUDA built-ins, so that a test
// can compile them for a CPU with another file of this name.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INLINE __device__ __forceinline__
#define FULL 0xffffffffu

// fp16 and bf16 as 16-bit integers; DATA is 2 for bf16, 1 for fp16, 0 for fp32.

INLINE float widen_bf16(u16 x) { return __uint_as_float(u32(x) << 16); }

INLINE float widen_fp16(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

INLINE u16 narrow_fp16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two floats as a pair of 16-bit numbers, the first one in the low half.
INLINE u32 narrow_pair(float low, float high, int data) {
    u32 y;
    if (data == 1)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// 1 for numbers below zero; a NaN that comes of arithmetic is positive.
INLINE u32 is_below_zero(float x) { return __float_as_uint(x) >> 31; }

// 0xffff for each number of a pair that is at most that of another, or below it. What is compared are
// fp16 numbers that are not negative, so 15-bit integers, of which 0x7c01 and up are neither.
INLINE u32 pair_at_most(u32 x, u32 y) {
    u32 z;
    asm("set.le.u32.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
INLINE u32 pair_below(u32 x, u32 y) {
    u32 z;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Warp-wide operations; all 32 lanes take part.

INLINE u32 ballot(bool x) { return __ballot_sync(FULL, x); }
INLINE u32 from_lane(u32 x, int lane) { return __shfl_sync(FULL, x, lane); }
INLINE int from_lane(int x, int lane) { return __shfl_sync(FULL, x, lane); }
INLINE u64 from_lane(u64 x, int lane) { return __shfl_sync(FULL, x, lane); }
INLINE float from_lane(float x, int lane) { return __shfl_sync(FULL, x, lane); }
INLINE float across(float x, int mask) { return __shfl_xor_sync(FULL, x, mask); }
INLINE int across(int x, int mask) { return __shfl_xor_sync(FULL, x, mask); }
INLINE u32 across(u32 x, int mask) { return __shfl_xor_sync(FULL, x, mask); }
INLINE u32 from_below(u32 x, int distance) { return __shfl_up_sync(FULL, x, distance); }
INLINE u32 sum_of_warp(u32 x) { return __reduce_add_sync(FULL, x); }
INLINE void sync_warp() { __syncwarp(); }

// c += a b for a 16x16 and b 16x8 of 16-bit numbers. Lane 4g + j holds, with pairs in a register:
// a: (row g, columns 2j..), (g + 8, 2j..), (g, 2j + 8..), (g + 8, 2j + 8..);
// b: (rows 2j.., column g), (rows 2j + 8.., column g);
// c: (row g, column 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j + 1).
INLINE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int data) {
    if (data == 1)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d = c + the bits that a and b share, for a 16x256 and b 256x8 of bits. Lane 4g + j holds, with 32
// bits in a register: a: (row g, bits 32j..), (g + 8, 32j..), (g, 128 + 32j..), (g + 8, 128 + 32j..);
// b: (bits 32j.., column g), (128 + 32j.., column g); c and d as above, c the same in both rows.
INLINE void mma_bits(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int c0, int c1) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%10,%11};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
}

// Four 8x8 matrices of 16-bit numbers in shared memory; lane 8i + g knows row g of the i-th. Lane
// 4g + j gets columns 2j and 2j + 1 of row g of each.
INLINE void load_matrices(u32 (&x)[4], const uint4* row) {
    u32 shared = u32(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared)
                 : "memory");
}

// The same, transposed: columns become rows.
INLINE void load_transposed(u32 (&x)[4], const uint4* row) {
    u32 shared = u32(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared)
                 : "memory");
}

// Transpose an 8x8 matrix of 16-bit numbers: lane 4g + j holds row g, columns 2j and 2j + 1.
INLINE u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Memory.

// Copy 16 bytes to shared memory, without waiting; copies are counted in batches of a thread.
INLINE void copy_ahead(void* to, const void* from) {
    u32 shared = u32(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
// The same, or zeros unless `inside`.
INLINE void copy_ahead(void* to, const void* from, bool inside) {
    u32 shared = u32(__cvta_generic_to_shared(to));
    asm volatile("{ .reg .pred skips; setp.eq.s32 skips, %2, 0;\n"
                 "cp.async.cg.shared.global [%0], [%1], 16, skips; }" ::"r"(shared), "l"(from),
                 "r"(int(inside))
                 : "memory");
}
INLINE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until no more than so many of the thread's last batches are on their way.
template <int LEFT> INLINE void wait_for_batches() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Have the line of an address come to the second-level cache.
INLINE void fetch_line(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
}

// The same address in another block of the cluster.
INLINE char* in_block(char* p, u32 rank) {
    u64 q;
    asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
    return (char*)q;
}

// Every thread of every block of the cluster arrives, and waits until all have; what they wrote before
// they arrived is seen after the wait.
INLINE void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
INLINE void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
INLINE void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}

// Words of global memory by which blocks that run at the same time tell one another something. They
// come one by one: a word that has come says nothing of those before it.

INLINE void tell(u32* to, u32 x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
INLINE void tell(u16* to, u16 x) {
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
INLINE u32 look(const u32* p) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
INLINE uint2 look(const uint2* p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}

// Whoever looks again and again counts it. What never comes must become an error, not a hang: seconds
// of polling, then a trap.
INLINE void look_again(u32& tries) {
    if (++tries > (1u << 22)) asm volatile("trap;");
}

// Count an arrival and wait until `target` were counted; one thread of a block calls it, after the
// others have arrived at it. Release and acquire hold for what those others wrote and will read too,
// since barriers of the block lie between.
INLINE void arrive_and_wait(u32* counter, u32 target) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    for (u32 tries = 0;; look_again(tries)) {
        u32 seen;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        if (seen >= target) break;
    }
}

// The barrier that the driver keeps for a grid whose blocks all run at the same time (a cooperative
// launch). It is the one word of memory that needs no clearing: its highest bit changes when the last
// block has arrived. As in CUDA's cooperative groups, environment registers hold its place.
INLINE u32* grid_counter() {
    u32 low, high;
    asm("mov.u32 %0, %%envreg2;" : "=r"(low));
    asm("mov.u32 %0, %%envreg1;" : "=r"(high));
    return reinterpret_cast<u32*>((u64(high) << 32 | low) + 4);
}

// One thread of each block arrives, once; its warp's writes before are seen by whoever waited. Returns
// what to wait with.
INLINE u32 arrive_at_grid() {
    u32 before, mine = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(grid_counter()), "r"(mine) : "memory");
    return before;
}
INLINE void wait_for_grid(u32 before) {
    for (u32 tries = 0;; look_again(tries)) {
        u32 now;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(now) : "l"(grid_counter()) : "memory");
        if ((now ^ before) >> 31) break;
    }
}

// Launches that overlap: the next one may start; wait for what the one before wrote.
INLINE void let_next_start() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

INLINE void wait_for_previous() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Phases of a kernel that works on rows, in their order; benchmarks/phases.py reads when they end.
// CLOCKS: the address of 16 words for every block, if they are wanted. `after`: what must have come.
enum Phase {
    STARTED, LENGTH_HAS_COME, CODES_ASKED_FOR, QUERIES_HASHED, SCANNED, SUMS_LEFT, THRESHOLD_FOUND,
    POSITIONS_PUT, ATTENTION_STARTED, ATTENDED, WARPS_MET, WARPS_MERGED, PARTS_MERGED
};

INLINE void end_phase(Phase phase, int after = 0) {
#ifdef CLOCKS
    if (threadIdx.x > 0) return;
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer; // %1" : "=l"(now) : "r"(after) : "memory");
    reinterpret_cast<volatile u64*>(CLOCKS)[blockIdx.x * 16 + phase] = now;
#endif
}
