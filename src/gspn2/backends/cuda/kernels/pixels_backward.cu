// Backward for channels that are adjacent in memory (see pixels.cuh).
//
// A block takes a direction in two passes. The first scans forward and keeps the state before every SEGMENT-th line,
// in scratch. The second goes through the segments from the last to the first: it computes a segment's states again
// from the kept one, into shared memory, and then runs the adjoint over its lines backwards. What it needs of the
// lines comes through one ring, in the order in which it is used: x and lam on the way forward; x, lam, gate, dy and
// the sum of dx so far on the way back.
//
// With two roles, one block takes the forward direction of an axis and its partner the backward one. Their adjoints
// start at opposite ends and meet in the middle, so the first writes sums of dx where the second then adds to them.
// Lines are segmented from either end of this boundary on. With four roles both axes run at the same time.
//
// The gradient of shared taps is a sum over channels: over a thread's vector, then over the block's vectors, at the
// end of each segment. DIRECT: that is the whole group, and the gradient is finished here; otherwise these sums go to
// scratch, and pixels_taps adds up those of a group's blocks.
//
// More macros: SEGMENT lines (also TAP_LINES; also HALO with SPLIT), DEPTH of the ring, SUM 1 if there is more than one
// direction, DIRECT; NEED_DX, NEED_DTAPS, NEED_DLAM, NEED_DGATE the gradients that are asked for.
// Knobs: those of Layout; 4 places of all kept lines of a direction.
// Scratch: 0 float32 sums of dx (16-bit storage), 1 those of the horizontal directions (four roles), 2 kept states,
// 3 sums of tap gradients (not DIRECT).
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
#pragma unroll
  for (int line = 0; line < DEPTH; line++) {
    if (line < stop) walk.copy_inputs(line), walk.move_inputs<1>();
    copy_commit();
  }
  float h[PLACES][V];
  clear(h);
#pragma unroll
  for (int q = 0; q < PLACES; q++) store_floats(states(0, q), PITCH, h[q]);
  __syncthreads();
    int since = 0, slot = 0, until = 0, segment = 0;
#pragma unroll 1
  for (int line = 0; line <= stop; line++) {
    if (line == segments.boundary) until = 0;
    if (until == 0) {
      until = SEGMENT;
#if SPLIT
      exchange_halos<HALO_AT>(p, layout, me, walk.run, walk.place, exchanged, h);
#pragma unroll
      for (int q = 0; q < PLACES; q++) store_floats(states(line & 1, q), PITCH, h[q]);
      __syncthreads();
#endif
      float* to = walk.kept + (long long)segment++ * walk.kept_line;
#pragma unroll
      for (int q = 0; q < PLACES; q++)
        if (walk.own[q] && line > 0) store_sums(to + q * p.channels, h[q]);
    }
    until--;
    if (line == stop) break;
#if !OWN_TAPS
    if (line % SEGMENT == TAP_TURN) {
      stages.turn(line / SEGMENT + 1);
      stages.fetch(line / SEGMENT + 2);
    }
#endif
    copy_wait<DEPTH - 1>();
    walk.step(slot, line % (2 * SEGMENT), line & 1, (line + 1) & 1, since == 0, h);
    since = since + 1 == p.chunk ? 0 : since + 1;
    if (line + DEPTH < stop) walk.copy_inputs(slot), walk.move_inputs<1>();
    copy_commit();
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
    __syncthreads();
  }
  copy_wait<0>();
  __syncthreads();
}

// Which line's operands are set on their way next: a segment's lines forwards, then backwards, then the segment before.
struct Queue {
  int first, end, segment, k, left;
  bool back;

  __device__ __forceinline__ void start(const Phase& phase) {
    const int segments = segments_of(phase.end - phase.begin);
    segment = phase.first_segment + segments - 1;
    first = phase.begin + (segments - 1) * SEGMENT;
    end = phase.end;
    left = 2 * (phase.end - phase.begin);
    k = 0;
    back = false;
  }

  __device__ __forceinline__ void copy(Walker& walk, int slot, bool add, int channels) {
    if (left > 0) {
      left--;
      walk.copy_inputs(slot);
      if (!back) {
        if (k == 0 && first > 0) walk.copy_kept(slot, segment, channels);
        back = k + 1 == SEGMENT || first + k + 1 == end;
        if (!back) walk.move_inputs<1>(), k++;
      } else {
        walk.copy_adjoint(slot, add);
        back = k > 0;
        if (back)
          walk.move_inputs<-1>(), k--;
        else
          walk.move_inputs<-SEGMENT>(), segment--, first -= SEGMENT;
      }
    }
    copy_commit();
  }
};

