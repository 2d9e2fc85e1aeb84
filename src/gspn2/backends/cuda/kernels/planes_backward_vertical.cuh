// Backward of vertical scans of planes: lines are rows, adjacent in memory. Each warp fetches its own places of each
// line, 16 bytes a lane, and keeps them in shared memory that only it uses.
#pragma once
#include "planes_backward_line.cuh"

constexpr int UNIT = 32 * N * SIZE;      // bytes of a warp's part of a line of one operand
constexpr int PIECES = UNIT / 16;
constexpr int BATCH = 32 / PIECES;       // lines that 32 pieces cover
static_assert(PIECES <= 32 && S % BATCH == 0, "a warp copies whole lines, SEGMENT of them in whole batches");
constexpr int WARP_BYTES = S * UNITS * UNIT + (HAS_HIDDEN ? 0 : S * STATE_LINE * 4);

// What a warp works on in one channel.
struct Work {
  Scan scan;
  unsigned char* memory;   // of this warp
  float* states;
  // As a carrier of 16 bytes of each operand: which line of a batch, how many bytes are there, and where. The sums of
  // places beyond a block's own are for the block that owns them to change.
  int line, bytes, sum_bytes;
  const unsigned char* from[OPERANDS];
};

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t) {
  Work w;
  w.scan = scan;
  w.memory = shared_memory() + t.warp * WARP_BYTES;
  w.states = (float*)(w.memory + S * UNITS * UNIT);
  const int piece = t.lane % PIECES, first = piece * EACH;
  w.line = t.lane / PIECES;
  const Thread carried = thread_of(p, scan, t.warp * 32 + first / N, t.edges);
  const int place = carried.place + first % N;
  w.bytes = carried.b < p.batch && place < t.end ? 16 : 0;
  w.sum_bytes = place >= t.own_begin && place < t.own_end ? w.bytes : 0;
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    w.from[op] = source_of(p, op, carried.b, carried.group, carried.channel) + place * SIZE;
  return w;
}

__device__ __forceinline__ int row_of(const Scan& scan, int line) { return scan.reversed ? scan.lines - 1 - line : line; }
__device__ __forceinline__ int segments_of(const Scan& scan) { return (scan.lines + S - 1) / S; }

__device__ __forceinline__ unsigned char* unit_at(const Work& w, int segment, int s, int op) {
  const int unit = op < DOUBLE ? ((segment & 1) * S + s) * DOUBLE + op : 2 * S * DOUBLE + s * (OPERANDS - DOUBLE) + op - DOUBLE;
  return w.memory + unit * UNIT;
}

// Operands FIRST to LAST - 1 of a segment.
template <int FIRST, int LAST>
__device__ __forceinline__ void fetch(const Params& p, const Work& w, const Thread& t, int segment) {
#pragma unroll 1
  for (int s = w.line; s < S; s += BATCH) {
    const int line = segment * S + s;
    if (line >= w.scan.lines) break;
    const int row = row_of(w.scan, line);
#pragma unroll
    for (int op = FIRST; op < LAST; op++) {
      if (!is_read(p, op)) continue;
      // The state that enters a line is that after the line before.
      const bool entering = HAS_HIDDEN && op == HIDDEN;
      copy_async<16>(unit_at(w, segment, s, op) + t.lane % PIECES * 16,
                     at_row(w.from[op], entering ? row_of(w.scan, line - 1) : row, source_pitch(p, op)),
                     op >= SUM ? w.sum_bytes : entering && line == 0 ? 0 : w.bytes);
    }
  }
}

// What there is of one line in shared memory: operands, and the state that enters it, for the walk back.
struct Line {
  Packed<N> operand[OPERANDS];
  float h[N];
  Edges edges;

  __device__ __forceinline__ Taps taps(int n) const {
    return taps_in(operand[TAPS], operand[TAPS + 1], operand[TAPS + 2], n);
  }
};

template <int LAST>
__device__ __forceinline__ void read_operands(const Params& p, const Work& w, const Thread& t, int segment, int s, Line& line) {
#pragma unroll
  for (int op = 0; op < LAST; op++)
    if (is_read(p, op)) read_words(line.operand[op].words, unit_at(w, segment, s, op) + t.lane * (N * SIZE));
}

