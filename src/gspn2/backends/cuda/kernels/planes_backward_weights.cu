// Weights of directions from logits that many channels share: once for all of them. Those of the neighbours,
// in two planes of 16 bits; the third is what they leave of one.
// Knobs: 0 first direction (its index among the scans), 1 elements of a row in scratch memory, 2 directions.
// Scratch: 1 the weights, [directions][B][G][2][H][row].
#include "common.cuh"

static_assert(NORMALIZE && STORAGE == 1, "other weights are read as they are, or are as fine as logits");

constexpr int EACH = 8;

// Two neighbouring weights. Rounding adds at most 2^-12 to one of a place's two and 2^-13 to the other: together they may
// exceed one only if they are `close` to it, and are cut off then.
__device__ __forceinline__ u32 rounded(float first, float second, bool first_close, bool second_close) {
  if (first_close) first = __uint_as_float(__float_as_uint(first) & 0xffffe000u);
  if (second_close) second = __uint_as_float(__float_as_uint(second) & 0xffffe000u);
  const __half2 pair = __floats2half2_rn(first, second);
  return (u32)__half_as_ushort(__low2half(pair)) | (u32)__half_as_ushort(__high2half(pair)) << 16;
}

KERNEL(256, 4) planes_backward_weights(CONSTANT_PARAMS p) {
  const int columns = p.width / EACH, pitch = p.knobs[1], images = p.batch * p.groups;
  const long long all = (long long)p.knobs[2] * images * p.height * columns, plane = (long long)p.height * pitch;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += (long long)gridDim.x * blockDim.x) {
    const long long line = i / columns;
    const int left = (int)(i - line * columns) * EACH, number = (int)(line / p.height);
    const int h = (int)(line - (long long)number * p.height), d = p.knobs[0] + number / images;
    const int b = number % images / p.groups, g = number % p.groups;
    const Scan scan = scan_of(p, d);
    const storage_t* from = p.taps.data + (b * p.taps.b + d * p.taps.d + g * p.taps.c + h * p.taps.h + left);
    uint4 logits[3];
#pragma unroll
    for (int k = 0; k < 3; k++) logits[k] = __ldcs((const uint4*)(from + k * p.taps.k));
    u32 before[4], after[4];
#pragma unroll
    for (int word = 0; word < 4; word++) {
      Taps w[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const auto logit = [&](int k) {
          const u32 words[4] = {logits[k].x, logits[k].y, logits[k].z, logits[k].w};
          return __uint_as_float(j ? words[word] & 0xffff0000u : words[word] << 16);
        };
        const int place = scan.vertical ? left + 2 * word + j : h;
        w[j] = tap_weights({logit(0), logit(1), logit(2)}, place > 0, place + 1 < scan.places);
      }
      const bool close[2] = {w[0].here < 0x1p-11f, w[1].here < 0x1p-11f};
      before[word] = rounded(w[0].before, w[1].before, close[0], close[1]);
      after[word] = rounded(w[0].after, w[1].after, close[0], close[1]);
    }
    storage_t* to = (storage_t*)p.scratch[1] + 2 * number * plane + (long long)h * pitch + left;
    *(uint4*)to = make_uint4(before[0], before[1], before[2], before[3]);
    *(uint4*)(to + plane) = make_uint4(after[0], after[1], after[2], after[3]);
  }
}
