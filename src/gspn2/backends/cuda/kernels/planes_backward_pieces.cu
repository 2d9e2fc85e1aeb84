// Backward of one horizontal scan of planes whose states are at hand: a single walk back. Macros, knobs and scratch are
// explained in planes_backward_pieces.cuh.
#define FORWARD 0
#include "planes_backward_pieces.cuh"

static_assert(HAS_HIDDEN, "the walk back starts from states");

// States of the row before a thread's, of its own and of the row after; and the words that hold the column before the
// first in scan order.
struct States {
  Packed<EACH> row[3][HIDDENS];
  u32 entering[3][HIDDENS];

  // Row i, column e, which may be the one before the first in scan order.
  __device__ __forceinline__ float at(int i, int e) const {
    const bool inside = e >= 0 && e < EACH;
    const u32* upper = inside ? row[i][0].words : entering[i];
    if (!inside) e = REVERSED ? 0 : 4 / SIZE - 1;
#if OWN_STATES && STORAGE != 0
    return inside ? joined(upper[e / 2], row[i][1].words[e / 2], e) : joined(upper[0], entering[i][1], e);
#else
    return element(upper, e);
#endif
  }
};

__device__ __forceinline__ void read_states(const Work& w, const Thread& t, int tile, int q, States& states) {
  const int next = REVERSED ? q + 1 : q - 1;
#pragma unroll
  for (int half = 0; half < (OWN_STATES ? HIDDENS : 1); half++) {
    const unsigned char* unit = tile_at(w, tile) + unit_at(HIDDEN + half);
    const unsigned char* words = tile_at(w, tile) + ENTERING + half * 34 * 4;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      read_words(states.row[i][half].words, unit + vector_at(t.lane + i, q));
      const bool inside = next >= 0 && next < VECTORS;
      states.entering[i][half] =
          *(const u32*)(inside ? unit + vector_at(t.lane + i, next) + (REVERSED ? 0 : 12) : words + 4 * (t.lane + i));
    }
  }
}

// The gradient of a weight that channels share is float32: with 16-bit storage, upper and lower halves in the places of
// two operands that are done with.
__device__ constexpr int upper_of(int k) {
  return STORAGE == 0 ? TAPS + k : k == 0 ? TAPS : k == 2 ? HIDDEN : WEIGHTS ? X : TAPS + 2;
}
__device__ constexpr int lower_of(int k) {
  return k == 0 ? TAPS + 1 : k == 1 ? DY : PARKS_IN_X && !WEIGHTS ? X : HIDDEN + 1;
}
__device__ constexpr bool is_parked(int op) {
  const bool instead = op == DY || is_state(op) || (PARKS_IN_X && op == X);
  return SHARED && WANTS_TAPS && ((op >= TAPS && op < DY) || (STORAGE != 0 && instead));
}

// What lines hand on comes from taps, dy and gate; the gradients take the rest besides, which is read later: registers.
__device__ __forceinline__ constexpr bool is_scanned(int op) { return op >= TAPS && op < HIDDEN; }
template <bool SCANNED>
__device__ __forceinline__ void read_vector(const Params& p, const Work& w, const Thread& t, int tile, int q,
                                            Chunk& c) {
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (is_scanned(op) == SCANNED && !is_state(op) && is_fetched(p, op))
      read_words(c.operand[op].row[0].words, tile_at(w, tile) + unit_at(op) + vector_at(t.lane, q));
}

__device__ __forceinline__ void write_vector(const Params& p, const Work& w, const Thread& t, int tile, int q,
                                             const Chunk& c) {
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (is_parked(op) || is_wanted(p, op) || (op == DX && is_wanted(p, X)))
      write_words(tile_at(w, tile) + unit_at(op) + vector_at(t.lane + is_state(op), q), c.operand[op].row[0].words);
}

