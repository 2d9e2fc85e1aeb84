// What the pixel kernels share. The layout: channels adjacent, so that a thread owns whole vectors of channels.
//
// A block scans a run of places of a line, VECTORS vectors of channels wide; a thread owns one vector at PLACES
// neighbouring places and keeps their states in registers. Its operands come through a ring of shared memory that
// is its own, so nothing waits for anybody but at the one barrier a line, where neighbouring places meet.
//
// Macros (beside those of common.cuh):
//   VECTOR      bytes of a vector: 4, 8 or 16
//   VECTORS     vectors of a block
//   PLACES      neighbouring places of a thread
//   OWN_TAPS    1: every channel has taps of its own; 0: a vector's channels share them
//   INTERLEAVED with OWN_TAPS, 1: the three taps of a channel are adjacent; 0: the channels of a tap are
//   TAP_GROUPS  groups of taps that a block meets (without OWN_TAPS)
//   TAP_LINES   lines of taps that are normalised together, at least 2 (without OWN_TAPS)
//   TAP_WORDS   1: three 16-bit taps lie in two aligned words, which are the tensor's (without OWN_TAPS)
//   THREADS     of a block, exactly; MIN_BLOCKS of them on a multiprocessor
//   ROLES, SPLIT  blocks of a cluster (sm_90) share the work: 1, 2 or 4 roles; 1: each role's lines are split
//   HALO        places recomputed on either side of a split, and lines between two exchanges; 0 without SPLIT
#pragma once
#include "common.cuh"

#define CLUSTER (ROLES > 1 || SPLIT)
#ifndef TAP_WORDS
#define TAP_WORDS 0
#endif

constexpr int V = VECTOR / (int)sizeof(storage_t);  // channels of a vector
constexpr int WORDS = VECTOR / 4;
constexpr int F = V < 4 ? V : 4;  // float32 values that move together
constexpr int PARTS = V / F;

struct __align__(VECTOR) Vector {
  u32 word[WORDS];
};
struct __align__(4 * F) Floats {
  float e[F];
};
struct __align__(16) Weights {
  float before, here, after, unused;
};

#if STORAGE == 1
__device__ __forceinline__ u32 bits(storage_t v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#elif STORAGE == 2
__device__ __forceinline__ u32 bits(storage_t v) { return __half_as_ushort(v); }
__device__ __forceinline__ float low(u32 pair) {
  return __half2float(__ushort_as_half((unsigned short)(pair & 0xffffu)));
}
__device__ __forceinline__ float high(u32 pair) {
  return __half2float(__ushort_as_half((unsigned short)(pair >> 16)));
}
#endif

__device__ __forceinline__ void unpack(const Vector& v, float* e) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
#if STORAGE == 0
    e[i] = __uint_as_float(v.word[i]);
#else
    e[2 * i] = low(v.word[i]);
    e[2 * i + 1] = high(v.word[i]);
#endif
  }
}

__device__ __forceinline__ Vector pack(const float* e) {
  Vector v;
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
#if STORAGE == 0
    v.word[i] = __float_as_uint(e[i]);
#elif STORAGE == 1
    const __nv_bfloat162 pair = __floats2bfloat162_rn(e[2 * i], e[2 * i + 1]);
    v.word[i] = bits(pair.x) | bits(pair.y) << 16;
#else
    const __half2 pair = __floats2half2_rn(e[2 * i], e[2 * i + 1]);
    v.word[i] = bits(pair.x) | bits(pair.y) << 16;
#endif
  }
  return v;
}

// V float32 values, whose parts lie `pitch` apart: threads that are neighbours then use all banks.
__device__ __forceinline__ void load_floats(const Floats* from, int pitch, float* e) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const Floats f = from[part * pitch];
#pragma unroll
    for (int i = 0; i < F; i++) e[part * F + i] = f.e[i];
  }
}
__device__ __forceinline__ void store_floats(Floats* to, int pitch, const float* e) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    Floats f;
#pragma unroll
    for (int i = 0; i < F; i++) f.e[i] = e[part * F + i];
    to[part * pitch] = f;
  }
}

