// What the clusters of strips_forward scan: of each a row of planes with their first and last tile, each after the other.
// Knobs as of strips_forward; 3 numbers of a row.
#include "strips_runs.cuh"

KERNEL(32, 1) runs(CONSTANT_PARAMS p) {
  if (threadIdx.x > 0) return;
  const Runs it = runs_of(p, (int)blockIdx.x);
  float* row = p.y.data + (long long)blockIdx.x * p.knobs[3];
  for (int i = 0; i < it.count(); ++i) {
    const Run run = it.run(i);
    row[3 * i] = (float)run.plane, row[3 * i + 1] = (float)run.first, row[3 * i + 2] = (float)run.end;
  }
}
