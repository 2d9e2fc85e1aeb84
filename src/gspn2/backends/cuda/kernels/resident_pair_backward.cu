// Backward of small images of two channels with shared taps, as dense records (resident_pair.cuh).
//
// The state h and its adjoint g do not depend on each other: each is scanned by warps of its own at the same time, h from
// lam x, g from gate dy. What follows from both is no scan and is done by the threads that have these pixels:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,  dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw. There are lam and gate, every gradient is asked for, and dx, dlam, dgate and dtaps are
// dense, aligned to the vectors that are written here.
#define BACKWARD 1
#define PLANES 5
#include "resident_pair.cuh"

#define TAP_GRADIENTS (3 * PART / 2)  // words of a pixel in a pass

// What a pixel keeps for its gradients while the directions of a pass are scanned.
struct Kept {
  u32 x, dy, lam[PART], taps[TAP_GRADIENTS];
};

// Puts this thread's pixel of a round in order.
__device__ __forceinline__ Kept unpack(const Params& p, Stream& s, unsigned char* shared, int b, int round, int first) {
  const Pixel pixel = pixel_of(p, round);
  const Operands o = read_pixel(p, s, b, pixel, first);
  u32 weights[PART];
  weigh(p, o, pixel, first, weights);
  Kept kept;
  kept.x = o.x, kept.dy = o.dy;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Axis axis = axis_at(p, first, k);
    unsigned char* out = shared + spot_of(axis, pixel).offset + planes_at(p, first, k);
    if (pixel.inside) {
      put_product<true>(out, axis.plane, o.x, o.lam[k]);
      put_product<true>(out + 2 * axis.plane, axis.plane, o.dy, o.gate[k]);
      *(u32*)(out + TAP_PLANE * axis.plane) = weights[k];
    }
    kept.lam[k] = o.lam[k];
  }
#pragma unroll
  for (int i = 0; i < TAP_GRADIENTS; i++) kept.taps[i] = o.taps[i];
  return kept;
}

// Does direction `first` + k restart at this line?
__device__ __forceinline__ bool restarts(const Params& p, const Axis& axis, bool reversed, int line) {
  const int i = reversed ? axis.lines - 1 - line : line;
  return p.chunk < axis.lines ? i == quotient(i, chunk_of(p)) * p.chunk : i == 0;
}

// Of one direction: dlam and dgate as words, dx added to a sum, and the gradients of the taps.
__device__ __forceinline__ Taps direction_gradients(const Params& p, const unsigned char* shared, int first, int k,
                                                    const Pixel& pixel, const Kept& kept, u32& dlam, u32& dgate, float (&dx)[2]) {
  const Axis axis = axis_at(p, first, k);
  const Spot spot = spot_of(axis, pixel);
  const bool reversed = direction_at(first + k) & 1, restart = restarts(p, axis, reversed, spot.line);
  const int before = spot.before ? -4 : 0, after = spot.after ? 4 : 0;
  const unsigned char* h = shared + spot.offset + planes_at(p, first, k);
  const unsigned char* previous = h + (restart ? 0 : reversed ? axis.pitch : -axis.pitch);
  float g[2];
  Taps dw = {0.f, 0.f, 0.f};
#pragma unroll
  for (int c = 0; c < 2; c++) {
    g[c] = *(const float*)(h + (2 + c) * axis.plane);
    dw.before = fmaf(g[c], *(const float*)(previous + c * axis.plane + before), dw.before);
    dw.here = fmaf(g[c], *(const float*)(previous + c * axis.plane), dw.here);
    dw.after = fmaf(g[c], *(const float*)(previous + c * axis.plane + after), dw.after);
  }
  dlam = narrow_pair(g[0] * widen_low(kept.x), g[1] * widen_high(kept.x));
  dgate = narrow_pair(*(const float*)h * widen_low(kept.dy), *(const float*)(h + axis.plane) * widen_high(kept.dy));
  dx[0] = fmaf(widen_low(kept.lam[k]), g[0], dx[0]);
  dx[1] = fmaf(widen_high(kept.lam[k]), g[1], dx[1]);
  const Taps da = gradient_of(h + TAP_PLANE * axis.plane, 0, logits_of(kept.taps, k), dw, spot.before, spot.after);
  return {restart ? 0.f : da.before, restart ? 0.f : da.here, restart ? 0.f : da.after};
}

