// Gradient of the weights and the bias of a depthwise convolution of channels_last images.
//
// A thread keeps the sums of all weights of its two channels in registers while it goes through its tiles, the gradient of
// a tile as well: an input pair is loaded and widened once for all products that it has a part in. The sums of a block's
// threads are added in shared memory, in their order, and written to `partial`; adding the blocks' up is left to the caller.
//
// Macros beside those of depthwise.cuh: THREADS, BLOCKS as of depthwise_forward.cu.
#include "depthwise.cuh"

struct Sums {
  float2 weight[TAPS];
  float2 bias;
};

__device__ __forceinline__ void add_tile(Sums& sums, const Params& p, const Tile& t, int channel) {
  float2 g[TALL][WIDE];
#pragma unroll
  for (int o = 0; o < TALL; ++o) {
    pair_t packed[WIDE];
    load_row(packed, p.dy, p, t, t.row + o, 0, channel);
#pragma unroll
    for (int k = 0; k < WIDE; ++k) {
      g[o][k] = widen(packed[k]);
      sums.bias.x += g[o][k].x, sums.bias.y += g[o][k].y;
    }
  }
  Row next;
  next.load(p, t, 0, channel);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float2 row[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) row[k] = next[k];
    if (r + 1 < ROWS) next.load(p, t, r + 1, channel);
#pragma unroll
    for (int o = 0; o < TALL; ++o) {
      if (r - o < 0 || r - o >= SIDE) continue;
#pragma unroll
      for (int m = 0; m < SIDE; ++m)
#pragma unroll
        for (int k = 0; k < WIDE; ++k) multiply_add(sums.weight[(r - o) * SIDE + m], row[k + m], g[o][k]);
    }
  }
}

KERNEL(THREADS, BLOCKS) depthwise_weights(CONSTANT_PARAMS p) {
  float2* shared = (float2*)shared_memory();  // (slots, pairs), the sums of one weight
  const Share s = share_of(p);
  Sums sums;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) sums.weight[tap] = make_float2(0.f, 0.f);
  sums.bias = make_float2(0.f, 0.f);
  const u32 down = tiles_down(p), across = tiles_across(p), tiles = p.batch * down * across;
  if (!s.idle)
    for (u32 number = s.group * p.slots + s.slot; number < tiles; number += p.groups * p.slots)
      add_tile(sums, p, tile_of(p, number, down, across), s.channel);
  // Two sets take turns, so that one barrier a weight is enough.
#pragma unroll
  for (int tap = 0; tap <= TAPS; ++tap) {
    float2* set = shared + (tap & 1) * p.slots * PAIRS;
    if (!s.idle) set[s.slot * PAIRS + s.pair] = tap < TAPS ? sums.weight[tap < TAPS ? tap : 0] : sums.bias;
    __syncthreads();
    if (s.slot == 0 && !s.idle) {
      float2 all = set[s.pair];
#pragma unroll 1
      for (int slot = 1; slot < p.slots; ++slot) {
        const float2 other = set[slot * PAIRS + s.pair];
        all.x += other.x, all.y += other.y;
      }
      *(float2*)(p.partial + ((long long)s.group * (TAPS + 1) + tap) * CHANNELS + s.channel) = all;
    }
  }
}
