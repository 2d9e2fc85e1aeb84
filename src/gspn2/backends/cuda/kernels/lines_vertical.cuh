// Down and up: lines are rows. A thread holds VPLACES neighbours of a row. It copies its own pieces of
// the next lines into a ring that nobody else reads, so data needs no barrier; states do, one a line.
#pragma once
#include "lines.cuh"

#if VPLACES
constexpr int VBYTES = VPLACES * SIZE, VWORDS = VBYTES / 4;
constexpr int VSUM = SUMS ? VPLACES * 4 : 0;                  // bytes of a thread's sums in a line
constexpr int VLINE = THREADS * (TENSORS * VBYTES + VSUM);    // bytes of a line in the ring

struct VerticalScan {
  Plane plane;
  unsigned char* ring;
  int lines;
  bool reversed;
  // This thread's places of the next line to be copied, and of the next to be written.
  const storage_t* next[TENSORS];
  const float* next_sums;
  storage_t* y;
  float* sums;
  long long y_step, sums_step;  // elements from line to line
  bool inside, writes;

  __device__ __forceinline__ void copy_line(int slot) {
    unsigned char* to = ring + slot * VLINE;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i)
      copy_async<VBYTES>(to + i * THREADS * VBYTES, next[i]);
#if SUMS
    if (plane.adds && writes) {  // others' are being written
      // In pieces of at most 16 bytes, each piece of all threads together: no bank conflicts.
      constexpr int PIECE = VSUM < 16 ? VSUM : 16;
      unsigned char* slots = ring + slot * VLINE + THREADS * TENSORS * VBYTES - (int)threadIdx.x * (VBYTES - PIECE);
#pragma unroll
      for (int i = 0; i < VSUM / PIECE; ++i)
        copy_async<PIECE>(slots + i * THREADS * PIECE, next_sums + i * (PIECE / 4));
    }
#endif
  }

  __device__ __forceinline__ void copy_group(int group) {
    const int slot = group % VRING * VLINES;
#pragma unroll
    for (int i = 0; i < VLINES; ++i)
      if (group * VLINES + i < lines) {
        if (inside) copy_line(slot + i);
#pragma unroll
        for (int k = 0; k < TENSORS; ++k) next[k] += reversed ? -plane.row[k] : plane.row[k];
        if (SUMS) next_sums += sums_step;
      }
    copy_commit();
  }

  struct Line {
    u32 words[TENSORS][4];
    float sum[VPLACES];
  };

  __device__ __forceinline__ void read_line(Line& line, int slot) const {
    const unsigned char* at = ring + slot * VLINE;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) read_words<VWORDS>(line.words[i], at + i * THREADS * VBYTES);
#if SUMS
    constexpr int PIECE = VSUM < 16 ? VSUM : 16;
    const unsigned char* slots = at + THREADS * TENSORS * VBYTES - (int)threadIdx.x * (VBYTES - PIECE);
#pragma unroll
    for (int i = 0; i < VSUM / PIECE; ++i) {
      u32 words[PIECE / 4];
      if (plane.adds) read_words<PIECE / 4>(words, slots + i * THREADS * PIECE);
#pragma unroll
      for (int e = 0; e < PIECE / 4; ++e) line.sum[i * (PIECE / 4) + e] = plane.adds ? __uint_as_float(words[e]) : 0.f;
    }
