// Backward for every problem: any strides, sizes, groups. One block owns whole tap groups of one image, because the
// gradient of shared taps is a sum over their channels. Direction after direction:
//   1. scan forward and keep the state that enters every SEGMENT-th line (scratch[1]);
//   2. segment after segment, last first: compute its states again (scratch[2]), then walk its lines backwards.
// Where forward kept the states (`y`), its lines are walked backwards, and that is all.
//
// Macros: THREADS, SEGMENT, HAS_HIDDEN (1: the states are at hand).
// Knobs: 0 channels a block, 1 channels adjacent in memory, 2 log2 of the thread grid's width, 3 rows in scratch[3].
// Scratch: 0 float32 sums of dx over directions (16-bit storage and several directions), 1 kept states, 2 states of
// a segment, 3 rows (`Rows`), if they do not fit in shared memory.
#include "generic.cuh"

struct Operands {
  Cursor x, lam, gate, taps, dy, dx, dtaps, dlam, dgate, hidden;
  long long k, dk;
  Sums sums;
  int group_pitch;
  bool add, last, want_dx;
};

// Two of each, used in turns, every one (n, places): what a line hands to the line before it, and its g.
struct Rows {
  float *to_before, *to_here, *to_after, *g;
};

__device__ __forceinline__ Rows rows_of(float* base, int parity, long long size) {
  base += parity * 4 * size;
  return {base, base + size, base + 2 * size, base + 3 * size};
}

// The states of one line of a block's channels: as they were stored, or float32 in scratch memory.
struct States {
#if HAS_HIDDEN
  const Cursor* hidden;
  int line;

  __device__ __forceinline__ float at(int lc, int place) const { return widen(*::at(*hidden, line, place, lc)); }
#else
  const float* data;
  int places;

  __device__ __forceinline__ float at(int lc, int place) const { return data[(long long)lc * places + place]; }
#endif
};

template <typename Body>
__device__ __forceinline__ void for_items(const Grid& grid, Body body) {
  for (int f = grid.tx; f < grid.fast; f += grid.width)
    for (int sl = grid.ty; sl < grid.slow; sl += grid.height) {
      if (grid.channels_fast)
        body(sl, f);
      else
        body(f, sl);
    }
}

__device__ __forceinline__ Taps weights_at(const Operands& o, int line, int place, int lc, int places) {
  const bool has_before = place > 0, has_after = place + 1 < places;
  const Taps a = read_taps(o.taps, o.k, line, place, lc * o.group_pitch, has_before, has_after);
  return tap_weights(a, has_before, has_after);
}

// The state of one line from that of the line before (nullptr: a restart).
__device__ __forceinline__ void forward_line(const Operands& o, const Grid& grid, const float* before, float* after, int line,
                                             int places) {
  for_items(grid, [&](int place, int lc) {
    float h = widen(*at(o.x, line, place, lc));
#if HAS_LAM
    h *= widen(*at(o.lam, line, place, lc));
#endif
    const long long index = (long long)lc * places + place;
    if (before != nullptr) {
      const Taps w = weights_at(o, line, place, lc, places);
      h = fmaf(w.here, before[index], h);
      if (place > 0) h = fmaf(w.before, before[index - 1], h);
      if (place + 1 < places) h = fmaf(w.after, before[index + 1], h);
    }
    after[index] = h;
  });
}

// g of one line, what follows from it alone, and what it hands on. `carried`: the rows of the next line in scan
// order, or nullptr where that line restarts.
__device__ __forceinline__ void adjoint_line(const Operands& o, const Grid& grid, const Rows* carried, const Rows& rows,
                                             const States& h, int line, int places, bool restart) {
  for_items(grid, [&](int place, int lc) {
    const long long index = (long long)lc * places + place;
    const float dy = widen(*at(o.dy, line, place, lc));
    float g = dy;
#if HAS_GATE
    g *= widen(*at(o.gate, line, place, lc));
#endif
    if (carried != nullptr) {
      g += carried->to_here[index];
      if (place > 0) g += carried->to_after[index - 1];
      if (place + 1 < places) g += carried->to_before[index + 1];
    }
    rows.g[index] = g;
    if (!restart) {
      const Taps w = weights_at(o, line, place, lc, places);
      rows.to_before[index] = w.before * g;
      rows.to_here[index] = w.here * g;
      rows.to_after[index] = w.after * g;
    }
#if HAS_GATE
    if (o.dgate.data != nullptr) *at(o.dgate, line, place, lc) = narrow(h.at(lc, place) * dy);
#endif
    float dx = g;
#if HAS_LAM
    if (o.dlam.data != nullptr) *at(o.dlam, line, place, lc) = narrow(g * widen(*at(o.x, line, place, lc)));
    if (o.want_dx) dx *= widen(*at(o.lam, line, place, lc));
#endif
    if (o.want_dx) {
      if (o.add) dx += *at(o.sums, line, place, lc);
      if (o.last)
        *at(o.dx, line, place, lc) = narrow(dx);
      else
        *at(o.sums, line, place, lc) = dx;
    }
  });
}

