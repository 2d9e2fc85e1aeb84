// Down and up: lines are rows. A thread holds VPLACES neighbours of a row. It copies its own pieces of
// the next lines into a ring that nobody else reads, so data needs no barrier.
// Sums are copied and written by whole warps, for their 32 threads' places: 128 adjacent bytes at a time.
#pragma once
#include "lines.cuh"

#if VPLACES
constexpr int VBYTES = VPLACES * SIZE, VWORDS = VBYTES / 4;
constexpr int VLINE = VTHREADS * TENSORS * VBYTES;            // bytes of a line's operands in the ring
constexpr int VSUMS = SUMS ? 32 * VPLACES * 4 * VLINES : 0;   // bytes of a warp's sums of a channel in a group of lines
constexpr int VGROUP = VLINES * VLINE + VTHREADS / 32 * CHANNELS * VSUMS;
static_assert(VRING > 2, "a line is unpacked while the one before it is computed");

// Few threads have registers for what is the same in all lines, and made anew otherwise.
#define HOLDS_STEPS (THREADS * BLOCKS <= 256)
__device__ __forceinline__ int held(int v) { return HOLDS_STEPS ? opaque(v) : v; }

// A warp's sums of a group of lines: units of 4 columns, each strip's lines together, as in memory. Permuted so that
// the units of one line that 8 threads read meet different banks.
struct SumUnits {
  static constexpr int EACH = VPLACES * VLINES / 4;             // units that a lane copies
  static constexpr int STRIPS = 32 / (2 * VLINES);              // between two of these
  static constexpr int PIECE = VPLACES < 4 ? VPLACES : 4;       // columns that a thread reads together
  int copied[EACH], read[VLINES][VPLACES / PIECE];              // where they are in a group's sums

  static __device__ __forceinline__ int unit(int index) { return (index ^ (index >> 3 & 7)) * 16; }

  __device__ __forceinline__ void find() {
#pragma unroll
    for (int k = 0; k < EACH; ++k) copied[k] = held(unit(threadIdx.x % 32 + 32 * k));
#pragma unroll
    for (int line = 0; line < VLINES; ++line)
#pragma unroll
      for (int e = 0; e < VPLACES / PIECE; ++e) {
        const int first = threadIdx.x % 32 * VPLACES + e * PIECE;
        read[line][e] = held(unit((first / 8 * VLINES + line) * 2 + first % 8 / 4) + first % 4 * 4);
      }
  }
};

struct VerticalScan {
  const Params& p;
  Plane plane;
  unsigned char* ring;
  int lines;
  bool reversed;
  // This thread's places of the next line to be copied, and of the next to be written.
  const storage_t* next[TENSORS];
  storage_t* y;
  long long y_step;  // elements from line to line
#if HOLDS_STEPS
  int steps[TENSORS];  // the same of operands
#endif
  Strip strip;
  // This lane's share of a line's sums: where the first is in row 0, and which of them are there.
  float* sums;
  u32 sums_owned;
  SumUnits units;
  bool inside, writes;

  __device__ __forceinline__ unsigned char* group_at(int group) const {
    return ring + group % VRING * VGROUP;
  }
  __device__ __forceinline__ unsigned char* line_at(int group, int i) const {
    return group_at(group) + i * VLINE + threadIdx.x * VBYTES;
  }
  __device__ __forceinline__ unsigned char* sums_of(int group, int channel) const {
    return group_at(group) + VLINES * VLINE + (threadIdx.x / 32 * CHANNELS + channel) * VSUMS;
  }

  __device__ __forceinline__ void find_sums() {
    const int lane = threadIdx.x % 32;
    const int column = strip.begin + (int)threadIdx.x / 32 * 32 * VPLACES + lane / (2 * VLINES) * 8 + lane % 2 * 4;
    sums = plane.sum_at(0, 0, column), sums_owned = 0;
    units.find();
#pragma unroll
    for (int k = 0; k < SumUnits::EACH; ++k)
      if (strip.owns(column + k * SumUnits::STRIPS * 8)) sums_owned |= 1u << k;
  }

