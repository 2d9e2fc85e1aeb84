// Planes scanned a block a line, or, for long columns, a cluster a column: what both orientations share.
//
// Macros beside those of common.cuh:
//   THREADS    of a block
//   CLUSTER    blocks of a cluster (1: none). They share the lines of a plane, one plane after another; but rows
//              (down, up) are scanned a plane a block unless VSPLIT
//   VSPLIT     1: rows are cut over the blocks, too; 2: over their warps, which then never meet
//   VHALO      with VSPLIT 2: places beyond a warp's own on either side
//   PAIR       1: only down and up, at the same time: each block of a cluster of two scans in one of these directions
//   PREPARED   1: weights come from scratch memory (lines_weights.cu) instead of being made from logits
//   CHANNELS   neighbouring ones, of one group, that a thread scans side by side: taps are read and normalised once
//   SUMS       1: more than one direction, whose sum travels in float32; 2: the cache is too small for it
//   VTHREADS, VPLACES, VLINES, VRING   down and up: threads that hold places, places of each, lines copied together,
//              groups of these in a ring; VPLACES 0: no such direction
//   HPIECE, HBUFFERS         right and left: bytes of a row in a tile, tiles in a warp's ring; HPIECE 0: none
// Knobs: 0 planes of a cluster; places of a block, its own: 1 of a column, 2 of a row; 3 how many directions this
//   launch scans, 4 to 7 which; 8 launches before it left sums, 9 it completes them.
// Scratch: 0 float32 sums over directions, in tiles of 8 x 8 places (see Plane); 1 the weights before and after of
//   each place, [B][D][G][2][H][W], as float16 where tensors have 16 bits.
#pragma once
#include "lines_taps.cuh"
#include "words.cuh"

constexpr int SIZE = sizeof(storage_t);
constexpr int WARPS = THREADS / 32;
constexpr int OWN = 1 + HAS_LAM + HAS_GATE;       // tensors of a channel: x, lam, gate, in this order
constexpr int TAPS = PREPARED ? 2 : 3;
constexpr int TENSORS = TAPS + CHANNELS * OWN;    // taps, then those of each channel
constexpr int BLOCK_STRIPS = VSPLIT == 2 ? WARPS : 1, STRIPS = CLUSTER * BLOCK_STRIPS;  // that a line is cut into
// Places beyond a strip's own, and lines between exchanges.
constexpr int HALO = CLUSTER > 1 && !PAIR ? (VSPLIT == 2 ? VHALO : 16) : 0;
static_assert(VSPLIT < 2 || (CLUSTER > 1 && !SUMS), "states are sent within a cluster; sums are read by whole blocks");

// Shared memory: the warps' edges, then what blocks of a cluster send each other, then rings.
constexpr int EDGES = CHANNELS * 2 * 2 * (WARPS + 2);   // floats: [channel][turn][side][warp]
constexpr int SIDE = CHANNELS * HALO;                  // floats that come from one side: [channel][row]
constexpr int HALOS = BLOCK_STRIPS * 2 * 2 * (HALO > 0 ? SIDE : 1);   // [strip][turn][side]
constexpr int HALO_BARRIERS = BLOCK_STRIPS * 2 * 2;
constexpr int RING = (4 * (EDGES + HALOS) + 8 * HALO_BARRIERS + 127) / 128 * 128;

__device__ __forceinline__ float* edges() { return (float*)shared_memory(); }
__device__ __forceinline__ float* halos() { return edges() + EDGES; }
__device__ __forceinline__ u64* halo_barriers() { return (u64*)(shared_memory() + (4 * (EDGES + HALOS) + 7) / 8 * 8); }

// One direction of one plane. Sums lie in tiles of 8 x 8 places, 256 bytes, which are what both axes read at about
// the same time: in right and left scans a thread's 8 columns of a row are 32 bytes beside those of the next thread,
// in down and up two rows of a thread's 8 places are 64, and the tiles of a line follow each other.
constexpr int SUMS_TILE = 64;
struct Plane {
  const storage_t* from[TENSORS];  // row 0, column 0 of each tensor
  storage_t* y;
  float* sums;
  int sums_band;           // elements from tiles to those of the next 8 rows; a plane has less than 2^31
  long long sums_channel;  // from channel to channel
  bool adds, last;       // is there a sum of earlier directions; does this direction complete it

  __device__ __forceinline__ float* sum_at(int channel, int r, int column) const {
    return sums + channel * sums_channel + in_band(r) + (column >> 3) * SUMS_TILE + (column & 7);
  }
  // Elements from row 0 to row r of a tile's columns.
  __device__ __forceinline__ int in_band(int r) const { return (r >> 3) * sums_band + (r & 7) * 8; }
};

