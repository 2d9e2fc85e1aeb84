// Forward for channels that are adjacent in memory: y = sum over directions of gate h (see pixels.cuh).
//
// One role: a block runs direction after direction. Two roles: while one block scans the first half of the lines
// forwards, its partner scans the second half backwards; then they hand over their states and turn round, so that
// each meets the half it has just read. Four roles: both axes do so at the same time.
//
// Sums over directions are float32, in scratch; or ON_CHIP, in shared memory: each block then answers for its half of
// the rows, and later for its half of the columns, and in between the partners swap a quarter of the image.
//
// More macros: DEPTH lines of the ring, even; SUM 1 if there is more than one direction; ON_CHIP (without SPLIT, or
// with two roles and two splits).
// Knobs: those of Layout.
// Scratch: 0 float32 sums over directions (16-bit storage), 1 those of the horizontal directions (four roles).
#include "pixels.cuh"

static_assert(!(ON_CHIP && SPLIT) || ROLES == 2, "a quarter of the image for each of four blocks");

constexpr int TAP_VECTORS = OWN_TAPS ? 3 : 0;
constexpr int OPERANDS = 1 + HAS_LAM + HAS_GATE + TAP_VECTORS;
constexpr int GATE = 1 + HAS_LAM;
#if OWN_TAPS
constexpr int TAPS = 1 + HAS_LAM + HAS_GATE;
#endif
constexpr int EDGES = PLACES > 1 ? 2 : 1;         // places of a thread that others look at
constexpr bool SUMS_COME = SUM && !ON_CHIP;       // sums come through the ring, too

// Where things are in shared memory, in bytes.
constexpr int PITCH = THREADS + 2 * VECTORS;
constexpr int FLOATS = 4 * V * PLACES * THREADS;
constexpr int SUMS_AT = OPERANDS * PLACES * THREADS * VECTOR;     // of a slot: [PLACES][PARTS][THREADS]
constexpr int SLOT = SUMS_AT + SUMS_COME * FLOATS;
constexpr int PUBLISHED_AT = DEPTH * SLOT;                        // [2][EDGES][PARTS][PITCH]: states at the edges
constexpr int CARRIED_AT = PUBLISHED_AT + 8 * V * EDGES * PITCH;  // [PLACES][PARTS][THREADS]: from the partner
constexpr int MEETING_AT = CARRIED_AT + (ROLES > 1) * FLOATS;       // the barrier that closes a line
constexpr int HALO_AT = MEETING_AT + CLUSTER * 16;
#if SPLIT
constexpr int WEIGHTS_AT = HALO_AT + HALO_BYTES;
#else
constexpr int WEIGHTS_AT = HALO_AT;
#endif

static_assert(PUBLISHED_AT % 16 == 0 && CARRIED_AT % 16 == 0 && MEETING_AT % 16 == 0 && WEIGHTS_AT % 16 == 0,
              "vectors of 16 bytes");

__device__ __forceinline__ Floats* published(int parity) {
  return (Floats*)(shared_memory() + PUBLISHED_AT) + parity * EDGES * PARTS * PITCH + VECTORS + threadIdx.x;
}
__device__ __forceinline__ Floats* carried(int q) {
  return (Floats*)(shared_memory() + CARRIED_AT) + q * PARTS * THREADS + threadIdx.x;
}
// What one operand of a slot, which starts at byte `slot` of the ring, holds of a thread.
__device__ __forceinline__ Vector* ring(int slot, int operand, int q) {
  return (Vector*)(shared_memory() + slot) + (operand * PLACES + q) * THREADS + threadIdx.x;
}
__device__ __forceinline__ Floats* ring_sum(int slot, int q) {
  return (Floats*)(shared_memory() + slot + SUMS_AT) + q * PARTS * THREADS + threadIdx.x;
}

// Where neighbouring places meet, once a line: who has arrived does something else before it waits.
struct Meeting {
#if CLUSTER
  u32 parity;

