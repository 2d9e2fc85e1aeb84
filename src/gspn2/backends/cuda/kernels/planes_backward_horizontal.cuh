// Backward of horizontal scans of planes: lines are columns, and memory runs along the scan. A segment is as wide as
// the piece of a row that is fetched at once. Two or more lanes fetch the 16-byte chunks of one row's piece, so that
// whole sectors travel; a thread then reads the chunks of its own rows into registers and takes one column after
// another out of them. Gradients go the same way back: columns are packed in registers and replace, in shared memory,
// the operand they belong to, until the piece is complete.
#pragma once
#include "planes_backward.cuh"

constexpr int CHUNKS = S * SIZE / 16;    // of a row's piece
static_assert(S * SIZE % 16 == 0 && 32 % CHUNKS == 0, "pieces are whole chunks");
constexpr int UNIT = 32 * N * S * SIZE;  // bytes of a warp's piece of one operand
constexpr int WARP_BYTES = UNITS * UNIT + (HAS_HIDDEN ? 0 : S * STATE_LINE * 4);

struct Work {
  Scan scan;
  unsigned char* memory;  // of this warp
  float* states;
};

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t) {
  Work w;
  w.scan = scan;
  w.memory = shared_memory() + t.warp * WARP_BYTES;
  w.states = (float*)(w.memory + UNITS * UNIT);
  return w;
}

__device__ __forceinline__ int segments_of(const Scan& scan) { return (scan.lines + S - 1) / S; }
// The columns of a segment: first in memory, the scan's number of the first line, and how many there are (whole
// chunks).
struct Columns {
  int left, first, count;
};
__device__ __forceinline__ Columns columns_of(const Scan& scan, int segment) {
  const int left = (REVERSED ? segments_of(scan) - 1 - segment : segment) * S;
  const int count = min(S, scan.lines - left);
  return {left, REVERSED ? scan.lines - left - count : left, count};
}

// Chunk q (in memory order) of the n-th row of the thread in `lane`. Eight lanes that read theirs at once hit
// different banks, and so do eight lanes of a fetch.
__device__ __forceinline__ int chunk_at(int n, int lane, int q) {
  const int swizzle = CHUNKS == 1 ? 0 : lane / (8 / min(CHUNKS, 8)) % CHUNKS;
  return ((n * 32 + lane) * CHUNKS + (q ^ swizzle)) * 16;
}
__device__ __forceinline__ unsigned char* piece_at(const Work& w, int segment, int op) {
  return w.memory + (op < DOUBLE ? (segment & 1) * DOUBLE + op : DOUBLE + op) * UNIT;
}

// A lane's share of a warp's piece: chunk `q` of the rows of some lanes.
template <typename Body>
__device__ __forceinline__ void for_chunks(const Work& w, const Thread& t, Body body) {
  constexpr int TOGETHER = 32 / CHUNKS;  // rows at a time
  const int q = t.lane % CHUNKS;
#pragma unroll
  for (int i = 0; i < N * CHUNKS; i++) {
    const int n = i / CHUNKS, lane = i % CHUNKS * TOGETHER + t.lane / CHUNKS;
    const int row = t.begin + (t.warp * 32 + lane) * N + n;
    body(chunk_at(n, lane, q), row, q * EACH);
  }
}

// Operands FIRST to LAST - 1 of a segment.
template <int FIRST, int LAST>
__device__ __forceinline__ void fetch(const Params& p, const Work& w, const Thread& t, int segment) {
  const Columns columns = columns_of(w.scan, segment);
#pragma unroll
  for (int op = FIRST; op < LAST; op++) {
    if (!is_read(p, op)) continue;
    const unsigned char* from = source_of(p, op, t.b, t.group, t.channel) + columns.left * SIZE;
    unsigned char* to = piece_at(w, segment, op);
    const int pitch = source_pitch(p, op);
    // The sums of rows beyond a block's own are for the block that owns them to change.
    const int begin = op < SUM ? t.begin : t.own_begin, end = op < SUM ? t.end : t.own_end;
    for_chunks(w, t, [&](int chunk, int row, int column) {
      const bool there = row >= begin && row < end && column < columns.count;
      copy_async<16>(to + chunk, at_row(from, row, pitch) + column * SIZE, there ? 16 : 0);
    });
  }
}

// One chunk of each of a thread's rows.
struct Rows {
  Packed<EACH> row[N];
};
__device__ __forceinline__ Rows read_rows(const unsigned char* piece, int lane, int q) {
  Rows rows;
#pragma unroll
  for (int n = 0; n < N; n++) read_words(rows.row[n].words, piece + chunk_at(n, lane, q));
  return rows;
}
__device__ __forceinline__ void write_rows(unsigned char* piece, int lane, int q, const Rows& rows) {
#pragma unroll
  for (int n = 0; n < N; n++) write_words(piece + chunk_at(n, lane, q), rows.row[n].words);
}
__device__ __forceinline__ Taps taps_of(const Rows& before, const Rows& here, const Rows& after, int n, int e) {
  return {before.row[n][e], here.row[n][e], after.row[n][e]};
}

