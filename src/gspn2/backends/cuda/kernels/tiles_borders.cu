// States at the borders of tiles, from what each tile's pixels add up to alone (see tiles.cuh), in their
// place.
//
// With p the states that a tile would have if nothing entered it, the true ones are h = p + q, and q
// follows the recurrence without any input: q = weights over the line before, where a neighbour in another
// tile counts with its h, as does everything on the line before a tile's first.
//
// A block takes a vector of one direction of an image, and its whole lines; a thread PLACES places,
// states in registers. Neighbours meet by shuffle, warps in shared memory, with one barrier a line. What a
// thread reads comes through a ring that is its own.
//
// With BACKWARD half of the blocks do the same for adjoints, from the last line to the first: there, what
// a tile hands to the places beside it and to the line before its first is what is stored at its borders.
//
// More macros: THREADS of a block, PLACES of a thread (2, 4 or 8), DEPTH lines of the ring; BACKWARD;
// RESTARTS.
#include "tiles.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int PAIRS = PLACES * (int)sizeof(Pair);
constexpr int PAIRS_AT = STATE * THREADS;  // of a line of the ring: [THREADS] State, [THREADS] pairs
constexpr int LINE = PAIRS_AT + PAIRS * THREADS;
constexpr int MET_AT = DEPTH * LINE;    // [2][WARPS + 2][2] State: the outer places of warps
constexpr int MET = (WARPS + 2) * 2 * STATE;

struct __align__(PAIRS < 16 ? PAIRS : 16) Pairs {
  Pair e[PLACES];
};
typedef float Places[PLACES][V];

// Is a thread the first or the last of its warp, and where do the outer places of warps lie that it meets?
#if VECTOR == 2
// In registers that are kept: the compiler would make them anew in every line, which takes a good part of so
// short a line. By whole warps.
struct Lane {
  u32 met_at;
  bool is_first, is_last;

  __device__ __forceinline__ Lane() {
    const int lane = threadIdx.x % 32;
    met_at = __shfl_sync(ALL_LANES, (threadIdx.x / 32 + 1) * 2 * STATE, lane);
    is_first = __shfl_sync(ALL_LANES, lane == 0, lane), is_last = __shfl_sync(ALL_LANES, lane == 31, lane);
  }
  __device__ __forceinline__ u32 met() const { return met_at; }
  __device__ __forceinline__ bool first() const { return is_first; }
  __device__ __forceinline__ bool last() const { return is_last; }
};
#else
struct Lane {
  __device__ __forceinline__ u32 met() const { return (threadIdx.x / 32 + 1) * 2 * STATE; }
  __device__ __forceinline__ bool first() const { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ bool last() const { return threadIdx.x % 32 == 31; }
};
#endif

struct Carrier {
  Store store;
  Lane lane;
  int place, channel;
  int which;    // 0: its first place is beside another tile; 1: its last place is; or -1
  int present;  // of the thread's places
  unsigned char *pairs_at, *side_at, *met;  // in shared memory: of the ring's first line; the warp's
  Pair* pairs;  // of the next line to copy
  float *from, *to;  // sides: of the next line to copy, and to write
  long long pairs_line, sides_line;  // from a line to the next that is visited
  Places q;
  float left[V], right[V];              // what neighbours see: where they are in another tile, the whole
  float left_alone[V], right_alone[V];  // what a tile has alone, of places beside another

