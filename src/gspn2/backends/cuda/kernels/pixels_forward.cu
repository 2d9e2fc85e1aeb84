// Forward for channels that are adjacent in memory: y = sum over directions of gate h (see pixels.cuh).
//
// One role: a block runs direction after direction. Two roles: while one block scans the first half of the lines
// forwards, its partner scans the second half backwards; then they hand over their states and turn round, so that
// each meets the half it has just read. Four roles: both axes do so at the same time.
//
// More macros: DEPTH lines of the ring, at least 2; SUM 1 if there is more than one direction.
// Knobs: those of Layout.
// Scratch: 0 float32 sums over directions (16-bit storage), 1 those of the horizontal directions (four roles).
#include "pixels.cuh"

constexpr int TAP_VECTORS = OWN_TAPS ? 3 : 0;
constexpr int OPERANDS = 1 + HAS_LAM + HAS_GATE + TAP_VECTORS;
constexpr int GATE = 1 + HAS_LAM;
#if OWN_TAPS
constexpr int TAPS = 1 + HAS_LAM + HAS_GATE;
#endif
constexpr int EDGES = PLACES > 1 ? 2 : 1;  // places of a thread that others look at

// Where things are in shared memory, in bytes; weights of shared taps come last.
constexpr int PITCH = THREADS + 2 * VECTORS;
constexpr int FLOATS = 4 * V * PLACES * THREADS;
constexpr int SLOT = OPERANDS * PLACES * THREADS * VECTOR;
constexpr int SUMS_AT = DEPTH * SLOT;                             // [DEPTH][PLACES][PARTS][THREADS]
constexpr int PUBLISHED_AT = SUMS_AT + SUM * DEPTH * FLOATS;      // [2][EDGES][PARTS][PITCH]: states at a thread's edges
constexpr int CARRIED_AT = PUBLISHED_AT + 8 * V * EDGES * PITCH;  // [PLACES][PARTS][THREADS]: from the partner
constexpr int HALO_AT = CARRIED_AT + (ROLES > 1) * FLOATS;        // [2][2][HALO][PARTS][VECTORS]: from both neighbours
constexpr int WEIGHTS_AT = HALO_AT + SPLIT * 16 * V * HALO * VECTORS;

__device__ __forceinline__ Floats* published(int parity) {
  return (Floats*)(shared_memory() + PUBLISHED_AT) + parity * EDGES * PARTS * PITCH + VECTORS + threadIdx.x;
}
__device__ __forceinline__ Floats* carried(int q) {
  return (Floats*)(shared_memory() + CARRIED_AT) + q * PARTS * THREADS + threadIdx.x;
}

// Lines [begin, end) of direction d. `add` to the sums that are there; `last`: the sum is y; `resume`: the state
// comes from the partner.
struct Phase {
  int d, begin, end;
  bool add, last, resume;
  void* sums;
  int exchanges;  // of halos between lines, the same for all blocks of the cluster
};

// One thread's part in a phase.
struct Scanner {
  Run run;
  Scan s;
  int place;               // along the line, the thread's first
  int before_at, after_at;  // published neighbours, from the thread's own
  bool exists[PLACES], own[PLACES];
  Stream x, lam, gate, y;  // x, lam, gate: the next line to copy; y: the next to write
#if OWN_TAPS
  Stream taps;
  long long tap_vector;    // elements between the three vectors of a place's taps
#endif
#if SUM
  Sums read, write;
#endif

