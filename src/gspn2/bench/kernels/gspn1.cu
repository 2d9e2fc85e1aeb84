// The baseline: one line of all planes a launch, as GSPN-1 is described to run. A flat grid of threads, one for
// each place of the line in each plane, neighbours in memory W apart: every access is a sector of its own. The
// state goes through memory in the storage type from launch to launch. Written from the description only.
//
// Planes (B, C, H, W) with W contiguous, scanned to the right, taps of their own for every channel.
// Knob 0: the column that this launch computes.
// Scratch 0 (backward): the gradient that has reached each state, in the storage type.
#include "common.cuh"

struct Place {
  long long at, taps, step;  // offset in x, lam, y; offset of tap -1; elements between taps
  int b, c, row;
  bool inside;
};

__device__ __forceinline__ Place place_of(const Params& p) {
  const int planes = p.batch * p.channels;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Place s;
  s.inside = i < planes * p.height;
  s.row = i % p.height;
  const int plane = i / p.height;
  s.c = plane % p.channels;
  s.b = plane / p.channels;
  s.at = ((long long)plane * p.height + s.row) * p.width + p.knobs[0];
  s.taps = s.b * p.taps.b + s.c * p.taps.c + (long long)s.row * p.width + p.knobs[0];
  s.step = p.taps.k;
  return s;
}

// A number of an image or of its taps, 0 outside.
__device__ __forceinline__ float value(const Params& p, const View& v, const Place& s, int row, int column, int tap = 0) {
  if (row < 0 || row >= p.height || column < 0 || column >= p.width) return 0.f;
  return widen(v.data[s.b * v.b + s.c * v.c + tap * v.k + row * v.h + column * v.w]);
}

KERNEL(512, 4) gspn1_forward(CONSTANT_PARAMS p) {
  const Place s = place_of(p);
  if (!s.inside) return;
  const int column = p.knobs[0];
  float h = value(p, p.x, s, s.row, column) * value(p, p.lam, s, s.row, column);
  for (int tap = 0; tap < 3; ++tap)
    h += value(p, p.taps, s, s.row, column, tap) * value(p, p.y, s, s.row + tap - 1, column - 1);
  p.y.data[s.at] = narrow(h);
}

// What the place hands back to row `row + k` of the line before it, if both are there.
__device__ __forceinline__ float handed(const Params& p, const storage_t* w, const storage_t* g, int row, int tap) {
  const int from = row - (tap - 1);
  if (from < 0 || from >= p.height) return 0.f;
  const long long away = (long long)(from - row) * p.width;
  return widen(w[tap * p.taps.k + away]) * widen(g[away]);
}

KERNEL(512, 1) gspn1_backward(CONSTANT_PARAMS p) {
  const Place s = place_of(p);
  if (!s.inside) return;
  storage_t* gradients = (storage_t*)p.scratch[0];
  float g = widen(p.dy.data[s.at]);
  if (p.knobs[0] + 1 < p.width) {
    const storage_t* w = p.taps.data + s.taps + 1;
    const storage_t* after = gradients + s.at + 1;
    for (int tap = 0; tap < 3; ++tap) g += handed(p, w, after, s.row, tap);
  }
  gradients[s.at] = narrow(g);
  p.dx.data[s.at] = narrow(g * widen(p.lam.data[s.at]));
  p.dlam.data[s.at] = narrow(g * widen(p.x.data[s.at]));
  for (int tap = 0; tap < 3; ++tap) {
    const int from = s.row + tap - 1;
    const bool there = p.knobs[0] > 0 && from >= 0 && from < p.height;
    const float h = there ? widen(p.y.data[s.at - 1 + (long long)(tap - 1) * p.width]) : 0.f;
    p.dtaps.data[s.taps + tap * s.step] = narrow(g * h);
  }
}
