// Weights of shared taps from 16-bit logits, made once for all blocks of channels that read them.
//
// Knob: 0 blocks of an image's tap group in one direction.
// Scratch: 2 the weights, a word each (tap_pairs.cuh), [B][D][G][lines][places], lines in image order.
#include "tap_pairs.cuh"

KERNEL(256, 4) pixels_weights(CONSTANT_PARAMS p) {
  const int index = blockIdx.x / p.knobs[0], pixel = (blockIdx.x - index * p.knobs[0]) * blockDim.x + threadIdx.x;
  const int g = index % p.groups, d = index / p.groups % p.scans, b = index / p.groups / p.scans;
  if (pixel >= p.height * p.width) return;
  const Scan s = scan_of(p, d);
  const int line = pixel / s.places, place = pixel - line * s.places;
  const int row = s.vertical ? line : place, column = s.vertical ? place : line;
  const storage_t* a = p.taps.data + (b * p.taps.b + d * p.taps.d + g * p.taps.c + row * p.taps.h + column * p.taps.w);
  const Taps logits = {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
  u32* to = (u32*)p.scratch[2] + (long long)index * p.height * p.width + pixel;
  *to = pack_taps(weights_of(logits, place > 0, place + 1 < s.places));
}
