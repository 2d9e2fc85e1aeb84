// Backward of vertical scans of planes: lines are rows, adjacent in memory. Each warp fetches its own places of each
// line, 16 bytes a lane, and keeps them in shared memory that only it uses.
#pragma once
#include "planes_backward.cuh"

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
__device__ __forceinline__ void read_taps(const Work& w, int segment, int s, int lane, Taps (&taps)[N]) {
  const Packed<N> before = read_places(unit_at(w, segment, s, TAPS), lane);
  const Packed<N> here = read_places(unit_at(w, segment, s, TAPS + 1), lane);
  const Packed<N> after = read_places(unit_at(w, segment, s, TAPS + 2), lane);
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
    read_floats(unit_at(w, segment, s, X), t.lane, u);
#if HAS_LAM
    const Packed<N> lam = read_places(unit_at(w, segment, s, LAM), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) u[n] *= lam[n];
#endif
    read_taps(w, segment, s, t.lane, taps);
    forward_line(t, h, edges, u, taps, phase == 0);
    if (++phase == p.chunk) phase = 0;
  }
}

// One output of a line: `v` in the place of operand `op`.
__device__ __forceinline__ void write_line(const Params& p, const Work& w, const Thread& t, int op, int row, const Packed<N>& v) {
  if (!t.own) return;
  unsigned char* base = sink_of(p, op, t.b, t.group, t.channel) + t.place * SIZE;
  store_words(at_row(base, row, sink_pitch(p, op)), v.words);
}
__device__ __forceinline__ void write_line(const Params& p, const Work& w, const Thread& t, int op, int row,
                                           const float (&v)[N]) {
  Packed<N> packed;
  narrow_all(packed, v);
  write_line(p, w, t, op, row, packed);
}

// dx of a line, added to what the directions before this one left.
__device__ __forceinline__ void write_input_gradient(const Params& p, const Work& w, const Thread& t, int segment, int s, int row,
                                                     float (&dx)[N]) {
#if HAS_SUMS && STORAGE == 0
  if (reads_sums(p)) {
    const Packed<N> sum = read_places(unit_at(w, segment, s, SUM), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) dx[n] += sum[n];
  }
#elif HAS_SUMS
  if (reads_sums(p)) {
    const Packed<N> upper = read_places(unit_at(w, segment, s, SUM), t.lane), lower = read_places(unit_at(w, segment, s, SUM + 1), t.lane);
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
    write_line(p, w, t, SUM, row, upper);
    write_line(p, w, t, SUM + 1, row, lower);
    return;
  }
#endif
  write_line(p, w, t, X, row, dx);
}

__device__ __forceinline__ void write_tap_gradient(const Params& p, const Work& w, const Thread& t, int row, const Taps (&dw)[N],
                                                   const Taps (&taps)[N]) {
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

#if SHARED
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
__device__ __forceinline__ void park_last(const Work& w, const Thread& t, int s, const Taps (&dw)[N]) {
#if STORAGE != 0
  float after[N];
#pragma unroll
  for (int n = 0; n < N; n++) after[n] = dw[n].after;
  put_state(w.states, s, t.lane, after);
#endif
}

// What block `rank` of the cluster parked for this thread's places, added to dw.
__device__ __forceinline__ void add_parked(const Work& w, const Thread& t, int segment, int s, int rank, Taps (&dw)[N]) {
  Packed<N> packed[4];
#pragma unroll
  for (int i = 0; i < (STORAGE == 0 ? 3 : 4); i++) {
    unsigned char* unit = unit_at(w, segment, s, parked_in(i)) + t.lane * (N * SIZE);
    read_words(packed[i].words, CLUSTER ? cluster_map(unit, rank) : unit);
  }
#if STORAGE == 0
#pragma unroll
  for (int n = 0; n < N; n++) dw[n].before += packed[0][n], dw[n].here += packed[1][n], dw[n].after += packed[2][n];
#else
  float* states = CLUSTER ? cluster_map(w.states, rank) : w.states;
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    const Floats after = *(const Floats*)(states + state_index(s, n, t.lane));
#pragma unroll
    for (int i = 0; i < VEC; i++) dw[n + i].after += after.v[i];
  }
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
  for (int s = t.member; s < count; s += p.knobs[5]) {
    if (!t.own) continue;
    const int row = row_of(w.scan, first + s);
    Taps taps[N] = {}, dw[N] = {};
    const bool complete = is_single_part(p);
    if (NORMALIZE && complete) {
      Packed<N> packed[3];
#pragma unroll
      for (int k = 0; k < 3; k++)
        read_words(packed[k].words, at_row(plane_of(p.taps, t.b, p.knobs[0], t.group, k) + t.place * SIZE, row, (int)p.taps.h));
#pragma unroll
      for (int n = 0; n < N; n++) taps[n] = {packed[0][n], packed[1][n], packed[2][n]};
    }
    for (int member = 0; member < t.members; member++) add_parked(w, t, segment, s, member * strips + t.strip, dw);
    if (complete) {
      write_tap_gradient(p, w, t, row, dw, taps);
    } else {
      const long long offset = (long long)row * p.knobs[2] + t.place;
#pragma unroll
      for (int n = 0; n < N; n++) {
        part_of(p, t, 0)[offset + n] = dw[n].before;
        part_of(p, t, 1)[offset + n] = dw[n].here;
        part_of(p, t, 2)[offset + n] = dw[n].after;
      }
    }
  }
}
#endif