__device__ __forceinline__ void write_gradients(const Params& p, const Work& w, const Thread& t, int tile) {
  const int left = left_of(w, tile) * SIZE;
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (is_wanted(p, op) && (op == X || !is_parked(op)))
      write_unit(w, t, tile, op == X ? DX : op, sink_of(p, op, t.b, t.group, t.channel) + left, sink_pitch(p, op));
}

#if SHARED
// Vector v of a row of the gradient of weight k in a tile, float32.
__device__ __forceinline__ void read_part(const Work& w, const Thread& t, int tile, int k, int at, int at_state,
                                          float (&part)[EACH]) {
  const auto read = [&](int op, Packed<EACH>& packed) {
    read_words(packed.words, tile_at(w, tile) + unit_at(op) + (is_state(op) ? at_state : at));
  };
  Packed<EACH> upper;
  read(upper_of(k), upper);
#if STORAGE == 0
#pragma unroll
  for (int e = 0; e < EACH; e++) part[e] = upper[e];
#else
  Packed<EACH> lower;
  read(lower_of(k), lower);
#pragma unroll
  for (int e = 0; e < EACH; e++) part[e] = joined(upper.words[e / 2], lower.words[e / 2], e);
#endif
}

// A channel's part of the gradient of shared weights; where CHAIN, added to those of the channels before.
__device__ __forceinline__ void write_part(const Params& p, const Work& w, const Thread& t, int tile) {
  const int left = left_of(w, tile), columns = columns_of(w, tile), pitch = p.knobs[2];
#pragma unroll
  for (int k = 0; k < 3; k++) {
    float* to = part_of(p, t, k) + left;
    const auto is_own = [&](int row, int v) { return row >= t.own_begin && row < t.own_end && v * EACH < columns; };
    Sums<EACH> before[VECTORS] = {};
    int i = 0;
    if (CHAIN && t.follows)
      for_vectors(t, [&](auto, int row, int v) {
        if (is_own(row, v)) before[i] = read_sums<EACH>(to + (long long)row * pitch + v * EACH);
        i++;
      });
    i = 0;
    for_vectors(t, [&](auto at, int row, int v) {
      float part[EACH];
      read_part(w, t, tile, k, at(0), at(1), part);
#pragma unroll
      for (int e = 0; e < EACH; e++) part[e] += before[i].v[e];
      if (is_own(row, v)) write_sums(to + (long long)row * pitch + v * EACH, part);
      i++;
    });
  }
}
#endif

__device__ __forceinline__ void put_weight_gradients(Chunk& c, int e, const Taps (&dw)[N]) {
#if STORAGE == 0
  put_taps(c, e, dw);
#else
  const float v[3][N] = {{dw[0].before}, {dw[0].here}, {dw[0].after}};
#pragma unroll
  for (int k = 0; k < 3; k++)
    put_halves(c.operand[upper_of(k)], c.operand[lower_of(k)], c.other[upper_of(k)], e, v[k]);
#endif
}

// The gradients of the taps of element e, from g and the states of the line before.
__device__ __forceinline__ void put_tap_gradients(const Thread& t, Chunk& c, const States& states, int e,
                                                  const float (&g)[N], const Weighed& weight, bool restart) {
  const int from = REVERSED ? e + 1 : e - 1;
  const float h[N] = {restart ? 0.f : states.at(1, from)};
  const Edges edges = {restart || !t.has_before ? 0.f : states.at(0, from),
                       restart || !t.has_after ? 0.f : states.at(2, from)};
  Taps dw[N];
  weight_gradients(dw, g, h, edges);
#if SHARED
  put_weight_gradients(c, e, dw);
#else
  const Weighed weights[N] = {weight};
  Taps da[N];
  tap_gradients(t, dw, weights, da);
  if (restart) da[0] = {0.f, 0.f, 0.f};
  put_taps(c, e, da);
#endif
}

