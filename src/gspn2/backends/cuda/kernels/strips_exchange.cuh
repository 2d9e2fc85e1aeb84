// The part of a line that a scanning warp holds, and states from and for its neighbours.
#pragma once
#include "strips.cuh"

// The part of a line that a warp holds. Rows of a lane are counted from the first that the warp holds: HALO
// are the strip's before it, then come its own.
struct Strip {
  int slot, own;                 // see SLOTS; rows of its own
  int lane;
  bool has_before, has_after;    // neighbours
  bool far_before, far_after;    // in other blocks
  int after;                     // rows of the strip after it that it holds
  int source[ROWS];              // whose state a row takes, among those of all slots in turn 0; -1: nobody's
  int sent;                      // the row whose state this lane sends to another block; -1: none
  int count;                     // of exchanges so far

  __device__ __forceinline__ int row(int k) const { return lane * ROWS + k; }
  __device__ __forceinline__ bool owns(int k) const { return row(k) >= HALO && row(k) < HALO + own; }

  // A strip shows the states of all rows that it holds; neighbours take those that they need. Two sets take
  // turns, as a neighbour may still read one when the next is written. The one after that is not written
  // before neighbours have shown the next, and so have read this one.
  __device__ __forceinline__ void exchange(float (&h)[ROWS]) {
    const int turn = count & 1;
    const u32 parity = count >> 1 & 1;
    ++count;
    float* shown = states_of(slot, turn);
#pragma unroll
    for (int k = 0; k < ROWS; ++k) shown[row(k)] = h[k];
    __syncwarp();
    if (arrives(lane)) mbarrier_arrive(state_barrier(slot, turn));
#if CLUSTER > 1
    if (far_before || far_after) send(shown, turn);
#endif
    if (has_before) mbarrier_wait(state_barrier(slot - 1, turn), parity);
    if (has_after) mbarrier_wait(state_barrier(slot + 1, turn), parity);
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
      if (source[k] >= 0) h[k] = states_of(0, turn)[source[k]];
  }

#if CLUSTER > 1
  // To other blocks a lane sends one state, half of the lanes to the block before, half to the one after.
  // There it counts on the barrier of what stands for this strip.
  __device__ __forceinline__ void send(float* shown, int turn) const {
    if (arrives(lane)) {
      if (far_before) arrive_expect(state_barrier(slot - 1, turn), 4 * HALO, lane);
      if (far_after) arrive_expect(state_barrier(slot + 1, turn), 4 * after, lane);
    }
    const bool forth = lane >= HALO;
    const int there = forth ? slot - STRIPS : slot + STRIPS;
    const u32 rank = cluster_rank() + (forth ? 1 : -1);
    if (sent < 0) return;
    store_counted<1>(states_of(there, turn) + sent, state_barrier(there, turn), rank, shown + sent);
  }
#endif

  // Where a plane is cut: the states of all rows that the warp holds, also of those that have gone wrong since the last
  // exchange. Whoever takes over has the bits that this warp would have had. cut: the cluster that takes over.
  __device__ __forceinline__ void hand_over(const float (&h)[ROWS], const Params& p, int cut) const {
    const int set = set_of(cut);
    float* to = (float*)p.scratch[0] + (long long)set * HELD + lane;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) to[k * 32] = h[k];
    __syncwarp();
    if (lane == 0) raise_flag((u32*)p.scratch[1] + set, 1);
  }
  __device__ __forceinline__ void take_over(float (&h)[ROWS], const Params& p, int cut) const {
    const int set = set_of(cut);
    wait_flag((const u32*)p.scratch[1] + set, 1);
    __syncwarp();
    const float* from = (const float*)p.scratch[0] + (long long)set * HELD + lane;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) h[k] = from[k * 32];
  }
  __device__ __forceinline__ int set_of(int cut) const {
    const int rank = CLUSTER > 1 ? (int)cluster_rank() : 0;
    return (cut * CLUSTER + rank) * STRIPS + slot - 1;
  }
};

// each: rows of a strip, but for the last.
__device__ __forceinline__ Strip strip_of(const Params& p, int each, int rank) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int slot = warp + 1, first = (rank * STRIPS + warp) * each;
  const int left = p.height - first, own = min(each, left), after = max(0, min(HALO, left - own));
  Strip it = {slot, own, lane};
  it.has_before = first > 0, it.has_after = after > 0, it.after = after;
  it.far_before = it.has_before && warp == 0, it.far_after = it.has_after && warp == STRIPS - 1;
  it.count = 0;
#pragma unroll
  for (int k = 0; k < ROWS; ++k) {
    // The same row of the plane is `each` rows further on in what the strip before holds.
    const int r = it.row(k);
    const bool from_after = between(r, HALO + own, HALO + own + after);
    int source = from_after ? (slot + 1) * 2 * HELD + r - own : -1;
    if (it.has_before && r < HALO) source = (slot - 1) * 2 * HELD + r + each;
    it.source[k] = source;
  }
  static_assert(HALO == 16, "a warp's lanes send the halos of both sides");
  const bool sends = lane < HALO ? it.far_before && lane < own : it.far_after;
  it.sent = sends ? (lane < HALO ? HALO + lane : own + lane - HALO) : -1;
  return it;
}
