// Depthwise convolution with a side of 7 of channels_last images of 16 bits on tensor cores, and the gradient of its input.
//
// For one channel a row of outputs is the sum over SIDE rows of inputs of a product with a band matrix: 8 neighbouring
// outputs take 14 neighbouring inputs, out[n] = sum over k of in[k] weight[k - n]. That is a product of 16 x 8 times
// 16 strips, where a strip is 8 columns of an image. A warp owns two channels of 16 strips and goes down the rows: an input
// row is multiplied with the SIDE band matrices, which stay in registers, for the SIDE rows of outputs that it reaches, and
// the sums of those stay in registers until the last row has been. 7 of 16 products are with zeros of a band: a NaN or an
// infinity reaches up to 8 columns too far.
//
// A tensor core wants neighbouring pixels of one channel in a register, memory has neighbouring channels of one pixel: a
// block brings rows of its strips to shared memory and changes that on the way; results go the same way back.
//
// Macros beside those of depthwise.cuh (STORAGE is 1 or 2; TALL, WIDE and PAIRS are not used):
//   SILU  1: the result goes through x sigmoid(x)
#include "depthwise_strips.cuh"

constexpr int OUTPUT = WARPS * PLANE;  // words of an output row: (pair of channels, strip, column)

struct Sum {
  float of[4];
};

// What a thread brings of every row: 8 channels of two neighbouring pixels of the strip that its warp brings.
struct Bring {
  const uint4* from;  // the first pixel, of row 0 of the image
  bool left, right;
};

__device__ __forceinline__ float silu(float v) {
#if SILU
  return v * reciprocal(1.f + exp2_fast(fminf(v * -1.44269502f, 120.f)));
#else
  return v;
#endif
}

__device__ __forceinline__ u32 weight_bits(const Params& p, int channel, int row, int column) {
  if (column < 0 || column >= SIDE) return 0u;
  const int tap = row * SIDE + column;
  const float v = widen(__ldg(p.weight + channel * TAPS + (p.flip ? TAPS - 1 - tap : tap)));
  return narrow(make_float2(v, 0.f)) & 0xffffu;
}

// This thread's part of the band matrix of a row of taps. Input columns come in an order that lets a thread read those it
// multiplies as 8 bytes.
__device__ __forceinline__ uint2 band(const Params& p, int channel, int row, int lane) {
  const int n = lane / 4, k = lane % 4 * 4 - n;
  return make_uint2(weight_bits(p, channel, row, k) | weight_bits(p, channel, row, k + 1) << 16,
                    weight_bits(p, channel, row, k + 2) | weight_bits(p, channel, row, k + 3) << 16);
}

__device__ __forceinline__ void fetch(uint4 (&pixels)[2], const Params& p, const Bring& b, int row) {
  const bool exists = row >= 0 && row < p.height;
  const uint4* from = b.from + (long long)row * p.width * (CHANNELS / 8);
  const uint4 zero = make_uint4(0u, 0u, 0u, 0u);
  pixels[0] = exists && b.left ? __ldg(from) : zero;
  pixels[1] = exists && b.right ? __ldg(from + CHANNELS / 8) : zero;
}

// Planes of channels: (channel, strip, pair of pixels).
__device__ __forceinline__ void keep_row(u32* input, const uint4 (&pixels)[2], int warp, int lane) {
  const int eight = lane % EIGHTS, place = (warp * 32 + lane) / EIGHTS;  // strip and pair of pixels
  u32* to = input + eight * 8 * PLANE + (place + eight * TURN) % PLANE;
  keep_pairs<PLANE>(to, pixels[0], pixels[1]);
}

// A row of the output of the warp's channels: (pair of channels, strip, pixel).
__device__ __forceinline__ void keep_output(u32* output, const Sum& first, const Sum& second, int warp, int lane) {
  const int strip = lane / 4, pixel = lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = ((strip + 8 * half) * STRIP + pixel + warp / 4 * TURN) % PLANE;
    const u32 left = narrow(make_float2(silu(first.of[2 * half]), silu(second.of[2 * half])));
    const u32 right = narrow(make_float2(silu(first.of[2 * half + 1]), silu(second.of[2 * half + 1])));
    *(uint2*)(output + warp * PLANE + place) = make_uint2(left, right);
  }
}

