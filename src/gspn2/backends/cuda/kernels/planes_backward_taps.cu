// Gradients of shared taps of one direction from those of their weights: parts that channels left in scratch memory, or
// the sums that chains of them did, summed in order.
// Knobs: 0 direction (its index among the scans), 1 parts, 2 elements of a row in scratch memory.
// Scratch: 2 the parts, [parts][B][G][3][H][row].
#include "common.cuh"

constexpr int EACH = 4;  // neighbouring columns of a thread: rows are whole vectors of 16 bytes, of any storage

struct alignas(EACH * sizeof(storage_t)) Stored {
  storage_t v[EACH];
};

// The gradients of the three weights of EACH places.
struct Gradients {
  float v[3][EACH];

  __device__ __forceinline__ void add(const float* part, long long plane) {
#pragma unroll
    for (int k = 0; k < 3; k++) {
      const float4 f = __ldcs((const float4*)(part + k * plane));
      v[k][0] += f.x, v[k][1] += f.y, v[k][2] += f.z, v[k][3] += f.w;
    }
  }
};

// By functions that store vectors: other stores of them may be taken apart by the compiler.
__device__ __forceinline__ void store(storage_t* to, const float (&v)[EACH]) {
#if STORAGE == 0
  __stcs((float4*)to, make_float4(v[0], v[1], v[2], v[3]));
#else
  u32 half[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++)
#if STORAGE == 1
    half[e] = __bfloat16_as_ushort(narrow(v[e]));
#else
    half[e] = __half_as_ushort(narrow(v[e]));
#endif
  __stcs((uint2*)to, make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16));
#endif
}

KERNEL(256, 3) planes_backward_taps(CONSTANT_PARAMS p) {
  const Scan scan = scan_of(p, p.knobs[0]);
  const int d = p.knobs[0], parts = p.knobs[1], pitch = p.knobs[2], columns = p.width / EACH;
  const long long plane = (long long)p.height * pitch, planes = (long long)p.batch * p.groups;
  const long long all = planes * p.height * columns, stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += stride) {
    const long long line = i / columns;
    const int w = (int)(i - line * columns) * EACH, index = (int)(line / p.height);
    const int h = (int)(line - (long long)index * p.height);
    const float* part = (const float*)p.scratch[2] + index * 3 * plane + (long long)h * pitch + w;
    Gradients dw = {};
    for (int k = 0; k < parts; k += SUM_RUN) {
      Gradients run = {};
#pragma unroll 2
      for (int l = k; l < min(parts, k + SUM_RUN); l++, part += planes * 3 * plane) run.add(part, plane);
#pragma unroll
      for (int t = 0; t < 3; t++)
#pragma unroll
        for (int e = 0; e < EACH; e++) dw.v[t][e] += run.v[t][e];
    }
    const int b = index / p.groups, g = index % p.groups;
    const storage_t* a = p.taps.data + (b * p.taps.b + d * p.taps.d + g * p.taps.c + h * p.taps.h + w);
    storage_t* out = p.dtaps.data + (b * p.dtaps.b + d * p.dtaps.d + g * p.dtaps.c + h * p.dtaps.h + w);
    const Stored taps[3] = {*(const Stored*)a, *(const Stored*)(a + p.taps.k), *(const Stored*)(a + 2 * p.taps.k)};
    float result[3][EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int place = scan.vertical ? w + e : h;
      const Taps logits = {widen(taps[0].v[e]), widen(taps[1].v[e]), widen(taps[2].v[e])};
      const Taps of_weights = {dw.v[0][e], dw.v[1][e], dw.v[2][e]};
      const Taps da = tap_gradient(logits, of_weights, place > 0, place + 1 < scan.places);
      result[0][e] = da.before, result[1][e] = da.here, result[2][e] = da.after;
    }
#pragma unroll
    for (int k = 0; k < 3; k++) store(out + k * p.dtaps.k, result[k]);
  }
}
