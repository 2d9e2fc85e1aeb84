// 16 bytes of a row of each operand in registers, several columns, and the gradients that take their places: right and
// left, on the way back.
#pragma once
#include "planes_backward_line.cuh"

#ifndef FORWARD
#define FORWARD 0
#endif
constexpr bool RISING = FORWARD != REVERSED;  // are columns walked over in the order of memory?

// One chunk of each of a thread's rows.
struct Rows {
  Packed<EACH> row[N];
};
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
    if ((e & 1) == RISING)
      rows.row[n].words[e / 2] = RISING ? narrow_pair(other.pending[n], v[n]) : narrow_pair(v[n], other.pending[n]);
    else
      other.pending[n] = v[n];
#endif
  }
}
#if STORAGE != 0
// Float32 numbers as upper and lower halves, packed like columns.
__device__ __forceinline__ void put_halves(Rows& upper, Rows& lower, Column& other, int e, const float (&v)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    if ((e & 1) == RISING) {
      const Pair halves = RISING ? split(other.pending[n], v[n]) : split(v[n], other.pending[n]);
      upper.row[n].words[e / 2] = halves.upper, lower.row[n].words[e / 2] = halves.lower;
    } else {
      other.pending[n] = v[n];
    }
  }
}
#endif

// One chunk of columns: operands, and the gradients that replace them on the way back.
struct Chunk {
  Rows operand[OPERANDS];
  Column other[OPERANDS];

  __device__ __forceinline__ float at(int op, int n, int e) const { return operand[op].row[n][e]; }
  __device__ __forceinline__ Taps taps(int n, int e) const {
    return taps_in(operand[TAPS].row[n], operand[TAPS + 1].row[n], operand[TAPS + 2].row[n], e);
  }
  __device__ __forceinline__ void put(int op, int e, const float (&v)[N]) { put_column(operand[op], other[op], e, v); }
};

// dx of a column, added to what the directions before this one left.
__device__ __forceinline__ void put_input_gradient(const Params& p, Chunk& c, int e, float (&dx)[N]) {
#if HAS_SUMS
  if (reads_sums(p)) {
#pragma unroll
    for (int n = 0; n < N; n++)
#if STORAGE == 0
      dx[n] += c.at(SUM, n, e);
#else
      dx[n] += joined(c.operand[SUM].row[n].words[e / 2], c.operand[SUM + 1].row[n].words[e / 2], e);
#endif
  }
#if STORAGE != 0
  if (wants_sums(p)) {
    put_halves(c.operand[SUM], c.operand[SUM + 1], c.other[SUM], e, dx);
    return;
  }
#endif
#endif
  c.put(DX, e, dx);
}

// g of a line: what its output and the lines after it say of its state, which is `h`.
__device__ __forceinline__ void state_gradient(const Thread& t, Chunk& c, int e, const float (&h)[N], const float (&carried)[N],
                                               float (&g)[N]) {
  float dgate[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float dy = c.at(DY, n, e);
#if HAS_GATE
    dgate[n] = h[n] * dy;
    g[n] = inside(t, n, fmaf(c.at(GATE, n, e), dy, carried[n]));
#else
    g[n] = inside(t, n, dy + carried[n]);
#endif
  }
  if (HAS_GATE && WANTS_GATE) c.put(GATE, e, dgate);
}

__device__ __forceinline__ void put_product_gradients(const Params& p, Chunk& c, int e, const float (&g)[N]) {
  float dx[N], dlam[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    dlam[n] = g[n] * c.at(X, n, e);
#if HAS_LAM
    dx[n] = g[n] * c.at(LAM, n, e);
#else
    dx[n] = g[n];
#endif
  }
  if (HAS_LAM && WANTS_LAM) c.put(LAM, e, dlam);
  if (WANTS_X) put_input_gradient(p, c, e, dx);
}

__device__ __forceinline__ void put_taps(Chunk& c, int e, const Taps (&da)[N]) {
  float before[N], here[N], after[N];
#pragma unroll
  for (int n = 0; n < N; n++) before[n] = da[n].before, here[n] = da[n].here, after[n] = da[n].after;
  c.put(TAPS, e, before);
  c.put(TAPS + 1, e, here);
  c.put(TAPS + 2, e, after);
}
