// Forward of planes, all directions of a tile after the scans over whole planes (planes_tiles.cuh). A block
// has a tile, and channels of a group one after another; tensors of the next ones come while one is
// computed. Sums of the vertical scans go to the warps of the horizontal ones, which have the rows that y is
// written in. Rows of a tile are half a line of the cache: operands are asked for with the other half, which
// the tile beside this one needs at about the same time.
//
// Macros beside those of common.cuh:
//   VERTICAL, HORIZONTAL  ways of each axis (planes_tiles_forward.cuh)
//   STAGES                channels in shared memory
//   MIN_BLOCKS            blocks on a multiprocessor
// Knobs: 0 elements of a row of weights, 1 numbers of a plane of borders, 2 to 5 the indices of the scans;
// where in lam (6 to 9) and in gate (10 to 13) they begin, in vectors of 16 bytes; 14 channels of a block.
// The blocks of other tiles come one after another in the grid, then those of other channels.
#include "planes_tiles_forward.cuh"

static_assert(SIDE * SIDE / EACH == THREADS, "a thread copies a vector of each tile");

// What a thread copies of each channel: a vector of every tensor, and 16 bytes of what enters.
struct Copies {
  const storage_t *x, *lam, *gate;  // of the channel to be copied next; lam and gate without directions
  const float* border;
  int at;           // in a tile in shared memory
  int bytes;        // of a vector: 0 outside of the image
  int border_bytes;
};

// Row and vector of a thread. Eight that come together have whole sectors of memory, in four rows of shared
// memory whose vectors meet all banks.
__device__ __forceinline__ int row_of_thread() {
  return threadIdx.x / 32 * 8 + threadIdx.x / 2 % 4 * 2 + threadIdx.x / 8 % 2;
}
__device__ __forceinline__ int vector_of_thread() { return threadIdx.x / 16 % 2 * 2 + threadIdx.x % 2; }

// Of a warp for each scan: half a warp for each half, half of these for the line and the others for the
// sides. Nothing enters the first lines of a scan.
__device__ __forceinline__ void find_border(const Params& p, const Tile& t, int channel, Copies& c) {
  if (threadIdx.x >= 32 * SCANS) return;
  const int d = p.knobs[2 + threadIdx.x / 32], half = threadIdx.x / 16 % 2, number = threadIdx.x % 16;
  const Scan scan = scan_of(p, d);
  const int line = (scan.vertical ? t.row : t.column) + half * LINES;
  const int place = scan.vertical ? t.column : t.row;
  const tiles::Borders borders = tiles::borders_of(p, d, false, t.b, channel);
  int there;  // numbers
  if (number < 8) {
    const bool first = scan.reversed ? line + LINES >= scan.lines : line == 0;
    c.border = borders.line(line / LINES, place + number * 4);
    there = line >= scan.lines || first ? 0 : scan.places - (place + number * 4);
  } else {
    const int last = number / 4 % 2, k = number % 4 * 4, at = line + (scan.reversed ? LINES - 4 - k : k);
    c.border = borders.side(place / SIDE, last, at, 4);
    // Groups of four lines are written whole.
    there = at >= scan.lines || place + (last ? SIDE : 1) > scan.places ? 0 : 4;
  }
  c.border_bytes = 4 * max(0, min(4, there));
  if (there <= 0) c.border = borders.entering;
}

__device__ __forceinline__ Copies copies_of(const Params& p, const Tile& t, int channel) {
  const int row = t.row + row_of_thread(), column = t.column + EACH * vector_of_thread();
  const bool there = row < p.height && column < p.width;
  const auto find = [&](const View& v) {
    const long long in_plane = there ? (long long)((u64)(u32)row * (u32)v.h) + column : 0;
    return v.data + (t.b * v.b + channel * v.c + in_plane);
  };
  Copies c = {};
  c.x = find(p.x);
  if (HAS_LAM) c.lam = find(p.lam);
  if (HAS_GATE) c.gate = find(p.gate);
  c.at = row_of_thread() * ROW + 16 * vector_of_thread();
  c.bytes = there ? 16 : 0;
  find_border(p, t, channel, c);
  return c;
}

