// The gradient of shared taps, from the sums that pixels_backward left for each block of channels: those of a group's
// blocks are added in order.
//
// Knobs: 0 channel blocks of the image, 1 channel blocks of a group. Scratch: 3 the sums (B, D, blocks, H, W, 3).
#include "common.cuh"

KERNEL(256, 2) pixels_taps(CONSTANT_PARAMS p) {
  const long long pixels = (long long)p.height * p.width, index = (long long)blockIdx.x * 256 + threadIdx.x;
  const int blocks = p.knobs[0], of_group = p.knobs[1];
  const long long plane = index / pixels;  // (b, d, group)
  if (plane >= (long long)p.batch * p.scans * p.groups) return;
  const long long pixel = index - plane * pixels;
  const int group = plane % p.groups, image = plane / p.groups, d = image % p.scans, b = image / p.scans;
  const int row = pixel / p.width, column = pixel - (long long)row * p.width;
  const long long first = ((long long)image * blocks + group * of_group) * pixels + pixel;
  const float* from = (const float*)p.scratch[3] + 3 * first;
  Taps sum = {0.f, 0.f, 0.f};
  for (int i = 0; i < of_group; i += SUM_RUN) {
    Taps run = {0.f, 0.f, 0.f};
    for (int l = i; l < min(of_group, i + SUM_RUN); l++, from += 3 * pixels)
      run.add({__ldcs(from), __ldcs(from + 1), __ldcs(from + 2)});
    sum.add(run);
  }
  const Scan s = scan_of(p, d);
  const int j = s.vertical ? column : row;
  const storage_t* a =
      p.taps.data + b * p.taps.b + d * p.taps.d + group * p.taps.c + row * p.taps.h + column * p.taps.w;
  storage_t* to =
      p.dtaps.data + b * p.dtaps.b + d * p.dtaps.d + group * p.dtaps.c + row * p.dtaps.h + column * p.dtaps.w;
  const Taps raw = {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
  const Taps out = tap_gradient(raw, sum, j > 0, j + 1 < s.places);
  to[0] = narrow(out.before);
  to[p.dtaps.k] = narrow(out.here);
  to[2 * p.dtaps.k] = narrow(out.after);
}
