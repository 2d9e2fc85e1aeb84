// A tile alone, in all directions at once, whose channels have taps of their own (see tiles_own.cuh): its
// states as if nothing entered it, of which those at its borders are kept, and the weights of its places.
//
// With BACKWARD half of the threads do the same for adjoints: neither waits for the other.
//
// More macros: MIN_BLOCKS of a multiprocessor.
#define FINAL 0
#include "tiles_own.cuh"

// Logits of a vector to weights. Where a scan begins again they are (0, 1, 0), whatever the logits; of
// pixels that are none, too.
__device__ __forceinline__ Pair weights_of_vector(const uint2 (&quads)[3], bool before, bool after) {
  const u32 words[6] = {quads[0].x, quads[0].y, quads[1].x, quads[1].y, quads[2].x, quads[2].y};
  const float missing = __int_as_float(0xff800000);
  Pair pair;
#pragma unroll
  for (int v = 0; v < V; v++) {
    const Taps a = {before ? element(words, 3 * v) : missing, element(words, 3 * v + 1),
                    after ? element(words, 3 * v + 2) : missing};
    const Taps w = weights_of<false>(a);
    pair.halves[v] = halves_toward_zero(w.before, w.after);
  }
  return pair;
}

__device__ __forceinline__ void make_weights(const Params& p, const Tile& tile) {
  constexpr int PIECES = SCANS * SUBS, ROWS = THREADS / (PIECES * SIDE), AT_ONCE = 4;
  const int piece = threadIdx.x % PIECES, column = threadIdx.x / PIECES % SIDE;
  const int d = piece / SUBS, sub = piece % SUBS, first = threadIdx.x / (PIECES * SIDE);
  const Way way(p, tile, d, sub, false);
  const Scan& s = way.store.s;
  const Turn turn(p, d);
  const storage_t* from = tile.at(p.taps, 0, min(column, tile.width - 1)) + d * p.taps.d + sub * 3 * V;
#pragma unroll 1
  for (int next = first; next < SIDE; next += AT_ONCE * ROWS) {
    uint2 quads[AT_ONCE][3];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int k = 0; k < 3; k++)
        quads[i][k] = __ldg((const uint2*)(from + min(next + i * ROWS, tile.height - 1) * p.taps.h) + k);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int row = next + i * ROWS, along = s.vertical ? row : column;
      const int line = s.reversed ? SIDE - 1 - along : along;
      const int j = way.tile * SIDE + (s.vertical ? column : row);
      Pair pair = weights_of_vector(quads[i], j > 0, j + 1 < s.places);
      if (!tile.has(row, column) || way.begins(p, line)) pair = {};
      *(Pair*)pair_at(d, sub, turn(row, column)) = pair;
    }
  }
}

// Which side of a tile, of the first (0) and the second, a lane is at where another tile is beyond it; or -1.
__device__ __forceinline__ int side_of(const Way& way, int place) {
  return place == 0 && way.tile > 0 ? 0 : place == SIDE - 1 && way.tile + 1 < way.store.tiles ? 1 : -1;
}