// Elements of tensor i from row to row: looked up where it is used, as there are too many for registers.
__device__ __forceinline__ long long row_step(const Params& p, int i) {
  if (i < TAPS) return PREPARED ? p.width : p.taps.h;
  const int own = (i - TAPS) % OWN;
  return own == 0 ? p.x.h : HAS_LAM && own == 1 ? p.lam.h : p.gate.h;
}

// task: an image's channel, or CHANNELS of them from one that it divides.
__device__ __forceinline__ Plane plane_of(const Params& p, int task, int d, bool adds, bool last) {
  const int plane = task * CHANNELS;
  const long long b = plane / p.channels, c = plane % p.channels, g = c / (p.channels / p.groups);
  Plane it;
#pragma unroll
  for (int k = 0; k < TAPS; ++k)
#if PREPARED
    it.from[k] = (const storage_t*)p.scratch[1] + (((b * p.scans + d) * p.groups + g) * 2 + k) * p.height * p.width;
#else
    it.from[k] = p.taps.data + b * p.taps.b + d * p.taps.d + g * p.taps.c + k * p.taps.k;
#endif
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    const storage_t** from = it.from + TAPS + i * OWN;
    from[0] = p.x.data + b * p.x.b + (c + i) * p.x.c;
#if HAS_LAM
    from[1] = p.lam.data + b * p.lam.b + d * p.lam.d + (c + i) * p.lam.c;
#endif
#if HAS_GATE
    from[OWN - 1] = p.gate.data + b * p.gate.b + d * p.gate.d + (c + i) * p.gate.c;
#endif
  }
  it.y = p.y.data + b * p.y.b + c * p.y.c;
  it.sums_band = (p.width + 7) / 8 * SUMS_TILE;
  it.sums_channel = (p.height + 7) / 8 * (long long)it.sums_band;
  it.sums = (float*)p.scratch[0] + plane * it.sums_channel;
  it.adds = adds, it.last = last;
  return it;
}

// Are weights made from logits here?
#define MAKES_WEIGHTS (NORMALIZE && !PREPARED)
// What the taps of a missing neighbour are taken for: no share at all.
constexpr u32 MISSING = MAKES_WEIGHTS ? MISSING_LOGIT : 0;

// Largest as integers, of the first WORDS words of each tap.
template <int WORDS>
__device__ __forceinline__ u32 largest_logits(const u32 (&words)[TENSORS][4], u32 largest = 0) {
#pragma unroll
  for (int k = 0; k < 3; ++k)
#pragma unroll
    for (int i = 0; i < WORDS; ++i) largest = max_halves(largest, words[k][i]);
  return largest;
}

// Do all lanes of the warp have none but ordinary logits? What lanes that are not `inside` hold must not decide, as
// both ways round differently.
__device__ __forceinline__ bool ordinary([[maybe_unused]] u32 largest, [[maybe_unused]] bool inside) {
#if MAKES_WEIGHTS && STORAGE != 0
  return __all_sync(0xffffffffu, !inside || ordinary_logits(largest));
#else
  return false;
#endif
}

// A weight that lines_weights.cu left.
__device__ __forceinline__ float weight(const u32* words, int e) {
  return STORAGE == 0 ? __uint_as_float(words[e]) : half_of(words[e / 2], e & 1);
}

// What one place of one line needs, unpacked.
struct Place {
  float u[CHANNELS], gate[CHANNELS];
  Taps w;
};

template <bool ORDINARY>
__device__ __forceinline__ Place unpack(const u32 (&words)[TENSORS][4], int e) {
  Place it;
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) {
    const int x = TAPS + i * OWN;
    it.u[i] = element(words[x], e);
    if (HAS_LAM) it.u[i] *= element(words[x + HAS_LAM], e);
    it.gate[i] = HAS_GATE ? element(words[x + OWN - 1], e) : 1.f;
  }
#if PREPARED
  const float before = weight(words[0], e), after = weight(words[1], e);
  it.w = {before, 1.f - before - after, after};
#else
  it.w = weights_of<ORDINARY>({element(words[0], e), element(words[1], e), element(words[2], e)});
#endif
  return it;
}

// Hands the states at the two ends of every warp to its neighbours: put, which meets all threads, then get in the next
// line. Two turns, as a warp may put those of the next line while its neighbour still gets these: line n is put in turn
// n % 2. Nobody gets what was put before all have met, so it may be put again.
// ALONE: the warp has no neighbours; what it holds beyond its own places goes wrong.
template <bool ALONE>
struct Edges {
  float* own;  // this warp's first
  int lane, threads;  // threads: those that hold places

  __device__ __forceinline__ float* at(int channel, int turn, int side) const {
    return own + ((channel * 2 + turn) * 2 + side) * (WARPS + 2);
  }