  // body(place in the ring, address) for this lane's share of the warp's sums, where they are the block's own.
  template <typename Body>
  __device__ __forceinline__ void for_sums(int group, Body body) const {
    const int lane = threadIdx.x % 32, line = group * VLINES + lane / 2 % VLINES;
    if (line >= lines) return;
    const int row = reversed ? lines - 1 - line : line;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      unsigned char* in_ring = sums_of(group, i);
      float* at = sums + i * plane.sums_channel + plane.in_band(row);
#pragma unroll
      for (int k = 0; k < SumUnits::EACH; ++k)
        if (sums_owned >> k & 1)
          body(in_ring + units.copied[k], at + k * SumUnits::STRIPS * SUMS_TILE);
    }
  }

  __device__ __forceinline__ long long step(int tensor) const {
#if HOLDS_STEPS
    return steps[tensor];
#else
    return reversed ? -row_step(p, tensor) : row_step(p, tensor);
#endif
  }

  __device__ __forceinline__ void copy_group(int group) {
#pragma unroll
    for (int i = 0; i < VLINES; ++i)
      if (group * VLINES + i < lines) {
        if (inside) {
          unsigned char* to = line_at(group, i);
#pragma unroll
          for (int k = 0; k < TENSORS; ++k) copy_async<VBYTES>(to + k * VTHREADS * VBYTES, next[k]);
        }
#pragma unroll
        for (int k = 0; k < TENSORS; ++k) next[k] += step(k);
      }
#if SUMS
    if (plane.adds) copy_sums(group);
#endif
    copy_commit();
  }

  __device__ __forceinline__ void copy_sums(int group) const {
    for_sums(group, [](unsigned char* to, const float* from) { copy_async_wide(to, from); });
  }

#if PAIR
  // Beyond the middle, the other block has been: its sums are there once it has come to the middle, too.
  __device__ __forceinline__ void meet(int group) {
    cluster_barrier();
    plane.adds = true, plane.last = p.knobs[9];
#pragma unroll 1
    for (int g = group; g < group + VRING - 1; ++g) copy_sums(g);
    copy_commit();
    copy_wait<0>();
  }
#endif

  __device__ __forceinline__ void write_sums(int group) const {
    for_sums(group, [](const unsigned char* from, float* to) { *(uint4*)to = *(const uint4*)from; });
  }

  __device__ __forceinline__ void read_line(u32 (&words)[TENSORS][4], int group, int i) const {
    const unsigned char* at = line_at(group, i);
#pragma unroll
    for (int k = 0; k < TENSORS; ++k) read_words<VWORDS>(words[k], at + k * VTHREADS * VBYTES);
  }

  // Gated, and added to what earlier directions found.
  __device__ __forceinline__ void write_line(int group, int i, const Place (&places)[VPLACES],
                                             const float (&h)[CHANNELS][VPLACES]) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      float v[VPLACES];
#pragma unroll
      for (int e = 0; e < VPLACES; ++e) v[e] = HAS_GATE ? h[c][e] * places[e].gate[c] : h[c][e];
#if SUMS
      constexpr int PIECE = SumUnits::PIECE;
      unsigned char* in_ring = sums_of(group, c);
#pragma unroll
      for (int e = 0; e < VPLACES; e += PIECE) {
        u32 words[4] = {0, 0, 0, 0};
        if (plane.adds) read_words<PIECE>(words, in_ring + units.read[i][e / PIECE]);
#pragma unroll
        for (int k = 0; k < PIECE; ++k) words[k] = __float_as_uint(v[e + k] += __uint_as_float(words[k]));
        if (!plane.last) write_words<PIECE>(in_ring + units.read[i][e / PIECE], words);
      }
      if (!plane.last) continue;
#endif
      u32 words[VWORDS];
#pragma unroll
      for (int k = 0; k < VWORDS; ++k) words[k] = stored(v[k * 4 / SIZE], v[k * 4 / SIZE + (SIZE < 4)]);
      write_words<VWORDS>(y + c * p.y.c, words);
    }
  }

  __device__ __forceinline__ void unpack_line(Place (&places)[VPLACES], u32 (&words)[TENSORS][4], bool starts,
                                              bool ends) const {
    if (!PREPARED) {
      constexpr u32 FIRST = SIZE < 4 ? 0x0000ffffu : ~0u, LAST = SIZE < 4 ? 0xffff0000u : ~0u;
      if (starts) words[0][0] = (words[0][0] & ~FIRST) | (MISSING & FIRST);
      if (ends) words[TAPS - 1][VWORDS - 1] = (words[TAPS - 1][VWORDS - 1] & ~LAST) | (MISSING & LAST);
    }
    if (ordinary(MAKES_WEIGHTS ? largest_logits<VWORDS>(words) : 0, inside)) {
#pragma unroll
      for (int e = 0; e < VPLACES; ++e) places[e] = unpack<true>(words, e);
    } else {
#pragma unroll
      for (int e = 0; e < VPLACES; ++e) places[e] = unpack<false>(words, e);
    }
  }

  __device__ __forceinline__ void run(const Scan& scan, int rank, [[maybe_unused]] int exchanges) {
    // The first thread of this strip's.
    const int leader = VSPLIT == 2 ? (int)threadIdx.x / 32 * 32 : 0;
    strip = VSPLIT ? strip_of(scan.places, p.knobs[2], rank * BLOCK_STRIPS + leader / 32)
                   : strip_of(scan.places, scan.places, 0);
    const int first = strip.begin + ((int)threadIdx.x - leader) * VPLACES;
    const int threads = leader + threads_for(strip.end - strip.begin, VPLACES);
    if ((int)threadIdx.x >= threads) return;
    Edges<VSPLIT == 2> edges;
    edges.start(threads);
    inside = strip.has(first);
    writes = strip.owns(first);
    [[maybe_unused]] int until_exchange = HALO;
    const bool starts = first == 0, ends = first + VPLACES >= scan.places;
    lines = scan.lines, reversed = scan.reversed;
    ring = held_shared_memory() + RING;
    if (SUMS) find_sums();
#if HOLDS_STEPS
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) steps[i] = held((int)(reversed ? -row_step(p, i) : row_step(p, i)));
#endif
    const long long start = reversed ? lines - 1 : 0;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) next[i] = plane.from[i] + start * row_step(p, i) + first;
    y = plane.y + start * p.y.h + first, y_step = reversed ? -p.y.h : p.y.h;
