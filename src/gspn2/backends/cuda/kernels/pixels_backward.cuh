// What a block of pixels_backward has in shared memory, and one thread's operands in one direction.
#pragma once
#include "pixels.cuh"

constexpr int INPUTS = 1 + HAS_LAM + (OWN_TAPS ? 3 : 0);  // operands that both passes read: x, lam, taps
constexpr int TAPS = 1 + HAS_LAM;
constexpr int DY = INPUTS, GATE = INPUTS + 1;
// The states as forward kept them: with each line what enters it.
constexpr bool READS_STATES = HAS_HIDDEN && (NEED_DTAPS || NEED_DGATE);
constexpr int HIDDEN = INPUTS + 1 + HAS_GATE;
constexpr int OPERANDS = HIDDEN + READS_STATES;
constexpr bool SUMS_COME = NEED_DX && SUM;

// A warp has LANES vectors of channels at 32 / LANES neighbouring threads' places; a block ROW_WARPS of them beside
// each other in channels, and STRIPS in places.
constexpr int ROW_WARPS = VECTORS / LANES;
constexpr int WARPS = THREADS / 32, STRIPS = WARPS / ROW_WARPS;
constexpr int STEP = 32 * ROW_WARPS - (32 - LANES);  // from a warp's first places to the last ones of the warp before
static_assert(VECTORS % LANES == 0 && WARPS % ROW_WARPS == 0 && THREADS % 32 == 0, "whole warps");

// Float32 sums of dx in scratch are nobody else's: of a block's channels the first parts of all vectors lie together,
// then the second ones, so that neighbouring lanes fill whole sectors. WHOLE: blocks of channels are.
constexpr int PART_STEP = STORAGE != 0 && ROLES < 4 && WHOLE ? VECTORS * F : F;

// Where things are in shared memory, in bytes. All but edges and weights are a thread's own.
constexpr int FLOATS = 4 * V * PLACES * THREADS;                 // a line's states or sums: [PLACES][PARTS][THREADS]
constexpr int LINE = PLACES * THREADS * VECTOR;                  // of one operand
constexpr int SLOT = OPERANDS * LINE;
constexpr int SUMS_AT = SEGMENT * SLOT;                          // [SEGMENT]: sums of dx so far
constexpr int KEPT_AT = SUMS_AT + SUMS_COME * SEGMENT * FLOATS;  // [2]: states before a segment
constexpr int STATES_AT = KEPT_AT + !HAS_HIDDEN * 2 * FLOATS;    // [SEGMENT]: states of a segment's lines
constexpr int EDGES_AT = STATES_AT + !HAS_HIDDEN * SEGMENT * FLOATS;  // [2][2][WARPS][LANES][PARTS]
constexpr int HALO_AT = EDGES_AT + (STRIPS > 1) * 16 * V * WARPS * LANES;
#if SPLIT
constexpr int GRADIENTS_AT = HALO_AT + HALO_BYTES;
#else
constexpr int GRADIENTS_AT = HALO_AT;
#endif
#if !OWN_TAPS
// Sums of tap gradients take the place of states that are done with, where these are as wide.
constexpr bool IN_STATES = V >= 4 && !HAS_HIDDEN;
constexpr int WEIGHTS_AT = GRADIENTS_AT + !IN_STATES * SEGMENT * PLACES * THREADS * 16;
static_assert(WEIGHTS_AT % 16 == 0, "weights are vectors");
#endif
static_assert(KEPT_AT % 16 == 0 && EDGES_AT % 16 == 0 && HALO_AT % 16 == 0, "states are vectors");

// Lines that pass 1 reads ahead: it has the ring for x, lam and taps alone.
constexpr int AHEAD = SUMS_AT / (INPUTS * LINE) < 12 ? SUMS_AT / (INPUTS * LINE) : 12;

