// What the kernels of depthwise convolutions share: arguments, pairs of channels, tiles of pixels.
//
// Images are channels_last, (B, H, W, C) in memory with an even C. A thread owns two neighbouring channels and a tile of
// TALL x WIDE pixels. Macros:
//   STORAGE    of images, WEIGHTS of weights and bias: see pairs.cuh
//   SIDE       of the kernel, odd
//   CHANNELS   of the images: with it known, an access is an address and a constant
//   PAIRS      of channels in a block
//   TALL, WIDE pixels of a tile
//   SECOND     1: the input is the sum of two images
#pragma once
#include "pairs.cuh"

constexpr int TAPS = SIDE * SIDE, REACH = SIDE / 2;
constexpr int ROWS = TALL + SIDE - 1, COLUMNS = WIDE + SIDE - 1;  // of the input of a tile

// `depthwise.py` packs this structure; the two must agree. Null: absent.
struct Params {
  const pair_t* x;         // (B, H, W, C)
  const pair_t* dy;        // the same, of the gradient of weights
  const weight_t* weight;  // (C, SIDE, SIDE)
  const weight_t* bias;    // (C)
  pair_t* y;               // (B, H, W, C)
  float* partial;          // (groups, TAPS + 1, C): a group's sums for each weight, and for the bias
  const pair_t* other;     // (B, H, W, C): added to x before all else
  int batch, height, width;
  int slots;               // tiles that a block has in work at a time
  int slices;              // blocks that share the channels of an image
  int groups;              // blocks that share the tiles
  int flip;                // weights turned by 180 degrees: the gradient of the input
  int none;
};

__device__ __forceinline__ void multiply_add(float2& sum, float2 a, float2 b) {
  sum.x = fmaf(a.x, b.x, sum.x);
  sum.y = fmaf(a.y, b.y, sum.y);
}

// Which channels and tiles a thread works on.
struct Share {
  int pair, slot;       // of the block
  int channel, group;   // first of its two channels; of the grid
  bool idle;            // beyond the last slot or channel
};

__device__ __forceinline__ Share share_of(const Params& p) {
  Share s;
  s.slot = threadIdx.x / PAIRS;
  s.pair = threadIdx.x - s.slot * PAIRS;
  s.group = blockIdx.x / p.slices;
  s.channel = 2 * ((blockIdx.x - s.group * p.slices) * PAIRS + s.pair);
  s.idle = s.slot >= p.slots || s.channel >= CHANNELS;
  return s;
}

// A tile: its first pixel, and which columns of its input lie in the image, a bit each.
struct Tile {
  long long image;  // its first row among the rows of all images
  int row, column;
  u32 inside;
};

__device__ __forceinline__ int tiles_down(const Params& p) { return (p.height + TALL - 1) / TALL; }
__device__ __forceinline__ int tiles_across(const Params& p) { return (p.width + WIDE - 1) / WIDE; }

__device__ __forceinline__ Tile tile_of(const Params& p, u32 number, u32 down, u32 across) {
  const u32 line = number / across, image = line / down;
  Tile t;
  t.image = (long long)image * p.height;
  t.row = (line - image * down) * TALL;
  t.column = (number - line * across) * WIDE;
  t.inside = 0;
#pragma unroll
  for (int k = 0; k < COLUMNS; ++k) t.inside |= (u32)(t.column + k - REACH >= 0 && t.column + k - REACH < p.width) << k;
  return t;
}

// COUNT pairs of a row of the image, from a column of the tile on; what is outside of the image is 0.
template <int COUNT>
__device__ __forceinline__ void load_row(pair_t (&to)[COUNT], const pair_t* from, const Params& p, const Tile& t, int row,
                                         int column, int channel) {
  constexpr int stride = CHANNELS / 2;
  const bool exists = row >= 0 && row < p.height;
  const u32 inside = exists ? t.inside >> (column + REACH) : 0u;
  from = opaque(from + ((t.image + row) * p.width + t.column + column) * stride + channel / 2);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) to[k] = inside >> k & 1u ? __ldg(from + k * stride) : no_pair();
}

// A row of the input of a tile on its way: of one image, or of two.
struct Row {
  pair_t x[COLUMNS];
#if SECOND
  pair_t other[COLUMNS];
#endif
  __device__ __forceinline__ void load(const Params& p, const Tile& t, int number, int channel) {
    load_row(x, p.x, p, t, t.row - REACH + number, -REACH, channel);
#if SECOND
    load_row(other, p.other, p, t, t.row - REACH + number, -REACH, channel);
#endif
  }
  __device__ __forceinline__ float2 operator[](int k) const {
    float2 v = widen(x[k]);
#if SECOND
    const float2 w = widen(other[k]);
    v.x += w.x, v.y += w.y;
#endif
    return v;
  }
};