__device__ __forceinline__ void store_vector(u32* p, const u32 (&w)[PART]) {
#if PART == 4
  *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
#else
  *(uint2*)p = make_uint2(w[0], w[1]);
#endif
}

// Gradients of an image and a pass; `buffer`: of this warp.
struct Outputs {
  u32 *dlam, *dgate, *dtaps, *buffer;
};

__device__ __forceinline__ Outputs outputs_of(const Params& p, unsigned char* shared, int b, int first) {
  const long long pixels = (long long)b * pixels_of(p) * SCANS + first;
  return {(u32*)p.dlam.data + pixels, (u32*)p.dgate.data + pixels, (u32*)p.dtaps.data + pixels / 2 * 3,
          (u32*)(shared + p.knobs[SUMS_AT]) + (int)threadIdx.x / 32 * (BUNDLE * TAP_GRADIENTS)};
}

// The gradients of this thread's pixel of a round, in the directions of a pass. dtaps go through a buffer of the warp, so
// that neighbouring words are written together.
__device__ __forceinline__ void gradients(const Params& p, const unsigned char* shared, const Outputs& out, int round, int first,
                                          const Kept& kept, float (&dx)[2]) {
  const Pixel pixel = pixel_of(p, round);
  const int lane = threadIdx.x & 31, begin = pixel.index - lane;
  u32 dlam[PART], dgate[PART];
  float dtaps[3 * PART];
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Taps da = direction_gradients(p, shared, first, k, pixel, kept, dlam[k], dgate[k], dx);
    dtaps[3 * k] = da.before, dtaps[3 * k + 1] = da.here, dtaps[3 * k + 2] = da.after;
  }
  if (pixel.inside) {
    store_vector(out.dlam + pixel.index * SCANS, dlam);
    store_vector(out.dgate + pixel.index * SCANS, dgate);
  }
#pragma unroll
  for (int i = 0; i < TAP_GRADIENTS; i++) out.buffer[lane * TAP_GRADIENTS + i] = narrow_pair(dtaps[2 * i], dtaps[2 * i + 1]);
  __syncwarp();
  u32* to = out.dtaps + begin * (3 * SCANS / 2);
  const int words = (pixels_of(p) - begin) * TAP_GRADIENTS;
#pragma unroll
  for (int i = 0; i < TAP_GRADIENTS; i++) {
    // Word k of pixel q of the pass is word PASSES (TAP_GRADIENTS q + k) - (PASSES - 1) k of all.
    const int word = 32 * i + lane;
    if (word < words) to[PASSES * word - (PASSES - 1) * (word % TAP_GRADIENTS)] = out.buffer[word];
  }
  __syncwarp();
}

__device__ __forceinline__ void scan_all(const Params& p, unsigned char* shared, int warp, int first) {
#pragma unroll 1
  for (int item = warp; item < PART * 4 / PACK; item += THREADS / 32) {
    const int k = item % PART, source = item / PART * PACK, plane = axis_at(p, first, k).plane;
    unsigned char* planes = shared + planes_at(p, first, k);
    if (source < 2)
      scan<false>(p, first + k, planes + source * plane, planes + TAP_PLANE * plane);
    else
      scan<true>(p, first + k, planes + source * plane, planes + TAP_PLANE * plane);
  }
}

KERNEL(THREADS, BLOCKS) resident_pair_backward(CONSTANT_PARAMS p) {
  unsigned char* shared = held_shared_memory();
  const int warp = warp_index();
  Stream stream = stream_of(p, shared);
  prefetch_task(p, (int)blockIdx.x);
  for (int b = blockIdx.x; b < p.knobs[TASKS]; b += gridDim.x) {
    float dx[ROUNDS][2];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) dx[round][0] = dx[round][1] = 0.f;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      const int first = pass * PART;
      clear_planes(p, shared);
      Kept kept[ROUNDS];
#pragma unroll
      for (int round = 0; round < ROUNDS; round++)
        if (has_round(p, round)) kept[round] = unpack(p, stream, shared, b, round, first);
      if (pass + 1 == PASSES) prefetch_task(p, b + (int)gridDim.x);
      __syncthreads();
      scan_all(p, shared, warp, first);
      __syncthreads();
      const Outputs out = outputs_of(p, shared, b, first);
#pragma unroll
      for (int round = 0; round < ROUNDS; round++)
        if (has_round(p, round)) gradients(p, shared, out, round, first, kept[round], dx[round]);
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
