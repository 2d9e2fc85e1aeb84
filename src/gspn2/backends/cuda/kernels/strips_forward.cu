// Forward, right or left over large planes: see strips.cuh.
#include "strips_copy.cuh"
#include "strips_scan.cuh"

template <bool REVERSED>
__device__ __forceinline__ void scan_strip(const Params& p, const Runs& runs, unsigned char* ring, Strip& strip,
                                           int cluster) {
  Scanner<REVERSED> scanner{p, runs, ring, strip};
  scanner.start(p.knobs[1]);
  scanner.scan(cluster);
}

KERNEL(THREADS, BLOCKS) strips_forward(CONSTANT_PARAMS p) {
  const int rank = CLUSTER > 1 ? (int)cluster_rank() : 0, own = p.knobs[1];
  const int cluster = (int)blockIdx.x / CLUSTER;
  unsigned char* ring = held_shared_memory() + Shared::BYTES;
  // The same for all lanes, and the compiler knows.
  const int warp = (int)__shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const Rows rows = rows_of(p, own, rank);
  const Copier copier = copier_of(p, rows, ring, (int)threadIdx.x - 32 * STRIPS);
  Strip strip = strip_of(p, own, rank);
  if (threadIdx.x == 0) Shared::start_barriers();
  const bool copies = warp >= STRIPS;
  if (copies) copier.clear();
  // Rows are clear, and barriers of neighbours are there before anybody sends.
  wait_for_everybody();
  const Runs runs = runs_of(p, cluster);
  if (copies)
    copier.run(runs);
  else if (runs.reversed)
    scan_strip<true>(p, runs, ring, strip, cluster);
  else
    scan_strip<false>(p, runs, ring, strip, cluster);
  // A neighbour may still send states.
  wait_for_everybody();
}
