// What enters tiles in horizontal scans: states forward (right, left), and what columns hand back to those
// before. See planes_tiles.cuh.
//
// A thread has one row of CHANNELS neighbouring channels that have the same taps: weights, half of what one
// channel asks the second-level cache for, are read and widened once for them, and they meet at the same
// barrier. The blocks of a cluster share the rows, and each scans HALO rows beyond its own along: what it
// computes there goes wrong by one row a column from the outside, and is put right every HALO columns by the
// block that owns it. Warps copy long pieces of their rows into tiles of their own: memory is fast only so.
//
// Macros beside those of common.cuh:
//   THREADS     threads of a block;  MIN_BLOCKS blocks on a multiprocessor
//   CHANNELS    channels of a walk: 1 or 2
//   SPLIT       1: more than one block in a cluster
// Knobs: 0 elements of a row of weights, 1 blocks of a cluster, 2 rows that each of them owns, 3 to 10 the
// walks: twice the index of the scan, and one more on the way back. A walk's planes come one after another in
// the grid, then the next walk's.
#include "planes_tiles_words.cuh"

// A number of each channel.
struct alignas(4 * CHANNELS) Values {
  float v[CHANNELS];
};

// Operands: x or dy of each channel, lam or gate of each, weights before and after.
constexpr int INPUT = 0, SCALE = CHANNELS, BEFORE = (HAS_LAM || HAS_GATE ? 2 : 1) * CHANNELS,
              AFTER = BEFORE + 1, OPERANDS = AFTER + 1;

constexpr int HALO = SPLIT ? 16 : 0, COLUMNS_OF_EXCHANGE = 16;
constexpr int PIECE = 64, VECTORS = PIECE / 16, COLUMNS = PIECE / 2;  // bytes of a row in a tile
constexpr int UNIT = 32 * PIECE;                                      // bytes of one operand in a tile
constexpr int WARP_BYTES = OPERANDS * UNIT;
constexpr int EDGES = 2 * (THREADS / 32 + 2);  // of a column: [warps + 2][first, last]

// Where a thread is.
struct Thread {
  int lane, warp, strip;     // `strip`: which of the cluster's blocks
  int row;                   // its own;
  int begin, end;            // rows that the block holds,
  int own_begin, own_end;    // and those it answers for
  bool alive, own;           // is the thread's among them
  bool has_before, has_after;  // blocks of the cluster
  Values *edges, *mail;      // [3][EDGES]; [2][before, after][HALO]
  u64* barriers;             // [2][before, after]
  int exchanges;
};

// Which walk over which planes a cluster has.
struct Task {
  int d, b, channel, group;  // first channel
  bool back;
};
__device__ __forceinline__ Task task_of(const Params& p, int index, const int* walks) {
  const int planes = p.batch * p.channels / CHANNELS, number = index / planes;
  Task t;
  t.d = walks[number] / 2, t.back = walks[number] & 1;
  const int plane = (index - number * planes) * CHANNELS;
  t.b = plane / p.channels, t.channel = plane - t.b * p.channels;
  t.group = t.channel / (p.channels / p.groups);
  return t;
}

// One walk over the planes of CHANNELS channels.
struct Walk {
  const unsigned char *input, *scale, *before;    // first row; weights after are a plane further
  long long input_step, scale_step, border_step;  // to the next channel: bytes, and numbers of borders
  unsigned char* tile;                            // of this warp
  tiles::Borders to;
  bool rising, first, last;  // columns first to last; the thread's row is the first, the last of a tile
};

template <bool BACK>
__device__ __forceinline__ Walk walk_of(const Params& p, const Thread& t, const Task& task) {
  const View &input = BACK ? p.dy : p.x, &scale = BACK ? p.gate : p.lam;
  const int d = task.d, b = task.b, channel = task.channel;
  Walk w;
  w.input = w.scale = (const unsigned char*)(input.data + (b * input.b + channel * input.c));
  if (BACK ? HAS_GATE : HAS_LAM)
    w.scale = (const unsigned char*)(scale.data + (b * scale.b + d * scale.d + channel * scale.c));
  w.input_step = input.c * 2, w.scale_step = scale.c * 2;
  w.before = (const unsigned char*)tiles::weights_of(p, d, b, task.group, p.knobs[0]);
  w.tile = shared_memory() + t.warp * WARP_BYTES;
  w.to = tiles::borders_of(p, d, BACK, b, channel);
  w.border_step = tiles::plane_of_borders(p);
  w.rising = (p.directions[d] == 2) != BACK;
  w.first = t.row % tiles::SIDE == 0, w.last = t.row % tiles::SIDE == tiles::SIDE - 1;
  return w;
}

