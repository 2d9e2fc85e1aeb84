// One line of the adjoint, and the sums over channels of a segment's tap gradients.
#pragma once
#include "pixels_backward_phase.cuh"

#if !OWN_TAPS
// A segment's tap gradients: summed over the block's vectors of a group, in order. They lie as lines and places do, so
// that neighbouring threads write what is adjacent.
__device__ __forceinline__ void reduce_taps(const Params& p, const Layout& layout, const Self& me, const Walker& walk,
                                            int d, int first, int lines) {
  constexpr int GROUP_VECTORS = VECTORS / TAP_GROUPS;
  if (!NEED_DTAPS) return;
  const int places = walk.run.end - walk.run.own, all = lines * TAP_GROUPS * places;
  const int channel_block = (me.channel / V - me.vector) / VECTORS;
  const int of = ROLES == 2 && p.knobs[5] >= 0 ? 2 : p.scans, slot = of < p.scans ? me.role & 1 : d;
  const int planes = layout.channel_blocks * TAP_GROUPS;
  const long long pixels = (long long)p.height * p.width;
  float* const sums = (float*)p.scratch[3] + ((long long)me.b * of + slot) * planes * 3 * pixels;
#pragma unroll 1
  for (int i = threadIdx.x; i < all; i += THREADS) {
    const int row = i / places, j = walk.run.own + i - row * places;
    const int k = row / TAP_GROUPS, g = row % TAP_GROUPS, l = j - walk.run.start;
    const int q = l % PLACES, column = l / PLACES;
    const int thread = column / (32 / LANES) * (32 * ROW_WARPS) + column % (32 / LANES) * LANES;
    float sum[3] = {0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < GROUP_VECTORS; v++) {
      const int vector = g * GROUP_VECTORS + v;
      const Weights part = *gradient(k, q, thread + vector / LANES * 32 + vector % LANES);
      sum[0] += part.before, sum[1] += part.here, sum[2] += part.after;
    }
    const int line = walk.s.reversed ? walk.s.lines - 1 - first - k : first + k;
    float* to = sums + (channel_block * TAP_GROUPS + g) * 3 * pixels + (long long)line * walk.s.places + j;
#pragma unroll
    for (int tap = 0; tap < 3; tap++) to[tap * pixels] = sum[tap];
  }
}
#endif

// What a place hands to the places of the line before: `to` the thread's own, and one beside them on either side.
__device__ __forceinline__ void hand(int q, int v, const Taps& w, float g, float (&to)[PLACES][V], float* before,
                                     float* after) {
  to[q][v] = fmaf(w.here, g, to[q][v]);
  if (q > 0)
    to[q > 0 ? q - 1 : 0][v] = fmaf(w.before, g, to[q > 0 ? q - 1 : 0][v]);
  else
    before[v] = w.before * g;
  if (q + 1 < PLACES)
    to[q + 1 < PLACES ? q + 1 : q][v] = fmaf(w.after, g, to[q + 1 < PLACES ? q + 1 : q][v]);
  else
    after[v] = w.after * g;
}

