// CUDA C++ for g++: what kernels find on a GPU, on the host. Included before the kernel's source; see README.md.
#pragma once
#include <stdio.h>
#include <string.h>

#include <type_traits>

#include "numbers.h"
#include "runtime.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__ _Pragma("GCC error \"shared memory is dynamic: use shared_memory()\"")

// The bounds go to a section of their own, where the runtime looks for the largest block that may be launched.
#define GSPN2_JOIN_(a, b) a##b
#define GSPN2_JOIN(a, b) GSPN2_JOIN_(a, b)
#define KERNEL(threads, blocks)                                                                       \
  static_assert((threads) >= 1 && (threads) <= 1024, "launch bounds");                                \
  __attribute__((section("gspn2_bounds"), used)) static const int GSPN2_JOIN(launch_bounds_, __LINE__) = (threads); \
  extern "C" __attribute__((visibility("default"))) void
#define CONSTANT_PARAMS const Params&

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)
#define warpSize 32

#define EMULATED inline __attribute__((always_inline))

// ptx.cuh ---------------------------------------------------------------------------------------------------

EMULATED unsigned char* shared_memory() { return emulator::current->shared; }
EMULATED u32 shared_address(const void* p) { return emulator::shared_address(p); }
EMULATED u32 __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }
EMULATED unsigned char* held_shared_memory() { return shared_memory(); }

// Subnormal arguments and results count as 0.
EMULATED float flushed(float v) { return fabsf(v) < 1.17549435e-38f ? copysignf(0.f, v) : v; }
EMULATED float exp2_fast(float v) { return flushed(exp2f(flushed(v))); }
EMULATED float reciprocal(float v) {
  v = flushed(v);
  return v == 0.f ? copysignf(INFINITY, v) : flushed(1.f / v);
}
// Rounded to as many bits as the instruction promises.
EMULATED float tanh_fast(float v) {
  const float r = tanhf(v);
  return isnan(r) ? r : __uint_as_float((__float_as_uint(r) + 0x1000u) & 0xffffe000u);
}
EMULATED u32 halved_pair(u32 pair) {
  const auto half = [](u32 bits) { return u32(__bfloat16_as_ushort(__float2bfloat16_rn(.5f * __uint_as_float(bits << 16)))); };
  return half(pair & 0xffffu) | half(pair >> 16) << 16;
}
EMULATED u32 halves_toward_zero(float low, float high) {
  const auto cut = [](float v) {
    const __half h = __float2half_rn(v);
    const unsigned short bits = __half_as_ushort(h);
    // A float16 number that is further from zero than v is one too far.
    return u32(fabsf(__half2float(h)) > fabsf(v) ? bits - 1 : bits);
  };
  return cut(low) | cut(high) << 16;
}
EMULATED float fmin_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : fminf(a, b); }
EMULATED float fmax_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : fmaxf(a, b); }

template <typename T>
EMULATED T global_load(const T* p, const char* what) {
  emulator::check_global(p, sizeof(T), sizeof(T), emulator::READ, what);
  return *p;
}
template <typename T>
EMULATED void global_store(T* p, T v, const char* what) {
  emulator::check_global(p, sizeof(T), sizeof(T), emulator::WRITE, what);
  *p = v;
}
EMULATED u32 max_halves(u32 a, u32 b) {
  const u32 high = (a >> 16 > b >> 16 ? a : b) & 0xffff0000u;
  return high | ((a & 0xffffu) > (b & 0xffffu) ? a & 0xffffu : b & 0xffffu);
}
EMULATED void prefetch(const void*) {}
EMULATED uint4 load_stream(const void* p) { return global_load((const uint4*)p, "load_stream"); }
EMULATED void store_stream(void* p, uint4 v) { global_store((uint4*)p, v, "store_stream"); }

template <int SIZE>
EMULATED void copy_async(void* shared, const void* global, int bytes = SIZE) {
  static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16, "copy_async moves 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, SIZE, bytes);
}
EMULATED int opaque(int v) { return v; }
EMULATED float opaque(float v) { return v; }
template <typename T>
EMULATED T* opaque(T* p) { return p; }
EMULATED void copy_async_wide(void* shared, const void* global) { copy_async<16>(shared, global); }
EMULATED void copy_async_wide(void* shared, const void* global, int bytes) { copy_async<16>(shared, global, bytes); }
EMULATED u64 cache_policy(bool read_once) { return read_once; }
EMULATED void copy_commit() { emulator::copy_commit(); }
template <int PENDING>
EMULATED void copy_wait() {
  emulator::copy_wait(PENDING);
}

