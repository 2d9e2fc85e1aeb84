// Gradient of the weights and the bias of a depthwise convolution with a side of 7 on tensor cores; see depthwise_strips.cuh.
//
// For one channel and a row of taps r it is the sums along the diagonals of a 16 x 8 matrix, D[m][n] = sum over strips and
// rows of x[row + r - REACH][m] dy[row][n], where m and n count columns of a strip's input and of the strip. A warp keeps
// the SIDE matrices of its two channels in registers, and the last SIDE rows of dy, while it goes down the rows of x. The
// gradient of the bias is a product with ones.
//
// Macros: those of depthwise.cuh.
#include "depthwise_strips.cuh"

constexpr int DY_PLANE = PLANE / 2, DY = SLICE * DY_PLANE;  // words of a channel of a row of dy
#if STORAGE == 1
constexpr u32 ONES = 0x3f803f80u;
#else
constexpr u32 ONES = 0x3c003c00u;
#endif

struct Matrix {
  float of[4];
};

// What a thread brings: 8 channels of a column of two neighbouring strips, of x and, the first half, of dy. Places of
// row 0 in units of 8 channels; none: nothing is there.
constexpr u32 NONE = 0xffffffffu;
struct Bring {
  u32 x[2], dy[2];
};

__device__ __forceinline__ Bring bring_from(const Params& p, int strips, int slice, int warp, int lane) {
  Bring b;
  const int eight = slice * SLICE + lane % EIGHTS * 8, place = (warp * 32 + lane) / EIGHTS, at = place / STRIP;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Strip s = strip_of(p, strips + place % STRIP * 2 + i);
    const int column = s.column - REACH + at, out = s.column + at;
    const bool there = !s.none && eight < CHANNELS;
    const long long first = s.image * p.height * p.width;
    b.x[i] = there && column >= 0 && column < p.width ? (u32)(((first + column) * CHANNELS + eight) / 8) : NONE;
    b.dy[i] = there && at < STRIP && out < p.width ? (u32)(((first + out) * CHANNELS + eight) / 8) : NONE;
  }
  return b;
}

__device__ __forceinline__ void fetch(uint4 (&to)[2], const pair_t* from, const u32 (&places)[2], bool exists, int row,
                                      const Params& p) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    to[i] = exists && places[i] != NONE ? __ldg((const uint4*)from + places[i] + (long long)row * p.width * (CHANNELS / 8))
                                        : make_uint4(0u, 0u, 0u, 0u);
}

struct Rows {
  uint4 x[2], dy[2];
};

// Row `row` of x and the row of dy that it is the first to need.
__device__ __forceinline__ void fetch_rows(Rows& rows, const Params& p, const Bring& b, int row, int begin, int end) {
  const int ahead = row + REACH;
  fetch(rows.x, p.x, b.x, row >= 0 && row < p.height, row, p);
  fetch(rows.dy, p.dy, b.dy, ahead >= begin && ahead < end, ahead, p);
}

__device__ __forceinline__ void keep_rows(u32* input, const Rows& rows, int warp, int lane) {
  const int eight = lane % EIGHTS, place = (warp * 32 + lane) / EIGHTS;  // column and pair of strips
  keep_pairs<PLANE>(input + eight * 8 * PLANE + (place + eight * TURN) % PLANE, rows.x[0], rows.x[1]);
  if (place < DY_PLANE)
    keep_pairs<DY_PLANE>(input + INPUT + eight * 8 * DY_PLANE + (place + eight * TURN) % DY_PLANE, rows.dy[0], rows.dy[1]);
}

// Rows [begin, end) of dy of 16 strips.
__device__ __forceinline__ void add_rows(Matrix (&sums)[2][SIDE + 1], const Params& p, u32* shared, const Bring& bring,
                                         int begin, int end, int warp, int lane) {
  uint2 dy[2][SIDE];
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int k = 0; k < SIDE; ++k) dy[c][k] = make_uint2(0u, 0u);
  const int first = begin - REACH, last = end + REACH;
  Rows next;
  fetch_rows(next, p, bring, first, begin, end);
  __syncthreads();
  keep_rows(shared, next, warp, lane);
  fetch_rows(next, p, bring, first + 1, begin, end);
  for (int base = first; base < last; base += SIDE) {
#pragma unroll
    for (int k = 0; k < SIDE; ++k) {
      const int row = base + k, turn = (row - first) & 1;
      if (row >= last) break;
      __syncthreads();
      if (row + 1 < last) {
        keep_rows(shared + (turn ^ 1) * (INPUT + DY), next, warp, lane);
        fetch_rows(next, p, bring, row + 2, begin, end);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int plane = 2 * warp + c, place = lane / 4 * 8 + lane % 4 * 2 + plane / 8 * TURN;
        const u32* from = shared + turn * (INPUT + DY) + plane * PLANE;
        dy[c][k] = *(const uint2*)(shared + turn * (INPUT + DY) + INPUT + plane * DY_PLANE + place % DY_PLANE);
        multiply_tiles(sums[c][SIDE].of, ONES, ONES, ONES, ONES, dy[c][k]);
        if (row < 0 || row >= p.height) continue;
        const uint2 upper = *(const uint2*)(from + place % PLANE), lower = *(const uint2*)(from + (place + 64) % PLANE);
#pragma unroll
        for (int r = 0; r < SIDE; ++r)
          multiply_tiles(sums[c][r].of, upper.x, lower.x, upper.y, lower.y, dy[c][(k + SIDE - r) % SIDE]);
      }
    }
  }
}

KERNEL(32 * WARPS, 2) depthwise_weights_tensor(CONSTANT_PARAMS p) {
  u32* shared = (u32*)shared_memory();  // two rows of x and dy each
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slice = blockIdx.x % p.slices, group = blockIdx.x / p.slices;
  const int across = (p.width + STRIP - 1) / STRIP, sixteens = (p.batch * across + STRIPS - 1) / STRIPS;
  const int parts = (p.height + p.slots - 1) / p.slots;
  Matrix sums[2][SIDE + 1];
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int r = 0; r <= SIDE; ++r) sums[c][r] = Matrix{{0.f, 0.f, 0.f, 0.f}};
  for (int work = group; work < sixteens * parts; work += p.groups) {
    const int part = work / sixteens, begin = part * p.slots;
    const Bring bring = bring_from(p, (work - part * sixteens) * STRIPS, slice, warp, lane);
    add_rows(sums, p, shared, bring, begin, min(begin + p.slots, p.height), warp, lane);
  }
  __syncthreads();
  float* matrix = (float*)shared + warp * REACHED * STRIP;
  const int m = lane / 4 * STRIP + lane % 4 * 2;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int channel = slice * SLICE + 2 * warp + c;
    float* to = p.partial + (long long)group * (TAPS + 1) * CHANNELS + channel;
#pragma unroll
    for (int r = 0; r <= SIDE; ++r) {
      matrix[m] = sums[c][r].of[0], matrix[m + 1] = sums[c][r].of[1];
      matrix[m + 64] = sums[c][r].of[2], matrix[m + 65] = sums[c][r].of[3];
      __syncwarp();
      // All rows of the product with ones are the same.
      if (lane < (r < SIDE ? SIDE : 1) && channel < CHANNELS) {
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < STRIP; ++n) total += matrix[(r < SIDE ? n + lane : 0) * STRIP + n];
        to[(long long)(r * SIDE + lane) * CHANNELS] = total;
      }
      __syncwarp();
    }
  }
}
