// The warps that copy: operands into the ring, results out of it. They wait only for warps that scan.
#pragma once
#include "strips_runs.cuh"

struct Copier {
  // Lanes go over the vectors of rows, so that a row's piece is one request.
  static constexpr int STEP = COPIERS * 32 / VECTORS;  // rows from one of a lane's to its next
  static constexpr int ROUNDS = (TILE_ROWS + STEP - 1) / STEP;
  static_assert(STEP % 8 == 0, "vectors of all rows of a lane are permuted alike");

  const Params& p;
  const Rows& rows;
  unsigned char* ring;
  int lane_row, lane_vector;

  // What is never copied: rows outside of the plane, and what taps of missing neighbours hold, which nobody
  // may look at. Zeros keep the states of such rows zero.
  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int i = 0; i < STAGES * TENSORS; ++i) {
      const int k = i % TENSORS;
      unsigned char* to = ring + i / TENSORS * STAGE + k * TILE;
      const int from = rows.first + (k == 0 && rows.first_row < 0);
      const int until = rows.end - (k == TAPS - 1 && rows.first_row + rows.end == p.height);
      clear_rows(to, 0, from);
      clear_rows(to, until, TILE_ROWS);
    }
  }

  __device__ __forceinline__ void clear_rows(unsigned char* to, int first, int end) const {
#pragma unroll 1
    for (int r = first + lane_row; r < end; r += STEP)
      *(uint4*)(to + place_of(r, lane_vector)) = make_uint4(0, 0, 0, 0);
  }

  // All lanes go through as many rows, those that are not there among them: addresses of a loop that lanes
  // leave one by one would take more instructions than its copies.
  __device__ __forceinline__ void copy_tile(const Plane& plane, int column0, unsigned char* to) const {
    const int column = column0 + lane_vector * VECTOR;
    const int until = column < p.width ? rows.end : rows.first;
    const storage_t* from[TENSORS];
#pragma unroll
    for (int i = 0; i < TENSORS; ++i)
      from[i] = plane.from[i] + (rows.first_row + lane_row) * row_step(p, i) + column;
    to += place_of(lane_row, lane_vector);
#pragma unroll 3
    for (int k = 0; k < ROUNDS; ++k, to += STEP * PIECE) {
      const int r = lane_row + k * STEP, row = rows.first_row + r;
      const bool there = between(r, rows.first, until);
#pragma unroll
      for (int i = 0; i < TENSORS; ++i) {
        const bool missing = (i == 0 && row == 0) || (i == TAPS - 1 && row + 1 == p.height);
        if (there && !missing) copy_async_wide(to + i * TILE, from[i]);
        from[i] += STEP * row_step(p, i);
      }
    }
  }

  __device__ __forceinline__ void write_tile(const Plane& plane, int column0, unsigned char* from) const {
    const int column = column0 + lane_vector * VECTOR;
    const int until = column < p.width ? rows.own_end : HALO;
    from += TO_RESULT + place_of(lane_row, lane_vector);
    storage_t* y = plane.y + (rows.first_row + lane_row) * p.y.h + column;
#pragma unroll 4
    for (int k = 0; k < ROUNDS; ++k, y += STEP * p.y.h)
      if (between(lane_row + k * STEP, HALO, until)) *(uint4*)y = *(const uint4*)(from + k * STEP * PIECE);
  }

  // The next tile is asked for before the results of the last one in its place are written: they have a place
  // of their own. It counts as there only after that.
  __device__ __forceinline__ void run(const Runs& runs) const {
    const int all = runs.tiles();
    Place coming = start_of(runs), leaving = coming;
    Plane now = plane_of(p, coming.run.plane), old = now;
#pragma unroll 1
    for (int n = 0; n < all + STAGES; ++n) {
      const int stage = stage_of(n);
      unsigned char* at = ring + stage * STAGE;
      if (n >= STAGES) mbarrier_wait(Shared::done(stage), (turn_of(n) - 1) & 1);
      if (n < all) copy_tile(now, runs.column(coming.tile), at);
      if (n >= STAGES) {
        write_tile(old, runs.column(leaving.tile), at);
        if (leaving.next(runs)) old = plane_of(p, leaving.run.plane);
      }
      if (n >= all) continue;
      mbarrier_arrive_copied(Shared::full(stage));
      if (coming.next(runs)) now = plane_of(p, coming.run.plane);
    }
  }
};

// index: of the thread among those that copy.
__device__ __forceinline__ Copier copier_of(const Params& p, const Rows& rows, unsigned char* ring,
                                            int index) {
  return {p, rows, ring, index / VECTORS, index % VECTORS};
}