// Columns that are still to be packed: with 16-bit storage two at a time.
struct Column {
  float pending[N];
};
__device__ __forceinline__ void put_column(Rows& rows, Column& other, int e, const float (&v)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#if STORAGE == 0
    rows.row[n].words[e] = __float_as_uint(v[n]);
#else
    // Back to front in scan order: of a pair, the second column comes first, or the first if reversed.
    const bool complete = (e & 1) == REVERSED;
    if (complete)
      rows.row[n].words[e / 2] = REVERSED ? narrow_pair(other.pending[n], v[n]) : narrow_pair(v[n], other.pending[n]);
    else
      other.pending[n] = v[n];
#endif
  }
}

// The lines of a segment in scan order; with `keep`, the state that enters each stays in shared memory.
__device__ __forceinline__ void walk_forward(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N], Edges& edges,
                                             bool keep) {
  const Columns columns = columns_of(w.scan, segment);
  int phase = columns.first % p.chunk;
#pragma unroll 1
  for (int i = 0; i < CHUNKS; i++) {
    const int q = REVERSED ? CHUNKS - 1 - i : i;
    if (q * EACH >= columns.count) continue;
    const Rows x = read_rows(piece_at(w, segment, X), t.lane, q);
#if HAS_LAM
    const Rows lam = read_rows(piece_at(w, segment, LAM), t.lane, q);
#endif
    const Rows before = read_rows(piece_at(w, segment, TAPS), t.lane, q);
    const Rows here = read_rows(piece_at(w, segment, TAPS + 1), t.lane, q);
    const Rows after = read_rows(piece_at(w, segment, TAPS + 2), t.lane, q);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int e = REVERSED ? EACH - 1 - k : k;
      if (keep) put_state(w.states, i * EACH + k, t.lane, h);
      float u[N];
      Taps taps[N];
#pragma unroll
      for (int n = 0; n < N; n++) {
#if HAS_LAM
        u[n] = x.row[n][e] * lam.row[n][e];
#else
        u[n] = x.row[n][e];
#endif
        taps[n] = taps_of(before, here, after, n, e);
      }
      forward_line(t, h, edges, u, taps, phase == 0);
      if (++phase == p.chunk) phase = 0;
    }
  }
}

// The gradients of a piece, from shared memory to where they belong.
__device__ __forceinline__ void write_piece(const Params& p, const Work& w, const Thread& t, int segment) {
  const Columns columns = columns_of(w.scan, segment);
#pragma unroll
  for (int op = 0; op < OPERANDS; op++) {
    if (!is_wanted(p, op) || (SHARED && op >= TAPS && op < DY)) continue;
    unsigned char* to = sink_of(p, op, t.b, t.group, t.channel) + columns.left * SIZE;
    const unsigned char* from = piece_at(w, segment, op);
    const int pitch = sink_pitch(p, op);
    for_chunks(w, t, [&](int chunk, int row, int column) {
      Packed<EACH> packed;
      read_words(packed.words, from + chunk);
      if (row >= t.own_begin && row < t.own_end && column < columns.count) store_words(at_row(to, row, pitch) + column * SIZE, packed.words);
    });
  }
}

#if STORAGE != 0
// Float32 numbers as upper and lower halves, packed like columns.
__device__ __forceinline__ void put_halves(Rows& upper, Rows& lower, Column& other, int e, const float (&v)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    if ((e & 1) == REVERSED) {
      const Pair halves = REVERSED ? split(other.pending[n], v[n]) : split(v[n], other.pending[n]);
      upper.row[n].words[e / 2] = halves.upper, lower.row[n].words[e / 2] = halves.lower;
    } else {
      other.pending[n] = v[n];
    }
  }
}
#endif

// dx of a column, added to what the directions before this one left.
struct Sum {
  Rows upper, lower;     // for float32 `upper` alone
  Column other;
};
__device__ __forceinline__ void add_sums(const Sum& sum, int e, float (&dx)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#if STORAGE == 0
    dx[n] += sum.upper.row[n][e];
#else
    dx[n] += joined(sum.upper.row[n].words[e / 2], sum.lower.row[n].words[e / 2], e);
#endif
  }
}

