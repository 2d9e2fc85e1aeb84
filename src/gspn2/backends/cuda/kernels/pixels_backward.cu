// Backward for channels that are adjacent in memory (see pixels.cuh).
//
// A block takes a direction in two passes. The first scans forward and keeps the state before every SEGMENT-th line,
// in scratch. The second goes through the segments from the last to the first: it computes a segment's states again
// from the kept one, into shared memory, and then runs the adjoint over its lines backwards. What it needs of the
// lines comes through a ring that is a segment long, and stays there for the way back; a line of the segment before
// takes the place of one that is done with.
//
// Where forward kept the states, there is the way back alone: lines come through the ring from the last to the first,
// each with the states that enter it.
//
// Neighbouring places are in the same warp and meet by shuffle; where a line is longer than a warp, there is a barrier
// a line, and what the warps' outer places have is in shared memory.
//
// With two roles, one block takes the forward direction of an axis and its partner the backward one. Their adjoints
// start at opposite ends and meet in the middle, so the first writes sums of dx where the second then adds to them.
// Lines are segmented from either end of this boundary on. With four roles both axes run at the same time.
//
// The gradient of shared taps is a sum over channels: over a thread's vector, then over the block's vectors, at the
// end of each segment. These sums go to scratch, and pixels_taps adds up those of a group's blocks.
//
// More macros: SEGMENT lines (also TAP_LINES; also HALO with SPLIT), LANES of a warp that are beside each other in
// channels, WHOLE 1 if channels come in whole blocks, SUM 1 if there is more than one direction; NEED_DX, NEED_DTAPS,
// NEED_DLAM, NEED_DGATE the gradients that are asked for; HAS_HIDDEN 1 if the states are at hand (`y`).
// Knobs: those of Layout; 4 places of all kept lines of a direction; 5 the axis of the launch (two roles: 0 vertical, 1
// horizontal), or -1 for all directions.
// Scratch: 0 float32 sums of dx (16-bit storage), 1 those of the horizontal directions (four roles), 2 kept states,
// 3 sums of gradients of shared taps (B, directions, blocks or groups, 3, lines, places).
#include "pixels_backward_adjoint.cuh"

#if !HAS_HIDDEN
// Pass 1: the states before every segment but the first, in scratch.
__device__ __forceinline__ void keep_states(const Params& p, const Layout& layout, const Self& me, Walker& walk, int d,
                                            const Segments& segments, int& exchanged) {
  // The last segment is never run through here.
  const int upper = segments.count(true), lower = segments.count(false);
  const int stop = upper > 0 ? segments.boundary + (upper - 1) * SEGMENT : (lower - 1) * SEGMENT;
  walk.start_inputs(p, me, d, 0);
#if !OWN_TAPS
  TapStages stages;
  stages.start(p, walk.s, walk.run, me.b, d, (me.channel - me.vector * V) / (p.channels / p.groups), 0, stop,
               (Weights*)(shared_memory() + WEIGHTS_AT));
  stages.fetch(0);
  stages.turn(0);
  stages.fetch(1);
#endif
#pragma unroll 1
  for (int line = 0; line < AHEAD; line++) {
    if (line < stop) walk.copy_inputs(line * INPUTS * LINE), walk.move_inputs(1);
    copy_commit();
  }
  float h[PLACES][V];
  clear(h);
  int since = 0, slot = 0, until = 0, segment = 0;
#pragma unroll 1
  for (int line = 0; line <= stop; line++) {
    if (line == segments.boundary) until = 0;
    if (until == 0) {
      until = SEGMENT;
#if SPLIT
      exchange_halos<HALO_AT>(p, layout, me, walk.run, walk.place, exchanged, h);
#endif
      if (line > 0) walk.keep(segment, h);
      segment++;
    }
    until--;
    if (line == stop) break;
#if !OWN_TAPS
    // Not before the second line of a stage: until there is a barrier, others may be at the stage before, whose weights
    // these replace.
    if (line % SEGMENT == SEGMENT / 2) {
      stages.turn(line / SEGMENT + 1);
      stages.fetch(line / SEGMENT + 2);
    }
#endif
    // Also between two exchanges with other splits.
    if (STRIPS == 1 && (!OWN_TAPS || SPLIT) && line % SEGMENT == 0) __syncthreads();
    const int slot_at = slot * INPUTS * LINE;
    copy_wait<AHEAD - 1>();
    float u[PLACES][V], before[V], after[V];
#pragma unroll
    for (int q = 0; q < PLACES; q++) walk.input(slot_at, q, u[q]);
    walk.show_edges(line & 1, h[0], h[PLACES - 1]);
    line_barrier();
    walk.beside_edges(line & 1, h[0], h[PLACES - 1], before, after);
    walk.step(slot_at, line % (2 * SEGMENT), since == 0, u, before, after, h);
    since = since + 1 == p.chunk ? 0 : since + 1;
    if (line + AHEAD < stop) walk.copy_inputs(slot_at), walk.move_inputs(1);
    copy_commit();
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
  }
  copy_wait<0>();
  __syncthreads();
}
#endif

