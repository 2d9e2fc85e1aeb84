// Flags of strips_runs.cuh, all 0 before strips_forward looks at them.
// Knobs: 0 their number. Scratch: 1 the flags.
#include "common.cuh"

KERNEL(256, 1) strips_start(CONSTANT_PARAMS p) {
  u32* flags = (u32*)p.scratch[1];
  for (int i = (int)threadIdx.x; i < p.knobs[0]; i += 256) flags[i] = 0;
}
