// Forward for every problem: any strides, sizes, groups. One block scans its channels of one image, direction
// after direction; a line's states sit in shared memory (or in scratch, if a line is too long for it).
//
// Macros: THREADS, ITEMS (channel-place pairs a thread may hold at once).
// Knobs: 0 channels a block, 1 channels adjacent in memory, 2 log2 of the thread grid's width, 3 states in scratch[1].
// Scratch: 0 float32 sums over directions (16-bit storage and several directions), 1 states.
#include "generic.cuh"

struct Item {
  float u, gate, sum;
  Taps taps;
};

struct Operands {
  Cursor x, lam, gate, taps, y;
  long long k;
  Sums sums;
  int group_pitch;
  bool add, last;
};

__device__ __forceinline__ Item read_item(const Operands& o, int line, int place, int lc, int places) {
  Item item;
  item.u = widen(*at(o.x, line, place, lc));
#if HAS_LAM
  item.u *= widen(*at(o.lam, line, place, lc));
#endif
  item.gate = 1.f;
#if HAS_GATE
  item.gate = widen(*at(o.gate, line, place, lc));
#endif
  item.sum = o.add ? *at(o.sums, line, place, lc) : 0.f;
  item.taps = read_taps(o.taps, o.k, line, place, lc * o.group_pitch, place > 0, place + 1 < places);
  return item;
}

__device__ __forceinline__ void step(const Operands& o, const Item& item, const float* before, float* after, int line, int place,
                                     int lc, int places, bool restart) {
  float h = item.u;
  if (!restart) {
    const bool has_before = place > 0, has_after = place + 1 < places;
    const Taps w = tap_weights(item.taps, has_before, has_after);
    const float* row = before + (long long)lc * places + place;
    h = fmaf(w.here, row[0], h);
    if (has_before) h = fmaf(w.before, row[-1], h);
    if (has_after) h = fmaf(w.after, row[1], h);
  }
  after[(long long)lc * places + place] = h;
  const float sum = HAS_GATE ? fmaf(h, item.gate, item.sum) : h + item.sum;
  if (o.last)
    *at(o.y, line, place, lc) = narrow(sum);
  else
    *at(o.sums, line, place, lc) = sum;
}

__device__ void scan(const Params& p, const Share& share, int d, float* states) {
  const Scan s = scan_of(p, d);
  const Grid grid = grid_of(p, share.n, s.places);
  Operands o;
  o.x = cursor(p.x, s, share.b, 0, share.c0);
  o.lam = cursor(p.lam, s, share.b, d, share.c0);
  o.gate = cursor(p.gate, s, share.b, d, share.c0);
  o.taps = cursor(p.taps, s, share.b, d, share.group);
  o.k = p.taps.k;
  o.y = cursor(p.y, s, share.b, 0, share.c0);
  o.sums = sums_of(p, p.y, s, share, p.scratch[0], grid.channels_fast);
  o.group_pitch = share.pitch;
  o.add = d > 0;
  o.last = d + 1 == p.scans;

  const int size = share.n * s.places;
  // A thread's items are ITEMS rows of the grid apart by `height`. If that covers a line, the next line is read
  // while this one is computed.
  const bool whole = grid.fast <= grid.width && grid.slow <= ITEMS * grid.height;
  Item next[ITEMS];
  auto place_of = [&](int f, int sl) { return grid.channels_fast ? sl : f; };
  auto channel_of = [&](int f, int sl) { return grid.channels_fast ? f : sl; };
  auto read = [&](int line, int f, int base) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int sl = base + i * grid.height;
      if (f < grid.fast && sl < grid.slow) next[i] = read_item(o, line, place_of(f, sl), channel_of(f, sl), s.places);
    }
  };
  if (whole) read(0, grid.tx, grid.ty);
  float *before = states, *after = states + size;
  int since = 0;  // lines since the last restart
  for (int line = 0; line < s.lines; line++) {
    for (int f = grid.tx; f < grid.fast; f += grid.width)
      for (int base = grid.ty; base < grid.slow; base += ITEMS * grid.height) {
        if (!whole) read(line, f, base);
        Item now[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) now[i] = next[i];
        if (whole && line + 1 < s.lines) read(line + 1, f, base);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
          const int sl = base + i * grid.height;
          if (sl < grid.slow)
            step(o, now[i], before, after, line, place_of(f, sl), channel_of(f, sl), s.places, since == 0);
        }
      }
    since = since + 1 == p.chunk ? 0 : since + 1;
    float* swap = before;
    before = after;
    after = swap;
    __syncthreads();
  }
}

KERNEL(THREADS, 1) generic_forward(CONSTANT_PARAMS p) {
  const Share share = share_of(p);
  const long long longest = max(p.height, p.width);
  float* states = p.knobs[3] ? (float*)p.scratch[1] + blockIdx.x * (2 * p.knobs[0] * longest) : (float*)shared_memory();
  for (int d = 0; d < p.scans; d++) scan(p, share, d, states);
}
