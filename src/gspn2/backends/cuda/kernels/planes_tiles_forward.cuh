// Forward of one tile in all directions: two warps for each axis, which take half of its lines each, both
// ways at once. A lane has a place of the line; what comes of the two ways is added up in its registers. All
// channels of a group have the same weights: they stay in registers, too.
#pragma once
#include "planes_tiles_words.cuh"

constexpr int SIDE = tiles::SIDE, LINES = tiles::LINES;

// Of an axis: bit 0 the way first to last, bit 1 last to first. Scans are counted in this order: down, up,
// right, left.
constexpr int count(int ways) { return (ways & 1) + (ways >> 1); }
constexpr int SCANS = count(VERTICAL) + count(HORIZONTAL);
constexpr int HALVES = SIDE / LINES, THREADS = 32 * 2 * HALVES;

// Shared memory of one channel: tiles of 16-bit numbers, between whose rows there is room for eight rows'
// vectors to meet all banks; and what enters each half of each scan.
constexpr int ROW = 2 * SIDE + 16, TENSOR = SIDE * ROW;
constexpr int LAM = TENSOR, GATE = LAM + HAS_LAM * SCANS * TENSOR;
constexpr int BORDERS = GATE + HAS_GATE * SCANS * TENSOR;
constexpr int SIDES = 4 * SIDE, BORDER = SIDES + 2 * 4 * LINES;  // within borders: the line, then two sides
constexpr int STAGE = BORDERS + HALVES * SCANS * BORDER;
// A tile of float32 numbers in which neither rows nor columns meet a bank twice: sums of the vertical scans.
constexpr int PART_ROW = 4 * SIDE + 4, PART = SIDE * PART_ROW;

struct Tile {
  int b, group, row, column;  // first row and column
};

// What a warp needs of its lines in the two ways.
struct Strip {
  int half, lane;
  u32 weights[2][LINES];  // of the lane's place: before, and after; lines as they lie in the image
  u32 restarts[2];        // lines, in the order of the scan
};

template <bool V>
__device__ __forceinline__ constexpr int ways() {
  return V ? VERTICAL : HORIZONTAL;
}
// Which of the scans.
template <bool V>
__device__ __forceinline__ constexpr int number_of(int way) {
  return (V ? 0 : count(VERTICAL)) + way * (ways<V>() & 1);
}

// Weights of the lane's places; outside of the image 0.
template <bool V>
__device__ __forceinline__ void read_weights(const Params& p, const Tile& t, int scan, int half, int lane,
                                             u32 (&weights)[LINES]) {
  const int pitch = p.knobs[0];
  const unsigned short* before = tiles::weights_of(p, p.knobs[2 + scan], t.b, t.group, pitch);
  const unsigned short* after = before + (long long)p.height * pitch;
  const int row = t.row + (V ? half * LINES : lane), column = t.column + (V ? lane : half * LINES);
  const long long at = (long long)row * pitch + column;
  if (V) {
#pragma unroll
    for (int k = 0; k < LINES; k++) {
      const bool there = row + k < p.height && column < p.width;
      weights[k] =
          there ? (u32)before[at + (long long)k * pitch] | (u32)after[at + (long long)k * pitch] << 16 : 0u;
    }
  } else {
#pragma unroll
    for (int q = 0; q < LINES / EACH; q++) {
      Eight first = {}, second = {};
      if (row < p.height && column + EACH * q < p.width)
        first.read(before + at + EACH * q), second.read(after + at + EACH * q);
#pragma unroll
      for (int e = 0; e < EACH; e++)
        weights[EACH * q + e] = __byte_perm(first.word[e / 2], second.word[e / 2], e & 1 ? 0x7632 : 0x5410);
    }
  }
}

// Lines that start anew. Lines outside of the image hold zeros, and hand on zeros.
template <bool V>
__device__ __forceinline__ u32 restarts_of(const Params& p, const Tile& t, int half, int way) {
  const int line = (V ? t.row : t.column) + half * LINES, lines = V ? p.height : p.width;
  const int first = way ? lines - LINES - line : line;  // in the order of the scan
  int phase = max(first, 0) % p.chunk;
  u32 restarts = 0;
#pragma unroll 1
  for (int k = 0; k < LINES; k++) {
    if (first + k < 0) continue;
    restarts |= (u32)(phase == 0) << k;
    phase = phase + 1 == p.chunk ? 0 : phase + 1;
  }
  return restarts;
}