__device__ __forceinline__ Vector* operand(int slot_at, int operand_, int q) {
  return (Vector*)(shared_memory() + slot_at + operand_ * LINE) + q * THREADS + threadIdx.x;
}
__device__ __forceinline__ Floats* floats(int at, int q) {
  return (Floats*)(shared_memory() + at) + q * PARTS * THREADS + threadIdx.x;
}
__device__ __forceinline__ int sums_at(int slot) { return SUMS_AT + slot * FLOATS; }
__device__ __forceinline__ int kept_at(int parity) { return KEPT_AT + parity * FLOATS; }
// States of the line before line `k` of a segment.
__device__ __forceinline__ int states_at(int k, int parity) {
  return k == 0 ? kept_at(parity) : STATES_AT + (k - 1) * FLOATS;
}
#if !OWN_TAPS
__device__ __forceinline__ Weights* gradient(int k, int q, int thread) {
  return IN_STATES ? (Weights*)(shared_memory() + STATES_AT + k * FLOATS) + q * PARTS * THREADS + thread
                   : (Weights*)(shared_memory() + GRADIENTS_AT) + (k * PLACES + q) * THREADS + thread;
}
#endif

// As `self_of`, for warps that have a few vectors at many places.
__device__ __forceinline__ Self thread_of(const Params& p, const Layout& layout) {
  Self me = self_of(p, layout);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vector = warp % ROW_WARPS * LANES + lane % LANES;
  me.channel += (vector - me.vector) * V;
  me.vector = vector;
  me.column = warp / ROW_WARPS * (32 / LANES) + lane / LANES;
  me.present = me.channel < p.channels;
  return me;
}

// A thread's part in one direction. The streams that are read stand at the line to be copied next, those that are
// written at the line to be written next.
struct Walker {
  Scan s;
  Run run;
  int place;
  bool has_before, has_after;  // does the block scan a place before the thread's first one, after its last one?
  bool exists[PLACES], own[PLACES];
  Stream x, lam, gate, dy, hidden, dx, dlam, dgate;
#if OWN_TAPS
  Stream taps, dtaps;
  long long tap_vector, dtap_vector;
#endif
  Sums read, write;
  float* kept;         // (parts of channels, segments, places, F) of this role's direction
  long long kept_line, kept_part;
  int weights_at;      // of the thread's first place in a row of the stages' weights

