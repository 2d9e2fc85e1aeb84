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
//   SHARED      1: several channels have the same taps, whose gradient is a sum over them: a cluster takes as many of
//               these channels as it can, one a block, and sums over its blocks after every segment
//   HAS_SUMS    1: several directions, so that dx is a sum over launches
//   HAS_HIDDEN  1: the hidden state is at hand (`y` of forward): nothing is kept or computed again
//   SPLIT       1: the blocks of a cluster share a line. Each has places beyond its own on either side, HALO of them:
//               what it computes there goes wrong by one place a line from the outside, and is put right after every
//               segment by the block that owns it
//   CLUSTER     1: more than one block in a cluster
// Knobs: 0 direction (its index among the scans), 1 threads of a block's part of a line (a power of two, or whole
//   warps), 2 elements of a row in scratch planes, 3 blocks of a line, 4 places that each of them owns, 5 channels of
//   a cluster.
// Scratch: 0 partial sums of dx (`Sums`), 1 kept states, 2 float32 gradients of shared weights, one part for each
//   cluster of a group: [parts][B][G][3][H][row], if there is more than one; planes_backward_taps.cu adds them.
#pragma once
#include "common.cuh"

constexpr int N = PLACES, S = SEGMENT;
constexpr int SIZE = sizeof(storage_t);
constexpr int EACH = 16 / SIZE;  // elements of 16 bytes, the unit of asynchronous copies

// Operands in shared memory. Those of both walks over a segment have two stages, so that the next segment's arrive
// meanwhile; those of the walk back only are fetched during the walk forward, into one.
constexpr int X = 0, LAM = 1, TAPS = 1 + HAS_LAM, DY = TAPS + 3, GATE = DY + 1, HIDDEN = GATE + HAS_GATE;
constexpr int SUM = HIDDEN + HAS_HIDDEN, SUMS = HAS_SUMS ? (STORAGE == 0 ? 1 : 2) : 0, OPERANDS = SUM + SUMS;
constexpr int DOUBLE = HAS_HIDDEN ? OPERANDS : DY, UNITS = DOUBLE + OPERANDS;
static_assert(!(HAS_HIDDEN && (HAS_GATE || HAS_SUMS)), "the output is the state only of a single scan without gate");

constexpr int ROUND = N > EACH ? N : EACH;
constexpr int HALO = SPLIT ? (S + ROUND - 1) / ROUND * ROUND : 0;

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
  int b, channel, group;       // of its plane
  int strip;                   // which of the blocks of a line this is
  int part, member, members;   // shared taps: which cluster of the group, which channel of the cluster, out of how many
  int place, places;           // first place; places of a line
  int begin, end;              // places that the block holds,
  int own_begin, own_end;      // and those it writes
  bool alive, own;             // are the thread's among them
  bool has_before, has_after;  // does the line go on before its first place, after its last?
  float* edges;                // [2][warps + 2][2]
  float* mail;                 // [2][2][HALO]
  int parity, turn;
};

__device__ __forceinline__ int strips_of(const Params& p) { return SPLIT ? p.knobs[3] : 1; }

// The plane of thread `index` of the block.
__device__ __forceinline__ void take_plane(Thread& t, const Params& p, int index) {
  const int strips = strips_of(p), per_group = p.channels / p.groups;
  t.strip = blockIdx.x % strips;
  int block = blockIdx.x / strips;
#if SHARED
  const int together = p.knobs[5], parts = (per_group + together - 1) / together;
  t.member = block % together, block /= together;
  t.part = block % parts, block /= parts;
  t.group = block % p.groups, t.b = block / p.groups;
  t.members = min(together, per_group - t.part * together);
  t.channel = t.group * per_group + t.part * together + t.member;
#else
  const int width = p.knobs[1], slot = block * max((int)blockDim.x / width, 1) + index / width;
  t.b = slot / p.channels;
  t.channel = slot - t.b * p.channels;
  t.group = t.channel / per_group;
  t.part = t.member = 0, t.members = 1;
#endif
}

