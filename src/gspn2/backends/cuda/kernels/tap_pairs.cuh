// Weights of a place in one word, made from 16-bit logits.
#pragma once
#include "common.cuh"

// Weights made here from 16-bit logits are kept as two 16-bit numbers, `before` and `after`; what they lack is given to
// `here` = 1 - before - after, which is never negative, so that the three stay row-stochastic to the last bit of a float.
// bfloat16: float16 numbers (error at most 2^-12 of each, a fraction of what rounding the logits cost). float16: multiples
// of 2^-16.
#define TAP_PAIR (NORMALIZE && STORAGE != 0)

// `tap_weights` of common.cuh for 16-bit logits, in fewer instructions: the same shift by m, in powers of two.
__device__ __forceinline__ Taps weights_of(Taps a, bool has_before, bool has_after) {
#if TAP_PAIR
  const float log2e = 1.44269502f, missing = -3e38f;
  a.before = has_before ? a.before : missing;
  a.after = has_after ? a.after : missing;
  const float m = fmin_nan(fmax_nan(fmax_nan(a.before, a.after), a.here), 0.f) * log2e;
  const float e = exp2_fast(m);
  // At most 2^60: products stay finite, and a weight below 2^-60 of another is as good as 0.
  const float before = e + exp2_fast(fmin_nan(fmaf(a.before, -log2e, m), 60.f));
  const float here = e + exp2_fast(fmin_nan(fmaf(a.here, -log2e, m), 60.f));
  const float after = e + exp2_fast(fmin_nan(fmaf(a.after, -log2e, m), 60.f));
  const float w_before = here * after, w_here = before * after, w_after = before * here;
  const float scale = reciprocal(w_before + w_here + w_after);
  return {w_before * scale, w_here * scale, w_after * scale};
#else
  return tap_weights(a, has_before, has_after);
#endif
}

#if TAP_PAIR
// The same without the shift, in fewer; `fine` becomes false where a product of exponentials is too large, or a NaN.
__device__ __forceinline__ Taps plain_weights(const Taps& a, bool has_before, bool has_after, bool& fine) {
  const float log2e = 1.44269502f;
  // What a missing neighbour would have is a factor common to the others.
  const float before = 1.f + exp2_fast(-log2e * (has_before ? a.before : 0.f));
  const float here = 1.f + exp2_fast(-log2e * a.here);
  const float after = 1.f + exp2_fast(-log2e * (has_after ? a.after : 0.f));
  const float w_before = has_before ? here * after : 0.f, w_here = before * after, w_after = has_after ? before * here : 0.f;
  const float sum = w_before + w_here + w_after;
  fine = fine && sum < 0x1p125f;
  const float scale = reciprocal(sum);
  return {w_before * scale, w_here * scale, w_after * scale};
}
#endif

#if TAP_PAIR && STORAGE == 1
__device__ __forceinline__ float truncate_to_half(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

__device__ __forceinline__ u32 pack_taps(const Taps& w) {
  // Rounding adds at most 2^-12 to one of them and 2^-13 to the other: more than 1 only if less is left.
  const bool close = w.here < 0x1p-11f;
  const __half2 pair =
      __floats2half2_rn(close ? truncate_to_half(w.before) : w.before, close ? truncate_to_half(w.after) : w.after);
  return (u32)__half_as_ushort(__low2half(pair)) | (u32)__half_as_ushort(__high2half(pair)) << 16;
}

__device__ __forceinline__ Taps unpack_taps(u32 word) {
  const float before = __half2float(__ushort_as_half((unsigned short)(word & 0xffffu)));
  const float after = __half2float(__ushort_as_half((unsigned short)(word >> 16)));
  return {before, 1.f - before - after, after};
}
#elif TAP_PAIR
// Both cannot be nearly 1: that code stands for NaN.
#define NAN_TAPS 0xffffffffu

__device__ __forceinline__ u32 pack_taps(const Taps& w) {
  const u32 before = min((u32)(w.before * 65536.f), 65535u), after = min((u32)(w.after * 65536.f), 65535u);
  return w.here == w.here ? before | after << 16 : NAN_TAPS;
}

__device__ __forceinline__ Taps unpack_taps(u32 word) {
  // 2^23 + n has the bits of n at its end.
  const float before = fmaf(__uint_as_float(0x4b000000u | (word & 0xffffu)), 0x1p-16f, -128.f);
  const float after = fmaf(__uint_as_float(0x4b000000u | word >> 16), 0x1p-16f, -128.f);
  return {before, word == NAN_TAPS ? __uint_as_float(0x7fffffffu) : 1.f - before - after, after};
}
#endif
