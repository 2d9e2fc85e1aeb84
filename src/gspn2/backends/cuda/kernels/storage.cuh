// Tensors as they are stored, and float32, in which everything is computed.
//
// Macros:
//   STORAGE   0 float32, 1 bfloat16, 2 float16
#pragma once
#include "ptx.cuh"

#if STORAGE == 0
typedef float storage_t;
#elif STORAGE == 1
typedef __nv_bfloat16 storage_t;
#else
typedef __half storage_t;
#endif

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

__device__ __forceinline__ storage_t narrow(float v) {
#if STORAGE == 0
  return v;
#elif STORAGE == 1
  return __float2bfloat16_rn(v);
#else
  return __float2half_rn(v);
#endif
}
