// The gradient of taps that channels share, in horizontal scans; included by planes_backward_horizontal.cuh.
#pragma once
#include "planes_backward_shared.cuh"

// Gradients of shared weights of a line: those that only this warp looks at until the cluster meets.
__device__ __forceinline__ void park(Chunk& c, int e, const Taps (&dw)[N]) {
  float before[N], here[N];
#pragma unroll
  for (int n = 0; n < N; n++) before[n] = dw[n].before, here[n] = dw[n].here;
#if STORAGE == 0
  float after[N];
#pragma unroll
  for (int n = 0; n < N; n++) after[n] = dw[n].after;
  c.put(TAPS, e, before);
  c.put(TAPS + 1, e, here);
  c.put(TAPS + 2, e, after);
#else
  put_halves(c.operand[TAPS], c.operand[TAPS + 1], c.other[TAPS], e, before);
  put_halves(c.operand[TAPS + 2], c.operand[DY], c.other[DY], e, here);
#endif
}
// The third, in the place of a state that other warps look at until the line is settled.
__device__ __forceinline__ void park_last(const Work& w, const Thread& t, int s, const Taps (&dw)[N]) {
#if STORAGE != 0
  float after[N];
#pragma unroll
  for (int n = 0; n < N; n++) after[n] = dw[n].after;
  put_state(w.states, s, t.lane, after);
#endif
}

// One word of a row: a pair of columns, or one of float32.
constexpr int COLUMNS = 4 / SIZE, WORDS = S / COLUMNS;
struct Parked {
  Taps dw[COLUMNS];
};
__device__ __forceinline__ u32 parked_word(const unsigned char* piece, int n, int lane, int word) {
  return *(const u32*)(piece + chunk_at(n, lane, word / 4) + word % 4 * 4);
}
// What block `rank` of the cluster parked for word `word` of the n-th row of the thread in `lane`, added to dw.
__device__ __forceinline__ void add_parked(const Work& w, int segment, int n, int lane, int word, int rank, Parked& sum) {
  u32 v[4];
#pragma unroll
  for (int i = 0; i < (STORAGE == 0 ? 3 : 4); i++) {
    unsigned char* piece = piece_at(w, segment, parked_in(i));
    v[i] = parked_word(CLUSTER ? cluster_map(piece, rank) : piece, n, lane, word);
  }
#if STORAGE == 0
  sum.dw[0].before += __uint_as_float(v[0]);
  sum.dw[0].here += __uint_as_float(v[1]);
  sum.dw[0].after += __uint_as_float(v[2]);
#else
  const float* states = CLUSTER ? cluster_map(w.states, rank) : w.states;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    const int column = word * COLUMNS + i, s = REVERSED ? S - 1 - column : column;
    sum.dw[i].before += joined(v[0], v[1], i);
    sum.dw[i].here += joined(v[2], v[3], i);
    sum.dw[i].after += states[state_index(s, n, lane)];
  }
#endif
}

__device__ __forceinline__ void write_parked(const Params& p, const Thread& t, int place, int column, const Parked& sum) {
  if (!is_single_part(p)) {
    const long long offset = (long long)place * p.knobs[2] + column;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      part_of(p, t, 0)[offset + i] = sum.dw[i].before;
      part_of(p, t, 1)[offset + i] = sum.dw[i].here;
      part_of(p, t, 2)[offset + i] = sum.dw[i].after;
    }
    return;
  }
  Packed<COLUMNS> taps[3] = {}, out[3];
  if (NORMALIZE)
#pragma unroll
    for (int k = 0; k < 3; k++)
      read_words(taps[k].words, at_row(plane_of(p.taps, t.b, p.knobs[0], t.group, k) + column * SIZE, place, (int)p.taps.h));
  float before[COLUMNS], here[COLUMNS], after[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    const Taps a = {taps[0][i], taps[1][i], taps[2][i]};
    const Taps da = tap_gradient(a, sum.dw[i], place > 0, place + 1 < t.places);
    before[i] = da.before, here[i] = da.here, after[i] = da.after;
  }
  narrow_all(out[0], before), narrow_all(out[1], here), narrow_all(out[2], after);
#pragma unroll
  for (int k = 0; k < 3; k++)
    store_words(at_row(plane_of(p.dtaps, t.b, p.knobs[0], t.group, k) + column * SIZE, place, (int)p.dtaps.h), out[k].words);
}

// The gradient of shared taps in one segment: each block of the cluster sums some of a warp's rows over all channels.
__device__ __forceinline__ void sum_channels(const Params& p, const Work& w, const Thread& t, int segment) {
  const Columns columns = columns_of(w.scan, segment);
  const int strips = strips_of(p), together = p.knobs[5];
  for (int i = t.lane; i < (32 * N + together - 1) / together * WORDS; i += 32) {
    const int word = i % WORDS, row = i / WORDS * together + t.member, n = row / 32, lane = row % 32;
    const int place = t.begin + (t.warp * 32 + lane) * N + n;
    if (row >= 32 * N || place < t.own_begin || place >= t.own_end || word * COLUMNS >= columns.count) continue;
    Parked sum = {};
    for (int member = 0; member < t.members; member++)
      add_parked(w, segment, n, lane, word, member * strips + t.strip, sum);
    write_parked(p, t, place, columns.left + word * COLUMNS, sum);
  }
}