__device__ __forceinline__ void scan(const Params& p, const Tile& tile, int thread) {
  const Lane me(thread);
  const Way way(p, tile, me.d, me.sub, false);
  const int channel = me.channel(tile), place = way.tile * SIDE + me.place;
  const bool there = me.place < way.places;
  // Lanes without a place stay at zero, whatever their neighbours have.
  const float from_before = me.place == 0 || !there ? 0.f : 1.f;
  const float from_after = me.place == SIDE - 1 || !there ? 0.f : 1.f;
  const int pixel = way.at + way.begin * way.line + me.place * way.next;
  const int own = way.begin * PITCH + me.place;
  const unsigned char* x = image_at(me.sub, pixel) + me.half * 4;
  const unsigned char* pair = pair_at(me.d, me.sub, own) + me.half * 8;
  const unsigned char* lam = scaled_at(me.d, me.sub, own) + me.half * 4;
  const int which = side_of(way, me.place), begin = way.first + way.begin;
  float* side = way.store.side(begin, way.tile, max(which, 0), channel) + me.half * W;
  // Weights beyond the line's end are zeros, for who reads several places at once.
  uint2* keep = (uint2*)way.store.pair(begin, place) + me.half;
  const bool keeps = me.place < padded(way.places);
  const long long keep_line = padded(way.store.s.places) * (int)(sizeof(Pair) / sizeof(uint2));
  float h[W] = {};
#pragma unroll 4
  for (int i = way.begin; i < way.end; i++) {
    float u[W], scale[W];
    widen_two(x, u);
    if (HAS_LAM) {
      widen_two(lam, scale);
#pragma unroll
      for (int v = 0; v < W; v++) u[v] *= scale[v];
    }
    const uint2 halves = *(const uint2*)pair;
    const Taps w[W] = {taps_of(halves.x), taps_of(halves.y)};
    const bool begins = RESTARTS && way.begins(p, i);
#pragma unroll
    for (int v = 0; v < W; v++) {
      const float before = __shfl_up_sync(ALL_LANES, h[v], 1, SIDE);
      const float after = __shfl_down_sync(ALL_LANES, h[v], 1, SIDE);
      const float beside = fmaf(from_before * w[v].before, before, from_after * w[v].after * after);
      const float sum = fmaf(w[v].here, h[v], u[v]) + beside;
      h[v] = begins ? u[v] : sum;
    }
    if (which >= 0) store_two(side, h);
    if (keeps) *keep = halves;
    x += way.line * STORED, lam += PITCH * STORED, pair += PITCH * 16;
    side += way.store.side_line, keep += keep_line;
  }
  if (there && way.first + way.end < way.store.s.lines)
    store_two(way.store.end(way.along, place, channel) + me.half * W, h);
}

#if BACKWARD
// Keeps what the places beside other tiles hand to these, and what the first line hands to the line before.
__device__ __forceinline__ void walk_back(const Params& p, const Tile& tile, int thread) {
  const Lane me(thread);
  const Way way(p, tile, me.d, me.sub, true);
  const int channel = me.channel(tile), place = way.tile * SIDE + me.place;
  const bool there = me.place < way.places;
  const float from_before = me.place == 0 || !there ? 0.f : 1.f;
  const float from_after = me.place == SIDE - 1 || !there ? 0.f : 1.f;
  const int pixel = way.at + (way.end - 1) * way.line + me.place * way.next;
  const unsigned char* dy = image_at(me.sub, pixel, DY_AT) + me.half * 4;
  const int own = (way.end - 1) * PITCH + me.place;
  const unsigned char* gate = scaled_at(me.d, me.sub, own, GATE_AT) + me.half * 4;
  const unsigned char* pair = pair_at(me.d, me.sub, own) + me.half * 8;
  const int which = side_of(way, me.place);
  float* side = way.store.side(way.first + way.end - 1, way.tile, max(which, 0), channel) + me.half * W;
  float carried[W] = {};
#pragma unroll 4
  for (int i = way.end - 1; i >= way.begin; i--) {
    float g[W], scale[W], out[W];
    widen_two(dy, g);
    if (HAS_GATE) widen_two(gate, scale);
    Taps w[W];
    weights_of_two(pair, w);
    const bool begins = RESTARTS && way.begins(p, i);
#pragma unroll
    for (int v = 0; v < W; v++) {
      g[v] = HAS_GATE ? fmaf(g[v], scale[v], carried[v]) : g[v] + carried[v];
      const float to_before = w[v].before * g[v], to_after = w[v].after * g[v];
      out[v] = which == 0 ? to_before : to_after;
      const float before = __shfl_up_sync(ALL_LANES, to_after, 1, SIDE);
      const float after = __shfl_down_sync(ALL_LANES, to_before, 1, SIDE);
      const float sum = fmaf(from_before, before, fmaf(from_after, after, w[v].here * g[v]));
      carried[v] = begins ? 0.f : sum;
    }
    if (which >= 0) store_two(side, out);
    dy -= way.line * STORED, gate -= PITCH * STORED, pair -= PITCH * 16, side -= way.store.side_line;
  }
  if (there && way.first > 0) store_two(way.store.end(way.along, place, channel) + me.half * W, carried);
}
#endif

KERNEL(THREADS, MIN_BLOCKS) tiles_own_alone(CONSTANT_PARAMS p) {
  const Tile tile(p);
  copy_operands(p, tile);
  copy_commit();
  make_weights(p, tile);
  copy_wait<0>();
  __syncthreads();
#if BACKWARD
  if (threadIdx.x >= SCANNERS) {
    walk_back(p, tile, threadIdx.x - SCANNERS);
    return;
  }
#endif
  scan(p, tile, threadIdx.x);
}
