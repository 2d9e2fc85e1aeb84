// Gradient of the weights and the bias of a depthwise convolution from the sums that groups of blocks leave.
//
// A block has LANES neighbouring channels of one tap: a lane a channel, a row every `rows`-th group. Rows are added in
// shared memory, in their order. Sizes are values at run time: one compilation for all. Macros:
//   LANES      of a row, a warp
//   MOST_ROWS  of a block
//   EACH       groups that a thread has on their way at a time
#include "ptx.cuh"

// `depthwise.py` packs this structure; the two must agree.
struct Params {
  const float* partial;  // (groups, taps + 1, C), the bias last
  float* weight;         // (C, taps)
  float* bias;           // (C)
  int channels, taps, groups;
  int rows;              // of a block
  int slices;            // blocks that share the channels
  int none;
};

KERNEL(LANES * MOST_ROWS, 1) depthwise_sums(CONSTANT_PARAMS p) {
  float* shared = (float*)shared_memory();  // (rows, LANES)
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int tap = blockIdx.x / p.slices, channel = (blockIdx.x - tap * p.slices) * LANES + lane;
  const bool idle = channel >= p.channels;
  float sum = 0.f;
  if (!idle) {
    const long long group = (long long)(p.taps + 1) * p.channels, step = p.rows * group;
    const float* from = p.partial + row * group + (long long)tap * p.channels + channel;
    for (int number = row; number < p.groups; number += EACH * p.rows, from += EACH * step) {
      float part[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) part[i] = number + i * p.rows < p.groups ? __ldg(from + i * step) : 0.f;
#pragma unroll
      for (int i = 0; i < EACH; ++i) sum += part[i];
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || idle) return;
  for (int other = 1; other < p.rows; ++other) sum += shared[other * LANES + lane];
  if (tap < p.taps)
    p.weight[(long long)channel * p.taps + tap] = sum;
  else
    p.bias[channel] = sum;
}