  __device__ __forceinline__ u64* barrier() const { return (u64*)(shared_memory() + MEETING_AT); }
  // A barrier of the block must follow.
  __device__ __forceinline__ void start() {
    parity = 0;
    if (threadIdx.x == 0) {
      mbarrier_init(barrier(), THREADS / 32);
      mbarrier_init_fence();
    }
  }
  __device__ __forceinline__ void arrive() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier());
  }
  __device__ __forceinline__ void wait() {
    mbarrier_wait(barrier(), parity);
    parity ^= 1;
  }
#else
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void wait() { __syncthreads(); }
#endif
};

// Sums on chip: what a block answers for on either axis, [PARTS][rows][pitch] bytes. For one role that is the image;
// for two roles of an unsplit line two quarters, of which the first stays; with two splits as well a quarter, which may
// be another one for the other axis. Rows are padded, so that walking down a column uses all banks, too.
constexpr int PIXEL = 4 * F * VECTORS;

struct Home {
  int rows, columns;  // of the quarter at the top left
  int pitch, part;    // bytes of a row and of a part

  __device__ __forceinline__ void start(const Params& p) {
    rows = ROLES > 1 ? (p.height + 1) / 2 : p.height;
    columns = ROLES > 1 ? (p.width + 1) / 2 : p.width;
    pitch = (columns * PIXEL + 127) / 128 * 128 + PIXEL;
    part = rows * pitch;
  }
  __device__ __forceinline__ static int at(const Layout& layout) {
#if OWN_TAPS
    return WEIGHTS_AT;
#else
    return WEIGHTS_AT + 32 * TAP_LINES * TAP_GROUPS * (max(layout.row_run, layout.column_run) + 2 * HALO);
#endif
  }
  // Byte of a pixel's vector from the first quarter's start. Without splits exactly one coordinate is in this
  // role's half.
  __device__ __forceinline__ int of(int row, int column, bool vertical, int half, int vector) const {
    const bool lower = row >= rows, right = column >= columns;
    const bool second = !SPLIT && (vertical ? right : lower) != (half != 0);
    return second * PARTS * part + (row - lower * rows) * pitch + (column - right * columns) * PIXEL + vector * 4 * F;
  }
};

// Lines [begin, end) of direction d. `add` to the sums that are there; `last`: the sum is y; `resume`: the state
// comes from the partner.
struct Phase {
  int d, begin, end;
  bool add, last, resume;
  void* sums;
};

// Float32 sums over directions, in scratch: [B][channel block][PARTS][H][W][VECTORS] Floats, for what the lanes of a
// warp read or write together to be whole sectors. Of float32 storage they are in y until they are complete.
struct PartSums {
  float* at;
  long long line, place, part;

  __device__ __forceinline__ void start(const Params& p, void* scratch, const Scan& s, const Self& me, int begin,
                                        int first) {
    const long long row = (long long)p.width * VECTORS * F;
    const long long step = s.vertical ? row : VECTORS * F;
    line = s.reversed ? -step : step, place = s.vertical ? VECTORS * F : row, part = row * p.height;
    const long long block = blockIdx.x / (ROLES * layout_of(p).splits);
    at = (float*)scratch + block * PARTS * part + me.vector * F + (s.reversed ? (s.lines - 1) * step : 0) +
         begin * line + first * place;
  }
  __device__ __forceinline__ void start(const Stream& y) {
    at = (float*)y.at, line = y.line, place = y.place, part = F;
  }
  __device__ __forceinline__ void load(int q, float* e) const {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const Floats f = *(const Floats*)(at + q * place + i * part);
#pragma unroll
      for (int v = 0; v < F; v++) e[i * F + v] = f.e[v];
    }
  }
  __device__ __forceinline__ void store(int q, const float* e) const {
#pragma unroll
    for (int i = 0; i < PARTS; i++) store_part(at + q * place + i * part, e + i * F);
  }
};

// What a thread needs of a line.
struct Line {
  float u[PLACES][V];  // lam x
  // `weight[q][3 v + k]` with taps of their own, else `weight[q][k]`
  static constexpr int PER_PLACE = OWN_TAPS ? 3 * V : 3;
  float weight[PLACES][PER_PLACE];
#if HAS_GATE
  Vector gate[PLACES];
#endif
#if SUM
  float sum[PLACES][V];  // over the directions before
#endif