// Vector v of a row of a unit: permuted so that 8 rows' vectors meet 8 different groups of banks.
__device__ __forceinline__ int vector_at(u32 row, u32 v) {
  constexpr u32 TOGETHER = 8 / VECTORS;
  return (row * VECTORS + (v ^ row / TOGETHER % VECTORS)) * 16;
}
// The first column of a tile, counted in the order of the walk.
__device__ __forceinline__ int left_of(const Params& p, const Walk& w, int tile) {
  return (w.rising ? tile : (p.width + COLUMNS - 1) / COLUMNS - 1 - tile) * COLUMNS;
}

// Consecutive lanes copy consecutive vectors.
template <bool BACK, bool SCALES>
__device__ __forceinline__ void fetch(const Params& p, const Walk& w, const Thread& t, int tile) {
  constexpr int ROWS = 32 / VECTORS;  // at a time
  const int left = left_of(p, w, tile), r = t.lane / VECTORS, v = t.lane % VECTORS;
  const bool column = left + v * EACH < p.width;
  const auto fetch_operand = [&](int op, const unsigned char* from, int pitch) {
    from += (long long)left * 2 + v * 16;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
      const int row = t.begin + t.warp * 32 + r + k * ROWS;
      const bool there = column && row < t.end;
      copy_async_wide(w.tile + op * UNIT + vector_at(r + k * ROWS, v),
                      from + (u64)((there ? row : 0) * 2u) * (u32)pitch, there ? 16 : 0);
    }
  };
#pragma unroll
  for (int c = 0; c < CHANNELS; c++) {
    fetch_operand(INPUT + c, w.input + c * w.input_step, (int)(BACK ? p.dy.h : p.x.h));
    if (SCALES) fetch_operand(SCALE + c, w.scale + c * w.scale_step, (int)(BACK ? p.gate.h : p.lam.h));
  }
  fetch_operand(BEFORE, w.before, p.knobs[0]);
  fetch_operand(AFTER, w.before + 2ll * p.height * p.knobs[0], p.knobs[0]);
  copy_commit();
}

// `v` of the rows beyond a block's own, from the blocks that own them. Each value comes with its share of a
// count that the receiver waits for. Two sets take turns, so that nobody needs to say that it has read.
__device__ __forceinline__ void exchange(Thread& t, Values& v) {
  const u32 parity = t.exchanges >> 1 & 1;
  Values* mail = t.mail + (t.exchanges & 1) * 2 * HALO;
  u64* barriers = t.barriers + (t.exchanges & 1) * 2;
  t.exchanges++;
  if (threadIdx.x == 0) {
    if (t.has_before) mbarrier_arrive_expect(barriers, sizeof(Values) * HALO);
    if (t.has_after) mbarrier_arrive_expect(barriers + 1, sizeof(Values) * (t.end - t.own_end));
  }
  const int after_begin = t.row - t.own_begin, before_end = t.own_end - t.row;
  if (t.own && t.has_before && after_begin < HALO)
    store_counted<CHANNELS>(mail + HALO + after_begin, barriers + 1, cluster_rank() - 1, v.v);
  if (t.own && t.has_after && before_end <= HALO)
    store_counted<CHANNELS>(mail + HALO - before_end, barriers, cluster_rank() + 1, v.v);
  if (t.alive && !t.own) {
    const bool before = t.row < t.own_begin;
    mbarrier_wait(barriers + !before, parity);
    v = mail[before ? t.row - t.begin : HALO + t.row - t.own_end];
  }
  __syncwarp();
}

// What comes from the threads on either side.
struct Sides {
  Values before, after;
};

