// A line of a scan in the registers of a warp: which places a lane holds, the state and its adjoint line by line.
//
// Macro: WHOLE (1: every line has a multiple of PLACES places; 0 where it is not given)
#pragma once
#include "resident.cuh"

#ifndef WHOLE
#define WHOLE 0
#endif

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

// Weights of a line as they are stored.
struct LineTaps {
  u32 w[TAP_WORDS];
};

// Places behind the end of a line: zero, whatever their neighbours hold.
__device__ __forceinline__ void clear_beyond(const Held& held, Lane& h) {
#if !WHOLE
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 1; v < PLACES; v++) h[c][v] = v < held.count ? h[c][v] : 0.f;
#endif
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
