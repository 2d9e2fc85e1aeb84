// Rungs of the ladder between the baseline and the shipped kernels: each adds one idea to the one before it, and
// nothing else. One direction, forward, planes, taps of their own for every channel, weights as given.
//
// ladder_fused    one launch: a block takes a plane through all its lines; states stay in memory, in the storage
//                 type. Scanned to the right, places are W apart in memory; scanned down the same kernel is coalesced.
// ladder_onchip   states of the line before in shared memory, float32.
// ladder_blocks   blocks of places by planes: a thread has 16 bytes of adjacent places in registers, edges are
//                 exchanged by shuffle, and the next line is loaded while this one is computed. Down only.
// ladder_project  y = matrix x over channels, pixel by pixel: the projections to and from compact channels.
//
// Macros: THREADS; PLANES (ladder_blocks: planes a block); CHANNELS_IN, CHANNELS_OUT (ladder_project).
#include "common.cuh"

struct Plane {
  const storage_t *x, *lam, *taps;
  storage_t* y;
};

__device__ __forceinline__ Plane plane_of(const Params& p, const Scan& s, int plane) {
  const int b = plane / p.channels, c = plane % p.channels;
  return {p.x.data + b * p.x.b + c * p.x.c + first_line(p.x, s), p.lam.data + b * p.lam.b + c * p.lam.c + first_line(p.lam, s),
          p.taps.data + b * p.taps.b + c * p.taps.c + first_line(p.taps, s),
          p.y.data + b * p.y.b + c * p.y.c + first_line(p.y, s)};
}

KERNEL(THREADS, 1) ladder_fused(CONSTANT_PARAMS p) {
  const Scan s = scan_of(p, 0);
  Plane m = plane_of(p, s, blockIdx.x);
  const long long place = place_step(p.x, s), line = line_step(p.x, s);
  for (int i = 0; i < s.lines; ++i) {
    for (int j = threadIdx.x; j < s.places; j += THREADS) {
      const long long at = i * line + j * place;
      float h = widen(m.x[at]) * widen(m.lam[at]);
      if (i > 0) {
        const storage_t* before = m.y + at - line;
        if (j > 0) h += widen(m.taps[at]) * widen(before[-place]);
        h += widen(m.taps[p.taps.k + at]) * widen(before[0]);
        if (j + 1 < s.places) h += widen(m.taps[2 * p.taps.k + at]) * widen(before[place]);
      }
      m.y[at] = narrow(h);
    }
    __syncthreads();
  }
}

KERNEL(THREADS, 1) ladder_onchip(CONSTANT_PARAMS p) {
  const Scan s = scan_of(p, 0);
  Plane m = plane_of(p, s, blockIdx.x);
  const long long place = place_step(p.x, s), line = line_step(p.x, s);
  float* states = (float*)shared_memory();  // two lines in turn
  for (int i = 0; i < s.lines; ++i) {
    const float* before = states + (i & 1 ? 0 : s.places);
    float* now = states + (i & 1 ? s.places : 0);
    for (int j = threadIdx.x; j < s.places; j += THREADS) {
      const long long at = i * line + j * place;
      float h = widen(m.x[at]) * widen(m.lam[at]);
      if (i > 0) {
        if (j > 0) h += widen(m.taps[at]) * before[j - 1];
        h += widen(m.taps[p.taps.k + at]) * before[j];
        if (j + 1 < s.places) h += widen(m.taps[2 * p.taps.k + at]) * before[j + 1];
      }
      now[j] = h;
      m.y[at] = narrow(h);
    }
    __syncthreads();
  }
}

#ifndef PLANES
#define PLANES 1
#endif
const int ADJACENT = 16 / sizeof(storage_t);  // places in 16 bytes

union Vector {
  uint4 bits;
  storage_t places[ADJACENT];
  __device__ Vector() {}
};

struct Line {
  Vector x, lam, taps[3];
};

__device__ __forceinline__ Vector read(const storage_t* at) {
  Vector v;
  v.bits = *(const uint4*)at;
  return v;
}

__device__ __forceinline__ void read_line(Line& l, const Plane& m, long long at, long long tap_step) {
  l.x = read(m.x + at);
  l.lam = read(m.lam + at);
#pragma unroll
  for (int k = 0; k < 3; ++k) l.taps[k] = read(m.taps + k * tap_step + at);
}

