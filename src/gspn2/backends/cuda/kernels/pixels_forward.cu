// Forward for channels that are adjacent in memory: y = sum over directions of gate h (see pixels.cuh).
//
// One role: a block runs direction after direction. Two roles: while one block scans the first half of the lines
// forwards, its partner scans the second half backwards; then they hand over their states and turn round, so that
// each meets the half it has just read. Four roles: both axes do so at the same time.
//
// More macros: DEPTH lines of the ring, at least 2; SUM 1 if there is more than one direction; THREADS, MIN_BLOCKS.
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

// Shared memory, in this order. Pitches are in elements of the type; `threads` is the size of the block.
struct Memory {
  int threads, pitch;
  Vector* ring;      // [DEPTH][OPERANDS][PLACES][threads]
  Floats* sums;      // [DEPTH][PLACES][PARTS][threads]
  Floats* published;  // [2][EDGES][PARTS][pitch]: states of the places at a thread's edges
  Floats* carried;   // [PLACES][PARTS][threads]: from the partner
  Floats* halo;      // [2][2][halo][PARTS][VECTORS]: from the neighbours on either side
  Weights* weights;
};

__device__ __forceinline__ Memory memory_of(const Layout& layout) {
  Memory m;
  m.threads = blockDim.x;
  m.pitch = m.threads + 2 * VECTORS;
  m.ring = (Vector*)shared_memory();
  m.sums = (Floats*)(m.ring + DEPTH * OPERANDS * PLACES * m.threads);
  m.weights = (Weights*)(m.sums + SUM * DEPTH * PLACES * PARTS * m.threads);
#if OWN_TAPS
  m.published = (Floats*)m.weights;
#else
  const int longest = max(layout.run[0], layout.run[1]) + (layout.splits > 1 ? 2 * layout.halo : 0);
  m.published = (Floats*)(m.weights + 2 * TAP_LINES * TAP_GROUPS * longest);
#endif
  m.carried = m.published + 2 * EDGES * PARTS * m.pitch;
  m.halo = m.carried + (layout.roles > 1) * PLACES * PARTS * m.threads;
  return m;
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
  Memory m;
  Run run;
  Scan s;
  int place;               // along the line, the thread's first
  bool exists[PLACES], own[PLACES];
  Stream x, lam, gate, y;  // x, lam, gate: the next line to copy; y: the next to write
#if OWN_TAPS
  Stream taps;
  long long tap_vector;    // elements between the three vectors of a place's taps
#endif
#if SUM
  Sums read, write;
#endif

  __device__ __forceinline__ void start(const Params& p, const Layout& layout, const Self& me, const Memory& memory,
                                        const Phase& phase) {
    m = memory;
    s = scan_of(p, phase.d);
    run = run_of(layout, s, me.split);
    place = run.start + me.column * PLACES;
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
    return m.ring + ((slot * OPERANDS + operand) * PLACES + q) * m.threads + threadIdx.x;
  }
  __device__ __forceinline__ Floats* ring_sum(int slot, int q) const {
    return m.sums + (slot * PLACES + q) * PARTS * m.threads + threadIdx.x;
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
          copy_async<4 * F>(ring_sum(slot, q) + part * m.threads, read.at + q * read.place + part * F, own[q] ? 4 * F : 0);
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
        const Taps a = INTERLEAVED ? Taps{raw[3 * v], raw[3 * v + 1], raw[3 * v + 2]} : Taps{raw[v], raw[V + v], raw[2 * V + v]};
        const Taps w = tap_weights(a, place + q > 0, place + q + 1 < s.places);
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
    Floats* mine = m.published + parity * EDGES * PARTS * m.pitch + VECTORS + threadIdx.x;
    store_floats(mine, m.pitch, h[0]);
    if (PLACES > 1) store_floats(mine + PARTS * m.pitch, m.pitch, h[PLACES - 1]);
  }

  // h = taps over the previous line's h, plus u. Beside the first and the last thread lie zeros.
  __device__ __forceinline__ void step(int parity, const float (&u)[PLACES][V], const float (&weight)[PLACES][PER_PLACE],
                                       float (&h)[PLACES][V]) const {
    const Floats* firsts = m.published + parity * EDGES * PARTS * m.pitch + VECTORS + threadIdx.x;
    const Floats* lasts = firsts + (EDGES - 1) * PARTS * m.pitch;
    float before[V], after[V];
    load_floats(lasts - VECTORS, m.pitch, before);
    load_floats(firsts + VECTORS, m.pitch, after);
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
  }

  // y, or the sum so far, of the line that was computed; goes on to the next.
  __device__ __forceinline__ void emit(int slot, bool add, bool last, const float (&h)[PLACES][V]) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float out[V];
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = 0.f;
#if SUM
      if (add) load_floats(ring_sum(slot, q), m.threads, out);
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

#if CLUSTER
// Neighbouring splits give each other the states that their halos need. Two buffers take turns, so one barrier is
// enough.
__device__ __forceinline__ void exchange_halos(const Layout& layout, const Self& me, const Scanner& scan, int parity,
                                               float (&h)[PLACES][V]) {
  const Run& r = scan.run;
  const int rank = me.role * layout.splits + me.split;
  const int side = layout.halo * PARTS * VECTORS;
  Floats* from_before = scan.m.halo + parity * 2 * side;
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    const int j = scan.place + q;
    if (!scan.own[q]) continue;
    if (me.split > 0 && j < r.own + layout.halo)
      store_floats(cluster_map(from_before + side + (j - r.own) * PARTS * VECTORS + me.vector, rank - 1), VECTORS, h[q]);
    if (r.stop > r.end && j >= r.end - layout.halo)
      store_floats(cluster_map(from_before + (j - r.end + layout.halo) * PARTS * VECTORS + me.vector, rank + 1), VECTORS, h[q]);
  }
  cluster_barrier();
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    const int j = scan.place + q;
    if (!scan.exists[q] || scan.own[q]) continue;
    const Floats* from = j < r.own ? from_before + (j - r.own + layout.halo) * PARTS * VECTORS
                                   : from_before + side + (j - r.end) * PARTS * VECTORS;
    load_floats(from + me.vector, VECTORS, h[q]);
  }
}
#endif