template <bool V>
__device__ __forceinline__ Strip strip_of(const Params& p, const Tile& t) {
  Strip s = {};
  s.half = threadIdx.x / 32 % HALVES, s.lane = threadIdx.x % 32;
#pragma unroll
  for (int way = 0; way < 2; way++) {
    if (!(ways<V>() >> way & 1)) continue;
    read_weights<V>(p, t, number_of<V>(way), s.half, s.lane, s.weights[way]);
    s.restarts[way] = restarts_of<V>(p, t, s.half, way);
  }
  return s;
}

// Eight lines' numbers of the lane's place, from line 8 `q` of the strip on.
template <bool V>
__device__ __forceinline__ Eight read_lines(const Strip& s, const unsigned char* tensor, int q) {
  Eight v;
  if (V) {
    const unsigned char* from = tensor + (s.half * LINES + EACH * q) * ROW + 2 * s.lane;
#pragma unroll
    for (int i = 0; i < EACH; i += 2) {
      const u32 even = *(const unsigned short*)(from + i * ROW);
      const u32 odd = *(const unsigned short*)(from + (i + 1) * ROW);
      v.word[i / 2] = __byte_perm(even, odd, 0x5410);
    }
  } else {
    v.read(tensor + s.lane * ROW + 2 * (s.half * LINES + EACH * q));
  }
  return v;
}

// What follows from `v` is computed anew for each channel: there are no registers to keep it for all.
__device__ __forceinline__ u32 anew(u32 v) { return __float_as_uint(opaque(__uint_as_float(v))); }

// One line of one way: the states of the lane's place.
__device__ __forceinline__ float step(u32 pair, float u, float last, float side, int lane, bool restart) {
  const float before = __shfl_up_sync(~0u, last, 1), after = __shfl_down_sync(~0u, last, 1);
  const float w_before = low_weight(pair), w_after = high_weight(pair);
  float next = fmaf(1.f - w_before - w_after, last, u);
  next = fmaf(w_after, lane == 31 ? side : after, next);
  next = fmaf(w_before, lane == 0 ? side : before, next);
  return restart ? u : next;
}

// What the two ways of the axis add to y at the lane's place of each line. The ways meet in the middle:
// until there each visits lines that the other has not been to.
template <bool V>
__device__ __forceinline__ void scan(const Strip& s, const unsigned char* stage, float (&sum)[LINES]) {
  constexpr int HALF = LINES / EACH;
  const unsigned char* borders[2];
  float last[2];
  const u32 restarts[2] = {anew(s.restarts[0]), anew(s.restarts[1])};
  Eight x[HALF], lam[2], gate[2];
#pragma unroll
  for (int q = 0; q < HALF; q++) x[q] = read_lines<V>(s, stage, q);
#pragma unroll
  for (int way = 0; way < 2; way++) {
    borders[way] = stage + BORDERS + (HALVES * number_of<V>(way) + s.half) * BORDER;
    if (ways<V>() >> way & 1) last[way] = *(const float*)(borders[way] + 4 * s.lane);
    borders[way] += SIDES + s.lane / 16 * 4 * LINES;
  }
#pragma unroll
  for (int k = 0; k < LINES; k++) {
#pragma unroll
    for (int way = 0; way < 2; way++) {
      if (!(ways<V>() >> way & 1)) continue;
      const int line = way ? LINES - 1 - k : k, q = line / EACH, e = line % EACH;
      const int tensor = number_of<V>(way) * TENSOR;
      if (k % EACH == 0) {
        if (HAS_LAM) lam[way] = read_lines<V>(s, stage + LAM + tensor, q);
        if (HAS_GATE) gate[way] = read_lines<V>(s, stage + GATE + tensor, q);
      }
      const float2 two = *(const float2*)(borders[way] + 4 * (k & ~1));
      const float u = HAS_LAM ? x[q][e] * lam[way][e] : x[q][e];
      last[way] = step(anew(s.weights[way][line]), u, last[way], k & 1 ? two.y : two.x, s.lane,
                       restarts[way] >> k & 1);
      const bool alone = ways<V>() != 3 || k < LINES / 2;
      if (alone)
        sum[line] = HAS_GATE ? gate[way][e] * last[way] : last[way];
      else
        sum[line] = HAS_GATE ? fmaf(gate[way][e], last[way], sum[line]) : sum[line] + last[way];
    }
  }
}
