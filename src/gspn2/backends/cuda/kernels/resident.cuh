// What the resident kernels share: what a task is, and how numbers lie in shared memory.
//
// A block takes a task: one image and some of its channels, in some or all directions. Two steps before and after the
// scans do everything that is not serial: operands are put in order in shared memory, taps normalised, by all threads;
// then each scan is run by one warp that holds a whole line in registers, PLACES places a lane, so that neighbours come
// by shuffle and no line costs a barrier.
//
// Macros: THREADS, BLOCKS   of a block; blocks on a multiprocessor
//         SCANS, DIRECTIONS their number; direction d is hexadecimal digit d from the right
//         PACK              channels in a unit, the item of shared memory: 2 (one 16-bit pair of channels) or 1
//         PLACES            places of a line in a lane: 2, 4 or 8; a line has at most 32 * PLACES
//         ONE               a task is one unit with one tap group
//         SPLIT             blocks of a cluster, which share the directions of a task
#pragma once
#include "tap_pairs.cuh"

// What the plan decided (`p.knobs`).
enum {
  CHANNELS, TASKS, PARTS, GROUPS,  // channels of a task, tasks, tasks of an image, tap groups of a task
  PITCH_V, PITCH_H,                // units from line to line of vertical and of horizontal scans
  UNIT_V, UNIT_H,                  // bytes of a plane of units
  TAPS_V, TAPS_H,                  // bytes of the weights of a tap group
  SLAB_ROWS, SLAB_BYTES, SLAB_X,   // records: rows and bytes that arrive together, and where in them images begin
  RING_AT,                         // where slabs are
  SUMS_AT,                         // backward: sums of dx over directions
  WIDTH_MAGIC, CHUNK_MAGIC         // of `Divisor`
};

#if STORAGE == 0 || PACK == 2
typedef u32 unit_t;
#else
typedef unsigned short unit_t;
#endif

#define LINE_WORDS (PLACES * (int)sizeof(unit_t) / 4)
#if TAP_PAIR
#define TAP_WORDS PLACES
#define TAP_PLANES 1
#define TAP_BYTES 4  // of a place
#else
// Three planes, one for each tap.
#define TAP_PLANE_WORDS (PLACES * (int)sizeof(storage_t) / 4)
#define TAP_WORDS (3 * TAP_PLANE_WORDS)
#define TAP_PLANES 3
#define TAP_BYTES (3 * (int)sizeof(storage_t))
#endif

// Units ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 bits_of(storage_t v) {
#if STORAGE == 0
  return __float_as_uint(v);
#elif STORAGE == 1
  return __bfloat16_as_ushort(v);
#else
  return __half_as_ushort(v);
#endif
}

__device__ __forceinline__ float widen_bits(u32 bits) {
#if STORAGE == 0
  return __uint_as_float(bits);
#elif STORAGE == 1
  return __uint_as_float(bits << 16);
#else
  return __half2float(__ushort_as_half((unsigned short)bits));
#endif
}

// The halves of a word of 16-bit numbers.
__device__ __forceinline__ float widen_low(u32 word) { return widen_bits(word & 0xffffu); }
__device__ __forceinline__ float widen_high(u32 word) {
#if STORAGE == 1
  return __uint_as_float(word & 0xffff0000u);
#else
  return widen_bits(word >> 16);
#endif
}

// Two numbers rounded to the halves of a word.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#if STORAGE == 1
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const u32*)&pair;
#else
  return bits_of(narrow(low)) | bits_of(narrow(high)) << 16;
#endif
}

template <int WORDS>
__device__ __forceinline__ void load_words(const unsigned char* p, u32 (&w)[WORDS]) {
  if constexpr (WORDS == 1) {
    w[0] = *(const u32*)p;
  } else if constexpr (WORDS == 2) {
    const uint2 v = *(const uint2*)p;
    w[0] = v.x, w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = *(const uint4*)(p + 4 * i);
      w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
    }
  }
}

template <int WORDS>
__device__ __forceinline__ void store_words(unsigned char* p, const u32 (&w)[WORDS]) {
  if constexpr (WORDS == 1) {
    *(u32*)p = w[0];
  } else if constexpr (WORDS == 2) {
    *(uint2*)p = make_uint2(w[0], w[1]);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) *(uint4*)(p + 4 * i) = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
  }
}

// A lane's places of a line, every channel of the unit.
typedef float Lane[PACK][PLACES];

