// Backward of planes: images whose columns are adjacent in memory, one direction a launch. A block owns one channel of
// one image (or several narrow ones), with all places of a line or the part of a line that falls to it in its cluster,
// and walks over it twice:
//   1. forward, keeping the state that enters every SEGMENT-th line;
//   2. segment after segment, last first: forward again with the states in shared memory, then backwards.
// How operands reach shared memory differs between vertical and horizontal scans; macros, knobs and scratch are
// explained in planes_backward.cuh.
#if HORIZONTAL
#include "planes_backward_horizontal.cuh"
#else
#include "planes_backward_vertical.cuh"
#endif

// All copies of this thread but the latest PENDING groups are there, and so are those of the threads that read along:
// of the warp, or with HAS_HIDDEN, whose states are read across warps, of the block.
template <int PENDING>
__device__ __forceinline__ void arrived() {
  copy_wait<PENDING>();
  if (WIDE && HAS_HIDDEN)
    line_barrier();
  else
    __syncwarp();
}

__device__ __forceinline__ void scan_forward(const Params& p, const Work& w, Thread& t) {
  float h[N] = {};
  Edges edges = {0.f, 0.f};
  const int last = segments_of(w.scan) - 1;
  if (has_channel(t)) fetch<0, DOUBLE>(p, w, t, 0);
  copy_commit();
  for (int segment = 0; segment < last; segment++) {
    if (has_channel(t)) {
      fetch<0, DOUBLE>(p, w, t, segment + 1);
      copy_commit();
      arrived<1>();
      walk_forward(p, w, t, segment, h, edges, false);
    }
#if SPLIT
    if (has_channel(t)) {
      exchange(p, t, h);
      const Shown shown = {h[0], h[N - 1]};
      publish(t, shown);
      edges = settle(t, shown);
    }
#endif
    if (has_channel(t)) keep_state(t, kept_of(p, t, last + 1, segment + 1), h);
    __syncwarp();
  }
}

// One segment: forward again if the states have to be computed, then back.
__device__ __forceinline__ void walk_segment(const Params& p, const Work& w, Thread& t, int segment, float (&h)[N],
                                             float (&entering)[N], float (&carried)[N]) {
  fetch<DOUBLE, OPERANDS>(p, w, t, segment);
  copy_commit();
  arrived<1>();
  if (segment > 0) fetch<0, DOUBLE>(p, w, t, segment - 1);
  copy_commit();
  if (COMPUTES_STATES) {
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = entering[n], entering[n] = 0.f;
    const Shown shown = {h[0], h[N - 1]};
    publish(t, shown);
    Edges edges = settle(t, shown);
    walk_forward(p, w, t, segment, h, edges, true);
    if (segment > 1) kept_state(t, kept_of(p, t, segments_of(w.scan), segment - 1), entering);
  }
  if (!HAS_HIDDEN) arrived<1>();
#if CHAIN
  const int step = segments_of(w.scan) - 1 - segment;
  enter_step(t, step);
#endif
  walk_back(p, w, t, segment, h, carried);
#if CHAIN
  leave_step(t, step);
#endif
}

__device__ __forceinline__ void scan_back(const Params& p, const Work& w, Thread& t) {
  float h[N] = {}, entering[N] = {}, carried[N] = {};
  const int last = segments_of(w.scan) - 1;
#if HAS_HIDDEN
  if (HAS_GATE && WANTS_GATE && has_channel(t)) last_state(p, w, t, h);
#endif
  if (COMPUTES_STATES && last > 0 && has_channel(t)) kept_state(t, kept_of(p, t, last + 1, last), entering);
  for (int segment = last; segment >= 0; segment--) {
    if (has_channel(t)) walk_segment(p, w, t, segment, h, entering, carried);
#if SPLIT
    if (has_channel(t) && segment > 0) exchange(p, t, carried);
#endif
#if SHARED && !DIRECT
    const bool together = p.knobs[5] > 1;
    if (together)
      cluster_meets();
    else
      __syncwarp();
    sum_channels(p, w, t, segment);
    if (together) cluster_meets();  // what was parked may go
#endif
    __syncwarp();
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_backward(CONSTANT_PARAMS p) {
  const Scan scan = scan_of(p, p.knobs[0]);
  const int warps = warps_of_line();
  float* edges = (float*)(shared_memory() + warps * WARP_BYTES);
  Thread t = thread_of(p, scan, threadIdx.x, edges);
  // Beyond the first and the last thread there is nothing, but it is looked at where a line goes on in other blocks.
  for (int i = threadIdx.x; i < 4 * (warps + 2); i += blockDim.x) edges[i] = 0.f;
  start_exchanges(t);
#if CHAIN
  start_chain(t);
#endif
  const Work w = work_of(p, scan, t);
  cluster_meets();  // every block is there, with its barriers, before another one writes into its memory
#if CHAIN
  if (is_helper()) return help(p, t, segments_of(scan));
#endif
  if (COMPUTES_STATES) {
    scan_forward(p, w, t);
  } else if (has_channel(t)) {
    fetch<0, DOUBLE>(p, w, t, segments_of(scan) - 1);
    copy_commit();
  }
  scan_back(p, w, t);
}