// Gradients of the taps of one line, summed over the channels of each group in their order. `before`: the states of the
// line before, not looked at where this one restarts.
__device__ __forceinline__ void tap_line(const Operands& o, const Params& p, const Share& share, const float* g,
                                         const States& before, bool restart, int line, int places) {
  const int groups = share.pitch ? share.n : 1, members = share.pitch ? 1 : share.n;
  const Grid grid = grid_of(p, groups, places);
  for_items(grid, [&](int place, int group) {
    const bool has_before = place > 0, has_after = place + 1 < places;
    Taps dw = {0.f, 0.f, 0.f};
    if (!restart)
      for (int m = 0; m < members; m += SUM_RUN) {
        Taps run = {0.f, 0.f, 0.f};
        for (int l = m; l < min(members, m + SUM_RUN); l++) {
          const float gl = g[(long long)(group + l) * places + place];
          run.here = fmaf(gl, before.at(group + l, place), run.here);
          if (has_before) run.before = fmaf(gl, before.at(group + l, place - 1), run.before);
          if (has_after) run.after = fmaf(gl, before.at(group + l, place + 1), run.after);
        }
        dw.add(run);
      }
    const Taps a = read_taps(o.taps, o.k, line, place, group, has_before, has_after);
    const Taps da = restart ? dw : tap_gradient(a, dw, has_before, has_after);
    storage_t* out = at(o.dtaps, line, place, group);
    out[0] = narrow(da.before);
    out[o.dk] = narrow(da.here);
    out[2 * o.dk] = narrow(da.after);
  });
}

__device__ Operands operands_of(const Params& p, const Share& share, const Scan& s, int d) {
  Operands o;
  o.x = cursor(p.x, s, share.b, 0, share.c0);
  o.lam = cursor(p.lam, s, share.b, d, share.c0);
  o.gate = cursor(p.gate, s, share.b, d, share.c0);
  o.taps = cursor(p.taps, s, share.b, d, share.group);
  o.k = p.taps.k;
  o.dy = cursor(p.dy, s, share.b, 0, share.c0);
  o.dx = cursor(p.dx, s, share.b, 0, share.c0);
  o.dtaps = cursor(p.dtaps, s, share.b, d, share.group);
  o.dk = p.dtaps.k;
  o.dlam = cursor(p.dlam, s, share.b, d, share.c0);
  o.dgate = cursor(p.dgate, s, share.b, d, share.c0);
  o.want_dx = p.dx.data != nullptr;
  if (o.want_dx) o.sums = sums_of(p, p.dx, s, share, p.scratch[0], p.knobs[1] != 0);
  o.hidden = cursor(p.y, s, share.b, d, share.c0);
  o.group_pitch = share.pitch;
  o.add = d > 0;
  o.last = d + 1 == p.scans;
  return o;
}

// One line of the walk back: `carry` if the line after this one, in scan order, hands anything on.
__device__ __forceinline__ void walk_line(const Operands& o, const Params& p, const Share& share, const Grid& grid, float* row_memory,
                                          const States& h, const States& before, int line, int places, bool& carry, int& parity) {
  const long long room = p.knobs[0] * (long long)max(p.height, p.width);
  const bool restart = line % p.chunk == 0;
  const Rows rows = rows_of(row_memory, parity, room), carried = rows_of(row_memory, parity ^ 1, room);
  adjoint_line(o, grid, carry ? &carried : nullptr, rows, h, line, places, restart);
  __syncthreads();
  if (o.dtaps.data != nullptr) tap_line(o, p, share, rows.g, before, restart, line, places);
  carry = !restart;
  parity ^= 1;
}

__device__ void scan(const Params& p, const Share& share, int d, float* row_memory) {
  const Scan s = scan_of(p, d);
  const Grid grid = grid_of(p, share.n, s.places);
  const Operands o = operands_of(p, share, s, d);
  bool carry = false;
  int parity = 0;
#if HAS_HIDDEN
  for (int line = s.lines - 1; line >= 0; line--)
    walk_line(o, p, share, grid, row_memory, {&o.hidden, line}, {&o.hidden, line - 1}, line, s.places, carry, parity);
  __syncthreads();
#else
  const long long longest = max(p.height, p.width), room = p.knobs[0] * longest, size = (long long)share.n * s.places;
  const long long segments = (longest + SEGMENT - 1) / SEGMENT;
  float* kept = (float*)p.scratch[1] + blockIdx.x * segments * room;
  float* states = (float*)p.scratch[2] + blockIdx.x * (SEGMENT + 1) * room;  // row i: the state before line i

  // Pass 1. States run through the segment's rows; the last becomes the first of the next segment.
  const int last_segment = (s.lines - 1) / SEGMENT;
  for (int line = 0; line < last_segment * SEGMENT; line++) {
    const int row = line % SEGMENT;
    float* after = row + 1 == SEGMENT ? kept + (line / SEGMENT + 1) * size : states + (row + 1) * size;
    const float* before = row == 0 ? kept + (line / SEGMENT) * size : states + row * size;
    forward_line(o, grid, line % p.chunk == 0 ? nullptr : before, after, line, s.places);
    __syncthreads();
  }

  for (int segment = last_segment; segment >= 0; segment--) {
    const int first = segment * SEGMENT, count = min(SEGMENT, s.lines - first);
    const float* entering = kept + segment * size;
    for (int i = 0; i < count; i++) {
      const float* before = i == 0 ? entering : states + i * size;
      forward_line(o, grid, (first + i) % p.chunk == 0 ? nullptr : before, states + (i + 1) * size, first + i, s.places);
      __syncthreads();
    }
    for (int i = count - 1; i >= 0; i--) {
      const States h = {states + (i + 1) * size, s.places}, before = {i == 0 ? entering : states + i * size, s.places};
      walk_line(o, p, share, grid, row_memory, h, before, first + i, s.places, carry, parity);
    }
    __syncthreads();  // the next segment writes over the states that tap_line has just read
  }
#endif
}

KERNEL(THREADS, 1) generic_backward(CONSTANT_PARAMS p) {
  const Share share = share_of(p);
  const long long longest = max(p.height, p.width);
  float* rows = p.knobs[3] ? (float*)p.scratch[3] + blockIdx.x * (8 * p.knobs[0] * longest) : (float*)shared_memory();
  for (int d = 0; d < p.scans; d++) scan(p, share, d, rows);
}
