// A block of a tile: which pixels it has, where they lie in shared memory, and how they come there.
//
// A thread scans one place of a line, a vector of channels, one direction: a direction's places lie in the
// lanes of a warp, and neighbours meet by shuffle. Operands are copied into shared memory as they lie in
// memory, neighbouring bytes by neighbouring threads.
//
// More macros:
//   BACKWARD  gradients instead of y
//   FINAL     0 states and adjoints of the tile alone, 1 those from what enters, and the results
//   RESTARTS  0: scans begin at their first line only
#pragma once
#include "lines_taps.cuh"
#include "tiles.cuh"

constexpr int THREADS = SCANS * SUBS * SIDE;
constexpr int PITCH = SIDE + 1;         // of a row of pixels: both axes of a tile use all banks
// Of a vector. Where slots have 8 bytes, those of four directions at four pixels fill all banks.
constexpr int PLANE = SIDE * PITCH + (V == 4 ? 1 : 4);
// lam and gate of a pixel, and what takes their place: in forward the gated state, in backward their
// gradients.
constexpr int SLOT = FINAL || BACKWARD ? 2 * STORED : STORED;
constexpr bool SLOTS = HAS_LAM || (BACKWARD && HAS_GATE) || (FINAL && !BACKWARD);
constexpr bool STATES = BACKWARD && FINAL;  // states, and what takes their place: parts of dx
// Warps of a direction, each with its sums of the taps' gradients; two directions may share one.
constexpr int PARTS = (SUBS * SIDE + 31) / 32;

// Where things are in shared memory, in bytes.
constexpr int PLANES = SCANS * SUBS * PLANE;
constexpr int STATES_AT = SLOTS * (PLANES * SLOT + 15) / 16 * 16;  // slots before: [SCANS][SUBS][PLANE]
constexpr int OUTSIDE_AT = STATES_AT + STATES * PLANES * STATE;       // [SCANS][SUBS][PLANE] State
constexpr int OUTSIDE = SCANS * SUBS * SIDE * 2 * STATE;           // [SCANS][SUBS][SIDE lines][2 sides] State
constexpr int PAIRS_AT = OUTSIDE_AT + FINAL * (1 + BACKWARD) * OUTSIDE;
constexpr int SUMS_AT = PAIRS_AT + SCANS * SIDE * SIDE * (int)sizeof(Pair);  // [SCANS][lines][places]
// [PARTS][3 taps][SCANS][lines][places]
constexpr int X_AT = SUMS_AT + STATES * PARTS * 3 * SCANS * SIDE * SIDE * 4;
constexpr int DY_AT = X_AT + SUBS * PLANE * STORED;  // [SUBS][PLANE], and the same of dy

struct Tile {
  int b, group, channel;    // the first channel
  int row, column;          // of the tiles
  int height, width;        // pixels that there are
  bool keeps_weights;       // of a group the first

  // A block goes through `span` channels, CHANNELS at a time.
  __device__ __forceinline__ Tile(const Params& p, int span) {
    const int per_group = p.channels / p.groups;
    const int parts = p.channels / span, columns = tiles_along(p.width), rows = tiles_along(p.height);
    int index = blockIdx.x;
    channel = index % parts * span, index /= parts;
    column = index % columns, index /= columns;
    row = index % rows, b = index / rows;
    group = channel / per_group, keeps_weights = channel % per_group == 0;
    height = min(SIDE, p.height - row * SIDE), width = min(SIDE, p.width - column * SIDE);
  }
  // A pixel of a tensor, the tile's first channel.
  __device__ __forceinline__ storage_t* at(const View& v, int row_, int column_) const {
    return v.data + b * v.b + channel * v.c + (row * SIDE + row_) * v.h + (column * SIDE + column_) * v.w;
  }
  // The taps of the tile's group, of its first row.
  __device__ __forceinline__ storage_t* taps_at(const View& v, int d, int column_) const {
    return v.data + b * v.b + d * v.d + group * v.c + row * SIDE * v.h + (column * SIDE + column_) * v.w;
  }
};

// One direction of a tile.
struct Lines {
  int first, count;        // line of the scan, and how many
  int place, places, tile;  // of the line: the tile's first, how many, tile of places
  int at, line, next;      // pixels of shared memory: the first place of the first line; a line, a place

  __device__ __forceinline__ Lines(const Tile& tile_, const Scan& s) {
    const int along = s.vertical ? tile_.row : tile_.column;
    tile = s.vertical ? tile_.column : tile_.row;
    count = s.vertical ? tile_.height : tile_.width, places = s.vertical ? tile_.width : tile_.height;
    place = tile * SIDE;
    first = s.reversed ? s.lines - along * SIDE - count : along * SIDE;
    line = s.vertical ? PITCH : 1, next = s.vertical ? 1 : PITCH;
    at = s.reversed ? (count - 1) * line : 0;
    line = s.reversed ? -line : line;
  }
};