#if !OWN_TAPS
// A segment's tap gradients: summed over the block's vectors of a group, in order.
__device__ __forceinline__ void reduce_taps(const Params& p, const Layout& layout, const Self& me, const Walker& walk,
                                            int d, int first, int lines) {
  constexpr int GROUP_VECTORS = VECTORS / TAP_GROUPS;
  if (!NEED_DTAPS) return;
  const int places = walk.run.end - walk.run.own, all = lines * TAP_GROUPS * places;
  const int channel_block = (me.channel / V - me.vector) / VECTORS;
#pragma unroll 1
  for (int i = threadIdx.x; i < all; i += THREADS) {
    const int row = i / places, j = walk.run.own + i - row * places;
    const int k = row / TAP_GROUPS, g = row % TAP_GROUPS, l = j - walk.run.start;
    const int q = l % PLACES, thread = l / PLACES * VECTORS + g * GROUP_VECTORS;
    float sum[3] = {0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < GROUP_VECTORS; v++)
#pragma unroll
      for (int tap = 0; tap < 3; tap++) sum[tap] += *gradient(k, tap, q, thread + v);
#if DIRECT
    const int group = channel_block * TAP_GROUPS + g;
    const storage_t* a = stream_of(p.taps, walk.s, me.b, d, group, first + k, j).at;
    storage_t* to = stream_of(p.dtaps, walk.s, me.b, d, group, first + k, j).at;
    const Taps raw = {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
    const Taps out = tap_gradient(raw, {sum[0], sum[1], sum[2]}, j > 0, j + 1 < walk.s.places);
    to[0] = narrow(out.before);
    to[p.dtaps.k] = narrow(out.here);
    to[2 * p.dtaps.k] = narrow(out.after);
#else
    const int line = walk.s.reversed ? walk.s.lines - 1 - first - k : first + k;
    const long long pixel = walk.s.vertical ? (long long)line * p.width + j : (long long)j * p.width + line;
    const long long plane = ((long long)me.b * p.scans + d) * layout.channel_blocks + channel_block;
    float* to = (float*)p.scratch[3] + 3 * (plane * p.height * p.width + pixel);
#pragma unroll
    for (int tap = 0; tap < 3; tap++) to[tap] = sum[tap];
#endif
  }
}
#endif

// What one line's places hand to the places of the line before, their own thread's and, published, their neighbours'.
// `to` is filled with the former. With shared taps g itself is published, for the weights are known to all.
struct Handed {
  float to[PLACES][V];

  __device__ __forceinline__ void add(int q, int v, const Taps& w, float g, float* before, float* after) {
    to[q][v] = fmaf(w.here, g, to[q][v]);
    if (q > 0)
      to[q > 0 ? q - 1 : 0][v] = fmaf(w.before, g, to[q > 0 ? q - 1 : 0][v]);
    else
      before[v] = OWN_TAPS ? w.before * g : g;
    if (q + 1 < PLACES)
      to[q + 1 < PLACES ? q + 1 : q][v] = fmaf(w.after, g, to[q + 1 < PLACES ? q + 1 : q][v]);
    else
      after[v] = OWN_TAPS ? w.after * g : g;
  }
};

__device__ __forceinline__ Floats* after_row(int parity) {
  return (Floats*)(shared_memory() + AFTER_AT) + parity * PARTS * PITCH + VECTORS + threadIdx.x;
}

// One line of the adjoint: states row `k` is that of the line before, row `k + 1` this line's, in whose place g is
// published. `carried` is what the next line handed to this one, then what the thread's places hand to the line before.
__device__ __forceinline__ void adjoint_line(bool add, bool last_sum, Walker& walk, int slot, int row, int k,
                                             bool restart, float (&carried)[PLACES][V]) {
  Handed handed;
  clear(handed.to);
  float first[V], last[V];
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float in[V], g[V], h[V], e[V], out[V];
    unpack(*ring(slot, DY, q), in);
    load_floats(states(k + 1, q), PITCH, h);
#if HAS_GATE
    unpack(*ring(slot, GATE, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
#pragma unroll
    for (int v = 0; v < V; v++) {
      out[v] = h[v] * in[v];
      g[v] = fmaf(e[v], in[v], carried[q][v]);
      // A place that is none takes no part: what was handed to it may be 0 * inf.
      if (PLACES > 1 && !walk.exists[q]) g[v] = 0.f;
    }
    if (NEED_DGATE && walk.own[q]) store_vector(walk.dgate.at + q * walk.dgate.place, out);

    // dw_k = g h_(j + k), of the line before.
    float before[V], here[V], after[V];
    load_floats(q > 0 ? states(k, q > 0 ? q - 1 : 0) : states(k, PLACES - 1) + walk.before_at, PITCH, before);
    load_floats(states(k, q), PITCH, here);
    load_floats(q + 1 < PLACES ? states(k, q + 1 < PLACES ? q + 1 : q) : states(k, 0) + walk.after_at, PITCH, after);
#if OWN_TAPS
    float raw[3 * V], gradients[3 * V];
    walk.raw_taps(slot, q, raw);
    const bool has_before = walk.place + q > 0, has_after = walk.place + q + 1 < walk.s.places;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps a = own_taps(raw, v);
      Taps d = {0.f, 0.f, 0.f};
      if (!restart) d = tap_gradient(a, {g[v] * before[v], g[v] * here[v], g[v] * after[v]}, has_before, has_after);
      gradients[INTERLEAVED ? 3 * v : v] = d.before;
      gradients[INTERLEAVED ? 3 * v + 1 : V + v] = d.here;
      gradients[INTERLEAVED ? 3 * v + 2 : 2 * V + v] = d.after;
      handed.add(q, v, tap_weights(a, has_before, has_after), g[v], first, last);
    }
    if (NEED_DTAPS && walk.own[q])
#pragma unroll
      for (int t = 0; t < 3; t++)
        store_vector(walk.dtaps.at + q * walk.dtaps.place + t * walk.dtap_vector, gradients + t * V);
#else
    float dw[3] = {0.f, 0.f, 0.f}, weight[3];
    walk.weights(slot, row, q, weight);
#pragma unroll
    for (int v = 0; v < V; v++) {
      dw[0] = fmaf(g[v], before[v], dw[0]);
      dw[1] = fmaf(g[v], here[v], dw[1]);
      dw[2] = fmaf(g[v], after[v], dw[2]);
      handed.add(q, v, Walker::weight_of(weight, v), g[v], first, last);
    }
#pragma unroll
    for (int tap = 0; tap < 3; tap++)
      if (NEED_DTAPS) *gradient(k, tap, q, threadIdx.x) = restart ? 0.f : dw[tap];
#endif

    // du = g: to x through lam, to lam through x.
    unpack(*ring(slot, 0, q), in);
#if HAS_LAM
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = g[v] * in[v];
    if (NEED_DLAM && walk.own[q]) store_vector(walk.dlam.at + q * walk.dlam.place, out);
    unpack(*ring(slot, 1, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
    if (!NEED_DX || !walk.own[q]) continue;
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = 0.f;
    if (SUM && add) load_floats(ring_sum(slot, q), THREADS, out);
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = fmaf(g[v], e[v], out[v]);
    if (!SUM || last_sum)
      store_vector(walk.dx.at + q * walk.dx.place, out);
    else
      store_sums(walk.write.at + q * walk.write.place, out);
  }
  walk.next_written();
  store_floats(states(k + 1, 0), PITCH, first);
  if (OWN_TAPS)
    store_floats(after_row(k & 1), PITCH, last);
  else if (PLACES > 1)
    store_floats(states(k + 1, PLACES - 1), PITCH, last);
#pragma unroll
  for (int q = 0; q < PLACES; q++)
#pragma unroll
    for (int v = 0; v < V; v++) carried[q][v] = handed.to[q][v];
}

// After the barrier: what the neighbours hand over, too.
__device__ __forceinline__ void receive(const Walker& walk, int row, int k, bool restart, float (&carried)[PLACES][V]) {
  if (restart) {
    clear(carried);
    return;
  }
  float from_before[V], from_after[V];
  load_floats((OWN_TAPS ? after_row(k & 1) : states(k + 1, PLACES - 1)) + walk.before_at, PITCH, from_before);
  load_floats(states(k + 1, 0) + walk.after_at, PITCH, from_after);
  float w_after = 1.f, w_before = 1.f;
#if !OWN_TAPS
  w_after = w_before = 0.f;
  if (walk.exists[0] && walk.place > walk.run.start) w_after = walk.weights_of(row, -1)->after;
  if (walk.exists[0] && walk.place + PLACES < walk.run.stop) w_before = walk.weights_of(row, PLACES)->before;
#endif
#pragma unroll
  for (int v = 0; v < V; v++) {
    carried[0][v] = fmaf(w_after, from_before[v], carried[0][v]);
    carried[PLACES - 1][v] = fmaf(w_before, from_after[v], carried[PLACES - 1][v]);
  }
}

// Pass 2 over the lines of a phase, from the last to the first. `carried` is what the lines after them hand over.
__device__ __forceinline__ void adjoint(const Params& p, const Layout& layout, const Self& me, Walker& walk, int d,
                                        const Phase& phase, void* sums, int& exchanged, float (&carried)[PLACES][V]) {
  const int lines = phase.end - phase.begin;
  int slot = 0;
  Queue queue;
  queue.start(phase);
  walk.start_inputs(p, me, d, queue.first);
  walk.start_adjoint(p, me, d, phase.end - 1, sums);
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) queue.copy(walk, i, phase.add, p.channels);
#if !OWN_TAPS
  TapStages stages;
  stages.start(p, walk.s, walk.run, me.b, d, (me.channel - me.vector * V) / (p.channels / p.groups), phase.begin,
               phase.end, (Weights*)(shared_memory() + WEIGHTS_AT));
  stages.fetch(segments_of(lines) - 1);
  stages.turn(segments_of(lines) - 1);
  stages.fetch(segments_of(lines) - 2);
#endif
#pragma unroll 1
  for (int segment = segments_of(lines) - 1; segment >= 0; segment--) {
    const int begin = segment * SEGMENT, first = phase.begin + begin, count = min(SEGMENT, lines - begin);
#if SPLIT
    exchange_halos<HALO_AT>(p, layout, me, walk.run, walk.place, exchanged, carried);
#endif
    float h[PLACES][V];
    copy_wait<DEPTH - 1>();
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      load_floats(ring_sum(slot, q), THREADS, h[q]);
      if (first == 0)
#pragma unroll
        for (int v = 0; v < V; v++) h[q][v] = 0.f;
      store_floats(states(0, q), PITCH, h[q]);
    }
    __syncthreads();
    const int row = (segment & 1) * SEGMENT;
    u32 restarts = 0;
    for (int k = 0, since = first % p.chunk; k < count; k++, since = since + 1 == p.chunk ? 0 : since + 1)
      restarts |= (u32)(since == 0) << k;
#pragma unroll 1
    for (int k = 0; k < count; k++) {
      copy_wait<DEPTH - 1>();
      walk.step(slot, row + k, k, k + 1, restarts >> k & 1, h);
      queue.copy(walk, slot, phase.add, p.channels);
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
      __syncthreads();
    }
#if !OWN_TAPS
    stages.turn(segment - 1);
    stages.fetch(segment - 2);
#endif
#pragma unroll 1
    for (int k = count - 1; k >= 0; k--) {
      const bool restart = restarts >> k & 1;
      copy_wait<DEPTH - 1>();
      adjoint_line(phase.add, phase.last, walk, slot, row + k, k, restart, carried);
      queue.copy(walk, slot, phase.add, p.channels);
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
      __syncthreads();
      receive(walk, row + k, k, restart, carried);
    }
#if !OWN_TAPS
    reduce_taps(p, layout, me, walk, d, first, count);
#endif
  }
  copy_wait<0>();
  __syncthreads();
}

// A direction whole. `add`, `last`: as in Phase, for the roles that meet in it.
__device__ __forceinline__ void run_direction(const Params& p, const Layout& layout, const Self& me, int d, bool add,
                                              bool last, void* sums, int& exchanged) {
  Segments segments;
  segments.lines = scan_of(p, d).lines;
  const int middle = (segments.lines + 1) / 2;
  segments.boundary = ROLES == 1 ? 0 : (me.role & 1) == 0 ? middle : segments.lines - middle;
  Walker walk;
  walk.start(p, layout, me, d);
  keep_states(p, layout, me, walk, d, segments, exchanged);
  float carried[PLACES][V];
  clear(carried);
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
    adjoint(p, layout, me, walk, d, phase, sums, exchanged, carried);
  }
}

KERNEL(THREADS, MIN_BLOCKS) pixels_backward(CONSTANT_PARAMS p) {
  const Layout layout = layout_of(p);
  const Self me = self_of(p, layout);
  // Zeros beside the first and the last thread.
  for (int i = threadIdx.x; i < (SEGMENT + 1) * PLACES * PARTS + OWN_TAPS * 2 * PARTS; i += THREADS) {
    Floats zero;
#pragma unroll
    for (int e = 0; e < F; e++) zero.e[e] = 0.f;
    Floats* row = (Floats*)(shared_memory() + STATES_AT) + i * PITCH;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) row[v] = row[VECTORS + THREADS + v] = zero;
  }
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
    run_direction(p, layout, me, index_of(p, 2 * axis + (me.role & 1)), ROLES == 2 && axis == 1 && vertical,
                  ROLES == 2 && (axis == 1 || !horizontal), ROLES == 4 && axis == 1 ? p.scratch[1] : sums, exchanged);
    cluster_barrier();
  }
#if ROLES == 4
  if (NEED_DX) add_axes(p, p.dx, layout, me);
#endif
#endif
}
