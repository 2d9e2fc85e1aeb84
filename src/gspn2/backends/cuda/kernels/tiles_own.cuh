// Tiles of images whose channels have taps of their own (see tiles.cuh): what its kernels share.
//
// A warp has one direction of a vector of four channels: a lane two channels of a place of the line. So a
// tile has twice as many warps as with four channels a lane, for the same shared memory, which weights fill
// here: a warp alone waits for the line before most of the time. Operands are copied into shared memory as
// they lie in memory, neighbouring bytes by neighbouring threads.
//
// More macros:
//   BACKWARD  gradients instead of y
//   FINAL     0 states and adjoints of the tile alone, 1 those from what enters, and the results
//   RESTARTS  0: scans begin at their first line only
#pragma once
#include "lines_taps.cuh"
#include "tiles.cuh"
#include "words.cuh"

constexpr int W = 2;                                 // channels of a lane
constexpr int SCANNERS = SCANS * SUBS * V / W * SIDE;  // threads, of states or of adjoints
constexpr int THREADS = BACKWARD && !FINAL ? 2 * SCANNERS : SCANNERS;
constexpr int PITCH = SIDE + 1;          // of a row of pixels: both axes of a tile use all banks
constexpr int PLANE = SIDE * PITCH + 1;  // of a vector
constexpr int PLANES = SCANS * SUBS * PLANE;
constexpr int LOGITS = 3 * STORED;
static_assert(V == 4, "a vector is two lanes of two channels");
constexpr int OUTSIDE = SCANS * SUBS * SIDE * 2 * 16;  // [SCANS][SUBS][SIDE lines][2 sides] State
constexpr bool GATES = HAS_GATE && (FINAL || BACKWARD);

// Where things are in shared memory, in bytes. Weights give their places to what is added up over the
// directions, float32; lam, gate and logits theirs to their gradients.
//
// What each direction has of its own lies in planes whose rows are the lines of its scan, in their order: a
// line is a constant away from the line before.
constexpr int OUTSIDE_AT = PLANES * 16;  // [SCANS][SUBS][PLANE] Pair before
constexpr int X_AT = OUTSIDE_AT + FINAL * (1 + BACKWARD) * OUTSIDE;  // [SUBS][PLANE] Stored
constexpr int DY_AT = X_AT + SUBS * PLANE * STORED;
constexpr int LAM_AT = DY_AT + BACKWARD * SUBS * PLANE * STORED;  // [SCANS][SUBS][PLANE] Stored
constexpr int GATE_AT = LAM_AT + HAS_LAM * PLANES * STORED;
constexpr int LOGITS_AT = GATE_AT + GATES * PLANES * STORED;  // [SCANS][SUBS][PLANE][V][3]

struct Tile {
  int b, channel;     // the first channel
  int row, column;    // of the tiles
  int height, width;  // pixels that there are

  __device__ __forceinline__ Tile(const Params& p) {
    const int parts = p.channels / CHANNELS, columns = tiles_along(p.width), rows = tiles_along(p.height);
    int index = blockIdx.x;
    channel = index % parts * CHANNELS, index /= parts;
    column = index % columns, index /= columns;
    row = index % rows, b = index / rows;
    height = min(SIDE, p.height - row * SIDE), width = min(SIDE, p.width - column * SIDE);
  }
  // A pixel of a tensor, the tile's first channel.
  __device__ __forceinline__ storage_t* at(const View& v, int row_, int column_) const {
    return v.data + b * v.b + channel * v.c + (row * SIDE + row_) * v.h + (column * SIDE + column_) * v.w;
  }
  __device__ __forceinline__ bool has(int row_, int column_) const {
    return row_ < height && column_ < width;
  }
};

// One direction of a tile. It has SIDE lines, in the order of the scan; what is missing at an image's edge is
// zeros, on which nothing depends.
struct Way {
  Store store;
  int first, begin, end;   // line of the scan; lines of the tile that there are
  int tile, along;         // number of the tile on its line, and on the scan's way
  int places;              // that there are
  int at, line, next;      // pixels of x: the first place of the first line; to the next line, or place

  __device__ __forceinline__ Way(const Params& p, const Tile& t, int d, int sub, bool adjoint)
      : store(p, t.b, d, t.channel / V + sub, adjoint) {
    const Scan& s = store.s;
    const int number = s.vertical ? t.row : t.column, count = s.vertical ? t.height : t.width;
    tile = s.vertical ? t.column : t.row, places = s.vertical ? t.width : t.height;
    first = s.reversed ? s.lines - (number + 1) * SIDE : number * SIDE;
    begin = s.reversed ? SIDE - count : 0, end = begin + count;
    along = (first + store.late) / SIDE;
    line = s.vertical ? PITCH : 1, next = s.vertical ? 1 : PITCH;
    at = s.reversed ? (SIDE - 1) * line : 0;
    line = s.reversed ? -line : line;
  }
  __device__ __forceinline__ bool begins(const Params& p, int i) const {
    return first + i == 0 || (RESTARTS && (first + i) % p.chunk == 0);
  }
};

// Where a pixel lies in the planes of a direction: lines are rows there, in the order of the scan.
struct Turn {
  int at, row, column;

  __device__ __forceinline__ Turn(const Params& p, int d) {
    const Scan s = scan_of(p, d);
    const int line = s.reversed ? -PITCH : PITCH;
    at = s.reversed ? (SIDE - 1) * PITCH : 0;
    row = s.vertical ? line : 1, column = s.vertical ? 1 : line;
  }
  // Of x and dy, which all directions have in common.
  __device__ __forceinline__ Turn() : at(0), row(PITCH), column(1) {}
  __device__ __forceinline__ int operator()(int row_, int column_) const {
    return at + row_ * row + column_ * column;
  }
};

