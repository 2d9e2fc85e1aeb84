// How the planes kernels cut an image: what a block and a warp hold of every line, and how they keep in step.
//
// A plane is one channel of one image, with columns adjacent in memory. A line is cut over the blocks of a cluster
// and over the warps of a block; each holds its own places and some beyond on either side. What it computes there
// goes wrong by one place a line from the outside, as neighbours are missing, so that the places of its own stay
// right for as many lines as there are places beyond. Then all of them exchange: every `run` lines the warps of a
// block, every `stage` lines also the blocks of the cluster. No barrier a line.
//
// Macros beside those of common.cuh:
//   THREADS     at least the threads of a block
//   BLOCKS      how many blocks a multiprocessor shall hold: a bound for registers
//   STAGES      stages of lines in shared memory: one is computed while the others are on their way
//   SUMS        1: more than one direction, whose sum travels in float32
//   CLUSTER     1: several blocks a line
//   RAGGED      1: a line's places are no multiple of a thread's in some direction
//   ALIGNMENT   bytes to which rows of all tensors are aligned: 16, 8 or 4
//   VERTICAL    places of a thread in down and up; 0: none of these directions is asked for
//   HORIZONTAL  the same of right and left
//   BULK        1: rows of vertical scans are copied whole, by the copy engine (sm_90)
//   SPAN        bytes of a row in a stage of a horizontal scan: 32, 64 or 128
#pragma once
#include "common.cuh"

constexpr int SIZE = sizeof(storage_t);
constexpr int VECTOR = 16 / SIZE;  // elements in 16 bytes
constexpr int BARRIERS = BULK ? 128 : 0;  // bytes of shared memory: one mbarrier a stage
constexpr int STATE_LINES = CLUSTER ? 4 : 2;
constexpr int TENSORS = 1 + HAS_LAM + HAS_GATE;  // of a channel, besides taps and sums

// N elements, aligned for one access (two for 32 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// N stored elements as words: taken apart one by one, 16-bit types cost an instruction more each.
template <int N>
using Stored = Pack<u32, N * SIZE / 4>;

template <int WORDS>
__device__ __forceinline__ float element(const Pack<u32, WORDS>& stored, int e) {
#if STORAGE == 0
  return __uint_as_float(stored.v[e]);
#elif STORAGE == 1
  const u32 word = stored.v[e / 2];
  return __uint_as_float(e & 1 ? word & 0xffff0000u : word << 16);
#else
  const u32 word = stored.v[e / 2];
  return __half2float(__ushort_as_half((unsigned short)(e & 1 ? word >> 16 : word & 0xffffu)));
#endif
}

// How the lines of vertical or of horizontal scans are cut: knobs.
struct Cut {
  int stage;        // lines that are in shared memory together
  int run;          // lines between exchanges of warps
  int own, beyond;  // places of a block, and beyond these on either side: as many as lines between exchanges of blocks
  int window;       // places of a warp, and
  int lanes;        // lanes beyond these on either side
};

// What a block works on, and a thread's part of it. Knobs: blocks a line, channels a block, warps a channel,
// segments of lines and lines of each, then Cut of vertical and of horizontal scans.
struct Worker {
  int rank, blocks;             // of the cluster
  int b, channel, channels;     // image, first channel, how many
  int group;                    // of taps
  int segment;                  // of lines, between restarts
  int mine, warp, lane;         // this thread's channel, its warp among those of the channel
  int pitch;                    // of a line of states
  float* states;                // [STATE_LINES][channels][pitch]
  unsigned char* ring;
  int exchanges, crossings;     // so far: exchanges within the block, and across blocks
  int bulk_stages;              // so far
  u64 once, of_taps;            // cache policies of what is read once, and of taps

  // One direction:
  int begin, end;               // places the block holds
  int own_begin, own_end;       // places it writes
  int first;                    // first place of this thread
  bool inside, owner;           // is it among the block's; is the thread its warp's own
};

