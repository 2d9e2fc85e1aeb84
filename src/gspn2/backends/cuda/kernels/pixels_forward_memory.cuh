// Where forward of pixels keeps things: the ring and what else is in shared memory, and sums over directions.
#pragma once
#include "pixels.cuh"

static_assert(!(ON_CHIP && SPLIT), "sums on chip are those of whole lines");
static_assert(!PREPARED || (32 % VECTORS == 0 && TAP_GROUPS == 1), "lanes of a warp share the weights of a place");

#define TURNED (!OWN_TAPS && !PREPARED)  // taps that a block turns into weights itself

constexpr int TAP_VECTORS = OWN_TAPS ? 3 : 0;
constexpr int LAM = 1;  // the first is x
constexpr int GATE = LAM + HAS_LAM;
constexpr int TAPS = GATE + HAS_GATE;
constexpr int OPERANDS = TAPS + TAP_VECTORS;
constexpr int EDGES = PLACES > 1 ? 2 : 1;         // places of a thread that others look at
constexpr bool SUMS_COME = SUM && !ON_CHIP;       // sums come through the ring, too

// Where things are in shared memory, in bytes.
constexpr int PITCH = THREADS + 2 * VECTORS;
constexpr int FLOATS = 4 * V * PLACES * THREADS;
constexpr int SUMS_AT = OPERANDS * PLACES * THREADS * VECTOR;     // of a slot: [PLACES][PARTS][THREADS]
constexpr int WORDS_AT = SUMS_AT + SUMS_COME * FLOATS;            // [PLACES][columns]: weights that were prepared
constexpr int COLUMNS = THREADS / VECTORS;
constexpr int SLOT = WORDS_AT + PREPARED * ((4 * PLACES * COLUMNS + 15) / 16 * 16);
constexpr int PUBLISHED_AT = DEPTH * SLOT;                        // [2][EDGES][PARTS][PITCH]: states at the edges
constexpr int CARRIED_AT = PUBLISHED_AT + 8 * V * EDGES * PITCH;  // [PLACES][PARTS][THREADS]: from the partner
constexpr int MEETING_AT = CARRIED_AT + (ROLES > 1) * FLOATS;       // the barrier that closes a line
constexpr int HALO_AT = MEETING_AT + CLUSTER * 16;
#if SPLIT
constexpr int WEIGHTS_AT = HALO_AT + HALO_BYTES;
#else
constexpr int WEIGHTS_AT = HALO_AT;
#endif

static_assert(PUBLISHED_AT % 16 == 0 && CARRIED_AT % 16 == 0 && MEETING_AT % 16 == 0 && WEIGHTS_AT % 16 == 0,
              "vectors of 16 bytes");

__device__ __forceinline__ Floats* published(int parity) {
  return (Floats*)(shared_memory() + PUBLISHED_AT) + parity * EDGES * PARTS * PITCH + VECTORS + threadIdx.x;
}
__device__ __forceinline__ Floats* carried(int q) {
  return (Floats*)(shared_memory() + CARRIED_AT) + q * PARTS * THREADS + threadIdx.x;
}
// What one operand of a slot, which starts at byte `slot` of the ring, holds of a thread.
__device__ __forceinline__ Vector* ring(int slot, int operand, int q) {
  return (Vector*)(shared_memory() + slot) + (operand * PLACES + q) * THREADS + threadIdx.x;
}
__device__ __forceinline__ Floats* ring_sum(int slot, int q) {
  return (Floats*)(shared_memory() + slot + SUMS_AT) + q * PARTS * THREADS + threadIdx.x;
}

// Shared by the lanes that have a place: one copies, and the warp meets before it is read, and before it is
// copied to again.
__device__ __forceinline__ u32* ring_word(int slot, int q) {
  return (u32*)(shared_memory() + slot + WORDS_AT) + q * COLUMNS + threadIdx.x / VECTORS;
}

