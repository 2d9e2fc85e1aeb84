// Gradients of a tile whose channels have taps of their own, from what enters it (see tiles_own.cuh).
//
// A lane scans forward and keeps its states in registers; then it walks back and makes all gradients, that of
// its logits included, for no other channel has these taps. What has been used gives its place to its
// gradient, and weights to parts of dx.
//
// More macros: MIN_BLOCKS of a multiprocessor.
#define BACKWARD 1
#include "tiles_own_final.cuh"

// What the gradient of a place's logits needs of them: weights, because differences of float16 ones are too
// far from weights that are nearly 0, and 1 - sigmoid of each logit, without cancellation.
struct Softmax {
  Taps w, rest;

  // Weights are shares of the sum of sigmoids. Where all logits are below -20 these are e^a, and as much is
  // added to all of them as makes the largest -20: neither weights nor 1 - sigmoid, 1, change by that.
  __device__ __forceinline__ Softmax(const Taps& a, bool has_before, bool has_after) {
    const float log2e = 1.44269504f, most = 100.f, missing = __int_as_float(0x7f800000);
    Taps t = {has_before ? a.before * -log2e : missing, a.here * -log2e,
              has_after ? a.after * -log2e : missing};
    const float least = fmin_nan(t.before, fmin_nan(t.here, t.after));
    const float shift = fmax_nan(least - 20.f * log2e, 0.f);
    t = {exp2_fast(fmin_nan(t.before - shift, most)), exp2_fast(fmin_nan(t.here - shift, most)),
         exp2_fast(fmin_nan(t.after - shift, most))};
    const Taps sigmoid = {reciprocal(1.f + t.before), reciprocal(1.f + t.here), reciprocal(1.f + t.after)};
    const float scale = reciprocal(sigmoid.before + sigmoid.here + sigmoid.after);
    rest = {t.before * sigmoid.before, t.here * sigmoid.here, t.after * sigmoid.after};
    w = {sigmoid.before * scale, sigmoid.here * scale, sigmoid.after * scale};
  }
};

struct Adjoints {
  unsigned char *dy, *gate, *logits, *left, *right;  // left, right: of the adjoints beyond the sides
  bool has_before, has_after;
  float carried[W];