  __device__ __forceinline__ Carrier(const Params& p, int b, int d, int channel_, bool adjoint)
      : store(p, b, d, channel_ / (p.channels / weight_sets(p)), adjoint) {
    channel = channel_;
    place = threadIdx.x * PLACES;
    const int places = store.s.places;
    present = max(0, min(PLACES, places - place));
    const bool first = place % SIDE == 0 && place > 0 && place < places;
    const bool last = (place + PLACES) % SIDE == 0 && place + PLACES < places;
    which = first ? 0 : last ? 1 : -1;
    const int begin = adjoint ? store.s.lines - 1 : 0, step = adjoint ? -1 : 1;
    unsigned char* shared = held_shared_memory();
    pairs_at = shared + PAIRS_AT + threadIdx.x * PAIRS, side_at = shared + threadIdx.x * STATE;
    met = shared + MET_AT + lane.met();
    pairs = store.pair(begin, place);
    from = to = store.side(begin, place / SIDE, which < 0 ? 0 : which, channel);
    pairs_line = step * padded(places), sides_line = step * store.side_line;
#pragma unroll
    for (int v = 0; v < V; v++) {
      left[v] = right[v] = left_alone[v] = right_alone[v] = 0.f;
#pragma unroll
      for (int i = 0; i < PLACES; i++) q[i][v] = 0.f;
    }
    // Beyond the first and the last warp there is nothing.
    for (int i = threadIdx.x; i < 4 * (WARPS + 2); i += THREADS) ((State*)(shared_memory() + MET_AT))[i] = {};
  }
  // Sets out what a line needs, and goes on to the next.
  __device__ __forceinline__ void copy(int slot) {
    constexpr int SIZE = PAIRS < 16 ? PAIRS : 16;
    // Lines of weights are padded to four places.
    constexpr int FOUR = 4 * (int)sizeof(Pair);
#pragma unroll
    for (int part = 0; part < PAIRS / SIZE; part++)
      copy_async<SIZE>(pairs_at + slot + part * SIZE, (unsigned char*)pairs + part * SIZE,
                       present > part * SIZE / FOUR * 4 ? SIZE : 0);
    if (which >= 0) copy_async<STATE>(side_at + slot, from);
    pairs += pairs_line;
    from += sides_line;
  }
  __device__ __forceinline__ void copy_first() {
    for (int line = 0; line < DEPTH; line++) {
      if (line < store.s.lines) copy(line * LINE);
      copy_commit();
    }
    __syncthreads();
  }
  // Takes a line that has arrived, and sets out the one that is DEPTH lines after it.
  __device__ __forceinline__ Pairs take(int visited, int& slot) {
    copy_wait<DEPTH - 1>();
    const Pairs now = *(const Pairs*)(pairs_at + slot);
    if (which == 0) load_state(side_at + slot, left_alone);
    if (which == 1) load_state(side_at + slot, right_alone);
    if (visited + DEPTH < store.s.lines) copy(slot);
    copy_commit();
    slot = slot + LINE == DEPTH * LINE ? 0 : slot + LINE;
    return now;
  }
  __device__ __forceinline__ void keep_side() {
    if (which == 0) store_state(to, left);
    if (which == 1) store_state(to, right);
    to += sides_line;
  }
  // The outer places of warps, in two buffers that take turns.
  __device__ __forceinline__ void publish(int parity) const {
    if (lane.first()) store_state(met + parity * MET, left);
    if (lane.last()) store_state(met + parity * MET + STATE, right);
  }
  // What a thread sees of its neighbours; a barrier must come before. By whole warps.
  __device__ __forceinline__ void meet(int parity, float (&before)[V], float (&after)[V]) const {
#pragma unroll
    for (int v = 0; v < V; v++) {
      before[v] = __shfl_up_sync(ALL_LANES, right[v], 1);
      after[v] = __shfl_down_sync(ALL_LANES, left[v], 1);
    }
    if (lane.first()) load_state(met + parity * MET - STATE, before);
    if (lane.last()) load_state(met + parity * MET + 2 * STATE, after);
  }

  __device__ __forceinline__ void load_ends(int tile, Places& e) const {
#pragma unroll
    for (int i = 0; i < PLACES; i++)
      if (i < present) load_state(store.end(tile, place + i, channel), e[i]);
  }
  // Between two tiles of lines all becomes whole, and is kept.
  __device__ __forceinline__ void enter(int tile, const Places& own) {
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
#pragma unroll
      for (int v = 0; v < V; v++) q[i][v] += own[i][v];
      if (i < present) store_state(store.end(tile, place + i, channel), q[i]);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < PLACES; i++)
#pragma unroll
      for (int v = 0; v < V; v++) q[i][v] = 0.f;
  }
};

// q = weights over the line before.
__device__ __forceinline__ void step(const Pairs& pairs, float (&before)[V], const float (&after)[V],
                                     Places& q) {
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps w = taps_of(pairs.e[i], v);
      const float here = q[i][v], next = i + 1 < PLACES ? q[i + 1 < PLACES ? i + 1 : i][v] : after[v];
      q[i][v] = fmaf(w.before, before[v], fmaf(w.after, next, w.here * here));
      before[v] = here;
    }
  }
}