// The state that enters a line, with its edges.
__device__ __forceinline__ Edges state_of(const Work& w, const Thread& t, int segment, int s, float (&h)[N]) {
#if HAS_HIDDEN
  const unsigned char* unit = unit_at(w, segment, s, HIDDEN);
  read_floats(unit, t.lane, h);
  Edges others = {0.f, 0.f};
  if (asks_before(t)) others.before = widen(((const storage_t*)(unit - WARP_BYTES))[32 * N - 1]);
  if (asks_after(t)) others.after = widen(*(const storage_t*)(unit + WARP_BYTES));
  return edges_of(t, h, others);
#else
  return get_state(w.states, WARP_BYTES / 4, s, t, h);
#endif
}

// The lines of a segment from last to first. `h` is the state after the last, `carried` what later lines handed on.
__device__ __forceinline__ void walk_back(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N],
                                          float (&carried)[N]) {
  const int first = segment * S, count = min(S, w.scan.lines - first);
  int phase = (first + count - 1) % p.chunk;
  for (int s = count - 1; s >= 0; s--) {
    const int line = first + s, row = row_of(w.scan, line);
    const bool restart = phase == 0;
    const Packed<N> dy = read_places(unit_at(w, segment, s, DY), t.lane);
    float g[N];
#if HAS_GATE
    const Packed<N> gate = read_places(unit_at(w, segment, s, GATE), t.lane);
#pragma unroll
    for (int n = 0; n < N; n++) g[n] = inside(t, n, fmaf(gate[n], dy[n], carried[n]));
    if (p.dgate.data != nullptr) {
      float dgate[N];
#pragma unroll
      for (int n = 0; n < N; n++) dgate[n] = h[n] * dy[n];
      write_line(p, w, t, GATE, row, dgate);
    }
#else
#pragma unroll
    for (int n = 0; n < N; n++) g[n] = inside(t, n, dy[n] + carried[n]);
#endif
    Taps taps[N];
    Shown shown = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < N; n++) carried[n] = 0.f;
    read_taps(w, segment, s, t.lane, taps);
    if (!restart) {
      Taps weight[N];
      weights(t, taps, weight);
      shown = carry_line(t, carried, g, weight);
    }
    publish(t, shown);
    Taps dw[N] = {};
    if (needs_states(p)) {
      const Edges edges = state_of(w, t, segment, s, h);
      if (!restart) weight_gradients(dw, g, h, edges);
#if SHARED
      park(w, t, segment, s, dw);
#else
      if (p.dtaps.data != nullptr) write_tap_gradient(p, w, t, row, dw, taps);
#endif
    }
#if HAS_LAM
    if (p.dlam.data != nullptr) {
      const Packed<N> x = read_places(unit_at(w, segment, s, X), t.lane);
      float dlam[N];
#pragma unroll
      for (int n = 0; n < N; n++) dlam[n] = g[n] * x[n];
      write_line(p, w, t, LAM, row, dlam);
    }
#endif
    if (p.dx.data != nullptr) {
#if HAS_LAM
      const Packed<N> lam = read_places(unit_at(w, segment, s, LAM), t.lane);
#pragma unroll
      for (int n = 0; n < N; n++) g[n] *= lam[n];
#endif
      write_input_gradient(p, w, t, segment, s, row, g);
    }
    const Edges from = settle(t, shown);
    carried[0] += from.before;
    carried[N - 1] += from.after;
#if SHARED
    park_last(w, t, s, dw);
#endif
    phase = restart ? p.chunk - 1 : phase - 1;
  }
}
