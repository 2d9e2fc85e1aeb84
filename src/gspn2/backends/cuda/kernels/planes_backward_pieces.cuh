// Horizontal scans of planes in long pieces of rows, a single walk over the lines: forward to find the states, or back
// from them. A thread has one row, and the blocks of a cluster share the rows of a plane. Warps copy pieces of their
// rows into tiles of their own, and results leave in whole pieces, too: memory is fast only if a row is read in long
// runs.
//
// Macros: those of planes_backward.cuh, with HORIZONTAL 1, PLACES 1 and RAGGED 0. SEGMENT is the number of lines
// between exchanges of blocks; SHARED channels leave their part of the gradient in scratch memory. And
//   FORWARD     1: the walk forward; 0: the walk back
//   OWN_STATES  1: states are float32, in scratch memory; 0: they are `y`, as forward kept them
//   PIECE       bytes of a row in a tile
//   BUFFERS     tiles in a warp's ring
// Knobs are those of planes_backward.cuh, too. Scratch: 3 the states, as planes_backward_memory.cuh has them.
#pragma once
#include "planes_backward_chain.cuh"
#include "planes_backward_chunk.cuh"

constexpr int VECTORS = PIECE / 16, COLUMNS = PIECE / SIZE;
static_assert(HORIZONTAL && N == 1 && S % EACH == 0, "a thread has one row");
static_assert(VECTORS <= 8 && (VECTORS & (VECTORS - 1)) == 0, "pieces of 16 to 128 bytes");
constexpr int UNIT = 32 * PIECE;  // bytes of one operand in a tile
constexpr int USED = FORWARD ? DY : OPERANDS;
// Of the states there are the rows on either side, too; and words of each of these rows, with the column that the
// tile's first line in scan order starts from.
constexpr int AROUND = HIDDENS * 2 * PIECE, ENTERING = USED * UNIT + AROUND;
constexpr int TILE = ENTERING + (HIDDENS * 34 * 4 + 15) / 16 * 16;
constexpr int WARP_BYTES = BUFFERS * TILE;
constexpr bool READS_STATES = HIDDENS > 0 && (WANTS_TAPS || (HAS_GATE && WANTS_GATE));

struct Work {
  unsigned char* ring;           // of this warp
  const unsigned char** planes;  // FORWARD: of operands, in shared memory
  int lines, tiles;
};

// The plane of an operand. The walk back finds it anew for each tile, from numbers that all threads have in common: it
// has neither shared memory nor registers to spare.
__device__ __forceinline__ const unsigned char* plane_at(const Params& p, const Work& w, const Thread& t, int op) {
  return FORWARD ? w.planes[op] : source_of(p, op, t.b, t.group, t.channel);
}

// Tiles are counted in the order of the walk. The first column of one, and how many it has (whole vectors).
__device__ __forceinline__ int left_of(const Work& w, int tile) {
  return (RISING ? tile : w.tiles - 1 - tile) * COLUMNS;
}
__device__ __forceinline__ int columns_of(const Work& w, int tile) { return min(COLUMNS, w.lines - left_of(w, tile)); }

__device__ __forceinline__ unsigned char* tile_at(const Work& w, int tile) { return w.ring + tile % BUFFERS * TILE; }
__device__ __forceinline__ constexpr int unit_at(int op) {
  return op * UNIT + (op < HIDDEN ? 0 : min(op - HIDDEN, HIDDENS) * 2 * PIECE);
}
// Vector v of a row of a unit: permuted so that 8 rows' vectors meet 8 different groups of banks.
__device__ __forceinline__ int vector_at(u32 row, u32 v) {
  constexpr u32 TOGETHER = 8 / VECTORS;
  return (row * VECTORS + (v ^ row / TOGETHER % VECTORS)) * 16;
}

__device__ __forceinline__ constexpr bool is_state(int op) { return op >= HIDDEN && op < SUM; }
__device__ __forceinline__ bool is_fetched(const Params& p, int op) {
  return FORWARD ? op < DY : is_state(op) ? READS_STATES && (OWN_STATES || op == HIDDEN) : is_read(p, op);
}

// From the first element of an operand's plane to that of column `left`, the first of a tile, in row 0.
__device__ __forceinline__ long long before_tile(const Params& p, int op, int left) {
  return (long long)left * (OWN_STATES && is_state(op) ? p.height : 1) * SIZE;
}

// Goes over the vectors of a warp's rows, with consecutive lanes on consecutive ones: body(at, row of the plane,
// vector), where at(n) is where the vector lies in a unit that has n rows before the warp's.
template <typename Body>
__device__ __forceinline__ void for_vectors(const Thread& t, Body body) {
  constexpr u32 ROWS = 32 / VECTORS;  // at a time
  const u32 lane = opaque(t.lane), r = lane / VECTORS, v = lane % VECTORS;
#pragma unroll
  for (u32 k = 0; k < VECTORS; k++) {
    // Up to 4 vectors, the permutation is that of the first rows again.
    const auto at = [&](u32 n) {
      return VECTORS <= 4 ? vector_at(r + n, v) + k * ROWS * PIECE : vector_at(r + n + k * ROWS, v);
    };
    body(at, (int)(t.begin + t.warp * 32 + r + k * ROWS), (int)v);
  }
}

