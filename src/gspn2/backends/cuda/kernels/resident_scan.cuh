// How a warp scans one direction of one unit in shared memory: the state line by line, and its adjoint.
#pragma once
#include "resident_operands.cuh"

// The places that a lane holds, of every line of a scan.
struct Held {
  int first;              // place
  int beyond;             // how many of its places are on the line; PLACES but for the last lane
  bool any, start, end;   // does it hold any; is it the first lane of the line; the last or behind it
  bool ragged;            // lines end within a lane
};

__device__ __forceinline__ Held held_by(const Scan& s) {
  const int lane = threadIdx.x & 31, last = (s.places - 1) / PLACES, first = min(lane, last) * PLACES;
  return {first, min(PLACES, s.places - first), lane <= last, lane == 0, lane >= last, s.places % PLACES != 0};
}

// Where a lane's places of a line are.
struct Cursor {
  const unsigned char *image, *taps;
  unsigned char* units;         // plane of the factor of the image, and of the result
  int unit, tap;                // bytes from plane to plane
  int step, tap_step;           // bytes to the line after
};

// `image`: 0 x, 1 dy; `plane`: of the unit, lam's or gate's; `backwards`: from the last line of the image to the first.
__device__ __forceinline__ Cursor cursor_of(const Params& p, const Memory& m, const Range& range, const Scan& s, int d, int unit,
                                            int image, int plane, bool backwards) {
  const Planes planes = planes_for(m, s.vertical);
  const int tap_size = TAP_BYTES / TAP_PLANES, unit_size = (int)sizeof(unit_t);
  const int group = m.groups == 1 ? 0 : unit * m.groups / m.units;
  const int start = (backwards ? s.lines - 1 : 0) * planes.pitch + held_by(s).first;
  const int step = backwards ? -planes.pitch : planes.pitch;
  unsigned char* base = m.base + offset_of(p, m, range.first, d);
  Cursor c;
  c.image = m.base + (s.vertical ? m.vertical_images : m.horizontal_images) + (image * m.units + unit) * planes.unit +
            start * unit_size;
  c.units = base + (unit * UNIT_PLANES + plane) * planes.unit + start * unit_size;
  c.taps = base + m.units * UNIT_PLANES * planes.unit + group * planes.taps + start * tap_size;
  c.unit = planes.unit;
  c.tap = planes.taps / TAP_PLANES;
  c.step = step * unit_size;
  c.tap_step = step * tap_size;
  return c;
}

__device__ __forceinline__ void advance(Cursor& c) {
  c.image += c.step;
  c.units += c.step;
  c.taps += c.tap_step;
}

// A line as it is stored: an image, what it is multiplied by, and weights.
struct Line {
  u32 image[LINE_WORDS], factor[LINE_WORDS], taps[TAP_WORDS];
};

template <bool FACTOR>
__device__ __forceinline__ void load_line(const Cursor& c, Line& line) {
  load_words(c.image, line.image);
  if (FACTOR) load_words(c.units, line.factor);
#if TAP_PAIR
  load_words(c.taps, line.taps);
#else
#pragma unroll
  for (int k = 0; k < 3; k++) {
    u32 w[TAP_PLANE_WORDS];
    load_words(c.taps + k * c.tap, w);
#pragma unroll
    for (int i = 0; i < TAP_PLANE_WORDS; i++) line.taps[k * TAP_PLANE_WORDS + i] = w[i];
  }
#endif
}

template <bool FACTOR>
__device__ __forceinline__ void source_of_line(const Line& line, Lane& u) {
  widen_lane(line.image, u);
  if (FACTOR) {
    Lane factor;
    widen_lane(line.factor, factor);
#pragma unroll
    for (int c = 0; c < PACK; c++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) u[c][v] *= factor[c][v];
  }
}

// Places behind the end of a line: zero, whatever their neighbours hold.
__device__ __forceinline__ void clear_beyond(const Held& held, Lane& h) {
  if (held.ragged) {
#pragma unroll
    for (int c = 0; c < PACK; c++)
#pragma unroll
      for (int v = 1; v < PLACES; v++) h[c][v] = v < held.beyond ? h[c][v] : 0.f;
  }
}

// h, of the line before in scan order, becomes the state of this line.
template <bool FACTOR>
__device__ __forceinline__ void state_of_line(const Line& line, const Held& held, bool restart, Lane& h) {
  Lane u;
  source_of_line<FACTOR>(line, u);
  if (!restart) {
    LaneTaps w;
    widen_taps(line.taps, w);
#pragma unroll
    for (int c = 0; c < PACK; c++) {
      float before = __shfl_up_sync(0xffffffffu, h[c][PLACES - 1], 1);
      float after = __shfl_down_sync(0xffffffffu, h[c][0], 1);
      before = held.start ? 0.f : before;
      after = held.end ? 0.f : after;
#pragma unroll
      for (int v = 0; v < PLACES; v++) {
        u[c][v] = fmaf(w.here[v], h[c][v], u[c][v]);
        if (v > 0) u[c][v] = fmaf(w.before[v], h[c][v - 1], u[c][v]);
        if (v + 1 < PLACES) u[c][v] = fmaf(w.after[v], h[c][v + 1], u[c][v]);
      }
      u[c][0] = fmaf(w.before[0], before, u[c][0]);
      u[c][PLACES - 1] = fmaf(w.after[PLACES - 1], after, u[c][PLACES - 1]);
    }
  }
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) h[c][v] = u[c][v];
  clear_beyond(held, h);
}

// g = source + carried is the gradient that reaches this line; `carried` becomes what it hands to the line before in scan
// order: place j hands w_k g to place j + k. A restart hands on nothing.
template <bool FACTOR>
__device__ __forceinline__ void adjoint_of_line(const Line& line, const Held& held, bool restart, Lane& carried, Lane& g) {
  source_of_line<FACTOR>(line, g);
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) g[c][v] += carried[c][v];
  clear_beyond(held, g);
  LaneTaps w;
  widen_taps(line.taps, w);
#pragma unroll
  for (int c = 0; c < PACK; c++) {
    float before = __shfl_up_sync(0xffffffffu, w.after[PLACES - 1] * g[c][PLACES - 1], 1);
    float after = __shfl_down_sync(0xffffffffu, w.before[0] * g[c][0], 1);
    before = held.start ? 0.f : before;
    after = held.end ? 0.f : after;
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      float sum = w.here[v] * g[c][v];
      if (v > 0) sum = fmaf(w.after[v - 1], g[c][v - 1], sum);
      if (v + 1 < PLACES) sum = fmaf(w.before[v + 1], g[c][v + 1], sum);
      if (v == 0) sum += before;
      if (v == PLACES - 1) sum += after;
      carried[c][v] = restart ? 0.f : sum;
    }
  }
}