__device__ __forceinline__ void read_line(const Params& p, const Work& w, const Thread& t, int segment, int s, Line& line) {
  read_operands<OPERANDS>(p, w, t, segment, s, line);
#if HAS_HIDDEN
  if (!NEEDS_STATES) return;
  const unsigned char* unit = unit_at(w, segment, s, HIDDEN);
  const int side = neighbour_warp(t);
  float other = 0.f;
  if (side != 0) other = widen(*(const storage_t*)(unit + side * WARP_BYTES + (side < 0 ? UNIT - SIZE : 0)));
#pragma unroll
  for (int n = 0; n < N; n++) line.h[n] = line.operand[HIDDEN][n];
  line.edges = edges_of(t, line.h, other);
#else
  if (NEEDS_STATES) line.edges = get_state(w.states, WARP_BYTES / 4, s, t, line.h);
#endif
}

#if HAS_HIDDEN
// The state after the last line of the scan: all others come as what enters the line after them.
__device__ __forceinline__ void last_state(const Params& p, const Work& w, const Thread& t, float (&h)[N]) {
  const unsigned char* from = source_of(p, HIDDEN, t.b, t.group, t.channel) + t.place * SIZE;
  Packed<N> packed = {};
  if (t.alive) read_words(packed.words, at_row(from, row_of(w.scan, w.scan.lines - 1), source_pitch(p, HIDDEN)));
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = packed[n];
}
#endif

// The lines of a segment in scan order; with `keep`, the state that enters each stays in shared memory. The next line
// is read while the edges of this one travel.
__device__ __forceinline__ void walk_forward(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N], Edges& edges,
                                             bool keep) {
  const int first = segment * S, count = min(S, w.scan.lines - first);
  int phase = first % p.chunk;
  Line line;
  read_operands<DY>(p, w, t, segment, 0, line);
#pragma unroll 1
  for (int s = 0; s < count; s++) {
    if (keep) put_state(w.states, s, t.lane, h);
    float u[N];
    Taps taps[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      u[n] = line.operand[X][n];
#if HAS_LAM
      u[n] *= line.operand[LAM][n];
#endif
      taps[n] = line.taps(n);
    }
    const Shown shown = forward_line(t, h, edges, u, taps, phase == 0);
    publish(t, shown);
    if (++phase == p.chunk) phase = 0;
    if (s + 1 < count) read_operands<DY>(p, w, t, segment, s + 1, line);
    edges = settle(t, shown);
  }
}

// Gradients in memory, from the first place of this thread on: null where nothing is written.
struct Sinks {
  unsigned char* to[OPERANDS];
};
__device__ __forceinline__ Sinks sinks_of(const Params& p, const Thread& t) {
  Sinks sinks;
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    sinks.to[op] = is_wanted(p, op) ? sink_of(p, op, t.b, t.group, t.channel) + t.place * SIZE : nullptr;
  return sinks;
}

// One output of a line: `v` in the place of operand `op`.
__device__ __forceinline__ void write_packed(const Params& p, const Thread& t, const Sinks& sinks, int op, int row,
                                             const Packed<N>& v) {
  unsigned char* to = at_row(sinks.to[op], row, sink_pitch(p, op));
  if (t.own) store_words(to, v.words);
}
__device__ __forceinline__ void write_line(const Params& p, const Thread& t, const Sinks& sinks, int op, int row,
                                           const float (&v)[N]) {
  Packed<N> packed;
  narrow_all(packed, v);
  write_packed(p, t, sinks, op, row, packed);
}
__device__ __forceinline__ void write_taps(const Params& p, const Thread& t, const Sinks& sinks, int row, const Taps (&da)[N]) {
  float before[N], here[N], after[N];
#pragma unroll
  for (int n = 0; n < N; n++) before[n] = da[n].before, here[n] = da[n].here, after[n] = da[n].after;
  write_line(p, t, sinks, TAPS, row, before);
  write_line(p, t, sinks, TAPS + 1, row, here);
  write_line(p, t, sinks, TAPS + 2, row, after);
}

#if DIRECT
#include "planes_backward_vertical_chain.cuh"
#elif SHARED
#include "planes_backward_vertical_shared.cuh"
#endif

