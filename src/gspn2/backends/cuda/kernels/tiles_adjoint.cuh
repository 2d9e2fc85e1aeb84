// Adjoints of a tile, from its last line to its first: g = gate dy + what is handed back from the line after.
//
// A place hands its neighbours weight times adjoint, which they add: these products meet by shuffle.
#pragma once
#include "tiles_block.cuh"

// gate dy of a line.
__device__ __forceinline__ void take_dy(const unsigned char* scaled, const Stored* dy, float (&out)[V],
                                        float (&g)[V]) {
  unpack(*dy, out);
#pragma unroll
  for (int v = 0; v < V; v++) g[v] = out[v];
#if HAS_GATE
  float gate[V];
  unpack(*((const Stored*)scaled + 1), gate);
#pragma unroll
  for (int v = 0; v < V; v++) g[v] *= gate[v];
#endif
}

// What a line hands to the line before: of its own adjoints at a place, and of those of its neighbours.
struct Handed {
  float here[V], before[V], after[V];

  // By whole warps; the first and the last lane of a tile meet themselves.
  __device__ __forceinline__ Handed(const Taps& w, const float (&g)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      before[v] = __shfl_up_sync(ALL_LANES, w.after * g[v], 1, SIDE);
      after[v] = __shfl_down_sync(ALL_LANES, w.before * g[v], 1, SIDE);
      here[v] = w.here * g[v];
    }
  }
};

