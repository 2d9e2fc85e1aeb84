// Backward of images that stay in shared memory.
//
// The state h and its adjoint g do not depend on each other: each direction is scanned by two warps at the same time,
// one for h, from lam and x, one for g, from gate and dy. What follows from both is no scan and is done by all threads:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,  dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw. lam and logits are read a second time for it, mostly from the second-level cache.
//
// A task is an image and whole tap groups of it; blocks take one after the other. Its directions are shared out to the
// blocks of a cluster, and those of a block to passes, as they fit. h takes the place of lam in shared memory, and g that
// of gate.
//
// Macros of its own: PASSES, parts of a block's directions, one after the other; BY_PIXELS (resident_gradients.cuh).
#define LAM_PLANE 0
#define GATE_PLANE RESULT_PLANES
#define UNIT_PLANES (2 * RESULT_PLANES)
#define IMAGES 2
#include "resident_gradients.cuh"

// Scans ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void scan_states(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 0, LAM_PLANE, s.reversed);
  Lane h;
  Line line;
  load_line<HAS_LAM>(c, line);
  int left = s.lines;
  const auto step = [&](auto restart) {
    const Line now = line;
    unsigned char* out = c.units;
    advance(c, --left > 0);
    load_line<HAS_LAM>(c, line);
    state_of_line<HAS_LAM, decltype(restart)::value>(now, held, h);
    __syncwarp();
    if (held.writes) store_result(out, c.unit, h);
  };
  while (left > 0) {
    int more = min(p.chunk, left) - 1;
    step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
  }
}

__device__ __forceinline__ void scan_adjoint(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 1, GATE_PLANE, !s.reversed);
  Lane carried, g;
#pragma unroll
  for (int k = 0; k < PACK; k++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) carried[k][v] = 0.f;
  Line line;
  load_line<HAS_GATE>(c, line);
  int left = s.lines;
  const auto step = [&](auto restart) {
    const Line now = line;
    unsigned char* out = c.units;
    advance(c, --left > 0);
    load_line<HAS_GATE>(c, line);
    adjoint_of_line<HAS_GATE, decltype(restart)::value>(now, held, carried, g);
    __syncwarp();
    if (held.writes) store_result(out, c.unit, g);
  };
  int more = (s.lines - 1) % p.chunk;  // before the restart
  while (left > 0) {
#pragma unroll 2
    for (; more > 0; more--) step(No());
    step(Yes());
    more = p.chunk - 1;
  }
}

__device__ __forceinline__ void scan_all(const Params& p, const Memory& m, const Range& range) {
  const int directions = range.last - range.first, scans = 2 * directions;
  for (int item = warp_index(); item < scans * units_of(p); item += THREADS / 32) {
    const int unit = item / scans, d = range.first + item % scans / 2;
    if (item % 2)
      scan_adjoint(p, m, range, d, unit);
    else
      scan_states(p, m, range, d, unit);
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
      gather_image(p, p.dy, 1, m, task);
#if RECORDS
      const bool records = slabs.records != nullptr;
      if (!RECORD_X || !records) gather_image(p, p.x, 0, m, task);
      if (records)
        for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) { unpack(p, m, range, task, raw, row, rows); });
      else
        gather(p, m, range, task);
#else
      const bool records = false;
      gather_image(p, p.x, 0, m, task);
      gather(p, m, range, task);
      copy_commit();
      copy_wait<0>();
#endif
      __syncthreads();
      scan_all(p, m, range);
      __syncthreads();
#if RECORDS
      if (records)
        for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) {
          const Rows slab = {row, rows, (const storage_t*)raw};
#if BY_PIXELS
          pixel_gradients(p, m, range, task, slab, pass == 0, pass + 1 == PASSES);
#else
          gradients(p, m, range, task, slab, pass == 0, pass + 1 == PASSES);
#endif
        });
#endif
      if (!records) gradients(p, m, range, task, {0, p.height, nullptr}, pass == 0, pass + 1 == PASSES);
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
