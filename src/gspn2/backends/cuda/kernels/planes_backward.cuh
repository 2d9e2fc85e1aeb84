// What vertical and horizontal scans of planes share in backward: who works on which places, the exchange between
// the threads of a line, and the maths of one line.
//
// Macros beside those of common.cuh:
//   HORIZONTAL  0 the lines are rows (down, up), 1 columns (right, left)
//   REVERSED    1 for left: within a piece of a row, columns come last to first; unused by vertical scans
//   PLACES      consecutive places of a line that a thread owns
//   SEGMENT     lines of a segment: one kept state each, and one stage of operands
//   THREADS     at least the threads of a block;  MIN_BLOCKS of them on a multiprocessor
//   WIDE        1: a line spans several warps
//   RAGGED      1: the last place of a line (a column, that is) is not the last of a thread
//   SHARED      1: several channels have the same taps
//   HAS_SUMS    1: several directions, so that dx is a sum over launches
//   HAS_HIDDEN  1: the hidden state is at hand (`y` of forward), nothing is kept or computed again
// Knobs: 0 direction (its index among the scans), 1 threads of a line (a power of two, or whole warps),
//   2 elements of a row in the planes of partial sums.
// Scratch: 0 partial sums of dx (`Sums`), 1 kept states, 2 float32 gradients of the taps, summed over channels so far.
#pragma once
#include "common.cuh"

constexpr int N = PLACES, S = SEGMENT;
constexpr int SIZE = sizeof(storage_t);
constexpr int EACH = 16 / SIZE;  // elements of 16 bytes, the unit of asynchronous copies

// Operands in shared memory. Those of both walks over a segment have two stages, so that the next segment's arrive
// meanwhile; those of the walk back only are fetched during the walk forward, into one.
constexpr int X = 0, LAM = 1, TAPS = 1 + HAS_LAM, DOUBLE = 4 + HAS_LAM;
constexpr int DY = 0, GATE = 1, SUM = 1 + HAS_GATE, SUMS = HAS_SUMS ? (STORAGE == 0 ? 1 : 2) : 0, SINGLE = SUM + SUMS;

// Packed elements: 16-bit ones two a word.
__device__ constexpr int words_of(int elements) { return elements * SIZE / 4; }

__device__ __forceinline__ float element(const u32* words, int i) {
#if STORAGE == 0
  return __uint_as_float(words[i]);
#elif STORAGE == 1
  return __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
  return __half2float(__ushort_as_half((unsigned short)(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)));
#endif
}

#if STORAGE != 0
// Two neighbours, the lower address first.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#if STORAGE == 1
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return (u32)__bfloat16_as_ushort(v.x) | (u32)__bfloat16_as_ushort(v.y) << 16;
#else
  const __half2 v = __floats2half2_rn(low, high);
  return (u32)__half_as_ushort(__low2half(v)) | (u32)__half_as_ushort(__high2half(v)) << 16;
#endif
}
#endif

// COUNT elements of storage; and COUNT float32 numbers as the SUMS operands hold them: with 16-bit storage the upper
// and the lower halves of their bits are planes of their own, so that they travel like any other operand.
template <int COUNT>
struct Packed {
  u32 words[words_of(COUNT)];

  __device__ __forceinline__ float operator[](int i) const { return element(words, i); }
};

template <int COUNT>
__device__ __forceinline__ void narrow_all(Packed<COUNT>& packed, const float (&v)[COUNT]) {
#if STORAGE == 0
#pragma unroll
  for (int i = 0; i < COUNT; i++) packed.words[i] = __float_as_uint(v[i]);
#else
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) packed.words[i / 2] = narrow_pair(v[i], v[i + 1]);
#endif
}

struct Pair {
  u32 upper, lower;
};
// Two float32 numbers as upper and lower halves, and back.
__device__ __forceinline__ Pair split(float first, float second) {
  const u32 a = __float_as_uint(first), b = __float_as_uint(second);
  return {__byte_perm(a, b, 0x7632), __byte_perm(a, b, 0x5410)};
}
__device__ __forceinline__ float joined(u32 upper, u32 lower, int i) {
  return __uint_as_float(__byte_perm(lower, upper, i & 1 ? 0x7632 : 0x5410));
}

// Where a thread is: the plane its line belongs to, and its places of the line.
struct Thread {
  int lane, warp;
  int slot;                   // of the plane, counted over the grid
  int b, group;
  int place, places;          // first place; places of a line
  bool alive;                 // it has places
  bool has_before, has_after; // does the line go on before its first place, after its last?
  float* edges;               // [2][warps + 2][2]
  int parity;
};