// Of all threads of the block: `first` goes to the thread before, `last` to the one after. `edges` are those
// of this column; who uses them again is a barrier further. Where there is nobody,
// lanes of a warp get what means nothing, and ends of the block what edges hold: zeros.
__device__ __forceinline__ Sides meet(Values* edges, const Values& first, const Values& last) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sides sides;
#pragma unroll
  for (int c = 0; c < CHANNELS; c++) {
    sides.before.v[c] = __shfl_up_sync(~0u, last.v[c], 1);
    sides.after.v[c] = __shfl_down_sync(~0u, first.v[c], 1);
  }
  if (THREADS > 32) {
    Values* mine = edges + 2 * warp;
    if (lane == 0) mine[2] = first;
    if (lane == 31) mine[3] = last;
    __syncthreads();
    if (lane == 0) sides.before = mine[1];
    if (lane == 31) sides.after = mine[4];
  } else {
    if (lane == 0) sides.before = {};
    if (lane == 31) sides.after = {};
  }
  return sides;
}
// One column. `v` is what columns hand on: states, or on the way back sums; `sides` is what comes of it from
// the rows on either side. Two sets of edges take turns from column to column, and a third is for the
// exchange between blocks, so that there is one barrier a column. Beyond the image there are zeros: there,
// and from there, all weights are 0.
template <bool BACK>
__device__ __forceinline__ void walk_column(const Thread& t, int set, const Values& u, float before,
                                            float after, bool restart, Values& v, Sides& sides) {
  const float here = 1.f - before - after;
  if constexpr (BACK) {
    Values g, first, last;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      g.v[c] = u.v[c] + v.v[c];
      first.v[c] = restart ? 0.f : before * g.v[c], last.v[c] = restart ? 0.f : after * g.v[c];
    }
    sides = meet(t.edges + set * EDGES, first, last);
#pragma unroll
    for (int c = 0; c < CHANNELS; c++)
      v.v[c] = restart ? 0.f : fmaf(here, g.v[c], sides.before.v[c] + sides.after.v[c]);
  } else {
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      float next = fmaf(here, v.v[c], u.v[c]);
      next = fmaf(before, sides.before.v[c], fmaf(after, sides.after.v[c], next));
      v.v[c] = restart ? u.v[c] : next;
    }
    sides = meet(t.edges + set * EDGES, v, v);
  }
}

// After the columns of a vector, the first of which in the image is `left`.
__device__ __forceinline__ void write_line(const Params& p, const Walk& w, const Thread& t, int left,
                                           const Values& v) {
  const int segment = tiles::entered_after(w.rising ? left + EACH - 1 : left, p.width, w.rising);
  if (t.own && segment >= 0)
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) w.to.line(segment, t.row)[c * w.border_step] = v.v[c];
}
// What has come in beside the tile at four columns.
__device__ __forceinline__ void write_sides(const Walk& w, const Thread& t, int left,
                                            const float (&side)[CHANNELS][4]) {
  if (!t.own || (!w.first && !w.last)) return;
#pragma unroll
  for (int c = 0; c < CHANNELS; c++) {
    float* at = w.to.side(t.row / tiles::SIDE, w.last, left, 4) + c * w.border_step;
    *(float4*)at = make_float4(side[c][0], side[c][1], side[c][2], side[c][3]);
  }
}

// Lines since the last restart, one line on in the order of the walk.
template <bool BACK>
__device__ __forceinline__ int next_phase(const Params& p, int phase) {
  return BACK ? (phase == 0 ? p.chunk : phase) - 1 : phase + 1 == p.chunk ? 0 : phase + 1;
}

// The columns of one vector. `phase`: lines from the last restart to the first column here.
template <bool BACK, bool RISES, bool SCALES, bool RESTARTS>
__device__ __forceinline__ void walk_vector(const Params& p, const Walk& w, const Thread& t, int left, int q,
                                            Values& v, Sides& sides, int& phase) {
  const unsigned char* vector = w.tile + vector_at(t.lane, q);
  Eight operand[OPERANDS];
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (op < SCALE || op >= BEFORE || SCALES) operand[op].read(vector + op * UNIT);
  float side[CHANNELS][4];
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    const int e = RISES ? k : EACH - 1 - k;
    Values u;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      u.v[c] = SCALES ? operand[INPUT + c][e] * operand[SCALE + c][e] : operand[INPUT + c][e];
      side[c][BACK ? 3 - k % 4 : k % 4] = w.first ? sides.before.v[c] : sides.after.v[c];
    }
    walk_column<BACK>(t, k % 2, u, operand[BEFORE].weight(e), operand[AFTER].weight(e),
                      RESTARTS && phase == 0, v, sides);
    if (RESTARTS) phase = next_phase<BACK>(p, phase);
    if (k % 4 == 3) write_sides(w, t, left + q * EACH + (RISES ? k - 3 : EACH - 1 - k), side);
  }
  if (!RESTARTS) phase += BACK ? -EACH : EACH;
  write_line(p, w, t, left + q * EACH, v);
}