// Knob 0: threads along a line, whole warps. Shared memory: 2 x PLANES x warps of a line x 2 floats.
KERNEL(THREADS, 1) ladder_blocks(CONSTANT_PARAMS p) {
  const Scan s = scan_of(p, 0);
  const int across = p.knobs[0], warps = across / 32, plane_in_block = threadIdx.x / across;
  const int t = threadIdx.x % across, warp = t / 32, lane = t % 32;
  const int plane = blockIdx.x * PLANES + plane_in_block, first = t * ADJACENT;
  const bool inside = plane < p.batch * p.channels && first < s.places;
  Plane m = plane_of(p, s, inside ? plane : 0);
  const long long line = line_step(p.x, s);
  float h[ADJACENT];
#pragma unroll
  for (int v = 0; v < ADJACENT; ++v) h[v] = 0.f;
  float* edges = (float*)shared_memory() + plane_in_block * warps * 2;  // of each warp: first and last state
  Line now;
  if (inside) read_line(now, m, first, p.taps.k);
  for (int i = 0; i < s.lines; ++i) {
    Line next;
    if (inside && i + 1 < s.lines) read_line(next, m, (i + 1) * line + first, p.taps.k);
    float before = __shfl_up_sync(~0u, h[ADJACENT - 1], 1), after = __shfl_down_sync(~0u, h[0], 1);
    const float* other = edges + (i & 1 ? 0 : PLANES * warps * 2);
    if (lane == 0) before = warp > 0 && i > 0 ? other[2 * (warp - 1) + 1] : 0.f;
    if (lane == 31) after = warp + 1 < warps && i > 0 ? other[2 * (warp + 1)] : 0.f;
    Vector out;
    float fresh[ADJACENT];
#pragma unroll
    for (int v = 0; v < ADJACENT; ++v) {
      const int j = first + v;
      float sum = inside ? widen(now.x.places[v]) * widen(now.lam.places[v]) : 0.f;
      if (inside && i > 0) {
        if (j > 0) sum += widen(now.taps[0].places[v]) * (v > 0 ? h[v > 0 ? v - 1 : 0] : before);
        sum += widen(now.taps[1].places[v]) * h[v];
        if (j + 1 < s.places)
          sum += widen(now.taps[2].places[v]) * (v + 1 < ADJACENT ? h[v + 1 < ADJACENT ? v + 1 : v] : after);
      }
      fresh[v] = sum;
      out.places[v] = narrow(sum);
    }
#pragma unroll
    for (int v = 0; v < ADJACENT; ++v) h[v] = fresh[v];
    if (inside) *(uint4*)(m.y + i * line + first) = out.bits;
    float* mine = edges + (i & 1 ? PLANES * warps * 2 : 0) + 2 * warp;
    if (lane == 0) mine[0] = h[0];
    if (lane == 31) mine[1] = h[ADJACENT - 1];
    __syncthreads();
    now = next;
  }
}

#ifdef CHANNELS_IN
// x (B, CHANNELS_IN, H, W) -> y (B, CHANNELS_OUT, H, W); the matrix (OUT, IN) lies where lam does.
KERNEL(THREADS, 1) ladder_project(CONSTANT_PARAMS p) {
  const long long pixels = (long long)p.height * p.width, groups = pixels / ADJACENT;
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= p.batch * groups) return;
  const long long b = i / groups, at = i % groups * ADJACENT;
  float sums[CHANNELS_OUT][ADJACENT];
#pragma unroll
  for (int o = 0; o < CHANNELS_OUT; ++o)
#pragma unroll
    for (int v = 0; v < ADJACENT; ++v) sums[o][v] = 0.f;
#pragma unroll
  for (int c = 0; c < CHANNELS_IN; ++c) {
    const Vector x = read(p.x.data + (b * CHANNELS_IN + c) * pixels + at);
#pragma unroll
    for (int o = 0; o < CHANNELS_OUT; ++o) {
      const float m = widen(p.lam.data[o * CHANNELS_IN + c]);
#pragma unroll
      for (int v = 0; v < ADJACENT; ++v) sums[o][v] += m * widen(x.places[v]);
    }
  }
#pragma unroll
  for (int o = 0; o < CHANNELS_OUT; ++o) {
    Vector out;
#pragma unroll
    for (int v = 0; v < ADJACENT; ++v) out.places[v] = narrow(sums[o][v]);
    *(uint4*)(p.y.data + (b * CHANNELS_OUT + o) * pixels + at) = out.bits;
  }
}
#endif
