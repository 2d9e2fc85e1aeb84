// Backward of small images of two channels with shared taps, as dense records (resident_pair.cuh).
//
// The state h and its adjoint g do not depend on each other: each is scanned by warps of its own at the same time,
// h from lam x, g from gate dy. What follows from both is no scan and is done by the threads that have these pixels:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,
//   dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw. There are lam and gate, every gradient is asked for, and dx, dlam, dgate and
// dtaps are dense, aligned to the vectors that are written here.
//
// Whole cache lines are written faster than pieces of them: gradients of a first pass wait in scratch memory, written
// as threads lie and so in whole lines, until the second writes those of all directions.
//
// Scratch: 0 (two passes) [block][round][WAITING][thread] words
#define BACKWARD 1
#include "resident_pair.cuh"

#define TAP_GRADIENTS (3 * PART / 2)         // words of a pixel in a pass
#define WAITING (2 * PART + TAP_GRADIENTS)   // of a pixel's gradients of a pass

// What a pixel keeps for its gradients while the directions of a pass are scanned.
struct Kept {
  u32 x, dy, lam[PART], taps[TAP_GRADIENTS];  // taps: see `weigh`
};

// Puts this thread's pixel of a round in order.
__device__ __forceinline__ Kept unpack(const Params& p, Stream& s, unsigned char* shared, int b, int round, int first,
                                       const Spots& origin) {
  const Pixel pixel = pixel_of(p, round);
  const Operands o = read_pixel(p, s, b, pixel, round, first);
  const Spots spots = spots_of(p, origin, first, round);
  u32 weights[PART];
  Kept kept;
  weigh(o, spots, weights, kept.taps);
  kept.x = o.x, kept.dy = o.dy;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Axis axis = axis_at(p, first, k);
    const Spot& spot = spots.of[k];
    unsigned char* planes = shared + planes_at(p, first, k);
    if (pixel.inside) {
      *(float2*)(planes + spot.pair) = product<true>(o.x, o.lam[k]);
      *(float2*)(planes + plane_of(axis) + spot.pair) = product<true>(o.dy, o.gate[k]);
      *(u32*)(planes + 2 * plane_of(axis) + spot.weight) = weights[k];
    }
    kept.lam[k] = o.lam[k];
  }
  return kept;
}

// Does direction `first` + k restart at this line?
__device__ __forceinline__ bool restarts(const Params& p, const Axis& axis, bool reversed, int line) {
  const int i = reversed ? axis.lines - 1 - line : line;
  return CHUNKED ? i == quotient(i, chunk_of(p)) * p.chunk : i == 0;
}

// Gradients of the logits from those of the weights, which are kept as a word; `has`: the neighbours that have a part.
__device__ __forceinline__ Taps logit_gradients(const Kept& kept, int k, u32 weights, const Taps& dw, bool has_before,
                                                bool has_here, bool has_after) {
#if STORAGE == 1
  const auto rest = [&](int e) {
    const float2 pair = __half22float2(*(const __half2*)&kept.taps[e / 2]);
    return e % 2 ? pair.y : pair.x;
  };
  const Taps w = unpack_taps(weights);
  const float mean = w.before * dw.before + w.here * dw.here + w.after * dw.after;
  const Taps da = {w.before * (dw.before - mean) * rest(3 * k), w.here * (dw.here - mean) * rest(3 * k + 1),
                   w.after * (dw.after - mean) * rest(3 * k + 2)};
#else
  const Taps da = tap_gradient(logits_of(kept.taps, k), dw, has_before, has_after);
#endif
  return {has_before ? da.before : 0.f, has_here ? da.here : 0.f, has_after ? da.after : 0.f};
}