template <bool BACK, bool RISES, bool SCALES>
__device__ __forceinline__ void walk(const Params& p, Thread& t, const Walk& w) {
  const int tiles = (p.width + COLUMNS - 1) / COLUMNS;
  Values v = {};
  Sides sides = {};
  int phase = BACK ? (p.width - 1) % p.chunk : 0;
  [[maybe_unused]] int until_exchange = COLUMNS_OF_EXCHANGE;
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    fetch<BACK, SCALES>(p, w, t, tile);
    copy_wait<0>();
    __syncwarp();
    const int left = left_of(p, w, tile), vectors = min(VECTORS, (p.width - left) / EACH);
#pragma unroll 1
    for (int i = 0; i < vectors; i++) {
      if (SPLIT && until_exchange == 0) {
        exchange(t, v), until_exchange = COLUMNS_OF_EXCHANGE;
        // On the way back what comes from the sides is in the sums already.
        if (!BACK) sides = meet(t.edges + 2 * EDGES, v, v);
      }
      until_exchange -= EACH;
      const int q = RISES ? i : vectors - 1 - i;
      if (BACK ? phase >= EACH : phase > 0 && phase + EACH < p.chunk)
        walk_vector<BACK, RISES, SCALES, false>(p, w, t, left, q, v, sides, phase);
      else
        walk_vector<BACK, RISES, SCALES, true>(p, w, t, left, q, v, sides, phase);
    }
    __syncwarp();
  }
}

template <bool BACK, bool SCALES>
__device__ __forceinline__ void walk(const Params& p, Thread& t, const Task& task) {
  const Walk w = walk_of<BACK>(p, t, task);
  if (w.rising)
    walk<BACK, true, SCALES>(p, t, w);
  else
    walk<BACK, false, SCALES>(p, t, w);
}

__device__ __forceinline__ Thread thread_of(const Params& p) {
  const int strips = p.knobs[1], own = p.knobs[2];
  Thread t;
  t.lane = threadIdx.x % 32, t.warp = threadIdx.x / 32, t.strip = blockIdx.x % strips;
  t.own_begin = t.strip * own, t.own_end = min(p.height, t.own_begin + own);
  t.begin = max(0, t.own_begin - HALO), t.end = min(p.height, t.own_end + HALO);
  t.row = t.begin + threadIdx.x;
  t.alive = t.row < t.end, t.own = t.row >= t.own_begin && t.row < t.own_end;
  t.has_before = t.strip > 0, t.has_after = t.strip + 1 < strips;
  t.edges = (Values*)(shared_memory() + THREADS / 32 * WARP_BYTES);
  t.mail = t.edges + 3 * EDGES;
  t.barriers = (u64*)(t.mail + 4 * HALO);
  t.exchanges = 0;
  return t;
}

// Beyond the first and the last thread there is nothing, but it is looked at where a line goes on in other
// blocks.
__device__ __forceinline__ void start(const Thread& t) {
  for (int i = threadIdx.x; i < 3 * EDGES; i += THREADS) t.edges[i] = {};
#if SPLIT
  if (threadIdx.x < 4) mbarrier_init(t.barriers + threadIdx.x, 1);
  mbarrier_init_fence();
  cluster_barrier();
#else
  __syncthreads();
#endif
}

KERNEL(THREADS, MIN_BLOCKS) planes_tiles_horizontal(CONSTANT_PARAMS p) {
  Thread t = thread_of(p);
  start(t);
  const Task task = task_of(p, blockIdx.x / p.knobs[1], p.knobs + 3);
  if (BACKWARD && task.back)
    walk<true, HAS_GATE>(p, t, task);
  else
    walk<false, HAS_LAM>(p, t, task);
}
