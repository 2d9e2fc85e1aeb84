// The gradient of shared taps, from the sums that pixels_backward left for each block of channels: those of a group's
// blocks are added in order.
//
// Neighbouring threads take neighbouring places of a line, as these sums lie in memory.
//
// Knobs: 0 sums of an image, 1 sums of a group, 2 the axis (0 vertical, 1 horizontal), or -1 for all directions.
// Scratch: 3 the sums (B, directions, blocks, 3, lines, places).
#include "common.cuh"

KERNEL(256, 2) pixels_taps(CONSTANT_PARAMS p) {
  const long long pixels = (long long)p.height * p.width, index = (long long)blockIdx.x * 256 + threadIdx.x;
  const int of_image = p.knobs[0], of_group = p.knobs[1], axis = p.knobs[2];
  const int scans = axis < 0 ? p.scans : 2;
  const long long plane = index / pixels;  // (b, direction, group)
  if (plane >= (long long)p.batch * scans * p.groups) return;
  const long long at = index - plane * pixels;
  const int group = plane % p.groups, image = plane / p.groups, slot = image % scans, b = image / scans;
  int d = slot;
  if (axis >= 0)
    for (d = 0; p.directions[d] != 2 * axis + slot;) d++;
  const Scan s = scan_of(p, d);
  const int line = at / s.places, j = at - (long long)line * s.places;
  const float* from = (const float*)p.scratch[3] + ((long long)image * of_image + group * of_group) * 3 * pixels + at;
  Taps sum = {0.f, 0.f, 0.f};
  for (int i = 0; i < of_group; i += SUM_RUN) {
    Taps run = {0.f, 0.f, 0.f};
    for (int l = i; l < min(of_group, i + SUM_RUN); l++, from += 3 * pixels)
      run.add({__ldcs(from), __ldcs(from + pixels), __ldcs(from + 2 * pixels)});
    sum.add(run);
  }
  const long long step = (s.vertical ? p.taps.h : p.taps.w) * line + place_step(p.taps, s) * j;
  const long long to_step = (s.vertical ? p.dtaps.h : p.dtaps.w) * line + place_step(p.dtaps, s) * j;
  const storage_t* a = p.taps.data + b * p.taps.b + d * p.taps.d + group * p.taps.c + step;
  storage_t* to = p.dtaps.data + b * p.dtaps.b + d * p.dtaps.d + group * p.dtaps.c + to_step;
  const Taps raw = {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
  const Taps out = tap_gradient(raw, sum, j > 0, j + 1 < s.places);
  to[0] = narrow(out.before);
  to[p.dtaps.k] = narrow(out.here);
  to[2 * p.dtaps.k] = narrow(out.after);
}