  __device__ __forceinline__ void start(const Params& p, const Layout& layout, const Self& me, int d) {
    s = scan_of(p, d);
    run = run_of(layout, s, me.split);
    place = run.start + me.column * PLACES;
    has_before = place > run.start && place - 1 < run.stop;
    has_after = place + PLACES < run.stop;
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      exists[q] = me.present && place + q < run.stop;
      own[q] = exists[q] && place + q >= run.own && place + q < run.end;
    }
    kept_part = (long long)p.knobs[4] * F;
    kept_line = (long long)s.places * F;
    // Every role keeps states of its own, and so does every block, whatever the axis that others are at.
    kept = (float*)p.scratch[2] + ((long long)me.b * ROLES + me.role) * p.knobs[4] * p.channels +
           (me.channel / F) * kept_part + place * F;
    const int group = TAP_GROUPS > 1 ? min(me.vector * V / (p.channels / p.groups), TAP_GROUPS - 1) : 0;
    weights_at = group * (run.stop - run.start) + place - run.start;
  }

  // What both passes read, from `line` on.
  __device__ __forceinline__ void start_inputs(const Params& p, const Self& me, int d, int line) {
    x = stream_of(p.x, s, me.b, 0, me.channel, line, place);
    if (HAS_LAM) lam = stream_of(p.lam, s, me.b, d, me.channel, line, place);
#if OWN_TAPS
    taps = stream_of(p.taps, s, me.b, d, me.channel, line, place);
    tap_vector = INTERLEAVED ? V : p.taps.k;
#endif
  }

  // What the adjoint reads besides, from `line` on.
  __device__ __forceinline__ void start_adjoint(const Params& p, const Self& me, int d, int line, void* dx_sums) {
    dy = stream_of(p.dy, s, me.b, 0, me.channel, line, place);
    if (HAS_GATE) gate = stream_of(p.gate, s, me.b, d, me.channel, line, place);
    if (READS_STATES) hidden = stream_of(p.y, s, me.b, d, me.channel, line - 1, place);
    if (SUMS_COME) read = sums_to(p, me, line, dx_sums);
  }

  // What the adjoint writes, from `line` on backwards.
  __device__ __forceinline__ void start_written(const Params& p, const Self& me, int d, int line, void* dx_sums) {
    if (NEED_DX) dx = stream_of(p.dx, s, me.b, 0, me.channel, line, place);
    if (NEED_DLAM) dlam = stream_of(p.dlam, s, me.b, d, me.channel, line, place);
    if (NEED_DGATE) dgate = stream_of(p.dgate, s, me.b, d, me.channel, line, place);
#if OWN_TAPS
    if (NEED_DTAPS) dtaps = stream_of(p.dtaps, s, me.b, d, me.channel, line, place);
    dtap_vector = INTERLEAVED ? V : p.dtaps.k;
#endif
    if (SUMS_COME) write = sums_to(p, me, line, dx_sums);
  }

  // Sums of float32 tensors are in dx itself, unless those of the axes are apart.
  __device__ __forceinline__ Sums sums_to(const Params& p, const Self& me, int line, void* dx_sums) const {
    if (STORAGE != 0 || dx_sums != nullptr)
      return sums_of(p, dx_sums, s, me.b, me.channel - (PART_STEP > F ? me.vector * (V - F) : 0), line, place);
    const Stream to = stream_of(p.dx, s, me.b, 0, me.channel, line, place);
    return {(float*)to.at, to.line, to.place};
  }

  // Sets the operands of pass 1 on their way.
  __device__ __forceinline__ void copy_inputs(int slot_at) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      const int bytes = exists[q] ? VECTOR : 0;
      copy_async<VECTOR>(operand(slot_at, 0, q), x.at + q * x.place, bytes);
      if (HAS_LAM) copy_async<VECTOR>(operand(slot_at, 1, q), lam.at + q * lam.place, bytes);
#if OWN_TAPS
#pragma unroll
      for (int k = 0; k < 3; k++)
        copy_async<VECTOR>(operand(slot_at, TAPS + k, q), taps.at + q * taps.place + k * tap_vector, bytes);
