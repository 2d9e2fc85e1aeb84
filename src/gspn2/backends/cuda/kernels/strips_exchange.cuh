// The part of a line that a scanning warp holds, and states from and for its neighbours.
#pragma once
#include "strips.cuh"

// The part of a line that a warp holds. Rows of a lane are counted from the first that the warp holds: HALO
// are the strip's before it, then come its own.
struct Strip {
  int number, own, after;   // among all of a line; rows of its own; rows of the strip after it
  int lane;
  int count;                // of exchanges so far

  __device__ __forceinline__ int row(int k) const { return lane * ROWS + k; }
  __device__ __forceinline__ bool owns(int k) const { return row(k) >= HALO && row(k) < HALO + own; }

  // Two sets of states take turns, as a neighbour may already send the next while these are read. It does not
  // send those after these before it has what this strip sends next.
  __device__ __forceinline__ void exchange(float (&h)[ROWS]) {
    const int turn = count & 1;
    const u32 parity = count >> 1 & 1;
    ++count;
    const int set = set_of(number, turn, 0);  // what the strip before sends; then the strip after
    u64* bar = halo_barriers() + set;
    const bool has_before = number > 0, has_after = after > 0;
    if (lane == 0) {
      if (has_before && !near(number - 1)) mbarrier_arrive_expect(bar, 4 * HALO);
      if (has_after && !near(number + 1)) mbarrier_arrive_expect(bar + 1, 4 * after);
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int o = row(k) - HALO;
      if (has_before && o >= 0 && o < min(HALO, own)) send(h[k], number - 1, set_of(number - 1, turn, 1), o);
      if (has_after && o >= own - HALO && o < own)
        send(h[k], number + 1, set_of(number + 1, turn, 0), o - (own - HALO));
    }
    __syncwarp();
    if (lane == 0) {
      if (has_before && near(number - 1)) mbarrier_arrive(halo_barriers() + set_of(number - 1, turn, 1));
      if (has_after && near(number + 1)) mbarrier_arrive(halo_barriers() + set_of(number + 1, turn, 0));
    }
    const float* from = halos() + set * HALO;
    if (has_before) {
      mbarrier_wait(bar, parity);
#pragma unroll
      for (int k = 0; k < ROWS; ++k)
        if (row(k) < HALO) h[k] = from[row(k)];
    }
    if (has_after) {
      mbarrier_wait(bar + 1, parity);
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        const int o = row(k) - HALO - own;
        if (o >= 0 && o < after) h[k] = from[HALO + o];
      }
    }
    // All have read before any sends again.
    __syncwarp();
  }

  // side: 0 if the sender comes before the receiver.
  static __device__ __forceinline__ int set_of(int to, int turn, int side) {
    return (to % STRIPS * 2 + turn) * 2 + side;
  }
  // In the same block states are stored, and the sender arrives for all of them; to another block each one
  // counts.
  __device__ __forceinline__ bool near(int to) const {
    return CLUSTER == 1 || to / STRIPS == number / STRIPS;
  }

  __device__ __forceinline__ void send(const float& state, int to, int set, int at) const {
    float* there = halos() + set * HALO + at;
#if CLUSTER > 1
    if (!near(to)) {
      store_counted<1>(there, halo_barriers() + set, to / STRIPS, &state);
      return;
    }
#endif
    *there = state;
  }
};

__device__ __forceinline__ Strip strip_of(const Params& p, int own, int rank) {
  const int number = rank * STRIPS + (int)threadIdx.x / 32, left = p.height - number * own;
  return {number, min(own, left), max(0, min(HALO, left - own)), (int)threadIdx.x % 32, 0};
}
