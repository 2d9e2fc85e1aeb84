// How a warp scans one direction of one unit in shared memory: the state line by line, and its adjoint.
#pragma once
#include "resident_records.cuh"

// Values as types, for a step of a scan that is compiled for each.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// The places that a lane holds, of every line of a scan.
//
// Lanes behind the end of a line do the same as the last, but write nothing; what the last writes they have read before,
// hence a __syncwarp between.
struct Held {
  int first;              // place
  int count;              // how many of its places are on the line; PLACES but for the last lane
  int before, after;      // lanes of the neighbours
  bool start, end;        // is it the first lane of the line; the last
  bool writes;
};

__device__ __forceinline__ Held held_by(const Scan& s) {
  const int last = (s.places - 1) / PLACES, mine = threadIdx.x & 31, lane = min(mine, last), first = lane * PLACES;
  return {first, min(PLACES, s.places - first), max(lane - 1, 0), min(lane + 1, last), lane == 0, lane == last, mine <= last};
}

// Where a lane's places of a line are.
struct Cursor {
  const unsigned char *x, *taps;
  unsigned char* units;   // plane of lam or gate, or of a result
  int unit, tap;          // bytes from plane to plane
  int step, tap_step;     // bytes to the line after
};

// `plane`: of the unit; `backwards`: from the last line of the image to the first.
__device__ __forceinline__ Cursor cursor_of(const Params& p, const Memory& m, const Range& range, const Scan& s, int d, int unit,
                                            int plane, bool backwards) {
  const int tap_size = TAP_BYTES / TAP_PLANES, unit_size = (int)sizeof(unit_t), units = units_of(p);
  const int pitch = s.vertical ? p.knobs[PITCH_V] : p.knobs[PITCH_H], bytes = s.vertical ? p.knobs[UNIT_V] : p.knobs[UNIT_H];
  const int taps = s.vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H];
  const int group = groups_of(p) == 1 ? 0 : unit * groups_of(p) / units;
  const int start = (backwards ? s.lines - 1 : 0) * pitch + held_by(s).first, step = backwards ? -pitch : pitch;
  unsigned char* base = shared_memory() + offset_of(m, range.first, d);
  Cursor c;
  c.x = shared_memory() + (s.vertical ? m.vertical_x : m.horizontal_x) + unit * bytes + start * unit_size;
  c.units = base + (unit * UNIT_PLANES + plane) * bytes + start * unit_size;
  c.taps = base + units * UNIT_PLANES * bytes + group * taps + start * tap_size;
  c.unit = bytes;
  c.tap = taps / TAP_PLANES;
  c.step = step * unit_size;
  c.tap_step = step * tap_size;
  return c;
}

// To the line after, if there is one.
__device__ __forceinline__ void advance(Cursor& c, bool more) {
  const int step = more ? c.step : 0, tap_step = more ? c.tap_step : 0;
  c.x += step;
  c.units += step;
  c.taps += (int)sizeof(unit_t) == TAP_BYTES / TAP_PLANES ? step : tap_step;
}

// Weights of a line as they are stored.
struct LineTaps {
  u32 w[TAP_WORDS];
};

__device__ __forceinline__ void load_taps(const Cursor& c, LineTaps& taps) {
#if TAP_PAIR
  load_words(c.taps, taps.w);
#else
#pragma unroll
  for (int k = 0; k < 3; k++) {
    u32 w[TAP_PLANE_WORDS];
    load_words(c.taps + k * c.tap, w);
#pragma unroll
    for (int i = 0; i < TAP_PLANE_WORDS; i++) taps.w[k * TAP_PLANE_WORDS + i] = w[i];
  }
#endif
}

// Places behind the end of a line: zero, whatever their neighbours hold.
__device__ __forceinline__ void clear_beyond(const Held& held, Lane& h) {
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 1; v < PLACES; v++) h[c][v] = v < held.count ? h[c][v] : 0.f;
}

// h, of the line before in scan order, becomes the state of the line whose source is u.
template <bool RESTART>
__device__ __forceinline__ void state_of_line(const LineTaps& taps, const Held& held, Lane& u, Lane& h) {
  if (!RESTART) {
    LaneTaps w;
    widen_taps(taps.w, w);
#if !NORMALIZE
    // Weights as given, also those of neighbours that do not exist.
    w.before[0] = held.start ? 0.f : w.before[0];
    w.after[PLACES - 1] = held.end ? 0.f : w.after[PLACES - 1];
#endif
#pragma unroll
    for (int c = 0; c < PACK; c++) {
      float before = __shfl_sync(0xffffffffu, h[c][PLACES - 1], held.before);
      float after = __shfl_sync(0xffffffffu, h[c][0], held.after);
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

// g, a line's source, becomes the gradient that reaches it, source + carried; `carried` becomes what it hands to the line before in scan
// order: place j hands w_k g to place j + k. A restart hands on nothing.
template <bool RESTART>
__device__ __forceinline__ void adjoint_of_line(const LineTaps& taps, const Held& held, Lane& carried, Lane& g) {
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) g[c][v] += carried[c][v];
  clear_beyond(held, g);
  LaneTaps w;
  if (!RESTART) widen_taps(taps.w, w);
#pragma unroll
  for (int c = 0; c < PACK; c++) {
    if (RESTART) {
#pragma unroll
      for (int v = 0; v < PLACES; v++) carried[c][v] = 0.f;
      continue;
    }
    float before = __shfl_sync(0xffffffffu, w.after[PLACES - 1] * g[c][PLACES - 1], held.before);
    float after = __shfl_sync(0xffffffffu, w.before[0] * g[c][0], held.after);
    before = held.start ? 0.f : before;
    after = held.end ? 0.f : after;
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      float sum = w.here[v] * g[c][v];
      if (v > 0) sum = fmaf(w.after[v - 1], g[c][v - 1], sum);
      if (v + 1 < PLACES) sum = fmaf(w.before[v + 1], g[c][v + 1], sum);
      if (v == 0) sum += before;
      if (v == PLACES - 1) sum += after;
      carried[c][v] = sum;
    }
  }
}

// The warp of this thread: the same number in all its lanes, and the compiler knows.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }
