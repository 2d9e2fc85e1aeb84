// Gradients of taps that several channels share: each block of a cluster has one of these channels, and the cluster sums
// over them after every segment.
#pragma once
#include "planes_backward_line.cuh"

// Shared weights' gradients of a segment stay in shared memory, in the place of operands whose time is over, until
// the cluster has summed them: float32 numbers where the taps were; with 16-bit storage the halves of the first in the
// first two taps, of the second in the third tap and dy, and the third in the states; where these are at hand, as 16-bit
// numbers, its halves in their place and in that of x.
__device__ constexpr int parked_in(int i) { return i < 3 ? TAPS + i : DY; }

// Are gradients of shared weights complete when a cluster has summed its channels?
__device__ __forceinline__ bool is_single_part(const Params& p) { return p.knobs[5] >= p.channels / p.groups; }
// Where a part of the gradient of weight k begins.
__device__ __forceinline__ float* part_of(const Params& p, const Thread& t, int k) {
  const long long plane = (long long)p.height * p.knobs[2];
  return (float*)p.scratch[2] + ((((long long)t.part * p.batch + t.b) * p.groups + t.group) * 3 + k) * plane;
}