__device__ __forceinline__ void widen_lane(const u32 (&w)[LINE_WORDS], Lane& out) {
#pragma unroll
  for (int v = 0; v < PLACES; v++) {
#if STORAGE == 0
    out[0][v] = __uint_as_float(w[v]);
#elif PACK == 2
    out[0][v] = widen_low(w[v]);
    out[1][v] = widen_high(w[v]);
#else
    out[0][v] = v % 2 ? widen_high(w[v / 2]) : widen_low(w[v / 2]);
#endif
  }
}

// Float32 results of a lane, in the planes of `unit_t` that operands leave behind: a pair of channels fills two planes
// with one channel each, a single 16-bit channel two planes with its upper and lower halves.
#define RESULT_PLANES (STORAGE == 0 ? 1 : 2)

__device__ __forceinline__ void store_result(unsigned char* p, long long plane, const Lane& r) {
#if STORAGE == 0 || PACK == 2
#pragma unroll
  for (int c = 0; c < PACK; c++) {
    u32 w[LINE_WORDS];
#pragma unroll
    for (int v = 0; v < PLACES; v++) w[v] = __float_as_uint(r[c][v]);
    store_words(p + c * plane, w);
  }
#else
  u32 high[LINE_WORDS], low[LINE_WORDS];
#pragma unroll
  for (int v = 0; v < PLACES; v += 2) {
    const u32 even = __float_as_uint(r[0][v]), odd = __float_as_uint(r[0][v + 1]);
    high[v / 2] = __byte_perm(even, odd, 0x7632);
    low[v / 2] = __byte_perm(even, odd, 0x5410);
  }
  store_words(p, high);
  store_words(p + plane, low);
#endif
}

__device__ __forceinline__ void store_result_at(unsigned char* p, long long plane, const float (&r)[PACK]) {
#if STORAGE == 0 || PACK == 2
#pragma unroll
  for (int c = 0; c < PACK; c++) *(float*)(p + c * plane) = r[c];
#else
  *(unsigned short*)p = (unsigned short)(__float_as_uint(r[0]) >> 16);
  *(unsigned short*)(p + plane) = (unsigned short)__float_as_uint(r[0]);
#endif
}

// A lane's places of results.
__device__ __forceinline__ void load_results(const unsigned char* p, long long plane, Lane& r) {
#if STORAGE == 0 || PACK == 2
#pragma unroll
  for (int c = 0; c < PACK; c++) {
    u32 w[LINE_WORDS];
    load_words(p + c * plane, w);
#pragma unroll
    for (int v = 0; v < PLACES; v++) r[c][v] = __uint_as_float(w[v]);
  }
#else
  u32 high[LINE_WORDS], low[LINE_WORDS];
  load_words(p, high);
  load_words(p + plane, low);
#pragma unroll
  for (int v = 0; v < PLACES; v += 2) {
    r[0][v] = __uint_as_float(__byte_perm(low[v / 2], high[v / 2], 0x5410));
    r[0][v + 1] = __uint_as_float(__byte_perm(low[v / 2], high[v / 2], 0x7632));
  }
#endif
}

// One place of a result, channel c of the unit.
__device__ __forceinline__ float load_result(const unsigned char* p, long long plane, int c) {
#if STORAGE == 0 || PACK == 2
  return __uint_as_float(*(const u32*)(p + c * plane));
#else
  return __uint_as_float((u32)*(const unsigned short*)p << 16 | *(const unsigned short*)(p + plane));
#endif
}

// Taps ----------------------------------------------------------------------------------------------------------

// Stores the weights of one place. `plane`: bytes from one tap to the next where they are three planes.
__device__ __forceinline__ void store_taps(unsigned char* p, int index, int plane, const Taps& w) {
#if TAP_PAIR
  ((u32*)p)[index] = pack_taps(w);
#else
  ((storage_t*)p)[index] = narrow(w.before);
  ((storage_t*)(p + plane))[index] = narrow(w.here);
  ((storage_t*)(p + 2 * plane))[index] = narrow(w.after);
#endif
}

struct LaneTaps {
  float before[PLACES], here[PLACES], after[PLACES];
};