// Line `index` of the threads of the grid.
__device__ __forceinline__ Thread thread_of(const Params& p, const Scan& scan, int index, float* edges) {
  const int width = p.knobs[1], per_block = max((int)blockDim.x / width, 1);
  Thread t;
  t.lane = index % 32, t.warp = index / 32;
  t.slot = blockIdx.x * per_block + index / width;
  t.b = t.slot / p.groups;
  t.group = t.slot - t.b * p.groups;
  t.place = index % width * N;
  t.places = scan.places;
  t.alive = t.b < p.batch && t.place < t.places;
  t.has_before = t.place > 0;
  t.has_after = t.place + N < t.places;
  t.edges = edges;
  t.parity = 0;
  return t;
}

__device__ __forceinline__ bool has_before(const Thread& t, int n) { return n > 0 || t.has_before; }
__device__ __forceinline__ bool has_after(const Thread& t, int n) {
#if RAGGED
  return t.place + n + 1 < t.places;
#else
  return n + 1 < N || t.has_after;
#endif
}
// Places beyond the line's end are computed along; what they hold must not become a NaN.
__device__ __forceinline__ float inside(const Thread& t, int n, float v) {
#if RAGGED
  return t.place + n < t.places ? v : 0.f;
#else
  return v;
#endif
}

// What a thread shows to its neighbours: `first` to the one before, `last` to the one after. `publish` and
// `settle` come in pairs, and every thread of the block takes part.
struct Shown {
  float first, last;
};
struct Edges {
  float before, after;  // 0 where there is no neighbour
};

__device__ __forceinline__ void publish(Thread& t, const Shown& shown) {
#if WIDE
  float* edges = t.edges + (t.parity * (blockDim.x / 32 + 2) + t.warp + 1) * 2;
  if (t.lane == 0) edges[0] = shown.first;
  if (t.lane == 31) edges[1] = shown.last;
#endif
}
__device__ __forceinline__ Edges settle(Thread& t, const Shown& shown) {
  float before = __shfl_up_sync(~0u, shown.last, 1), after = __shfl_down_sync(~0u, shown.first, 1);
#if WIDE
  named_barrier(0, blockDim.x);
  const float* edges = t.edges + (t.parity * (blockDim.x / 32 + 2) + t.warp) * 2;
  if (t.lane == 0) before = edges[1];
  if (t.lane == 31) after = edges[4];
  t.parity ^= 1;
#endif
  return {t.has_before ? before : 0.f, t.has_after ? after : 0.f};
}

__device__ __forceinline__ void weights(const Thread& t, const Taps (&taps)[N], Taps (&w)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) w[n] = tap_weights(taps[n], has_before(t, n), has_after(t, n));
}

// The state of the next line: h and its edges are those of the line before.
__device__ __forceinline__ void forward_line(Thread& t, float (&h)[N], Edges& edges, const float (&u)[N], const Taps (&taps)[N],
                                             bool restart) {
  float next[N];
  if (restart) {
#pragma unroll
    for (int n = 0; n < N; n++) next[n] = u[n];
  } else {
    Taps w[N];
    weights(t, taps, w);
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float before = n > 0 ? h[n - 1] : edges.before, after = n + 1 < N ? h[n + 1] : edges.after;
      next[n] = fmaf(w[n].before, before, fmaf(w[n].after, after, fmaf(w[n].here, h[n], u[n])));
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) h[n] = inside(t, n, next[n]);
  const Shown shown = {h[0], h[N - 1]};
  publish(t, shown);
  edges = settle(t, shown);
}

// The part of the walk back that lines hand on. `g` is complete; afterwards `carried` is what this line hands to
// the line before it in scan order, but for what `settle(t, result)` brings.
__device__ __forceinline__ Shown carry_line(Thread& t, float (&carried)[N], const float (&g)[N], const Taps (&w)[N]) {
  // By places: from the one before, here, from the one after, in this order.
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sum = w[n].here * g[n];
    if (n > 0) sum = fmaf(w[n - 1].after, g[n - 1], sum);
    if (n + 1 < N) sum = fmaf(w[n + 1].before, g[n + 1], sum);
    carried[n] = sum;
  }
  return {w[0].before * g[0], w[N - 1].after * g[N - 1]};
}

// Gradients of the weights of one line from g and the state of the line before.
__device__ __forceinline__ void weight_gradients(Taps (&dw)[N], const float (&g)[N], const float (&h)[N], const Edges& edges) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float before = n > 0 ? h[n - 1] : edges.before, after = n + 1 < N ? h[n + 1] : edges.after;
    dw[n] = {g[n] * before, g[n] * h[n], g[n] * after};
  }
}

