// Forward over planes, a line a block: see lines.cuh.
#include "lines_horizontal.cuh"
#include "lines_vertical.cuh"

#if HPIECE
template <bool REVERSED>
__device__ __forceinline__ void scan_horizontal(const Params& p, const Scan& scan, int plane, int d, int rank,
                                                int exchanges) {
  HorizontalScan<REVERSED> run{p, plane_of(p, plane, d)};
  run.run(scan, rank, exchanges);
}
#endif

KERNEL(THREADS, BLOCKS) lines_forward(CONSTANT_PARAMS p) {
#if CLUSTER > 1
  const int rank = (int)cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) mbarrier_init(halo_barriers() + i, 1);
    mbarrier_init_fence();
  }
  cluster_barrier();
#else
  const int rank = 0;
#endif
  const int planes = p.batch * p.channels / CHANNELS, share = p.knobs[0];
  const int first = (int)blockIdx.x / CLUSTER * share, count = min(share, planes - first);
  [[maybe_unused]] int exchanges = 0;  // of states between blocks, so far
  for (int d = 0; d < p.scans; ++d) {
    const Scan scan = scan_of(p, d);
    if (scan.vertical) {
#if VPLACES
      for (int q = VSPLIT ? 0 : rank; q < count; q += VSPLIT ? 1 : CLUSTER) {
        VerticalScan run{p, plane_of(p, first + q, d)};
        run.run(scan, rank, exchanges);
        if (VSPLIT) exchanges += exchanges_in(scan.lines);
        __syncthreads();
      }
#endif
    } else {
#if HPIECE
      for (int q = 0; q < count; ++q) {
        if (scan.reversed)
          scan_horizontal<true>(p, scan, first + q, d, rank, exchanges);
        else
          scan_horizontal<false>(p, scan, first + q, d, rank, exchanges);
        exchanges += exchanges_in(scan.lines);
        __syncthreads();
      }
#endif
    }
    wait_for_everybody();
  }
}
