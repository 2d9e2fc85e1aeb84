// The way back through the lines of a phase.
#pragma once
#include "pixels_backward_line.cuh"

#if HAS_HIDDEN
// The lines of a phase, from the last to the first. `carried` is what the lines after them hand over, `h` their last
// state.
__device__ __forceinline__ void adjoint(const Params& p, const Layout& layout, const Self& me, Walker& walk, int d,
                                        const Phase& phase, void* sums, int& exchanged, float (&h)[PLACES][V],
                                        float (&carried)[PLACES][V]) {
  // Other warps look at the states that enter a line: these are there a line, and a barrier, before.
  constexpr int ON_THE_WAY = STRIPS > 1 ? SEGMENT - 2 : SEGMENT - 1;
  const int lines = phase.end - phase.begin;
  Queue queue;
  queue.start(phase);
  walk.start_inputs(p, me, d, queue.line);
  walk.start_adjoint(p, me, d, queue.line, sums);
  walk.start_written(p, me, d, queue.line, sums);
#pragma unroll 1
  for (int i = 0; i < SEGMENT; i++) queue.copy(walk, i, phase.add);
#if !OWN_TAPS
  TapStages stages;
  stages.start(p, walk.s, walk.run, me.b, d, (me.channel - me.vector * V) / (p.channels / p.groups), phase.begin,
               phase.end, (Weights*)(shared_memory() + WEIGHTS_AT));
  stages.fetch(segments_of(lines) - 1);
  stages.turn(segments_of(lines) - 1);
  stages.fetch(segments_of(lines) - 2);
#endif
  int slot = 0;
#pragma unroll 1
  for (int segment = segments_of(lines) - 1; segment >= 0; segment--) {
    const int begin = segment * SEGMENT, first = phase.begin + begin, count = min(SEGMENT, lines - begin);
#if SPLIT
    exchange_halos<HALO_AT>(p, layout, me, walk.run, walk.place, exchanged, carried);
#endif
    copy_wait<SEGMENT - 1>();
    // Weights and states are seen by other threads from here on, sums of tap gradients have been read by them; and what
    // other splits sent has been read before they send again.
    if (!OWN_TAPS || STRIPS > 1 || SPLIT) __syncthreads();
    const int row = (segment & 1) * SEGMENT;
    const u32 restarts = restarts_of(p, first, count);
#if !OWN_TAPS
    stages.turn(segment - 1);
    stages.fetch(segment - 2);
#endif
#pragma unroll 1
    for (int k = count - 1; k >= 0; k--) {
      copy_wait<ON_THE_WAY>();
      adjoint_line(phase, walk, slot, row + k, k, 0, restarts >> k & 1, h, carried);
      queue.copy(walk, slot, phase.add);
      slot = slot + 1 == SEGMENT ? 0 : slot + 1;
    }
#if !OWN_TAPS
    __syncthreads();
    reduce_taps(p, layout, me, walk, d, first, count);
#endif
  }
  copy_wait<0>();
  __syncthreads();
}
#else
// Pass 2 over the lines of a phase, from the last to the first. `carried` is what the lines after them hand over.
__device__ __forceinline__ void adjoint(const Params& p, const Layout& layout, const Self& me, Walker& walk, int d,
                                        const Phase& phase, void* sums, int& exchanged, float (&h)[PLACES][V],
                                        float (&carried)[PLACES][V]) {
  const int lines = phase.end - phase.begin;
  Queue queue;
  queue.start(phase);
  walk.start_inputs(p, me, d, queue.first);
  walk.start_adjoint(p, me, d, queue.first, sums);
  walk.start_written(p, me, d, phase.end - 1, sums);
  // The last segment may be short; what it leaves of the ring is for the one before.
  const int rest = lines - (segments_of(lines) - 1) * SEGMENT;
#pragma unroll 1
  for (int i = 0; i < SEGMENT; i++) queue.copy(walk, i < rest ? i : SEGMENT - 1 - (i - rest), phase.add);
#if !OWN_TAPS
  TapStages stages;
  stages.start(p, walk.s, walk.run, me.b, d, (me.channel - me.vector * V) / (p.channels / p.groups), phase.begin,
               phase.end, (Weights*)(shared_memory() + WEIGHTS_AT));
  stages.fetch(segments_of(lines) - 1);
  stages.turn(segments_of(lines) - 1);
  stages.fetch(segments_of(lines) - 2);
#endif
  int parity = 0;  // of the kept states; the order of slots changes with it
#pragma unroll 1
  for (int segment = segments_of(lines) - 1; segment >= 0; segment--, parity ^= 1) {
    const int begin = segment * SEGMENT, first = phase.begin + begin, count = min(SEGMENT, lines - begin);
#if SPLIT
    exchange_halos<HALO_AT>(p, layout, me, walk.run, walk.place, exchanged, carried);
#endif
    copy_wait<SEGMENT - 1>();
    // Weights, and states before the segment, are seen by other threads from here on; and what other splits sent has
    // been read before they send again.
    if (!OWN_TAPS || STRIPS > 1 || SPLIT) __syncthreads();
#pragma unroll
    for (int q = 0; q < PLACES; q++) load_floats(floats(kept_at(parity), q), THREADS, h[q]);
    const int row = (segment & 1) * SEGMENT;
    const u32 restarts = restarts_of(p, first, count);
#pragma unroll 1
    for (int k = 0; k < count; k++) {
      const int slot = slot_of(k, parity);
      copy_wait<SEGMENT - 1>();
      float u[PLACES][V], before[V], after[V];
#pragma unroll
      for (int q = 0; q < PLACES; q++) walk.input(slot * SLOT, q, u[q]);
      if (k > 0) line_barrier();
      walk.beside_states(states_at(k, parity), h, before, after);
      walk.step(slot * SLOT, row + k, restarts >> k & 1, u, before, after, h);
#pragma unroll
      for (int q = 0; q < PLACES; q++) store_floats(floats(states_at(k + 1, parity), q), THREADS, h[q]);
      // Another group, of nothing, so that the wait for a line always leaves as many.
      copy_commit();
    }
    // The way back reads the last but one line of states, and before the next barrier nobody writes one.
#if !OWN_TAPS
    stages.turn(segment - 1);
    stages.fetch(segment - 2);
#endif
#pragma unroll 1
    for (int k = count - 1; k >= 0; k--) {
      const int slot = slot_of(k, parity);
      adjoint_line(phase, walk, slot, row + k, k, parity, restarts >> k & 1, h, carried);
      queue.copy(walk, slot, phase.add);
    }
#if !OWN_TAPS
    __syncthreads();
    reduce_taps(p, layout, me, walk, d, first, count);
#endif
  }
  copy_wait<0>();
  __syncthreads();
}
#endif
