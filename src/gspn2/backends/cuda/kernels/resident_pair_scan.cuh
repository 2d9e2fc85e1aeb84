// How a warp scans one direction of both channels of a pair, and where their numbers are.
//
// Sources are float32 pairs in shared memory in scan coordinates, lines in image order; states, or adjoints, take the
// place of their sources. Weights are words beside them. A lane holds PLACES neighbouring places, and what its place
// v is lies in part v of a plane: lines of such parts are an odd number of items apart in the scans along rows, so
// that the pixels of a row, which are lines there, and the lanes of a line both meet every bank of shared memory
// once. Parts are apart so that the pixels of a row do so in the scans down and up, too (`resident_pair.py`).
//
// Macros: FIXED   1: the sizes are macros, too: HEIGHT, WIDTH, and what else the knobs say, LINE_V, PAIRS_V, WEIGHTS_V
//                 and LINE_H, PAIRS_H, WEIGHTS_H; so every address is a register and a constant
#pragma once
#define PACK 2
#define ONE 1
#define SPLIT 1
#include "resident_line.cuh"

#if FIXED
__device__ __forceinline__ int rows_of(const Params&) { return HEIGHT; }
__device__ __forceinline__ int columns_of(const Params&) { return WIDTH; }
#else
__device__ __forceinline__ int rows_of(const Params& p) { return p.height; }
__device__ __forceinline__ int columns_of(const Params& p) { return p.width; }
#endif
__device__ __forceinline__ int pixels_of(const Params& p) { return rows_of(p) * columns_of(p); }

// What the directions of an axis share.
struct Axis {
  bool vertical;
  int lines, places, pitch;  // pitch: items from line to line
  int pairs, weights;        // bytes of a part of a plane of pairs, and of one of weights
};

__device__ __forceinline__ Axis axis_of(const Params& p, bool vertical) {
  const int lines = vertical ? rows_of(p) : columns_of(p), places = vertical ? columns_of(p) : rows_of(p);
#if FIXED
  // Alike wherever they are, so that a choice at run time remains a choice between rows and columns.
  return {vertical, lines, places, LINE_V == LINE_H || vertical ? LINE_V : LINE_H,
          PAIRS_V == PAIRS_H || vertical ? PAIRS_V : PAIRS_H,
          WEIGHTS_V == WEIGHTS_H || vertical ? WEIGHTS_V : WEIGHTS_H};
#else
  return vertical ? Axis{true, lines, places, p.knobs[PITCH_V], p.knobs[UNIT_V], p.knobs[TAPS_V]}
                  : Axis{false, lines, places, p.knobs[PITCH_H], p.knobs[UNIT_H], p.knobs[TAPS_H]};
#endif
}

// A line as it is in shared memory, and in the registers of a lane.
struct Packed {
  float2 pair[PLACES];
  u32 weights[PLACES];
};
struct Operand {
  Lane source;
  LaneTaps w;
};

__device__ __forceinline__ void widen_line(const Packed& packed, Operand& line) {
#pragma unroll
  for (int v = 0; v < PLACES; v++) line.source[0][v] = packed.pair[v].x, line.source[1][v] = packed.pair[v].y;
  widen_taps(packed.weights, line.w);
}

// What the neighbours of a lane hand it: `low` of the lane after, `high` of the lane before; 0 where there is none.
struct Neighbour {
  float before, after;
};

__device__ __forceinline__ Neighbour exchange(const Held& held, float low, float high) {
  const float before = __shfl_sync(0xffffffffu, high, held.before), after = __shfl_sync(0xffffffffu, low, held.after);
  return {held.start ? 0.f : before, held.end ? 0.f : after};
}

// The state of the line before becomes that of this line: what comes from other lanes is added last.
__device__ __forceinline__ void next_state(const Operand& line, const Neighbour (&from)[2], Lane& h) {
  const LaneTaps& w = line.w;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    float sum[PLACES];
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      sum[v] = fmaf(w.here[v], h[c][v], line.source[c][v]);
      if (v > 0) sum[v] = fmaf(w.before[v], h[c][v - 1], sum[v]);
      if (v + 1 < PLACES) sum[v] = fmaf(w.after[v], h[c][v + 1], sum[v]);
    }
    sum[0] = fmaf(w.before[0], from[c].before, sum[0]);
    sum[PLACES - 1] = fmaf(w.after[PLACES - 1], from[c].after, sum[PLACES - 1]);
