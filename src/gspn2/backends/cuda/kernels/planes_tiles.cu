// Backward of planes, all directions of a tile after the scans over whole planes (planes_tiles.cuh). A tile,
// and all channels of a group, have two warps for each direction, which take its two segments. Tensors of the
// next channel come while this one is computed; gradients of taps are summed over channels in registers, and
// dx over directions in shared memory. Rows of a tile are half a line of the cache: operands are asked for
// with the other half, which the tile beside this one needs at about the same time.
//
// Macros beside those of common.cuh:
//   SCANS       directions
//   MIN_BLOCKS  blocks on a multiprocessor
// Knobs: 0 elements of a row of weights, 1 numbers of a plane of borders.
#include "planes_tiles_taps.cuh"

// Is vector v of a row of the tile in the image?
__device__ __forceinline__ bool inside(const Params& p, const Segment& s, int row, int v) {
  return s.tile_row + row < p.height && s.tile_column + 8 * v < p.width;
}
// From the first number of a plane. Strides are not negative, and those of rows fit 32 bits.
__device__ __forceinline__ long long in_plane(const Segment& s, const View& v, int row, int column) {
  return (long long)((u64)(u32)(s.tile_row + row) * (u32)v.h) + (s.tile_column + column);
}

// Row and vector of `number` of eight rows of four vectors, or of 16 rows of two. Eight lanes that come
// together have whole sectors of memory, in four rows of shared memory whose vectors meet all banks.
__device__ __forceinline__ int row_of_four(int number) {
  return number / 32 * 8 + number / 2 % 4 * 2 + number / 8 % 2;
}
__device__ __forceinline__ int vector_of_four(int number) { return number / 16 % 2 * 2 + number % 2; }
__device__ __forceinline__ int row_of_two(int number) {
  return number / 16 * 8 + number / 2 % 4 * 2 + number / 8 % 2;
}

// The two vectors that a lane copies of the half of a tile that the warp's segment is. Rows are so many
// apart.
struct Part {
  int at;  // of the first in a tile of 16-bit numbers in shared memory
  int row, v;
  u32 inside;  // bits: are these two in the image; and what else is, as follows

  __device__ __forceinline__ bool has(int i) const { return inside >> i & 1; }
};
// Numbers of borders that the lane copies; vectors of x or dy, and of dx, that the thread has.
constexpr int BORDER_BIT = 4, IMAGE_BIT = 8, SUM_BIT = 10;

__device__ __forceinline__ int apart(const Segment& s) { return s.vertical ? LINES / 2 : SIDE / 2; }
__device__ __forceinline__ Part part_of(const Params& p, const Segment& s) {
  Part part;
  part.row = s.vertical ? s.half * LINES + row_of_four(s.lane) : row_of_two(s.lane);
  part.v = s.vertical ? vector_of_four(s.lane) : s.half * 2 + s.lane % 2;
  part.at = s.d * TENSOR + part.row * ROW + part.v * 16;
  part.inside = inside(p, s, part.row, part.v) | inside(p, s, part.row + apart(s), part.v) << 1;
  return part;
}

// A thread's vectors of x and dy together, and of dx.
constexpr int VECTORS = SIDE * SIDE / 8, IMAGES = (2 * VECTORS + THREADS - 1) / THREADS;
__device__ __forceinline__ int image_of(int i) { return i * THREADS + threadIdx.x; }
__device__ __forceinline__ bool is_second(int i) { return image_of(i) >= VECTORS; }

// Where one channel after the other is in memory: a thread's vectors of x and dy; the plane of dx; elements
// from the beginning of lam and of gate, and of their gradients, to a lane's first vector; and a lane's part
// of borders.
struct Pointers {
  const storage_t* image[IMAGES];
  storage_t* dx;
  long long lam, gate;
  const float* border;
};

// Vectors of dx have four numbers: there are as many as of x and dy together, which have eight.
__device__ __forceinline__ int row_of_sum(int i) { return image_of(i) / 8; }
__device__ __forceinline__ int left_of_sum(int i) { return image_of(i) % 8 * 4; }

__device__ __forceinline__ void find_images(const Params& p, const Segment& s, int b, int channel, Part& part,
                                            Pointers& to) {
#pragma unroll
  for (int i = 0; i < IMAGES; i++) {
    const View& v = is_second(i) ? p.dy : p.x;
    const int row = row_of_four(image_of(i) % VECTORS), column = 8 * vector_of_four(image_of(i));
    const bool there = image_of(i) < 2 * VECTORS && inside(p, s, row, column / 8);
    to.image[i] = v.data + (b * v.b + channel * v.c + (there ? in_plane(s, v, row, column) : 0));
    part.inside |= (u32)there << (IMAGE_BIT + i);
    const bool sum = image_of(i) < 2 * VECTORS && inside(p, s, row_of_sum(i), left_of_sum(i) / 8);
    part.inside |= (u32)(sum && p.dx.data != nullptr) << (SUM_BIT + i);
  }
}

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
  part.inside |= (u32)max(0, min(4, there)) << BORDER_BIT;
  if (there <= 0) to.border = borders.entering;
}

