// What the kernels of depthwise convolutions on tensor cores share: strips, and planes of channels in shared memory.
//
// STORAGE is 1 or 2 here, SIDE is 7. A strip is 8 columns of an image; a block has 16 strips and 16 channels, a warp two of
// these. A tensor core wants neighbouring pixels (or strips) of one channel in a register, memory has neighbouring channels
// of one pixel: a block brings rows of its strips to shared memory and changes that on the way. There a channel has a plane
// of words; what a thread writes is turned by half the banks for every other 8 channels, so that none is met twice.
#pragma once
#define TALL 1
#define WIDE 1
#include "depthwise.cuh"

constexpr int STRIPS = 16, STRIP = 8, REACHED = 16;  // strips of a block; columns of a strip, and of its input with two more
constexpr int SLICE = 16, WARPS = SLICE / 2;         // channels of a block
constexpr int EIGHTS = SLICE / 8, TURN = 32 / EIGHTS;  // a plane is turned by TURN words for each 8 channels
constexpr int PLANE = STRIPS * REACHED / 2;          // words of a channel of an input row
constexpr int INPUT = SLICE * PLANE;

// Strip `number` of all: its image and first column; none: beyond the last one.
struct Strip {
  long long image;
  int column;
  bool none;
};

__device__ __forceinline__ Strip strip_of(const Params& p, int number) {
  const int across = (p.width + STRIP - 1) / STRIP, image = number / across;
  Strip s;
  s.image = image;
  s.column = (number - image * across) * STRIP;
  s.none = image >= p.batch;
  return s;
}

// 8 channels of two neighbours to words of their planes.
template <int SIZE>
__device__ __forceinline__ void keep_pairs(u32* to, const uint4& left, const uint4& right) {
  const u32 a[4] = {left.x, left.y, left.z, left.w}, b[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    to[2 * k * SIZE] = (a[k] & 0xffffu) | b[k] << 16;
    to[(2 * k + 1) * SIZE] = a[k] >> 16 | (b[k] & 0xffff0000u);
  }
}
