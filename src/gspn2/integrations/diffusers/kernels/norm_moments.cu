// Mean of every channel over a slab of pixels, and the sum of squared differences from it. A block takes a slab: `vectors`
// threads side by side for the channels, `rows` times over for as many pixels at once. Sums are of differences from the
// slab's first pixel, so that a large mean costs no digits, and are added in a fixed order.
#include "pixels.cuh"

KERNEL(1024, 1) norm_moments(CONSTANT_PARAMS p) {
  float* sums = (float*)shared_memory();  // (rows, channels, 2)
  const int image = blockIdx.x / p.slabs, slab = blockIdx.x % p.slabs;
  const int vector = threadIdx.x % p.vectors, row = threadIdx.x / p.vectors;
  const long long begin = slab_begin(p, slab), end = slab_begin(p, slab + 1);
  const storage_t* x = p.x + (long long)image * p.pixels * p.channels + vector * WIDTH;
  const Vector first = load(x + begin * p.channels);
  float sum[WIDTH], square[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) sum[k] = square[k] = 0.f;
#pragma unroll 4
  for (long long pixel = begin + row; pixel < end; pixel += p.rows) {
    const Vector v = load(x + pixel * p.channels);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      const float d = widen(v.at[k]) - widen(first.at[k]);
      sum[k] += d, square[k] += d * d;
    }
  }
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) {
    float* to = sums + 2 * ((row * p.vectors + vector) * WIDTH + k);
    to[0] = sum[k], to[1] = square[k];
  }
  __syncthreads();
  const float count = (float)(end - begin);
  for (int c = threadIdx.x; c < p.channels; c += blockDim.x) {
    float s = 0.f, q = 0.f;
    for (int r = 0; r < p.rows; ++r) {
      const float* from = sums + 2 * (r * p.channels + c);
      s += from[0], q += from[1];
    }
    const float shift = widen(p.x[((long long)image * p.pixels + begin) * p.channels + c]);
    p.moments[((long long)image * p.slabs + slab) * p.channels + c] =
        make_float2(shift + s / count, fmaxf(q - s * s / count, 0.f));
  }
}
