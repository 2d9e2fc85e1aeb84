// Backward of planes, all directions of a tile after the scans over whole planes (planes_tiles.cuh). A tile,
// and all channels of a group, have two warps for each direction, which take its two segments. Tensors of the
// next channel come while this one is computed; gradients of taps are summed over channels in registers, and
// dx over directions in shared memory. A block may have neighbours in a row of tiles: rows of a tile are half
// a line of the cache, and both halves would be asked for, and written, at about the same time.
//
// Macros beside those of common.cuh:
//   SCANS       directions
//   TILES       tiles of a block
//   LOCKSTEP    1: all warps of a block meet for each channel; 0: those of a tile
//   WHOLE       1: operands are asked for with the rest of their lines of the cache
//   STREAM      1: gradients are written as what nobody will touch soon
//   MIN_BLOCKS  blocks on a multiprocessor
// Knobs: 0 elements of a row of weights.
#include "planes_tiles_taps.cuh"

// Of one tile: all of its threads.
__device__ __forceinline__ void tile_meets() {
  if (LOCKSTEP || TILES == 1)
    __syncthreads();
  else
    named_barrier(1 + threadIdx.x / THREADS, THREADS);
}

__device__ __forceinline__ void copy_tile(void* shared, const void* global, int bytes) {
  if (WHOLE)
    copy_async_wide(shared, global, bytes);
  else
    copy_async<16>(shared, global, bytes);
}

// Is vector v of a row of the tile in the image?
__device__ __forceinline__ bool inside(const Params& p, const Segment& s, int row, int v) {
  return s.tile_row + row < p.height && s.tile_column + 8 * v < p.width;
}
// From the first number of a plane. Strides are not negative, and those of rows fit 32 bits.
__device__ __forceinline__ long long in_plane(const Segment& s, const View& v, int row, int column) {
  return (long long)((u64)(u32)(s.tile_row + row) * (u32)v.h) + (s.tile_column + column);
}

// The two vectors that a lane copies of the half of a tile that the warp's segment is. Rows are so many
// apart.
struct Part {
  int at;  // of the first in a tile of 16-bit numbers in shared memory
  int row, v;
  u32 inside;  // bits: the first, the second; and above these the bytes of borders that a lane copies

  __device__ __forceinline__ bool has(int i) const { return inside >> i & 1; }
};
__device__ __forceinline__ int apart(const Segment& s) { return s.vertical ? LINES / 2 : SIDE / 2; }
__device__ __forceinline__ Part part_of(const Params& p, const Segment& s) {
  Part part;
  part.row = s.vertical ? s.half * LINES + s.lane / 4 : s.lane / 2;
  part.v = s.vertical ? s.lane % 4 : s.half * 2 + s.lane % 2;
  part.at = s.d * TENSOR + part.row * ROW + part.v * 16;
  part.inside = inside(p, s, part.row, part.v) | inside(p, s, part.row + apart(s), part.v) << 1;
  return part;
}

// Where one channel after the other is in memory: planes of x, dy and dx; elements from the beginning of lam
// and of gate, and of their gradients, to a lane's first vector; and a lane's part of borders.
struct Pointers {
  const storage_t *x, *dy;
  storage_t* dx;
  long long lam, gate;
  const float* border;
  long long border_step;
};

// The borders of the warp's segment, 16 bytes a lane. Nothing enters the first segment of a walk.
__device__ __forceinline__ void find_borders(const Params& p, const Segment& s, int b, int channel,
                                             Part& part, Pointers& to) {
  const int line = (s.vertical ? s.tile_row : s.tile_column) + s.half * LINES,
            lines = s.vertical ? p.height : p.width;
  const int first_place = s.vertical ? s.tile_column : s.tile_row, places = s.vertical ? p.width : p.height;
  const bool enters = s.lane < 16, back = enters ? s.lane >= 8 : s.lane >= 24;
  const tiles::Borders borders = tiles::borders_of(p, s.d, back, b, channel);
  int there;  // numbers
  if (enters) {
    const int place = first_place + s.lane % 8 * 4;
    const bool rising = s.reversed == back, first = rising ? line == 0 : line + LINES >= lines;
    to.border = borders.line(line / LINES, place);
    there = line >= lines || first ? 0 : places - place;
  } else {
    const int last = s.lane / 4 % 2, k = s.lane % 4 * 4, at = line + (s.reversed ? LINES - 4 - k : k);
    to.border = borders.side(first_place / SIDE, last, at, 4);
    // Groups of four lines are written whole.
    there = at >= lines || first_place + (last ? SIDE : 1) > places ? 0 : 4;
  }
  part.inside |= (u32)max(0, min(4, there)) << 4;
  if (there <= 0) to.border = borders.entering;
}