__device__ __forceinline__ Cut cut_of(const Params& p, bool vertical) {
  const int* k = p.knobs + (vertical ? 5 : 11);
  return {k[0], k[1], k[2], k[3], k[4], k[5]};
}

// Floats of a line of states: what a block holds, and room for the end of the last thread.
__device__ __forceinline__ int pitch_of(const Params& p) {
  const Cut v = cut_of(p, true), h = cut_of(p, false);
  return (max(v.own + 2 * v.beyond, h.own + 2 * h.beyond) + 15) / 8 * 8;
}

__device__ __forceinline__ Worker worker(const Params& p) {
  Worker t;
  t.blocks = p.knobs[0], t.channels = p.knobs[1];
  const int warps = p.knobs[2], segments = p.knobs[3];
  t.pitch = pitch_of(p);
  int index = blockIdx.x;
#if CLUSTER
  t.rank = cluster_rank();
  index /= t.blocks;
#else
  t.rank = 0;
#endif
  // Channels of an image come one after another: those of a group read the same taps.
  const int parts = p.channels / t.channels;
  t.channel = index % parts * t.channels;
  index /= parts;
  t.segment = index % segments;
  t.b = index / segments;
  t.group = t.channel / (p.channels / p.groups);
  const int warp = threadIdx.x / 32;
  t.mine = warp / warps;
  t.warp = warp - t.mine * warps;
  t.lane = threadIdx.x % 32;
  t.states = (float*)(shared_memory() + BARRIERS);
  t.ring = shared_memory() + BARRIERS + (4 * STATE_LINES * t.channels * t.pitch + 127) / 128 * 128;
  t.exchanges = t.crossings = 0;
  t.bulk_stages = 0;
#if SUMS
  t.once = cache_policy(true);
  t.of_taps = cache_policy(t.channels * p.groups == p.channels);
#endif
  return t;
}

__device__ __forceinline__ int strip_begin(const Cut& cut, int rank) { return max(0, rank * cut.own - cut.beyond); }

template <int N>
__device__ __forceinline__ void take_places(Worker& t, const Cut& cut, int places) {
#if CLUSTER
  t.begin = strip_begin(cut, t.rank);
  t.end = min(places, (t.rank + 1) * cut.own + cut.beyond);
  t.own_begin = t.rank * cut.own;
  t.own_end = min(places, t.own_begin + cut.own);
#else
  t.begin = t.own_begin = 0;
  t.end = t.own_end = places;
#endif
  t.first = t.begin + t.warp * cut.window + (t.lane - cut.lanes) * N;
  t.inside = t.first >= t.begin && t.first < t.end;
  t.owner = t.inside && t.lane >= cut.lanes && (t.lane - cut.lanes) * N < cut.window;
}

// Exchange ----------------------------------------------------------------------------------------------------
// publish, then a barrier, then refresh. Two lines of states take turns, so that one barrier is enough. Exchanges
// across blocks have two of their own: a block may be some exchanges of its warps ahead of its neighbours.

__device__ __forceinline__ float* state_line(const Worker& t, bool across) {
  const int line = CLUSTER && across ? 2 + (t.crossings & 1) : t.exchanges & 1;
  return t.states + (line * t.channels + t.mine) * t.pitch;
}

template <int N>
__device__ __forceinline__ void store_states(float* at, const float (&h)[N]) {
  Pack<float, N> pack;
#pragma unroll
  for (int e = 0; e < N; ++e) pack.v[e] = h[e];
  *(Pack<float, N>*)at = pack;
}