__device__ __forceinline__ void carry_states(const Params& p, Carrier& me) {
  const int lines = me.store.s.lines;
  Places own = {};
  int slot = 0, restart = 0, tile = 0, end = SIDE - me.store.late;  // the line that the next tile begins with
  if (end < lines) me.load_ends(0, own);
#pragma unroll 2
  for (int line = 0; line < lines; line++) {
    const int parity = line & 1;
    if (line == end) {
      me.enter(tile, own);
#pragma unroll
      for (int v = 0; v < V; v++) {
        me.left[v] = me.which == 0 ? me.left[v] : me.q[0][v];
        me.right[v] = me.which == 1 ? me.right[v] : me.q[PLACES - 1][v];
      }
      tile++, end += SIDE;
      if (end < lines) me.load_ends(tile, own);
    }
    me.publish(parity);
    const Pairs pairs = me.take(line, slot);
    __syncthreads();
    float before[V], after[V];
    me.meet(parity, before, after);
    step(pairs, before, after, me.q);
    if (RESTARTS && line == restart) {
      me.clear();
      restart += p.chunk;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      me.left[v] = me.q[0][v] + me.left_alone[v];
      me.right[v] = me.q[PLACES - 1][v] + me.right_alone[v];
    }
    me.keep_side();
  }
}

#if BACKWARD
// q of a line becomes what it hands to the line before; `left` and `right` of it go to neighbours.
__device__ __forceinline__ void hand_back(Carrier& me, const Pairs& pairs) {
  Places own;
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps w = taps_of(pairs.e[i], v);
      if (i == 0) me.left[v] = fmaf(w.before, me.q[0][v], me.left_alone[v]);
      if (i == PLACES - 1) me.right[v] = fmaf(w.after, me.q[i][v], me.right_alone[v]);
      float sum = w.here * me.q[i][v];
      const int previous = i > 0 ? i - 1 : 0, next = i + 1 < PLACES ? i + 1 : i;
      if (i > 0) sum = fmaf(taps_of(pairs.e[previous], v).after, me.q[previous][v], sum);
      if (i + 1 < PLACES) sum = fmaf(taps_of(pairs.e[next], v).before, me.q[next][v], sum);
      own[i][v] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < PLACES; i++)
#pragma unroll
    for (int v = 0; v < V; v++) me.q[i][v] = own[i][v];
}

__device__ __forceinline__ void carry_adjoints(const Params& p, Carrier& me) {
  const int lines = me.store.s.lines;
  Places own = {};
  int slot = 0, tile = (lines - 1 + me.store.late) / SIDE;
  int begin = tile * SIDE - me.store.late;  // the tile's first line
  if (tile > 0) me.load_ends(tile, own);
#pragma unroll 2
  for (int visited = 0; visited < lines; visited++) {
    const int line = lines - 1 - visited, parity = visited & 1;
    const Pairs pairs = me.take(visited, slot);
    hand_back(me, pairs);
    me.keep_side();
    me.publish(parity);
    __syncthreads();
    float before[V], after[V];
    me.meet(parity, before, after);
#pragma unroll
    for (int v = 0; v < V; v++) {
      me.q[0][v] += before[v];
      me.q[PLACES - 1][v] += after[v];
    }
    const bool restart = RESTARTS && line % p.chunk == 0;
    if (restart) me.clear();
    if (line == begin && tile > 0) {
      if (!restart) me.enter(tile, own);
      tile--, begin -= SIDE;
      if (tile > 0) me.load_ends(tile, own);
    }
  }
}
#endif

KERNEL(THREADS, 1) tiles_borders(CONSTANT_PARAMS p) {
  const int chain = BACKWARD ? blockIdx.x / 2 : blockIdx.x, vectors = p.channels / V, index = chain / vectors;
  const bool adjoint = BACKWARD && blockIdx.x % 2;
  Carrier me(p, index / SCANS, index % SCANS, chain % vectors * V, adjoint);
  me.copy_first();
#if BACKWARD
  if (adjoint)
    carry_adjoints(p, me);
  else
#endif
    carry_states(p, me);
  copy_wait<0>();
}