#endif
  }

  __device__ __forceinline__ void write_line(const Line& line, const Place (&places)[VPLACES],
                                             const float (&h)[VPLACES]) const {
    float v[VPLACES];
#pragma unroll
    for (int e = 0; e < VPLACES; ++e) {
      v[e] = HAS_GATE ? h[e] * places[e].gate : h[e];
      if (SUMS) v[e] += line.sum[e];
    }
    if (SUMS && !plane.last) {
      u32 words[VPLACES];
#pragma unroll
      for (int e = 0; e < VPLACES; ++e) words[e] = __float_as_uint(v[e]);
      write_words<VPLACES>(sums, words);
    } else {
      u32 words[VWORDS];
#pragma unroll
      for (int i = 0; i < VWORDS; ++i) words[i] = stored(v[i * 4 / SIZE], v[i * 4 / SIZE + (SIZE < 4)]);
      write_words<VWORDS>(y, words);
    }
  }

  __device__ __forceinline__ void run(const Params& p, const Scan& scan, int rank, [[maybe_unused]] int exchanges) {
    const Strip strip = VSPLIT ? strip_of(scan.places, p.knobs[2], rank) : strip_of(scan.places, scan.places, 0);
    const int first = strip.begin + (int)threadIdx.x * VPLACES;
    Edges edges{0, (int)threadIdx.x / 32, (int)threadIdx.x % 32, threads_for(strip.end - strip.begin, VPLACES)};
    if ((int)threadIdx.x >= edges.threads) return;
    inside = strip.has(first);
    writes = strip.owns(first);
    [[maybe_unused]] int until_exchange = HALO;
    const bool starts = first == 0, ends = first + VPLACES >= scan.places;
    ring = shared_memory() + RING + threadIdx.x * VBYTES;
    lines = scan.lines, reversed = scan.reversed;
    const long long start = reversed ? lines - 1 : 0;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) next[i] = plane.from[i] + start * plane.row[i] + first;
    y = plane.y + start * p.y.h + first, sums = plane.sums + start * plane.sums_row + first, next_sums = sums;
    y_step = reversed ? -p.y.h : p.y.h, sums_step = reversed ? -plane.sums_row : plane.sums_row;
    edges.start();
    for (int g = 0; g < VRING - 1; ++g) copy_group(g);
    edges.barrier();
    float h[VPLACES];
#pragma unroll
    for (int e = 0; e < VPLACES; ++e) h[e] = 0.f;
    Restarts restarts{p.chunk, 0};
    const int groups = (lines + VLINES - 1) / VLINES;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      copy_wait<VRING - 2>();
#if VSPLIT
      if (until_exchange == 0) {
        strip.exchange(h, first, exchanges);
        edges.put(h[0], h[VPLACES - 1]);
        edges.barrier();
        until_exchange = HALO;
      }
      until_exchange -= VLINES;
      if (!inside) {
#pragma unroll
        for (int e = 0; e < VPLACES; ++e) h[e] = 0.f;
      }
#endif
      Line group[VLINES];  // beyond the image's lines and places: whatever is there
#pragma unroll
      for (int i = 0; i < VLINES; ++i) read_line(group[i], g % VRING * VLINES + i);
      copy_group(g + VRING - 1);
      // All weights of the group first: what is between two barriers is on the way of the states.
      Place places[VLINES][VPLACES];
#pragma unroll
      for (int i = 0; i < VLINES; ++i)
#pragma unroll
        for (int e = 0; e < VPLACES; ++e)
          places[i][e] = unpack(group[i].words, e, e > 0 || !starts, e < VPLACES - 1 || !ends);
#pragma unroll
      for (int i = 0; i < VLINES; ++i) {
        if (g * VLINES + i >= lines) break;
        float before = __shfl_up_sync(0xffffffffu, h[VPLACES - 1], 1), after = __shfl_down_sync(0xffffffffu, h[0], 1);
        edges.get(before, after);
        if (restarts.next()) {
#pragma unroll
          for (int e = 0; e < VPLACES; ++e) h[e] = places[i][e].u;
        } else {
          // A state outside of the image may be anything, and 0 times that is not always 0.
          advance(h, places[i], starts ? 0.f : before, ends ? 0.f : after);
        }
        edges.put(h[0], h[VPLACES - 1]);
        edges.barrier();
        if (writes) write_line(group[i], places[i], h);
        y += y_step;
        if (SUMS) sums += sums_step;
      }
    }
    copy_wait<0>();
  }

  // h <- w h + u. What comes from other lanes is added last: it is there last.
  static __device__ __forceinline__ void advance(float (&h)[VPLACES], const Place (&places)[VPLACES], float before, float after) {
    float next[VPLACES];
#pragma unroll
    for (int e = 0; e < VPLACES; ++e) {
      next[e] = fmaf(places[e].w.here, h[e], places[e].u);
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
