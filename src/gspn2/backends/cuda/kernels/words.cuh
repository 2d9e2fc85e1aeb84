// Vectors as words of stored elements, and restarts as lines come: what scans of aligned planes share.
#pragma once
#include "common.cuh"

// Words of two neighbouring elements (float32: of one).
__device__ __forceinline__ u32 stored(float first, float second) {
#if STORAGE == 0
  return __float_as_uint(first);
#elif STORAGE == 1
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *(const u32*)&pair;
#else
  const __half2 pair = __floats2half2_rn(first, second);
  return *(const u32*)&pair;
#endif
}

template <int WORDS>
__device__ __forceinline__ void read_words(u32* words, const void* from) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 four = ((const uint4*)from)[i / 4];
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  } else if (WORDS == 2) {
    const uint2 two = *(const uint2*)from;
    words[0] = two.x, words[1] = two.y;
  } else {
    words[0] = *(const u32*)from;
  }
}

template <int WORDS>
__device__ __forceinline__ void write_words(void* to, const u32* words) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      ((uint4*)to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  } else if (WORDS == 2) {
    *(uint2*)to = make_uint2(words[0], words[1]);
  } else {
    *(u32*)to = words[0];
  }
}

// Counts lines to the next restart; true where one is.
struct Restarts {
  int chunk, until;
  __device__ __forceinline__ bool next() {
    const bool now = until == 0;
    until = (now ? chunk : until) - 1;
    return now;
  }
};
