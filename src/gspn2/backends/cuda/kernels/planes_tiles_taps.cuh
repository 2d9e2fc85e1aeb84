// Taps of a tile: weights before its first channel, the gradient of the logits after the last.
#pragma once
#include "planes_tiles_segment.cuh"

// Weights of the lane's places in the segment's lines.
__device__ __forceinline__ void read_pairs(const Params& p, const Segment& s, int b, int group,
                                           u32 (&weights)[LINES]) {
  const int pitch = p.knobs[0];
  const unsigned short* before = tiles::weights_of(p, s.d, b, group, pitch);
  const unsigned short* after = before + (long long)p.height * pitch;
  if (s.vertical) {
    const int column = s.tile_column + s.lane;
#pragma unroll
    for (int k = 0; k < LINES; k++) {
      const int row = s.tile_row + s.half * LINES + in_image(s, k);
      const long long at = (long long)row * pitch + column;
      weights[k] = row < p.height && column < p.width ? (u32)before[at] | (u32)after[at] << 16 : 0u;
    }
  } else {
    const int row = s.tile_row + s.lane;
#pragma unroll
    for (int q = 0; q < LINES / 8; q++) {
      const int column = s.tile_column + s.half * LINES + (s.reversed ? LINES - 8 - 8 * q : 8 * q);
      const long long at = (long long)row * pitch + column;
      Eight first = {}, second = {};
      if (row < p.height && column < p.width) first.read(before + at), second.read(after + at);
      if (s.reversed) first = turned(first), second = turned(second);
#pragma unroll
      for (int e = 0; e < 8; e++)
        weights[8 * q + e] = __byte_perm(first.word[e / 2], second.word[e / 2], e & 1 ? 0x7632 : 0x5410);
    }
  }
}

// And of the places around these, into the warp's shared memory.
__device__ __forceinline__ void show_weights(const Segment& s, const u32 (&weights)[LINES],
                                             unsigned char* to) {
  u32 around[LINES];
#pragma unroll
  for (int k = 0; k < LINES; k++) {
    const u32 before = __shfl_up_sync(~0u, weights[k], 1), after = __shfl_down_sync(~0u, weights[k], 1);
    around[k] = (s.lane == 0 ? 0u : before >> 16) | (s.lane == 31 ? 0u : after << 16);
  }
#pragma unroll
  for (int k = 0; k < LINES; k += 2) {
    unsigned char* at = to + k / 2 * 8 * SIDE;
    *(uint2*)at = make_uint2(weights[k], weights[k + 1]);
    *(uint2*)(at + AROUND) = make_uint2(around[k], around[k + 1]);
  }
}

__device__ __forceinline__ void read_weights(const Params& p, const Segment& s, int b, int group,
                                             unsigned char* to) {
  u32 weights[LINES];
  read_pairs(p, s, b, group, weights);
  show_weights(s, weights, to);
}

// Gradients of weights into shared memory, three tiles for each direction.
__device__ __forceinline__ void show_sums(const Segment& s, const WeightSums& sums, unsigned char* to) {
#pragma unroll
  for (int k = 0; k < LINES; k++) {
    const float before = __shfl_up_sync(~0u, sums.v[0][k], 1), after = __shfl_down_sync(~0u, sums.v[2][k], 1);
    unsigned char* at = to + 3 * s.d * PART + s.part_at + k * s.part_step;
    *(float*)at = s.lane == 0 ? sums.v[2][k] : before;
    *(float*)(at + PART) = sums.v[1][k];
    *(float*)(at + 2 * PART) = s.lane == 31 ? sums.v[0][k] : after;
  }
}

// e^v, of large v as at the bound of `exponential`; 0 where that is too small.
__device__ __forceinline__ float bounded_exponential(float v) {
  return exp2_fast(fmin_nan(v, 41.f) * 1.44269502f);
}