  __device__ __forceinline__ Adjoints(const Params& p, const Tile& tile, const Scanner& it) {
    const Way& way = it.way;
    dy = it.x + (DY_AT - X_AT), gate = it.lam + (GATE_AT - LAM_AT);
    logits = logits_at(it.me.d, it.me.sub, it.me.place) + it.me.half * (LOGITS / 2);
    left = it.left + OUTSIDE, right = it.right + OUTSIDE;
    has_before = it.place > 0, has_after = it.place + 1 < way.store.s.places;
    const int after = way.first + SIDE;  // the line that the next tile begins with
    const Way back(p, tile, it.me.d, it.me.sub, true);
#pragma unroll
    for (int v = 0; v < W; v++) carried[v] = 0.f;
    if (it.there && after < way.store.s.lines && !(RESTARTS && after % p.chunk == 0))
      load_two(back.store.end(way.along + 1, it.place, it.channel) + it.me.half * W, carried);
  }
  // All gradients of line i, from the states of it and of the line before.
  __device__ __forceinline__ void step(const Params& p, const Scanner& it, int i, const float (&h)[W],
                                       const float (&before)[W]) {
    const int image = i * it.way.line * STORED, quads = i * PITCH * STORED, triples = i * PITCH * LOGITS;
    float dys[W], xs[W], g[W], scale[W], gradient[W], part[W];
    widen_two(dy + image, dys);
    widen_two(it.x + image, xs);
#if HAS_GATE
    widen_two(gate + quads, scale);
#endif
#pragma unroll
    for (int v = 0; v < W; v++) {
      g[v] = HAS_GATE ? fmaf(dys[v], scale[v], carried[v]) : dys[v] + carried[v];
      gradient[v] = dys[v] * h[v];
    }
    if (HAS_GATE) narrow_two(gate + quads, gradient);
#if HAS_LAM
    widen_two(it.lam + quads, scale);
#endif
#pragma unroll
    for (int v = 0; v < W; v++) {
      part[v] = HAS_LAM ? scale[v] * g[v] : g[v];
      gradient[v] = xs[v] * g[v];
    }
    if (HAS_LAM) narrow_two(it.lam + quads, gradient);
    Taps w[W], to[W];
    weights_of_two(it.pair + i * PITCH * 16, w);
    store_two(it.pair + i * PITCH * 16, part);
    float left_state[W], right_state[W], from_before[W], from_after[W];
    it.meet(i, before, left_state, right_state);
#pragma unroll
    for (int v = 0; v < W; v++) {
      to[v] = {w[v].before * g[v], w[v].here * g[v], w[v].after * g[v]};
      from_before[v] = __shfl_up_sync(ALL_LANES, to[v].after, 1, SIDE);
      from_after[v] = __shfl_down_sync(ALL_LANES, to[v].before, 1, SIDE);
    }
    if (it.first) load_two(left + i * 32, from_before);
    if (it.last) load_two(right + i * 32, from_after);
    const bool begins = it.way.begins(p, i);
    u32 words[3 * W / 2];
#pragma unroll
    for (int n = 0; n < 3 * W / 2; n++) words[n] = ((const u32*)(logits + triples))[n];
    float a[3 * W];
#pragma unroll
    for (int v = 0; v < W; v++) {
      const Taps own = {element(words, 3 * v), element(words, 3 * v + 1), element(words, 3 * v + 2)};
      const Softmax softmax(own, has_before, has_after);
      const Taps &share = softmax.w, &rest = softmax.rest;
      // The gradient of a weight is g times the state that it takes.
      const float mean = fmaf(share.before, left_state[v],
                              fmaf(share.after, right_state[v], share.here * before[v]));
      a[3 * v] = g[v] * (left_state[v] - mean) * (share.before * rest.before);
      a[3 * v + 1] = g[v] * (before[v] - mean) * (share.here * rest.here);
      a[3 * v + 2] = g[v] * (right_state[v] - mean) * (share.after * rest.after);
      a[3 * v] = has_before && !begins ? a[3 * v] : 0.f;
      a[3 * v + 1] = begins ? 0.f : a[3 * v + 1];
      a[3 * v + 2] = has_after && !begins ? a[3 * v + 2] : 0.f;
      const float sum = to[v].here + (from_before[v] + from_after[v]);
      carried[v] = RESTARTS && begins ? 0.f : sum;
    }
#pragma unroll
    for (int n = 0; n < 3 * W / 2; n++) ((u32*)(logits + triples))[n] = stored(a[2 * n], a[2 * n + 1]);
  }
};

__device__ __forceinline__ void scan(const Params& p, const Tile& tile) {
  const Scanner me(p, tile);
  float entered[W], h[SIDE][W];
  me.enter(entered);
#pragma unroll
  for (int i = 0; i < SIDE; i++) me.step(p, i, i > 0 ? h[i > 0 ? i - 1 : 0] : entered, h[i]);
  Adjoints adjoints(p, tile, me);
#pragma unroll
  for (int i = SIDE - 1; i >= 0; i--) adjoints.step(p, me, i, h[i], i > 0 ? h[i > 0 ? i - 1 : 0] : entered);
}

KERNEL(THREADS, MIN_BLOCKS) tiles_own_backward(CONSTANT_PARAMS p) {
  const Tile tile(p);
  copy_weights(p, tile);
  copy_operands(p, tile);
  copy_pieces<3 * SCANS * SUBS, 3>(p, tile, p.taps, LOGITS_AT);
  copy_outside(p, tile, false);
  copy_outside(p, tile, true);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  scan(p, tile);
  __syncthreads();
  if (HAS_LAM) store_pieces<SCANS * SUBS, 1>(p, tile, p.dlam, LAM_AT);
  if (HAS_GATE) store_pieces<SCANS * SUBS, 1>(p, tile, p.dgate, GATE_AT);
  store_pieces<3 * SCANS * SUBS, 3>(p, tile, p.dtaps, LOGITS_AT);
  store_sum(p, tile, p.dx);
}
