// Backward of horizontal scans of planes: lines are columns, and memory runs along the scan. A segment is as wide as
// the piece of a row that is fetched at once. Two or more lanes fetch the 16-byte chunks of one row's piece, so that
// whole sectors travel; a thread then reads the chunks of its own rows into registers and takes one column after
// another out of them. Gradients go the same way back: columns are packed in registers and replace, in shared memory,
// the operand they belong to, until the piece is complete.
#pragma once
#include "planes_backward_chunk.cuh"

constexpr int CHUNKS = S * SIZE / 16;    // of a row's piece
static_assert(S * SIZE % 16 == 0 && 32 % CHUNKS == 0, "pieces are whole chunks");
constexpr int UNIT = 32 * N * S * SIZE;  // bytes of a warp's piece of one operand
constexpr int WARP_BYTES = UNITS * UNIT + S * STATE_LINE * 4;
static_assert(!HAS_HIDDEN, "with the state at hand it is planes_backward_pieces.cu that runs");

struct Work {
  Scan scan;
  unsigned char* memory;  // of this warp
  float* states;
  // Planes of operands, and of the gradients in their places: in shared memory, as registers are short.
  unsigned char** planes;
};

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t) {
  Work w;
  w.scan = scan;
  w.memory = shared_memory() + t.warp * WARP_BYTES;
  w.states = (float*)(w.memory + UNITS * UNIT);
  w.planes = (unsigned char**)after_mail(t);
  for (int op = threadIdx.x; op < OPERANDS; op += blockDim.x) {
    w.planes[op] = (unsigned char*)source_of(p, op, t.b, t.group, t.channel);
    w.planes[OPERANDS + op] = is_wanted(p, op) ? sink_of(p, op, t.b, t.group, t.channel) : nullptr;
  }
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
    const unsigned char* from = w.planes[op] + columns.left * SIZE;
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

template <int LAST>
__device__ __forceinline__ void read_chunk(const Params& p, const Work& w, const Thread& t, int segment, int q, Chunk& c) {
#pragma unroll
  for (int op = 0; op < LAST; op++)
    if (is_read(p, op)) c.operand[op] = read_rows(piece_at(w, segment, op), t.lane, q);
}

__device__ __forceinline__ void write_chunk(const Params& p, const Work& w, const Thread& t, int segment, int q, const Chunk& c) {
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    // With shared taps, gradients of weights are parked also in the place of dy.
    if (is_wanted(p, op) || (SHARED && STORAGE != 0 && op == DY)) write_rows(piece_at(w, segment, op), t.lane, q, c.operand[op]);
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
    Chunk c;
    read_chunk<DY>(p, w, t, segment, q, c);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int e = REVERSED ? EACH - 1 - k : k;
      if (keep) put_state(w.states, i * EACH + k, t.lane, h);
      float u[N];
      Taps taps[N];
#pragma unroll
      for (int n = 0; n < N; n++) {
        u[n] = c.at(X, n, e);
#if HAS_LAM
        u[n] *= c.at(LAM, n, e);
#endif
        taps[n] = {c.at(TAPS, n, e), c.at(TAPS + 1, n, e), c.at(TAPS + 2, n, e)};
      }
      const Shown shown = forward_line(t, h, edges, u, taps, phase == 0);
      publish(t, shown);
      if (++phase == p.chunk) phase = 0;
      edges = settle(t, shown);
    }
  }
}

// The gradients of a piece, from shared memory to where they belong.
__device__ __forceinline__ void write_piece(const Params& p, const Work& w, const Thread& t, int segment) {
  const Columns columns = columns_of(w.scan, segment);
#pragma unroll
  for (int op = 0; op < OPERANDS; op++) {
    if (!is_wanted(p, op) || (SHARED && op >= TAPS && op < DY)) continue;
    unsigned char* to = w.planes[OPERANDS + op] + columns.left * SIZE;
    const unsigned char* from = piece_at(w, segment, op);
    const int pitch = sink_pitch(p, op);
    for_chunks(w, t, [&](int chunk, int row, int column) {
      Packed<EACH> packed;
      read_words(packed.words, from + chunk);
      const bool own = row >= t.own_begin && row < t.own_end && column < columns.count;
      if (own) store_words(at_row(to, row, pitch) + column * SIZE, packed.words);
    });
  }
}

#if SHARED
#include "planes_backward_horizontal_shared.cuh"
#endif

// The state that enters a line, with its edges.
struct Entering {
  float h[N];
  Edges edges;
};

// That of the k-th line of chunk i in scan order.
__device__ __forceinline__ void enter(const Work& w, const Thread& t, int i, int k, Entering& entering) {
  entering.edges = get_state(w.states, WARP_BYTES / 4, i * EACH + k, t, entering.h);
}

// One line of the walk back: the k-th column of the i-th chunk in scan order. The state of the next one is read while
// the edges of this one travel.
__device__ __forceinline__ void back_line(const Params& p, const Work& w, Thread& t, Chunk& c, int segment, int i, int k, bool restart,
                                          float (&h)[N], Entering& entering, float (&carried)[N]) {
  const int e = REVERSED ? EACH - 1 - k : k;
  float g[N];
  Taps dw[N] = {}, da[N] = {};
  Shown shown = {0.f, 0.f};
  state_gradient(t, c, e, h, carried, g);
#pragma unroll
  for (int n = 0; n < N; n++) carried[n] = 0.f;
  // A branch, not a selection: weights of one line at a time are enough for the registers.
  if (!restart) {
    Weighed weight[N];
#pragma unroll
    for (int n = 0; n < N; n++)
      weight[n] = weigh({c.at(TAPS, n, e), c.at(TAPS + 1, n, e), c.at(TAPS + 2, n, e)}, has_before(t, n), has_after(t, n));
    shown = carry_line(carried, g, weight);
    publish(t, shown);
    if (WANTS_TAPS) {
      weight_gradients(dw, g, entering.h, entering.edges);
      if (!SHARED) tap_gradients(t, dw, weight, da);
    }
  } else {
    publish(t, shown);
  }
  if (WANTS_TAPS) {
#if SHARED
    park(c, e, dw);
#else
    put_taps(c, e, da);
#endif
  }
  put_product_gradients(p, c, e, g);
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = entering.h[n];
  if (NEEDS_STATES && k > 0) enter(w, t, i, k - 1, entering);
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
  Entering entering = {};
#pragma unroll 1
  for (int i = CHUNKS - 1; i >= 0; i--) {
    const int q = REVERSED ? CHUNKS - 1 - i : i;
    if (q * EACH >= columns.count) continue;
    Chunk c;
    read_chunk<OPERANDS>(p, w, t, segment, q, c);
    if (NEEDS_STATES) enter(w, t, i, EACH - 1, entering);
#pragma unroll
    for (int k = EACH - 1; k >= 0; k--) {
      const bool restart = phase == 0;
      back_line(p, w, t, c, segment, i, k, restart, h, entering, carried);
      phase = restart ? p.chunk - 1 : phase - 1;
    }
    write_chunk(p, w, t, segment, q, c);
  }
  __syncwarp();
  write_piece(p, w, t, segment);
}
