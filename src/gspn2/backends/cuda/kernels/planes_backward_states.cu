// The states of one horizontal scan of planes, for the walk back: float32, into scratch memory. Macros, knobs and
// scratch are explained in planes_backward_pieces.cuh.
#define FORWARD 1
#include "planes_backward_pieces.cuh"

static_assert(!HAS_HIDDEN && !HAS_SUMS && !HAS_GATE, "x, lam and taps are all that states come from");

// Where a tile has states instead of operands: their upper halves, and their lower halves.
constexpr int UPPER = X, LOWER = TAPS;

// The lines of one vector. `phase`: lines from the last restart to the first line here.
template <bool RESTARTS>
__device__ __forceinline__ void walk_vector(const Params& p, const Work& w, Thread& t, int tile, int q, float (&h)[N],
                                            Edges& edges, int& phase) {
  unsigned char* vector = tile_at(w, tile) + vector_at(t.lane, q);
  Chunk c;
#pragma unroll
  for (int op = 0; op < DY; op++) read_words(c.operand[op].row[0].words, vector + unit_at(op));
  // All weights first: what stands between two barriers is on the way of the states.
  Taps weight[EACH];
  float u[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    u[e] = c.at(X, 0, e);
#if HAS_LAM
    u[e] *= c.at(LAM, 0, e);
#endif
    weight[e] = weights(c.taps(0, e), t.has_before, t.has_after);
  }
  float states[EACH];
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    const int e = RISING ? k : EACH - 1 - k;
    const float next = fmaf(weight[e].here, h[0], u[e]);
    h[0] = fmaf(weight[e].before, edges.before, fmaf(weight[e].after, edges.after, next));
    if (RESTARTS && phase == 0) h[0] = u[e];
    if (RESTARTS) phase = phase + 1 == p.chunk ? 0 : phase + 1;
    states[e] = h[0];
    const Shown shown = {h[0], h[0]};
    publish(t, shown);
    edges = settle(t, shown);
  }
  if (!RESTARTS) phase += EACH;
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    const int e = RISING ? k : EACH - 1 - k;
    const float state[N] = {states[e]};
#if STORAGE == 0
    c.put(UPPER, e, state);
#else
    put_halves(c.operand[UPPER], c.operand[LOWER], c.other[UPPER], e, state);
#endif
  }
  write_words(vector + unit_at(UPPER), c.operand[UPPER].row[0].words);
  if (STORAGE != 0) write_words(vector + unit_at(LOWER), c.operand[LOWER].row[0].words);
}

__device__ __forceinline__ void write_states(const Params& p, const Work& w, const Thread& t, int tile) {
#pragma unroll
  for (int half = 0; half < 4 / SIZE; half++) {
    unsigned char* to = states_of(p, t.b, t.channel, half) + (long long)left_of(w, tile) * p.height * SIZE;
    write_unit(w, t, tile, half ? LOWER : UPPER, to, COLUMNS);
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_backward_states(CONSTANT_PARAMS p) {
  Thread t;
  const Work w = start(p, t);
  float h[N] = {0.f};
  Edges edges = {0.f, 0.f};
  int phase = 0;
  walk(
      p, w, t, h,
      [&] {
        const Shown shown = {h[0], h[0]};
        publish(t, shown);
        edges = settle(t, shown);
      },
      [&](int tile, int q) {
        if (phase > 0 && phase + EACH < p.chunk)
          walk_vector<false>(p, w, t, tile, q, h, edges, phase);
        else
          walk_vector<true>(p, w, t, tile, q, h, edges, phase);
      },
      [&](int tile) { write_states(p, w, t, tile); });
}
