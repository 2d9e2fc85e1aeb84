// Backward of vertical scans of planes: lines are rows, adjacent in memory. Each warp fetches its own places of each
// line, 16 bytes a lane, and keeps them in shared memory that only it uses.
#pragma once
#include "planes_backward.cuh"

constexpr int UNIT = 32 * N * SIZE;      // bytes of a warp's part of a line of one operand
constexpr int PIECES = UNIT / 16;
constexpr int BATCH = 32 / PIECES;       // lines that 32 pieces cover
static_assert(PIECES <= 32 && S % BATCH == 0, "a warp copies whole lines, SEGMENT of them in whole batches");
constexpr int WARP_BYTES = S * (2 * DOUBLE + SINGLE) * UNIT + S * STATE_LINE * 4;

// What a warp works on in one channel.
struct Work {
  Scan scan;
  unsigned char* memory;   // of this warp
  float* states;
  int channel, member;
  // As a carrier of 16 bytes of each operand: which line of a batch, whether they are there, and where.
  int line, bytes;
  const unsigned char* from[DOUBLE + SINGLE];
};

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t, int member) {
  Work w;
  w.scan = scan;
  w.memory = shared_memory() + t.warp * WARP_BYTES;
  w.states = (float*)(w.memory + S * (2 * DOUBLE + SINGLE) * UNIT);
  w.member = member;
  const int members = p.channels / p.groups;
  w.channel = t.group * members + member;
  const int piece = t.lane % PIECES, first = piece * EACH;
  w.line = t.lane / PIECES;
  const Thread carried = thread_of(p, scan, t.warp * 32 + first / N, t.edges);
  const int place = carried.place + first % N;
  w.bytes = carried.b < p.batch && place < scan.places ? 16 : 0;
#pragma unroll
  for (int op = 0; op < DOUBLE + SINGLE; op++)
    w.from[op] = source_of(p, op, carried.b, carried.group, carried.group * members + member) + place * SIZE;
  return w;
}

__device__ __forceinline__ int row_of(const Scan& scan, int line) { return scan.reversed ? scan.lines - 1 - line : line; }
__device__ __forceinline__ int segments_of(const Scan& scan) { return (scan.lines + S - 1) / S; }

__device__ __forceinline__ unsigned char* double_at(const Work& w, int stage, int s, int op) {
  return w.memory + ((stage * S + s) * DOUBLE + op) * UNIT;
}
__device__ __forceinline__ unsigned char* single_at(const Work& w, int s, int op) {
  return w.memory + (2 * S * DOUBLE + s * SINGLE + op) * UNIT;
}

__device__ __forceinline__ void fetch_double(const Params& p, const Work& w, const Thread& t, int segment) {
  for (int s = w.line; s < S; s += BATCH) {
    const int line = segment * S + s;
    if (line >= w.scan.lines) break;
    const int row = row_of(w.scan, line);
#pragma unroll
    for (int op = 0; op < DOUBLE; op++)
      copy_async<16>(double_at(w, segment & 1, s, op) + t.lane % PIECES * 16, at_row(w.from[op], row, source_pitch(p, op)),
                     w.bytes);
  }
}

__device__ __forceinline__ void fetch_single(const Params& p, const Work& w, const Thread& t, int segment) {
  const int ops = reads_sums(p) ? SINGLE : SINGLE - SUMS;
  for (int s = w.line; s < S; s += BATCH) {
    const int line = segment * S + s;
    if (line >= w.scan.lines) break;
    const int row = row_of(w.scan, line);
#pragma unroll
    for (int op = 0; op < SINGLE; op++)
      if (op < ops)
        copy_async<16>(single_at(w, s, op) + t.lane % PIECES * 16,
                       at_row(w.from[DOUBLE + op], row, source_pitch(p, DOUBLE + op)), w.bytes);
  }
}

__device__ __forceinline__ Packed<N> read_places(const unsigned char* unit, int lane) {
  Packed<N> packed;
  read_words(packed.words, unit + lane * (N * SIZE));
  return packed;
}
__device__ __forceinline__ void read_floats(const unsigned char* unit, int lane, float (&v)[N]) {
  const Packed<N> packed = read_places(unit, lane);
#pragma unroll
  for (int n = 0; n < N; n++) v[n] = packed[n];
}
__device__ __forceinline__ void read_taps(const Work& w, int stage, int s, int lane, Taps (&taps)[N]) {
  const Packed<N> before = read_places(double_at(w, stage, s, TAPS), lane);
  const Packed<N> here = read_places(double_at(w, stage, s, TAPS + 1), lane);
  const Packed<N> after = read_places(double_at(w, stage, s, TAPS + 2), lane);
#pragma unroll
  for (int n = 0; n < N; n++) taps[n] = {before[n], here[n], after[n]};
}

// The lines of a segment in scan order; with `keep`, the state that enters each stays in shared memory.
__device__ __forceinline__ void walk_forward(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N], Edges& edges,
                                             bool keep) {
  const int first = segment * S, count = min(S, w.scan.lines - first);
  int phase = first % p.chunk;
  for (int s = 0; s < count; s++) {
    if (keep) put_state(w.states, s, t.lane, h);
    float u[N];
    Taps taps[N];
    read_floats(double_at(w, segment & 1, s, X), t.lane, u);
#if HAS_LAM
    const Packed<N> lam = read_places(double_at(w, segment & 1, s, LAM), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) u[n] *= lam[n];
#endif
    read_taps(w, segment & 1, s, t.lane, taps);
    forward_line(t, h, edges, u, taps, phase == 0);
    if (++phase == p.chunk) phase = 0;
  }
}

