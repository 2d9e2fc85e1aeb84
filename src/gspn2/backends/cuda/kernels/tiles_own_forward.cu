// y of a tile whose channels have taps of their own, from what enters it (see tiles_own.cuh).
//
// More macros: MIN_BLOCKS of a multiprocessor.
#define BACKWARD 0
#include "tiles_own_final.cuh"

__device__ __forceinline__ void scan(const Params& p, const Tile& tile) {
  const Scanner me(p, tile);
  const unsigned char* gate = me.lam + (GATE_AT - LAM_AT);
  float h[W];
  me.enter(h);
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
    float now[W], gated[W];
    me.step(p, i, h, now);
#if HAS_GATE
    widen_two(gate + i * PITCH * STORED, gated);
#endif
#pragma unroll
    for (int v = 0; v < W; v++) {
      h[v] = now[v];
      gated[v] = HAS_GATE ? gated[v] * h[v] : h[v];
    }
    store_two(me.pair + i * PITCH * 16, gated);
  }
}

KERNEL(THREADS, MIN_BLOCKS) tiles_own_forward(CONSTANT_PARAMS p) {
  const Tile tile(p);
  copy_weights(p, tile);
  copy_operands(p, tile);
  copy_outside(p, tile, false);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  scan(p, tile);
  __syncthreads();
  store_sum(p, tile, p.y);
}
