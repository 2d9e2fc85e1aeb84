// Gradients of logits from those of their weights.
#pragma once
#include "resident.cuh"

// `tap_gradient` of common.cuh, with the weights at hand, where that is accurate enough.
__device__ __forceinline__ Taps logit_gradient(const Taps& w, const Taps& a, const Taps& dw, bool has_before, bool has_after) {
#if TAP_PAIR && STORAGE == 1
  const float log2e = 1.44269502f;
  const float before = has_before ? dw.before : 0.f, after = has_after ? dw.after : 0.f;
  const float mean = w.before * before + w.here * dw.here + w.after * after;
  // 1 - sigmoid(a) = 1 / (1 + e^a).
  return {has_before ? w.before * (before - mean) * reciprocal(1.f + exp2_fast(a.before * log2e)) : 0.f,
          w.here * (dw.here - mean) * reciprocal(1.f + exp2_fast(a.here * log2e)),
          has_after ? w.after * (after - mean) * reciprocal(1.f + exp2_fast(a.after * log2e)) : 0.f};
#else
  return tap_gradient(a, dw, has_before, has_after);
#endif
}

// The same with the weights as they were kept.
__device__ __forceinline__ Taps gradient_of(const unsigned char* taps, int index, const Taps& a, const Taps& dw, bool has_before,
                                            bool has_after) {
#if TAP_PAIR && STORAGE == 1
  return logit_gradient(unpack_taps(((const u32*)taps)[index]), a, dw, has_before, has_after);
#else
  return tap_gradient(a, dw, has_before, has_after);
#endif
}
