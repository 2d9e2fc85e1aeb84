// What enters tiles in vertical scans: states forward (down, up), and what lines hand back to those before.
// See planes_tiles.cuh.
//
// A block has one walk over one plane, a thread 16 bytes of each row. A thread copies its own places of the
// next rows into a ring that it alone reads; neighbours meet by shuffle, and warps by one barrier a row.
//
// Macros beside those of common.cuh:
//   THREADS     threads of a block;  MIN_BLOCKS blocks on a multiprocessor
//   RING        rows in shared memory: one that is computed, and others on their way
// Knobs: 0 elements of a row of weights, 1 to 8 the walks: twice the index of the scan, and one more on the
// way back.
#include "planes_tiles_words.cuh"

constexpr int TOGETHER = 4;  // rows whose sides are written together
constexpr int OPERANDS = 4;  // x or dy, lam or gate, weights before and after
constexpr int X = 0, SCALE = 1, BEFORE = 2, AFTER = 3;

// A thread's places of the next row of an operand that is copied, and from a row to the next in the order of
// the walk.
struct Source {
  const unsigned char* at;
  long long step;  // bytes
};

struct Walk {
  Source x, scale, before;  // weights after are `plane` bytes behind weights before
  long long plane;
  tiles::Borders to;
  int place, tile, next;    // `next`: row that is copied next
  bool alive, first, last;  // has places in the image; the first or the last ones of a tile
  bool has_before, has_after;
  bool rising;  // rows first to last
};

__device__ __forceinline__ Source source_of(const void* plane, long long pitch, const Walk& w, int rows,
                                            int place) {
  const unsigned char* first = (const unsigned char*)plane + place * 2;
  // The first rows of a walk may be outside of the image: nothing is read there.
  return {first + (w.rising ? 0 : (rows - 1) * pitch * 2), w.rising ? pitch * 2 : -pitch * 2};
}

template <bool BACK>
__device__ __forceinline__ Walk walk_of(const Params& p, int d, int b, int channel, int rows) {
  const View &x = BACK ? p.dy : p.x, &scale = BACK ? p.gate : p.lam;
  const int group = channel / (p.channels / p.groups), place = threadIdx.x * EACH;
  Walk w;
  w.place = place, w.tile = place / tiles::SIDE;
  w.alive = place < p.width;
  w.rising = (p.directions[d] == 0) != BACK;
  const int at = w.alive ? place : 0;
  w.x = source_of(x.data + (b * x.b + channel * x.c), x.h, w, rows, at);
  w.scale = w.x;
  if (BACK ? HAS_GATE : HAS_LAM)
    w.scale = source_of(scale.data + (b * scale.b + d * scale.d + channel * scale.c), scale.h, w, rows, at);
  w.before = source_of(tiles::weights_of(p, d, b, group, p.knobs[0]), p.knobs[0], w, rows, at);
  w.plane = 2ll * p.height * p.knobs[0];
  w.next = w.rising ? 0 : rows - 1;
  w.to = tiles::borders_of(p, d, BACK, b, channel);
  w.first = w.alive && place % tiles::SIDE == 0;
  w.last = w.alive && place % tiles::SIDE == tiles::SIDE - EACH;
  w.has_before = place > 0, w.has_after = place + EACH < p.width;
  return w;
}

constexpr int SLOT = OPERANDS * 16 * THREADS;  // bytes of a row in the ring

// A thread's part of an operand in a row of the ring that begins `slot` bytes into it.
__device__ __forceinline__ unsigned char* in_ring(int slot, int op) {
  return shared_memory() + slot + op * 16 * THREADS + threadIdx.x * 16;
}

// Copies the next row, beyond the last place zeros. Of rows that there are not, nothing.
template <bool SCALES>
__device__ __forceinline__ void fetch(Walk& w, int height, int slot) {
  if ((u32)w.next < (u32)height) {
    const int bytes = w.alive ? 16 : 0;
    copy_async<16>(in_ring(slot, X), w.x.at, bytes);
    if (SCALES) copy_async<16>(in_ring(slot, SCALE), w.scale.at, bytes);
    copy_async<16>(in_ring(slot, BEFORE), w.before.at, bytes);
    copy_async<16>(in_ring(slot, AFTER), w.before.at + w.plane, bytes);
  }
  w.x.at += w.x.step, w.before.at += w.before.step;
  if (SCALES) w.scale.at += w.scale.step;
  w.next += w.rising ? 1 : -1;
  copy_commit();
}

// What comes from the threads on either side.
struct Sides {
  float before, after;
};

// `first` goes to the thread before, `last` to the one after. All threads of the block.
__device__ __forceinline__ Sides meet(const Walk& w, float* edges, int& parity, float first, float last) {
  constexpr int warps = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float before = __shfl_up_sync(~0u, last, 1), after = __shfl_down_sync(~0u, first, 1);
  if (warps > 1) {
    float* mine = edges + (parity * (warps + 2) + warp) * 2;
    if (lane == 0) mine[2] = first;
    if (lane == 31) mine[3] = last;
    __syncthreads();
    if (lane == 0) before = mine[1];
    if (lane == 31) after = mine[4];
    parity ^= 1;
  }
  return {w.has_before ? before : 0.f, w.has_after ? after : 0.f};
}