// The gradient of the logits of one place: as `tap_gradient`, with fewer exponentials. With D_k = e^(m - a_k)
// and E_k = e^m + D_k, w_k is proportional to 1 / E_k, and D_k / E_k is 1 - sigmoid(a_k) without
// cancellation.
__device__ __forceinline__ Taps logit_gradient(const Taps& a, const Taps& dw, bool has_before,
                                               bool has_after) {
  const float top = fmax_nan(has_before ? a.before : a.here, fmax_nan(a.here, has_after ? a.after : a.here));
  const float m = fmin_nan(top, 0.f), em = bounded_exponential(m);
  const float d_before = bounded_exponential(m - a.before), d_here = bounded_exponential(m - a.here);
  const float d_after = bounded_exponential(m - a.after);
  const float before = has_before ? reciprocal(em + d_before) : 0.f, here = reciprocal(em + d_here);
  const float after = has_after ? reciprocal(em + d_after) : 0.f;
  const float dw_before = has_before ? dw.before : 0.f, dw_after = has_after ? dw.after : 0.f;
  const float scale = reciprocal(before + here + after);
  const float mean = scale * (before * dw_before + here * dw.here + after * dw_after);
  // What neighbours that do not exist have may be NaN.
  return {has_before ? d_before * before * (before * scale) * (dw_before - mean) : 0.f,
          d_here * here * (here * scale) * (dw.here - mean),
          has_after ? d_after * after * (after * scale) * (dw_after - mean) : 0.f};
}

// Lines from the last restart to `line` of a scan.
__device__ __forceinline__ int phase_of(const Params& p, const Scan& scan, int line) {
  return (scan.reversed ? scan.lines - 1 - line : line) % p.chunk;
}

// Gradients of the logits of eight places in a row.
template <bool VERTICAL>
__device__ __forceinline__ void write_logit_gradients(const Params& p, const Segment& s,
                                                      const unsigned char* sums, int d, int b, int group,
                                                      int in_tile, int left) {
  const Scan scan = scan_of(p, d);
  const int row = s.tile_row + in_tile, column = s.tile_column + left;
  const storage_t* logits = p.taps.data + (b * p.taps.b + d * p.taps.d + group * p.taps.c);
  storage_t* to = p.dtaps.data + (b * p.dtaps.b + d * p.dtaps.d + group * p.dtaps.c);
  Eight a[3];
#pragma unroll
  for (int t = 0; t < 3; t++) a[t].read(logits + (t * p.taps.k + row * p.taps.h + column));
  int phase = phase_of(p, scan, VERTICAL ? row : column);
  float pending[3];
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const bool has_before = VERTICAL ? e > 0 || column > 0 : row > 0;
    const bool has_after = VERTICAL ? e < 7 || column + 8 < p.width : row + 1 < p.height;
    const unsigned char* at = sums + 3 * d * PART + in_tile * PART_ROW + 4 * (left + e);
    const Taps dw = {*(const float*)at, *(const float*)(at + PART), *(const float*)(at + 2 * PART)};
    const Taps da = logit_gradient({a[0][e], a[1][e], a[2][e]}, dw, has_before, has_after);
    const float v[3] = {da.before, da.here, da.after};
    // Two places of a word are read before both are replaced.
#pragma unroll
    for (int t = 0; t < 3; t++)
      if (e & 1)
        a[t].word[e / 2] = packed(pending[t], phase == 0 ? 0.f : v[t]);
      else
        pending[t] = phase == 0 ? 0.f : v[t];
    if (!VERTICAL)
      phase = scan.reversed ? (phase == 0 ? p.chunk : phase) - 1 : phase + 1 == p.chunk ? 0 : phase + 1;
  }
#pragma unroll
  for (int t = 0; t < 3; t++) store(to + (t * p.dtaps.k + row * p.dtaps.h + column), a[t].all());
}

// All of the tile, by all of its threads.
__device__ __forceinline__ void write_tap_gradients(const Params& p, const Segment& s, int b, int group,
                                                    const unsigned char* sums) {
#pragma unroll 1
  for (int i = threadIdx.x; i < SCANS * SIDE * SIDE / 8; i += THREADS) {
    const int d = i / (SIDE * SIDE / 8), row = i / 4 % SIDE, left = i % 4 * 8;
    if (s.tile_row + row >= p.height || s.tile_column + left >= p.width) continue;
    if (p.directions[d] < 2)
      write_logit_gradients<true>(p, s, sums, d, b, group, row, left);
    else
      write_logit_gradients<false>(p, s, sums, d, b, group, row, left);
  }
}