// Operands of the walk back and the gradients that replace them, of one chunk of columns.
struct Chunk {
  Rows x, before, here, after, dy;
  Column other_x, other_before, other_here, other_after;
#if HAS_LAM
  Rows lam;
  Column other_lam;
#endif
#if HAS_GATE
  Rows gate;
  Column other_gate;
#endif
#if HAS_HIDDEN
  Rows hidden;
#endif
#if HAS_SUMS
  Sum sum;
#endif
};

__device__ __forceinline__ void read_chunk(const Params& p, const Work& w, const Thread& t, int segment, int q, Chunk& c) {
  c.x = read_rows(piece_at(w, segment, X), t.lane, q);
#if HAS_LAM
  c.lam = read_rows(piece_at(w, segment, LAM), t.lane, q);
#endif
  c.before = read_rows(piece_at(w, segment, TAPS), t.lane, q);
  c.here = read_rows(piece_at(w, segment, TAPS + 1), t.lane, q);
  c.after = read_rows(piece_at(w, segment, TAPS + 2), t.lane, q);
  c.dy = read_rows(piece_at(w, segment, DY), t.lane, q);
#if HAS_GATE
  c.gate = read_rows(piece_at(w, segment, GATE), t.lane, q);
#endif
#if HAS_HIDDEN
  if (is_read(p, HIDDEN)) c.hidden = read_rows(piece_at(w, segment, HIDDEN), t.lane, q);
#endif
#if HAS_SUMS
  if (reads_sums(p)) {
    c.sum.upper = read_rows(piece_at(w, segment, SUM), t.lane, q);
    if (SUMS == 2) c.sum.lower = read_rows(piece_at(w, segment, SUM + 1), t.lane, q);
  }
#endif
}

__device__ __forceinline__ void write_chunk(const Params& p, const Work& w, const Thread& t, int segment, int q, const Chunk& c) {
  write_rows(piece_at(w, segment, X), t.lane, q, c.x);
#if HAS_LAM
  write_rows(piece_at(w, segment, LAM), t.lane, q, c.lam);
#endif
  if (p.dtaps.data != nullptr) {
    write_rows(piece_at(w, segment, TAPS), t.lane, q, c.before);
    write_rows(piece_at(w, segment, TAPS + 1), t.lane, q, c.here);
    write_rows(piece_at(w, segment, TAPS + 2), t.lane, q, c.after);
#if SHARED && STORAGE != 0
    write_rows(piece_at(w, segment, DY), t.lane, q, c.dy);
#endif
  }
#if HAS_GATE
  write_rows(piece_at(w, segment, GATE), t.lane, q, c.gate);
#endif
#if HAS_SUMS && STORAGE != 0
  if (wants_sums(p)) {
    write_rows(piece_at(w, segment, SUM), t.lane, q, c.sum.upper);
    write_rows(piece_at(w, segment, SUM + 1), t.lane, q, c.sum.lower);
  }
#endif
}

__device__ __forceinline__ void put_tap_gradient(const Thread& t, Chunk& c, int e, const Taps (&dw)[N], const Taps (&taps)[N]) {
  float before[N], here[N], after[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const Taps da = tap_gradient(taps[n], dw[n], has_before(t, n), has_after(t, n));
    before[n] = da.before, here[n] = da.here, after[n] = da.after;
  }
  put_column(c.before, c.other_before, e, before);
  put_column(c.here, c.other_here, e, here);
  put_column(c.after, c.other_after, e, after);
}

