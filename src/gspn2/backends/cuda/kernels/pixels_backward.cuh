// What a block of pixels_backward has in shared memory, and one thread's operands in one direction.
#pragma once
#include "pixels.cuh"

constexpr int OPERANDS = 2 + HAS_LAM + HAS_GATE + (OWN_TAPS ? 3 : 0);
constexpr int DY = 1 + HAS_LAM, GATE = 2 + HAS_LAM;
#if OWN_TAPS
constexpr int TAPS = 2 + HAS_LAM + HAS_GATE;
#endif

// Where things are in shared memory, in bytes.
constexpr int PITCH = (THREADS + 2 * VECTORS + 3) / 4 * 4;  // so that what follows starts at a multiple of 16 bytes
constexpr int FLOATS = 4 * V * PLACES * THREADS;
constexpr int SLOT = OPERANDS * PLACES * THREADS * VECTOR;
constexpr int ROW = 4 * V * PLACES * PITCH;                      // a line's states: [PLACES][PARTS][PITCH]
constexpr int SUMS_AT = DEPTH * SLOT;                            // [DEPTH][PLACES][PARTS][THREADS]
constexpr int STATES_AT = SUMS_AT + DEPTH * FLOATS;              // [SEGMENT + 1] rows
constexpr int AFTER_AT = STATES_AT + (SEGMENT + 1) * ROW;        // [2][PARTS][PITCH]: w_after g of a last place
constexpr int HALO_AT = AFTER_AT + OWN_TAPS * 8 * V * PITCH;
#if SPLIT
constexpr int GRADIENTS_AT = HALO_AT + HALO_BYTES;               // [SEGMENT][3][PLACES][THREADS]: of taps
#else
constexpr int GRADIENTS_AT = HALO_AT;
#endif
#if !OWN_TAPS
constexpr int WEIGHTS_AT = GRADIENTS_AT + SEGMENT * 12 * PLACES * THREADS;
static_assert(WEIGHTS_AT % 16 == 0, "weights are vectors");
#endif
static_assert(STATES_AT % 16 == 0 && AFTER_AT % 16 == 0 && HALO_AT % 16 == 0, "states are vectors");

__device__ __forceinline__ Floats* states(int k, int q) {
  return (Floats*)(shared_memory() + STATES_AT + k * ROW) + q * PARTS * PITCH + VECTORS + threadIdx.x;
}
__device__ __forceinline__ Vector* ring(int slot, int operand, int q) {
  return (Vector*)(shared_memory() + slot * SLOT) + (operand * PLACES + q) * THREADS + threadIdx.x;
}
__device__ __forceinline__ Floats* ring_sum(int slot, int q) {
  return (Floats*)(shared_memory() + SUMS_AT + slot * FLOATS) + q * PARTS * THREADS + threadIdx.x;
}
__device__ __forceinline__ float* gradient(int k, int tap, int q, int thread) {
  return (float*)(shared_memory() + GRADIENTS_AT) + ((k * 3 + tap) * PLACES + q) * THREADS + thread;
}

// A thread's part in one direction. The streams that are read stand at the line to be copied next, those that are
// written at the line to be written next.
struct Walker {
  Scan s;
  Run run;
  int place, before_at, after_at;
  bool exists[PLACES], own[PLACES];
  Stream x, lam, gate, dy, dx, dlam, dgate;
#if OWN_TAPS
  Stream taps, dtaps;
  long long tap_vector, dtap_vector;
#endif
  Sums read, write;
  float* kept;        // (segments, places, channels) of this role's direction
  int kept_line;
  int weights_at;     // of the thread's first place in a row of the stages' weights

  __device__ __forceinline__ void start(const Params& p, const Layout& layout, const Self& me, int d) {
    s = scan_of(p, d);
    run = run_of(layout, s, me.split);
    place = run.start + me.column * PLACES;
    before_at = beside(place > 0, -VECTORS);
    after_at = beside(place + PLACES < s.places, VECTORS);
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      exists[q] = me.present && place + q < run.stop;
      own[q] = exists[q] && place + q >= run.own && place + q < run.end;
    }
    kept_line = p.channels * s.places;
    // Every role keeps states of its own.
    kept = (float*)p.scratch[2] + (((long long)me.b * ROLES + me.role) * p.knobs[4] + place) * p.channels + me.channel;
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

  // What the adjoint reads and writes, from `line` on backwards.
  __device__ __forceinline__ void start_adjoint(const Params& p, const Self& me, int d, int line, void* dx_sums) {
    dy = stream_of(p.dy, s, me.b, 0, me.channel, line, place);
    if (HAS_GATE) gate = stream_of(p.gate, s, me.b, d, me.channel, line, place);
    if (NEED_DX) dx = stream_of(p.dx, s, me.b, 0, me.channel, line, place);
    if (NEED_DLAM) dlam = stream_of(p.dlam, s, me.b, d, me.channel, line, place);
    if (NEED_DGATE) dgate = stream_of(p.dgate, s, me.b, d, me.channel, line, place);
#if OWN_TAPS
    if (NEED_DTAPS) dtaps = stream_of(p.dtaps, s, me.b, d, me.channel, line, place);
    dtap_vector = INTERLEAVED ? V : p.dtaps.k;
#endif
    if (NEED_DX && SUM) {
      if (STORAGE == 0 && dx_sums == nullptr)
        read = {(float*)dx.at, dx.line, dx.place};
      else
        read = sums_of(p, dx_sums, s, me.b, me.channel, line, place);
      write = read;
    }
  }

