// How a warp scans one direction of one unit in shared memory.
#pragma once
#include "resident_line.cuh"
#include "resident_records.cuh"

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