// Is a lane's place beside another tile, at its first side (0) or its second? Else -1.
__device__ __forceinline__ int side_of(const Lines& lines, int lane, int tiles) {
  return lane == 0 && lines.tile > 0 ? 0 : lane == SIDE - 1 && lines.tile + 1 < tiles ? 1 : -1;
}

__device__ __forceinline__ Taps load_taps(const storage_t* from, long long next) {
  return {widen(__ldg(from)), widen(__ldg(from + next)), widen(__ldg(from + 2 * next))};
}

__device__ __forceinline__ unsigned char* slot(int d, int sub, int pixel) {
  return shared_memory() + ((d * SUBS + sub) * PLANE + pixel) * SLOT;
}
// x, or dy at DY_AT.
__device__ __forceinline__ Stored* x_at(int sub, int pixel, int at = X_AT) {
  return (Stored*)(shared_memory() + at) + sub * PLANE + pixel;
}
__device__ __forceinline__ Pair* pair_at(int d, int line, int place) {
  return (Pair*)(shared_memory() + PAIRS_AT) + (d * SIDE + line) * SIDE + place;
}
// Of the states, or of the adjoints: what comes to a line of the tile from beyond its sides.
__device__ __forceinline__ State* outside_at(int adjoint, int d, int sub, int line, int side) {
  const int index = ((d * SUBS + sub) * SIDE + line) * 2 + side;
  return (State*)(shared_memory() + OUTSIDE_AT + adjoint * OUTSIDE) + index;
}
__device__ __forceinline__ State* state_at(int d, int sub, int pixel) {
  return (State*)(shared_memory() + STATES_AT) + (d * SUBS + sub) * PLANE + pixel;
}
// The sum of a warp's products of adjoints and states.
__device__ __forceinline__ float* sum_at(int part, int tap, int d, int line, int place) {
  return (float*)(shared_memory() + SUMS_AT) + (((part * 3 + tap) * SCANS + d) * SIDE + line) * SIDE + place;
}

// lam or gate: consecutive threads take a pixel's vectors of all directions, a row of pixels at a time.
// WHOLE: no pixel of the tile is missing, which saves most instructions.
template <bool WHOLE>
__device__ __forceinline__ void copy_scaled(const Tile& tile, const View& v, int offset) {
  const int piece = threadIdx.x % (SCANS * SUBS), column = threadIdx.x / (SCANS * SUBS);
  const int d = piece / SUBS, sub = piece % SUBS;
  const storage_t* from = tile.at(v, 0, column) + d * v.d + sub * V;
  unsigned char* to = slot(d, sub, column) + offset;
#pragma unroll 8
  for (int row = 0; row < SIDE; row++, from += v.h) {
    const bool there = WHOLE || (row < tile.height && column < tile.width);
    copy_async<STORED>(to + row * PITCH * SLOT, from, there ? STORED : 0);
  }
}

// Both together: in one record they are neighbours, and fewer requests ask for them.
template <bool WHOLE>
__device__ __forceinline__ void copy_both(const Tile& tile, const View& lam, const View& gate) {
  constexpr int PIECES = 2 * SCANS * SUBS, HALF = SIDE / 2;
  const int piece = threadIdx.x % PIECES, column = threadIdx.x / PIECES;
  const bool second = piece >= SCANS * SUBS;
  const int d = piece / SUBS % SCANS, sub = piece % SUBS;
  const storage_t* from = second ? tile.at(gate, 0, column) : tile.at(lam, 0, column);
  from += d * (second ? gate.d : lam.d) + sub * V;
  const long long row_step = second ? gate.h : lam.h, half_step = HALF * (second ? gate.w : lam.w);
  unsigned char* to = slot(d, sub, column) + (second ? STORED : 0);
#pragma unroll 4
  for (int row = 0; row < SIDE; row++, from += row_step)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bool there = WHOLE || (row < tile.height && column + half * HALF < tile.width);
      unsigned char* at = to + (row * PITCH + half * HALF) * SLOT;
      copy_async<STORED>(at, from + half * half_step, there ? STORED : 0);
    }
}

// x, or dy.
template <bool WHOLE>
__device__ __forceinline__ void copy_image(const Tile& tile, const View& v, int at) {
  const int sub = threadIdx.x % SUBS, column = threadIdx.x / SUBS % SIDE, first = threadIdx.x / (SUBS * SIDE);
  const storage_t* from = tile.at(v, first, column) + sub * V;
  Stored* to = x_at(sub, first * PITCH + column, at);
#pragma unroll
  for (int i = 0; i < SIDE; i += SCANS, from += SCANS * v.h) {
    const bool there = WHOLE || (first + i < tile.height && column < tile.width);
    if (SIDE % SCANS == 0 || first + i < SIDE) copy_async<STORED>(to + i * PITCH, from, there ? STORED : 0);
  }
}

