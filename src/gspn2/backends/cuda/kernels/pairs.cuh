// Two neighbouring channels in memory and in registers. Macros:
//   STORAGE  of images: 0 float32, 1 bfloat16, 2 float16
//   WEIGHTS  of parameters, the same codes
#pragma once
#include "storage.cuh"

#if STORAGE == 0
typedef float2 pair_t;
#else
typedef u32 pair_t;
#endif

#if WEIGHTS == 0
typedef float weight_t;
#elif WEIGHTS == 1
typedef __nv_bfloat16 weight_t;
#else
typedef __half weight_t;
#endif

__device__ __forceinline__ pair_t no_pair() {
#if STORAGE == 0
  return make_float2(0.f, 0.f);
#else
  return 0u;
#endif
}

__device__ __forceinline__ float2 widen(pair_t v) {
#if STORAGE == 0
  return v;
#elif STORAGE == 1
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
  return make_float2(__half2float(__ushort_as_half((unsigned short)(v & 0xffffu))),
                     __half2float(__ushort_as_half((unsigned short)(v >> 16))));
#endif
}

__device__ __forceinline__ pair_t narrow(float2 v) {
#if STORAGE == 0
  return v;
#elif STORAGE == 1
  return (u32)__bfloat16_as_ushort(__float2bfloat16_rn(v.x)) | (u32)__bfloat16_as_ushort(__float2bfloat16_rn(v.y)) << 16;
#else
  return (u32)__half_as_ushort(__float2half_rn(v.x)) | (u32)__half_as_ushort(__float2half_rn(v.y)) << 16;
#endif
}