#if SHARED
// Gradients of shared weights of a line: those that only this warp looks at until the cluster meets.
__device__ __forceinline__ void park(Chunk& c, int e, const Taps (&dw)[N]) {
  float before[N], here[N];
#pragma unroll
  for (int n = 0; n < N; n++) before[n] = dw[n].before, here[n] = dw[n].here;
#if STORAGE == 0
  float after[N];
#pragma unroll
  for (int n = 0; n < N; n++) after[n] = dw[n].after;
  put_column(c.before, c.other_before, e, before);
  put_column(c.here, c.other_here, e, here);
  put_column(c.after, c.other_after, e, after);
#else
  put_halves(c.before, c.here, c.other_before, e, before);
  put_halves(c.after, c.dy, c.other_here, e, here);
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
#endif

__device__ __forceinline__ void put_input_gradient(const Params& p, Chunk& c, int e, float (&dx)[N]) {
#if HAS_SUMS
  if (reads_sums(p)) add_sums(c.sum, e, dx);
#if STORAGE != 0
  if (wants_sums(p)) {
    put_halves(c.sum.upper, c.sum.lower, c.sum.other, e, dx);
    return;
  }
#endif
#endif
  put_column(c.x, c.other_x, e, dx);
}

#if HAS_HIDDEN
// Column `column` of a piece, one element of each of a thread's rows, and of the neighbours' across warps.
__device__ __forceinline__ float element_at(const unsigned char* piece, int n, int lane, int column) {
  return widen(((const storage_t*)(piece + chunk_at(n, lane, column / EACH)))[column % EACH]);
}
__device__ __forceinline__ Edges read_edges(const Thread& t, const unsigned char* piece, int column) {
  Edges others = {0.f, 0.f};
  if (asks_before(t)) others.before = element_at(piece - WARP_BYTES, N - 1, 31, column);
  if (asks_after(t)) others.after = element_at(piece + WARP_BYTES, 0, 0, column);
  return others;
}
#endif

// The state that enters a line, with its edges: line k of chunk i in scan order.
__device__ __forceinline__ Edges state_of(const Work& w, const Thread& t, int segment, const Chunk& c, int i, int k, float (&h)[N]) {
#if HAS_HIDDEN
  const unsigned char* piece = piece_at(w, segment, HIDDEN);
  if (k > 0) {
    const int q = REVERSED ? CHUNKS - 1 - i : i, e = REVERSED ? EACH - k : k - 1;
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = c.hidden.row[n][e];
    return edges_of(t, h, read_edges(t, piece, q * EACH + e));
  }
  if (i == 0) {
    // It is the last column of the segment before, of which only the last to be scanned may be short.
    if (segment == 0) return {0.f, 0.f};
    piece = piece_at(w, segment - 1, HIDDEN);
    copy_wait<0>();
    if (WIDE)
      named_barrier(0, blockDim.x);
    else
      __syncwarp();
  }
  const int column = REVERSED ? (CHUNKS - i) % CHUNKS * EACH : (i * EACH + S - 1) % S;
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = element_at(piece, n, t.lane, column);
  return edges_of(t, h, read_edges(t, piece, column));
#else
  return get_state(w.states, WARP_BYTES / 4, i * EACH + k, t, h);
#endif
}

// One line of the walk back: the k-th column of the i-th chunk in scan order, which is its column e in memory.
__device__ __forceinline__ void back_line(const Params& p, const Work& w, Thread& t, Chunk& c, int segment, int i, int k,
                                          bool restart, float (&h)[N], float (&carried)[N]) {
  const int e = REVERSED ? EACH - 1 - k : k;
  float g[N], x[N], lam[N];
  Taps taps[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float dy = c.dy.row[n][e];
#if HAS_GATE
    g[n] = inside(t, n, fmaf(c.gate.row[n][e], dy, carried[n]));
    h[n] *= dy;
#else
    g[n] = inside(t, n, dy + carried[n]);
#endif
    x[n] = c.x.row[n][e];
#if HAS_LAM
    lam[n] = c.lam.row[n][e];
#endif
    taps[n] = taps_of(c.before, c.here, c.after, n, e);
    carried[n] = 0.f;
  }
#if HAS_GATE
  put_column(c.gate, c.other_gate, e, h);
#endif
  Shown shown = {0.f, 0.f};
  if (!restart) {
    Taps weight[N];
    weights(t, taps, weight);
    shown = carry_line(t, carried, g, weight);
  }
  publish(t, shown);
  Taps dw[N] = {};
  if (needs_states(p)) {
    const Edges edges = state_of(w, t, segment, c, i, k, h);
    if (!restart) weight_gradients(dw, g, h, edges);
#if SHARED
    park(c, e, dw);
#else
    if (p.dtaps.data != nullptr) put_tap_gradient(t, c, e, dw, taps);
#endif
  }
#if HAS_LAM
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] *= g[n];
    g[n] *= lam[n];
  }
  put_column(c.lam, c.other_lam, e, x);
#endif
  put_input_gradient(p, c, e, g);
  const Edges from = settle(t, shown);
  carried[0] += from.before;
  carried[N - 1] += from.after;
#if SHARED
  park_last(w, t, i * EACH + k, dw);
#endif
}

// The lines of a segment from last to first. `h` is the state after the last, `carried` what later lines handed on.
__device__ __forceinline__ void walk_back(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N],
                                          float (&carried)[N]) {
  const Columns columns = columns_of(w.scan, segment);
  int phase = (columns.first + columns.count - 1) % p.chunk;
#pragma unroll 1
  for (int i = CHUNKS - 1; i >= 0; i--) {
    const int q = REVERSED ? CHUNKS - 1 - i : i;
    if (q * EACH >= columns.count) continue;
    Chunk c;
    read_chunk(p, w, t, segment, q, c);
#pragma unroll
    for (int k = EACH - 1; k >= 0; k--) {
      const bool restart = phase == 0;
      back_line(p, w, t, c, segment, i, k, restart, h, carried);
      phase = restart ? p.chunk - 1 : phase - 1;
    }
    write_chunk(p, w, t, segment, q, c);
  }
  __syncwarp();
  write_piece(p, w, t, segment);
}