// dx of a line, added to what the directions before this one left.
__device__ __forceinline__ void write_input_gradient(const Params& p, const Thread& t, const Sinks& sinks, const Line& line,
                                                     int row, float (&dx)[N]) {
#if HAS_SUMS
  if (reads_sums(p)) {
#pragma unroll
    for (int n = 0; n < N; n++)
#if STORAGE == 0
      dx[n] += line.operand[SUM][n];
#else
      dx[n] += joined(line.operand[SUM].words[n / 2], line.operand[SUM + 1].words[n / 2], n);
#endif
  }
#if STORAGE != 0
  if (wants_sums(p)) {
    Packed<N> upper, lower;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const Pair halves = split(dx[n], dx[n + 1]);
      upper.words[n / 2] = halves.upper, lower.words[n / 2] = halves.lower;
    }
    write_packed(p, t, sinks, SUM, row, upper);
    write_packed(p, t, sinks, SUM + 1, row, lower);
    return;
  }
#endif
#endif
  write_line(p, t, sinks, X, row, dx);
}

// g of a line: what its output and the lines after it say of its state. `h` is that state.
__device__ __forceinline__ void state_gradient(const Params& p, const Thread& t, const Sinks& sinks, const Line& line, int row,
                                               const float (&h)[N], const float (&carried)[N], float (&g)[N]) {
  float dgate[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float dy = line.operand[DY][n];
#if HAS_GATE
    dgate[n] = h[n] * dy;
    g[n] = inside(t, n, fmaf(line.operand[GATE][n], dy, carried[n]));
#else
    g[n] = inside(t, n, dy + carried[n]);
#endif
  }
  if (HAS_GATE && WANTS_GATE) write_line(p, t, sinks, GATE, row, dgate);
}

__device__ __forceinline__ void write_product_gradients(const Params& p, const Thread& t, const Sinks& sinks, const Line& line,
                                                        int row, const float (&g)[N]) {
  float dx[N], dlam[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    dlam[n] = g[n] * line.operand[X][n];
#if HAS_LAM
    dx[n] = g[n] * line.operand[LAM][n];
#else
    dx[n] = g[n];
#endif
  }
  if (HAS_LAM && WANTS_LAM) write_line(p, t, sinks, LAM, row, dlam);
  if (WANTS_X) write_input_gradient(p, t, sinks, line, row, dx);
}

// The lines of a segment from last to first. `h` is the state after the last, `carried` what later lines handed on.
__device__ __forceinline__ void walk_back(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N],
                                          float (&carried)[N]) {
  const int first = segment * S, count = min(S, w.scan.lines - first);
  const Sinks sinks = sinks_of(p, t);
  int phase = (first + count - 1) % p.chunk;
  Line line;
  read_line(p, w, t, segment, count - 1, line);
#pragma unroll 1
  for (int s = count - 1; s >= 0; s--) {
    const int row = row_of(w.scan, first + s);
    const bool restart = phase == 0;
    phase = restart ? p.chunk - 1 : phase - 1;
#if DIRECT
    const SumsOfLine sums = read_sums_of_line(p, t, row);  // far ahead of their use
#endif
    float g[N];
    Taps dw[N] = {}, da[N] = {};
    Shown shown = {0.f, 0.f};
    state_gradient(p, t, sinks, line, row, h, carried, g);
#pragma unroll
    for (int n = 0; n < N; n++) carried[n] = 0.f;
    if (!restart) {
      Taps taps[N];
      Weighed weight[N];
#pragma unroll
      for (int n = 0; n < N; n++) taps[n] = line.taps(n);
      weigh(t, taps, weight);
      shown = carry_line(carried, g, weight);
      if (WANTS_TAPS) weight_gradients(dw, g, line.h, line.edges);
      if (WANTS_TAPS && !SHARED) tap_gradients(t, dw, weight, da);
    }
    publish(t, shown);
#if SHARED && !DIRECT
    park(w, t, segment, s, dw);
#elif !SHARED
    if (WANTS_TAPS) write_taps(p, t, sinks, row, da);
#endif
    write_product_gradients(p, t, sinks, line, row, g);
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = line.h[n];
    if (s > 0) read_line(p, w, t, segment, s - 1, line);
    const Edges from = settle(t, shown);
    carried[0] += from.before;
    carried[N - 1] += from.after;
#if DIRECT
    write_sums_of_line(p, t, row, sums, dw);
#elif SHARED
    park_last(w, t, segment, s, dw);
#endif
  }
}