// Float32 numbers of a block, one thread's next to another's: only the thread that wrote them reads them.
__device__ __forceinline__ void put_floats(float* base, const float (&v)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) base[n * blockDim.x + threadIdx.x] = v[n];
}
__device__ __forceinline__ void get_floats(const float* base, float (&v)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) v[n] = base[n * blockDim.x + threadIdx.x];
}

// A line of states in shared memory, private to a warp but for the edges: [SEGMENT][N / VEC][32][VEC].
constexpr int VEC = N < 4 ? N : 4;
constexpr int STATE_LINE = 32 * N;  // floats

__device__ __forceinline__ int state_index(int s, int n, int lane) {
  return s * STATE_LINE + (n / VEC * 32 + lane) * VEC + n % VEC;
}
struct alignas(4 * VEC) Floats {
  float v[VEC];
};
__device__ __forceinline__ void put_state(float* states, int s, int lane, const float (&h)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    Floats f;
#pragma unroll
    for (int i = 0; i < VEC; i++) f.v[i] = h[n + i];
    *(Floats*)(states + state_index(s, n, lane)) = f;
  }
}
// With the edges. `pitch`: floats from one warp's states to the next one's.
__device__ __forceinline__ Edges get_state(const float* states, int pitch, int s, const Thread& t, float (&h)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    const Floats f = *(const Floats*)(states + state_index(s, n, t.lane));
#pragma unroll
    for (int i = 0; i < VEC; i++) h[n + i] = f.v[i];
  }
  float before = __shfl_up_sync(~0u, h[N - 1], 1), after = __shfl_down_sync(~0u, h[0], 1);
#if WIDE
  if (t.lane == 0 && t.has_before) before = states[state_index(s, N - 1, 31) - pitch];
  if (t.lane == 31 && t.has_after) after = states[state_index(s, 0, 0) + pitch];
#endif
  return {t.has_before ? before : 0.f, t.has_after ? after : 0.f};
}

// Addresses -------------------------------------------------------------------------------------------------

// Operand `op` (X.. or DOUBLE + DY..) of a plane: its first element. Partial sums of dx are dx itself for float32.
__device__ __forceinline__ unsigned char* plane_of(const View& v, int b, int d, int c, int k) {
  return (unsigned char*)(v.data + (b * v.b + d * v.d + c * v.c + k * v.k));
}
__device__ __forceinline__ unsigned char* sums_of(const Params& p, int b, int c, int half) {
  const long long plane = (long long)p.height * p.knobs[2];
  return (unsigned char*)p.scratch[0] + ((long long)half * p.batch * p.channels + (long long)b * p.channels + c) * plane * 2;
}
__device__ __forceinline__ const unsigned char* source_of(const Params& p, int op, int b, int group, int c) {
  const int d = p.knobs[0];
  if (op == X) return plane_of(p.x, b, 0, c, 0);
  if (HAS_LAM && op == LAM) return plane_of(p.lam, b, d, c, 0);
  if (op < DOUBLE) return plane_of(p.taps, b, d, group, op - TAPS);
  if (op == DOUBLE + DY) return plane_of(p.dy, b, 0, c, 0);
  if (HAS_GATE && op == DOUBLE + GATE) return plane_of(p.gate, b, d, c, 0);
  if (STORAGE == 0) return plane_of(p.dx, b, 0, c, 0);
  return sums_of(p, b, c, op - DOUBLE - SUM);
}
// Elements from one row to the next. They fit 32 bits: the plan sees to it.
__device__ __forceinline__ int source_pitch(const Params& p, int op) {
  if (op == X) return (int)p.x.h;
  if (HAS_LAM && op == LAM) return (int)p.lam.h;
  if (op < DOUBLE) return (int)p.taps.h;
  if (op == DOUBLE + DY) return (int)p.dy.h;
  if (HAS_GATE && op == DOUBLE + GATE) return (int)p.gate.h;
  return STORAGE == 0 ? (int)p.dx.h : p.knobs[2];
}

// What is written in the place of operand `op`: null if nobody asks for it. dx belongs to x where it is complete
// (or float32), to the sums where it is not.
__device__ __forceinline__ bool is_first(const Params& p) { return !HAS_SUMS || p.knobs[0] == 0; }
__device__ __forceinline__ bool is_last(const Params& p) { return !HAS_SUMS || p.knobs[0] + 1 == p.scans; }
__device__ __forceinline__ bool wants_sums(const Params& p) {
  return HAS_SUMS && STORAGE != 0 && p.dx.data != nullptr && !is_last(p);
}
__device__ __forceinline__ bool reads_sums(const Params& p) { return HAS_SUMS && p.dx.data != nullptr && !is_first(p); }

