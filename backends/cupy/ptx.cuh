// NVIDIA's intrinsics and PTX instructions, by their names.
//
// Kernels use nothing else of the machine but a few CUDA built-ins, so that a test can compile them
// for a CPU with another file in this one's place.
#pragma once

#include "config.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

template <bool B, typename X, typename Y> struct conditional { typedef X type; };
template <typename X, typename Y> struct conditional<false, X, Y> { typedef Y type; };
template <bool B, typename X, typename Y> using conditional_t = typename conditional<B, X, Y>::type;

// Arithmetic. fp16 and bf16 numbers are held as 16-bit integers.
enum DType { FP32, FP16, BF16 };

// A function that is one instruction of one operand.
#define UNARY(TO, name, FROM, instruction, to, from)    \
    INLINE TO name(FROM x) {                            \
        TO y;                                           \
        asm(instruction " %0, %1;" : to(y) : from(x));  \
        return y;                                       \
    }
UNARY(float, fp16_to_float, u16, "cvt.f32.f16", "=f", "h")
UNARY(u16, float_to_fp16, float, "cvt.rn.f16.f32", "=h", "f")
UNARY(float, lg2_approx, float, "lg2.approx.ftz.f32", "=f", "f")
UNARY(float, ex2_approx, float, "ex2.approx.ftz.f32", "=f", "f")

INLINE float bf16_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }

// Two floats as a pair of 16-bit numbers, the first one in the low half.
INLINE u32 float_to_pair(float low, float high, int dtype) {
    u32 y;
    if (dtype == FP16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// 1 for numbers below zero; a NaN that arithmetic makes is positive.
INLINE u32 sign_bit(float x) { return __float_as_uint(x) >> 31; }

// 0xffff for each number of a pair that is at most (or below) that of another. Numbers are fp16 and
// not negative, so they compare like 15-bit integers; those from 0x7c01 on are NaN.
INLINE u32 set_le_f16x2(u32 x, u32 y) {
    u32 z;
    asm("set.le.u32.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
INLINE u32 set_lt_f16x2(u32 x, u32 y) {
    u32 z;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// Warp-wide operations; all 32 lanes take part.

#define ALL_LANES 0xffffffffu
INLINE u32 ballot(bool x) { return __ballot_sync(ALL_LANES, x); }
template <typename T> INLINE T shfl(T x, int lane) { return __shfl_sync(ALL_LANES, x, lane); }
template <typename T> INLINE T shfl_xor(T x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
template <typename T> INLINE T shfl_up(T x, int n) { return __shfl_up_sync(ALL_LANES, x, n); }
INLINE u32 reduce_add(u32 x) { return __reduce_add_sync(ALL_LANES, x); }
INLINE void syncwarp() { __syncwarp(); }

// Tensor cores.

// c += a b for a [16, 16] and b [16, 8] of 16-bit numbers. Lane 4g + j holds, a pair a register:
// a: (row g, columns 2j..), (g + 8, 2j..), (g, 2j + 8..), (g + 8, 2j + 8..);
// b: (rows 2j.., column g), (rows 2j + 8.., column g);
// c: (row g, column 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j + 1).
INLINE void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int dtype) {
#define MMA_16(types)                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 "   \
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
    if (dtype == FP16) MMA_16("f16.f16");
    else MMA_16("bf16.bf16");
}

// d = c + popcount(a & b) for a [16, 256] and b [256, 8] bits. Lane 4g + j holds, 32 bits a register:
// a: (row g, bits 32j..), (g + 8, 32j..), (g, 128 + 32j..), (g + 8, 128 + 32j..);
// b: (bits 32j.., column g), (128 + 32j.., column g); d as c above; c is c0 in columns 2j, else 0.
INLINE void mma_m16n8k256_and_popc(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0) {
    asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%10,%11};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c0), "r"(0));
}

// Four [8, 8] matrices of 16-bit numbers in shared memory; lane 8i + g gives row g of the i-th. Lane
// 4g + j gets columns 2j and 2j + 1 of row g of each; of columns and rows instead, if transposed.
#define LDMATRIX_X4(kind)                                                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4." kind "shared.b16 {%0,%1,%2,%3}, [%4];"       \
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])                              \
                 : "r"(u32(__cvta_generic_to_shared(row))) : "memory")
INLINE void ldmatrix_x4(u32 (&x)[4], const uint4* row) { LDMATRIX_X4(""); }
INLINE void ldmatrix_x4_trans(u32 (&x)[4], const uint4* row) { LDMATRIX_X4("trans."); }

// Transpose an [8, 8] matrix of 16-bit numbers: lane 4g + j holds row g, columns 2j and 2j + 1.
INLINE u32 movmatrix_trans(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Copies and prefetches.

// Copy 16 bytes to shared memory, without waiting; zeros unless `valid`.
INLINE void cp_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
                 "r"(u32(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
INLINE void cp_async(void* to, const void* from, bool valid) {
    asm volatile("{ .reg .pred skips; setp.eq.s32 skips, %2, 0;\n"
                 "cp.async.cg.shared.global [%0], [%1], 16, skips; }" ::
                 "r"(u32(__cvta_generic_to_shared(to))), "l"(from), "r"(int(valid)) : "memory");
}
INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most so many of the thread's last groups are in flight.
template <int PENDING> INLINE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

INLINE void prefetch_l2(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
}

// An address in another block of the cluster.
INLINE char* mapa(char* p, u32 rank) {
    u64 q;
    asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
    return (char*)q;
}

// All threads of the cluster arrive; what they wrote before is seen after the wait.
INLINE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
INLINE void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Global memory that blocks which run at the same time share. Relaxed words come one by one: a word
// that has come says nothing of those before it.

INLINE void st_relaxed(u32* to, u32 x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
INLINE void st_relaxed(u16* to, u16 x) {
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
INLINE u32 ld_relaxed(const u32* p) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
INLINE uint2 ld_relaxed(const uint2* p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
INLINE u32 ld_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
INLINE void red_release_add(u32* to, u32 x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
INLINE u32 atom_release_add(u32* to, u32 x) {
    u32 before;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

// What never comes must become an error, not a hang: a trap after seconds of polling.
INLINE void poll(u32& tries) {
    if (++tries > (1u << 22)) asm volatile("trap;");
}

// The driver's barrier of a cooperative grid, the one word of memory that needs no clearing: its highest
// bit flips when the last block has arrived. Environment registers hold its place, as in CUDA's
// cooperative groups.
INLINE u32* grid_barrier() {
    u32 low, high;
    asm("mov.u32 %0, %%envreg2;" : "=r"(low));
    asm("mov.u32 %0, %%envreg1;" : "=r"(high));
    return reinterpret_cast<u32*>((u64(high) << 32 | low) + 4);
}

// One thread of each block arrives, once; what its warp wrote before is seen after the wait. Returns
// what to wait with.
INLINE u32 grid_arrive() {
    const u32 mine = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    return atom_release_add(grid_barrier(), mine);
}
INLINE void grid_wait(u32 arrival) {
    for (u32 tries = 0;; poll(tries))
        if ((ld_acquire(grid_barrier()) ^ arrival) >> 31) break;
}

// Programmatic dependent launch: the next kernel may start; wait for what the one before wrote.
INLINE void griddepcontrol_launch_dependents() {
    if constexpr (C::PDL) asm volatile("griddepcontrol.launch_dependents;");
}
INLINE void griddepcontrol_wait() {
    if constexpr (C::PDL) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Nanoseconds. `after`: what must have come before the clock is read.
INLINE u64 globaltimer(int after) {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer; // %1" : "=l"(now) : "r"(after) : "memory");
    return now;
}