// Hands this thread's states to those that hold the same places beyond their own; across: also to other blocks.
template <int N>
__device__ __forceinline__ void publish(const Worker& t, const Cut& cut, const float (&h)[N], bool across) {
  float* line = state_line(t, across);
  if (!t.owner) return;
#if CLUSTER
  if (across) {
    if (t.first < t.own_begin || t.first >= t.own_end) return;
    if (t.rank > 0 && t.first < t.own_begin + cut.beyond)
      store_states(cluster_map(line, t.rank - 1) + (t.first - strip_begin(cut, t.rank - 1)), h);
    if (t.rank + 1 < t.blocks && t.first >= t.own_begin + cut.own - cut.beyond)
      store_states(cluster_map(line, t.rank + 1) + (t.first - strip_begin(cut, t.rank + 1)), h);
  }
#endif
  store_states(line + (t.first - t.begin), h);
}

template <int N>
__device__ __forceinline__ void refresh(Worker& t, float (&h)[N], bool across) {
  const float* line = state_line(t, across);
  const bool foreign = CLUSTER && across && (t.first < t.own_begin || t.first >= t.own_end);
  if (t.inside && (!t.owner || foreign)) {
    const Pack<float, N> pack = *(const Pack<float, N>*)(line + (t.first - t.begin));
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = pack.v[e];
  }
  if (CLUSTER && across)
    ++t.crossings;
  else
    ++t.exchanges;
}

__device__ __forceinline__ void barrier(bool across) {
#if CLUSTER
  if (across) return cluster_barrier();
#endif
  __syncthreads();
}

// Is there anything to exchange?
__device__ __forceinline__ bool shared_line(const Cut& cut) { return CLUSTER || cut.lanes > 0; }

template <int N>
__device__ __forceinline__ void exchange(Worker& t, const Cut& cut, float (&h)[N], bool across) {
  publish(t, cut, h, across);
  barrier(across);
  refresh(t, h, across);
}

// One line ------------------------------------------------------------------------------------------------------

// h <- w h + u over the N places of each lane. What comes from other lanes comes last: it is there last.
template <int N>
__device__ __forceinline__ void advance(float (&h)[N], const float (&u)[N], const Taps (&w)[N], float before,
                                        float after) {
  float next[N];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    next[e] = fmaf(w[e].here, h[e], u[e]);
    if (e > 0) next[e] = fmaf(w[e].before, h[e - 1], next[e]);
    if (e < N - 1) next[e] = fmaf(w[e].after, h[e + 1], next[e]);
  }
  next[0] = fmaf(w[0].before, before, next[0]);
  next[N - 1] = fmaf(w[N - 1].after, after, next[N - 1]);
#pragma unroll
  for (int e = 0; e < N; ++e) h[e] = next[e];
}

// Which neighbours along the line exist, for the places of one thread.
struct Ends {
  bool before, after;  // of the first place, of the last one
  int places;          // how many of the thread's places are in the image: at least N, or fewer at a ragged end
};

template <int N>
__device__ __forceinline__ Ends ends_of(const Worker& t, int places) {
  return {t.first > 0, t.first + N < places, places - t.first};
}

template <int N>
__device__ __forceinline__ bool has_before(const Ends& ends, int e) {
  return e > 0 || ends.before;
}
template <int N>
__device__ __forceinline__ bool has_after(const Ends& ends, int e) {
  if (RAGGED) return e + 1 < ends.places;
  return e < N - 1 || ends.after;
}

// The line after h. A restart reads no taps: they may hold anything there.
template <int N>
__device__ __forceinline__ void scan_line(float (&h)[N], const float (&u)[N], const Taps (&w)[N], bool restart,
                                          const Ends& ends) {
  if (restart) {
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = u[e];
  } else {
    const float before = __shfl_up_sync(0xffffffffu, h[N - 1], 1), after = __shfl_down_sync(0xffffffffu, h[0], 1);
    // A state outside of the image may be anything, and 0 times that is not always 0.
    advance(h, u, w, ends.before ? before : 0.f, ends.after ? after : 0.f);
  }
  if (RAGGED) {
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = e < ends.places ? h[e] : 0.f;
  }
}

// Memory --------------------------------------------------------------------------------------------------------