__device__ __forceinline__ Pointers pointers_of(const Params& p, const Segment& s, Part& part, int b,
                                                int channel) {
  Pointers to = {};
  const auto find = [&](const View& v) {
    return b * v.b + s.d * v.d + channel * v.c + (part.has(0) ? in_plane(s, v, part.row, 8 * part.v) : 0);
  };
  if (HAS_LAM) to.lam = find(p.lam);
  if (HAS_GATE) to.gate = find(p.gate);
  find_images(p, s, b, channel, part, to);
  to.dx = p.dx.data + (b * p.dx.b + channel * p.dx.c);
  find_borders(p, s, b, channel, part, to);
  return to;
}

// All that the block needs of the channel so many `ahead` of the one that lam and gate are at.
__device__ __forceinline__ void fetch(const Params& p, const Segment& s, const Part& part, Pointers& from,
                                      int ahead, unsigned char* stage) {
#pragma unroll
  for (int i = 0; i < IMAGES; i++) {
    if (2 * VECTORS % THREADS != 0 && image_of(i) >= 2 * VECTORS) break;
    const int row = row_of_four(image_of(i) % VECTORS), v = vector_of_four(image_of(i));
    copy_async_wide(stage + (is_second(i) ? DY : X) + row * ROW + v * 16, from.image[i],
                    part.inside >> (IMAGE_BIT + i) & 1 ? 16 : 0);
    from.image[i] += is_second(i) ? p.dy.c : p.x.c;
  }
  const auto fetch_part = [&](const View& view, long long offset, unsigned char* tensor) {
    unsigned char* to = tensor + part.at;
    const storage_t* at = view.data + (offset + ahead * view.c);
    copy_async_wide(to, at, part.has(0) ? 16 : 0);
    copy_async_wide(to + apart(s) * ROW, at + (part.has(1) ? (long long)((u64)apart(s) * (u32)view.h) : 0),
                    part.has(1) ? 16 : 0);
  };
  if (HAS_LAM) fetch_part(p.lam, from.lam, stage + LAM);
  if (HAS_GATE) fetch_part(p.gate, from.gate, stage + GATE);
  copy_async<16>(stage + BORDERS + (2 * s.d + s.half) * BORDER + 16 * s.lane, from.border,
                 (int)(part.inside >> BORDER_BIT & 7) * 4);
  from.border += p.knobs[1];
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
__device__ __forceinline__ void write_sums(const Params& p, const Segment& s, const Part& part, Pointers& to,
                                           const unsigned char* parts) {
#pragma unroll
  for (int i = 0; i < IMAGES; i++) {
    if (!(part.inside >> (SUM_BIT + i) & 1)) continue;
    const unsigned char* from = parts + row_of_sum(i) * PART_ROW + 4 * left_of_sum(i);
    float sum[4] = {};
#pragma unroll
    for (int d = 0; d < SCANS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] += *(const float*)(from + d * PART + 4 * e);
    store(to.dx + in_plane(s, p.dx, row_of_sum(i), left_of_sum(i)),
          make_uint2(packed(sum[0], sum[1]), packed(sum[2], sum[3])));
  }
  to.dx += p.dx.c;
}

__device__ __forceinline__ Segment segment_of(const Params& p, int tile_row, int tile_column) {
  Segment s;
  const int warp = threadIdx.x / 32;
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

KERNEL(THREADS, MIN_BLOCKS) planes_tiles(CONSTANT_PARAMS p) {
  const int rows = (p.height + SIDE - 1) / SIDE, columns = (p.width + SIDE - 1) / SIDE;
  const int index = blockIdx.x / (rows * columns), number = blockIdx.x - index * rows * columns;
  const int b = index / p.groups, group = index % p.groups;
  const int channels = p.channels / p.groups, first = group * channels;
  Segment s = segment_of(p, number / columns * SIDE, number % columns * SIDE);
  Part part = part_of(p, s);
  unsigned char* memory = shared_memory();
  unsigned char *parts = memory + 2 * STAGE, *zeros = parts + SCANS * PART;
  unsigned char* weights = zeros + ZEROS + (2 * s.d + s.half) * WEIGHTS + 8 * s.lane;
  if (threadIdx.x < LINES) ((float*)zeros)[threadIdx.x] = 0.f;
  Pointers pointers = pointers_of(p, s, part, b, first);
  fetch(p, s, part, pointers, 0, memory);
  read_weights(p, s, b, group, weights);
  s.restarts = restarts_of(p, s);
  WeightSums sums = {};
#pragma unroll 1
  for (int c = 0; c <= channels; c++) {
    unsigned char* stage = memory + c % 2 * STAGE;
    copy_wait<0>();
    __syncthreads();
    if (c + 1 < channels) fetch(p, s, part, pointers, 1, memory + (c + 1) % 2 * STAGE);
    if (c > 0) write_sums(p, s, part, pointers, parts);
    if (c == channels) break;
    const Channel now = channel_at(s, stage, parts, weights, zeros);
    float h[LINES];
    scan(s, now, h);
    __syncthreads();  // parts of the channel before are summed
    walk_back(s, now, sums, h);
    __syncwarp();
    write_products(p, s, part, pointers, stage);
  }
  if (p.dtaps.data == nullptr) return;
  __syncthreads();
  show_sums(s, sums, memory);
  __syncthreads();
  write_tap_gradients(p, s, b, group, memory);
}
