// Pairs of 16-bit numbers: of storage, and weights, which are float16.
#pragma once
#include "planes_tiles.cuh"

static_assert(STORAGE == 1 && NORMALIZE, "weights that planes_backward_weights.cu makes");

constexpr int EACH = 8;  // numbers in 16 bytes, the unit of copies

__device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ u32 packed(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return (u32)__bfloat16_as_ushort(v.x) | (u32)__bfloat16_as_ushort(v.y) << 16;
}
__device__ __forceinline__ float low_weight(u32 word) {
  return __half2float(__ushort_as_half((unsigned short)(word & 0xffffu)));
}
__device__ __forceinline__ float high_weight(u32 word) {
  return __half2float(__ushort_as_half((unsigned short)(word >> 16)));
}

// Eight numbers in registers. `i` is known to the compiler.
struct Eight {
  u32 word[4];

  __device__ __forceinline__ void read(const void* from) {
    const uint4 v = *(const uint4*)from;
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }
  __device__ __forceinline__ uint4 all() const { return make_uint4(word[0], word[1], word[2], word[3]); }
  __device__ __forceinline__ float operator[](int i) const {
    return i & 1 ? high(word[i / 2]) : low(word[i / 2]);
  }
  __device__ __forceinline__ float weight(int i) const {
    return i & 1 ? high_weight(word[i / 2]) : low_weight(word[i / 2]);
  }
};
