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
#include "pixels_backward.cuh"

// The segments of a direction: of lines [0, boundary) and of [boundary, lines).
struct Segments {
  int lines, boundary;

  __device__ __forceinline__ int count(bool upper) const {
    return ((upper ? lines - boundary : boundary) + SEGMENT - 1) / SEGMENT;
  }
};

__device__ __forceinline__ int segments_of(int lines) { return (lines + SEGMENT - 1) / SEGMENT; }

// The adjoint over lines [begin, end) of a direction. `add` to the sums of dx that are there; `last`: the sum is dx.
struct Phase {
  int begin, end;
  bool add, last;
  int first_segment;  // kept states that belong to lines before these
};

__device__ __forceinline__ void line_barrier() {
  if (STRIPS > 1) __syncthreads();
}

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

#if HAS_HIDDEN
// Which line is set on its way next: from the last to the first.
struct Queue {
  int line, begin;

  __device__ __forceinline__ void start(const Phase& phase) { line = phase.end - 1, begin = phase.begin; }

  __device__ __forceinline__ void copy(Walker& walk, int slot, bool add) {
    if (line >= begin) {
      walk.copy_line(slot, add, line == 0);
      walk.move_read(-1);
      line--;
    }
    copy_commit();
  }
};
#else
// Which line is set on its way next: a segment's lines forwards, then those of the segment before. A segment's lines
// take the slots in the order in which the segment after leaves them, which is every other time from the last on.
struct Queue {
  int first, end, segment, line;
  int kept, parity;  // kept states of the segment, and where they go

  __device__ __forceinline__ void start(const Phase& phase) {
    segment = segments_of(phase.end - phase.begin) - 1;
    first = line = phase.begin + segment * SEGMENT;
    end = phase.end;
    kept = phase.first_segment + segment;
    parity = 0;
  }

  __device__ __forceinline__ void copy(Walker& walk, int slot, bool add) {
    if (segment >= 0) {
      walk.copy_line(slot, add, false);
      if (line == first) walk.copy_kept(parity, kept, first == 0);
      if (line + 1 < end) {
        line++;
        walk.move_read(1);
      } else {
        walk.move_read(first - SEGMENT - line);
        end = first;
        first -= SEGMENT;
        line = first;
        segment--, kept--, parity ^= 1;
      }
    }
    copy_commit();
  }
};

__device__ __forceinline__ int slot_of(int k, int parity) { return parity ? SEGMENT - 1 - k : k; }
#endif

#if !OWN_TAPS
// A segment's tap gradients: summed over the block's vectors of a group, in order. They lie as lines and places do, so
// that neighbouring threads write what is adjacent.
__device__ __forceinline__ void reduce_taps(const Params& p, const Layout& layout, const Self& me, const Walker& walk,
                                            int d, int first, int lines) {
  constexpr int GROUP_VECTORS = VECTORS / TAP_GROUPS;
  if (!NEED_DTAPS) return;
  const int places = walk.run.end - walk.run.own, all = lines * TAP_GROUPS * places;
  const int channel_block = (me.channel / V - me.vector) / VECTORS;
  const int of = ROLES == 2 && p.knobs[5] >= 0 ? 2 : p.scans, slot = of < p.scans ? me.role & 1 : d;
  const int planes = layout.channel_blocks * TAP_GROUPS;
  const long long pixels = (long long)p.height * p.width;
  float* const sums = (float*)p.scratch[3] + ((long long)me.b * of + slot) * planes * 3 * pixels;
#pragma unroll 1
  for (int i = threadIdx.x; i < all; i += THREADS) {
    const int row = i / places, j = walk.run.own + i - row * places;
    const int k = row / TAP_GROUPS, g = row % TAP_GROUPS, l = j - walk.run.start;
    const int q = l % PLACES, column = l / PLACES;
    const int thread = column / (32 / LANES) * (32 * ROW_WARPS) + column % (32 / LANES) * LANES;
    float sum[3] = {0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < GROUP_VECTORS; v++) {
      const int vector = g * GROUP_VECTORS + v;
      const Weights part = *gradient(k, q, thread + vector / LANES * 32 + vector % LANES);
      sum[0] += part.before, sum[1] += part.here, sum[2] += part.after;
    }
    const int line = walk.s.reversed ? walk.s.lines - 1 - first - k : first + k;
    float* to = sums + (channel_block * TAP_GROUPS + g) * 3 * pixels + (long long)line * walk.s.places + j;
#pragma unroll
    for (int tap = 0; tap < 3; tap++) to[tap * pixels] = sum[tap];
  }
}
#endif

// What a place hands to the places of the line before: `to` the thread's own, and one beside them on either side.
__device__ __forceinline__ void hand(int q, int v, const Taps& w, float g, float (&to)[PLACES][V], float* before,
                                     float* after) {
  to[q][v] = fmaf(w.here, g, to[q][v]);
  if (q > 0)
    to[q > 0 ? q - 1 : 0][v] = fmaf(w.before, g, to[q > 0 ? q - 1 : 0][v]);
  else
    before[v] = w.before * g;
  if (q + 1 < PLACES)
    to[q + 1 < PLACES ? q + 1 : q][v] = fmaf(w.after, g, to[q + 1 < PLACES ? q + 1 : q][v]);
  else
    after[v] = w.after * g;
}