// To global memory, as such: a pointer that may be one or another is not always seen to be global.
__device__ __forceinline__ void store_vector(storage_t* to, const float* e) {
  const Vector v = pack(e);
#if VECTOR == 16
  __stwb((uint4*)to, make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
#elif VECTOR == 8
  __stwb((uint2*)to, make_uint2(v.word[0], v.word[1]));
#else
  __stwb((u32*)to, v.word[0]);
#endif
}
__device__ __forceinline__ void store_part(float* to, const float* e) {
#if VECTOR / 4 * (STORAGE == 0 ? 1 : 2) >= 4
  __stwb((float4*)to, make_float4(e[0], e[1], e[2], e[3]));
#elif VECTOR / 4 * (STORAGE == 0 ? 1 : 2) == 2
  __stwb((float2*)to, make_float2(e[0], e[1]));
#else
  __stwb(to, e[0]);
#endif
}
__device__ __forceinline__ void store_sums(float* to, const float* e) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) store_part(to + part * F, e + part * F);
}

// From a thread's own values to those of a thread beside it, or to the zeros at the start of the row if there is no
// such place.
__device__ __forceinline__ int beside(bool exists, int step) { return exists ? step : -(VECTORS + (int)threadIdx.x); }

// The knobs that place a block.
struct Layout {
  int splits, channel_blocks;
  int row_run, column_run;  // places of a split along a row, along a column
};

__device__ __forceinline__ Layout layout_of(const Params& p) {
  return {SPLIT ? p.knobs[0] : 1, p.knobs[1], p.knobs[2], p.knobs[3]};
}

// What a thread is during the whole launch. `role` and `split` tell apart the blocks of a cluster; a vector
// beyond the last channel is not `present`.
struct Self {
  int b, channel, vector, column;
  int role, split;
  bool present;
};

__device__ __forceinline__ Self self_of(const Params& p, const Layout& layout) {
  const int size = ROLES * layout.splits;
  const int index = blockIdx.x / size, rank = blockIdx.x % size;
  Self me;
  me.role = rank / layout.splits;
  me.split = rank % layout.splits;
  me.b = index / layout.channel_blocks;
  me.vector = threadIdx.x % VECTORS;
  me.column = threadIdx.x / VECTORS;
  me.channel = (index % layout.channel_blocks * VECTORS + me.vector) * V;
  me.present = me.channel < p.channels;
  return me;
}

// The places of a block in one direction: it answers for [own, end) and scans [start, stop), which has up to
// HALO places more on either side, whose states are brought up to date every HALO lines.
struct Run {
  int own, end, start, stop;
};

__device__ __forceinline__ Run run_of(const Layout& layout, const Scan& s, int split) {
  const int q = s.vertical ? layout.row_run : layout.column_run;
  Run r;
  r.own = min(split * q, s.places);
  r.end = min(r.own + q, s.places);
  r.start = max(r.own - HALO, 0);
  r.stop = r.own < r.end ? min(r.end + HALO, s.places) : r.start;
  return r;
}

// One operand as a thread reads or writes it: `at` is its vector at its first place on the line that is next.
struct Stream {
  storage_t* at;
  long long line, place;
};

__device__ __forceinline__ Stream stream_of(const View& v, const Scan& s, int b, int d, int c, int line, int place) {
  if (v.data == nullptr) return {nullptr, 0, 0};
  const long long step = line_step(v, s), next = place_step(v, s);
  return {v.data + b * v.b + d * v.d + c * v.c + first_line(v, s) + line * step + place * next, step, next};
}

// Float32 sums over directions, laid out (B, H, W, C).
struct Sums {
  float* at;
  long long line, place;
};

__device__ __forceinline__ Sums sums_of(const Params& p, void* scratch, const Scan& s, int b, int c, int line,
                                        int place) {
  const long long w = p.channels, h = w * p.width;
  const long long step = s.reversed ? -(s.vertical ? h : w) : (s.vertical ? h : w), next = s.vertical ? w : h;
  const long long first = s.reversed ? (s.lines - 1) * -step : 0;
  return {(float*)scratch + b * h * p.height + c + first + line * step + place * next, step, next};
}

#if OWN_TAPS
struct TapStages {};  // taps come with the other operands
#else
// The taps of a block's places, TAP_LINES lines a stage: raw values wait in registers for a stage, then all threads
// turn them into weights, in shared memory, for the stage after. Two stages of weights take turns.
// The next stage is turned in the middle of one, when its values have come, also in the first stage of a phase.
constexpr int TAP_TURN = TAP_LINES / 4 * 2;
constexpr int TAP_ITEMS = (TAP_LINES * TAP_GROUPS * PLACES + VECTORS - 1) / VECTORS;

struct TapStages {
  Weights* weights;  // [2][TAP_LINES][TAP_GROUPS][places]
  const storage_t* data;
  long long line, place, group, k;
  int places, first, all;  // of the block; place along the line of the first; places of the whole line
  int begin, end;         // lines of this phase
  int item[TAP_ITEMS];    // which (line, group, place) this thread turns
#if TAP_WORDS
  u32 raw[TAP_ITEMS][2];  // a word each of its own item and of that of the lane beside it
#else
  storage_t raw[TAP_ITEMS][3];
#endif