struct Weights {
  float before[EACH], here[EACH], after[EACH];
};
__device__ __forceinline__ Weights weights_in(int slot) {
  Eight before, after;
  before.read(in_ring(slot, BEFORE)), after.read(in_ring(slot, AFTER));
  Weights w;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    w.before[i] = before.weight(i), w.after[i] = after.weight(i);
    w.here[i] = 1.f - w.before[i] - w.after[i];
  }
  return w;
}

// lam x, or gate dy.
template <bool SCALES>
__device__ __forceinline__ void inputs_in(int slot, float (&u)[EACH]) {
  Eight x, scale;
  x.read(in_ring(slot, X));
  if (SCALES) scale.read(in_ring(slot, SCALE));
#pragma unroll
  for (int i = 0; i < EACH; i++) u[i] = SCALES ? x[i] * scale[i] : x[i];
}

// One row. `v` is what lines hand on, states or sums that later lines hand back, and `sides` what comes of it
// from the places on either side; on the way back `v` is complete, forward `sides` are still to be used.
template <bool BACK, bool SCALES>
__device__ __forceinline__ void walk_row(const Walk& w, int slot, bool restart, float* edges, int& parity,
                                         float (&v)[EACH], Sides& sides) {
  float u[EACH];
  inputs_in<SCALES>(slot, u);
  const Weights k = weights_in(slot);
  float next[EACH];
  if constexpr (BACK) {
    float g[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) g[i] = u[i] + v[i];
    sides = meet(w, edges, parity, restart ? 0.f : k.before[0] * g[0],
                 restart ? 0.f : k.after[EACH - 1] * g[EACH - 1]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      next[i] =
          fmaf(k.here[i], g[i], i > 0 ? k.after[i > 0 ? i - 1 : 0] * g[i > 0 ? i - 1 : 0] : sides.before);
      next[i] = i + 1 < EACH ? fmaf(k.before[i + 1 < EACH ? i + 1 : i], g[i + 1 < EACH ? i + 1 : i], next[i])
                             : next[i] + sides.after;
      v[i] = restart ? 0.f : next[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float before = i > 0 ? v[i > 0 ? i - 1 : 0] : sides.before;
      const float after = i + 1 < EACH ? v[i + 1 < EACH ? i + 1 : i] : sides.after;
      next[i] = fmaf(k.before[i], before, fmaf(k.after[i], after, fmaf(k.here[i], v[i], u[i])));
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = restart ? u[i] : next[i];
    sides = meet(w, edges, parity, v[0], v[EACH - 1]);
  }
}

__device__ __forceinline__ void write_line(const Walk& w, int segment, const float (&v)[EACH]) {
  float* to = w.to.line(segment, w.place);
  *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
  *(float4*)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

template <bool BACK, bool SCALES>
__device__ __forceinline__ void walk(const Params& p, Walk w, int rows) {
  const int height = p.height;
  float* edges = (float*)(shared_memory() + RING * SLOT);
  for (int i = threadIdx.x; i < 4 * (THREADS / 32 + 2); i += THREADS) edges[i] = 0.f;
  __syncthreads();
  float v[EACH] = {};
  Sides sides = {0.f, 0.f};
  int parity = 0, slot = 0, ahead = (RING - 1) * SLOT, row = w.next;
  int phase = BACK ? (height - 1) % p.chunk : 0;  // lines since the last restart
  for (int i = 0; i < RING - 1; i++) fetch<SCALES>(w, height, i * SLOT);
#pragma unroll 1
  for (int first = 0; first < rows; first += TOGETHER) {
    float side[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
      fetch<SCALES>(w, height, ahead);
      copy_wait<RING - 1>();
      side[k] = w.first ? sides.before : sides.after;
      if (row < height) {
        walk_row<BACK, SCALES>(w, slot, phase == 0, edges, parity, v, sides);
        phase = BACK ? (phase == 0 ? p.chunk : phase) - 1 : phase + 1 == p.chunk ? 0 : phase + 1;
      }
      if (k + 1 < TOGETHER) row += w.rising ? 1 : -1;
      slot = slot + SLOT == RING * SLOT ? 0 : slot + SLOT,
      ahead = ahead + SLOT == RING * SLOT ? 0 : ahead + SLOT;
    }
    // Segments end where such groups of rows do.
    const int segment = row < height ? tiles::entered_after(row, height, w.rising) : -1;
    if (segment >= 0 && w.alive) write_line(w, segment, v);
    if (w.first || w.last) {
      float* to = w.to.side(w.tile, w.last, w.rising ? first : row, TOGETHER);
      *(float4*)to = BACK ? make_float4(side[3], side[2], side[1], side[0])
                          : make_float4(side[0], side[1], side[2], side[3]);
    }
    row += w.rising ? 1 : -1;
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_tiles_vertical(CONSTANT_PARAMS p) {
  const int planes = p.batch * p.channels, number = blockIdx.x / planes, plane = blockIdx.x - number * planes;
  const int d = p.knobs[1 + number] / 2, b = plane / p.channels, channel = plane - b * p.channels;
  const int rows = (p.height + TOGETHER - 1) / TOGETHER * TOGETHER;
  if (BACKWARD && p.knobs[1 + number] & 1)
    walk<true, HAS_GATE>(p, walk_of<true>(p, d, b, channel, rows), rows);
  else
    walk<false, HAS_LAM>(p, walk_of<false>(p, d, b, channel, rows), rows);
}