// Has the block a channel? The last cluster of a group may have blocks to spare.
__device__ __forceinline__ bool has_channel(const Thread& t) { return t.member < t.members; }

__device__ __forceinline__ Thread thread_of(const Params& p, const Scan& scan, int index, float* edges) {
  Thread t;
  t.lane = index % 32, t.warp = index / 32;
  take_plane(t, p, index);
  t.places = scan.places;
  t.begin = t.own_begin = 0, t.end = t.own_end = scan.places;
#if SPLIT
  t.own_begin = t.strip * p.knobs[4];
  t.own_end = min(scan.places, t.own_begin + p.knobs[4]);
  t.begin = max(0, t.own_begin - HALO);
  t.end = min(scan.places, t.own_end + HALO);
#endif
  t.place = t.begin + index % p.knobs[1] * N;
  t.alive = t.b < p.batch && t.place < t.end;
  t.own = t.alive && t.place >= t.own_begin && t.place < t.own_end;
  t.has_before = t.place > 0;
  t.has_after = t.place + N < t.places;
  t.edges = edges;
  t.mail = edges + (blockDim.x / 32 + 2) * 4;
  t.parity = t.turn = 0;
  return t;
}

// All threads of the cluster.
__device__ __forceinline__ void cluster_meets() {
#if CLUSTER
  cluster_barrier();
#else
  named_barrier(0, blockDim.x);
#endif
}

