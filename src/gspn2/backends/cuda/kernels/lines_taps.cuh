// Weights from logits of a whole vector, as lines_forward and lines_weights make them.
#pragma once
#include "common.cuh"

// One of a word's two float16: as a pair, which the instruction that widens it can choose from.
__device__ __forceinline__ float half_of(u32 word, bool high) {
  const __half2 pair = *(const __half2*)&word;
  return high ? __high2float(pair) : __low2float(pair);
}

// Element e of stored words.
__device__ __forceinline__ float element(const u32* words, int e) {
#if STORAGE == 0
  return __uint_as_float(words[e]);
#elif STORAGE == 1
  const u32 word = words[e / 2];
  return __uint_as_float(e & 1 ? word & 0xffff0000u : word << 16);
#else
  return half_of(words[e / 2], e & 1);
#endif
}

// A logit of no share at all: minus infinity, or two.
constexpr u32 MISSING_LOGIT = STORAGE == 0 ? 0xff800000u : STORAGE == 1 ? 0xff80ff80u : 0xfc00fc00u;

// As tap_weights, whose comment has the maths, of logits that had 16 bits: powers of two throughout, bounded only where
// an infinity would leave NaN, because these instructions are most of what a place costs. ORDINARY: no logit is below
// -20, so that nothing needs a bound or a common factor.
template <bool ORDINARY>
__device__ __forceinline__ Taps weights_of(const Taps& a) {
#if NORMALIZE && STORAGE != 0
  const float log2e = 1.44269504f, most = 59.f;  // products of two powers stay finite
  const Taps t = {a.before * -log2e, a.here * -log2e, a.after * -log2e};
  float one = 1.f, shift = 0.f;
  if (!ORDINARY) {
    shift = fmax_nan(fmin_nan(t.before, fmin_nan(t.here, t.after)), 0.f);
    one = exp2_fast(-shift);
  }
  const float before = one + exp2_fast(ORDINARY ? t.before : fmin_nan(t.before - shift, most));
  const float here = one + exp2_fast(ORDINARY ? t.here : fmin_nan(t.here - shift, most));
  const float after = one + exp2_fast(ORDINARY ? t.after : fmin_nan(t.after - shift, most));
  const Taps w = {here * after, before * after, before * here};
  const float scale = reciprocal(w.before + w.here + w.after);
  return {w.before * scale, w.here * scale, w.after * scale};
#else
  return tap_weights(a, true, true);
#endif
}

// Has neither half a logit below -20? `largest`: of some words of logits, as integers, halves apart: as such these are
// the positive numbers, and negative ones up to -20.
__device__ __forceinline__ bool ordinary_logits(u32 largest) {
  constexpr u32 LEAST = STORAGE == 1 ? 0xc1a0u : 0xcd00u;
  return (largest & 0xffffu) <= LEAST && largest >> 16 <= LEAST;
}