// One output of a line: `v` in the place of operand `op`.
__device__ __forceinline__ void write_line(const Params& p, const Work& w, const Thread& t, int op, int row, const Packed<N>& v) {
  if (!t.alive) return;
  unsigned char* base = sink_of(p, op, t.b, t.group, w.channel) + t.place * SIZE;
  store_words(at_row(base, row, sink_pitch(p, op)), v.words);
}
__device__ __forceinline__ void write_line(const Params& p, const Work& w, const Thread& t, int op, int row,
                                           const float (&v)[N]) {
  Packed<N> packed;
  narrow_all(packed, v);
  write_line(p, w, t, op, row, packed);
}

// dx of a line, added to what the directions before this one left.
__device__ __forceinline__ void write_input_gradient(const Params& p, const Work& w, const Thread& t, int s, int row,
                                                     float (&dx)[N]) {
#if HAS_SUMS && STORAGE == 0
  if (reads_sums(p)) {
    const Packed<N> sum = read_places(single_at(w, s, SUM), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) dx[n] += sum[n];
  }
#elif HAS_SUMS
  if (reads_sums(p)) {
    const Packed<N> upper = read_places(single_at(w, s, SUM), t.lane), lower = read_places(single_at(w, s, SUM + 1), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) dx[n] += joined(upper.words[n / 2], lower.words[n / 2], n);
  }
  if (wants_sums(p)) {
    Packed<N> upper, lower;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const Pair halves = split(dx[n], dx[n + 1]);
      upper.words[n / 2] = halves.upper, lower.words[n / 2] = halves.lower;
    }
    write_line(p, w, t, DOUBLE + SUM, row, upper);
    write_line(p, w, t, DOUBLE + SUM + 1, row, lower);
    return;
  }
#endif
  write_line(p, w, t, X, row, dx);
}

__device__ __forceinline__ void write_tap_gradient(const Params& p, const Work& w, const Thread& t, int line, int row, Taps (&dw)[N],
                                                   const Taps (&taps)[N]) {
  if (!sum_channels(p, line, w.member, dw)) return;
  float before[N], here[N], after[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const Taps da = tap_gradient(taps[n], dw[n], has_before(t, n), has_after(t, n));
    before[n] = da.before, here[n] = da.here, after[n] = da.after;
  }
  write_line(p, w, t, TAPS, row, before);
  write_line(p, w, t, TAPS + 1, row, here);
  write_line(p, w, t, TAPS + 2, row, after);
}

// The lines of a segment from last to first. `h` is the state after the last, `carried` what later lines handed on.
__device__ __forceinline__ void walk_back(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N],
                                          float (&carried)[N]) {
  const int first = segment * S, count = min(S, w.scan.lines - first), stage = segment & 1;
  const bool hidden = p.dtaps.data != nullptr || p.dgate.data != nullptr;
  int phase = (first + count - 1) % p.chunk;
  for (int s = count - 1; s >= 0; s--) {
    const int line = first + s, row = row_of(w.scan, line);
    const bool restart = phase == 0;
    const Packed<N> dy = read_places(single_at(w, s, DY), t.lane);
    float g[N];
#if HAS_GATE
    const Packed<N> gate = read_places(single_at(w, s, GATE), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) g[n] = inside(t, n, fmaf(gate[n], dy[n], carried[n]));
    if (p.dgate.data != nullptr) {
      float dgate[N];
#pragma unroll
      for (int n = 0; n < N; n++) dgate[n] = h[n] * dy[n];
      write_line(p, w, t, DOUBLE + GATE, row, dgate);
    }
#else
#pragma unroll
    for (int n = 0; n < N; n++) g[n] = inside(t, n, dy[n] + carried[n]);
#endif
    Taps taps[N];
    Shown shown = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < N; n++) carried[n] = 0.f;
    read_taps(w, stage, s, t.lane, taps);
    if (!restart) {
      Taps weight[N];
      weights(t, taps, weight);
      shown = carry_line(t, carried, g, weight);
    }
    publish(t, shown);
    if (hidden) {
      const Edges edges = get_state(w.states, WARP_BYTES / 4, s, t, h);
      if (p.dtaps.data != nullptr) {
        Taps dw[N] = {};
        if (!restart) weight_gradients(dw, g, h, edges);
        write_tap_gradient(p, w, t, line, row, dw, taps);
      }
    }
#if HAS_LAM
    if (p.dlam.data != nullptr) {
      const Packed<N> x = read_places(double_at(w, stage, s, X), t.lane);
      float dlam[N];
#pragma unroll
      for (int n = 0; n < N; n++) dlam[n] = g[n] * x[n];
      write_line(p, w, t, LAM, row, dlam);
    }
#endif
    if (p.dx.data != nullptr) {
#if HAS_LAM
      const Packed<N> lam = read_places(double_at(w, stage, s, LAM), t.lane);
#pragma unroll
      for (int n = 0; n < N; n++) g[n] *= lam[n];
#endif
      write_input_gradient(p, w, t, s, row, g);
    }
    const Edges from = settle(t, shown);
    carried[0] += from.before;
    carried[N - 1] += from.after;
    phase = restart ? p.chunk - 1 : phase - 1;
  }
}
