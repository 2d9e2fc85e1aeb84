// Forward over planes, a line a block: see lines.cuh.
#include "lines_horizontal.cuh"
#include "lines_vertical.cuh"

#if HPIECE
template <bool REVERSED>
__device__ __forceinline__ void scan_horizontal(const Params& p, const Scan& scan, const Plane& plane, int rank,
                                                int exchanges) {
  HorizontalScan<REVERSED> run{p, plane};
  run.run(scan, rank, exchanges);
}
#endif

KERNEL(THREADS, BLOCKS) lines_forward(CONSTANT_PARAMS p) {
#if CLUSTER > 1
  const int rank = (int)cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < HALO_BARRIERS; ++i) mbarrier_init(halo_barriers() + i, 1);
    mbarrier_init_fence();
  }
  cluster_barrier();
#else
  const int rank = 0;
#endif
  const int planes = p.batch * p.channels / CHANNELS, share = p.knobs[0];
  const int first = (int)blockIdx.x / CLUSTER * share, count = min(share, planes - first);
#if PAIR
  const Scan scan = scan_of(p, p.knobs[4 + rank]);
  for (int q = 0; q < count; ++q) {
    VerticalScan run{p, plane_of(p, first + q, p.knobs[4 + rank], false, false)};
    run.run(scan, rank, 0);
    __syncthreads();
  }
#else
  [[maybe_unused]] int exchanges = 0;  // of states between blocks, so far
  const int scans = p.knobs[3];
  for (int i = 0; i < scans; ++i) {
    const int d = p.knobs[4 + i];
    const Scan scan = scan_of(p, d);
    const bool adds = i > 0 || p.knobs[8], last = i + 1 == scans && p.knobs[9];
    if (scan.vertical) {
#if VPLACES
      for (int q = VSPLIT ? 0 : rank; q < count; q += VSPLIT ? 1 : CLUSTER) {
        VerticalScan run{p, plane_of(p, first + q, d, adds, last)};
        run.run(scan, rank, exchanges);
        if (VSPLIT) exchanges += exchanges_in(scan.lines);
        __syncthreads();
      }
#endif
    } else {
#if HPIECE
      for (int q = 0; q < count; ++q) {
        const Plane plane = plane_of(p, first + q, d, adds, last);
        if (scan.reversed)
          scan_horizontal<true>(p, scan, plane, rank, exchanges);
        else
          scan_horizontal<false>(p, scan, plane, rank, exchanges);
        exchanges += exchanges_in(scan.lines);
        __syncthreads();
      }
#endif
    }
    wait_for_everybody();
  }
#endif
}
