// What forward and backward by a block for each direction share: a thread's pixels, read from tensors of any strides.
//
// Macros: VECTOR (1, 2 or 4) channels of a block
//         ADJACENT images and what is like them have VECTOR channels adjacent, aligned to so many
//         STORE_ADJACENT so have those that are written
#pragma once
#define PACK 1
#define ONE 1
#define SPLIT SCANS
#include "resident_sources.cuh"

#define STORAGE_BYTES (STORAGE == 0 ? 4 : 2)
#define WORDS (VECTOR * STORAGE_BYTES / 4)

// VECTOR numbers of a pixel.
struct Numbers {
#if ADJACENT && VECTOR * STORAGE_BYTES >= 4
  u32 w[WORDS];
#else
  storage_t of[VECTOR];
#endif
  __device__ __forceinline__ float operator[](int c) const {
#if ADJACENT && VECTOR * STORAGE_BYTES >= 4
#if STORAGE == 0
    return __uint_as_float(w[c]);
#else
    return c % 2 ? widen_high(w[c / 2]) : widen_low(w[c / 2]);
#endif
#else
    return widen(of[c]);
#endif
  }
};

__device__ __forceinline__ Numbers numbers_at(const storage_t* p, long long channel_step) {
  Numbers n;
#if ADJACENT && VECTOR * STORAGE_BYTES >= 4
  if constexpr (WORDS == 4) {
    const uint4 v = __ldg((const uint4*)p);
    n.w[0] = v.x, n.w[1] = v.y, n.w[2] = v.z, n.w[3] = v.w;
  } else if constexpr (WORDS == 2) {
    const uint2 v = __ldg((const uint2*)p);
    n.w[0] = v.x, n.w[1] = v.y;
  } else {
    n.w[0] = __ldg((const u32*)p);
  }
#else
#pragma unroll
  for (int c = 0; c < VECTOR; c++) n.of[c] = __ldg(p + c * channel_step);
#endif
  return n;
}

struct Pixel {
  int row, column, index;
  bool inside;  // of the image; a thread that is not looks at the last pixel
};

// This thread's pixel of a round.
__device__ __forceinline__ Pixel pixel_of(const Params& p, int round) {
  const int index = round * THREADS + threadIdx.x, last = p.height * p.width - 1, row = quotient(min(index, last), width_of(p));
  return {row, min(index, last) - row * p.width, index, index <= last};
}

// Elements from the first pixel of an image to this one: an image is no longer than 2^31 of them (the plan's promise).
__device__ __forceinline__ int distance(const View& v, const Pixel& pixel) { return pixel.row * (int)v.h + pixel.column * (int)v.w; }

// Where a pixel is in a plane.
__device__ __forceinline__ int place_of(const Params& p, bool vertical, const Pixel& pixel) {
  return vertical ? pixel.row * p.knobs[PITCH_V] + pixel.column : pixel.column * p.knobs[PITCH_H] + pixel.row;
}

// VECTOR numbers of a pixel, rounded.
__device__ __forceinline__ void store_numbers(const View& v, storage_t* out, const float (&f)[VECTOR]) {
#if STORE_ADJACENT && STORAGE == 0
  if constexpr (VECTOR == 4)
    *(float4*)out = make_float4(f[0], f[1], f[2], f[3]);
  else
    *(float2*)out = make_float2(f[0], f[1]);
#elif STORE_ADJACENT
  if constexpr (VECTOR == 4)
    *(uint2*)out = make_uint2(narrow_pair(f[0], f[1]), narrow_pair(f[2], f[3]));
  else
    *(u32*)out = narrow_pair(f[0], f[1]);
#else
#if STORAGE != 0 && VECTOR % 2 == 0
  if (paired(v)) {
#pragma unroll
    for (int c = 0; c < VECTOR; c += 2) *(u32*)(out + c) = narrow_pair(f[c], f[c + 1]);
    return;
  }
#endif
#pragma unroll
  for (int c = 0; c < VECTOR; c++) out[c * v.c] = narrow(f[c]);
#endif
}