  __device__ __forceinline__ void start(const Params& p, const Scan& s, const Run& r, int b, int d, int group_,
                                        int begin_, int end_, Weights* shared) {
    weights = shared;
    data = p.taps.data + b * p.taps.b + d * p.taps.d + group_ * p.taps.c + first_line(p.taps, s);
    line = line_step(p.taps, s), place = place_step(p.taps, s), group = p.taps.c, k = p.taps.k;
    places = r.stop - r.start, first = r.start, all = s.places, begin = begin_, end = end_;
#pragma unroll
    for (int i = 0; i < TAP_ITEMS; i++) {
      const int index = threadIdx.x + i * THREADS;
      const int row = places > 0 ? index / places : TAP_LINES * TAP_GROUPS;
      // Row and place in one word: most threads hold several.
      item[i] = row < TAP_LINES * TAP_GROUPS ? row << 16 | (index - row * places) : -1;
    }
  }

  // Nothing looks at what is on its way, and no branch parts the loads: they all wait together, in `turn`. Threads
  // without an item, and items beyond the last line, load what another does.
  __device__ __forceinline__ void fetch(int stage) {
    const int first_line = begin + stage * TAP_LINES;
    if (places <= 0 || first_line < begin || first_line >= end) return;
#pragma unroll
    for (int i = 0; i < TAP_ITEMS; i++) {
#if TAP_WORDS
      // Two lanes read the two words of an item: one request for each item.
      const int odd = threadIdx.x & 1, beside = __shfl_xor_sync(0xffffffffu, item[i], 1);
#pragma unroll
      for (int which = 0; which < 2; which++)
        raw[i][which] = __ldg((const u32*)((u64)address(which == odd ? item[i] : beside, first_line) & ~3ull) + odd);
#else
      const storage_t* a = address(item[i], first_line);
      raw[i][0] = __ldg(a), raw[i][1] = __ldg(a + k), raw[i][2] = __ldg(a + 2 * k);
#endif
    }
  }
  __device__ __forceinline__ const storage_t* address(int what, int first_line) const {
    const int row = max(what, 0) >> 16, l = max(what, 0) & 0xffff;
    const int at = min(first_line + row / TAP_GROUPS, end - 1);
    return data + at * line + (first + l) * place + row % TAP_GROUPS * group;
  }

  // The three values of an item, from all lanes at once.
  __device__ __forceinline__ Taps arrived(int i) const {
#if TAP_WORDS
    const int odd = threadIdx.x & 1;
    const u32 other = __shfl_xor_sync(0xffffffffu, odd ? raw[i][0] : raw[i][1], 1);
    const u32 a = odd ? other : raw[i][0], b = odd ? raw[i][1] : other;
    // Lines and places are whole words apart.
    const bool late = (u64)(data + (max(item[i], 0) >> 16) % TAP_GROUPS * group) & 2;
    return late ? Taps{high(a), low(b), high(b)} : Taps{low(a), high(a), low(b)};
#else
    return {widen(raw[i][0]), widen(raw[i][1]), widen(raw[i][2])};
#endif
  }

  __device__ __forceinline__ void turn(int stage) {
#pragma unroll
    for (int i = 0; i < TAP_ITEMS; i++) {
      const int row = item[i] >> 16, l = item[i] & 0xffff;
      const int at = begin + stage * TAP_LINES + row / TAP_GROUPS;
      const Taps a = arrived(i);
      if (item[i] < 0 || at < begin || at >= end) continue;
      const Taps w = tap_weights(a, first + l > 0, first + l + 1 < all);
      weights[((stage & 1) * TAP_LINES * TAP_GROUPS + row) * places + l] = {w.before, w.here, w.after, 0.f};
    }
  }

  // Weights of (line, group of the block, place of the block); `line` counts from `begin`.
  __device__ __forceinline__ const Weights* of(int line_, int group_, int l) const {
    return weights + (line_ % (2 * TAP_LINES) * TAP_GROUPS + group_) * places + l;
  }
};
#endif

#if OWN_TAPS
// The taps of channel v out of the three vectors of a place.
__device__ __forceinline__ Taps own_taps(const float* raw, int v) {
  return INTERLEAVED ? Taps{raw[3 * v], raw[3 * v + 1], raw[3 * v + 2]} : Taps{raw[v], raw[V + v], raw[2 * V + v]};
}
#endif

