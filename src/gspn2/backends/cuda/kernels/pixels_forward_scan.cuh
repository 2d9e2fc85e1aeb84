// One thread's part in a direction: operands in, a step of the recurrence, sums or y out.
#pragma once
#include "pixels_forward_memory.cuh"

// Lines [begin, end) of direction d. `add` to the sums that are there; `last`: the sum is y; `resume`: the state
// comes from the partner.
struct Phase {
  int d, begin, end;
  bool add, last, resume;
  void* sums;
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
#if PREPARED
  const u32* weights;       // of the next line to copy
  long long weight_line;
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
#if PREPARED
    const int g = min(me.channel, p.channels - 1) / (p.channels / p.groups);
    const int from = s.reversed ? s.lines - 1 - phase.begin : phase.begin;
    weights = (const u32*)p.scratch[2] +
              (((long long)me.b * p.scans + phase.d) * p.groups + g) * p.height * p.width +
              (long long)from * s.places + place;
    weight_line = s.reversed ? -s.places : s.places;
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
      if (HAS_LAM) copy_async<VECTOR>(ring(slot, LAM, q), lam.at + q * lam.place, bytes);
      if (HAS_GATE) copy_async<VECTOR>(ring(slot, GATE, q), gate.at + q * gate.place, own[q] ? VECTOR : 0);
#if OWN_TAPS
#pragma unroll
      for (int k = 0; k < 3; k++)
        copy_async<VECTOR>(ring(slot, TAPS + k, q), taps.at + q * taps.place + k * tap_vector, bytes);
#endif
#if PREPARED
      if (threadIdx.x % VECTORS == 0) copy_async<4>(ring_word(slot, q), weights + q, exists[q] ? 4 : 0);
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
#if PREPARED
    weights += weight_line;
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
      unpack(*ring(slot, LAM, q), l);
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
#if PREPARED
      const Taps w = unpack_taps(*ring_word(slot, q));
      next.weight[q][0] = w.before, next.weight[q][1] = w.here, next.weight[q][2] = w.after;
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
#if TURNED
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