// What lines hand on, through the lines of one vector: `g` of each. Only what is on this way stands between barriers;
// the gradients follow for all lines at once. Bits of `restarts`: lines that start anew.
template <bool RESTARTS>
__device__ __forceinline__ void carry_vector(Thread& t, const Chunk& c, const Weighed (&weight)[EACH], u32 restarts,
                                             float (&g)[EACH], float (&carried)[N]) {
#pragma unroll
  for (int k = EACH - 1; k >= 0; k--) {
    const int e = RISING ? EACH - 1 - k : k;
    const float dy = c.at(DY, 0, e);
    g[e] = HAS_GATE ? fmaf(c.at(HAS_GATE ? GATE : DY, 0, e), dy, carried[0]) : dy + carried[0];
    const Taps& w = weight[e].w;
    const bool restart = RESTARTS && (restarts >> e & 1);
    const Shown shown = {restart ? 0.f : w.before * g[e], restart ? 0.f : w.after * g[e]};
    publish(t, shown);
    const Edges from = settle(t, shown);
    carried[0] = restart ? 0.f : fmaf(w.here, g[e], from.before + from.after);
  }
}

template <bool RESTARTS>
__device__ __forceinline__ void put_gradients(const Params& p, const Thread& t, Chunk& c, const States& states,
                                              const Weighed (&weight)[EACH], u32 restarts, const float (&g)[EACH]) {
#pragma unroll
  for (int k = EACH - 1; k >= 0; k--) {
    const int e = RISING ? EACH - 1 - k : k;
    const float line[N] = {g[e]};
    if (HAS_GATE && WANTS_GATE) {
      const float dgate[N] = {states.at(1, e) * c.at(DY, 0, e)};
      c.put(HAS_GATE ? GATE : DY, e, dgate);
    }
    // First what needs x: it may make room for the gradient of a tap.
    put_product_gradients(p, c, e, line);
    if (WANTS_TAPS) put_tap_gradients(t, c, states, e, line, weight[e], RESTARTS && (restarts >> e & 1));
  }
}

// The lines of one vector. `phase`: lines from the last restart to the first line here.
template <bool RESTARTS>
__device__ __forceinline__ void walk_vector(const Params& p, const Work& w, Thread& t, int tile, int q,
                                            float (&carried)[N], int& phase) {
  Chunk c;
  read_vector<true>(p, w, t, tile, q, c);
  Weighed weight[EACH];
  float g[EACH];
  u32 restarts = 0;
#pragma unroll
  for (int k = EACH - 1; k >= 0; k--) {
    const int e = RISING ? EACH - 1 - k : k;
    weight[e] = weigh(c.taps(0, e), t.has_before, t.has_after);
    if (RESTARTS) {
      restarts |= (phase == 0) << e;
      phase = phase == 0 ? p.chunk - 1 : phase - 1;
    }
  }
  if (!RESTARTS) phase -= EACH;
  carry_vector<RESTARTS>(t, c, weight, restarts, g, carried);
  States states;
  read_vector<false>(p, w, t, tile, q, c);
  if (READS_STATES) read_states(w, t, tile, q, states);
  if (is_parked(HIDDEN)) __syncwarp();  // gradients will take the place of states that other lanes have read
  put_gradients<RESTARTS>(p, t, c, states, weight, restarts, g);
  write_vector(p, w, t, tile, q, c);
}

KERNEL(THREADS, MIN_BLOCKS) planes_backward_pieces(CONSTANT_PARAMS p) {
  Thread t;
  const Work w = start(p, t);
#if CHAIN
  if (is_helper()) return help(p, t, w.tiles);
#endif
  float carried[N] = {0.f};
  int phase = (w.lines - 1) % p.chunk;
  walk(
      p, w, t, carried, [] {},
      [&](int tile, int q) {
        if (phase >= EACH)
          walk_vector<false>(p, w, t, tile, q, carried, phase);
        else
          walk_vector<true>(p, w, t, tile, q, carried, phase);
      },
      [&](int tile) {
        write_gradients(p, w, t, tile);
#if SHARED
#if CHAIN
        enter_step(t, tile);
#endif
        if (WANTS_TAPS) write_part(p, w, t, tile);
#if CHAIN
        leave_step(t, tile);
#endif
#endif
      });
}