// The lines of a phase. `h` is the state before the first of them, unless the scan starts there.
__device__ __forceinline__ void run_phase(const Params& p, const Layout& layout, const Self& me, const Memory& memory,
                                          const Phase& phase, float (&h)[PLACES][V]) {
  Scanner scan;
  scan.start(p, layout, me, memory, phase);
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
  stages.start(p, scan.s, scan.run, me.b, phase.d, first_group, phase.begin, phase.end, memory.weights);
  stages.fetch(0);
  stages.turn(0);
  stages.fetch(1);
#endif
#if CLUSTER
  if (phase.resume && layout.splits > 1) exchange_halos(layout, me, scan, 1, h);
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
  int until = layout.halo, exchanged = 0;
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
#if CLUSTER
    if (--until == 0) {
      until = layout.halo;
      if (exchanged < phase.exchanges) exchange_halos(layout, me, scan, exchanged++ & 1, h);
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
#if CLUSTER
  while (exchanged++ < phase.exchanges) cluster_barrier();
#endif
  copy_wait<0>();
  // The next phase overwrites what others may still look at, and reads sums that other blocks wrote.
  __syncthreads();
}

__device__ __forceinline__ void clear(float (&h)[PLACES][V]) {
#pragma unroll
  for (int q = 0; q < PLACES; q++)
#pragma unroll
    for (int v = 0; v < V; v++) h[q][v] = 0.f;
}

#if CLUSTER
// How often halos are exchanged while the longest part of a phase has `lines` lines.
__device__ __forceinline__ int exchanges_of(const Layout& layout, int lines) {
  return layout.splits > 1 ? (lines - 1) / layout.halo : 0;
}

// Both directions of an axis, by two roles that meet in the middle: `forwards` and `backwards` are their indices.
__device__ __forceinline__ void run_axis(const Params& p, const Layout& layout, const Self& me, const Memory& memory,
                                         int forwards, int backwards, bool add, bool last, void* sums) {
  const int lines = scan_of(p, forwards).lines, middle = (lines + 1) / 2;
  const int half = me.role & 1, partner = (me.role ^ 1) * layout.splits + me.split;
  float h[PLACES][V];
  clear(h);
  Phase phase;
  phase.sums = sums;
  // With four roles the other axis runs along, through the same barriers.
  phase.exchanges = exchanges_of(layout, layout.roles == 4 ? (max(p.height, p.width) + 1) / 2 : middle);
#pragma unroll 1
  for (int turn = 0; turn < 2; turn++) {
    phase.d = half == turn ? forwards : backwards;
    phase.begin = turn == 0 ? 0 : half == 0 ? lines - middle : middle;
    phase.end = turn == 1 ? lines : half == 0 ? middle : lines - middle;
    phase.add = add || turn == 1;
    phase.last = last && turn == 1;
    phase.resume = turn == 1;
    run_phase(p, layout, me, memory, phase, h);
    if (turn == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++)
        store_floats(cluster_map(memory.carried + q * PARTS * memory.threads + threadIdx.x, partner), memory.threads, h[q]);
    }
    cluster_barrier();
    if (turn == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++) load_floats(memory.carried + q * PARTS * memory.threads + threadIdx.x, memory.threads, h[q]);
    }
  }
}