template <bool WHOLE>
__device__ __forceinline__ void copy_operands(const Params& p, const Tile& tile) {
  copy_image<WHOLE>(tile, p.x, X_AT);
  if (BACKWARD) copy_image<WHOLE>(tile, p.dy, DY_AT);
  constexpr bool GATES = HAS_GATE && (FINAL || BACKWARD);
  if (HAS_LAM && GATES)
    copy_both<WHOLE>(tile, p.lam, p.gate);
  else if (HAS_LAM)
    copy_scaled<WHOLE>(tile, p.lam, 0);
  else if (GATES)
    copy_scaled<WHOLE>(tile, p.gate, STORED);
}
__device__ __forceinline__ void copy_operands(const Params& p, const Tile& tile) {
  if (tile.height == SIDE && tile.width == SIDE)
    copy_operands<true>(p, tile);
  else
    copy_operands<false>(p, tile);
}

#if !FINAL
// As tap_weights; a missing neighbour counts as good as nothing.
__device__ __forceinline__ Taps weights(const Taps& a, bool has_before, bool has_after) {
#if STORAGE == 0
  return tap_weights(a, has_before, has_after);
#else
  const float missing = __int_as_float(0xff800000);
  return weights_of<false>({has_before ? a.before : missing, a.here, has_after ? a.after : missing});
#endif
}
#endif

#if FINAL
// The weights of a tile.
__device__ __forceinline__ void copy_weights(const Params& p, const Tile& tile) {
  const int d = threadIdx.x / (SUBS * SIDE), sub = threadIdx.x / SIDE % SUBS, lane = threadIdx.x % SIDE;
  const Store store(p, tile.b, d, tile.group, false);
  const Lines lines(tile, store.s);
#pragma unroll 4
  for (int line = sub; line < SIDE; line += SUBS) {
    const bool there = line < lines.count && lane < lines.places;
    copy_async<(int)sizeof(Pair)>(pair_at(d, line, lane), store.pair(lines.first + line, lines.place + lane),
                                  there ? (int)sizeof(Pair) : 0);
  }
}

// What lies beyond the sides of a tile: the states of the line before each line, or what neighbours hand
// back from it.
__device__ __forceinline__ void copy_outside(const Params& p, const Tile& tile, bool adjoint) {
  const int d = threadIdx.x / (SUBS * SIDE), sub = threadIdx.x / SIDE % SUBS, lane = threadIdx.x % SIDE;
  const Store store(p, tile.b, d, tile.group, adjoint);
  const Lines lines(tile, store.s);
  const int line = lines.first + lane - (adjoint ? 0 : 1), channel = tile.channel + sub * V;
  const bool known = lane < lines.count && line >= 0;
  copy_async<STATE>(outside_at(adjoint, d, sub, lane, 0), store.side(line, lines.tile - 1, 1, channel),
                 known && lines.tile > 0 ? STATE : 0);
  copy_async<STATE>(outside_at(adjoint, d, sub, lane, 1), store.side(line, lines.tile + 1, 0, channel),
                 known && lines.tile + 1 < store.tiles ? STATE : 0);
}
#else
// Logits to weights, in the order of each direction's lines and places. Where a scan begins again they are
// (0, 1, 0), whatever the logits; of pixels that are none, too.
__device__ __forceinline__ void make_weights(const Params& p, const Tile& tile) {
  const int d = threadIdx.x % SCANS, column = threadIdx.x / SCANS % SIDE;
  const storage_t* from = tile.taps_at(p.taps, d, min(column, tile.width - 1));
  const Scan s = scan_of(p, d);
  const Lines lines(tile, s);
  constexpr int AT_ONCE = 4;
#pragma unroll 1
  for (int first = threadIdx.x / (SCANS * SIDE); first < SIDE; first += AT_ONCE * SUBS) {
    Taps a[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      a[i] = load_taps(from + min(first + i * SUBS, tile.height - 1) * p.taps.h, p.taps.k);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int row = first + i * SUBS;
      const int along = s.vertical ? row : column, place = s.vertical ? column : row;
      const int line = s.reversed ? lines.count - 1 - along : along, j = lines.place + place;
      const bool there = row < tile.height && column < tile.width;
      const bool restart = lines.first + line == 0 || (RESTARTS && (lines.first + line) % p.chunk == 0);
      Pair pair = pair_of(weights(a[i], j > 0, j + 1 < s.places));
      if (!there || restart) pair = pair_of({0.f, 0.f, 0.f});
      if (row < SIDE && along < lines.count) *pair_at(d, line, place) = pair;
    }
  }
}
#endif
