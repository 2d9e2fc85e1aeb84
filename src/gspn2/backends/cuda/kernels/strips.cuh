// One direction, right or left, over large planes, weights as given: warps that scan, and warps that copy for
// them. Lines are columns, memory runs along the scan.
//
// A line is cut into strips, one for each scanning warp of a cluster. A lane holds ROWS neighbouring rows:
// two shuffles serve them all, and within a line none waits for another. A strip has HALO rows of its
// neighbours on either side. What it computes there goes wrong by one row a line, from the outside; every
// HALO lines strips send each other the right states. So no line has a barrier, and a warp waits for data at
// tiles only, which others have brought long before.
//
// Macros beside those of common.cuh:
//   CLUSTER    blocks that share the lines of a plane (1: none)
//   STRIPS     scanning warps of a block, two or more
//   COPIERS    copying warps of a block
//   BLOCKS     of a multiprocessor, at least
//   ROWS       of a lane: odd, so that lanes meet different banks of shared memory
//   PIECE      bytes of a row in a tile, 32 to 128
//   STAGES     tiles in the ring of a block
// Knobs: 0 clusters, which have planes in turn; 1 rows of a strip, its own.
#pragma once
#include "lines_taps.cuh"
#include "words.cuh"

static_assert(!NORMALIZE && !HAS_GATE, "weights as given, no gate");
static_assert(STRIPS > 1, "results have a place of their own, as other warps read a strip's outer rows");

constexpr int SIZE = sizeof(storage_t);
constexpr int VECTOR = 16 / SIZE;             // columns in 16 bytes
constexpr int VECTORS = PIECE / 16;           // of a row in a tile
constexpr int COLUMNS = PIECE / SIZE;         // of a tile
constexpr int TAPS = 3;
constexpr int TENSORS = TAPS + 1 + HAS_LAM;   // taps, x, lam, in this order
constexpr int THREADS = 32 * (STRIPS + COPIERS);

constexpr int HALO = 16;                      // rows of neighbours on either side; lines between exchanges
constexpr int MOST = 32 * ROWS - 2 * HALO;    // rows of a strip, its own, at most
static_assert(ROWS % 2 == 1 && HALO % VECTOR == 0, "see ROWS; exchanges come between vectors");

// A tile: rows of the block, HALO more on either side, of each tensor; then results of the block's own rows.
constexpr int TILE_ROWS = STRIPS * MOST + 2 * HALO;
constexpr int TILE = TILE_ROWS * PIECE;       // bytes of one tensor
constexpr int RESULTS = STRIPS * MOST * PIECE;
constexpr int STAGE = TENSORS * TILE + RESULTS;

// Shared memory: states from neighbours, barriers, then the ring.
constexpr int HALOS = STRIPS * 2 * 2 * HALO;  // floats: [strip][turn][side][row]
constexpr int HALO_BARRIERS = STRIPS * 2 * 2;
constexpr int RING = (4 * HALOS + 8 * (HALO_BARRIERS + 2 * STAGES) + 127) / 128 * 128;

__device__ __forceinline__ float* halos() { return (float*)shared_memory(); }
__device__ __forceinline__ u64* halo_barriers() { return (u64*)(shared_memory() + 4 * HALOS); }
// Of a stage: its tile is there; its tile has been scanned.
__device__ __forceinline__ u64* full_barrier(int stage) { return halo_barriers() + HALO_BARRIERS + stage; }
__device__ __forceinline__ u64* done_barrier(int stage) { return full_barrier(stage) + STAGES; }

// Where vector v of a row is: permuted so that those of 8 lanes, an odd number of rows apart, are in 8
// different groups of banks. place_of(row, v) = place_of(row, 0) ^ 16 v.
__device__ __forceinline__ int place_of(u32 row, u32 v) {
  constexpr u32 ALIKE = VECTORS < 8 ? 8 / VECTORS : 1, MASK = (VECTORS < 8 ? VECTORS : 8) - 1;
  return (int)((row * VECTORS + (v ^ (row / ALIKE & MASK))) * 16);
}
// Where results of row 0 of a tile would be, if that were the block's own. HALO is a multiple of 8: rows are
// permuted as those of operands are.
constexpr int TO_RESULT = TENSORS * TILE - HALO * PIECE;

struct Plane {
  const storage_t* from[TENSORS];  // row 0, column 0 of each tensor
  storage_t* y;
};

__device__ __forceinline__ long long row_step(const Params& p, int i) {
  return i < TAPS ? p.taps.h : i == TAPS ? p.x.h : p.lam.h;
}

__device__ __forceinline__ Plane plane_of(const Params& p, int plane) {
  const long long b = plane / p.channels, c = plane % p.channels, g = c / (p.channels / p.groups);
  Plane it;
#pragma unroll
  for (int k = 0; k < TAPS; ++k) it.from[k] = p.taps.data + b * p.taps.b + g * p.taps.c + k * p.taps.k;
  it.from[TAPS] = p.x.data + b * p.x.b + c * p.x.c;
#if HAS_LAM
  it.from[TAPS + 1] = p.lam.data + b * p.lam.b + c * p.lam.c;
#endif
  it.y = p.y.data + b * p.y.b + c * p.y.c;
  return it;
}

// The rows of a block, counted from the first of a tile: those in the plane; from HALO to own_end, its own.
struct Rows {
  int first_row;    // of the plane: row 0 of a tile, may be negative
  int first, end, own_end;
};

__device__ __forceinline__ Rows rows_of(const Params& p, int own, int rank) {
  const int first_row = rank * STRIPS * own - HALO, left = p.height - first_row;
  const int end = min(STRIPS * own + 2 * HALO, left), own_end = min(STRIPS * own + HALO, left);
  return {first_row, max(0, -first_row), end, own_end};
}

__device__ __forceinline__ bool between(int r, int from, int until) {
  return (u32)(r - from) < (u32)(until - from);
}

// All planes of a cluster: their tiles, one after the other.
struct Tiles {
  int width, each;         // columns; tiles of a plane
  int first, step, count;  // planes: neighbours, which may share taps, are scanned at the same time
  bool reversed;

  __device__ __forceinline__ int all() const { return each * count; }
  __device__ __forceinline__ int plane(int number) const { return first + number * step; }
  __device__ __forceinline__ int column(int tile) const {
    return (reversed ? each - 1 - tile : tile) * COLUMNS;
  }
  __device__ __forceinline__ int vectors(int tile) const {
    return min(VECTORS, (width - column(tile)) / VECTOR);
  }
  // Of tile n: its place in the ring, and which time this is used.
  __device__ __forceinline__ int stage(int n) const { return n % STAGES; }
  __device__ __forceinline__ int turn(int n) const { return n / STAGES; }
};