__device__ __forceinline__ void widen_taps(const u32 (&w)[TAP_WORDS], LaneTaps& out) {
#pragma unroll
  for (int v = 0; v < PLACES; v++) {
#if TAP_PAIR
    const Taps taps = unpack_taps(w[v]);
    out.before[v] = taps.before, out.here[v] = taps.here, out.after[v] = taps.after;
#elif STORAGE == 0
    out.before[v] = __uint_as_float(w[v]);
    out.here[v] = __uint_as_float(w[TAP_PLANE_WORDS + v]);
    out.after[v] = __uint_as_float(w[2 * TAP_PLANE_WORDS + v]);
#else
    const u32 before = w[v / 2], here = w[TAP_PLANE_WORDS + v / 2], after = w[2 * TAP_PLANE_WORDS + v / 2];
    out.before[v] = v % 2 ? widen_high(before) : widen_low(before);
    out.here[v] = v % 2 ? widen_high(here) : widen_low(here);
    out.after[v] = v % 2 ? widen_high(after) : widen_low(after);
#endif
  }
}

// Tasks ---------------------------------------------------------------------------------------------------------

// x / n by a multiplication, for x n < 2^32; magic is 2^32 / n + 1, or 0 for n = 1.
struct Divisor {
  int n;
  u32 magic;
};
__device__ __forceinline__ int quotient(int x, const Divisor& d) { return d.magic == 0 ? x : (int)__umulhi((u32)x, d.magic); }
__device__ __forceinline__ Divisor width_of(const Params& p) { return {p.width, (u32)p.knobs[WIDTH_MAGIC]}; }
__device__ __forceinline__ Divisor chunk_of(const Params& p) { return {p.chunk, (u32)p.knobs[CHUNK_MAGIC]}; }

__device__ __forceinline__ int units_of(const Params& p) { return ONE ? 1 : p.knobs[CHANNELS] / PACK; }
__device__ __forceinline__ int groups_of(const Params& p) { return ONE ? 1 : p.knobs[GROUPS]; }

// Channels from c0 of image b, and their tap groups from g0.
struct Task {
  int b, c0, g0;
};

__device__ __forceinline__ Task task_of(const Params& p, int index) {
  if (p.knobs[PARTS] == 1) return {index, 0, 0};
  const int b = index / p.knobs[PARTS], c0 = (index - b * p.knobs[PARTS]) * p.knobs[CHANNELS];
  return {b, c0, c0 / (p.channels / p.groups)};
}

// Directions -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int direction_at(int d) { return DIRECTIONS >> 4 * d & 15; }
__device__ __forceinline__ bool vertical_at(int d) { return direction_at(d) < 2; }

__device__ __forceinline__ Scan scan_at(const Params& p, int d) {
  const bool vertical = vertical_at(d);
  return {vertical ? p.height : p.width, vertical ? p.width : p.height, vertical, (direction_at(d) & 1) != 0};
}

// Directions [first, last): part `part` of `parts`.
struct Range {
  int first, last;
};
__device__ __forceinline__ Range directions_of(int part, int parts) {
  return parts == 1 ? Range{0, SCANS} : Range{part * SCANS / parts, (part + 1) * SCANS / parts};
}

// Tensors --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ storage_t* at(const View& v, int b, int d, int c, int row, int column) {
  return v.data + b * v.b + d * v.d + c * v.c + row * v.h + column * v.w;
}

// Pairs of channels of a tensor are words of memory.
__device__ __forceinline__ bool paired(const View& v) {
  return v.c == 1 && (((u64)v.data >> 1 | (u64)v.b | (u64)v.d | (u64)v.h | (u64)v.w) & 1) == 0;
}

// The channels of a unit.
__device__ __forceinline__ void widen_unit(unit_t unit, float (&v)[PACK]) {
#if PACK == 2
  v[0] = widen_low(unit), v[1] = widen_high(unit);
#else
  v[0] = widen_bits(unit);
#endif
}

// The unit at p: a channel, or two that are `channel_step` apart.
__device__ __forceinline__ unit_t load_unit(const storage_t* p, long long channel_step, bool paired) {
#if PACK == 2
  if (paired) return __ldg((const u32*)p);
  return bits_of(__ldg(p)) | bits_of(__ldg(p + channel_step)) << 16;
#else
  return (unit_t)bits_of(__ldg(p));
#endif
}

__device__ __forceinline__ void store_unit(storage_t* p, long long channel_step, bool paired, const float (&v)[PACK]) {
#if PACK == 2
  if (paired) {
    *(u32*)p = narrow_pair(v[0], v[1]);
    return;
  }
#endif
#pragma unroll
  for (int c = 0; c < PACK; c++) p[c * channel_step] = narrow(v[c]);
}
