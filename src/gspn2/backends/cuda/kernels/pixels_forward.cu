// Forward for channels that are adjacent in memory: y = sum over directions of gate h (see pixels.cuh).
//
// One role: a block runs direction after direction. Two roles: while one block scans the first half of the lines
// forwards, its partner scans the second half backwards; then they hand over their states and turn round, so that
// each meets the half it has just read. Four roles: both axes do so at the same time.
//
// Sums over directions are float32, in scratch; or ON_CHIP, in shared memory: each block then answers for its half of
// the rows, and later for its half of the columns, and in between the partners swap a quarter of the image.
//
// More macros: DEPTH lines of the ring, even; SUM 1 if there is more than one direction; ON_CHIP (without SPLIT);
//              PREPARED 1: weights were made by a launch before (pixels_weights.cu).
// Knobs: those of Layout.
// Scratch: 0 float32 sums over directions (16-bit storage), 1 those of the horizontal directions (four roles),
//          2 weights that were prepared.
#if PREPARED
#include "tap_pairs.cuh"
#endif
#include "pixels_forward_scan.cuh"

// The lines of a phase, whose first are on their way. `h` is the state before them, unless the scan starts there.
__device__ __forceinline__ void run_phase(const Params& p, const Layout& layout, const Self& me, const Phase& phase,
                                          Scanner& scan, TapStages& stages, int group, Meeting& meeting,
                                          int& exchanged, float (&h)[PLACES][V]) {
  const int lines = phase.end - phase.begin;
#if TURNED
  stages.turn(0);
  stages.fetch(1);
#endif
#if SPLIT
  if (phase.resume) exchange_halos<HALO_AT>(p, layout, me, scan.run, scan.place, exchanged, h);
#endif
  scan.publish(0, h);
  __syncthreads();
  Line line;
  int since = phase.begin % p.chunk;  // lines since the last restart
#if SPLIT
  int until = HALO;
#endif
  // Line `at` into registers; the one that is DEPTH lines after it sets out for its part of the ring.
  auto take = [&](int at, int slot) {
    copy_wait<DEPTH - 1>();
#if PREPARED
    __syncwarp();
#endif
    scan.take(slot, phase.add, at < lines, line);
#if PREPARED
    __syncwarp();
#endif
#if TURNED
    scan.take_weights(stages, at, group, line);
#endif
    if (at + DEPTH < lines) scan.copy(slot, phase.add);
    copy_commit();
  };
  auto run_line = [&](int at, int parity, int next) {
    if (since == 0) {
#pragma unroll
      for (int q = 0; q < PLACES; q++)
#pragma unroll
        for (int v = 0; v < V; v++) h[q][v] = line.u[q][v];
    } else {
      scan.step(parity, line, h);
    }
    since = since + 1 == p.chunk ? 0 : since + 1;
#if SPLIT
    if (--until == 0) {
      until = HALO;
      if (at + 1 < lines) exchange_halos<HALO_AT>(p, layout, me, scan.run, scan.place, exchanged, h);
    }
#endif
    scan.publish(parity ^ 1, h);
    meeting.arrive();
    scan.emit(phase.last, line, h);
    take(at + 1, next);
    meeting.wait();
  };
  take(0, 0);
  int slot = 0;
  // Two lines a turn, for what alternates between them to be known to the compiler.
#pragma unroll 1
  for (int at = 0; at < lines; at += 2) {
#if TURNED
    if (at % TAP_LINES == TAP_TURN) {
      stages.turn(at / TAP_LINES + 1);
      stages.fetch(at / TAP_LINES + 2);
    }
#endif
    const int next = slot + 2 * SLOT == DEPTH * SLOT ? 0 : slot + 2 * SLOT;
    run_line(at, 0, slot + SLOT);
    if (at + 1 < lines) run_line(at + 1, 1, next);
    slot = next;
  }
  copy_wait<0>();
}

// Phase `f` of a block: for one role direction f; otherwise an axis has two, and roles meet in the middle of it.
__device__ __forceinline__ Phase phase_of(const Params& p, const Self& me, int f) {
  Phase phase;
  phase.sums = STORAGE == 0 ? nullptr : p.scratch[0];
#if ROLES == 1
  const int lines = scan_of(p, f).lines;
  phase.d = f, phase.begin = 0, phase.end = lines;
  phase.add = f > 0, phase.last = f + 1 == p.scans, phase.resume = false;
#else
  const bool vertical = index_of(p, 0) >= 0, horizontal = index_of(p, 2) >= 0;
  const int half = me.role & 1, turn = f & 1;
  const int axis = ROLES == 4 ? me.role / 2 : vertical ? f / 2 : 1;
  const int lines = axis == 0 ? p.height : p.width, middle = (lines + 1) / 2;
  phase.d = index_of(p, 2 * axis + (half ^ turn));
  phase.begin = turn == 0 ? 0 : half == 0 ? lines - middle : middle;
  phase.end = turn == 1 ? lines : half == 0 ? middle : lines - middle;
  phase.add = f > 0, phase.resume = turn == 1;
  phase.last = ROLES == 2 && turn == 1 && (axis == 1 || !horizontal);
  if (ROLES == 4 && axis == 1) phase.sums = p.scratch[1];
#endif
  return phase;
}

#if CLUSTER
// Between two phases, or after the last: sums reach the other blocks, and states the partner.
__device__ __forceinline__ void hand_over(const Params& p, const Layout& layout, const Self& me, int f,
                                          float (&h)[PLACES][V]) {
#if ROLES > 1
  const int partner = (me.role ^ 1) * layout.splits + me.split;
  if ((f & 1) == 0) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) store_floats(cluster_map(carried(q), partner), THREADS, h[q]);
    cluster_barrier();
