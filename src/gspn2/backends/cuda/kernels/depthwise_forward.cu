// Depthwise convolution of channels_last images, and the gradient of its input (the weights turned).
//
// Arithmetic, in float32, is what limits a side of 7: an input pair is loaded and widened once for the WIDE x SIDE products
// of each row of outputs that it reaches. The next row of the tile is on its way while this one is multiplied; pixels that
// tiles share come from the first-level cache.
//
// Macros beside those of depthwise.cuh:
//   RESIDUAL  1: the input is added to the result
//   SILU      1: the result goes through x sigmoid(x)
//   THREADS, BLOCKS  bounds of a block, and blocks of a multiprocessor
#include "depthwise.cuh"

__device__ __forceinline__ float silu(float v) {
#if SILU
  // The bound keeps the reciprocal normal; x is as good as 0 times it there.
  return v * reciprocal(1.f + exp2_fast(fminf(v * -1.44269502f, 120.f)));
#else
  return v;
#endif
}

__device__ __forceinline__ void fetch_weights(float2* weights, const Params& p, int slice) {
  float* to = (float*)weights;
  constexpr int count = 2 * PAIRS;
  const int first = slice * count;
  for (int i = threadIdx.x; i < TAPS * count; i += blockDim.x) {
    const int channel = i / TAPS, tap = i - channel * TAPS;
    const float v = first + channel < CHANNELS ? widen(__ldg(p.weight + (first + channel) * TAPS + tap)) : 0.f;
    to[(p.flip ? TAPS - 1 - tap : tap) * count + channel] = v;
  }
}

__device__ __forceinline__ void convolve(const Params& p, const Tile& t, const float2* weights, float2 bias, int channel) {
  float2 sum[TALL][WIDE];
#pragma unroll
  for (int o = 0; o < TALL; ++o)
#pragma unroll
    for (int k = 0; k < WIDE; ++k) sum[o][k] = bias;
  Row next;
  next.load(p, t, 0, channel);
#if SIDE > 3
#pragma unroll 1
#else
#pragma unroll
#endif
  for (int r = 0; r < ROWS; ++r) {
    float2 row[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      row[k] = next[k];
#if SIDE > 3
      // Or they are widened again for each row of outputs.
      row[k] = make_float2(opaque(row[k].x), opaque(row[k].y));
#endif
    }
    if (r + 1 < ROWS) next.load(p, t, r + 1, channel);
#pragma unroll
    for (int o = 0; o < TALL; ++o) {
      const int tap = r - o;
      if (tap < 0 || tap >= SIDE) continue;
      const float2* line = weights + tap * SIDE * PAIRS;
#pragma unroll
      for (int m = 0; m < SIDE; ++m) {
        const float2 weight = line[m * PAIRS];
#pragma unroll
        for (int k = 0; k < WIDE; ++k) multiply_add(sum[o][k], row[k + m], weight);
      }
#if RESIDUAL
      if (tap == REACH)
#pragma unroll
        for (int k = 0; k < WIDE; ++k) sum[o][k].x += row[k + REACH].x, sum[o][k].y += row[k + REACH].y;
#endif
    }
  }
  constexpr int stride = CHANNELS / 2;
  pair_t* rows = p.y + ((t.image + t.row) * p.width + t.column) * stride + channel / 2;
#pragma unroll
  for (int o = 0; o < TALL; ++o) {
    if (t.row + o >= p.height) break;
    pair_t* to = opaque(rows);
#pragma unroll
    for (int k = 0; k < WIDE; ++k)
      if (t.inside >> (k + REACH) & 1u) __stwb(to + k * stride, narrow(make_float2(silu(sum[o][k].x), silu(sum[o][k].y))));
    rows += (long long)p.width * stride;
  }
}

KERNEL(THREADS, BLOCKS) depthwise_forward(CONSTANT_PARAMS p) {
  float2* weights = (float2*)shared_memory();
  const Share s = share_of(p);
  fetch_weights(weights, p, blockIdx.x - s.group * p.slices);
  __syncthreads();
  if (s.idle) return;
  const float2 bias = p.bias ? make_float2(widen(__ldg(p.bias + s.channel)), widen(__ldg(p.bias + s.channel + 1)))
                             : make_float2(0.f, 0.f);
  const u32 down = tiles_down(p), across = tiles_across(p), tiles = p.batch * down * across;
  for (u32 number = s.group * p.slots + s.slot; number < tiles; number += p.groups * p.slots)
    convolve(p, tile_of(p, number, down, across), weights + s.pair, bias, s.channel);
}