#endif
    }
  }

  // Those of pass 2, which stay for the way back. Nothing enters the `first` line of a scan.
  __device__ __forceinline__ void copy_line(int slot, bool add, bool first) const {
    copy_inputs(slot * SLOT);
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      const int bytes = exists[q] ? VECTOR : 0;
      copy_async<VECTOR>(operand(slot * SLOT, DY, q), dy.at + q * dy.place, bytes);
      if (HAS_GATE) copy_async<VECTOR>(operand(slot * SLOT, GATE, q), gate.at + q * gate.place, bytes);
      if (READS_STATES)
        copy_async<VECTOR>(operand(slot * SLOT, HIDDEN, q), hidden.at + q * hidden.place, first ? 0 : bytes);
      if (SUMS_COME && add)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          copy_async<4 * F>(floats(sums_at(slot), q) + part * THREADS, read.at + q * read.place + part * PART_STEP,
                            own[q] ? 4 * F : 0);
    }
  }

  // The state before a segment; 0 before the first.
  __device__ __forceinline__ void copy_kept(int parity, int segment, bool zero) const {
    const float* from = kept + segment * kept_line;
#pragma unroll
    for (int q = 0; q < PLACES; q++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        copy_async<4 * F>(floats(kept_at(parity), q) + part * THREADS, from + part * kept_part + q * F,
                          exists[q] && !zero ? 4 * F : 0);
  }

  __device__ __forceinline__ void keep(int segment, const float (&h)[PLACES][V]) const {
    float* to = kept + segment * kept_line;
#pragma unroll
    for (int q = 0; q < PLACES; q++)
      if (own[q]) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) store_part(to + part * kept_part + q * F, h[q] + part * F);
      }
  }

  __device__ __forceinline__ void move_inputs(int lines) {
    x.at += lines * x.line;
    if (HAS_LAM) lam.at += lines * lam.line;
#if OWN_TAPS
    taps.at += lines * taps.line;
#endif
  }
  __device__ __forceinline__ void move_read(int lines) {
    move_inputs(lines);
    dy.at += lines * dy.line;
    if (HAS_GATE) gate.at += lines * gate.line;
    if (READS_STATES) hidden.at += lines * hidden.line;
    if (SUMS_COME) read.at += lines * read.line;
  }

  // On to the line before, in all that is written.
  __device__ __forceinline__ void next_written() {
    if (NEED_DX) dx.at -= dx.line;
    if (NEED_DLAM) dlam.at -= dlam.line;
    if (NEED_DGATE) dgate.at -= dgate.line;
#if OWN_TAPS
    if (NEED_DTAPS) dtaps.at -= dtaps.line;
#endif
    if (SUMS_COME) write.at -= write.line;
  }

  // Neighbours' values: `first` of the thread after, `last` of the thread before; 0 where there is no place.
  __device__ __forceinline__ void shift(const float* first, const float* last, float* before, float* after) const {
#pragma unroll
    for (int v = 0; v < V; v++) {
      before[v] = __shfl_up_sync(~0u, last[v], LANES);
      after[v] = __shfl_down_sync(~0u, first[v], LANES);
    }
  }
  __device__ __forceinline__ void cut(float* before, float* after) const {
#pragma unroll
    for (int v = 0; v < V; v++) {
      before[v] = has_before ? before[v] : 0.f;
      after[v] = has_after ? after[v] : 0.f;
    }
  }
  // Is the place before, or after, another warp's?
  __device__ __forceinline__ bool first_lanes() const { return STRIPS > 1 && threadIdx.x % 32 < LANES && has_before; }
  __device__ __forceinline__ bool last_lanes() const {
    return STRIPS > 1 && threadIdx.x % 32 >= 32 - LANES && has_after;
  }

  // The values beside a line of states in shared memory, which all warps have written.
  __device__ __forceinline__ void beside_states(int at, const float (&h)[PLACES][V], float* before,
                                                float* after) const {
    shift(h[0], h[PLACES - 1], before, after);
    if (first_lanes()) load_floats(floats(at, PLACES - 1) - STEP, THREADS, before);
    if (last_lanes()) load_floats(floats(at, 0) + STEP, THREADS, after);
    cut(before, after);
  }

#if HAS_HIDDEN
  // The states that enter a line, of the thread's places and of those beside them; all warps have theirs.
  __device__ __forceinline__ void entering(int slot_at, float (&h)[PLACES][V], float* before, float* after) const {
    if (!READS_STATES) {
      clear(h);
#pragma unroll
      for (int v = 0; v < V; v++) before[v] = after[v] = 0.f;
      return;
    }
#pragma unroll
    for (int q = 0; q < PLACES; q++) unpack(*operand(slot_at, HIDDEN, q), h[q]);
    shift(h[0], h[PLACES - 1], before, after);
    if (first_lanes()) unpack(*(operand(slot_at, HIDDEN, PLACES - 1) - STEP), before);
    if (last_lanes()) unpack(*(operand(slot_at, HIDDEN, 0) + STEP), after);
    cut(before, after);
  }

  // The state after the last line of the scan.
  __device__ __forceinline__ void last_state(const Params& p, const Self& me, int d, float (&h)[PLACES][V]) const {
    const Stream from = stream_of(p.y, s, me.b, d, me.channel, s.lines - 1, place);
#pragma unroll
    for (int q = 0; q < PLACES; q++)
      if (exists[q]) unpack(*(const Vector*)(from.at + q * from.place), h[q]);
  }