__device__ __forceinline__ uint4 kept_output(const u32* output, int pixel, int eight) {
  const u32* from = output + eight * 4 * PLANE + (pixel + eight * TURN) % PLANE;
  return make_uint4(from[0], from[PLANE], from[2 * PLANE], from[3 * PLANE]);
}

KERNEL(32 * WARPS, 2) depthwise_tensor(CONSTANT_PARAMS p) {
  u32* shared = (u32*)shared_memory();  // two rows of inputs, two of outputs
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slice = blockIdx.x % p.slices, rest = blockIdx.x / p.slices;
  const int part = rest / p.groups, strips = (rest - part * p.groups) * STRIPS;
  const int begin = part * p.slots, end = min(begin + p.slots, p.height);
  const int channel = slice * SLICE + 2 * warp;
  const bool idle = channel >= CHANNELS;
  const int place = threadIdx.x / EIGHTS;  // strip and column: what this thread brings (two pixels) and writes

  Bring bring;
  uint4* written;  // what this thread writes of row 0: 8 channels of a pixel
  bool writes;
  {
    const int eight = slice * SLICE + lane % EIGHTS * 8;
    const Strip s = strip_of(p, strips + place / STRIP);
    const int column = s.column - REACH + place % STRIP * 2;
    const bool there = !s.none && eight < CHANNELS;
    bring.from = (const uint4*)(p.x + ((s.image * p.height * p.width + column) * CHANNELS + eight) / 2);
    bring.left = there && column >= 0 && column < p.width;
    bring.right = there && column + 1 >= 0 && column + 1 < p.width;
    const int out = s.column + place % STRIP;
    writes = there && out < p.width;
    written = (uint4*)(p.y + ((s.image * p.height * p.width + out) * CHANNELS + eight) / 2);
  }
  uint2 bands[2][SIDE];
  Sum sums[2][SIDE];
  float bias[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    bias[c] = p.bias && !idle ? widen(__ldg(p.bias + channel + c)) : 0.f;
#pragma unroll
    for (int r = 0; r < SIDE; ++r) {
      bands[c][r] = idle ? make_uint2(0u, 0u) : band(p, channel + c, r, lane);
      sums[c][r] = Sum{{bias[c], bias[c], bias[c], bias[c]}};
    }
  }

  const int first = max(begin - REACH, 0), last = end + REACH;  // rows of inputs
  uint4 next[2];
  fetch(next, p, bring, first);
  keep_row(shared, next, warp, lane);
  fetch(next, p, bring, first + 1);
  // Sums that belong to no row of this block are made and dropped.
  for (int base = first; base <= last; base += SIDE) {
#pragma unroll
    for (int k = 0; k < SIDE; ++k) {
      const int row = base + k, turn = (row - first) & 1;
      if (row > last) break;
      __syncthreads();
      if (row + 1 < last) {
        keep_row(shared + (turn ^ 1) * INPUT, next, warp, lane);
        fetch(next, p, bring, row + 2);
      }
      const int done = row - 1 - REACH;  // finished with the row before
      if (row > first && done >= begin && writes)
        __stwb(written + (long long)done * p.width * (CHANNELS / 8),
               kept_output(shared + 2 * INPUT + (turn ^ 1) * OUTPUT, place, lane % EIGHTS));
      if (row == last) break;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int plane = 2 * warp + c;
        const u32* from = shared + turn * INPUT + plane * PLANE;
        const int at = lane / 4 * 8 + lane % 4 * 2 + plane / 8 * TURN;
        const uint2 upper = *(const uint2*)(from + at % PLANE), lower = *(const uint2*)(from + (at + 64) % PLANE);
        if (row < p.height)
#pragma unroll
          for (int j = 0; j < SIDE; ++j)
            multiply_tiles(sums[c][(k + j) % SIDE].of, upper.x, lower.x, upper.y, lower.y, bands[c][SIDE - 1 - j]);
      }
      if (row - REACH >= begin) keep_output(shared + 2 * INPUT + turn * OUTPUT, sums[0][k], sums[1][k], warp, lane);
#pragma unroll
      for (int c = 0; c < 2; ++c) sums[c][k] = Sum{{bias[c], bias[c], bias[c], bias[c]}};
    }
  }
}