  __device__ __forceinline__ void start(const Params& p, const Layout& layout, const Self& me, const Phase& phase) {
    s = scan_of(p, phase.d);
    run = run_of(layout, s, me.split);
    place = run.start + me.column * PLACES;
    before_at = beside(place > 0, -VECTORS);
    after_at = beside(place + PLACES < s.places, VECTORS);
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      exists[q] = me.present && place + q < run.stop;
      own[q] = exists[q] && place + q >= run.own && place + q < run.end;
    }
    x = stream_of(p.x, s, me.b, 0, me.channel, phase.begin, place);
    y = stream_of(p.y, s, me.b, 0, me.channel, phase.begin, place);
    if (HAS_LAM) lam = stream_of(p.lam, s, me.b, phase.d, me.channel, phase.begin, place);
    if (HAS_GATE) gate = stream_of(p.gate, s, me.b, phase.d, me.channel, phase.begin, place);
#if OWN_TAPS
    taps = stream_of(p.taps, s, me.b, phase.d, me.channel, phase.begin, place);
    tap_vector = INTERLEAVED ? V : p.taps.k;
#endif
#if SUM && STORAGE == 0
    if (phase.sums == nullptr)
      read = {y.at, y.line, y.place};
    else
      read = sums_of(p, phase.sums, s, me.b, me.channel, phase.begin, place);
    write = read;
#elif SUM
    read = write = sums_of(p, phase.sums, s, me.b, me.channel, phase.begin, place);
#endif
  }

  __device__ __forceinline__ Vector* ring(int slot, int operand, int q) const {
    return (Vector*)(shared_memory() + slot * SLOT) + (operand * PLACES + q) * THREADS + threadIdx.x;
  }
  __device__ __forceinline__ Floats* ring_sum(int slot, int q) const {
    return (Floats*)(shared_memory() + SUMS_AT + slot * FLOATS) + q * PARTS * THREADS + threadIdx.x;
  }

  // Sets a line's operands on their way, and goes on to the next line.
  __device__ __forceinline__ void copy(int slot, bool add) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      const int bytes = exists[q] ? VECTOR : 0;
      copy_async<VECTOR>(ring(slot, 0, q), x.at + q * x.place, bytes);
      if (HAS_LAM) copy_async<VECTOR>(ring(slot, 1, q), lam.at + q * lam.place, bytes);
      if (HAS_GATE) copy_async<VECTOR>(ring(slot, GATE, q), gate.at + q * gate.place, own[q] ? VECTOR : 0);
#if OWN_TAPS
#pragma unroll
      for (int k = 0; k < 3; k++) copy_async<VECTOR>(ring(slot, TAPS + k, q), taps.at + q * taps.place + k * tap_vector, bytes);
#endif
#if SUM
      if (add)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          copy_async<4 * F>(ring_sum(slot, q) + part * THREADS, read.at + q * read.place + part * F, own[q] ? 4 * F : 0);
#endif
    }
    x.at += x.line;
    if (HAS_LAM) lam.at += lam.line;
    if (HAS_GATE) gate.at += gate.line;
#if OWN_TAPS
    taps.at += taps.line;
#endif
#if SUM
    read.at += read.line;
#endif
  }

  // u = lam x of a line that has arrived.
  __device__ __forceinline__ void inputs(int slot, float (&u)[PLACES][V]) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      unpack(*ring(slot, 0, q), u[q]);
#if HAS_LAM
      float l[V];
      unpack(*ring(slot, 1, q), l);
#pragma unroll
      for (int v = 0; v < V; v++) u[q][v] *= l[v];
#endif
    }
  }

  // Weights of a line that has arrived: `weight[q][3 v + k]` with taps of their own, else `weight[q][k]`.
#if OWN_TAPS
  __device__ __forceinline__ void weights(int slot, float (&weight)[PLACES][3 * V]) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float raw[3 * V];
#pragma unroll
      for (int k = 0; k < 3; k++) unpack(*ring(slot, TAPS + k, q), raw + k * V);
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Taps w = tap_weights(own_taps(raw, v), place + q > 0, place + q + 1 < s.places);
        weight[q][3 * v] = w.before, weight[q][3 * v + 1] = w.here, weight[q][3 * v + 2] = w.after;
      }
    }
  }
  static constexpr int PER_PLACE = 3 * V;
  __device__ __forceinline__ static Taps weight_of(const float* weight, int v) {
    return {weight[3 * v], weight[3 * v + 1], weight[3 * v + 2]};
  }
#else
  __device__ __forceinline__ void weights(const TapStages& stages, int line, int group, float (&weight)[PLACES][3]) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      Weights w = {0.f, 0.f, 0.f, 0.f};
      if (exists[q]) w = *stages.of(line, group, place - run.start + q);
      weight[q][0] = w.before, weight[q][1] = w.here, weight[q][2] = w.after;
    }
  }
  static constexpr int PER_PLACE = 3;
  __device__ __forceinline__ static Taps weight_of(const float* weight, int v) { return {weight[0], weight[1], weight[2]}; }
