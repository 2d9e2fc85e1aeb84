// Backward of planes: images whose columns are adjacent in memory, one direction a launch. A block owns one plane (or
// several short ones, each with taps of its own) with all places of a line, and walks over it twice:
//   1. forward, keeping the state that enters every SEGMENT-th line;
//   2. segment after segment, last first: forward again with the states in shared memory, then backwards.
// The channels that share taps come one after another. How operands reach shared memory differs between vertical and
// horizontal scans; macros, knobs and scratch are explained in planes_backward.cuh.
#if HORIZONTAL
#include "planes_backward_horizontal.cuh"
#else
#include "planes_backward_vertical.cuh"
#endif

// The state that enters a segment: kept by this thread, and read by no other.
__device__ __forceinline__ float* kept_of(const Params& p, const Work& w, int segment) {
  return (float*)p.scratch[1] + ((long long)blockIdx.x * segments_of(w.scan) + segment) * N * blockDim.x;
}

__device__ __forceinline__ void scan_forward(const Params& p, const Work& w, Thread& t) {
  float h[N] = {};
  Edges edges = {0.f, 0.f};
  const int last = segments_of(w.scan) - 1;
  fetch_double(p, w, t, 0);
  copy_commit();
  for (int segment = 0; segment < last; segment++) {
    fetch_double(p, w, t, segment + 1);
    copy_commit();
    copy_wait<1>();
    __syncwarp();
    walk_forward(p, w, t, segment, h, edges, false);
    put_floats(kept_of(p, w, segment + 1), h);
    __syncwarp();
  }
}

__device__ __forceinline__ void scan_back(const Params& p, const Work& w, Thread& t, bool hidden) {
  float h[N] = {}, entering[N] = {}, carried[N] = {};
  const int last = segments_of(w.scan) - 1;
  if (hidden && last > 0) get_floats(kept_of(p, w, last), entering);
  for (int segment = last; segment >= 0; segment--) {
    fetch_single(p, w, t, segment);
    copy_commit();
    copy_wait<1>();
    __syncwarp();
    if (segment > 0) fetch_double(p, w, t, segment - 1);
    copy_commit();
    if (hidden) {
#pragma unroll
      for (int n = 0; n < N; n++) h[n] = entering[n];
      const Shown shown = {h[0], h[N - 1]};
      publish(t, shown);
      Edges edges = settle(t, shown);
      walk_forward(p, w, t, segment, h, edges, true);
      if (segment > 1)
        get_floats(kept_of(p, w, segment - 1), entering);
      else
#pragma unroll
        for (int n = 0; n < N; n++) entering[n] = 0.f;
    }
    copy_wait<1>();
    __syncwarp();
    walk_back(p, w, t, segment, h, carried);
    __syncwarp();
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_backward(CONSTANT_PARAMS p) {
  const Scan scan = scan_of(p, p.knobs[0]);
  Thread t = thread_of(p, scan, threadIdx.x, (float*)(shared_memory() + blockDim.x / 32 * WARP_BYTES));
  const bool hidden = p.dtaps.data != nullptr || p.dgate.data != nullptr;
  for (int member = 0; member < p.channels / p.groups; member++) {
    const Work w = work_of(p, scan, t, member);
    if (hidden) {
      scan_forward(p, w, t);
    } else {
      fetch_double(p, w, t, segments_of(scan) - 1);
      copy_commit();
    }
    scan_back(p, w, t, hidden);
  }
}