// `v` of the places beyond a block's own, from the blocks that own them: sent before the cluster meets, received after.
__device__ __forceinline__ void send_halo(const Params& p, const Thread& t, const float (&v)[N]) {
#if SPLIT
  float* mail = t.mail + t.turn * 2 * HALO;
  const int after_begin = t.place - t.own_begin, before_end = t.own_end - t.place;
  if (t.own && t.strip > 0 && after_begin < HALO) {
    float* to = cluster_map(mail + HALO, cluster_rank() - 1) + after_begin;
#pragma unroll
    for (int n = 0; n < N; n++) to[n] = v[n];
  }
  if (t.own && t.strip + 1 < p.knobs[3] && before_end <= HALO) {
    float* to = cluster_map(mail, cluster_rank() + 1) + HALO - before_end;
#pragma unroll
    for (int n = 0; n < N; n++) to[n] = v[n];
  }
#endif
}
__device__ __forceinline__ void receive_halo(Thread& t, float (&v)[N]) {
#if SPLIT
  if (t.alive && !t.own) {
    const float* from = t.mail + t.turn * 2 * HALO;
    from += t.place < t.own_begin ? t.place - t.begin : HALO + t.place - t.own_end;
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = from[n];
  }
  t.turn ^= 1;
#endif
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
// What the neighbours of this thread hold of a line of states: `before` and `after`, read from other warps' memory,
// count for the first and the last lane only.
__device__ __forceinline__ Edges edges_of(const Thread& t, const float (&h)[N], const Edges& others) {
  const float before = __shfl_up_sync(~0u, h[N - 1], 1), after = __shfl_down_sync(~0u, h[0], 1);
  return {!t.has_before ? 0.f : WIDE && t.lane == 0 ? others.before : before,
          !t.has_after ? 0.f : WIDE && t.lane == 31 ? others.after : after};
}
// Does the neighbour's state have to be read from the memory of the warp before, of the warp after?
__device__ __forceinline__ bool asks_before(const Thread& t) { return WIDE && t.lane == 0 && t.warp > 0; }
__device__ __forceinline__ bool asks_after(const Thread& t) {
  return WIDE && t.lane == 31 && t.warp + 1 < (int)blockDim.x / 32;
}

// With the edges. `pitch`: floats from one warp's states to the next one's.
__device__ __forceinline__ Edges get_state(const float* states, int pitch, int s, const Thread& t, float (&h)[N]) {
#pragma unroll
  for (int n = 0; n < N; n += VEC) {
    const Floats f = *(const Floats*)(states + state_index(s, n, t.lane));
#pragma unroll
    for (int i = 0; i < VEC; i++) h[n + i] = f.v[i];
  }
  Edges others = {0.f, 0.f};
  if (asks_before(t)) others.before = states[state_index(s, N - 1, 31) - pitch];
  if (asks_after(t)) others.after = states[state_index(s, 0, 0) + pitch];
  return edges_of(t, h, others);
}

// Addresses -------------------------------------------------------------------------------------------------

// Operand `op` of a plane: its first element. Partial sums of dx are dx itself for float32.
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
  if (op < DY) return plane_of(p.taps, b, d, group, op - TAPS);
  if (op == DY) return plane_of(p.dy, b, 0, c, 0);
  if (HAS_GATE && op == GATE) return plane_of(p.gate, b, d, c, 0);
  if (HAS_HIDDEN && op == HIDDEN) return plane_of(p.y, b, 0, c, 0);
  if (STORAGE == 0) return plane_of(p.dx, b, 0, c, 0);
  return sums_of(p, b, c, op - SUM);
}
// Elements from one row to the next. They fit 32 bits: the plan sees to it.
__device__ __forceinline__ int source_pitch(const Params& p, int op) {
  if (op == X) return (int)p.x.h;
  if (HAS_LAM && op == LAM) return (int)p.lam.h;
  if (op < DY) return (int)p.taps.h;
  if (op == DY) return (int)p.dy.h;
  if (HAS_GATE && op == GATE) return (int)p.gate.h;
  if (HAS_HIDDEN && op == HIDDEN) return (int)p.y.h;
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

// Are the states of the lines needed?
__device__ __forceinline__ bool needs_states(const Params& p) { return p.dtaps.data != nullptr || p.dgate.data != nullptr; }
// Is the operand read in this launch?
__device__ __forceinline__ bool is_read(const Params& p, int op) {
  if (HAS_HIDDEN && op == HIDDEN) return p.dtaps.data != nullptr;
  return op < SUM || reads_sums(p);
}

__device__ __forceinline__ bool is_wanted(const Params& p, int op) {
  if (op == X) return p.dx.data != nullptr && (STORAGE == 0 || is_last(p));
  if (HAS_LAM && op == LAM) return p.dlam.data != nullptr;
  if (op < DY) return p.dtaps.data != nullptr;
  if (HAS_GATE && op == GATE) return p.dgate.data != nullptr;
  return SUMS == 2 && op >= SUM && wants_sums(p);
}
__device__ __forceinline__ unsigned char* sink_of(const Params& p, int op, int b, int group, int c) {
  const int d = p.knobs[0];
  if (op == X) return plane_of(p.dx, b, 0, c, 0);
  if (HAS_LAM && op == LAM) return plane_of(p.dlam, b, d, c, 0);
  if (op < DY) return plane_of(p.dtaps, b, d, group, op - TAPS);
  if (HAS_GATE && op == GATE) return plane_of(p.dgate, b, d, c, 0);
  return sums_of(p, b, c, op - SUM);
}
__device__ __forceinline__ int sink_pitch(const Params& p, int op) {
  if (op == X) return (int)p.dx.h;
  if (HAS_LAM && op == LAM) return (int)p.dlam.h;
  if (op < DY) return (int)p.dtaps.h;
  if (HAS_GATE && op == GATE) return (int)p.dgate.h;
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

// Shared weights' gradients of a segment stay in shared memory, in the place of operands whose time is over, until
// the cluster has summed them: float32 numbers where the taps were; with 16-bit storage the halves of the first in the
// first two taps, of the second in the third tap and dy, and the third in the states.
__device__ constexpr int parked_in(int i) { return i < 3 ? TAPS + i : DY; }

// Are gradients of shared weights complete when a cluster has summed its channels?
__device__ __forceinline__ bool is_single_part(const Params& p) { return p.knobs[5] >= p.channels / p.groups; }
// Where a part of the gradient of weight k begins.
__device__ __forceinline__ float* part_of(const Params& p, const Thread& t, int k) {
  const long long plane = (long long)p.height * p.knobs[2];
  return (float*)p.scratch[2] + ((((long long)t.part * p.batch + t.b) * p.groups + t.group) * 3 + k) * plane;
}