#endif

  // The states at a thread's edges, for the threads beside it.
  __device__ __forceinline__ void publish(int parity, const float (&h)[PLACES][V]) const {
    Floats* mine = published(parity);
    store_floats(mine, PITCH, h[0]);
    if (PLACES > 1) store_floats(mine + PARTS * PITCH, PITCH, h[PLACES - 1]);
  }

  // h = taps over the previous line's h, plus u.
  __device__ __forceinline__ void step(int parity, const float (&u)[PLACES][V], const float (&weight)[PLACES][PER_PLACE],
                                       float (&h)[PLACES][V]) const {
    const Floats* firsts = published(parity);
    const Floats* lasts = firsts + (EDGES - 1) * PARTS * PITCH;
    float before[V], after[V];
    load_floats(lasts + before_at, PITCH, before);
    load_floats(firsts + after_at, PITCH, after);
#pragma unroll
    for (int q = 0; q < PLACES; q++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Taps w = weight_of(weight[q], v);
        const float here = h[q][v];
        float sum = fmaf(w.here, here, u[q][v]);
        sum = fmaf(w.after, q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v], sum);
        h[q][v] = fmaf(w.before, before[v], sum);
        before[v] = here;
      }
    // A place that is none must not hand a neighbour's infinity back as 0 * inf.
    if (PLACES > 1)
#pragma unroll
      for (int q = 0; q < PLACES; q++)
#pragma unroll
        for (int v = 0; v < V; v++) h[q][v] = exists[q] ? h[q][v] : 0.f;
  }

  // y, or the sum so far, of the line that was computed; goes on to the next.
  __device__ __forceinline__ void emit(int slot, bool add, bool last, const float (&h)[PLACES][V]) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float out[V];
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = 0.f;
#if SUM
      if (add) load_floats(ring_sum(slot, q), THREADS, out);
#endif
#if HAS_GATE
      float g[V];
      unpack(*ring(slot, GATE, q), g);
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = fmaf(h[q][v], g[v], out[v]);
#else
#pragma unroll
      for (int v = 0; v < V; v++) out[v] += h[q][v];
#endif
      if (!own[q]) continue;
      if (!SUM || last) *(Vector*)(y.at + q * y.place) = pack(out);
#if SUM
      else
        store_floats((Floats*)(write.at + q * write.place), 1, out);
#endif
    }
    y.at += y.line;
#if SUM
    write.at += write.line;
#endif
  }
};

// The lines of a phase. `h` is the state before the first of them, unless the scan starts there.
__device__ __forceinline__ void run_phase(const Params& p, const Layout& layout, const Self& me,
                                          const Phase& phase, float (&h)[PLACES][V]) {
  Scanner scan;
  scan.start(p, layout, me, phase);
  const int lines = phase.end - phase.begin;
#pragma unroll
  for (int line = 0; line < DEPTH; line++) {
    if (line < lines) scan.copy(line, phase.add);
    copy_commit();
  }
#if !OWN_TAPS
  const int group_channels = p.channels / p.groups;
  const int first_group = (me.channel - me.vector * V) / group_channels;
  const int group = TAP_GROUPS > 1 ? min(me.vector * V / group_channels, TAP_GROUPS - 1) : 0;
  TapStages stages;
  stages.start(p, scan.s, scan.run, me.b, phase.d, first_group, phase.begin, phase.end, (Weights*)(shared_memory() + WEIGHTS_AT));
  stages.fetch(0);
  stages.turn(0);
  stages.fetch(1);
#endif
#if SPLIT
  if (phase.resume) exchange_halos<HALO_AT>(layout, me, scan.run, scan.place, 1, h);
#endif
  scan.publish(0, h);
  copy_wait<DEPTH - 1>();
  float u[PLACES][V], weight[PLACES][Scanner::PER_PLACE];
  scan.inputs(0, u);
  __syncthreads();
#if OWN_TAPS
  scan.weights(0, weight);
#else
  scan.weights(stages, 0, group, weight);
#endif

  int since = phase.begin % p.chunk;  // lines since the last restart
  int until = HALO, exchanged = 0;
  int slot = 0;
  for (int line = 0; line < lines; line++) {
#if !OWN_TAPS
    if (line % TAP_LINES == 0) {
      stages.turn(line / TAP_LINES + 1);
      stages.fetch(line / TAP_LINES + 2);
    }
#endif
    if (since == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++)
#pragma unroll
        for (int v = 0; v < V; v++) h[q][v] = u[q][v];
    } else {
      scan.step(line & 1, u, weight, h);
    }
    since = since + 1 == p.chunk ? 0 : since + 1;
#if SPLIT
    if (--until == 0) {
      until = HALO;
      if (exchanged < phase.exchanges) exchange_halos<HALO_AT>(layout, me, scan.run, scan.place, exchanged++ & 1, h);
    }
#endif
    scan.publish((line + 1) & 1, h);
    scan.emit(slot, phase.add, phase.last, h);
    const int next = slot + 1 == DEPTH ? 0 : slot + 1;
    copy_wait<DEPTH - 2>();
    scan.inputs(next, u);
#if OWN_TAPS
    scan.weights(next, weight);
#else
    scan.weights(stages, line + 1, group, weight);
#endif
    if (line + DEPTH < lines) scan.copy(slot, phase.add);
    copy_commit();
    slot = next;
    __syncthreads();
  }
