// The instruction that strips, and resident_alone.cuh, need beside those of ptx.cuh.
#pragma once
#include "ptx.cuh"

#ifndef GSPN2_EMULATE
// sum + a b where `there`, else sum: in place, where a select would stand between the product and who waits
// for it.
__device__ __forceinline__ float fma_where(bool there, float a, float b, float sum) {
  asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p fma.rn.f32 %0, %1, %2, %0;\n}\n"
      : "+f"(sum)
      : "f"(a), "f"(b), "r"((int)there));
  return sum;
}
#endif
