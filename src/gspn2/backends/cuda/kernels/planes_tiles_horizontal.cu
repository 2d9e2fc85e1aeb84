// What enters tiles in horizontal scans: states forward (right, left), and what columns hand back to those
// before. See planes_tiles.cuh.
//
// A thread has one row. The blocks of a cluster share the rows of a plane, and each scans HALO rows beyond
// its own along, as planes_backward.cuh tells. Warps copy long pieces of their rows into tiles of their own:
// memory is fast only so.
//
// Macros: those of planes_backward.cuh, with HORIZONTAL, PLACES and WEIGHTS 1, neither sums nor gradients,
// and
//   THREADS     threads of a block;  MIN_BLOCKS blocks on a multiprocessor
//   PIECE       bytes of a row in a tile
//   BUFFERS     tiles in a warp's ring
// Knobs: 1 to 5 those of planes_backward.cuh, 9 to 16 the walks: twice the index of the scan, and one more on
//   the way back. A walk's planes come one after another in the grid, then the next walk's.
#include "planes_backward_memory.cuh"
#include "planes_tiles.cuh"

constexpr int VECTORS = PIECE / 16, COLUMNS = PIECE / SIZE;
static_assert(HORIZONTAL && N == 1 && WEIGHTS && S % EACH == 0, "a thread has one row");
constexpr int UNIT = 32 * PIECE;  // bytes of one operand in a tile
constexpr int INPUT = 0, SCALE = 1, BEFORE = 2, AFTER = 3, OPERANDS_OF_WALK = 4;
constexpr int WARP_BYTES = BUFFERS * OPERANDS_OF_WALK * UNIT;

// One walk over a plane.
struct Walk {
  const unsigned char *input, *scale, *before;  // first row; weights after are a plane behind weights before
  unsigned char* ring;                          // of this warp
  tiles::Borders to;
  bool rising, first, last;  // columns first to last; the thread's row is the first, the last of a tile
};

template <bool BACKWARD>
__device__ __forceinline__ Walk walk_of(const Params& p, const Thread& t, int d) {
  const View &input = BACKWARD ? p.dy : p.x, &scale = BACKWARD ? p.gate : p.lam;
  Walk w;
  w.input = w.scale = (const unsigned char*)(input.data + (t.b * input.b + t.channel * input.c));
  if (BACKWARD ? HAS_GATE : HAS_LAM)
    w.scale = (const unsigned char*)(scale.data + (t.b * scale.b + d * scale.d + t.channel * scale.c));
  w.before = (const unsigned char*)tiles::weights_of(p, d, t.b, t.group, p.knobs[2]);
  w.ring = shared_memory() + t.warp * WARP_BYTES;
  w.to = tiles::borders_of(p, d, BACKWARD, t.b, t.channel);
  w.rising = (p.directions[d] == 2) != BACKWARD;
  w.first = t.place % tiles::SIDE == 0, w.last = t.place % tiles::SIDE == tiles::SIDE - 1;
  return w;
}

// Vector v of a row of a unit: permuted so that 8 rows' vectors meet 8 different groups of banks.
__device__ __forceinline__ int vector_at(u32 row, u32 v) {
  constexpr u32 TOGETHER = 8 / VECTORS;
  return (row * VECTORS + (v ^ row / TOGETHER % VECTORS)) * 16;
}
__device__ __forceinline__ unsigned char* tile_at(const Walk& w, int tile) {
  return w.ring + tile % BUFFERS * OPERANDS_OF_WALK * UNIT;
}
// The first column of a tile, counted in the order of the walk.
__device__ __forceinline__ int left_of(const Params& p, const Walk& w, int tile) {
  return (w.rising ? tile : (p.width + COLUMNS - 1) / COLUMNS - 1 - tile) * COLUMNS;
}