// Where neighbouring places meet, once a line: who has arrived does something else before it waits. One lane arrives
// for its warp: 32 arrivals would be done one after the other. NVIDIA's racecheck does not follow that, and has a build
// where every lane arrives for itself.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
struct Meeting {
#if CLUSTER
  u32 parity;

  __device__ __forceinline__ u64* barrier() const { return (u64*)(shared_memory() + MEETING_AT); }
  // A barrier of the block must follow.
  __device__ __forceinline__ void start() {
    parity = 0;
    if (threadIdx.x == 0) {
      mbarrier_init(barrier(), EVERY_LANE_ARRIVES ? THREADS : THREADS / 32);
      mbarrier_init_fence();
    }
  }
  __device__ __forceinline__ void arrive() const {
    __syncwarp();
    if (EVERY_LANE_ARRIVES || threadIdx.x % 32 == 0) mbarrier_arrive(barrier());
  }
  __device__ __forceinline__ void wait() {
    mbarrier_wait(barrier(), parity);
    parity ^= 1;
  }
#else
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void wait() { __syncthreads(); }
#endif
};

// Sums on chip: two quarters of the image (for one role the whole of it, in the first), [PARTS][rows][pitch] bytes
// each. The first holds what a role answers for on both axes: it stays. Rows are padded, so that walking down a column
// uses all banks, too.
constexpr int PIXEL = 4 * F * VECTORS;

struct Home {
  int rows, columns;  // of the quarter at the top left
  int pitch, part;    // bytes of a row and of a part

  __device__ __forceinline__ void start(const Params& p) {
    rows = ROLES > 1 ? (p.height + 1) / 2 : p.height;
    columns = ROLES > 1 ? (p.width + 1) / 2 : p.width;
    pitch = (columns * PIXEL + 127) / 128 * 128 + PIXEL;
    part = rows * pitch;
  }
  __device__ __forceinline__ static int at(const Layout& layout) {
#if !TURNED
    return WEIGHTS_AT;
#else
    return WEIGHTS_AT + 32 * TAP_LINES * TAP_GROUPS * max(layout.row_run, layout.column_run);
#endif
  }
  // Byte of a pixel's vector from the first quarter's start. Exactly one coordinate is in this role's half.
  __device__ __forceinline__ int of(int row, int column, bool vertical, int half, int vector) const {
    const bool lower = row >= rows, right = column >= columns;
    const bool second = (vertical ? right : lower) != (half != 0);
    return second * PARTS * part + (row - lower * rows) * pitch + (column - right * columns) * PIXEL + vector * 4 * F;
  }
};


// Float32 sums over directions, in scratch: [B][channel block][PARTS][H][W][VECTORS] Floats, for what the lanes of a
// warp read or write together to be whole sectors. Of float32 storage they are in y until they are complete.
struct PartSums {
  float* at;
  long long line, place, part;

  __device__ __forceinline__ void start(const Params& p, void* scratch, const Scan& s, const Self& me, int begin,
                                        int first) {
    const long long row = (long long)p.width * VECTORS * F;
    const long long step = s.vertical ? row : VECTORS * F;
    line = s.reversed ? -step : step, place = s.vertical ? VECTORS * F : row, part = row * p.height;
    const long long block = blockIdx.x / (ROLES * layout_of(p).splits);
    at = (float*)scratch + block * PARTS * part + me.vector * F + (s.reversed ? (s.lines - 1) * step : 0) +
         begin * line + first * place;
  }
  __device__ __forceinline__ void start(const Stream& y) {
    at = (float*)y.at, line = y.line, place = y.place, part = F;
  }
  __device__ __forceinline__ void load(int q, float* e) const {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const Floats f = *(const Floats*)(at + q * place + i * part);
#pragma unroll
      for (int v = 0; v < F; v++) e[i * F + v] = f.e[v];
    }
  }
  __device__ __forceinline__ void store(int q, const float* e) const {
#pragma unroll
    for (int i = 0; i < PARTS; i++) store_part(at + q * place + i * part, e + i * F);
  }
};
