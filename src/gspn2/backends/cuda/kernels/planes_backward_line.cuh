// The maths of one line of a plane, forward and back, and its states in shared memory.
#pragma once
#include "planes_backward_memory.cuh"

__device__ __forceinline__ Taps weights(const Taps& taps, bool has_before, bool has_after) {
  return WEIGHTS ? taps : tap_weights(taps, has_before, has_after);
}
__device__ __forceinline__ void weights(const Thread& t, const Taps (&taps)[N], Taps (&w)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) w[n] = weights(taps[n], has_before(t, n), has_after(t, n));
}

// Weights of one place, and what the gradient of its logits takes besides: 1 - sigmoid(a_k).
struct Weighed {
  Taps w, rest;
};
__device__ __forceinline__ Weighed weigh(const Taps& a, bool has_before, bool has_after) {
#if NORMALIZE && !SHARED
  // As `exponentials`: with D_k = e^(m - a_k) and E_k = e^m + D_k, w_k is proportional to 1 / E_k, and D_k / E_k is
  // 1 - sigmoid(a_k) without cancellation.
  const float top = fmax_nan(has_before ? a.before : a.here, fmax_nan(a.here, has_after ? a.after : a.here));
  const float m = fmin_nan(top, 0.f), em = exponential(m);
  const float d_before = has_before ? exponential(m - a.before) : 0.f, d_here = exponential(m - a.here);
  const float d_after = has_after ? exponential(m - a.after) : 0.f;
  const float before = has_before ? reciprocal(em + d_before) : 0.f, here = reciprocal(em + d_here);
  const float after = has_after ? reciprocal(em + d_after) : 0.f;
  const float scale = reciprocal(before + here + after);
  return {{before * scale, here * scale, after * scale}, {d_before * before, d_here * here, d_after * after}};
#else
  return {weights(a, has_before, has_after), {0.f, 0.f, 0.f}};
#endif
}
__device__ __forceinline__ void weigh(const Thread& t, const Taps (&taps)[N], Weighed (&w)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) w[n] = weigh(taps[n], has_before(t, n), has_after(t, n));
}

// The state of the next line: h and its edges are those of the line before. The edges of the new one are still to come.
__device__ __forceinline__ Shown forward_line(const Thread& t, float (&h)[N], const Edges& edges, const float (&u)[N],
                                              const Taps (&taps)[N], bool restart) {
  float next[N];
  if (restart) {
#pragma unroll
    for (int n = 0; n < N; n++) next[n] = u[n];
  } else {
    Taps w[N];
    weights(t, taps, w);
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float before = n > 0 ? h[n - 1] : edges.before, after = n + 1 < N ? h[n + 1] : edges.after;
      next[n] = fmaf(w[n].before, before, fmaf(w[n].after, after, fmaf(w[n].here, h[n], u[n])));
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = inside(t, n, next[n]);
  return {h[0], h[N - 1]};
}

// The part of the walk back that lines hand on. `g` is complete; afterwards `carried` is what this line hands to
// the line before it in scan order, but for what `settle` brings in exchange for the result.
__device__ __forceinline__ Shown carry_line(float (&carried)[N], const float (&g)[N], const Weighed (&weighed)[N]) {
  Taps w[N];
#pragma unroll
  for (int n = 0; n < N; n++) w[n] = weighed[n].w;
  // By places: from the one before, here, from the one after, in this order.
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sum = w[n].here * g[n];
    if (n > 0) sum = fmaf(w[n - 1].after, g[n - 1], sum);
    if (n + 1 < N) sum = fmaf(w[n + 1].before, g[n + 1], sum);
    carried[n] = sum;
  }
  return {w[0].before * g[0], w[N - 1].after * g[N - 1]};
}

// Gradients of the weights of one line from g and the state of the line before.
__device__ __forceinline__ void weight_gradients(Taps (&dw)[N], const float (&g)[N], const float (&h)[N], const Edges& edges) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float before = n > 0 ? h[n - 1] : edges.before, after = n + 1 < N ? h[n + 1] : edges.after;
    dw[n] = {g[n] * before, g[n] * h[n], g[n] * after};
  }
}

