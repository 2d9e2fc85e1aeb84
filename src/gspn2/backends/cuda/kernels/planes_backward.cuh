// What vertical and horizontal scans of planes share in backward: options, who works on which places, and the exchange
// between the threads of a line.
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
//   WANTS       gradients that are asked for: 1 dx, 2 dtaps, 4 dlam, 8 dgate, added up
//   HAS_HIDDEN  1: the states are at hand (`y`, as forward kept them): nothing is kept or computed again
//   OWN_STATES  with it: 1, it is float32, in scratch memory
//   SPLIT       1: the blocks of a cluster share a line. Each has places beyond its own on either side, HALO of them:
//               what it computes there goes wrong by one place a line from the outside, and is put right after every
//               segment by the block that owns it
//   CLUSTER     1: more than one block in a cluster
//   WEIGHTS     1: instead of three logits there are two weights, made by planes_backward_weights.cu
//   DIRECT      1: of SHARED vertical scans, with one channel in a cluster: gradients of weights go to scratch memory line by
//               line, instead of waiting in shared memory for the segment's end
//   CHAIN       1: of SHARED, a channel adds to sums of those before it: planes_backward_chain.cuh; 0: it leaves a part
// Knobs: 0 direction (its index among the scans), 1 threads of a block's part of a line (a power of two, or whole
//   warps), 2 elements of a row in scratch planes, 3 blocks of a line, 4 places that each of them owns, 5 channels of
//   a cluster, 6 sums of a group (CHAIN), 7 first plane, 8 first flag (CHAIN), 9 planes that there is room for the states
//   of (OWN_STATES).
// Scratch: 0 lower halves of partial sums of dx, with 16-bit storage, 1 WEIGHTS, then flags (CHAIN), 2 float32 gradients
//   of shared weights, one part for each cluster of a group or each of its sums: [parts][B][G][3][H][row], if there is
//   more than one; planes_backward_taps.cu adds them; 3 states that segments begin with, or all (`states_of`), where
//   OWN_STATES.
#pragma once
#include "common.cuh"

#ifndef OWN_STATES
#define OWN_STATES 0
#endif
#ifndef CHAIN
#define CHAIN 0
#endif
#ifndef DIRECT
#define DIRECT CHAIN
#endif
#ifndef WEIGHTS
#define WEIGHTS 0
#endif
static_assert(!WEIGHTS || (NORMALIZE && STORAGE == 1), "weights that planes_backward_weights.cu makes");

constexpr int N = PLACES, S = SEGMENT;
constexpr int SIZE = sizeof(storage_t);
constexpr int EACH = 16 / SIZE;  // elements of 16 bytes, the unit of asynchronous copies

// Operands in shared memory. Those of both walks over a segment have two stages, so that the next segment's arrive
// meanwhile; those of the walk back only are fetched during the walk forward, into one.
constexpr int X = 0, LAM = 1, TAPS = 1 + HAS_LAM, DY = TAPS + (WEIGHTS ? 2 : 3), GATE = DY + 1, HIDDEN = GATE + HAS_GATE;
// Float32 numbers take two operands beside 16-bit storage: states, and in horizontal scans the gradient of a shared tap
// that replaces them. Where dx can go to the sums' place, x makes room for the second half of that gradient, or where there
// are two WEIGHTS only, for that of another one.
constexpr bool PARKS_IN_X = HAS_HIDDEN && (!OWN_STATES || WEIGHTS) && HORIZONTAL && SHARED && HAS_SUMS && STORAGE != 0;
constexpr bool WIDE_STATES = STORAGE != 0 && (OWN_STATES || (HORIZONTAL && SHARED && (!PARKS_IN_X || WEIGHTS)));
constexpr int HIDDENS = !HAS_HIDDEN ? 0 : WIDE_STATES ? 2 : 1;
constexpr int SUM = HIDDEN + HIDDENS, SUMS = HAS_SUMS ? (STORAGE == 0 ? 1 : 2) : 0, OPERANDS = SUM + SUMS;
constexpr int DX = PARKS_IN_X ? SUM : X;  // in whose place dx waits until it is written
constexpr int DOUBLE = HAS_HIDDEN ? OPERANDS : DY, UNITS = DOUBLE + OPERANDS;

constexpr bool WANTS_X = WANTS & 1, WANTS_TAPS = WANTS & 2, WANTS_LAM = WANTS & 4, WANTS_GATE = WANTS & 8;
constexpr bool NEEDS_STATES = WANTS_TAPS || WANTS_GATE, COMPUTES_STATES = NEEDS_STATES && !HAS_HIDDEN;

constexpr int ROUND = N > EACH ? N : EACH;
constexpr int HALO = SPLIT ? (S + ROUND - 1) / ROUND * ROUND : 0;

// Where a thread is: the plane its line belongs to, and its places of the line.
struct Thread {
  int lane, warp;
  int b, channel, group;       // of its plane
  int strip;                   // which of the blocks of a line this is
  int part, member, members;   // shared taps: which cluster (or sum) of the group, which channel of the cluster, out of how many
  bool follows;                // CHAIN: a channel before this one has the same sum
  int place, places;           // first place; places of a line
  int begin, end;              // places that the block holds,
  int own_begin, own_end;      // and those it writes
  bool alive, own;             // are the thread's among them
  bool has_before, has_after;  // does the line go on before its first place, after its last?
  float* edges;                // [2][warps + 2][2]
  float* mail;                 // [2][2][HALO]
  int parity, exchanges;
};