__device__ __forceinline__ Pointers pointers_of(const Params& p, const Segment& s, Part& part, int b,
                                                int channel) {
  Pointers to = {};
  to.x = p.x.data + (b * p.x.b + channel * p.x.c);
  to.dy = p.dy.data + (b * p.dy.b + channel * p.dy.c);
  if (p.dx.data != nullptr) to.dx = p.dx.data + (b * p.dx.b + channel * p.dx.c);
  const auto find = [&](const View& v) {
    return b * v.b + s.d * v.d + channel * v.c + (part.has(0) ? in_plane(s, v, part.row, 8 * part.v) : 0);
  };
  if (HAS_LAM) to.lam = find(p.lam);
  if (HAS_GATE) to.gate = find(p.gate);
  to.border_step = tiles::plane_of_borders(p);
  find_borders(p, s, b, channel, part, to);
  return to;
}

// All that the block needs of the channel so many `ahead` of the one that lam and gate are at.
__device__ __forceinline__ void fetch(const Params& p, const Segment& s, const Part& part, Pointers& from,
                                      int ahead, unsigned char* stage) {
  constexpr int VECTORS = SIDE * SIDE / 8;
#pragma unroll
  for (int i = 0; i < 2 * VECTORS; i += THREADS) {
    const int number = i + thread_of_tile(), row = number / 4 % SIDE, v = number % 4;
    if (2 * VECTORS % THREADS != 0 && number >= 2 * VECTORS) break;
    const bool second = number >= VECTORS, there = inside(p, s, row, v);
    const long long at = there ? in_plane(s, second ? p.dy : p.x, row, 8 * v) : 0;
    copy_tile(stage + (second ? DY : X) + row * ROW + v * 16, (second ? from.dy : from.x) + at,
              there ? 16 : 0);
  }
  from.x += p.x.c, from.dy += p.dy.c;
  const auto fetch_part = [&](const View& view, long long offset, unsigned char* tensor) {
    unsigned char* to = tensor + part.at;
    const storage_t* at = view.data + (offset + ahead * view.c);
    copy_tile(to, at, part.has(0) ? 16 : 0);
    copy_tile(to + apart(s) * ROW, at + (part.has(1) ? (long long)((u64)apart(s) * (u32)view.h) : 0),
              part.has(1) ? 16 : 0);
  };
  if (HAS_LAM) fetch_part(p.lam, from.lam, stage + LAM);
  if (HAS_GATE) fetch_part(p.gate, from.gate, stage + GATE);
  copy_async<16>(stage + BORDERS + (2 * s.d + s.half) * BORDER + 16 * s.lane, from.border,
                 (int)(part.inside & 0xf0) / 4);
  from.border += from.border_step;
  copy_commit();
}

// What is in the places of lam and gate. Gradients lie as these do.
__device__ __forceinline__ void write_products(const Params& p, const Segment& s, const Part& part,
                                               Pointers& to, const unsigned char* stage) {
  const auto write = [&](const View& view, long long& offset, const unsigned char* tensor) {
    const unsigned char* from = tensor + part.at;
    storage_t* at = view.data + offset;
    if (view.data != nullptr && part.has(0)) store(at, *(const uint4*)from);
    if (view.data != nullptr && part.has(1))
      store(at + (long long)((u64)apart(s) * (u32)view.h), *(const uint4*)(from + apart(s) * ROW));
  };
  if (HAS_LAM) write(p.dlam, to.lam, stage + LAM), to.lam += p.lam.c;
  if (HAS_GATE) write(p.dgate, to.gate, stage + GATE), to.gate += p.gate.c;
}