// Gradients of the taps as stored, from those of the weights: as `tap_gradient`.
__device__ __forceinline__ void tap_gradients(const Thread& t, const Taps (&dw)[N], const Weighed (&weighed)[N], Taps (&da)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    da[n] = {has_before(t, n) ? dw[n].before : 0.f, dw[n].here, has_after(t, n) ? dw[n].after : 0.f};
#if NORMALIZE
    const Taps &w = weighed[n].w, &rest = weighed[n].rest;
    const float mean = w.before * da[n].before + w.here * da[n].here + w.after * da[n].after;
    da[n] = {w.before * rest.before * (da[n].before - mean), w.here * rest.here * (da[n].here - mean),
             w.after * rest.after * (da[n].after - mean)};
#endif
  }
}

// States between the two walks: those that enter each segment but the first, [B][C][segments][places], whole vectors
// of 4 floats a line; where blocks share a line, those of each block, places beyond its own included. From the first place
// of this thread on.
__device__ __forceinline__ unsigned char* kept_of(const Params& p, const Thread& t, int segments, int segment) {
  const long long plane = (long long)t.b * p.channels + t.channel, line = plane * segments + segment;
#if SPLIT
  const int room = p.knobs[4] + 2 * HALO;
  return (unsigned char*)((float*)p.scratch[3] + (line * p.knobs[3] + t.strip) * room + t.place - t.begin);
#else
  return (unsigned char*)((float*)p.scratch[3] + line * ((t.places + 3) / 4 * 4) + t.place);
#endif
}
__device__ __forceinline__ void keep_state(const Thread& t, unsigned char* to, const float (&h)[N]) {
  u32 words[N];
#pragma unroll
  for (int n = 0; n < N; n++) words[n] = __float_as_uint(h[n]);
  if (t.alive) write_words(to, words);
}
__device__ __forceinline__ void kept_state(const Thread& t, const unsigned char* from, float (&h)[N]) {
  u32 words[N];
  if (t.alive) read_words(words, from);
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = t.alive ? inside(t, n, __uint_as_float(words[n])) : 0.f;
}

// A line of states in shared memory, private to a warp but for the edges: [SEGMENT][N / VEC][32][VEC].
constexpr int VEC = N < 4 ? N : 4;
constexpr int STATE_LINE = 32 * N;  // floats

__device__ __forceinline__ int state_index(int s, int n, int lane) {
  return s * STATE_LINE + (n / VEC * 32 + lane) * VEC + n % VEC;
}
struct alignas(4 * VEC) Floats {
  float v[VEC];
};
__device__ __forceinline__ void put_state(float* states, int s, int lane, const float (&h)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    Floats f;
#pragma unroll
    for (int i = 0; i < VEC; i++) f.v[i] = h[n + i];
    *(Floats*)(states + state_index(s, n, lane)) = f;
  }
}
// What the neighbours of this thread hold of a line of states; `other` is what the neighbour in another warp holds, and
// counts for the first and the last lane only.
__device__ __forceinline__ Edges edges_of(const Thread& t, const float (&h)[N], float other) {
  const float before = __shfl_up_sync(~0u, h[N - 1], 1), after = __shfl_down_sync(~0u, h[0], 1);
  return {!t.has_before ? 0.f : WIDE && t.lane == 0 ? other : before,
          !t.has_after ? 0.f : WIDE && t.lane == 31 ? other : after};
}
// Which warp's memory has the state of this thread's neighbour: that of the warp before (-1), after (1), or its own (0)?
__device__ __forceinline__ int neighbour_warp(const Thread& t) {
  if (!WIDE) return 0;
  return t.lane == 0 && t.warp > 0 ? -1 : t.lane == 31 && t.warp + 1 < warps_of_line() ? 1 : 0;
}

// With the edges. `pitch`: floats from one warp's states to the next one's.
__device__ __forceinline__ Edges get_state(const float* states, int pitch, int s, const Thread& t, float (&h)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    const Floats f = *(const Floats*)(states + state_index(s, n, t.lane));
#pragma unroll
    for (int i = 0; i < VEC; i++) h[n + i] = f.v[i];
  }
  const int side = neighbour_warp(t);
  float other = 0.f;
  if (side != 0) other = states[side * pitch + (side < 0 ? state_index(s, N - 1, 31) : state_index(s, 0, 0))];
  return edges_of(t, h, other);
}
