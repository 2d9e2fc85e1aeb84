// What every kernel shares: arguments, storage types, directions as strides, and the maths of the taps.
//
// A kernel is compiled for one storage type and one set of options, given as macros:
//   STORAGE    0 float32, 1 bfloat16, 2 float16
//   NORMALIZE  1: taps are logits, made row-stochastic here; 0: weights, used as given
//   HAS_LAM, HAS_GATE  is the tensor there (otherwise it is 1)
// Sizes, strides, directions and chunk are values at run time: nothing is recompiled when they change.
#pragma once
#include "storage.cuh"

// One tensor: address and strides in elements. Images (B, C, H, W) have d = k = 0; taps (B, D, G, 3, H, W) keep
// the stride of G in c. data is null for a tensor that is absent, or a gradient nobody asked for.
struct View {
  storage_t* data;
  long long b, d, c, k, h, w;
};

// `launch.py` packs this structure; the two must agree.
struct Params {
  View x, taps, lam, gate;             // inputs
  View y;                              // output of forward
  View dy, dx, dtaps, dlam, dgate;     // incoming gradient and outputs of backward
  void* scratch[4];                    // what the plan asked for
  int batch, channels, groups, height, width;
  int chunk;                           // lines between restarts; at least as many as there are lines for none
  int scans;                           // number of directions D
  int directions[4];                   // 0 down, 1 up, 2 right, 3 left
  int knobs[17];                       // what the plan decided, in an order of the kernel's own
};

// A direction: how many lines, how many places along each, and in which order they come.
struct Scan {
  int lines, places;
  bool vertical, reversed;
};

__device__ __forceinline__ Scan scan_of(const Params& p, int d) {
  const int direction = p.directions[d];
  const bool vertical = direction < 2;
  return {vertical ? p.height : p.width, vertical ? p.width : p.height, vertical, (direction & 1) != 0};
}

// Elements from one line to the next in scan order, from one place to the next, and to the first line.
__device__ __forceinline__ long long line_step(const View& v, const Scan& s) {
  const long long step = s.vertical ? v.h : v.w;
  return s.reversed ? -step : step;
}
__device__ __forceinline__ long long place_step(const View& v, const Scan& s) { return s.vertical ? v.w : v.h; }
__device__ __forceinline__ long long first_line(const View& v, const Scan& s) {
  return s.reversed ? (s.lines - 1) * (s.vertical ? v.h : v.w) : 0;
}

struct Taps {
  float before, here, after;  // neighbours j - 1, j, j + 1

  __device__ __forceinline__ void add(const Taps& other) {
    before += other.before, here += other.here, after += other.after;
  }
};

// Numbers that are added in runs of so many, and then the runs' sums, lose less to rounding than one after another:
// in float32 a gradient summed over hundreds of channels would be worse than PyTorch's, which adds in a tree.
constexpr int SUM_RUN = 16;

// Row-stochastic weights of one place: w_k = sigmoid(a_k) / sum over existing m of sigmoid(a_m), as a softmax
// of log-sigmoids, which is no 0 / 0 where all logits are very negative (docs/math.md). With m = min(0, max a)
// and E_k = e^m + e^(m - a_k), w_k is proportional to 1 / E_k. What a missing neighbour's logit holds is
// never looked at: it may be NaN.
struct Exponentials {
  float m, before, here, after;  // e^m and E_k
};

// e^v for v between -87 and 41; outside as at the bound, NaN as NaN.
__device__ __forceinline__ float exponential(float v) {
  const float log2e = 1.44269502f;
  v = fmax_nan(fmin_nan(v, 41.f), -87.f);
  const float power = v * log2e;
#if STORAGE == 0
  // What rounding `power` and `log2e` lost: in float32 it would show in the result.
  const float lost = fmaf(v, 1.925963033e-8f, fmaf(v, log2e, -power));
  const float e = exp2_fast(power);
  return fmaf(e, lost * 0.693147181f, e);
#else
  return exp2_fast(power);
#endif
}

__device__ __forceinline__ Exponentials exponentials(const Taps& a, bool has_before, bool has_after) {
  const float top = fmax_nan(has_before ? a.before : a.here, fmax_nan(a.here, has_after ? a.after : a.here));
  const float m = fmin_nan(top, 0.f);
  Exponentials e;
  // The bound of `exponential` keeps products of two E finite; a weight below e^-41 of another is as good as 0.
  e.m = exponential(m);
  e.before = has_before ? e.m + exponential(m - a.before) : 1.f;
  e.here = e.m + exponential(m - a.here);
  e.after = has_after ? e.m + exponential(m - a.after) : 1.f;
  return e;
}

__device__ __forceinline__ Taps tap_weights(const Taps& a, bool has_before, bool has_after) {
#if NORMALIZE
  const Exponentials e = exponentials(a, has_before, has_after);
  // w_0 = E1 E2 / (E1 E2 + E0 E2 + E0 E1), and so on; a missing neighbour has no share.
  const float before = has_before ? e.here * e.after : 0.f;
  const float here = e.before * e.after;
  const float after = has_after ? e.before * e.here : 0.f;
  const float scale = reciprocal(before + here + after);
  return {before * scale, here * scale, after * scale};
#else
  return {has_before ? a.before : 0.f, a.here, has_after ? a.after : 0.f};
#endif
}

// Gradient of the taps as stored, from dw_k, the gradient of the weights:
// da_k = w_k (1 - sigmoid(a_k)) (dw_k - sum_m w_m dw_m).
__device__ __forceinline__ Taps tap_gradient(const Taps& a, const Taps& dw, bool has_before, bool has_after) {
#if NORMALIZE
  const Taps w = tap_weights(a, has_before, has_after);
  const float before = has_before ? dw.before : 0.f, after = has_after ? dw.after : 0.f;
  const float mean = w.before * before + w.here * dw.here + w.after * after;
  // 1 - sigmoid(a) = 1 / (1 + e^a), without cancellation.
  return {has_before ? w.before * (before - mean) * reciprocal(1.f + exponential(a.before)) : 0.f,
          w.here * (dw.here - mean) * reciprocal(1.f + exponential(a.here)),
          has_after ? w.after * (after - mean) * reciprocal(1.f + exponential(a.after)) : 0.f};
#else
  return {has_before ? dw.before : 0.f, dw.here, has_after ? dw.after : 0.f};
#endif
}
