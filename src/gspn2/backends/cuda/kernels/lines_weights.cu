// Weights of all places, of every direction, from logits: once for all channels of a group, instead of once for each.
// The two of the neighbours are left, in 16 bits where tensors have these; the third is what they leave of one.
// Scratch: 1 the weights, [B][D][G][2][H][W].
#include "lines_taps.cuh"

constexpr int SIZE = sizeof(storage_t), VECTOR = 16 / SIZE;

union Vector {
  uint4 all;
  u32 words[4];
};

// Two neighbouring weights (float32: one). Rounding adds at most 2^-12 to one of a place's two and 2^-13 to the other:
// together they may exceed one only if they are `close` to it, and are cut off then.
__device__ __forceinline__ u32 rounded(float first, float second, bool first_close, bool second_close) {
#if STORAGE == 0
  return __float_as_uint(first);
#else
  if (first_close) first = __uint_as_float(__float_as_uint(first) & 0xffffe000u);
  if (second_close) second = __uint_as_float(__float_as_uint(second) & 0xffffe000u);
  const __half2 pair = __floats2half2_rn(first, second);
  return *(const u32*)&pair;
#endif
}

template <bool ORDINARY>
__device__ __forceinline__ void weights_of_vector(Vector& before, Vector& after, const Vector (&logits)[3]) {
  constexpr int PAIR = 4 / SIZE;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Taps w[2];
#pragma unroll
    for (int j = 0; j < PAIR; ++j) {
      const int e = i * PAIR + j;
      const Taps a = {element(logits[0].words, e), element(logits[1].words, e), element(logits[2].words, e)};
      w[j] = weights_of<ORDINARY>(a);
    }
    if (PAIR == 1) w[1] = w[0];
    const bool close[2] = {w[0].here < 0x1p-11f, w[1].here < 0x1p-11f};
    before.words[i] = rounded(w[0].before, w[1].before, close[0], close[1]);
    after.words[i] = rounded(w[0].after, w[1].after, close[0], close[1]);
  }
}

KERNEL(256, 4) lines_weights(CONSTANT_PARAMS p) {
  constexpr u32 FIRST = SIZE < 4 ? 0x0000ffffu : ~0u, LAST = SIZE < 4 ? 0xffff0000u : ~0u;
  const int columns = p.width / VECTOR;
  const int all = p.batch * p.scans * p.groups * p.height * columns;  // less than 2^30: the plan sees to it
  const long long plane = (long long)p.height * p.width;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
    const int line = i / columns, w = (i - line * columns) * VECTOR;
    const int index = line / p.height, h = line - index * p.height;
    const int g = index % p.groups, d = index / p.groups % p.scans, b = index / p.groups / p.scans;
    const storage_t* from = p.taps.data + b * p.taps.b + d * p.taps.d + g * p.taps.c + h * p.taps.h + w;
    Vector logits[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) logits[k].all = __ldcs((const uint4*)(from + k * p.taps.k));
    const bool vertical = p.directions[d] < 2;
    if (vertical && w == 0) logits[0].words[0] = (logits[0].words[0] & ~FIRST) | (MISSING_LOGIT & FIRST);
    if (vertical && w + VECTOR == p.width) logits[2].words[3] = (logits[2].words[3] & ~LAST) | (MISSING_LOGIT & LAST);
    u32 largest = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!vertical && h == 0) logits[0].words[j] = MISSING_LOGIT;
      if (!vertical && h + 1 == p.height) logits[2].words[j] = MISSING_LOGIT;
#pragma unroll
      for (int k = 0; k < 3; ++k) largest = max_halves(largest, logits[k].words[j]);
    }
    Vector before, after;
    if (STORAGE != 0 && ordinary_logits(largest))
      weights_of_vector<true>(before, after, logits);
    else
      weights_of_vector<false>(before, after, logits);
    storage_t* to = (storage_t*)p.scratch[1] + index * 2 * plane + h * p.width + w;
    *(uint4*)to = before.all;
    *(uint4*)(to + plane) = after.all;
  }
}