// Of one direction: dlam and dgate as words, dx added to a sum, and the gradients of the taps.
__device__ __forceinline__ Taps direction_gradients(const Params& p, const unsigned char* shared, int first, int k,
                                                    const Spot& spot, const Kept& kept, u32& dlam, u32& dgate,
                                                    float (&dx)[2]) {
  const Axis axis = axis_at(p, first, k);
  const Neighbours to = neighbours_of(axis, spot);
  const bool reversed = reversed_at(first, k), restart = restarts(p, axis, reversed, spot.line);
  const unsigned char* planes = shared + planes_at(p, first, k);
  const unsigned char* h = planes + spot.pair;
  const unsigned char* previous = h + (restart ? 0 : 8 * (reversed ? axis.pitch : -axis.pitch));
  const float2 state = *(const float2*)h, g = *(const float2*)(h + plane_of(axis));
  // Of a neighbour that is missing, the state here: its weight is 0.
  const float2 before = *(const float2*)(previous + to.before), here = *(const float2*)previous,
               after = *(const float2*)(previous + to.after);
  const Taps dw = {fmaf(g.y, before.y, g.x * before.x), fmaf(g.y, here.y, g.x * here.x),
                   fmaf(g.y, after.y, g.x * after.x)};
  dlam = narrow_pair(g.x * widen_low(kept.x), g.y * widen_high(kept.x));
  dgate = narrow_pair(state.x * widen_low(kept.dy), state.y * widen_high(kept.dy));
  dx[0] = fmaf(widen_low(kept.lam[k]), g.x, dx[0]);
  dx[1] = fmaf(widen_high(kept.lam[k]), g.y, dx[1]);
  const u32 weights = *(const u32*)(planes + 2 * plane_of(axis) + spot.weight);
  return logit_gradients(kept, k, weights, dw, spot.before && !restart, !restart, spot.after && !restart);
}

// Gradients of a pixel in the directions of a pass, rounded.
struct Gradients {
  u32 dlam[PART], dgate[PART], dtaps[TAP_GRADIENTS];

  __device__ __forceinline__ u32& word(int i) {
    return i < PART ? dlam[i] : i < 2 * PART ? dgate[i - PART] : dtaps[i - 2 * PART];
  }
};

__device__ __forceinline__ Gradients gradients_of(const Params& p, const unsigned char* shared, int round, int first,
                                                  const Spots& origin, const Kept& kept, float (&dx)[2]) {
  const Spots spots = spots_of(p, origin, first, round);
  Gradients out;
  float dtaps[3 * PART];
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Taps da = direction_gradients(p, shared, first, k, spots.of[k], kept, out.dlam[k], out.dgate[k], dx);
    dtaps[3 * k] = da.before, dtaps[3 * k + 1] = da.here, dtaps[3 * k + 2] = da.after;
  }
#pragma unroll
  for (int i = 0; i < TAP_GRADIENTS; i++) out.dtaps[i] = narrow_pair(dtaps[2 * i], dtaps[2 * i + 1]);
  return out;
}

// Where this thread's gradients of the first pass wait.
__device__ __forceinline__ u32* waiting_at(const Params& p, int round) {
  return (u32*)p.scratch[0] + ((long long)blockIdx.x * ROUNDS + round) * (WAITING * THREADS) + threadIdx.x;
}

template <int WORDS>
__device__ __forceinline__ void store_vector(u32* p, const u32 (&w)[WORDS]) {
  if constexpr (WORDS == 4)
    *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
  else
    *(uint2*)p = make_uint2(w[0], w[1]);
}

// Words of all lanes of the warp as they lie in memory: pixel after pixel, WORDS of each.
template <int WORDS>
__device__ __forceinline__ void store_run(u32* to, u32* buffer, const u32 (&w)[WORDS], int pixels) {
  constexpr int SIZE = WORDS % 2 ? 1 : 2;  // words at a time
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < WORDS; i += SIZE) {
    if constexpr (SIZE == 2)
      *(uint2*)(buffer + lane * WORDS + i) = make_uint2(w[i], w[i + 1]);
    else
      buffer[lane * WORDS + i] = w[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < WORDS; i += SIZE) {
    const int word = 32 * i + SIZE * lane;
    if (!FULL && word >= pixels * WORDS) continue;
    if constexpr (SIZE == 2)
      *(uint2*)(to + word) = *(const uint2*)(buffer + word);
    else
      to[word] = buffer[word];
  }
  __syncwarp();
}