// Consecutive lanes copy consecutive vectors.
template <bool BACKWARD, bool SCALES>
__device__ __forceinline__ void fetch(const Params& p, const Walk& w, const Thread& t, int tile) {
  constexpr int ROWS = 32 / VECTORS;  // at a time
  const int left = left_of(p, w, tile), r = t.lane / VECTORS, v = t.lane % VECTORS;
  const bool column = left + v * EACH < p.width;
  unsigned char* to = tile_at(w, tile);
  const auto fetch_operand = [&](int op, const unsigned char* from, int pitch) {
    from += (long long)left * SIZE + v * 16;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
      const int row = t.begin + t.warp * 32 + r + k * ROWS;
      const bool there = column && row < t.end;
      copy_async_wide(to + op * UNIT + vector_at(r + k * ROWS, v), at_row(from, there ? row : 0, pitch),
                      there ? 16 : 0);
    }
  };
  fetch_operand(INPUT, w.input, (int)(BACKWARD ? p.dy.h : p.x.h));
  if (SCALES) fetch_operand(SCALE, w.scale, (int)(BACKWARD ? p.gate.h : p.lam.h));
  fetch_operand(BEFORE, w.before, p.knobs[2]);
  fetch_operand(AFTER, w.before + (long long)p.height * p.knobs[2] * SIZE, p.knobs[2]);
}

// What rows show to their neighbours. Two sets of a block's edges take turns from column to column, and a
// third is for the exchange between blocks, so that there is one barrier a column. All threads of the block.
constexpr int SET = 2 * (THREADS / 32 + 2);  // floats

__device__ __forceinline__ Edges meet(const Thread& t, int set, float first, float last) {
  float before = __shfl_up_sync(~0u, last, 1), after = __shfl_down_sync(~0u, first, 1);
  if (THREADS > 32) {
    float* edges = t.edges + set * SET + 2 * t.warp;
    if (t.lane == 0) edges[2] = first;
    if (t.lane == 31) edges[3] = last;
    __syncthreads();
    if (t.lane == 0) before = edges[1];
    if (t.lane == 31) after = edges[4];
  }
  // Beyond the image there are zeros: there, and from there, all weights are 0.
  if (THREADS > 32) return {before, after};
  return {t.lane == 0 ? 0.f : before, t.lane == 31 ? 0.f : after};
}

// One column. `v` is what columns hand on: states, or on the way back sums; `edges` is what comes of it from
// the rows on either side.
template <bool BACKWARD>
__device__ __forceinline__ void walk_column(const Thread& t, int set, float u, float before, float after,
                                            bool restart, float& v, Edges& edges) {
  const float here = 1.f - before - after;
  if constexpr (BACKWARD) {
    const float g = u + v;
    edges = meet(t, set, restart ? 0.f : before * g, restart ? 0.f : after * g);
    v = restart ? 0.f : fmaf(here, g, edges.before + edges.after);
  } else {
    const float next = fmaf(before, edges.before, fmaf(after, edges.after, fmaf(here, v, u)));
    v = restart ? u : next;
    edges = meet(t, set, v, v);
  }
}

__device__ __forceinline__ void write(const Params& p, const Walk& w, const Thread& t, int left, float v,
                                      const float (&side)[EACH]) {
  if (!t.own) return;
  const int segment = tiles::entered_after(w.rising ? left + EACH - 1 : left, p.width, w.rising);
  if (segment >= 0) *w.to.line(segment, t.place) = v;
  if (!w.first && !w.last) return;
  float* at = w.to.side(t.place / tiles::SIDE, w.last, left, EACH);
#pragma unroll
  for (int e = 0; e < EACH; e += 4)
    *(float4*)(at + e) = make_float4(side[e], side[e + 1], side[e + 2], side[e + 3]);
}

// The columns of one vector. `phase`: lines from the last restart to the first column here.
template <bool BACKWARD, bool RISES, bool SCALES, bool RESTARTS>
__device__ __forceinline__ void walk_vector(const Params& p, const Walk& w, Thread& t, int tile, int q,
                                            float& v, Edges& edges, int& phase) {
  const unsigned char* vector = tile_at(w, tile) + vector_at(t.lane, q);
  Packed<EACH> operand[OPERANDS_OF_WALK];
#pragma unroll
  for (int op = 0; op < OPERANDS_OF_WALK; op++)
    if (op != SCALE || SCALES) read_words(operand[op].words, vector + op * UNIT);
  float side[EACH];
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    const int e = RISES ? k : EACH - 1 - k;
    const float u = SCALES ? operand[INPUT][e] * operand[SCALE][e] : operand[INPUT][e];
    side[BACKWARD ? EACH - 1 - k : k] = w.first ? edges.before : edges.after;
    walk_column<BACKWARD>(t, k % 2, u, weight_element(operand[BEFORE].words, e),
                          weight_element(operand[AFTER].words, e), RESTARTS && phase == 0, v, edges);
    if (RESTARTS)
      phase = BACKWARD ? (phase == 0 ? p.chunk : phase) - 1 : phase + 1 == p.chunk ? 0 : phase + 1;
  }
  if (!RESTARTS) phase += BACKWARD ? -EACH : EACH;
  write(p, w, t, left_of(p, w, tile) + q * EACH, v, side);
}