// dx, the sum over directions in their order.
__device__ __forceinline__ void write_sums(const Params& p, const Segment& s, Pointers& to,
                                           const unsigned char* parts) {
  if (to.dx == nullptr) return;
#pragma unroll
  for (int i = 0; i < SIDE * SIDE / 4; i += THREADS) {
    const int number = i + thread_of_tile(), row = number / 8, left = number % 8 * 4;
    if (SIDE * SIDE / 4 % THREADS != 0 && number >= SIDE * SIDE / 4) break;
    const unsigned char* from = parts + row * PART_ROW + 4 * left;
    float sum[4] = {};
#pragma unroll
    for (int d = 0; d < SCANS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += *(const float*)(from + d * PART + 4 * e);
    if (s.tile_row + row < p.height && s.tile_column + left < p.width)
      store((uint2*)(to.dx + in_plane(s, p.dx, row, left)),
            make_uint2(packed(sum[0], sum[1]), packed(sum[2], sum[3])));
  }
  to.dx += p.dx.c;
}

__device__ __forceinline__ Segment segment_of(const Params& p, int tile_row, int tile_column) {
  Segment s;
  const int warp = thread_of_tile() / 32;
  s.tile_row = tile_row, s.tile_column = tile_column;
  s.d = warp / 2, s.half = warp % 2, s.lane = threadIdx.x % 32;
  const Scan scan = scan_of(p, s.d);
  s.vertical = scan.vertical, s.reversed = scan.reversed;
  s.restarts = 0;
  place_in_memory(s);
  return s;
}

// Lines of the segment that start anew. Places outside of the image do in all of them.
__device__ __forceinline__ u32 restarts_of(const Params& p, const Segment& s) {
  const int place = (s.vertical ? s.tile_column : s.tile_row) + s.lane,
            places = s.vertical ? p.width : p.height;
  const int line = (s.vertical ? s.tile_row : s.tile_column) + s.half * LINES;
  const int lines = s.vertical ? p.height : p.width;
  const int first = s.reversed ? lines - LINES - line : line;  // in the order of the scan
  int phase = max(first, 0) % p.chunk;
  u32 restarts = 0;
  for (int k = 0; k < LINES; k++) {
    const bool there = first + k >= 0 && first + k < lines && place < places;
    restarts |= (u32)(!there || phase == 0) << k;
    if (first + k >= 0) phase = phase + 1 == p.chunk ? 0 : phase + 1;
  }
  return restarts;
}

__device__ __forceinline__ Channel channel_at(const Segment& s, unsigned char* stage, unsigned char* parts,
                                              const unsigned char* weights, const unsigned char* zeros) {
  const unsigned char* borders = stage + BORDERS + (2 * s.d + s.half) * BORDER;
  const bool outer = s.lane == 0 || s.lane == 31;
  unsigned char *own = stage + s.at, *of_direction = own + s.d * TENSOR;
  return {own + X,
          own + DY,
          of_direction + LAM,
          of_direction + GATE,
          parts + s.d * PART + s.part_at,
          borders,
          outer ? borders + CARRIED_SIDES + s.lane / 16 * 4 * LINES : zeros,
          weights};
}

KERNEL(TILES* THREADS, MIN_BLOCKS) planes_tiles(CONSTANT_PARAMS p) {
  const int rows = (p.height + SIDE - 1) / SIDE, columns = (p.width + SIDE * TILES - 1) / (SIDE * TILES);
  const int index = blockIdx.x / (rows * columns), number = blockIdx.x - index * rows * columns;
  const int b = index / p.groups, group = index % p.groups;
  const int channels = p.channels / p.groups, first = group * channels;
  const int tile_column = number % columns * TILES + threadIdx.x / THREADS;
  Segment s = segment_of(p, number / columns * SIDE, tile_column * SIDE);
  Part part = part_of(p, s);
  unsigned char* memory = shared_memory() + threadIdx.x / THREADS * TILE_BYTES;
  unsigned char *parts = memory + 2 * STAGE, *zeros = parts + SCANS * PART;
  unsigned char* weights = zeros + ZEROS + (2 * s.d + s.half) * WEIGHTS + 8 * s.lane;
  if (thread_of_tile() < LINES) ((float*)zeros)[thread_of_tile()] = 0.f;
  Pointers pointers = pointers_of(p, s, part, b, first);
  fetch(p, s, part, pointers, 0, memory);
  read_weights(p, s, b, group, weights);
  s.restarts = restarts_of(p, s);
  WeightSums sums = {};
#pragma unroll 1
  for (int c = 0; c <= channels; c++) {
    unsigned char* stage = memory + c % 2 * STAGE;
    copy_wait<0>();
    tile_meets();
    if (c + 1 < channels) fetch(p, s, part, pointers, 1, memory + (c + 1) % 2 * STAGE);
    if (c > 0) write_sums(p, s, pointers, parts);
    if (c == channels) break;
    const Channel now = channel_at(s, stage, parts, weights, zeros);
    float h[LINES];
    scan(s, now, h);
    tile_meets();  // parts of the channel before are summed
    walk_back(s, now, sums, h);
    __syncwarp();
    write_products(p, s, part, pointers, stage);
  }
  if (p.dtaps.data == nullptr) return;
  tile_meets();
  show_sums(s, sums, memory);
  tile_meets();
  write_tap_gradients(p, s, b, group, memory);
}
