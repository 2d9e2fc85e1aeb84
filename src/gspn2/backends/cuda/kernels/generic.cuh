// What the generic kernels share: which part of the problem a block owns, how its threads spread over it, and
// reading one item (one channel at one place of a line) through arbitrary strides.
#pragma once
#include "common.cuh"

// A block owns up to knobs[0] channels of one image: neighbours with taps of their own, or channels of one group.
struct Share {
  int b, c0, n;     // image, first channel, number of channels
  int group, pitch;  // tap group of channel c0, and of every next channel: group + lc * pitch
};

__device__ __forceinline__ Share share_of(const Params& p) {
  const int per_group = p.channels / p.groups, most = p.knobs[0];
  const bool own = per_group == 1;
  const int span = own ? p.channels : per_group, parts = (span + most - 1) / most;
  const int sections = own ? 1 : p.groups;
  int index = blockIdx.x;
  const int part = index % parts;
  index /= parts;
  const int section = index % sections;
  const int first = section * span + part * most;
  const int n = min(most, span - part * most);
  return {index / sections, first, n, own ? first : section, own ? 1 : 0};
}

// Threads form a grid, 2^knobs[2] wide, over (channel, place) pairs; the fast axis is the one that is adjacent in
// memory: channels if knobs[1], else places.
struct Grid {
  bool channels_fast;
  int fast, slow, tx, ty, width, height;
};

__device__ __forceinline__ Grid grid_of(const Params& p, int n, int places) {
  const int bits = p.knobs[2];
  const bool channels_fast = p.knobs[1] != 0;
  return {channels_fast,      channels_fast ? n : places,      channels_fast ? places : n, (int)threadIdx.x & ((1 << bits) - 1),
          (int)threadIdx.x >> bits, 1 << bits, THREADS >> bits};
}

// One tensor at one direction: the address of (line 0, place 0, channel c0) and the steps from there.
struct Cursor {
  storage_t* data;
  long long line, place, channel;
};

__device__ __forceinline__ Cursor cursor(const View& v, const Scan& s, int b, int d, int c, int k = 0) {
  if (v.data == nullptr) return {nullptr, 0, 0, 0};
  return {v.data + b * v.b + d * v.d + c * v.c + k * v.k + first_line(v, s), line_step(v, s), place_step(v, s), v.c};
}

__device__ __forceinline__ storage_t* at(const Cursor& c, int line, int place, int channel) {
  return c.data + line * c.line + place * c.place + channel * c.channel;
}

// Float32 sums of an image-shaped tensor: the tensor itself if it is stored so, else scratch laid out with the
// block's fast axis innermost.
struct Sums {
  float* data;
  long long line, place, channel;
};

__device__ __forceinline__ Sums sums_of(const Params& p, const View& v, const Scan& s, const Share& share, void* scratch,
                                        bool channels_fast) {
#if STORAGE == 0
  const Cursor c = cursor(v, s, share.b, 0, share.c0);
  return {c.data, c.line, c.place, c.channel};
#else
  const long long image = (long long)p.height * p.width;
  const long long w = channels_fast ? p.channels : 1, h = p.width * w, c = channels_fast ? 1 : image;
  float* base = (float*)scratch + share.b * image * p.channels + share.c0 * c;
  const long long line = s.vertical ? h : w;
  return {base + (s.reversed ? (s.lines - 1) * line : 0), s.reversed ? -line : line, s.vertical ? w : h, c};
#endif
}

__device__ __forceinline__ float* at(const Sums& c, int line, int place, int channel) {
  return c.data + line * c.line + place * c.place + channel * c.channel;
}

__device__ __forceinline__ Taps read_taps(const Cursor& taps, long long k, int line, int place, int channel, bool has_before,
                                          bool has_after) {
  const storage_t* a = at(taps, line, place, channel);
  return {has_before ? widen(a[0]) : 0.f, widen(a[k]), has_after ? widen(a[2 * k]) : 0.f};
}