  // Sets the operands of the way forward on their way.
  __device__ __forceinline__ void copy_inputs(int slot) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      const int bytes = exists[q] ? VECTOR : 0;
      copy_async<VECTOR>(ring(slot, 0, q), x.at + q * x.place, bytes);
      if (HAS_LAM) copy_async<VECTOR>(ring(slot, 1, q), lam.at + q * lam.place, bytes);
#if OWN_TAPS
#pragma unroll
      for (int k = 0; k < 3; k++)
        copy_async<VECTOR>(ring(slot, TAPS + k, q), taps.at + q * taps.place + k * tap_vector, bytes);
#endif
    }
  }
  template <int STEP>
  __device__ __forceinline__ void move_inputs() {
    x.at += STEP * x.line;
    if (HAS_LAM) lam.at += STEP * lam.line;
#if OWN_TAPS
    taps.at += STEP * taps.line;
#endif
  }

  // The other operands of the way back.
  __device__ __forceinline__ void copy_adjoint(int slot, bool add) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      const int bytes = exists[q] ? VECTOR : 0;
      copy_async<VECTOR>(ring(slot, DY, q), dy.at + q * dy.place, bytes);
      if (HAS_GATE) copy_async<VECTOR>(ring(slot, GATE, q), gate.at + q * gate.place, bytes);
      if (NEED_DX && SUM && add)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          copy_async<4 * F>(ring_sum(slot, q) + part * THREADS, read.at + q * read.place + part * F,
                            own[q] ? 4 * F : 0);
    }
    dy.at -= dy.line;
    if (HAS_GATE) gate.at -= gate.line;
    if (NEED_DX && SUM) read.at -= read.line;
  }

  // The state before a segment.
  __device__ __forceinline__ void copy_kept(int slot, int segment, int channels) const {
    const float* from = kept + (long long)segment * kept_line;
#pragma unroll
    for (int q = 0; q < PLACES; q++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        copy_async<4 * F>(ring_sum(slot, q) + part * THREADS, from + q * channels + part * F, exists[q] ? 4 * F : 0);
  }

  // On to the line before, in all that is written.
  __device__ __forceinline__ void next_written() {
    if (NEED_DX) dx.at -= dx.line;
    if (NEED_DLAM) dlam.at -= dlam.line;
    if (NEED_DGATE) dgate.at -= dgate.line;
#if OWN_TAPS
    if (NEED_DTAPS) dtaps.at -= dtaps.line;
#endif
    if (NEED_DX && SUM) write.at -= write.line;
  }

  // h of the line after that of states row `k`, into row `to`. `row`: of the stages' weights.
  __device__ __forceinline__ void step(int slot, int row, int k, int to, bool restart, float (&h)[PLACES][V]) const {
    float before[V], after[V];
    load_floats(states(k, PLACES - 1) + before_at, PITCH, before);
    load_floats(states(k, 0) + after_at, PITCH, after);
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float u[V];
      input(slot, q, u);
      float weight[PER_PLACE];
      weights(slot, row, q, weight);
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float here = h[q][v], next = q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v];
        const Taps w = weight_of(weight, v);
        const float sum = fmaf(w.before, before[v], fmaf(w.after, next, fmaf(w.here, here, u[v])));
        h[q][v] = restart ? u[v] : PLACES > 1 && !exists[q] ? 0.f : sum;
        before[v] = here;
      }
      store_floats(states(to, q), PITCH, h[q]);
    }
  }

  // u = lam x.
  __device__ __forceinline__ void input(int slot, int q, float* u) const {
    unpack(*ring(slot, 0, q), u);
#if HAS_LAM
    float l[V];
    unpack(*ring(slot, 1, q), l);
#pragma unroll
    for (int v = 0; v < V; v++) u[v] *= l[v];
#endif
  }

#if OWN_TAPS
  static constexpr int PER_PLACE = 3 * V;
  __device__ __forceinline__ void raw_taps(int slot, int q, float* raw) const {
#pragma unroll
    for (int k = 0; k < 3; k++) unpack(*ring(slot, TAPS + k, q), raw + k * V);
  }
  __device__ __forceinline__ void weights(int slot, int, int q, float* weight) const {
    float raw[3 * V];
    raw_taps(slot, q, raw);
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
  // Of the place `q` in row `row` of the stages' weights; it may be one of the neighbours' (-1, PLACES).
  __device__ __forceinline__ const Weights* weights_of(int row, int q) const {
    return (const Weights*)(shared_memory() + WEIGHTS_AT) + row * TAP_GROUPS * (run.stop - run.start) + weights_at + q;
  }
  __device__ __forceinline__ void weights(int, int row, int q, float* weight) const {
    Weights w = {0.f, 0.f, 0.f, 0.f};
    if (exists[q]) w = *weights_of(row, q);
    weight[0] = w.before, weight[1] = w.here, weight[2] = w.after;
  }
  __device__ __forceinline__ static Taps weight_of(const float* weight, int) {
    return {weight[0], weight[1], weight[2]};
  }
#endif
};
