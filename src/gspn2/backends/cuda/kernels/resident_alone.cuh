// What forward of few small images takes time with, when every block has a multiprocessor and every scanning warp a
// scheduler for itself: weights of float32 logits, and the latency of a line.
#pragma once
#include "resident_line.cuh"
#include "strips_ptx.cuh"

static_assert(PACK == 1, "a warp scans one channel");

#if NORMALIZE && STORAGE == 0
// e^-a as accurate as by `exponential` of common.cuh, for a that needs no bounds.
__device__ __forceinline__ float inverse_exponential(float a) {
  const float log2e = 1.44269502f, power = a * -log2e;
  const float lost = fmaf(a, -1.925963033e-8f, fmaf(a, -log2e, -power));
  const float e = exp2_fast(power);
  return fmaf(e, lost * 0.693147181f, e);
}
#endif

// As by weights_of; for float32 logits that need neither bounds nor a common factor, in fewer instructions.
__device__ __forceinline__ Taps quick_weights(const Taps& a, bool has_before, bool has_after) {
#if NORMALIZE && STORAGE == 0
  // What a missing neighbour would have is a factor common to the others.
  const Taps t = {has_before ? a.before : 0.f, a.here, has_after ? a.after : 0.f};
  // Products of two exponentials stay finite, and reciprocals of their sum normal.
  if (fmaxf(fabsf(t.here), fmaxf(fabsf(t.before), fabsf(t.after))) <= 40.f) {
    const float before = 1.f + inverse_exponential(t.before), here = 1.f + inverse_exponential(t.here);
    const float after = 1.f + inverse_exponential(t.after);
    const Taps w = {has_before ? here * after : 0.f, before * after, has_after ? before * here : 0.f};
    const float scale = reciprocal(w.before + w.here + w.after);
    return {w.before * scale, w.here * scale, w.after * scale};
  }
#endif
  return weights_of(a, has_before, has_after);
}

// h, of the line before in scan order, becomes the state of the line whose source is u, as by state_of_line. What
// comes from other lanes is added last: it is what the next line waits for. Where there is no neighbour its product is
// left out by a predicated instruction, as a select would stand between the shuffle and the sum.
template <bool RESTART>
__device__ __forceinline__ void next_state(const LineTaps& taps, const Held& held, const Lane& u, Lane& h) {
  Lane next;
#pragma unroll
  for (int v = 0; v < PLACES; v++) next[0][v] = u[0][v];
  if (!RESTART) {
    const float before = __shfl_sync(0xffffffffu, h[0][PLACES - 1], held.before);
    const float after = __shfl_sync(0xffffffffu, h[0][0], held.after);
    LaneTaps w;
    widen_taps(taps.w, w);
#pragma unroll
    for (int v = 0; v < PLACES; v++) {
      next[0][v] = fmaf(w.here[v], h[0][v], next[0][v]);
      if (v > 0) next[0][v] = fmaf(w.before[v], h[0][v - 1], next[0][v]);
      if (v + 1 < PLACES) next[0][v] = fmaf(w.after[v], h[0][v + 1], next[0][v]);
    }
    next[0][0] = fma_where(!held.start, w.before[0], before, next[0][0]);
    next[0][PLACES - 1] = fma_where(!held.end, w.after[PLACES - 1], after, next[0][PLACES - 1]);
  }
#pragma unroll
  for (int v = 0; v < PLACES; v++) h[0][v] = next[0][v];
  clear_beyond(held, h);
}