#if !FINAL
// Keeps what the places beside other tiles hand to these, and what the first line hands to the line before.
__device__ __forceinline__ void walk_back(const Params& p, const Tile& tile) {
  const int d = threadIdx.x / (SUBS * SIDE), sub = threadIdx.x / SIDE % SUBS, lane = threadIdx.x % SIDE;
  const Store store(p, tile.b, d, tile.group, true);
  const Lines lines(tile, store.s);
  const int channel = tile.channel + sub * V, place = lines.place + lane;
  const int line_after = lines.first + lines.count;
  const bool there = lane < lines.places, first = lane == 0 || !there, last = lane == SIDE - 1 || !there;
  const int pixel = lines.at + (lines.count - 1) * lines.line + lane * lines.next;
  const unsigned char* scaled = slot(d, sub, pixel);
  const Stored* dy = x_at(sub, pixel, DY_AT);
  const Pair* pair = pair_at(d, lines.count - 1, lane);
  const int which = side_of(lines, lane, store.tiles);
  float* side = store.side(line_after - 1, lines.tile, which < 0 ? 0 : which, channel);
  const float from_before = first ? 0.f : 1.f, from_after = last ? 0.f : 1.f;
  const long long side_line = store.side_line;
  float carried[V] = {};
#pragma unroll 2
  for (int line = lines.count - 1; line >= 0; line--) {
    float out[V], g[V];
    take_dy(scaled, dy, out, g);
    const Taps w = taps_of(*pair);
#pragma unroll
    for (int v = 0; v < V; v++) g[v] += carried[v];
    if (which >= 0) {
#pragma unroll
      for (int v = 0; v < V; v++) out[v] = g[v] * (which == 0 ? w.before : w.after);
      store_state(side, out);
    }
    const Handed handed(w, g);
    const bool restart = RESTARTS && (lines.first + line) % p.chunk == 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
      carried[v] = fmaf(from_before, handed.before[v], fmaf(from_after, handed.after[v], handed.here[v]));
      if (RESTARTS) carried[v] = restart ? 0.f : carried[v];
    }
    scaled -= lines.line * SLOT, dy -= lines.line, pair -= SIDE, side -= side_line;
  }
  if (there && lines.first > 0)
    store_state(store.end((lines.first + store.late) / SIDE, place, channel), carried);
}
#else
// The gradients, too. `more` channels of the group: their sums are added to those that are there.
__device__ __forceinline__ void walk_back(const Params& p, const Tile& tile, bool more) {
  const int d = threadIdx.x / (SUBS * SIDE), sub = threadIdx.x / SIDE % SUBS, lane = threadIdx.x % SIDE;
  const Store states(p, tile.b, d, tile.group, false), adjoints(p, tile.b, d, tile.group, true);
  const Lines lines(tile, states.s);
  const int channel = tile.channel + sub * V, place = lines.place + lane;
  const int line_after = lines.first + lines.count;
  const int along = (lines.first + states.late) / SIDE;  // number of the tile on the scan's way
  const bool there = lane < lines.places, first = lane == 0 || !there, last = lane == SIDE - 1 || !there;
  // Beyond the side where places are missing all is zero.
  const int left = lane != 0;
  const int pixel = lines.at + (lines.count - 1) * lines.line + lane * lines.next;
  unsigned char* scaled = slot(d, sub, pixel);
  const Stored *dy = x_at(sub, pixel, DY_AT), *x = x_at(sub, pixel);
  State* state = state_at(d, sub, pixel);
  const Pair* pair = pair_at(d, lines.count - 1, lane);
  float h[V], entered[V] = {}, carried[V] = {};
  load_state(state, h);
  if (there && lines.first > 0) load_state(states.end(along - 1, place, channel), entered);
  if (there && line_after < states.s.lines && !(RESTARTS && line_after % p.chunk == 0))
    load_state(adjoints.end(along + 1, place, channel), carried);
#pragma unroll 1
  for (int line = lines.count - 1; line >= 0; line--) {
    float out[V], g[V], before[V];
    take_dy(scaled, dy, out, g);
#pragma unroll
    for (int v = 0; v < V; v++) before[v] = entered[v];
    if (line > 0) load_state(state - lines.line, before);
    float xs[V], lam[V], part[V];
    unpack(*x, xs);
#pragma unroll
    for (int v = 0; v < V; v++) lam[v] = 1.f;
#if HAS_LAM
    unpack(*(const Stored*)scaled, lam);
#endif
#pragma unroll
    for (int v = 0; v < V; v++) {
      g[v] += carried[v];
      out[v] *= h[v];
      xs[v] *= g[v];
      part[v] = lam[v] * g[v];
    }
    if (HAS_LAM) *(Stored*)scaled = pack(xs);
    if (HAS_GATE) *((Stored*)scaled + 1) = pack(out);
    store_state(state, part);
    float beside_before[V], beside_after[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      beside_before[v] = __shfl_up_sync(ALL_LANES, before[v], 1, SIDE);
      beside_after[v] = __shfl_down_sync(ALL_LANES, before[v], 1, SIDE);
    }
    if (first) load_state(outside_at(0, d, sub, line, left), beside_before);
    if (last) load_state(outside_at(0, d, sub, line, 1), beside_after);
    Taps sum = {0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < V; v++) {
      sum.before = fmaf(g[v], beside_before[v], sum.before);
      sum.here = fmaf(g[v], before[v], sum.here);
      sum.after = fmaf(g[v], beside_after[v], sum.after);
    }
    Handed handed(taps_of(*pair), g);
    if (first) load_state(outside_at(1, d, sub, line, left), handed.before);
    if (last) load_state(outside_at(1, d, sub, line, 1), handed.after);
#pragma unroll
    for (int v = 0; v < V; v++) carried[v] = handed.here[v] + (handed.before[v] + handed.after[v]);
    if (RESTARTS && (lines.first + line) % p.chunk == 0) {
      sum = {0.f, 0.f, 0.f};
#pragma unroll
      for (int v = 0; v < V; v++) carried[v] = 0.f;
    }
#pragma unroll
    for (int v = 0; v < V; v++) h[v] = before[v];
    // All vectors of a warp together: they lie 16 lanes apart where tiles are that narrow.
    if (SIDE == 16 && SUBS > 1) {
      sum.before += __shfl_xor_sync(ALL_LANES, sum.before, 16);
      sum.here += __shfl_xor_sync(ALL_LANES, sum.here, 16);
      sum.after += __shfl_xor_sync(ALL_LANES, sum.after, 16);
    }
    if (SIDE == 32 || SUBS == 1 || sub % 2 == 0) {
      const int warp = sub * SIDE / 32;
      float *to_before = sum_at(warp, 0, d, line, lane), *to_here = sum_at(warp, 1, d, line, lane);
      float* to_after = sum_at(warp, 2, d, line, lane);
      *to_before = sum.before + (more ? *to_before : 0.f);
      *to_here = sum.here + (more ? *to_here : 0.f);
      *to_after = sum.after + (more ? *to_after : 0.f);
    }
    scaled -= lines.line * SLOT, dy -= lines.line, x -= lines.line, state -= lines.line, pair -= SIDE;
  }
}
#endif
