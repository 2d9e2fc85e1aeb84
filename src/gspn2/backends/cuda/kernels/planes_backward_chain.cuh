// The gradient of taps that many channels share, as sums that go from channel to channel: of K sums of a group, channel c
// adds what it has to sum c % K, after channel c - K has. So a few sums are all that is in memory, and
// what a channel reads the one before has just written: it is in the cache. Blocks come in the order of channels, and
// wait only for those before them.
//
// A warp of each block beside those that work waits for the other block and tells the next one. It meets the others at
// two pairs of barriers, by turns, once a step, which is a segment or a tile: `ready` when the sums may be read, `done` when
// they have been written. Two steps later the same barrier is due again, and by then everybody has passed it: the helper
// gives `ready` of a step only after it has seen `done` of the step but one before.
#pragma once
#include "planes_backward_shared.cuh"

struct Chain {
  u64* barriers;     // ready[2], done[2]
  u32* flag;         // steps that this block has done
  const u32* before; // those of the block that it adds to, or null
};

__device__ __forceinline__ Chain chain_of(const Params& p, const Thread& t) {
  Chain chain = {chain_barriers(t), nullptr, nullptr};
  const int strips = strips_of(p), plane = t.b * p.channels + t.channel;
  chain.flag = (u32*)p.scratch[1] + p.knobs[8] + plane * strips + t.strip;
  if (t.follows) chain.before = chain.flag - p.knobs[6] * strips;
  return chain;
}

__device__ __forceinline__ void start_chain(const Thread& t) {
  if (threadIdx.x < 4) mbarrier_init(chain_barriers(t) + threadIdx.x, threadIdx.x < 2 ? 1 : warps_of_line());
  mbarrier_init_fence();
}

__device__ __forceinline__ bool is_helper() { return (int)threadIdx.x / 32 == warps_of_line(); }

__device__ __forceinline__ void help(const Params& p, const Thread& t, int steps) {
  if (t.lane != 0) return;
  const Chain chain = chain_of(p, t);
  const auto make_ready = [&](int step) {
    if (chain.before) wait_flag(chain.before, step + 1);
    mbarrier_arrive(chain.barriers + (step & 1));
  };
  make_ready(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) make_ready(step + 1);
    mbarrier_wait(chain.barriers + 2 + (step & 1), step >> 1 & 1);
    raise_flag(chain.flag, step + 1);
  }
}

// Before and after a step reads and writes sums: all lanes of every warp that works.
__device__ __forceinline__ void enter_step(const Thread& t, int step) {
  mbarrier_wait(chain_barriers(t) + (step & 1), step >> 1 & 1);
}
__device__ __forceinline__ void leave_step(const Thread& t, int step) {
  __syncwarp();
  if (t.lane == 0) mbarrier_arrive(chain_barriers(t) + 2 + (step & 1));
}

// COUNT neighbours of a sum.
template <int COUNT>
struct Sums {
  float v[COUNT];
};
// From the second-level cache: another multiprocessor has written them.
template <int COUNT>
__device__ __forceinline__ Sums<COUNT> read_sums(const float* from) {
  Sums<COUNT> sums;
  if constexpr (COUNT == 1) {
    sums.v[0] = __ldcg(from);
  } else if constexpr (COUNT == 2) {
    const float2 f = __ldcg((const float2*)from);
    sums.v[0] = f.x, sums.v[1] = f.y;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 f = __ldcg((const float4*)(from + i));
      sums.v[i] = f.x, sums.v[i + 1] = f.y, sums.v[i + 2] = f.z, sums.v[i + 3] = f.w;
    }
  }
  return sums;
}
template <int COUNT>
__device__ __forceinline__ void write_sums(float* to, const float (&v)[COUNT]) {
  // By these functions: what is stored through a pointer to a vector may be taken apart again by the compiler.
  if constexpr (COUNT == 1) {
    __stcg(to, v[0]);
  } else if constexpr (COUNT == 2) {
    __stcg((float2*)to, make_float2(v[0], v[1]));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) __stcg((float4*)(to + i), make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]));
  }
}
