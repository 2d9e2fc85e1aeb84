// What the kernels of tiles share. The layout: channels adjacent; large images of several directions.
//
// A tile is SIDE x SIDE pixels, SUBS vectors of VECTOR channels wide. For every direction it has a state at
// each line's places: what the tile's own pixels add up to, and what enters through its first line and its
// two sides. So an image takes three launches:
//   1. tiles_forward, tile by tile: the states of the tile alone, as if nothing entered; only those at its
//      borders are kept, and the weights of its places.
//   2. tiles_borders, line after line: what enters is carried on by the weights alone, over the whole image,
//      and gives the true states at all borders. It reads nothing but weights and borders.
//   3. tiles_forward, tile by tile, again: from true borders to all states, gated, added up on the chip, and
//      written.
// Each operand is read once by either of the tiles' launches, and no sum travels through memory. Backward
// does the same for states and adjoints together.
//
// Macros (beside those of common.cuh):
//   VECTOR  channels of a thread, 2 or 4
//   SIDE    pixels along the sides of a tile, 16 or 32. SIDE * SUBS is a multiple of 32; or 16, and two
//           directions in a warp have lines along the same axis
//   SUBS    vectors of a block
//   SCANS   number of directions
//   OWN_TAPS  each channel has taps of its own (tiles_own.cuh); a macro of bfloat16 only
// Scratch: 0 weights, 1 states beside the borders between places, 2 states beside those between lines.
#pragma once
#include "common.cuh"

constexpr int V = VECTOR;  // channels of a vector
constexpr int CHANNELS = V * SUBS;
constexpr u32 ALL_LANES = 0xffffffffu;

struct __align__(V * sizeof(storage_t)) Stored {
  storage_t e[V];
};
struct __align__(4 * V) State {
  float e[V];
};
constexpr int STORED = (int)sizeof(Stored), STATE = (int)sizeof(State);

// The weights before and after of a place, of a group of channels or of each of a vector: the third is what
// they leave of one, and never negative. Two float16 are more precise than bfloat16 tensors, and less than
// float16 ones.
#if STORAGE != 1
struct __align__(8) Pair {
  float before, after;
};
__device__ __forceinline__ Pair pair_of(const Taps& w) { return {w.before, w.after}; }
__device__ __forceinline__ Taps taps_of(const Pair& p) {
  return {p.before, 1.f - p.before - p.after, p.after};
}
__device__ __forceinline__ Taps taps_of(const Pair& p, int) { return taps_of(p); }
#else
__device__ __forceinline__ Taps taps_of(u32 halves) {
  const __half2 both = *(const __half2*)&halves;
  const float before = __low2float(both), after = __high2float(both);
  return {before, 1.f - before - after, after};
}
#if OWN_TAPS
struct __align__(16) Pair {
  u32 halves[V];
};
__device__ __forceinline__ Taps taps_of(const Pair& p, int v) { return taps_of(p.halves[v]); }
#else
struct Pair {
  u32 halves;
};
__device__ __forceinline__ Pair pair_of(const Taps& w) { return {halves_toward_zero(w.before, w.after)}; }
__device__ __forceinline__ Taps taps_of(const Pair& p) { return taps_of(p.halves); }
__device__ __forceinline__ Taps taps_of(const Pair& p, int) { return taps_of(p); }
#endif
#endif

// What has weights: groups, or vectors of channels with taps of their own.
__device__ __forceinline__ int weight_sets(const Params& p) { return OWN_TAPS ? p.channels / V : p.groups; }

__device__ __forceinline__ void unpack(const Stored& q, float (&e)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) e[v] = widen(q.e[v]);
}
__device__ __forceinline__ Stored pack(const float (&e)[V]) {
  Stored q;
#pragma unroll
  for (int v = 0; v < V; v++) q.e[v] = narrow(e[v]);
  return q;
}
__device__ __forceinline__ void load_state(const void* from, float (&e)[V]) {
#if VECTOR == 4
  const float4 f = *(const float4*)from;
  e[0] = f.x, e[1] = f.y, e[2] = f.z, e[3] = f.w;
#else
  const float2 f = *(const float2*)from;
  e[0] = f.x, e[1] = f.y;
#endif
}
__device__ __forceinline__ void store_state(void* to, const float (&e)[V]) {
#if VECTOR == 4
  *(float4*)to = make_float4(e[0], e[1], e[2], e[3]);
#else
  *(float2*)to = make_float2(e[0], e[1]);
#endif
}

__device__ __forceinline__ int tiles_along(int pixels) { return (pixels + SIDE - 1) / SIDE; }
__device__ __forceinline__ long long padded(int places) { return (places + 3) & ~3; }

// Where scratch memory holds what of one direction of one image; lines in the order of the scan, places in
// that of the image. `late`: how many lines of a whole tile the first tile of the scan lacks.
struct Store {
  Scan s;
  int late, tiles;         // tiles: of a line
  long long side_line;     // numbers from a line's sides to the next line's
  Pair* pairs;             // [line][padded places]
  float *sides, *ends;     // [vector][line][2 tiles][V], [vector][tile of lines][place][V]

  // `set`: which weights.
  __device__ __forceinline__ Store(const Params& p, int b, int d, int set, bool adjoint) {
    s = scan_of(p, d);
    tiles = tiles_along(s.places), side_line = 2ll * V * tiles;
    late = s.reversed ? (SIDE - s.lines % SIDE) % SIDE : 0;
    const long long image = b * SCANS + d;
    const long long of_pairs = max(p.height * padded(p.width), p.width * padded(p.height));
    const long long rows = (long long)p.height * tiles_along(p.width);
    const long long columns = (long long)p.width * tiles_along(p.height);
    const long long of_sides = 2 * max(rows, columns);
    pairs = (Pair*)p.scratch[0] + (image * weight_sets(p) + set) * of_pairs;
    const long long part = image + (adjoint ? (long long)p.batch * SCANS : 0);
    sides = (float*)p.scratch[1] + part * of_sides * p.channels;
    ends = (float*)p.scratch[2] + part * of_sides / 2 * p.channels;
  }
  __device__ __forceinline__ Pair* pair(int line, int place) const {
    return pairs + line * padded(s.places) + place;
  }
  // The state of the first (0) or the last (1) place of a tile of places.
  __device__ __forceinline__ float* side(int line, int tile, int which, int channel) const {
    return sides + ((long long)(channel / V) * s.lines + line) * side_line + (2 * tile + which) * V;
  }
  // The state after the last line of a tile of lines.
  __device__ __forceinline__ float* end(int tile, int place, int channel) const {
    return ends + (((long long)(channel / V) * tiles_along(s.lines) + tile) * s.places + place) * V;
  }
};