// The first `bytes` of 16 into shared memory; the rest becomes 0. Without a cache policy: with one, ptxas 13.0 may put
// the descriptor of a cp.async into a uniform register of odd number, which the device refuses as an illegal instruction.
__device__ __forceinline__ void copy_vector(unsigned char* shared, const void* global, int bytes) {
#pragma unroll
  for (int at = 0; at < 16; at += ALIGNMENT)
    copy_async<ALIGNMENT>(shared + at, (const unsigned char*)global + at, max(0, min(ALIGNMENT, bytes - at)));
}

// As many of four neighbours in the sums as there are: nobody has written what fills up their rows.
__device__ __forceinline__ void copy_sums_vector(unsigned char* shared, const float* sums, int count) {
  if (count >= 4) {
    copy_async<16>(shared, sums);
  } else {
    for (int e = 0; e < count; ++e) copy_async<4>(shared + 4 * e, sums + e);
  }
}

#if BULK
// With several directions the cache is kept for x and the sums, which come again, and for taps that other blocks read.
__device__ __forceinline__ void copy_row(unsigned char* shared, const void* global, int bytes, u64* full, u64 policy) {
#if SUMS
  bulk_copy_cached(shared, global, bytes, full, policy);
#else
  bulk_copy(shared, global, bytes, full);
#endif
}
#endif

// `count` of N neighbours in a row.
template <typename T, int N>
__device__ __forceinline__ void store_places(T* at, const Pack<T, N>& pack, int count) {
  constexpr int PIECE = N * (int)sizeof(T) < ALIGNMENT ? N : ALIGNMENT / (int)sizeof(T);
  if (count >= N) {
#pragma unroll
    for (int e = 0; e < N; e += PIECE) {
      Pack<T, PIECE> piece;
#pragma unroll
      for (int i = 0; i < PIECE; ++i) piece.v[i] = pack.v[e + i];
      *(Pack<T, PIECE>*)(at + e) = piece;
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < count) at[e] = pack.v[e];
  }
}

// Where one direction of one image starts, at channel t.channel, row 0, column 0.
struct Sources {
  const storage_t *taps, *x, *lam, *gate;
};

__device__ __forceinline__ Sources sources_of(const Params& p, const Worker& t, int d) {
  const long long b = t.b, c = t.channel;
  return {p.taps.data + b * p.taps.b + d * p.taps.d + t.group * p.taps.c, p.x.data + b * p.x.b + c * p.x.c,
          HAS_LAM ? p.lam.data + b * p.lam.b + d * p.lam.d + c * p.lam.c : nullptr,
          HAS_GATE ? p.gate.data + b * p.gate.b + d * p.gate.d + c * p.gate.c : nullptr};
}

// The sum over directions while it is not complete: y itself if that is float32, else scratch memory, whose rows
// are padded to 16 bytes.
struct Sums {
  float* data;
  long long c, h;
};

__device__ __forceinline__ Sums sums_of(const Params& p, const Worker& t) {
#if STORAGE == 0
  return {p.y.data + t.b * p.y.b + t.channel * p.y.c, p.y.c, p.y.h};
#else
  const long long h = (p.width + 3) / 4 * 4, c = h * p.height;
  return {(float*)p.scratch[0] + ((long long)t.b * p.channels + t.channel) * c, c, h};
#endif
}

// Bytes of a stage whose tiles of storage_t have `tile` bytes: taps, then channel by channel x, lam and gate, then
// the sums.
__device__ __forceinline__ int stage_bytes(const Worker& t, int tile) {
  return (3 + t.channels * (TENSORS + SUMS * 4 / SIZE)) * tile;
}
__device__ __forceinline__ int channel_offset(int channel, int tile) { return (3 + channel * TENSORS) * tile; }
__device__ __forceinline__ int sums_offset(const Worker& t, int channel, int tile) {
  return (3 + t.channels * TENSORS + channel * (4 / SIZE)) * tile;
}
