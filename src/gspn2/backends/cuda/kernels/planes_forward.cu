// Forward over planes (columns adjacent in memory): a block, or a cluster of blocks that share its lines, scans one
// plane or several of one tap group, one direction after another. The sum over directions is kept in float32 and
// rounded into y by the last one.
#include "planes_horizontal.cuh"
#include "planes_vertical.cuh"

KERNEL(THREADS, BLOCKS) planes_forward(CONSTANT_PARAMS p) {
  Worker t = worker(p);
#if BULK
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) mbarrier_init((u64*)shared_memory() + s, blockDim.x / 32);
    mbarrier_init_fence();
  }
  __syncthreads();
#endif
  for (int d = 0; d < p.scans; ++d) {
    const Scan scan = scan_of(p, d);
    // Everybody is done with the ring, and the sums of the direction before are written.
    if (SUMS && d > 0) {
      if (BULK) copy_engine_fence();
      barrier(true);
    }
#if VERTICAL
    if (scan.vertical) scan_vertical<VERTICAL>(p, t, scan, d);
#endif
#if HORIZONTAL
    if (!scan.vertical) {
      if (scan.reversed)
        scan_horizontal<HORIZONTAL, true>(p, t, scan, d);
      else
        scan_horizontal<HORIZONTAL, false>(p, t, scan, d);
    }
#endif
  }
}