#endif

  // Values that the warps' outer places show to each other: `first` to the warp before, `last` to the one after.
  __device__ __forceinline__ static Floats* edge(int parity, int side, int warp) {
    return (Floats*)(shared_memory() + EDGES_AT) +
           (((parity * 2 + side) * WARPS + warp) * LANES + threadIdx.x % LANES) * PARTS;
  }
  __device__ __forceinline__ void show_edges(int parity, const float* first, const float* last) const {
    if (first_lanes()) store_floats(edge(parity, 0, threadIdx.x / 32), 1, first);
    if (last_lanes()) store_floats(edge(parity, 1, threadIdx.x / 32), 1, last);
  }
  // After a barrier; `first` and `last` as shown.
  __device__ __forceinline__ void beside_edges(int parity, const float* first, const float* last, float* before,
                                               float* after) const {
    shift(first, last, before, after);
    if (first_lanes()) load_floats(edge(parity, 1, threadIdx.x / 32 - ROW_WARPS), 1, before);
    if (last_lanes()) load_floats(edge(parity, 0, threadIdx.x / 32 + ROW_WARPS), 1, after);
    cut(before, after);
  }

  // u = lam x.
  __device__ __forceinline__ void input(int slot_at, int q, float* u) const {
    unpack(*operand(slot_at, 0, q), u);
#if HAS_LAM
    float l[V];
    unpack(*operand(slot_at, 1, q), l);
#pragma unroll
    for (int v = 0; v < V; v++) u[v] *= l[v];
#endif
  }

  // h of the next line: its inputs are `u`, the line's neighbours `before` and `after`.
  __device__ __forceinline__ void step(int slot_at, int row, bool restart, const float (&u)[PLACES][V], float* before,
                                       const float* after, float (&h)[PLACES][V]) const {
    if (restart) {
#pragma unroll
      for (int q = 0; q < PLACES; q++)
#pragma unroll
        for (int v = 0; v < V; v++) h[q][v] = u[q][v];
      return;
    }
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float weight[PER_PLACE];
      weights(slot_at, row, q, weight);
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float here = h[q][v], next = q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v];
        const Taps w = weight_of(weight, v);
        const float sum = fmaf(w.before, before[v], fmaf(w.after, next, fmaf(w.here, here, u[q][v])));
        // What lies beyond the last place is 0, so that nothing of it comes back as 0 * inf.
        h[q][v] = q > 0 && !exists[q] ? 0.f : sum;
        before[v] = here;
      }
    }
  }

#if OWN_TAPS
  static constexpr int PER_PLACE = 3 * V;
  __device__ __forceinline__ void raw_taps(int slot_at, int q, float* raw) const {
#pragma unroll
    for (int k = 0; k < 3; k++) unpack(*operand(slot_at, TAPS + k, q), raw + k * V);
  }
  __device__ __forceinline__ void weights(int slot_at, int, int q, float* weight) const {
    float raw[3 * V];
    raw_taps(slot_at, q, raw);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps w = tap_weights(own_taps(raw, v), place + q > 0, place + q + 1 < s.places);
      weight[3 * v] = w.before, weight[3 * v + 1] = w.here, weight[3 * v + 2] = w.after;
    }
  }
  __device__ __forceinline__ static Taps weight_of(const float* weight, int v) {
    return {weight[3 * v], weight[3 * v + 1], weight[3 * v + 2]};
  }
#else
  static constexpr int PER_PLACE = 3;
  // Of the place `q` in row `row` of the stages' weights.
  __device__ __forceinline__ void weights(int, int row, int q, float* weight) const {
    const Weights* from =
        (const Weights*)(shared_memory() + WEIGHTS_AT) + row * TAP_GROUPS * (run.stop - run.start) + weights_at + q;
    Weights w = {0.f, 0.f, 0.f, 0.f};
    if (exists[q]) w = *from;
    weight[0] = w.before, weight[1] = w.here, weight[2] = w.after;
  }
  __device__ __forceinline__ static Taps weight_of(const float* weight, int) {
    return {weight[0], weight[1], weight[2]};
  }
#endif
};
