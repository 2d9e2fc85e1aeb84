// A tile from what enters it, whose channels have taps of their own: what forward and backward share.
//
// All lines of a tile are unrolled: a lane has its states in registers.
#pragma once
#define FINAL 1
#include "tiles_own.cuh"

// The weights of a tile, as tiles_own_alone has left them.
__device__ __forceinline__ void copy_weights(const Params& p, const Tile& tile) {
  const Lane me(threadIdx.x);
  const Way way(p, tile, me.d, me.sub, false);
  constexpr int LINES = V / W;  // of a warp
  const Pair* from = way.store.pair(way.first + me.half, way.tile * SIDE + me.place);
  unsigned char* to = pair_at(me.d, me.sub, me.half * PITCH + me.place);
  const long long from_line = padded(way.store.s.places);
#pragma unroll 4
  for (int i = me.half; i < SIDE; i += LINES, from += LINES * from_line, to += LINES * 16 * PITCH)
    copy_async<16>(to, from, i >= way.begin && i < way.end && me.place < way.places ? 16 : 0);
}

// What lies beyond the sides of a tile: the states of the line before each line, or what neighbours hand
// back from it.
__device__ __forceinline__ void copy_outside(const Params& p, const Tile& tile, bool adjoint) {
  const Lane me(threadIdx.x);
  const Way way(p, tile, me.d, me.sub, adjoint);
  const int i = me.place, side = me.half, beyond = way.tile + (side == 0 ? -1 : 1);
  const int line = way.first + i - (adjoint ? 0 : 1);
  const bool known = i >= way.begin && i < way.end && line >= 0 && beyond >= 0 && beyond < way.store.tiles;
  copy_async<16>(outside_at(adjoint, me.d, me.sub, i, side),
                 way.store.side(line, beyond, side == 0 ? 1 : 0, me.channel(tile)), known ? 16 : 0);
}

// A lane of a tile: where it reads, at the first line of the tile, and what it finds beside it.
struct Scanner {
  Lane me;
  Way way;
  int channel, place;
  bool there, first, last;
  unsigned char *x, *lam, *pair, *left, *right;  // left, right: of the states beyond the sides

  __device__ __forceinline__ Scanner(const Params& p, const Tile& tile)
      : me(threadIdx.x), way(p, tile, me.d, me.sub, false) {
    channel = me.channel(tile), place = way.tile * SIDE + me.place;
    there = me.place < way.places;
    // Lanes without a place stay at zero, whatever their neighbours have: there all beyond the side is zero.
    first = me.place == 0 || !there, last = me.place == SIDE - 1 || !there;
    const int pixel = way.at + me.place * way.next;
    x = image_at(me.sub, pixel) + me.half * 4, lam = scaled_at(me.d, me.sub, me.place) + me.half * 4;
    pair = pair_at(me.d, me.sub, me.place) + me.half * 8;
    left = outside_at(0, me.d, me.sub, 0, me.place != 0) + me.half * 8;
    right = outside_at(0, me.d, me.sub, 0, 1) + me.half * 8;
  }
  // What enters through the first line.
  __device__ __forceinline__ void enter(float (&h)[W]) const {
#pragma unroll
    for (int v = 0; v < W; v++) h[v] = 0.f;
    if (there && way.first > 0) load_two(way.store.end(way.along - 1, place, channel) + me.half * W, h);
  }
  // States of the places beside this one, on the line before line i of the tile. By whole warps.
  __device__ __forceinline__ void meet(int i, const float (&h)[W], float (&before)[W],
                                       float (&after)[W]) const {
#pragma unroll
    for (int v = 0; v < W; v++) {
      before[v] = __shfl_up_sync(ALL_LANES, h[v], 1, SIDE);
      after[v] = __shfl_down_sync(ALL_LANES, h[v], 1, SIDE);
    }
    if (first) load_two(left + i * 32, before);
    if (last) load_two(right + i * 32, after);
  }
  // h of a line from that of the line before.
  __device__ __forceinline__ void step(const Params& p, int i, const float (&h)[W], float (&to)[W]) const {
    float u[W], before[W], after[W];
    widen_two(x + i * way.line * STORED, u);
#if HAS_LAM
    float scale[W];
    widen_two(lam + i * PITCH * STORED, scale);
#pragma unroll
    for (int v = 0; v < W; v++) u[v] *= scale[v];
#endif
    Taps w[W];
    weights_of_two(pair + i * PITCH * 16, w);
    meet(i, h, before, after);
    const bool begins = RESTARTS && way.begins(p, i);
#pragma unroll
    for (int v = 0; v < W; v++) {
      const float sum = fmaf(w[v].before, before[v], fmaf(w[v].after, after[v], fmaf(w[v].here, h[v], u[v])));
      to[v] = begins ? u[v] : sum;
    }
  }
};

// y or dx: what lies in the places of weights, added in the order of the directions.
__device__ __forceinline__ void store_sum(const Params& p, const Tile& tile, const View& view) {
  if (view.data == nullptr) return;
  for (int item = threadIdx.x; item < SUBS * SIDE * SIDE; item += THREADS) {
    const int sub = item % SUBS, column = item / SUBS % SIDE, row = item / (SUBS * SIDE);
    float sum[V], one[V];
    load_state(pair_at(0, sub, Turn(p, 0)(row, column)), sum);
#pragma unroll
    for (int d = 1; d < SCANS; d++) {
      load_state(pair_at(d, sub, Turn(p, d)(row, column)), one);
#pragma unroll
      for (int v = 0; v < V; v++) sum[v] += one[v];
    }
    const uint2 words = make_uint2(stored(sum[0], sum[1]), stored(sum[2], sum[3]));
    if (tile.has(row, column)) *(uint2*)(tile.at(view, row, column) + sub * V) = words;
  }
}