// y = the vertical directions' sums + the horizontal ones', shared out over the blocks of the cluster.
__device__ __forceinline__ void add_axes(const Params& p, const Layout& layout, const Self& me) {
  const Scan rows = {p.height, p.width, true, false};
  const int pixels = p.height * p.width, rank = me.role * layout.splits + me.split;
  const int step = layout.roles * layout.splits * (blockDim.x / VECTORS);
  if (!me.present || me.column >= blockDim.x / VECTORS) return;
  for (int i = rank * (blockDim.x / VECTORS) + me.column; i < pixels; i += step) {
    const int row = i / p.width, column = i - row * p.width;
    const Stream y = stream_of(p.y, rows, me.b, 0, me.channel, row, column);
    const Sums second = sums_of(p, p.scratch[1], rows, me.b, me.channel, row, column);
    float a[V], b[V];
#if STORAGE == 0
    load_floats((const Floats*)y.at, 1, a);
#else
    load_floats((const Floats*)sums_of(p, p.scratch[0], rows, me.b, me.channel, row, column).at, 1, a);
#endif
    load_floats((const Floats*)second.at, 1, b);
#pragma unroll
    for (int v = 0; v < V; v++) a[v] += b[v];
    *(Vector*)y.at = pack(a);
  }
}
#endif

// The index of a direction (0 down, 1 up, 2 right, 3 left) among those of the problem, or -1.
__device__ __forceinline__ int index_of(const Params& p, int direction) {
  for (int d = 0; d < p.scans; d++)
    if (p.directions[d] == direction) return d;
  return -1;
}

KERNEL(THREADS, MIN_BLOCKS) pixels_forward(CONSTANT_PARAMS p) {
  const Layout layout = layout_of(p);
  const Self me = self_of(p, layout);
  const Memory memory = memory_of(layout);
  for (int i = threadIdx.x; i < 2 * EDGES * PARTS * memory.pitch; i += blockDim.x) {
    Floats zero;
#pragma unroll
    for (int e = 0; e < F; e++) zero.e[e] = 0.f;
    memory.published[i] = zero;
  }
  __syncthreads();
  void* const sums = STORAGE == 0 ? nullptr : p.scratch[0];
#if CLUSTER
  if (layout.roles > 1) {
    const bool vertical = index_of(p, 0) >= 0, horizontal = index_of(p, 2) >= 0;
#pragma unroll 1
    for (int axis = 0; axis < 2; axis++) {
      if (!(axis == 0 ? vertical : horizontal) || (layout.roles == 4 && me.role / 2 != axis)) continue;
      const bool alone = layout.roles == 4;
      run_axis(p, layout, me, memory, index_of(p, 2 * axis), index_of(p, 2 * axis + 1), !alone && axis == 1 && vertical,
               !alone && (axis == 1 || !horizontal), alone && axis == 1 ? p.scratch[1] : sums);
    }
    if (layout.roles == 4) add_axes(p, layout, me);
    return;
  }
#endif
#pragma unroll 1
  for (int d = 0; d < p.scans; d++) {
    float h[PLACES][V];
    clear(h);
    const int lines = scan_of(p, d).lines;
    Phase phase = {d, 0, lines, d > 0, d + 1 == p.scans, false, sums, 0};
#if CLUSTER
    phase.exchanges = exchanges_of(layout, lines);
#endif
    run_phase(p, layout, me, memory, phase, h);
#if CLUSTER
    cluster_barrier();
#endif
  }
}
