// Images with their channels innermost, (B, N, C): what the kernels here share. Every thread keeps to eight adjacent
// channels, or fewer where they take more than 16 bytes, and walks over pixels: what belongs to a channel stays in
// registers.
//
// Macros:
//   STORAGE   0 float32, 1 bfloat16, 2 float16
//   SILU      1: x sigmoid(x) comes last
#pragma once
#include "storage.cuh"

#define WIDTH (16 / (int)sizeof(storage_t))

struct Params {
  const storage_t* x;
  storage_t* y;
  float2* moments;  // (B, slabs, C): mean, sum of squared differences from it
  float2* affine;   // (B, C): scale, shift
  const storage_t* weight;
  const storage_t* bias;
  long long pixels;
  int batch, channels, groups, slabs, vectors, rows;
  float eps;
  int unused;
};

struct __align__(16) Vector {
  storage_t at[WIDTH];
};

__device__ __forceinline__ Vector load(const storage_t* p) { return *(const Vector*)p; }

__device__ __forceinline__ float silu(float v) { return v / (1.f + __expf(-v)); }

// First and last pixel of a slab.
__device__ __forceinline__ long long slab_begin(const Params& p, int slab) { return p.pixels * slab / p.slabs; }