// States `op` of the rows next to the warp's, and the column that lines of the tile start from.
__device__ __forceinline__ void fetch_around(const Params& p, const Work& w, const Thread& t, int tile, int op) {
  unsigned char* to = tile_at(w, tile);
  const unsigned char* from = plane_at(p, w, t, op);
  const int left = left_of(w, tile), pitch = source_pitch(p, op), first = t.begin + t.warp * 32 - 1;
  const auto has_row = [&](int row) { return row >= max(0, t.own_begin - 1) && row < min(t.places, t.own_end + 1); };
  if (t.lane < 2 * VECTORS) {
    const int r = t.lane < VECTORS ? 0 : 33, v = t.lane % VECTORS, row = first + r;
    const bool there = has_row(row) && v * EACH < columns_of(w, tile);
    copy_async_wide(to + unit_at(op) + vector_at(r, v), at_row(from + before_tile(p, op, left), max(row, 0), pitch) + v * 16,
                    there ? 16 : 0);
  }
  const int column = REVERSED ? left + COLUMNS : left - 4 / SIZE, within = OWN_STATES ? column & (COLUMNS - 1) : 0;
  for (int r = t.lane; r < 34; r += 32) {
    const bool there = has_row(first + r) && column >= 0 && column < w.lines;
    copy_async<4>(to + ENTERING + (op - HIDDEN) * 34 * 4 + 4 * r,
                  at_row(from + before_tile(p, op, column - within), max(first + r, 0), pitch) + within * SIZE, there ? 4 : 0);
  }
}

__device__ __forceinline__ void fetch(const Params& p, const Work& w, const Thread& t, int tile) {
  const int left = left_of(w, tile), columns = columns_of(w, tile);
#pragma unroll
  for (int op = 0; op < USED; op++) {
    if (!is_fetched(p, op)) continue;
    // Rows beyond a block's own are scanned along, but their gradients are for the block that owns them. Of their
    // states the next one on either side is looked at.
    const bool scanned = FORWARD || (op >= TAPS && op < HIDDEN);
    const int begin = scanned ? t.begin : is_state(op) ? t.own_begin - 1 : t.own_begin;
    const int end = scanned ? t.end : is_state(op) ? min(t.places, t.own_end + 1) : t.own_end;
    unsigned char* to = tile_at(w, tile) + unit_at(op);
    const unsigned char* from = plane_at(p, w, t, op) + before_tile(p, op, left);
    const int pitch = source_pitch(p, op);
    for_vectors(t, [&](auto at, int row, int v) {
      const bool there = row >= begin && row < end && v * EACH < columns;
      copy_async_wide(to + at(is_state(op)), at_row(from, row, pitch) + v * 16, there ? 16 : 0);
    });
    if (is_state(op)) fetch_around(p, w, t, tile, op);
  }
}

// What is in the place of operand `op` of a tile, to `to`, the first column of the tile in row 0. Not as a stream: the
// other half of a line of the cache follows soon.
__device__ __forceinline__ void write_unit(const Work& w, const Thread& t, int tile, int op, unsigned char* to,
                                           int pitch) {
  const unsigned char* from = tile_at(w, tile) + unit_at(op);
  const int columns = columns_of(w, tile);
  for_vectors(t, [&](auto at, int row, int v) {
    Packed<EACH> packed;
    read_words(packed.words, from + at(0));
    const bool own = row >= t.own_begin && row < t.own_end && v * EACH < columns;
    if (own) write_words(at_row(to, row, pitch) + v * 16, packed.words);
  });
}

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t) {
  Work w;
  w.ring = shared_memory() + t.warp * WARP_BYTES;
  w.planes = (const unsigned char**)after_mail(t);
  for (int op = threadIdx.x; FORWARD && op < USED; op += blockDim.x)
    w.planes[op] = source_of(p, op, t.b, t.group, t.channel);
  w.lines = scan.lines;
  w.tiles = (scan.lines + COLUMNS - 1) / COLUMNS;
  return w;
}

// Calls `body(tile, q)` for the vectors of all tiles in the order of the walk: vector q of a tile; and `done(tile)`
// after those of a tile. `v` is what lines hand on; `exchanged()` follows when blocks have exchanged it.
template <typename Exchanged, typename Body, typename Done>
__device__ __forceinline__ void walk(const Params& p, const Work& w, Thread& t, float (&v)[N], Exchanged exchanged,
                                     Body body, Done done) {
  [[maybe_unused]] int until_exchange = S;
  for (int tile = 0; tile < BUFFERS - 1; tile++) {
    if (tile < w.tiles) fetch(p, w, t, tile);
    copy_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < w.tiles; tile++) {
    if (tile + BUFFERS - 1 < w.tiles) fetch(p, w, t, tile + BUFFERS - 1);
    copy_commit();
    copy_wait<BUFFERS - 1>();
    __syncwarp();
    const int vectors = columns_of(w, tile) / EACH;
#pragma unroll 1
    for (int i = 0; i < vectors; i++) {
#if SPLIT
      if (until_exchange == 0) {
        exchange(p, t, v);
        exchanged();
        until_exchange = S;
      }
      until_exchange -= EACH;
#endif
      body(tile, RISING ? i : vectors - 1 - i);
    }
    __syncwarp();
    done(tile);
    __syncwarp();
  }
}

// Where this thread is and what it works on. Afterwards all blocks of the cluster are there, with their barriers.
__device__ __forceinline__ Work start(const Params& p, Thread& t) {
  const Scan scan = scan_of(p, p.knobs[0]);
  const int warps = warps_of_line();
  float* edges = (float*)(shared_memory() + warps * WARP_BYTES);
  t = thread_of(p, scan, threadIdx.x, edges);
  // Beyond the first and the last thread there is nothing, but it is looked at where a line goes on in other blocks.
  for (int i = threadIdx.x; i < 4 * (warps + 2); i += blockDim.x) edges[i] = 0.f;
  start_exchanges(t);
#if CHAIN
  start_chain(t);
#endif
  const Work w = work_of(p, scan, t);
  cluster_meets();
  return w;
}