EMULATED void named_barrier(int id, int threads) { emulator::block_barrier(id, threads, 0); }
EMULATED void mbarrier_init(u64* bar, int count) { emulator::mbarrier_init(bar, count); }
EMULATED void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
EMULATED void mbarrier_arrive(u64* bar) { emulator::mbarrier_arrive(bar, 0, "mbarrier_arrive"); }
EMULATED void mbarrier_arrive_expect(u64* bar, u32 bytes) {
  emulator::mbarrier_arrive(bar, bytes, "mbarrier_arrive_expect");
}
// As early as it may be: whoever does not wait for the mbarrier is found as a race.
EMULATED void mbarrier_arrive_copied(u64* bar) {
  emulator::copy_commit();
  emulator::copy_wait(0);
  emulator::mbarrier_arrive(bar, 0, "mbarrier_arrive_copied");
}
EMULATED void mbarrier_wait(u64* bar, u32 parity) { emulator::mbarrier_wait(bar, parity); }
EMULATED void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  emulator::bulk_copy(shared, global, bytes, bar);
}
EMULATED void bulk_copy_cached(void* shared, const void* global, u32 bytes, u64* bar, u64) {
  bulk_copy(shared, global, bytes, bar);
}
EMULATED void raise_flag(u32* flag, u32 value) { emulator::raise_flag(flag, value); }
EMULATED void wait_flag(const u32* flag, u32 value) { emulator::wait_flag(flag, value); }
EMULATED void copy_engine_fence() { emulator::may_switch(); }
template <int WORDS>
EMULATED void store_counted(void* p, u64* bar, u32 rank, const float* word) {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "store_counted moves 1, 2 or 4 words");
  emulator::store_counted(p, bar, rank, word, WORDS);
}
EMULATED void bulk_store_fence() { emulator::bulk_store_fence(); }
EMULATED void bulk_store(void* global, const void* shared, u32 bytes) { emulator::bulk_store(global, shared, bytes); }
EMULATED void bulk_store_commit() { emulator::bulk_store_commit(); }
template <int PENDING>
EMULATED void bulk_store_wait_read() {
  emulator::bulk_store_wait(PENDING, true);
}
template <int PENDING>
EMULATED void bulk_store_wait() {
  emulator::bulk_store_wait(PENDING, false);
}

EMULATED u32 cluster_rank() { return emulator::current->rank; }
EMULATED void cluster_barrier() { emulator::cluster_barrier(); }
EMULATED void cluster_has_begun() {}
EMULATED void cluster_wait_begun() { emulator::cluster_barrier(); }
template <typename T>
EMULATED T* cluster_map(T* p, u32 rank) {
  return (T*)emulator::cluster_map(p, rank);
}

// CUDA C++ --------------------------------------------------------------------------------------------------

EMULATED void __syncthreads() { emulator::block_barrier(0, (int)blockDim.x, 0); }
EMULATED int __syncthreads_count(int predicate) { return emulator::block_barrier(0, (int)blockDim.x, !!predicate); }
EMULATED int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
EMULATED int __syncthreads_and(int predicate) { return __syncthreads_count(predicate) == (int)blockDim.x; }
EMULATED void __threadfence() { emulator::may_switch(); }
EMULATED void __threadfence_block() { emulator::may_switch(); }
EMULATED void __nanosleep(u32) { emulator::give_way(); }
EMULATED void __trap() { emulator::fail("__trap()"); }