__device__ __forceinline__ bool is_wanted(const Params& p, int op) {
  if (op == X) return p.dx.data != nullptr && (STORAGE == 0 || is_last(p));
  if (HAS_LAM && op == LAM) return p.dlam.data != nullptr;
  if (op < DOUBLE) return p.dtaps.data != nullptr;
  if (op == DOUBLE + DY) return false;
  if (HAS_GATE && op == DOUBLE + GATE) return p.dgate.data != nullptr;
  return wants_sums(p);
}
__device__ __forceinline__ unsigned char* sink_of(const Params& p, int op, int b, int group, int c) {
  const int d = p.knobs[0];
  if (op == X) return plane_of(p.dx, b, 0, c, 0);
  if (HAS_LAM && op == LAM) return plane_of(p.dlam, b, d, c, 0);
  if (op < DOUBLE) return plane_of(p.dtaps, b, d, group, op - TAPS);
  if (HAS_GATE && op == DOUBLE + GATE) return plane_of(p.dgate, b, d, c, 0);
  return sums_of(p, b, c, op - DOUBLE - SUM);
}
__device__ __forceinline__ int sink_pitch(const Params& p, int op) {
  if (op == X) return (int)p.dx.h;
  if (HAS_LAM && op == LAM) return (int)p.dlam.h;
  if (op < DOUBLE) return (int)p.dtaps.h;
  if (HAS_GATE && op == DOUBLE + GATE) return (int)p.dgate.h;
  return p.knobs[2];
}
__device__ __forceinline__ unsigned char* at_row(unsigned char* base, int row, int pitch) {
  return base + (long long)(row * SIZE) * pitch;
}
__device__ __forceinline__ const unsigned char* at_row(const unsigned char* base, int row, int pitch) {
  return base + (long long)(row * SIZE) * pitch;
}

// Words between shared or global memory and registers, in accesses as wide as they go.
template <int WORDS>
__device__ __forceinline__ void read_words(u32 (&to)[WORDS], const unsigned char* from) {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0, "4, 8 or a multiple of 16 bytes");
  if constexpr (WORDS == 1) {
    to[0] = *(const u32*)from;
  } else if constexpr (WORDS == 2) {
    const uint2 v = *(const uint2*)from;
    to[0] = v.x, to[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = *(const uint4*)(from + 4 * i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  }
}
template <int WORDS>
__device__ __forceinline__ void write_words(unsigned char* to, const u32 (&from)[WORDS]) {
  if constexpr (WORDS == 1) {
    *(u32*)to = from[0];
  } else if constexpr (WORDS == 2) {
    *(uint2*)to = make_uint2(from[0], from[1]);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) *(uint4*)(to + 4 * i) = make_uint4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  }
}
// To global memory, where it is not read again soon.
template <int WORDS>
__device__ __forceinline__ void store_words(unsigned char* to, const u32 (&from)[WORDS]) {
  if constexpr (WORDS == 1) {
    __stcs((u32*)to, from[0]);
  } else if constexpr (WORDS == 2) {
    __stcs((uint2*)to, make_uint2(from[0], from[1]));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      store_stream(to + 4 * i, make_uint4(from[i], from[i + 1], from[i + 2], from[i + 3]));
  }
}

// The gradient of shared taps: summed over the channels of a group one channel after another, in float32 memory that
// only this thread touches. True at the last channel: `dw` is complete then.
__device__ __forceinline__ bool sum_channels(const Params& p, int line, int member, Taps (&dw)[N]) {
#if SHARED
  const int members = p.channels / p.groups;
  const long long row = N * (long long)blockDim.x, lines = HORIZONTAL ? p.width : p.height;
  float* base = (float*)p.scratch[2] + (blockIdx.x * lines + line) * 3 * row;
  float before[N], here[N], after[N];
  if (member > 0) {
    get_floats(base, before), get_floats(base + row, here), get_floats(base + 2 * row, after);
#pragma unroll
    for (int n = 0; n < N; n++) dw[n].before += before[n], dw[n].here += here[n], dw[n].after += after[n];
  }
  if (member + 1 == members) return true;
#pragma unroll
  for (int n = 0; n < N; n++) before[n] = dw[n].before, here[n] = dw[n].here, after[n] = dw[n].after;
  put_floats(base, before), put_floats(base + row, here), put_floats(base + 2 * row, after);
  return false;
#else
  return true;
#endif
}
