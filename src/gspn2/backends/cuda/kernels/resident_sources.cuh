// Scans whose sources are float32 numbers in shared memory, a plane for each channel, in scan coordinates: (line, place) with
// places adjacent, lines in image order. States, or adjoints, take the place of their sources. The weights of a direction
// are planes beside them.
//
// Macro: PACK, channels that a warp scans.
#pragma once
#include "resident_line.cuh"

__device__ __forceinline__ int plane_of(const Params& p, bool vertical) { return vertical ? p.knobs[UNIT_V] : p.knobs[UNIT_H]; }

// States of PACK channels in direction d, or their adjoints, in the place of their sources. The operands of the next line
// are on their way while one is computed.
template <bool ADJOINT>
__device__ __forceinline__ void scan(const Params& p, int d, unsigned char* sources, const unsigned char* weights) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  const bool backwards = s.reversed != ADJOINT;
  const int plane = plane_of(p, s.vertical), pitch = 4 * (s.vertical ? p.knobs[PITCH_V] : p.knobs[PITCH_H]);
  const int step_bytes = backwards ? -pitch : pitch;
  int offset = (backwards ? s.lines - 1 : 0) * pitch + held.first * 4;
  Lane next, carried;  // from the line before: its state, or what reaches this line
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) carried[c][v] = 0.f;
  LineTaps next_taps;
  const int tap_size = TAP_BYTES / TAP_PLANES;
  const auto load = [&]() {
#pragma unroll
    for (int c = 0; c < PACK; c++) {
      u32 w[PLACES];
      load_words(sources + c * plane + offset, w);
#pragma unroll
      for (int v = 0; v < PLACES; v++) next[c][v] = __uint_as_float(w[v]);
    }
    const unsigned char* taps = weights + (tap_size == 4 ? offset : offset / 4 * tap_size);
#if TAP_PAIR
    load_words(taps, next_taps.w);
#else
    const int tap_plane = (s.vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H]) / 3;
#pragma unroll
    for (int k = 0; k < 3; k++) {
      u32 w[TAP_PLANE_WORDS];
      load_words(taps + k * tap_plane, w);
#pragma unroll
      for (int i = 0; i < TAP_PLANE_WORDS; i++) next_taps.w[k * TAP_PLANE_WORDS + i] = w[i];
    }
#endif
  };
  load();
  int left = s.lines;
  const auto step = [&](auto restart) {
    Lane source;
#pragma unroll
    for (int c = 0; c < PACK; c++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) source[c][v] = next[c][v];
    const LineTaps taps = next_taps;
    unsigned char* out = sources + offset;
    offset += --left > 0 ? step_bytes : 0;
    load();
    if (ADJOINT)
      adjoint_of_line<decltype(restart)::value>(taps, held, carried, source);
    else
      state_of_line<decltype(restart)::value>(taps, held, source, carried);
    __syncwarp();
    if (!held.writes) return;
#pragma unroll
    for (int c = 0; c < PACK; c++) {
      u32 w[PLACES];
#pragma unroll
      for (int v = 0; v < PLACES; v++) w[v] = __float_as_uint(ADJOINT ? source[c][v] : carried[c][v]);
      store_words(out + c * plane, w);
    }
  };
  // A state restarts at the first line of a chunk, an adjoint behind it: backwards, at the last.
  int more = ADJOINT ? (s.lines - 1) % p.chunk : min(p.chunk, left) - 1;
  while (left > 0) {
    if (!ADJOINT) step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
    if (ADJOINT) step(Yes());
    more = ADJOINT ? p.chunk - 1 : min(p.chunk, left) - 1;
  }
}
