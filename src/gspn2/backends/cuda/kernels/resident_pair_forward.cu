// Forward of small images of two channels with shared taps, as dense records (resident_pair.cuh).
//
// Blocks take one image after the other. Gates wait in registers until the states of their pixel are there. y is dense.
#define BACKWARD 0
#define PASSES 1
#include "resident_pair.cuh"

struct Gates {
  u32 of[PART];
};

// Puts this thread's pixel of a round in order.
__device__ __forceinline__ Gates unpack(const Params& p, Stream& s, unsigned char* shared, int b, int round,
                                        const Spots& origin) {
  const Pixel pixel = pixel_of(p, round);
  const Operands o = read_pixel(p, s, b, pixel, round, 0);
  const Spots spots = spots_of(p, origin, 0, round);
  u32 weights[PART], sigmoids[3 * PART / 2];
  weigh(o, spots, weights, sigmoids);
  Gates gates;
#pragma unroll
  for (int d = 0; d < SCANS; d++) {
    const Axis axis = axis_at(p, 0, d);
    const Spot& spot = spots.of[d];
    unsigned char* planes = shared + planes_at(p, 0, d);
    if (pixel.inside) {
#if HAS_LAM
      *(float2*)(planes + spot.pair) = product<true>(o.x, o.lam[d]);
#else
      *(float2*)(planes + spot.pair) = product<false>(o.x, 0);
#endif
      *(u32*)(planes + plane_of(axis) + spot.weight) = weights[d];
    }
#if HAS_GATE
    gates.of[d] = o.gate[d];
#endif
  }
  return gates;
}

// y of this thread's pixel of a round: the gated states, summed over directions in their order.
__device__ __forceinline__ void sum_directions(const Params& p, const unsigned char* shared, u32* y, int round,
                                               const Gates& gates, const Spots& origin) {
  const Pixel pixel = pixel_of(p, round);
  if (!pixel.inside) return;
  const Spots spots = spots_of(p, origin, 0, round);
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int d = 0; d < SCANS; d++) {
    const float2 state = *(const float2*)(shared + planes_at(p, 0, d) + spots.of[d].pair);
#if HAS_GATE
    sum[0] = fmaf(widen_low(gates.of[d]), state.x, sum[0]);
    sum[1] = fmaf(widen_high(gates.of[d]), state.y, sum[1]);
#else
    sum[0] += state.x, sum[1] += state.y;
#endif
  }
  y[pixel.index] = narrow_pair(sum[0], sum[1]);
}

KERNEL(THREADS, BLOCKS) resident_pair_forward(CONSTANT_PARAMS p) {
  unsigned char* shared = held_shared_memory();
  const int warp = warp_index();
  Stream stream = stream_of(p, shared);
  clear_planes(p, shared);
  const Spots origin = origin_of(p, 0);
  for (int b = blockIdx.x; b < p.knobs[TASKS]; b += gridDim.x) {
    Gates gates[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      if (has_round(p, round))
        gates[round] = unpack(p, stream, shared, b, round, origin);
      else
        skip_pixel(p, stream, round);
    }
    __syncthreads();
#pragma unroll 1
    for (int d = warp; d < SCANS; d += THREADS / 32) {
      unsigned char* planes = shared + planes_at(p, 0, d);
      scan_pair<false>(p, d, planes, planes + plane_of(axis_at(p, 0, d)));
    }
    __syncthreads();
    u32* y = (u32*)p.y.data + (long long)b * pixels_of(p);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
      if (has_round(p, round)) sum_directions(p, shared, y, round, gates[round], origin);
    // No barrier: a pixel's states are read, and its next operands written, by the same thread.
  }
  copy_wait<0>();
}
