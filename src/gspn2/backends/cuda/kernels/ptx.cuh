// The instructions that CUDA C++ has no name for without its larger headers, one function each.
//
// GSPN2_EMULATE: the same functions on the host, so that kernels can be run by the test suite on a machine
// without a GPU (tests/cuda_emulator). Hence two rules for kernels: all shared memory is dynamic and comes from
// `shared_memory()`, and nothing outside this file is PTX.
#pragma once

#ifndef GSPN2_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define CONSTANT_PARAMS const __grid_constant__ Params

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The same pointer, in a register that is kept: the compiler would make it anew in every loop, which takes long. By whole
// warps.
__device__ __forceinline__ unsigned char* held_shared_memory() {
  return (unsigned char*)__cvta_shared_to_generic(__shfl_sync(0xffffffffu, shared_address(shared_memory()), 0));
}

// Arithmetic ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// Of a normal number whose reciprocal is normal.
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
#if STORAGE == 0
  // A unit in the last place of the sum of a place's weights would add up over the lines of a scan.
  r = fmaf(r, fmaf(-v, r, 1.f), r);
#endif
  return r;
}
// Of an error of 2^-11 at most; exactly 0 at 0, and 1 of large numbers.
__device__ __forceinline__ float tanh_fast(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// Half of each of the two bfloat16 numbers of a word.
__device__ __forceinline__ u32 halved_pair(u32 pair) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(0x3f003f00u), "r"(0x80008000u));
  return r;
}
// Two numbers as float16 ones, toward zero, the first in the lower half.
__device__ __forceinline__ u32 halves_toward_zero(float low, float high) {
  u32 r;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Minimum and maximum that keep a NaN.
__device__ __forceinline__ float fmin_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float fmax_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

#if STORAGE == 1 || STORAGE == 2
// sum += a b, on tensor cores: a 16 x 16 by rows, b 16 x 8 by columns, both of 16 bits; each lane has its part. By whole warps.
__device__ __forceinline__ void multiply_tiles(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
#if STORAGE == 1
#define GSPN2_MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define GSPN2_MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
  asm(GSPN2_MULTIPLY " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
#undef GSPN2_MULTIPLY
}
#endif

// The same value, of which the compiler knows nothing: what is made from it is made where it is used, and takes no register
// before.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ float opaque(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
// The same for an address: what lies at constant distances from it is reached by constants in the instructions.
template <typename T>
__device__ __forceinline__ T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// The larger of two numbers of 16 bits, without sign, in each half.
__device__ __forceinline__ u32 max_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 r;
  asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffffu, b & 0xffffu);
#endif
}

// Starts bringing the 128 bytes around p into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 16-byte streams: read once, written once; kept out of the way of what is used again -----------------------

__device__ __forceinline__ void store_stream(void* p, uint4 v) { __stcs((uint4*)p, v); }

// Asynchronous copies of 4, 8 or 16 bytes, aligned to their size (sm_80). `bytes` of the source are read, the
// rest is zero: 0 reads nothing, and the address may be anything then.
template <int SIZE>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = SIZE) {
  if (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(SIZE),
                 "r"(bytes)
                 : "memory");
}
// What the second-level cache does with data: give it up first, if it is read only once, or treat it as any other.
__device__ __forceinline__ u64 cache_policy(bool read_once) {
  u64 once, any;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(any));
  return read_once ? once : any;
}
// 16 bytes, and the 128 they lie in on their way to the second-level cache: the rest is asked for soon.
__device__ __forceinline__ void copy_async_wide(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same of the first `bytes`, and zeros: 0 reads nothing.
__device__ __forceinline__ void copy_async_wide(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers --------------------------------------------------------------------------------------------------

// A barrier of `threads` threads, whole warps, of the block; id 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barriers in shared memory that bulk copies complete on (sm_90).
__device__ __forceinline__ void mbarrier_init(u64* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Arrives for this thread when all that it has asked for by copy_async is there.
__device__ __forceinline__ void mbarrier_arrive_copied(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u64* bar, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}
// A run of bytes, a multiple of 16 and aligned to 16 on both sides, by the copy engine (sm_90).
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
__device__ __forceinline__ void bulk_copy_cached(void* shared, const void* global, u32 bytes, u64* bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
      : "memory");
}
// What ordinary stores wrote to global memory may then, after a barrier, be read by bulk copies.
__device__ __forceinline__ void copy_engine_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// Flags in global memory, between blocks of a launch. They are numbers that grow: who has waited for one sees all that its
// block's threads had written before it was raised, as far as these had met the thread that raised it. A block may wait
// for blocks before it in the grid only: these have been started.
__device__ __forceinline__ void raise_flag(u32* flag, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void wait_flag(const u32* flag, u32 value) {
  u32 now;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    if (now >= value) return;
    __nanosleep(32);
  }
}
// Clusters (sm_90): blocks that run together and see each other's shared memory -----------------------------

__device__ __forceinline__ u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// All threads of all blocks of the cluster. Orders shared and global memory between them.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address, usable by ordinary loads and stores, of `p` of this block's shared memory in block `rank`.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* p, u32 rank) {
  u64 r;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"((u64)p), "r"(rank));
  return (T*)r;
}
// WORDS (1, 2 or 4) words to `p` of block `rank`, where they count on its barrier `bar`: who waits there sees them,
// without a fence and without a barrier of all threads. `p` and `bar` are this block's.
template <int WORDS>
__device__ __forceinline__ void store_counted(void* p, u64* bar, u32 rank, const float* word) {
  u32 to, on;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(p)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(on) : "r"(shared_address(bar)), "r"(rank));
  if constexpr (WORDS == 4)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(word[0]), "f"(word[1]), "f"(word[2]), "f"(word[3]), "r"(on)
                 : "memory");
  else if constexpr (WORDS == 2)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(word[0]), "f"(word[1]), "r"(on)
                 : "memory");
  else
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(word[0]),
                 "r"(on)
                 : "memory");
}
#endif