#pragma unroll 1
    for (int g = 0; g < VRING - 1; ++g) copy_group(g);
    copy_wait<VRING - 2>();
    float h[CHANNELS][VPLACES] = {};
    Restarts restarts{p.chunk, 0};
    const int groups = (lines + VLINES - 1) / VLINES;
#if PAIR
    const int middle = rank == 0 ? groups / 2 : groups - groups / 2;
#endif
    // Beyond the image's lines and places: whatever is there.
    u32 words[TENSORS][4];
    Place places[VPLACES];
    read_line(words, 0, 0);
    unpack_line(places, words, starts, ends);
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      copy_wait<VRING - 3>();  // this group and the next
#if PAIR
      if (g == middle) meet(g);
#endif
      if (SUMS) __syncwarp();
      copy_group(g + VRING - 1);
#if VSPLIT
      if (until_exchange == 0) {
        strip.exchange(h, first, exchanges);
        edges.put(h, (g * VLINES + 1) % 2);
        until_exchange = HALO;
      }
      until_exchange -= VLINES;
      if (!inside) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int e = 0; e < VPLACES; ++e) h[c][e] = 0.f;
      }
#endif
#pragma unroll
      for (int i = 0; i < VLINES; ++i) {
        if (g * VLINES + i >= lines) break;
        read_line(words, i + 1 < VLINES ? g : g + 1, i + 1 < VLINES ? i + 1 : 0);
        float before[CHANNELS], after[CHANNELS];
        const int turn = VLINES % 2 ? (g + i) % 2 : i % 2;
        edges.get(before, after, h, turn ^ 1);
        const bool restart = restarts.next();
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          if (restart) {
#pragma unroll
            for (int e = 0; e < VPLACES; ++e) h[c][e] = places[e].u[c];
          } else {
            // A state outside of the image may be anything, and 0 times that is not always 0.
            advance(h[c], places, c, starts ? 0.f : before[c], ends ? 0.f : after[c]);
          }
        }
        edges.put(h, turn);
        if (writes) write_line(g, i, places, h);
        y += y_step;
        // The next line's weights wait for nothing: they fill the time in which states do.
        unpack_line(places, words, starts, ends);
      }
#if SUMS
      __syncwarp();
      if (!plane.last) write_sums(g);
#endif
    }
    copy_wait<0>();
  }

  // h <- w h + u. What comes from other lanes is added last: it is there last.
  static __device__ __forceinline__ void advance(float (&h)[VPLACES], const Place (&places)[VPLACES], int c,
                                                 float before, float after) {
    float next[VPLACES];
#pragma unroll
    for (int e = 0; e < VPLACES; ++e) {
      next[e] = fmaf(places[e].w.here, h[e], places[e].u[c]);
      if (e > 0) next[e] = fmaf(places[e].w.before, h[e - 1], next[e]);
      if (e < VPLACES - 1) next[e] = fmaf(places[e].w.after, h[e + 1], next[e]);
    }
    next[0] = fmaf(places[0].w.before, before, next[0]);
    next[VPLACES - 1] = fmaf(places[VPLACES - 1].w.after, after, next[VPLACES - 1]);
#pragma unroll
    for (int e = 0; e < VPLACES; ++e) h[e] = next[e];
  }
};
#endif
