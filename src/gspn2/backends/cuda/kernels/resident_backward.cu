// Backward of images that stay in shared memory.
//
// The state h and its adjoint g do not depend on each other: each direction is scanned by two warps at the same time,
// one for h, from lam and x, one for g, from gate and dy. What follows from both is no scan and is done by all threads:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,  dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw. lam and logits are read a second time for it, mostly from the second-level cache.
//
// A task is an image and whole tap groups of it; blocks take one after the other. Its directions are shared out to the
// blocks of a cluster, and those of a block to passes, as they fit.
//
// Macro of its own: PASSES, parts of a block's directions, one after the other.
#define LAM_PLANE 0
#define GATE_PLANE RESULT_PLANES
#define UNIT_PLANES (2 * RESULT_PLANES)
#define BACKWARD 1
#include "resident_gradients.cuh"

// The states of one unit in one direction, or their adjoints, in the place of their sources.
template <bool ADJOINT>
__device__ __forceinline__ void scan(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, ADJOINT ? GATE_PLANE : LAM_PLANE, s.reversed != ADJOINT);
  Lane carried;  // from the line before: its state, or what reaches this line
#pragma unroll
  for (int k = 0; k < PACK; k++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) carried[k][v] = 0.f;
  Lane next;
  LineTaps next_taps;
  const auto load = [&]() {
    load_results(c.units, c.unit, next);
    load_taps(c, next_taps);
  };
  load();
  int left = s.lines;
  const auto step = [&](auto restart) {
    Lane source;
#pragma unroll
    for (int k = 0; k < PACK; k++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) source[k][v] = next[k][v];
    const LineTaps taps = next_taps;
    unsigned char* out = c.units;
    advance(c, --left > 0);
    load();
    if (ADJOINT)
      adjoint_of_line<decltype(restart)::value>(taps, held, carried, source);
    else
      state_of_line<decltype(restart)::value>(taps, held, source, carried);
    __syncwarp();
    if (held.writes) store_result(out, c.unit, ADJOINT ? source : carried);
  };
  // A state restarts at the first line of a chunk, an adjoint behind it: backwards, at the last.
  int more = ADJOINT ? (s.lines - 1) % p.chunk : min(p.chunk, left) - 1;
  while (left > 0) {
    if (!ADJOINT) step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
    if (ADJOINT) step(Yes());
    more = ADJOINT ? p.chunk - 1 : min(p.chunk, left) - 1;
  }
}

__device__ __forceinline__ void scan_all(const Params& p, const Memory& m, const Range& range) {
  const int directions = range.last - range.first, scans = 2 * directions;
  for (int item = warp_index(); item < scans * units_of(p); item += THREADS / 32) {
    const int unit = item / scans, d = range.first + item % scans / 2;
    if (item % 2)
      scan<true>(p, m, range, d, unit);
    else
      scan<false>(p, m, range, d, unit);
  }
}

KERNEL(THREADS, BLOCKS) resident_backward(CONSTANT_PARAMS p) {
#if SPLIT > 1
  const int rank = (int)cluster_rank();
#else
  const int rank = 0;
#endif
  #if RECORDS
  Slabs slabs = slabs_of(p, 2 * PASSES);
#endif
  clear_planes(p);

  for (int index = blockIdx.x / SPLIT; index < p.knobs[TASKS]; index += gridDim.x / SPLIT) {
    const Task task = task_of(p, index);
    for (int pass = 0; pass < PASSES; pass++) {
      const Range range = directions_of(rank * PASSES + pass, SPLIT * PASSES);
      const Memory m = memory_of(p, range);
      if (PASSES > 1) clear_planes(p);  // the planes of the pass before lay elsewhere
      const bool first_pass = pass == 0, last_pass = pass + 1 == PASSES;
#if RECORDS
      const bool records = slabs.records != nullptr;
      if (records) {
        for_slabs(p, slabs, [&](const Slab& slab) { unpack(p, m, range, task, slab); });
        if (last_pass) prefetch_task(p, slabs, index + (int)gridDim.x);
      }
#else
      const bool records = false;
#endif
      if (!records) {
        gather(p, m, range, task);
        copy_commit();
        copy_wait<0>();
      }
      __syncthreads();
      scan_all(p, m, range);
      __syncthreads();
#if RECORDS
      if (records)
        for_slabs(p, slabs, [&](const Slab& slab) { gradients(p, m, range, task, slab, first_pass, last_pass); });
#endif
      if (!records) gradients(p, m, range, task, {nullptr, nullptr, nullptr, 0, p.height}, first_pass, last_pass);
      __syncthreads();
    }
#if SPLIT > 1
    if (p.dx.data != nullptr) {
      cluster_barrier();
      sum_blocks(p, task, rank);
      cluster_barrier();
    }
#endif
  }
#if RECORDS
  copy_wait<0>();
#endif
}