// All that the block needs of one channel, of those before `channels`.
__device__ __forceinline__ void fetch(const Params& p, Copies& c, int channel, int channels,
                                      unsigned char* stage) {
  if (channel < channels) {
    unsigned char* to = stage + c.at;
    copy_async_wide(to, c.x, c.bytes);
#pragma unroll
    for (int i = 0; i < SCANS; i++) {
      const long long lam = (long long)p.knobs[6 + i] * EACH, gate = (long long)p.knobs[10 + i] * EACH;
      if (HAS_LAM) copy_async_wide(to + LAM + i * TENSOR, c.lam + lam, c.bytes);
      if (HAS_GATE) copy_async_wide(to + GATE + i * TENSOR, c.gate + gate, c.bytes);
    }
    if (threadIdx.x < 32 * SCANS)
      copy_async<16>(stage + BORDERS + 16 * threadIdx.x, c.border, c.border_bytes);
    c.x += p.x.c, c.border += p.knobs[1];
    if (HAS_LAM) c.lam += p.lam.c;
    if (HAS_GATE) c.gate += p.gate.c;
  }
  copy_commit();
}

// A column of a tile of float32 numbers for each lane.
__device__ __forceinline__ void show_sums(const Strip& s, const float (&sum)[LINES], unsigned char* part) {
  unsigned char* to = part + s.half * LINES * PART_ROW + 4 * s.lane;
#pragma unroll
  for (int k = 0; k < LINES; k++) *(float*)(to + k * PART_ROW) = sum[k];
}

// A row of y, half of it, for each lane: `sum`, and what vertical scans have shown.
__device__ __forceinline__ void write_y(const Params& p, const Tile& t, const Strip& s, int channel,
                                        const float (&sum)[LINES], const unsigned char* part) {
  const unsigned char* from = part + s.lane * PART_ROW + 4 * s.half * LINES;
  const int row = t.row + s.lane, left = t.column + s.half * LINES;
  storage_t* y = p.y.data + (t.b * p.y.b + channel * p.y.c + (long long)((u64)(u32)row * (u32)p.y.h) + left);
#pragma unroll
  for (int q = 0; q < LINES / EACH; q++) {
    float all[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) all[e] = *(const float*)(from + 4 * (EACH * q + e)) + sum[EACH * q + e];
    if (row < p.height && left + EACH * q < p.width)
      store_stream(y + EACH * q, make_uint4(packed(all[0], all[1]), packed(all[2], all[3]),
                                            packed(all[4], all[5]), packed(all[6], all[7])));
  }
}

// All channels of the block. The warps of both axes come here, and meet at the same barriers.
template <bool V>
__device__ __forceinline__ void scan_channels(const Params& p, const Tile& t, Copies& copies, int first,
                                              int channels) {
  unsigned char *memory = shared_memory(), *part = memory + STAGES * STAGE;
  const Strip strip = strip_of<V>(p, t);
  int stage = 0, ahead = (STAGES - 1) * STAGE;
#pragma unroll 1
  for (int c = 0; c < channels; c++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    fetch(p, copies, c + STAGES - 1, channels, memory + ahead);
    float sum[LINES];
    scan<V>(strip, memory + stage, sum);
    if (V) show_sums(strip, sum, part);
    __syncthreads();
    if (!V) write_y(p, t, strip, first + c, sum, part);
    stage = stage + STAGE == STAGES * STAGE ? 0 : stage + STAGE;
    ahead = ahead + STAGE == STAGES * STAGE ? 0 : ahead + STAGE;
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_tiles_forward(CONSTANT_PARAMS p) {
  const int rows = (p.height + SIDE - 1) / SIDE, columns = (p.width + SIDE - 1) / SIDE;
  const int slice = blockIdx.x / (rows * columns), number = blockIdx.x - slice * rows * columns;
  const int all = p.channels / p.groups, slices = (all + p.knobs[14] - 1) / p.knobs[14];
  const int index = slice / slices;
  const Tile tile = {index / p.groups, index % p.groups, number / columns * SIDE, number % columns * SIDE};
  const int skipped = slice % slices * p.knobs[14];
  const int first = tile.group * all + skipped, channels = min(p.knobs[14], all - skipped);
  Copies copies = copies_of(p, tile, first);
  for (int c = 0; c < STAGES - 1; c++) fetch(p, copies, c, channels, shared_memory() + c * STAGE);
  if (threadIdx.x / 32 < HALVES)
    scan_channels<true>(p, tile, copies, first, channels);
  else
    scan_channels<false>(p, tile, copies, first, channels);
}
