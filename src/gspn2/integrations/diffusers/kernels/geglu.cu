// y = a gelu(b) of tokens that hold a and b side by side, C channels each: rounded once.
#include "pixels.cuh"

__device__ __forceinline__ float gelu(float v) { return 0.5f * v * (1.f + erff(v * 0.70710678f)); }

KERNEL(1024, 1) geglu(CONSTANT_PARAMS p) {
  const int vector = threadIdx.x % p.vectors, row = threadIdx.x / p.vectors;
  const long long begin = slab_begin(p, blockIdx.x), end = slab_begin(p, blockIdx.x + 1);
  for (long long token = begin + row; token < end; token += p.rows)
    for (int c = vector * WIDTH; c < p.channels; c += p.vectors * WIDTH) {
      const storage_t* from = p.x + 2 * token * p.channels + c;
      Vector a = load(from);
      const Vector b = load(from + p.channels);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) a.at[k] = narrow(widen(a.at[k]) * gelu(widen(b.at[k])));
      *(Vector*)(p.y + token * p.channels + c) = a;
    }
}