  __device__ __forceinline__ void start(int of_threads) {
    own = edges() + threadIdx.x / 32 + 1;
    lane = threadIdx.x % 32, threads = of_threads;
    if constexpr (!ALONE) {
      for (int i = threadIdx.x; i < EDGES; i += threads) edges()[i] = 0.f;
      barrier();
    }
  }
  // The states beside this thread's own: of other lanes, or other warps.
  template <int N>
  __device__ __forceinline__ void get(float (&before)[CHANNELS], float (&after)[CHANNELS],
                                      const float (&h)[CHANNELS][N], int turn) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      before[c] = __shfl_up_sync(0xffffffffu, h[c][N - 1], 1), after[c] = __shfl_down_sync(0xffffffffu, h[c][0], 1);
      if (!ALONE && lane == 0) before[c] = at(c, turn, 1)[-1];
      if (!ALONE && lane == 31) after[c] = at(c, turn, 0)[1];
    }
  }
  template <int N>
  __device__ __forceinline__ void put(const float (&h)[CHANNELS][N], int turn) const {
    if constexpr (!ALONE) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        if (lane == 0) *at(c, turn, 0) = h[c][0];
        if (lane == 31) *at(c, turn, 1) = h[c][N - 1];
      }
      barrier();
    }
  }
  __device__ __forceinline__ void barrier() const {
    if (WARPS > 1)
      named_barrier(1, threads);
    else
      __syncwarp();
  }
};

// Whole warps that hold `places` of a line; the others of the block rest.
__device__ __forceinline__ int threads_for(int places, int each) { return ((places + each - 1) / each + 31) / 32 * 32; }

// The part of a line that a block of a cluster holds, or a warp: its own places, and HALO more on either side. What it
// computes there goes wrong by one place a line, from the outside; after HALO lines the neighbours send the right
// states, without a barrier: each value comes with its share of a count that the receiver waits for.
struct Strip {
  int places, own_begin, own_end, begin, end, rank;

  __device__ __forceinline__ bool has(int place) const { return place >= begin && place < end; }
  __device__ __forceinline__ bool owns(int place) const { return place >= own_begin && place < own_end; }

#if CLUSTER > 1
  // Those of this thread's states, from place `first` on, that a neighbour has beyond its own: all or none.
  template <int N>
  __device__ __forceinline__ void send(const float (&h)[CHANNELS][N], int strip, int side, int turn, int first) const {
    constexpr int WORDS = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
    const int set = (strip % BLOCK_STRIPS * 2 + turn) * 2 + side;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
      for (int e = 0; e < N; e += WORDS)
        store_counted<WORDS>(halos() + set * SIDE + i * HALO + first + e, halo_barriers() + set, strip / BLOCK_STRIPS,
                             h[i] + e);
  }

  // h: the states from `first` on. Places of a thread are all on one side of every border.
  template <int N>
  __device__ __forceinline__ void exchange(float (&h)[CHANNELS][N], int first, int& count) const {
    const int turn = count & 1;
    const u32 parity = count >> 1 & 1;
    ++count;
    // What comes from the strip before this one is side 0.
    const int set = (rank % BLOCK_STRIPS * 2 + turn) * 2;
    const float* mine = halos() + set * SIDE;
    u64* bar = halo_barriers() + set;
    const bool has_before = own_begin > 0, has_after = own_end < places;
    if (threadIdx.x % (THREADS / BLOCK_STRIPS) == 0) {
      if (has_before) mbarrier_arrive_expect(bar, 4 * SIDE);
      if (has_after) mbarrier_arrive_expect(bar + 1, 4 * CHANNELS * (end - own_end));
    }
    if (has_before && first >= own_begin && first < min(own_begin + HALO, own_end))
      send(h, rank - 1, 1, turn, first - own_begin);
    if (has_after && first >= own_end - HALO && first < own_end) send(h, rank + 1, 0, turn, first - (own_end - HALO));
    if (has_before && first >= begin && first < own_begin) {
      mbarrier_wait(bar, parity);
      receive(h, mine + first - begin);
    }
    if (has_after && first >= own_end && first < end) {
      mbarrier_wait(bar + 1, parity);
      receive(h, mine + SIDE + first - own_end);
    }
    __syncwarp();
  }

  template <int N>
  static __device__ __forceinline__ void receive(float (&h)[CHANNELS][N], const float* from) {
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
      for (int e = 0; e < N; ++e) h[i][e] = from[i * HALO + e];
  }
#endif
};

__device__ __forceinline__ Strip strip_of(int places, int own, int rank) {
  const int begin = rank * own, end = min(places, begin + own);
  return {places, begin, end, max(0, begin - HALO), min(places, end + HALO), rank};
}

// Of states between blocks in one scan. Threads that rest count them, too: they may take part in the next.
__device__ __forceinline__ int exchanges_in(int lines) { return HALO > 0 ? (lines - 1) / (HALO > 0 ? HALO : 1) : 0; }

__device__ __forceinline__ void wait_for_everybody() {
#if CLUSTER > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
}