// One line of the adjoint: `slot` has its operands, row `k` of the states is that of the line before. `carried` is what
// the next line handed to this one, then what this one hands to the line before. Where the states are at hand, `h` is
// that of this line, then that of the line before.
__device__ __forceinline__ void adjoint_line(const Phase& phase, Walker& walk, int slot, int row, int k, int parity,
                                             bool restart, float (&h)[PLACES][V], float (&carried)[PLACES][V]) {
  const int slot_at = slot * SLOT;
  float g[PLACES][V];
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float in[V], e[V];
    unpack(*operand(slot_at, DY, q), in);
#if HAS_GATE
    unpack(*operand(slot_at, GATE, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
#pragma unroll
    for (int v = 0; v < V; v++) {
      g[q][v] = fmaf(e[v], in[v], carried[q][v]);
      if (q > 0 && !walk.exists[q]) g[q][v] = 0.f;  // what was handed to no place may be 0 * inf
    }
    if (NEED_DGATE && walk.own[q]) {
#if !HAS_HIDDEN
      load_floats(floats(states_at(k + 1, parity), q), THREADS, h[q]);
#endif
#pragma unroll
      for (int v = 0; v < V; v++) e[v] = h[q][v] * in[v];
      store_vector(walk.dgate.at + q * walk.dgate.place, e);
    }
  }

  // What goes to the places of the line before: the thread's own, and one beside them on either side.
  float before[V], after[V], to_before[V], to_after[V];
#if HAS_HIDDEN
  walk.entering(slot_at, h, before, after);
#else
#pragma unroll
  for (int q = 0; q < PLACES; q++) load_floats(floats(states_at(k, parity), q), THREADS, h[q]);
  walk.beside_states(states_at(k, parity), h, before, after);
#endif
#pragma unroll
  for (int q = 0; q < PLACES; q++)
#pragma unroll
    for (int v = 0; v < V; v++) carried[q][v] = 0.f;
#if OWN_TAPS
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float raw[3 * V], gradients[3 * V];
    walk.raw_taps(slot_at, q, raw);
    const bool has_before = walk.place + q > 0, has_after = walk.place + q + 1 < walk.s.places;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps a = own_taps(raw, v);
      const float left = q > 0 ? h[q > 0 ? q - 1 : 0][v] : before[v];
      const float right = q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v];
      Taps dw = {0.f, 0.f, 0.f};
      if (!restart)
        dw = tap_gradient(a, {g[q][v] * left, g[q][v] * h[q][v], g[q][v] * right}, has_before, has_after);
      gradients[INTERLEAVED ? 3 * v : v] = dw.before;
      gradients[INTERLEAVED ? 3 * v + 1 : V + v] = dw.here;
      gradients[INTERLEAVED ? 3 * v + 2 : 2 * V + v] = dw.after;
      const Taps w = tap_weights(a, has_before, has_after);
      hand(q, v, w, g[q][v], carried, to_before, to_after);
    }
    if (NEED_DTAPS && walk.own[q])
#pragma unroll
      for (int t = 0; t < 3; t++)
        store_vector(walk.dtaps.at + q * walk.dtaps.place + t * walk.dtap_vector, gradients + t * V);
  }
#else
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float weight[3];
    walk.weights(slot_at, row, q, weight);
    Weights dw = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < V; v++) {
      dw.before = fmaf(g[q][v], q > 0 ? h[q > 0 ? q - 1 : 0][v] : before[v], dw.before);
      dw.here = fmaf(g[q][v], h[q][v], dw.here);
      dw.after = fmaf(g[q][v], q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v], dw.after);
      hand(q, v, Walker::weight_of(weight, v), g[q][v], carried, to_before, to_after);
    }
    if (restart) dw = {0.f, 0.f, 0.f, 0.f};
    if (NEED_DTAPS) *gradient(k, q, threadIdx.x) = dw;
  }
#endif
  walk.show_edges(k & 1, to_before, to_after);

  // du = g: to x through lam, to lam through x.
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    if (!walk.own[q]) continue;
    float e[V], out[V];
#if HAS_LAM
    if (NEED_DLAM) {
      unpack(*operand(slot_at, 0, q), e);
#pragma unroll
      for (int v = 0; v < V; v++) e[v] *= g[q][v];
      store_vector(walk.dlam.at + q * walk.dlam.place, e);
    }
    if (NEED_DX) unpack(*operand(slot_at, 1, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
    if (!NEED_DX) continue;
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = 0.f;
    if (SUMS_COME && phase.add) load_floats(floats(sums_at(slot), q), THREADS, out);
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = fmaf(g[q][v], e[v], out[v]);
    if (!SUM || phase.last)
      store_vector(walk.dx.at + q * walk.dx.place, out);
    else
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        store_part(walk.write.at + q * walk.write.place + part * PART_STEP, out + part * F);
  }
  walk.next_written();
  line_barrier();
  if (restart) {
    clear(carried);
    return;
  }
  walk.beside_edges(k & 1, to_before, to_after, before, after);
#pragma unroll
  for (int v = 0; v < V; v++) {
    carried[0][v] += before[v];
    carried[PLACES - 1][v] += after[v];
  }
}

// Bits of the lines that restart, of those from `first` on.
__device__ __forceinline__ u32 restarts_of(const Params& p, int first, int count) {
  u32 restarts = 0;
  for (int k = 0, since = first % p.chunk; k < count; k++, since = since + 1 == p.chunk ? 0 : since + 1)
    restarts |= (u32)(since == 0) << k;
  return restarts;
}

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
