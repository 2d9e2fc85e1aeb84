// Flags of planes_backward_chain.cuh, all 0 before the first launch that looks at them.
// Knobs: 0 their number, 1 the first one. Scratch: 1 the flags, after weights.
#include "common.cuh"

KERNEL(256, 1) planes_backward_start(CONSTANT_PARAMS p) {
  const int stride = (int)(gridDim.x * blockDim.x);
  u32* flags = (u32*)p.scratch[1] + p.knobs[1];
  for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < p.knobs[0]; i += stride) flags[i] = 0;
}
