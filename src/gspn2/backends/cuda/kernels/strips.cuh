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
//   STAGES     tiles in the ring of a block
//   CUT        1 if the last planes are cut (see strips_runs.cuh)
// Knobs: 0 clusters, which have planes in turn; 1 rows of a strip, its own; 2 planes that are cut. Scratch, if
// there are any: 0 states at cuts; 1 flags, all 0 before the launch.
#pragma once
#include "strips_common.cuh"

static_assert(STRIPS > 1, "results have a place of their own, as other warps read a strip's outer rows");

constexpr int ROWS = 3;                        // of a lane: odd, so that lanes meet different banks
constexpr int PIECE = 64;                      // bytes of a row in a tile
constexpr int VECTORS = PIECE / 16;            // of a row in a tile
constexpr int COLUMNS = PIECE / SIZE;          // of a tile

constexpr int HALO = 16;                       // rows of neighbours on either side; lines between exchanges
constexpr int HELD = 32 * ROWS;                // rows that a strip holds
constexpr int MOST = HELD - 2 * HALO;          // rows of a strip, its own, at most
static_assert(HALO % (2 * VECTOR) == 0, "exchanges come between pairs of vectors");
static_assert(VECTORS % 2 == 0, "so that pairs of vectors do not cross tiles");

// A tile: rows of the block, HALO more on either side, of each tensor; then results of the block's own rows.
constexpr int TILE_ROWS = STRIPS * MOST + 2 * HALO;
constexpr int TILE = TILE_ROWS * PIECE;        // bytes of one tensor
constexpr int RESULTS = STRIPS * MOST * PIECE;
constexpr int STAGE = TENSORS * TILE + RESULTS;

// States that strips show each other: [slot][turn][row]. There is a slot for each strip of the block, and one
// before and one after these that stand for neighbours in other blocks, which send theirs. A barrier for each
// slot and turn.
constexpr int SLOTS = STRIPS + 2;
typedef Head<SLOTS * 2 * HELD, SLOTS * 2> Shared;

__device__ __forceinline__ float* states_of(int slot, int turn) {
  return Shared::states() + (slot * 2 + turn) * HELD;
}
__device__ __forceinline__ u64* state_barrier(int slot, int turn) {
  return Shared::state_barriers() + slot * 2 + turn;
}

// Where vector v of a row is: permuted so that those of 8 lanes, an odd number of rows apart, are in 8
// different groups of banks. place_of(row, v) = place_of(row, 0) ^ 16 v.
__device__ __forceinline__ int place_of(u32 row, u32 v) {
  constexpr u32 ALIKE = 8 / VECTORS, MASK = VECTORS - 1;
  return (int)((row * VECTORS + (v ^ (row / ALIKE & MASK))) * 16);
}
// Where results of row 0 of a tile would be, if that were the block's own. HALO is a multiple of 8: rows are
// permuted as those of operands are.
constexpr int TO_RESULT = TENSORS * TILE - HALO * PIECE;

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

// Of tile n of a cluster: its place in the ring, and which time this is used.
__device__ __forceinline__ int stage_of(int n) { return n % STAGES; }
__device__ __forceinline__ int turn_of(int n) { return n / STAGES; }