// Who a thread is among those that scan.
struct Lane {
  int d, sub, half, place;
  __device__ __forceinline__ Lane(int thread) {
    place = thread % SIDE, half = thread / SIDE % (V / W);
    sub = thread / 32 % SUBS, d = thread / (32 * SUBS);
  }
  __device__ __forceinline__ int channel(const Tile& tile) const { return tile.channel + sub * V; }
};

__device__ __forceinline__ void load_two(const void* from, float (&e)[W]) {
  const float2 f = *(const float2*)from;
  e[0] = f.x, e[1] = f.y;
}
__device__ __forceinline__ void store_two(void* to, const float (&e)[W]) {
  *(float2*)to = make_float2(e[0], e[1]);
}
__device__ __forceinline__ void widen_two(const void* from, float (&e)[W]) {
  const u32 word = *(const u32*)from;
  e[0] = element(&word, 0), e[1] = element(&word, 1);
}
__device__ __forceinline__ void narrow_two(void* to, const float (&e)[W]) { *(u32*)to = stored(e[0], e[1]); }
__device__ __forceinline__ void weights_of_two(const void* pair, Taps (&w)[W]) {
  const uint2 words = *(const uint2*)pair;
  w[0] = taps_of(words.x), w[1] = taps_of(words.y);
}

__device__ __forceinline__ unsigned char* pair_at(int d, int sub, int pixel) {
  return shared_memory() + ((d * SUBS + sub) * PLANE + pixel) * 16;
}
// x, or dy at DY_AT.
__device__ __forceinline__ unsigned char* image_at(int sub, int pixel, int at = X_AT) {
  return shared_memory() + at + (sub * PLANE + pixel) * STORED;
}
// lam, or gate at GATE_AT.
__device__ __forceinline__ unsigned char* scaled_at(int d, int sub, int pixel, int at = LAM_AT) {
  return shared_memory() + at + ((d * SUBS + sub) * PLANE + pixel) * STORED;
}
__device__ __forceinline__ unsigned char* logits_at(int d, int sub, int pixel) {
  return shared_memory() + LOGITS_AT + ((d * SUBS + sub) * PLANE + pixel) * LOGITS;
}
// Of the states, or of the adjoints: what comes to a line of the tile from beyond its sides.
__device__ __forceinline__ unsigned char* outside_at(int adjoint, int d, int sub, int line, int side) {
  const int index = ((d * SUBS + sub) * SIDE + line) * 2 + side;
  return shared_memory() + OUTSIDE_AT + adjoint * OUTSIDE + index * 16;
}

// Where a vector of a direction is in a pixel of a tensor, and a part of its logits: PER numbers of each.
template <int PER>
__device__ __forceinline__ long long piece_of(const View& v, int piece) {
  return piece / (SUBS * PER) * v.d + piece % (SUBS * PER) * V;
}

// Calls `move(shared, global, is there)` for PIECES vectors of four numbers of every pixel, consecutive
// threads on consecutive ones. PER of them lie beside each other in shared memory, and a plane has them of
// all pixels.
template <int PIECES, int PER, typename Move>
__device__ __forceinline__ void each_piece(const Params& p, const Tile& tile, const View& v, int at,
                                           Move move) {
  // Rounds of all threads that together are whole rows.
  constexpr int ROUNDS = PER, ROWS = ROUNDS * THREADS / (PIECES * SIDE), STRIDE = PER * STORED;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int index = threadIdx.x + round * THREADS, piece = index % PIECES, pixel = index / PIECES;
    const int column = pixel % SIDE, first = pixel / SIDE;
    storage_t* global = tile.at(v, first, column) + piece_of<PER>(v, piece);
    const Turn turn = PIECES > SUBS ? Turn(p, piece / (SUBS * PER)) : Turn();
    unsigned char* shared = shared_memory() + at + (piece / PER * PLANE + turn(first, column)) * STRIDE;
    shared += piece % PER * STORED;
#pragma unroll 4
    for (int row = first; row < SIDE; row += ROWS, global += ROWS * v.h, shared += ROWS * turn.row * STRIDE)
      move((Stored*)shared, (Stored*)global, tile.has(row, column));
  }
}
template <int PIECES, int PER>
__device__ __forceinline__ void copy_pieces(const Params& p, const Tile& tile, const View& v, int at) {
  each_piece<PIECES, PER>(p, tile, v, at, [](Stored* shared, const Stored* global, bool there) {
    copy_async<STORED>(shared, global, there ? STORED : 0);
  });
}
template <int PIECES, int PER>
__device__ __forceinline__ void store_pieces(const Params& p, const Tile& tile, const View& v, int at) {
  if (v.data == nullptr) return;
  each_piece<PIECES, PER>(p, tile, v, at, [](const Stored* shared, Stored* global, bool there) {
    if (there) *global = *shared;
  });
}
__device__ __forceinline__ void copy_operands(const Params& p, const Tile& tile) {
  copy_pieces<SUBS, 1>(p, tile, p.x, X_AT);
  if (BACKWARD) copy_pieces<SUBS, 1>(p, tile, p.dy, DY_AT);
  if (HAS_LAM) copy_pieces<SCANS * SUBS, 1>(p, tile, p.lam, LAM_AT);
  if (GATES) copy_pieces<SCANS * SUBS, 1>(p, tile, p.gate, GATE_AT);
}