#pragma unroll
    for (int q = 0; q < PLACES; q++) load_floats(carried(q), THREADS, h[q]);
    return;
  }
#endif
  cluster_barrier();
#if ON_CHIP && ROLES == 2
  if (f + 1 == p.scans) return;
  // The second quarters change places; either partner does half of it.
  Home home;
  home.start(p);
  const int floats = PARTS * home.part / (int)sizeof(Floats), middle = floats / 2;
  Floats* here = (Floats*)(shared_memory() + Home::at(layout)) + floats;
  Floats* there = cluster_map(here, partner);
#pragma unroll 4
  for (int i = (me.role == 0 ? 0 : middle) + threadIdx.x; i < (me.role == 0 ? middle : floats); i += THREADS) {
    const Floats mine = here[i], other = there[i];
    here[i] = other;
    there[i] = mine;
  }
  cluster_barrier();
#endif
}
#endif

#if ROLES == 4 && !ON_CHIP
// y = the vertical directions' sums + the horizontal ones', shared out over the blocks of the cluster.
__device__ __forceinline__ void add_sums(const Params& p, const Layout& layout, const Self& me) {
  const Scan rows = {p.height, p.width, true, false};
  const long long pixels = (long long)p.height * p.width;
  const int rank = me.role * layout.splits + me.split, step = ROLES * layout.splits * (THREADS / VECTORS);
  if (!me.present || me.column >= THREADS / VECTORS) return;
  for (long long i = rank * (THREADS / VECTORS) + me.column; i < pixels; i += step) {
    const int row = i / p.width, column = i - (long long)row * p.width;
    const Stream y = stream_of(p.y, rows, me.b, 0, me.channel, row, column);
    PartSums vertical, horizontal;
    if (STORAGE == 0)
      vertical.start(y);
    else
      vertical.start(p, p.scratch[0], rows, me, row, column);
    horizontal.start(p, p.scratch[1], rows, me, row, column);
    float a[V], b[V];
    vertical.load(0, a);
    horizontal.load(0, b);
#pragma unroll
    for (int v = 0; v < V; v++) a[v] += b[v];
    store_vector(y.at, a);
  }
}
#endif

#if ON_CHIP && ROLES == 4
// y = the vertical directions' sums + the horizontal ones': each block does one quarter of the image, of which it has
// one of the two, and reads the other in the block that has it at the same place.
__device__ __forceinline__ void add_quarters(const Params& p, const Layout& layout, const Self& me) {
  Home home;
  home.start(p);
  const Scan rows = {p.height, p.width, true, false};
  const bool lower = me.role == 1 || me.role == 2, right = me.role == 1 || me.role == 3;
  const int height = lower ? p.height - home.rows : home.rows, width = right ? p.width - home.columns : home.columns;
  const int at = Home::at(layout) + (me.role / 2) * PARTS * home.part + me.vector * 4 * F;
  const int other = me.role == 0 ? 2 : me.role == 1 ? 3 : me.role == 2 ? 1 : 0;
  if (me.present && me.column < THREADS / VECTORS)
    for (int i = me.column; i < height * width; i += THREADS / VECTORS) {
      const int row = i / width, column = i - row * width;
      Floats* here = (Floats*)(shared_memory() + at + row * home.pitch + column * PIXEL);
      float a[V], b[V];
      load_floats(here, home.part / (int)sizeof(Floats), a);
      load_floats(cluster_map(here, other), home.part / (int)sizeof(Floats), b);
#pragma unroll
      for (int v = 0; v < V; v++) a[v] += b[v];
      const int y_row = row + lower * home.rows, y_column = column + right * home.columns;
      store_vector(stream_of(p.y, rows, me.b, 0, me.channel, y_row, y_column).at, a);
    }
  // Nobody leaves while others read its memory.
  cluster_barrier();
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
  Meeting meeting;
  meeting.start();
#if SPLIT
  start_halos<HALO_AT>();
#endif
#if CLUSTER
  // Nobody writes to a block that has not started.
  cluster_barrier();
#else
  __syncthreads();
#endif
  const int phases = ROLES == 4 ? 2 : p.scans;
#if TURNED
  const int first_group = (me.channel - me.vector * V) / (p.channels / p.groups);
#endif
  const int group = TAP_GROUPS > 1 ? min(me.vector * V / (p.channels / p.groups), TAP_GROUPS - 1) : 0;
  float h[PLACES][V];
  clear(h);
  int exchanged = 0;
  Scanner scan;
  TapStages stages;
  Phase phase;
#pragma unroll 1
  for (int f = -1; f < phases; f++) {
    if (f >= 0) run_phase(p, layout, me, phase, scan, stages, group, meeting, exchanged, h);
    const bool more = f + 1 < phases;
    // The next phase's operands set out at once; only sums in memory wait for the blocks that write them.
    if (more) {
      phase = phase_of(p, me, f + 1);
      scan.start(p, layout, me, phase);
#if TURNED
      stages.start(p, scan.s, scan.run, me.b, phase.d, first_group, phase.begin, phase.end,
                   (Weights*)(shared_memory() + WEIGHTS_AT));
      stages.fetch(0);
#endif
    }
    const bool early = !SUMS_COME || !phase.add;
    if (more && early) scan.copy_first(phase);
    if (f >= 0) {
#if CLUSTER
      hand_over(p, layout, me, f, h);
#else
      __syncthreads();
#endif
    }
    if (more && !early) scan.copy_first(phase);
  }
#if ROLES == 4 && ON_CHIP
  add_quarters(p, layout, me);
#elif ROLES == 4
  add_sums(p, layout, me);
#endif
}
