// y = sum over directions d of gate_d h_d, from states as they were stored: nothing but memory traffic.
//
// Threads of a block take neighbouring vectors along the fast axis, and VECTORS of them each.
// Macros: EACH elements of a vector; SCANS directions.
// Knobs: 0 channels are the fast axis (1) or columns (0), 1 vectors of the fast axis.
// The states are `x`, (B, D, C, H, W).
#include "common.cuh"

constexpr int VECTORS = 4, BLOCK = 256;

struct __align__(EACH * sizeof(storage_t)) Vector {
  storage_t e[EACH];
};

// A vector's place; the image (b, c, row, column) with the fast axis in units of vectors.
struct Place {
  long long b;
  int c, h, w;
};

template <typename Index>  // 32 bits where they are enough: divisions of 64 take as long as the memory
__device__ __forceinline__ Place place_of(const Params& p, Index index) {
  const Index row = index / (Index)p.knobs[1], line = p.knobs[0] ? row / (Index)p.width : row;
  const Index plane = line / (Index)p.height, outer = p.knobs[0] ? plane : plane / (Index)p.channels;
  const int f = (int)(index - row * (Index)p.knobs[1]) * EACH, h = (int)(line - plane * (Index)p.height);
  if (p.knobs[0]) return {(long long)outer, f, h, (int)(row - line * (Index)p.width)};
  return {(long long)outer, (int)(plane - outer * (Index)p.channels), h, f};
}

__device__ __forceinline__ long long offset(const View& v, const Place& at) {
  return at.b * v.b + at.c * v.c + at.h * v.h + at.w * v.w;
}

KERNEL(BLOCK, 2) states_sum(CONSTANT_PARAMS p) {
  const long long all = (long long)p.batch * p.height * p.knobs[1] * (p.knobs[0] ? p.width : p.channels);
  const long long first = (long long)blockIdx.x * (BLOCK * VECTORS) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const long long index = first + i * BLOCK;
    if (index >= all) return;
    const Place at = all < 1ll << 32 ? place_of(p, (u32)index) : place_of(p, (u64)index);
    const storage_t* from = p.x.data + offset(p.x, at);
#if HAS_GATE
    const storage_t* gates = p.gate.data + offset(p.gate, at);
#endif
    Vector h[SCANS];
#pragma unroll
    for (int d = 0; d < SCANS; d++) h[d] = *(const Vector*)(from + d * p.x.d);
#if HAS_GATE
    Vector gate[SCANS];
#pragma unroll
    for (int d = 0; d < SCANS; d++) gate[d] = *(const Vector*)(gates + d * p.gate.d);
#endif
    Vector y;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      float sum = 0.f;
#pragma unroll
      for (int d = 0; d < SCANS; d++)
#if HAS_GATE
        sum = fmaf(widen(gate[d].e[e]), widen(h[d].e[e]), sum);
#else
        sum += widen(h[d].e[e]);
#endif
      y.e[e] = narrow(sum);
    }
    *(Vector*)(p.y.data + offset(p.y, at)) = y;
  }
}
