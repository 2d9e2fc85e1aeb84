// The gradient of taps that channels share, in vertical scans; included by planes_backward_vertical.cuh.
#pragma once
#include "planes_backward_shared.cuh"

// Gradients of shared weights of a line: those that only this thread's warp looks at until the cluster meets.
__device__ __forceinline__ void park(const Work& w, const Thread& t, int segment, int s, const Taps (&dw)[N]) {
  Packed<N> packed[4];
#if STORAGE == 0
#pragma unroll
  for (int n = 0; n < N; n++) {
    packed[0].words[n] = __float_as_uint(dw[n].before);
    packed[1].words[n] = __float_as_uint(dw[n].here);
    packed[2].words[n] = __float_as_uint(dw[n].after);
  }
#else
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    const Pair before = split(dw[n].before, dw[n + 1].before), here = split(dw[n].here, dw[n + 1].here);
    packed[0].words[n / 2] = before.upper, packed[1].words[n / 2] = before.lower;
    packed[2].words[n / 2] = here.upper, packed[3].words[n / 2] = here.lower;
  }
#endif
#pragma unroll
  for (int i = 0; i < (STORAGE == 0 ? 3 : 4); i++)
    write_words(unit_at(w, segment, s, parked_in(i)) + t.lane * (N * SIZE), packed[i].words);
}
// The third, in the place of a state that other warps look at until the line is settled.
__device__ __forceinline__ void park_last(const Work& w, const Thread& t, int segment, int s, const Taps (&dw)[N]) {
#if STORAGE != 0 && HAS_HIDDEN
  Packed<N> upper, lower;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    const Pair after = split(dw[n].after, dw[n + 1].after);
    upper.words[n / 2] = after.upper, lower.words[n / 2] = after.lower;
  }
  write_words(unit_at(w, segment, s, HIDDEN) + t.lane * (N * SIZE), upper.words);
  write_words(unit_at(w, segment, s, X) + t.lane * (N * SIZE), lower.words);
#elif STORAGE != 0
  float after[N];
#pragma unroll
  for (int n = 0; n < N; n++) after[n] = dw[n].after;
  put_state(w.states, s, t.lane, after);
#endif
}

// What block `rank` of the cluster parked for this thread's places, added to dw.
__device__ __forceinline__ void add_parked(const Work& w, const Thread& t, int segment, int s, int rank, Taps (&dw)[N]) {
  const auto parked = [&](int op) {
    unsigned char* unit = unit_at(w, segment, s, op) + t.lane * (N * SIZE);
    Packed<N> packed;
    read_words(packed.words, CLUSTER ? cluster_map(unit, rank) : unit);
    return packed;
  };
  Packed<N> packed[4];
#pragma unroll
  for (int i = 0; i < (STORAGE == 0 ? 3 : 4); i++) packed[i] = parked(parked_in(i));
#if STORAGE == 0
#pragma unroll
  for (int n = 0; n < N; n++) dw[n].before += packed[0][n], dw[n].here += packed[1][n], dw[n].after += packed[2][n];
#else
#if HAS_HIDDEN
  const Packed<N> upper = parked(HIDDEN), lower = parked(X);
#pragma unroll
  for (int n = 0; n < N; n++) dw[n].after += joined(upper.words[n / 2], lower.words[n / 2], n);
#else
  float* states = CLUSTER ? cluster_map(w.states, rank) : w.states;
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    const Floats after = *(const Floats*)(states + state_index(s, n, t.lane));
#pragma unroll
    for (int i = 0; i < VEC; i++) dw[n + i].after += after.v[i];
  }
#endif
#pragma unroll
  for (int n = 0; n < N; n++) {
    dw[n].before += joined(packed[0].words[n / 2], packed[1].words[n / 2], n);
    dw[n].here += joined(packed[2].words[n / 2], packed[3].words[n / 2], n);
  }
#endif
}

// The gradient of shared taps in one segment: each block of the cluster sums some of its lines over all channels.
__device__ __forceinline__ void sum_channels(const Params& p, const Work& w, const Thread& t, int segment) {
  const int first = segment * S, count = min(S, w.scan.lines - first), strips = strips_of(p);
  const Sinks sinks = sinks_of(p, t);
  const bool complete = is_single_part(p);
  for (int s = t.member; s < count; s += p.knobs[5]) {
    const int row = row_of(w.scan, first + s);
    Packed<N> packed[3] = {};
    if (NORMALIZE && complete && t.own)
#pragma unroll
      for (int k = 0; k < 3; k++)
        read_words(packed[k].words, at_row(plane_of(p.taps, t.b, p.knobs[0], t.group, k) + t.place * SIZE, row, (int)p.taps.h));
    Taps dw[N] = {};
    for (int member = 0; member < t.members; member++) add_parked(w, t, segment, s, member * strips + t.strip, dw);
    if (complete) {
#pragma unroll
      for (int n = 0; n < N; n++)
        dw[n] = tap_gradient({packed[0][n], packed[1][n], packed[2][n]}, dw[n], has_before(t, n), has_after(t, n));
      write_taps(p, t, sinks, row, dw);
    } else if (t.own) {
      const long long offset = (long long)row * p.knobs[2] + t.place;
      u32 words[3][N];
#pragma unroll
      for (int n = 0; n < N; n++) {
        words[0][n] = __float_as_uint(dw[n].before);
        words[1][n] = __float_as_uint(dw[n].here);
        words[2][n] = __float_as_uint(dw[n].after);
      }
#pragma unroll
      for (int k = 0; k < 3; k++) write_words((unsigned char*)(part_of(p, t, k) + offset), words[k]);
    }
  }
}