#if SPLIT
#pragma unroll 1
  while (exchanged++ < phase.exchanges) cluster_barrier();
#endif
  copy_wait<0>();
  // The next phase overwrites what others may still look at, and reads sums that other blocks wrote.
  __syncthreads();
}

// How often halos are exchanged while the longest part of a phase has `lines` lines.
__device__ __forceinline__ int exchanges_of(const Layout& layout, int lines) {
  return SPLIT ? (lines - 1) / HALO : 0;
}

#if ROLES > 1
// Both directions of an axis, by two roles that meet in the middle: `forwards` and `backwards` are their indices.
__device__ __forceinline__ void run_axis(const Params& p, const Layout& layout, const Self& me,
                                         int forwards, int backwards, bool add, bool last, void* sums) {
  const int lines = scan_of(p, forwards).lines, middle = (lines + 1) / 2;
  const int half = me.role & 1, partner = (me.role ^ 1) * layout.splits + me.split;
  float h[PLACES][V];
  clear(h);
  Phase phase;
  phase.sums = sums;
  // With four roles the other axis runs along, through the same barriers.
  phase.exchanges = exchanges_of(layout, ROLES == 4 ? (max(p.height, p.width) + 1) / 2 : middle);
#pragma unroll 1
  for (int turn = 0; turn < 2; turn++) {
    phase.d = half == turn ? forwards : backwards;
    phase.begin = turn == 0 ? 0 : half == 0 ? lines - middle : middle;
    phase.end = turn == 1 ? lines : half == 0 ? middle : lines - middle;
    phase.add = add || turn == 1;
    phase.last = last && turn == 1;
    phase.resume = turn == 1;
    run_phase(p, layout, me, phase, h);
    if (turn == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++)
        store_floats(cluster_map(carried(q), partner), THREADS, h[q]);
    }
    cluster_barrier();
    if (turn == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++) load_floats(carried(q), THREADS, h[q]);
    }
  }
}

#endif

KERNEL(THREADS, MIN_BLOCKS) pixels_forward(CONSTANT_PARAMS p) {
  const Layout layout = layout_of(p);
  const Self me = self_of(p, layout);
  for (int i = threadIdx.x; i < 2 * EDGES * PARTS * PITCH; i += THREADS) {
    Floats zero;
#pragma unroll
    for (int e = 0; e < F; e++) zero.e[e] = 0.f;
    ((Floats*)(shared_memory() + PUBLISHED_AT))[i] = zero;
  }
  __syncthreads();
  void* const sums = STORAGE == 0 ? nullptr : p.scratch[0];
#if ROLES > 1
  const bool vertical = index_of(p, 0) >= 0, horizontal = index_of(p, 2) >= 0;
#pragma unroll 1
  for (int axis = 0; axis < 2; axis++) {
    if (!(axis == 0 ? vertical : horizontal) || (ROLES == 4 && me.role / 2 != axis)) continue;
    run_axis(p, layout, me, index_of(p, 2 * axis), index_of(p, 2 * axis + 1), ROLES == 2 && axis == 1 && vertical,
             ROLES == 2 && (axis == 1 || !horizontal), ROLES == 4 && axis == 1 ? p.scratch[1] : sums);
  }
#if ROLES == 4
  add_axes(p, p.y, layout, me);
#endif
#else
#pragma unroll 1
  for (int d = 0; d < p.scans; d++) {
    float h[PLACES][V];
    clear(h);
    const int lines = scan_of(p, d).lines;
    run_phase(p, layout, me, {d, 0, lines, d > 0, d + 1 == p.scans, false, sums, exchanges_of(layout, lines)}, h);
#if CLUSTER
    cluster_barrier();
#endif
  }
#endif
}
