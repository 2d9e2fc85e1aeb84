// Gradients of a tile by itself, in all directions at once (see tiles.cuh).
//
// FINAL 0: states and adjoints of the tile alone; those at its borders and the weights go to scratch memory.
// FINAL 1: states from what enters, kept on the chip; then adjoints, line after line back, and all
// gradients. A block goes through the channels of a group and adds up what they have for the taps.
//
// What has been used gives its place to its gradient: lam, gate, and the states to parts of dx.
//
// Knobs: 0 channels that a block goes through; all of a group with FINAL 1.
// More macros: FINAL; MIN_BLOCKS of a multiprocessor.
#define BACKWARD 1
#include "tiles_scan.cuh"
#include "tiles_adjoint.cuh"

#if FINAL
// dlam or dgate: as they were copied.
__device__ __forceinline__ void store_scaled(const Tile& tile, const View& v, int offset) {
  const int piece = threadIdx.x % (SCANS * SUBS), column = threadIdx.x / (SCANS * SUBS);
  const int d = piece / SUBS, sub = piece % SUBS;
  if (v.data == nullptr || column >= tile.width) return;
  storage_t* to = tile.at(v, 0, column) + d * v.d + sub * V;
  const unsigned char* from = slot(d, sub, column) + offset;
#pragma unroll 4
  for (int row = 0; row < tile.height; row++, to += v.h, from += PITCH * SLOT)
    *(Stored*)to = *(const Stored*)from;
}

// From sums over the channels of a group to the gradient of its logits.
__device__ __forceinline__ void store_taps(const Params& p, const Tile& tile) {
  const int d = threadIdx.x % SCANS, column = threadIdx.x / SCANS % SIDE;
  if (p.dtaps.data == nullptr || column >= tile.width) return;
  const Scan s = scan_of(p, d);
  const Lines lines(tile, s);
  const storage_t* from = tile.taps_at(p.taps, d, column);
  storage_t* to = tile.taps_at(p.dtaps, d, column);
  for (int row = threadIdx.x / (SCANS * SIDE); row < tile.height; row += SUBS) {
    const storage_t* logits = from + row * p.taps.h;
    const Taps a = load_taps(logits, p.taps.k);
    const int along = s.vertical ? row : column, place = s.vertical ? column : row;
    const int line = s.reversed ? lines.count - 1 - along : along, j = lines.place + place;
    Taps sum = {0.f, 0.f, 0.f};
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      sum.add({*sum_at(part, 0, d, line, place), *sum_at(part, 1, d, line, place),
               *sum_at(part, 2, d, line, place)});
    const Taps gradient = tap_gradient(a, sum, j > 0, j + 1 < s.places);
    storage_t* out = to + row * p.dtaps.h;
    out[0] = narrow(gradient.before);
    out[p.dtaps.k] = narrow(gradient.here);
    out[2 * p.dtaps.k] = narrow(gradient.after);
  }
}
#endif

KERNEL(SCANS * SUBS * SIDE, MIN_BLOCKS) tiles_backward(CONSTANT_PARAMS p) {
  const int span = p.knobs[0];
  Tile tile(p, span);
#if FINAL
  copy_weights(p, tile);
#pragma unroll 1
  for (int done = 0; done < span; done += CHANNELS, tile.channel += CHANNELS) {
    copy_operands(p, tile);
    copy_outside(p, tile, false);
    copy_outside(p, tile, true);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    scan(p, tile);
    walk_back(p, tile, done > 0);
    __syncthreads();
    if (HAS_LAM) store_scaled(tile, p.dlam, 0);
    if (HAS_GATE) store_scaled(tile, p.dgate, STORED);
    store_sum(tile, p.dx, [](int d, int sub, int pixel) { return state_at(d, sub, pixel); });
    __syncthreads();
  }
  store_taps(p, tile);
#else
#pragma unroll 1
  for (int done = 0; done < span; done += CHANNELS, tile.channel += CHANNELS) {
    copy_operands(p, tile);
    copy_commit();
    if (done == 0) make_weights(p, tile);
    copy_wait<0>();
    __syncthreads();
    scan(p, tile);
    walk_back(p, tile);
    tile.keeps_weights = false;
    __syncthreads();
  }
#endif
}