#pragma unroll
    for (int v = 0; v < PLACES; v++) h[c][v] = sum[v];
  }
}

// What a line whose adjoint is g hands to the line before in scan order: place j hands w_k g to place j + k.
__device__ __forceinline__ void carry(const LaneTaps& w, const Neighbour (&from)[2], const Lane& g, Lane& carried) {
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      float sum = w.here[v] * g[c][v];
      if (v > 0) sum = fmaf(w.after[v - 1], g[c][v - 1], sum);
      if (v + 1 < PLACES) sum = fmaf(w.before[v + 1], g[c][v + 1], sum);
      if (v == 0) sum += from[c].before;
      if (v == PLACES - 1) sum += from[c].after;
      carried[c][v] = sum;
    }
}

// States of both channels in direction d, or their adjoints, in the place of their sources.
//
// A warp is alone on its scheduler here: while neighbours are on their way it widens the next line, and reads the one
// after that.
template <bool ADJOINT>
__device__ __forceinline__ void scan_pair(const Params& p, int d, unsigned char* sources,
                                          const unsigned char* weights) {
  const Axis axis = axis_of(p, vertical_at(d));
  const Scan s = {axis.lines, axis.places, axis.vertical, (direction_at(d) & 1) != 0};
  const Held held = held_by(s);
  const bool backwards = s.reversed != ADJOINT;
  const int step_bytes = 4 * (backwards ? -axis.pitch : axis.pitch);
  // Of a line's weights; pairs are twice as far.
  const int begin = 4 * ((backwards ? s.lines - 1 : 0) * axis.pitch + held.first / PLACES);
  const unsigned char* ahead = sources + 2 * begin;
  weights += begin;
  int written = 2 * begin, unread = s.lines;
  Packed packed;
  const auto load = [&]() {
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      packed.pair[v] = *(const float2*)(ahead + v * axis.pairs);
      packed.weights[v] = *(const u32*)(weights + v * axis.weights);
    }
    const int bytes = --unread > 0 ? step_bytes : 0;
    ahead += 2 * bytes, weights += bytes;
  };
  Operand line;
  load();
  widen_line(packed, line);
  load();
  Lane carried;  // from the line before: its state, or what reaches this line
#pragma unroll
  for (int v = 0; v < PLACES; v++) carried[0][v] = carried[1][v] = 0.f;
  int left = s.lines;
  const auto step = [&](auto restart) {
    constexpr bool RESTART = decltype(restart)::value;
    Lane g;
    Neighbour from[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (ADJOINT) {
#pragma unroll
        for (int v = 0; v < PLACES; v++) g[c][v] = line.source[c][v] + carried[c][v];
      }
    }
    if (ADJOINT) clear_beyond(held, g);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (RESTART) continue;
      from[c] = ADJOINT ? exchange(held, line.w.before[0] * g[c][0], line.w.after[PLACES - 1] * g[c][PLACES - 1])
                        : exchange(held, carried[c][0], carried[c][PLACES - 1]);
    }
    Operand next;
    widen_line(packed, next);
    load();
    if (ADJOINT && !RESTART) carry(line.w, from, g, carried);
    if (!ADJOINT && !RESTART) next_state(line, from, carried);
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int v = 0; v < PLACES; v++)
        if (RESTART) carried[c][v] = ADJOINT ? 0.f : line.source[c][v];
    if (!ADJOINT) clear_beyond(held, carried);
    __syncwarp();
    if (held.writes) {
#pragma unroll
      for (int v = 0; v < PLACES; v++)
        *(float2*)(sources + v * axis.pairs + written) =
            ADJOINT ? make_float2(g[0][v], g[1][v]) : make_float2(carried[0][v], carried[1][v]);
    }
    written += 2 * step_bytes, left--;
    line = next;
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
