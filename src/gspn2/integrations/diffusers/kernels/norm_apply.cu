// y = scale x + shift by channel, then SiLU where it is asked for.
#include "pixels.cuh"

KERNEL(1024, 1) norm_apply(CONSTANT_PARAMS p) {
  const int image = blockIdx.x / p.slabs, slab = blockIdx.x % p.slabs;
  const int vector = threadIdx.x % p.vectors, row = threadIdx.x / p.vectors;
  float scale[WIDTH], shift[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    const float2 affine = p.affine[(long long)image * p.channels + vector * WIDTH + k];
    scale[k] = affine.x, shift[k] = affine.y;
  }
  const long long begin = slab_begin(p, slab), end = slab_begin(p, slab + 1);
  const long long offset = (long long)image * p.pixels * p.channels + vector * WIDTH;
#pragma unroll 4
  for (long long pixel = begin + row; pixel < end; pixel += p.rows) {
    const long long at = offset + pixel * p.channels;
    Vector v = load(p.x + at);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      const float normed = fmaf(widen(v.at[k]), scale[k], shift[k]);
#if SILU
      v.at[k] = narrow(silu(normed));
#else
      v.at[k] = narrow(normed);
#endif
    }
    *(Vector*)(p.y + at) = v;
  }
}