  __device__ __forceinline__ Taps taps(int q, int v) const {
    const float* w = weight[q] + (OWN_TAPS ? 3 * v : 0);
    return {w[0], w[1], w[2]};
  }
};

// One thread's part in a phase.
struct Scanner {
  Run run;
  Scan s;
  int place;                // along the line, the thread's first
  int before_at, after_at;  // published neighbours, from the thread's own
  bool exists[PLACES], own[PLACES];
  Stream x, lam, gate, y;   // x, lam, gate: the next line to copy; y: the next to write
#if OWN_TAPS
  Stream taps;
  long long tap_vector;     // elements between the three vectors of a place's taps
#endif
#if ON_CHIP
  int sum[PLACES], sum_line, sum_part;
#elif SUM
  PartSums read, write;
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
#if ON_CHIP
    Home home;
    home.start(p);
    const int line = s.reversed ? s.lines - 1 - phase.begin : phase.begin;
#pragma unroll
    for (int q = 0; q < PLACES; q++)
      sum[q] = Home::at(layout) + home.of(s.vertical ? line : place + q, s.vertical ? place + q : line, s.vertical,
                                          ROLES > 1 ? me.role & 1 : 0, me.vector);
    sum_line = (s.vertical ? home.pitch : PIXEL) * (s.reversed ? -1 : 1);
    sum_part = home.part;
#elif SUM
    if (STORAGE == 0 && phase.sums == nullptr)
      read.start(y);
    else
      read.start(p, phase.sums, s, me, phase.begin, place);
    write = read;
#endif
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
      for (int k = 0; k < 3; k++)
        copy_async<VECTOR>(ring(slot, TAPS + k, q), taps.at + q * taps.place + k * tap_vector, bytes);
#endif
#if SUM && !ON_CHIP
      if (add)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          copy_async<4 * F>(ring_sum(slot, q) + part * THREADS, read.at + q * read.place + part * read.part,
                            own[q] ? 4 * F : 0);
#endif
    }
    x.at += x.line;
    if (HAS_LAM) lam.at += lam.line;
    if (HAS_GATE) gate.at += gate.line;
#if OWN_TAPS
    taps.at += taps.line;
#endif
#if SUM && !ON_CHIP
    read.at += read.line;
#endif
  }

  // The first lines of a phase.
  __device__ __forceinline__ void copy_first(const Phase& phase) {
#pragma unroll 1
    for (int line = 0; line < DEPTH; line++) {
      if (line < phase.end - phase.begin) copy(line * SLOT, phase.add);
      copy_commit();
    }
  }

  // Takes a line that has arrived into registers: its part of the ring is free then. `more`: there is such a line.
  __device__ __forceinline__ void take(int slot, bool add, bool more, Line& next) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      unpack(*ring(slot, 0, q), next.u[q]);
#if HAS_LAM
      float l[V];
      unpack(*ring(slot, 1, q), l);
#pragma unroll
      for (int v = 0; v < V; v++) next.u[q][v] *= l[v];
#endif
#if HAS_GATE
      next.gate[q] = *ring(slot, GATE, q);
#endif
#if OWN_TAPS
      float raw[3 * V];
#pragma unroll
      for (int k = 0; k < 3; k++) unpack(*ring(slot, TAPS + k, q), raw + k * V);
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Taps w = tap_weights(own_taps(raw, v), place + q > 0, place + q + 1 < s.places);
        next.weight[q][3 * v] = w.before, next.weight[q][3 * v + 1] = w.here, next.weight[q][3 * v + 2] = w.after;
      }
#endif
#if SUM
#pragma unroll
      for (int v = 0; v < V; v++) next.sum[q][v] = 0.f;
#if ON_CHIP
      if (add && more && own[q])
        load_floats((Floats*)(shared_memory() + sum[q]), sum_part / (int)sizeof(Floats), next.sum[q]);
      sum[q] += sum_line;
#else
      if (add) load_floats(ring_sum(slot, q), THREADS, next.sum[q]);