#define GSPN2_LOAD(name) \
  template <typename T>  \
  EMULATED T name(const T* p) { return global_load(p, #name); }
GSPN2_LOAD(__ldg)
GSPN2_LOAD(__ldca)
GSPN2_LOAD(__ldcg)
GSPN2_LOAD(__ldcs)
GSPN2_LOAD(__ldcv)
GSPN2_LOAD(__ldlu)
#define GSPN2_STORE(name) \
  template <typename T>   \
  EMULATED void name(T* p, typename std::common_type<T>::type v) { global_store(p, v, #name); }
GSPN2_STORE(__stwb)
GSPN2_STORE(__stcg)
GSPN2_STORE(__stcs)
GSPN2_STORE(__stwt)

// Warps
EMULATED u32 lane_of_thread() { return emulator::current->thread.x % 32; }

template <typename T>
EMULATED T exchange(u32 mask, T value, u32 source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves at most 8 bytes");
  u64 bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulator::collective(emulator::SHUFFLE, mask, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
EMULATED T __shfl_sync(u32 mask, T value, int source, int width = 32) {
  const u32 lane = lane_of_thread(), first = lane & ~(u32)(width - 1);
  return exchange(mask, value, first + ((u32)source & (u32)(width - 1)));
}
template <typename T>
EMULATED T __shfl_up_sync(u32 mask, T value, u32 delta, int width = 32) {
  const u32 lane = lane_of_thread(), first = lane & ~(u32)(width - 1);
  return exchange(mask, value, lane >= first + delta ? lane - delta : lane);
}
template <typename T>
EMULATED T __shfl_down_sync(u32 mask, T value, u32 delta, int width = 32) {
  const u32 lane = lane_of_thread(), last = lane | (u32)(width - 1);
  return exchange(mask, value, lane + delta <= last ? lane + delta : lane);
}
template <typename T>
EMULATED T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32) {
  const u32 lane = lane_of_thread(), last = lane | (u32)(width - 1), source = lane ^ (u32)bits;
  return exchange(mask, value, source <= last ? source : lane);
}
// strips_ptx.cuh's.
EMULATED float fma_where(bool there, float a, float b, float sum) { return there ? fmaf(a, b, sum) : sum; }
#if defined(STORAGE) && STORAGE != 0
// ptx.cuh's: products of 16 bits summed in float32.
EMULATED float tile_number(u32 bits, int half) {
  const u32 number = half ? bits >> 16 : bits & 0xffffu;
#if STORAGE == 1
  float v;
  const u32 wide = number << 16;
  memcpy(&v, &wide, 4);
  return v;
#else
  return __half2float(__ushort_as_half((unsigned short)number));
#endif
}
EMULATED void multiply_tiles(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  const int lane = (int)lane_of_thread();
  for (int t = 0; t < 4; ++t) {
    const u32 a[4] = {__shfl_sync(~0u, a0, lane / 4 * 4 + t), __shfl_sync(~0u, a1, lane / 4 * 4 + t),
                      __shfl_sync(~0u, a2, lane / 4 * 4 + t), __shfl_sync(~0u, a3, lane / 4 * 4 + t)};
    for (int i = 0; i < 2; ++i) {
      const int column = (lane % 4 * 2 + i) * 4 + t;
      const u32 low = __shfl_sync(~0u, b.x, column), high = __shfl_sync(~0u, b.y, column);
      for (int half = 0; half < 2; ++half) {
        sum[i] += tile_number(a[0], half) * tile_number(low, half) + tile_number(a[2], half) * tile_number(high, half);
        sum[2 + i] += tile_number(a[1], half) * tile_number(low, half) + tile_number(a[3], half) * tile_number(high, half);
      }
    }
  }
}
#endif
EMULATED void __syncwarp(u32 mask = 0xffffffffu) { emulator::collective(emulator::SYNC, mask, 0, 0); }
EMULATED u32 __ballot_sync(u32 mask, int predicate) {
  return (u32)emulator::collective(emulator::BALLOT, mask, predicate != 0, 0);
}
EMULATED int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
EMULATED int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
// Which lanes run together is undefined; a kernel may rely on itself only.
EMULATED u32 __activemask() { return 1u << lane_of_thread(); }

#define GSPN2_REDUCE(name, type, kind) \
  EMULATED type name(u32 mask, type v) { return (type)emulator::collective(emulator::kind, mask, (u64)(long long)v, 0); }
GSPN2_REDUCE(__reduce_add_sync, u32, ADD)
GSPN2_REDUCE(__reduce_add_sync, int, ADD)
GSPN2_REDUCE(__reduce_min_sync, u32, MIN)
GSPN2_REDUCE(__reduce_min_sync, int, MIN_SIGNED)
GSPN2_REDUCE(__reduce_max_sync, u32, MAX)
GSPN2_REDUCE(__reduce_max_sync, int, MAX_SIGNED)
GSPN2_REDUCE(__reduce_and_sync, u32, AND)
GSPN2_REDUCE(__reduce_or_sync, u32, OR)
GSPN2_REDUCE(__reduce_xor_sync, u32, XOR)