// Of those that work; there is one more where CHAIN.
__device__ __forceinline__ int warps_of_line() { return (int)blockDim.x / 32 - CHAIN; }

__device__ __forceinline__ int strips_of(const Params& p) { return SPLIT ? p.knobs[3] : 1; }

// The plane of thread `index` of the block.
__device__ __forceinline__ void take_plane(Thread& t, const Params& p, int index) {
  const int strips = strips_of(p), per_group = p.channels / p.groups;
  t.strip = blockIdx.x % strips;
  int block = p.knobs[7] + blockIdx.x / strips;
  t.follows = false;
#if CHAIN
  const int sums = p.knobs[6];
  t.b = block / p.channels;
  t.channel = block - t.b * p.channels;
  t.group = t.channel / per_group;
  const int number = t.channel - t.group * per_group;
  t.part = number % sums, t.follows = number >= sums;
  t.member = 0, t.members = 1;
#elif SHARED
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
  t.mail = edges + (warps_of_line() + 2) * 4;
  t.parity = t.exchanges = 0;
  return t;
}

// All threads of the cluster.
__device__ __forceinline__ void cluster_meets() {
#if CLUSTER
  cluster_barrier();
#else
  __syncthreads();
#endif
}

// Barriers of what comes from the block before and from the block after: [2][2].
constexpr int BARRIERS = SPLIT ? 32 : 0;  // bytes
__device__ __forceinline__ u64* halo_barriers(const Thread& t) { return (u64*)(t.mail + 4 * HALO); }
// Those of planes_backward_chain.cuh.
constexpr int CHAIN_BARRIERS = CHAIN ? 32 : 0;  // bytes
__device__ __forceinline__ u64* chain_barriers(const Thread& t) {
  return (u64*)((unsigned char*)halo_barriers(t) + BARRIERS);
}
__device__ __forceinline__ unsigned char* after_mail(const Thread& t) {
  return (unsigned char*)chain_barriers(t) + CHAIN_BARRIERS;
}

__device__ __forceinline__ void start_exchanges(const Thread& t) {
#if SPLIT
  if (threadIdx.x < 4) mbarrier_init(halo_barriers(t) + threadIdx.x, 1);
  mbarrier_init_fence();
#endif
}

#if SPLIT
// `v` of the places beyond a block's own, from the blocks that own them. Each value comes with its share of a count
// that the receiver waits for. Two sets take turns, so that nobody needs to say that it has read.
__device__ __forceinline__ void exchange(const Params& p, Thread& t, float (&v)[N]) {
  constexpr int WORDS = N < 4 ? N : 4;
  const u32 parity = t.exchanges >> 1 & 1;
  float* mail = t.mail + (t.exchanges & 1) * 2 * HALO;
  u64* barriers = halo_barriers(t) + (t.exchanges & 1) * 2;
  const bool has_before = t.strip > 0, has_after = t.strip + 1 < strips_of(p);
  t.exchanges++;
  if (threadIdx.x == 0) {
    if (has_before) mbarrier_arrive_expect(barriers, 4 * HALO);
    if (has_after) mbarrier_arrive_expect(barriers + 1, 4 * ((t.end - t.own_end + N - 1) / N * N));
  }
  const int after_begin = t.place - t.own_begin, before_end = t.own_end - t.place;
  if (t.own && has_before && after_begin < HALO)
#pragma unroll
    for (int n = 0; n < N; n += WORDS)
      store_counted<WORDS>(mail + HALO + after_begin + n, barriers + 1, cluster_rank() - 1, v + n);
  if (t.own && has_after && before_end <= HALO)
#pragma unroll
    for (int n = 0; n < N; n += WORDS)
      store_counted<WORDS>(mail + HALO - before_end + n, barriers, cluster_rank() + 1, v + n);
  if (t.alive && !t.own) {
    const bool before = t.place < t.own_begin;
    mbarrier_wait(barriers + !before, parity);
    const float* from = mail + (before ? t.place - t.begin : HALO + t.place - t.own_end);
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = from[n];
  }
  __syncwarp();
}
#endif

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

// All threads that work.
__device__ __forceinline__ void line_barrier() {
#if CHAIN
  named_barrier(1, (int)blockDim.x - 32);
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void publish(Thread& t, const Shown& shown) {
#if WIDE
  float* edges = t.edges + (t.parity * (warps_of_line() + 2) + t.warp + 1) * 2;
  if (t.lane == 0) edges[0] = shown.first;
  if (t.lane == 31) edges[1] = shown.last;
#endif
}
__device__ __forceinline__ Edges settle(Thread& t, const Shown& shown) {
  float before = __shfl_up_sync(~0u, shown.last, 1), after = __shfl_down_sync(~0u, shown.first, 1);
#if WIDE
  line_barrier();
  const float* edges = t.edges + (t.parity * (warps_of_line() + 2) + t.warp) * 2;
  if (t.lane == 0) before = edges[1];
  if (t.lane == 31) after = edges[4];
  t.parity ^= 1;
#endif
  return {t.has_before ? before : 0.f, t.has_after ? after : 0.f};
}