#endif
#endif
    }
  }
#if !OWN_TAPS
  __device__ __forceinline__ void take_weights(const TapStages& stages, int line, int group, Line& next) const {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      Weights w = {0.f, 0.f, 0.f, 0.f};
      if (exists[q]) w = *stages.of(line, group, place - run.start + q);
      next.weight[q][0] = w.before, next.weight[q][1] = w.here, next.weight[q][2] = w.after;
    }
  }
#endif

  // The states at a thread's edges, for the threads beside it.
  __device__ __forceinline__ void publish(int parity, const float (&h)[PLACES][V]) const {
    Floats* mine = published(parity);
    store_floats(mine, PITCH, h[0]);
    if (PLACES > 1) store_floats(mine + PARTS * PITCH, PITCH, h[PLACES - 1]);
  }

  // h = taps over the previous line's h, plus u.
  __device__ __forceinline__ void step(int parity, const Line& line, float (&h)[PLACES][V]) const {
    const Floats* firsts = published(parity);
    const Floats* lasts = firsts + (EDGES - 1) * PARTS * PITCH;
    float before[V], after[V];
    load_floats(lasts + before_at, PITCH, before);
    load_floats(firsts + after_at, PITCH, after);
#pragma unroll
    for (int q = 0; q < PLACES; q++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Taps w = line.taps(q, v);
        const float here = h[q][v];
        float sum = fmaf(w.here, here, line.u[q][v]);
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
  __device__ __forceinline__ void emit(bool last, const Line& line, const float (&h)[PLACES][V]) {
#pragma unroll
    for (int q = 0; q < PLACES; q++) {
      float out[V];
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = h[q][v];
#if HAS_GATE
      unpack(line.gate[q], out);
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = SUM ? fmaf(h[q][v], out[v], line_sum(line, q, v)) : h[q][v] * out[v];
#else
#pragma unroll
      for (int v = 0; v < V; v++) out[v] += line_sum(line, q, v);
#endif
      if (!own[q]) continue;
      if (!SUM || last) store_vector(y.at + q * y.place, out);
#if ON_CHIP
      else  // sum[q] is a line ahead
        store_floats((Floats*)(shared_memory() + sum[q] - sum_line), sum_part / (int)sizeof(Floats), out);
#elif SUM
      else
        write.store(q, out);
#endif
    }
    y.at += y.line;
#if SUM && !ON_CHIP
    write.at += write.line;
#endif
  }
  __device__ __forceinline__ static float line_sum(const Line& line, int q, int v) {
#if SUM
    return line.sum[q][v];
#else
    return 0.f;
#endif
  }
};

// The lines of a phase, whose first are on their way. `h` is the state before them, unless the scan starts there.
__device__ __forceinline__ void run_phase(const Params& p, const Layout& layout, const Self& me, const Phase& phase,
                                          Scanner& scan, TapStages& stages, int group, Meeting& meeting,
                                          int& exchanged, float (&h)[PLACES][V]) {
  const int lines = phase.end - phase.begin;
#if !OWN_TAPS
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
    scan.take(slot, phase.add, at < lines, line);
#if !OWN_TAPS
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
#if !OWN_TAPS
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
  // Quarters change places, the second ones or, with splits, those of blocks that answer for another one on the other
  // axis; either partner does half of it.
  Home home;
  home.start(p);
  const int floats = PARTS * home.part / (int)sizeof(Floats), middle = floats / 2;
  const int other = SPLIT ? me.split * layout.splits + me.role : partner;
  const bool first = me.role == 0;
  Floats* here = (Floats*)(shared_memory() + Home::at(layout)) + (SPLIT ? 0 : floats);
  Floats* there = cluster_map(here, other);
  if (!SPLIT || me.role != me.split)
#pragma unroll 4
    for (int i = (first ? 0 : middle) + threadIdx.x; i < (first ? middle : floats); i += THREADS) {
      const Floats mine = here[i], theirs = there[i];
      here[i] = theirs;
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
#if !OWN_TAPS
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
#if !OWN_TAPS
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
