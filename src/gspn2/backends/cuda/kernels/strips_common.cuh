// What strips of columns (strips.cuh, strips_column.cu) and of rows (strips_vertical.cuh) have in common: the tensors
// of a plane, the head of shared memory, and turns of the ring.
#pragma once
#include "lines_taps.cuh"
#include "words.cuh"

static_assert(!NORMALIZE && !HAS_GATE, "weights as given, no gate");

constexpr int SIZE = sizeof(storage_t);
constexpr int VECTOR = 16 / SIZE;            // elements in 16 bytes
constexpr int TAPS = 3;
constexpr int TENSORS = TAPS + 1 + HAS_LAM;  // taps, x, lam, in this order
constexpr int THREADS = 32 * (STRIPS + COPIERS);

struct Plane {
  const storage_t* from[TENSORS];  // row 0, column 0 of each tensor
  storage_t* y;
};

__device__ __forceinline__ long long row_step(const Params& p, int i) {
  return i < TAPS ? p.taps.h : i == TAPS ? p.x.h : p.lam.h;
}

__device__ __forceinline__ Plane plane_of(const Params& p, int plane) {
  const long long b = plane / p.channels, c = plane % p.channels, g = c / (p.channels / p.groups);
  Plane it;
#pragma unroll
  for (int k = 0; k < TAPS; ++k) it.from[k] = p.taps.data + b * p.taps.b + g * p.taps.c + k * p.taps.k;
  it.from[TAPS] = p.x.data + b * p.x.b + c * p.x.c;
#if HAS_LAM
  it.from[TAPS + 1] = p.lam.data + b * p.lam.b + c * p.lam.c;
#endif
  it.y = p.y.data + b * p.y.b + c * p.y.c;
  return it;
}

__device__ __forceinline__ bool between(int r, int from, int until) {
  return (u32)(r - from) < (u32)(until - from);
}

// One lane arrives at a barrier for its warp, which has met before. NVIDIA's racecheck does not follow that, and has a
// build where every lane arrives for itself.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
constexpr int ARRIVALS = EVERY_LANE_ARRIVES ? 32 : 1;

__device__ __forceinline__ bool arrives(int lane) { return EVERY_LANE_ARRIVES || lane == 0; }
// For who arrives, at a barrier that states of so many bytes come to from another block.
__device__ __forceinline__ void arrive_expect(u64* bar, u32 bytes, int lane) {
  if (!EVERY_LANE_ARRIVES || lane == 0)
    mbarrier_arrive_expect(bar, bytes);
  else
    mbarrier_arrive(bar);
}

// What comes before the ring of tiles in shared memory: states that strips exchange, their barriers, and two
// barriers of each stage: its tile is there; its tile has been scanned.
template <int STATES, int STATE_BARRIERS>
struct Head {
  static constexpr int BYTES = (4 * STATES + 8 * (STATE_BARRIERS + 2 * STAGES) + 127) / 128 * 128;

  static __device__ __forceinline__ float* states() { return (float*)shared_memory(); }
  static __device__ __forceinline__ u64* state_barriers() { return (u64*)(shared_memory() + 4 * STATES); }
  static __device__ __forceinline__ u64* full(int stage) { return state_barriers() + STATE_BARRIERS + stage; }
  static __device__ __forceinline__ u64* done(int stage) { return full(stage) + STAGES; }

  static __device__ __forceinline__ void start_barriers() {
    for (int i = 0; i < STATE_BARRIERS; ++i) mbarrier_init(state_barriers() + i, ARRIVALS);
    for (int i = 0; i < STAGES; ++i) mbarrier_init(full(i), 32 * COPIERS), mbarrier_init(done(i), STRIPS * ARRIVALS);
    mbarrier_init_fence();
  }
};

// Stages of the ring, one after the other, and the parity of their barriers.
struct Turn {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void wait_for_everybody() {
  __syncwarp();
#if CLUSTER > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
}
