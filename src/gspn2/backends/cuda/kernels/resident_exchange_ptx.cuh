// What resident_exchange_forward.cu and resident_straight_forward.cu need beside the instructions of ptx.cuh.
#pragma once
#include "ptx.cuh"

#ifndef GSPN2_EMULATE
// Tells the cluster that this block runs, without waiting for memory as `cluster_barrier` does; then waits
// until all blocks have said so. Neither orders what threads have written. By all threads, in turn.
__device__ __forceinline__ void cluster_has_begun() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait_begun() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
#endif