__device__ __forceinline__ void clear(float (&h)[PLACES][V]) {
#pragma unroll
  for (int q = 0; q < PLACES; q++)
#pragma unroll
    for (int v = 0; v < V; v++) h[q][v] = 0.f;
}

// The index of a direction (0 down, 1 up, 2 right, 3 left) among those of the problem, or -1.
__device__ __forceinline__ int index_of(const Params& p, int direction) {
  for (int d = 0; d < p.scans; d++)
    if (p.directions[d] == direction) return d;
  return -1;
}

#if SPLIT
// Neighbouring splits give each other the values that their halos need: [2][2][HALO][PARTS][VECTORS] Floats at `AT` of
// shared memory, from the split before and the one after, in two buffers that take turns; and before them a barrier for
// each buffer. A split cannot be two exchanges ahead of its neighbour, for it needs what that sends in between.
constexpr int HALO_BYTES = 16 + 16 * V * HALO * VECTORS;

// A barrier of the cluster must follow.
template <int AT>
__device__ __forceinline__ void start_halos() {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init((u64*)(shared_memory() + AT) + i, 1);
    mbarrier_init_fence();
  }
}

__device__ __forceinline__ void send_floats(Floats* to, u64* bar, u32 rank, const float* e) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) store_counted<F>(to + part * VECTORS, bar, rank, e + part * F);
}

// `exchanged` counts all exchanges of the launch.
template <int AT>
__device__ __forceinline__ void exchange_halos(const Params& p, const Layout& layout, const Self& me, const Run& r,
                                               int place, int& exchanged, float (&h)[PLACES][V]) {
  const int rank = me.role * layout.splits + me.split, buffer = exchanged & 1;
  const u32 parity = exchanged >> 1 & 1;
  exchanged++;
  constexpr int side = HALO * PARTS * VECTORS;
  u64* bar = (u64*)(shared_memory() + AT) + buffer;
  Floats* from_before = (Floats*)(shared_memory() + AT + 16) + buffer * 2 * side;
  const int halo_places = r.own - r.start + r.stop - r.end;
  if (r.own >= r.end || halo_places == 0) return;
  if (threadIdx.x == 0) {
    const int vectors = min(VECTORS, (p.channels - (me.channel - me.vector * V)) / V);
    mbarrier_arrive_expect(bar, 4 * V * vectors * halo_places);
  }
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    const int j = place + q;
    if (!me.present || j < r.own || j >= r.end) continue;
    if (me.split > 0 && j < r.own + HALO)
      send_floats(from_before + side + (j - r.own) * PARTS * VECTORS + me.vector, bar, rank - 1, h[q]);
    if (r.stop > r.end && j >= r.end - HALO)
      send_floats(from_before + (j - r.end + HALO) * PARTS * VECTORS + me.vector, bar, rank + 1, h[q]);
  }
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    const int j = place + q;
    if (!me.present || j >= r.stop || (j >= r.own && j < r.end)) continue;
    mbarrier_wait(bar, parity);
    const Floats* from = j < r.own ? from_before + (j - r.own + HALO) * PARTS * VECTORS
                                   : from_before + side + (j - r.end) * PARTS * VECTORS;
    load_floats(from + me.vector, VECTORS, h[q]);
  }
}
#endif

#if ROLES == 4
// y (or dx) = the vertical directions' sums + the horizontal ones', shared out over the blocks of the cluster.
__device__ __forceinline__ void add_axes(const Params& p, const View& to, const Layout& layout, const Self& me) {
  const Scan rows = {p.height, p.width, true, false};
  const long long pixels = (long long)p.height * p.width;
  const int rank = me.role * layout.splits + me.split, step = ROLES * layout.splits * (THREADS / VECTORS);
  if (!me.present || me.column >= THREADS / VECTORS) return;
  for (long long i = rank * (THREADS / VECTORS) + me.column; i < pixels; i += step) {
    const int row = i / p.width, column = i - (long long)row * p.width;
    const Stream y = stream_of(to, rows, me.b, 0, me.channel, row, column);
    float a[V], b[V];
#if STORAGE == 0
    load_floats((const Floats*)y.at, 1, a);
#else
    load_floats((const Floats*)sums_of(p, p.scratch[0], rows, me.b, me.channel, row, column).at, 1, a);
#endif
    load_floats((const Floats*)sums_of(p, p.scratch[1], rows, me.b, me.channel, row, column).at, 1, b);
#pragma unroll
    for (int v = 0; v < V; v++) a[v] += b[v];
    store_vector(y.at, a);
  }
}
#endif