// Gradients of this thread's pixel of a round, of all passes.
__device__ __forceinline__ void store_gradients(const Params& p, unsigned char* shared, int b, int round,
                                                Gradients (&of)[PASSES]) {
  const Pixel pixel = pixel_of(p, round);
  u32 dlam[SCANS], dgate[SCANS], dtaps[3 * SCANS / 2];
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
    for (int k = 0; k < PART; k++) dlam[pass * PART + k] = of[pass].dlam[k], dgate[pass * PART + k] = of[pass].dgate[k];
#pragma unroll
    for (int i = 0; i < TAP_GRADIENTS; i++) dtaps[pass * TAP_GRADIENTS + i] = of[pass].dtaps[i];
  }
  const long long image = (long long)b * pixels_of(p) * SCANS;
  if (pixel.inside) {
    store_vector((u32*)p.dlam.data + image + pixel.index * SCANS, dlam);
    store_vector((u32*)p.dgate.data + image + pixel.index * SCANS, dgate);
  }
  u32* buffer = (u32*)(shared + p.knobs[SUMS_AT]) + (int)threadIdx.x / 32 * (BUNDLE * 3 * SCANS / 2);
  const int begin = round * THREADS + ((int)threadIdx.x & ~31);
  store_run((u32*)p.dtaps.data + image / 2 * 3 + begin * (3 * SCANS / 2), buffer, dtaps, pixels_of(p) - begin);
}

// The gradients of this thread's pixel of a round, in the directions of a pass: to scratch, or with the others.
__device__ __forceinline__ void gradients(const Params& p, unsigned char* shared, int b, int round, int first,
                                          const Spots& origin, const Kept& kept, float (&dx)[2]) {
  Gradients of[PASSES];
#if PASSES > 1
  u32* waiting = waiting_at(p, round);
  if (first > 0)
#pragma unroll
    for (int i = 0; i < WAITING; i++) of[0].word(i) = waiting[i * THREADS];
  of[1] = gradients_of(p, shared, round, first, origin, kept, dx);
  if (first == 0) {
#pragma unroll
    for (int i = 0; i < WAITING; i++) waiting[i * THREADS] = of[1].word(i);
    return;
  }
#else
  of[0] = gradients_of(p, shared, round, first, origin, kept, dx);
#endif
  store_gradients(p, shared, b, round, of);
}

__device__ __forceinline__ void scan_all(const Params& p, unsigned char* shared, int warp, int first) {
#pragma unroll 1
  for (int item = warp; item < 2 * PART; item += THREADS / 32) {
    const int k = item % PART, plane = plane_of(axis_at(p, first, k));
    unsigned char* planes = shared + planes_at(p, first, k);
    if (item < PART)
      scan_pair<false>(p, first + k, planes, planes + 2 * plane);
    else
      scan_pair<true>(p, first + k, planes + plane, planes + 2 * plane);
  }
}

KERNEL(THREADS, BLOCKS) resident_pair_backward(CONSTANT_PARAMS p) {
  unsigned char* shared = held_shared_memory();
  const int warp = warp_index();
  Stream stream = stream_of(p, shared);
  for (int b = blockIdx.x; b < p.knobs[TASKS]; b += gridDim.x) {
    float dx[ROUNDS][2];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) dx[round][0] = dx[round][1] = 0.f;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      const int first = pass * PART;
      clear_planes(p, shared);
      Kept kept[ROUNDS];
      Spots origin = origin_of(p, first);
#pragma unroll
      for (int round = 0; round < ROUNDS; round++) {
        if (has_round(p, round))
          kept[round] = unpack(p, stream, shared, b, round, first, origin);
        else
          skip_pixel(p, stream, round);
      }
      __syncthreads();
      scan_all(p, shared, warp, first);
      __syncthreads();
      origin = origin_of(p, first);
#pragma unroll
      for (int round = 0; round < ROUNDS; round++)
        if (has_round(p, round)) gradients(p, shared, b, round, first, origin, kept[round], dx[round]);
      __syncthreads();
    }
    u32* out = (u32*)p.dx.data + (long long)b * pixels_of(p);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int index = round * THREADS + threadIdx.x;
      if (index < pixels_of(p)) out[index] = narrow_pair(dx[round][0], dx[round][1]);
    }
  }
  copy_wait<0>();
}