// A direction whole. `add`, `last`: as in Phase, for the roles that meet in it.
__device__ __forceinline__ void run_direction(const Params& p, const Layout& layout, const Self& me, int d, bool add,
                                              bool last, void* sums, int& exchanged) {
  Segments segments;
  segments.lines = scan_of(p, d).lines;
  const int middle = (segments.lines + 1) / 2;
  segments.boundary = ROLES == 1 ? 0 : (me.role & 1) == 0 ? middle : segments.lines - middle;
  Walker walk;
  walk.start(p, layout, me, d);
  float h[PLACES][V], carried[PLACES][V];
  clear(h);
  clear(carried);
#if HAS_HIDDEN
  if (NEED_DGATE) walk.last_state(p, me, d, h);
#else
  keep_states(p, layout, me, walk, d, segments, exchanged);
#endif
#pragma unroll 1
  for (int turn = ROLES > 1 ? 0 : 1; turn < 2; turn++) {
#if CLUSTER
    cluster_barrier();
#endif
    Phase phase;
    phase.begin = turn == 0 || ROLES == 1 ? segments.boundary : 0;
    phase.end = turn == 0 || ROLES == 1 ? segments.lines : segments.boundary;
    phase.first_segment = turn == 0 ? segments.count(false) : 0;
    phase.add = add || (ROLES > 1 && turn == 1);
    phase.last = last && turn == 1;
    adjoint(p, layout, me, walk, d, phase, sums, exchanged, h, carried);
  }
}

KERNEL(THREADS, MIN_BLOCKS) pixels_backward(CONSTANT_PARAMS p) {
  const Layout layout = layout_of(p);
  const Self me = thread_of(p, layout);
#if SPLIT
  start_halos<HALO_AT>();
#endif
#if CLUSTER
  // Nobody writes to a block that has not started.
  cluster_barrier();
#else
  __syncthreads();
#endif
  void* const sums = STORAGE == 0 ? nullptr : p.scratch[0];
  int exchanged = 0;
#if ROLES == 1
#pragma unroll 1
  for (int d = 0; d < p.scans; d++) {
    run_direction(p, layout, me, d, d > 0, d + 1 == p.scans, sums, exchanged);
#if CLUSTER
    cluster_barrier();
#endif
  }
#else
  const bool vertical = index_of(p, 0) >= 0, horizontal = index_of(p, 2) >= 0;
#pragma unroll 1
  for (int axis = 0; axis < 2; axis++) {
    if (!(axis == 0 ? vertical : horizontal) || (ROLES == 4 && me.role / 2 != axis)) continue;
    if (ROLES == 2 && p.knobs[5] >= 0 && p.knobs[5] != axis) continue;
    run_direction(p, layout, me, index_of(p, 2 * axis + (me.role & 1)), ROLES == 2 && axis == 1 && vertical,
                  ROLES == 2 && (axis == 1 || !horizontal), ROLES == 4 && axis == 1 ? p.scratch[1] : sums, exchanged);
    cluster_barrier();
  }
#if ROLES == 4
  if (NEED_DX) add_axes(p, p.dx, layout, me);
#endif
#endif
}
