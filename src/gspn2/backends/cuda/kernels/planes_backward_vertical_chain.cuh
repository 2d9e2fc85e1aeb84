// The gradient of taps that channels share, in vertical scans, line by line to scratch memory: a channel's part, or, with
// CHAIN, added to what the channel before left.
// Included by planes_backward_vertical.cuh.
#pragma once
#include "planes_backward_chain.cuh"

// Of the three weights; zeros where this channel is the first.
struct SumsOfLine {
  Sums<N> weight[3];
};
__device__ __forceinline__ SumsOfLine read_sums_of_line(const Params& p, const Thread& t, int row) {
  SumsOfLine sums = {};
  if (CHAIN && t.own && t.follows)
#pragma unroll
    for (int k = 0; k < 3; k++) sums.weight[k] = read_sums<N>(part_of(p, t, k) + (long long)row * p.knobs[2] + t.place);
  return sums;
}
__device__ __forceinline__ void write_sums_of_line(const Params& p, const Thread& t, int row, const SumsOfLine& sums,
                                                   const Taps (&dw)[N]) {
  float v[3][N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    v[0][n] = sums.weight[0].v[n] + dw[n].before;
    v[1][n] = sums.weight[1].v[n] + dw[n].here;
    v[2][n] = sums.weight[2].v[n] + dw[n].after;
  }
  if (t.own)
#pragma unroll
    for (int k = 0; k < 3; k++) write_sums(part_of(p, t, k) + (long long)row * p.knobs[2] + t.place, v[k]);
}
