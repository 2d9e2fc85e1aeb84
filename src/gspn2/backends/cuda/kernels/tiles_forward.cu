// A tile by itself, in all directions at once (see tiles.cuh).
//
// FINAL 0: states of the tile alone; those at its borders and the weights go to scratch memory.
// FINAL 1: states from what enters; y = sum over directions of gate h. What has been used, lam and gate of a
// pixel, gives its place to the gated state in float32.
//
// Knobs: 0 channels that a block goes through (FINAL 0).
// More macros: FINAL; MIN_BLOCKS of a multiprocessor.
#define BACKWARD 0
#include "tiles_scan.cuh"

KERNEL(SCANS * SUBS * SIDE, MIN_BLOCKS) tiles_forward(CONSTANT_PARAMS p) {
#if FINAL
  const Tile tile(p, CHANNELS);
  copy_operands(p, tile);
  copy_weights(p, tile);
  copy_outside(p, tile, false);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  scan(p, tile);
  __syncthreads();
  store_sum(tile, p.y, [](int d, int sub, int pixel) { return slot(d, sub, pixel); });
#else
  const int span = p.knobs[0];
  Tile tile(p, span);
#pragma unroll 1
  for (int done = 0; done < span; done += CHANNELS, tile.channel += CHANNELS) {
    copy_operands(p, tile);
    copy_commit();
    if (done == 0) make_weights(p, tile);
    copy_wait<0>();
    __syncthreads();
    scan(p, tile);
    tile.keeps_weights = false;
    __syncthreads();
  }
#endif
}
