// Forward, right or left over large planes: see strips.cuh.
#include "strips_copy.cuh"
#include "strips_scan.cuh"

template <bool REVERSED>
__device__ __forceinline__ void scan_strip(const Params& p, const Tiles& tiles, unsigned char* ring,
                                           Strip& strip) {
  Scanner<REVERSED> scanner{p, tiles, ring, strip};
  scanner.start(p.knobs[1]);
  scanner.run();
}

KERNEL(THREADS, BLOCKS) strips_forward(CONSTANT_PARAMS p) {
  const int rank = CLUSTER > 1 ? (int)cluster_rank() : 0, own = p.knobs[1];
  const int clusters = p.knobs[0], planes = p.batch * p.channels, first = (int)blockIdx.x / CLUSTER;
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
  const int each = (p.width + COLUMNS - 1) / COLUMNS, count = (planes - first + clusters - 1) / clusters;
  const Tiles tiles{p.width, each, first, clusters, count, scan_of(p, 0).reversed};
  if (copies)
    copier.run(tiles);
  else if (tiles.reversed)
    scan_strip<true>(p, tiles, ring, strip);
  else
    scan_strip<false>(p, tiles, ring, strip);
  // A neighbour may still send states.
  wait_for_everybody();
}