// What rows of other blocks have, put right.
template <bool BACKWARD>
__device__ __forceinline__ void exchange_rows(const Params& p, Thread& t, float (&v)[N], Edges& edges) {
#if SPLIT
  exchange(p, t, v);
  // On the way back it is in the sums already.
  if (!BACKWARD) edges = meet(t, 2, v[0], v[0]);
#endif
}

template <bool BACKWARD, bool RISES, bool SCALES>
__device__ __forceinline__ void walk(const Params& p, Thread& t, const Walk& w) {
  const int tiles = (p.width + COLUMNS - 1) / COLUMNS;
  float v[N] = {0.f};
  Edges edges = {0.f, 0.f};
  int phase = BACKWARD ? (p.width - 1) % p.chunk : 0;
  [[maybe_unused]] int until_exchange = S;
  for (int tile = 0; tile < BUFFERS - 1; tile++) {
    if (tile < tiles) fetch<BACKWARD, SCALES>(p, w, t, tile);
    copy_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + BUFFERS - 1 < tiles) fetch<BACKWARD, SCALES>(p, w, t, tile + BUFFERS - 1);
    copy_commit();
    copy_wait<BUFFERS - 1>();
    __syncwarp();
    const int vectors = min(VECTORS, (p.width - left_of(p, w, tile)) / EACH);
#pragma unroll 1
    for (int i = 0; i < vectors; i++) {
      if (SPLIT && until_exchange == 0) exchange_rows<BACKWARD>(p, t, v, edges), until_exchange = S;
      until_exchange -= EACH;
      const int q = RISES ? i : vectors - 1 - i;
      if (BACKWARD ? phase >= EACH : phase > 0 && phase + EACH < p.chunk)
        walk_vector<BACKWARD, RISES, SCALES, false>(p, w, t, tile, q, v[0], edges, phase);
      else
        walk_vector<BACKWARD, RISES, SCALES, true>(p, w, t, tile, q, v[0], edges, phase);
    }
    __syncwarp();
  }
}

template <bool BACKWARD, bool SCALES>
__device__ __forceinline__ void walk(const Params& p, Thread& t, int d) {
  const Walk w = walk_of<BACKWARD>(p, t, d);
  if (w.rising)
    walk<BACKWARD, true, SCALES>(p, t, w);
  else
    walk<BACKWARD, false, SCALES>(p, t, w);
}

// Where this thread is, and which walk it is in.
__device__ __forceinline__ Thread start(const Params& p, int& number) {
  int first = 0;
  while (p.directions[first] < 2) first++;  // columns of all walks are as long
  float* edges = (float*)(shared_memory() + THREADS / 32 * WARP_BYTES);
  Thread t = thread_of(p, scan_of(p, first), threadIdx.x, edges);
  t.mail = edges + 3 * SET;
  number = p.knobs[9 + t.b / p.batch];
  t.b %= p.batch;
  t.alive = t.place < t.end;
  t.own = t.alive && t.place >= t.own_begin && t.place < t.own_end;
  // Beyond the first and the last thread there is nothing, but it is looked at where a line goes on in other
  // blocks.
  for (int i = threadIdx.x; i < 3 * SET; i += THREADS) edges[i] = 0.f;
  start_exchanges(t);
  cluster_meets();
  return t;
}

KERNEL(THREADS, MIN_BLOCKS) planes_tiles_horizontal(CONSTANT_PARAMS p) {
  int number;
  Thread t = start(p, number);
  if (number & 1)
    walk<true, HAS_GATE>(p, t, number / 2);
  else
    walk<false, HAS_LAM>(p, t, number / 2);
}