// One line of the adjoint: `slot` has its operands, row `k` of the states is that of the line before. `carried` is what
// the next line handed to this one, then what this one hands to the line before. Where the states are at hand, `h` is
// that of this line, then that of the line before.
__device__ __forceinline__ void adjoint_line(const Phase& phase, Walker& walk, int slot, int row, int k, int parity,
                                             bool restart, float (&h)[PLACES][V], float (&carried)[PLACES][V]) {
  const int slot_at = slot * SLOT;
  float g[PLACES][V];
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float in[V], e[V];
    unpack(*operand(slot_at, DY, q), in);
#if HAS_GATE
    unpack(*operand(slot_at, GATE, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
#pragma unroll
    for (int v = 0; v < V; v++) {
      g[q][v] = fmaf(e[v], in[v], carried[q][v]);
      if (q > 0 && !walk.exists[q]) g[q][v] = 0.f;  // what was handed to no place may be 0 * inf
    }
    if (NEED_DGATE && walk.own[q]) {
#if !HAS_HIDDEN
      load_floats(floats(states_at(k + 1, parity), q), THREADS, h[q]);
#endif
#pragma unroll
      for (int v = 0; v < V; v++) e[v] = h[q][v] * in[v];
      store_vector(walk.dgate.at + q * walk.dgate.place, e);
    }
  }

  // What goes to the places of the line before: the thread's own, and one beside them on either side.
  float before[V], after[V], to_before[V], to_after[V];
#if HAS_HIDDEN
  walk.entering(slot_at, h, before, after);
#else
#pragma unroll
  for (int q = 0; q < PLACES; q++) load_floats(floats(states_at(k, parity), q), THREADS, h[q]);
  walk.beside_states(states_at(k, parity), h, before, after);
#endif
#pragma unroll
  for (int q = 0; q < PLACES; q++)
#pragma unroll
    for (int v = 0; v < V; v++) carried[q][v] = 0.f;
#if OWN_TAPS
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float raw[3 * V], gradients[3 * V];
    walk.raw_taps(slot_at, q, raw);
    const bool has_before = walk.place + q > 0, has_after = walk.place + q + 1 < walk.s.places;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Taps a = own_taps(raw, v);
      const float left = q > 0 ? h[q > 0 ? q - 1 : 0][v] : before[v];
      const float right = q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v];
      Taps dw = {0.f, 0.f, 0.f};
      if (!restart)
        dw = tap_gradient(a, {g[q][v] * left, g[q][v] * h[q][v], g[q][v] * right}, has_before, has_after);
      gradients[INTERLEAVED ? 3 * v : v] = dw.before;
      gradients[INTERLEAVED ? 3 * v + 1 : V + v] = dw.here;
      gradients[INTERLEAVED ? 3 * v + 2 : 2 * V + v] = dw.after;
      const Taps w = tap_weights(a, has_before, has_after);
      hand(q, v, w, g[q][v], carried, to_before, to_after);
    }
    if (NEED_DTAPS && walk.own[q])
#pragma unroll
      for (int t = 0; t < 3; t++)
        store_vector(walk.dtaps.at + q * walk.dtaps.place + t * walk.dtap_vector, gradients + t * V);
  }
#else
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    float weight[3];
    walk.weights(slot_at, row, q, weight);
    Weights dw = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int v = 0; v < V; v++) {
      dw.before = fmaf(g[q][v], q > 0 ? h[q > 0 ? q - 1 : 0][v] : before[v], dw.before);
      dw.here = fmaf(g[q][v], h[q][v], dw.here);
      dw.after = fmaf(g[q][v], q + 1 < PLACES ? h[q + 1 < PLACES ? q + 1 : q][v] : after[v], dw.after);
      hand(q, v, Walker::weight_of(weight, v), g[q][v], carried, to_before, to_after);
    }
    if (restart) dw = {0.f, 0.f, 0.f, 0.f};
    if (NEED_DTAPS) *gradient(k, q, threadIdx.x) = dw;
  }
#endif
  walk.show_edges(k & 1, to_before, to_after);

  // du = g: to x through lam, to lam through x.
#pragma unroll
  for (int q = 0; q < PLACES; q++) {
    if (!walk.own[q]) continue;
    float e[V], out[V];
#if HAS_LAM
    if (NEED_DLAM) {
      unpack(*operand(slot_at, 0, q), e);
#pragma unroll
      for (int v = 0; v < V; v++) e[v] *= g[q][v];
      store_vector(walk.dlam.at + q * walk.dlam.place, e);
    }
    if (NEED_DX) unpack(*operand(slot_at, 1, q), e);
#else
#pragma unroll
    for (int v = 0; v < V; v++) e[v] = 1.f;
#endif
    if (!NEED_DX) continue;
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = 0.f;
    if (SUMS_COME && phase.add) load_floats(floats(sums_at(slot), q), THREADS, out);
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = fmaf(g[q][v], e[v], out[v]);
    if (!SUM || phase.last)
      store_vector(walk.dx.at + q * walk.dx.place, out);
    else
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        store_part(walk.write.at + q * walk.write.place + part * PART_STEP, out + part * F);
  }
  walk.next_written();
  line_barrier();
  if (restart) {
    clear(carried);
    return;
  }
  walk.beside_edges(k & 1, to_before, to_after, before, after);
#pragma unroll
  for (int v = 0; v < V; v++) {
    carried[0][v] += before[v];
    carried[PLACES - 1][v] += after[v];
  }
}

// Bits of the lines that restart, of those from `first` on.
__device__ __forceinline__ u32 restarts_of(const Params& p, int first, int count) {
  u32 restarts = 0;
  for (int k = 0, since = first % p.chunk; k < count; k++, since = since + 1 == p.chunk ? 0 : since + 1)
    restarts |= (u32)(since == 0) << k;
  return restarts;
}
