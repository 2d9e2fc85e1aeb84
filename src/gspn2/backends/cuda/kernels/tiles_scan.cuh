// The states of a tile, line after line: forward, and the first half of backward.
#pragma once
#include "tiles_block.cuh"

#define GATED (FINAL && !BACKWARD && HAS_GATE)

// What a thread needs of a line.
struct Line {
  float u[V];  // lam x
#if GATED
  Stored gate;
#endif
  Pair pair;

  __device__ __forceinline__ void take(const unsigned char* scaled, const Stored* x, const Pair* pair_) {
    unpack(*x, u);
#if HAS_LAM
    float lam[V];
    unpack(*(const Stored*)scaled, lam);
#pragma unroll
    for (int v = 0; v < V; v++) u[v] *= lam[v];
#endif
#if GATED
    gate = *((const Stored*)scaled + 1);
#endif
    pair = *pair_;
  }
};

// The lines of a tile one after another.
__device__ __forceinline__ void scan(const Params& p, const Tile& tile) {
  const int d = threadIdx.x / (SUBS * SIDE), sub = threadIdx.x / SIDE % SUBS, lane = threadIdx.x % SIDE;
  const Store store(p, tile.b, d, tile.group, false);
  const Lines lines(tile, store.s);
  const int channel = tile.channel + sub * V, place = lines.place + lane;
  const bool there = lane < lines.places;
  // Lanes without a place stay at zero, whatever their neighbours have.
  const bool first = lane == 0 || !there, last = lane == SIDE - 1 || !there;
  unsigned char* scaled = slot(d, sub, lines.at + lane * lines.next);
  const Stored* x = x_at(sub, lines.at + lane * lines.next);
  const Pair* pair = pair_at(d, 0, lane);
  float h[V] = {};
#if FINAL
#if BACKWARD
  State* state = state_at(d, sub, lines.at + lane * lines.next);
#endif
  // Beyond the side where places are missing all is zero.
  const State *left = outside_at(0, d, sub, 0, lane != 0), *right = outside_at(0, d, sub, 0, 1);
  if (there && lines.first > 0)
    load_state(store.end((lines.first + store.late) / SIDE - 1, place, channel), h);
#else
  // Borders that another tile is beyond, and the weights of a group of channels, are kept.
  const int which = side_of(lines, lane, store.tiles);
  float* side = store.side(lines.first, lines.tile, which < 0 ? 0 : which, channel);
  Pair* keep = store.pair(lines.first, place);
  // Those beyond the line's end are zeros, for who reads several places at once.
  const bool keeps = lane < padded(lines.places) && sub == 0 && tile.keeps_weights;
  const long long side_line = store.side_line, keep_line = padded(store.s.places);
#endif
  int restart = RESTARTS ? (p.chunk - lines.first % p.chunk) % p.chunk : -1;
  Line next;
  next.take(scaled, x, pair);
#pragma unroll 2
  for (int line = 0; line < lines.count; line++) {
    const Line now = next;
    // Operands of the next line are on their way while this one is computed.
    if (line + 1 < lines.count) next.take(scaled + lines.line * SLOT, x + lines.line, pair + SIDE);
    Taps w = taps_of(now.pair);
    float before[V], after[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      before[v] = __shfl_up_sync(ALL_LANES, h[v], 1, SIDE);
      after[v] = __shfl_down_sync(ALL_LANES, h[v], 1, SIDE);
    }
#if FINAL
    if (first) load_state(left, before);
    if (last) load_state(right, after);
#else
    // These lanes met themselves.
    w.before = first ? 0.f : w.before;
    w.after = last ? 0.f : w.after;
#endif
#pragma unroll
    for (int v = 0; v < V; v++) {
      h[v] = fmaf(w.before, before[v], fmaf(w.after, after[v], fmaf(w.here, h[v], now.u[v])));
      if (RESTARTS) h[v] = line == restart ? now.u[v] : h[v];
    }
    if (RESTARTS) restart += line == restart ? p.chunk : 0;
#if FINAL
    float gated[V];
#pragma unroll
    for (int v = 0; v < V; v++) gated[v] = h[v];
#if GATED
    unpack(now.gate, gated);
#pragma unroll
    for (int v = 0; v < V; v++) gated[v] *= h[v];
#endif
#if BACKWARD
    store_state(state, gated);
    state += lines.line;
#else
    store_state(scaled, gated);
#endif
    left += 2, right += 2;
#else
    if (which >= 0) store_state(side, h);
    if (keeps) *keep = now.pair;
    side += side_line, keep += keep_line;
#endif
    scaled += lines.line * SLOT, x += lines.line, pair += SIDE;
  }
#if !FINAL
  if (there && lines.first + lines.count < store.s.lines)
    store_state(store.end((lines.first + store.late) / SIDE, place, channel), h);
#endif
}

// y, or dx if it is asked for: what lies `at` a pixel of the directions, added in their order.
template <typename At>
__device__ __forceinline__ void store_sum(const Tile& tile, const View& view, At at) {
  const int sub = threadIdx.x % SUBS, column = threadIdx.x / SUBS % SIDE;
  if ((BACKWARD && view.data == nullptr) || column >= tile.width) return;
#pragma unroll 2
  for (int row = threadIdx.x / (SUBS * SIDE); row < tile.height; row += SCANS) {
    float sum[V], one[V];
    load_state(at(0, sub, row * PITCH + column), sum);
#pragma unroll
    for (int d = 1; d < SCANS; d++) {
      load_state(at(d, sub, row * PITCH + column), one);
#pragma unroll
      for (int v = 0; v < V; v++) sum[v] += one[v];
    }
    *(Stored*)(tile.at(view, row, column) + sub * V) = pack(sum);
  }
}
