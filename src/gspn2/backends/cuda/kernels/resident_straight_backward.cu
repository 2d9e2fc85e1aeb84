// Backward of small images by a block for each direction: operands go straight from the tensors, of any strides, to the
// threads that put them in order, and are read again, from the cache, for the gradients.
//
// The state h and its adjoint g do not depend on each other: each channel's are scanned at the same time, by a warp each.
// What follows from both is no scan and is done by the threads that have these pixels:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,
//   dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw.
//
// A task is an image and its SHARERS * VECTOR channels of one tap group: all that share taps, so that dw is summed on the chip.
// The blocks of a cluster are its SCANS directions, for each of SHARERS parts of the channels. Each answers for a share of the
// pixels of dx, and of dw; the others store there what they have of these, and behind a barrier of the cluster it adds them up
// in the order of directions and of channels. Parts of dw arrive where the weights were; parts of dx behind all else, or, where
// there is no room (FETCH), they stay in the place of adjoints, and the block that adds them fetches them.
//
// Macros: THREADS, BLOCKS, SCANS, DIRECTIONS, PLACES as in resident.cuh; VECTOR, ADJACENT as in resident_straight.cuh
//         SHARERS  parts of the channels of a tap group
//         FETCH    parts of dx are fetched by the block that adds them
//         BATCH    pixels of a thread whose reads are on the way together
#define STORE_ADJACENT ADJACENT
#include "resident_straight.cuh"
#include "resident_logits.cuh"

#define CLUSTER (SCANS * SHARERS)

// The number of pixels of a thread; nothing here comes in slabs.
constexpr int ROUNDS = SLAB_ROWS;

// What this block does: channels from c0 of tap group g of image b, in direction d; where their tensors begin, and where
// shared memory has sources of states, which states replace, of adjoints, and weights, or what is left of dw.
struct Work {
  int b, c0, g, d, sharer;
  bool vertical;
  int row_step, column_step;  // places from a pixel to the one below and to the right
  int plane;                  // bytes of a channel's
  unsigned char *states, *adjoints, *weights;
  const storage_t *x, *dy, *lam, *gate, *taps;
  storage_t *dlam, *dgate, *dtaps;
};

__device__ __forceinline__ Work work_of(const Params& p, int task, int rank, unsigned char* shared) {
  Work w;
  w.b = task / p.knobs[PARTS], w.g = task - w.b * p.knobs[PARTS];
  w.d = rank % SCANS, w.sharer = rank / SCANS;
  w.c0 = (w.g * SHARERS + w.sharer) * VECTOR;
  w.vertical = vertical_at(w.d);
  w.row_step = w.vertical ? p.knobs[PITCH_V] : 1, w.column_step = w.vertical ? 1 : p.knobs[PITCH_H];
  w.plane = plane_of(p, w.vertical);
  w.states = shared, w.adjoints = shared + VECTOR * w.plane, w.weights = shared + 2 * VECTOR * w.plane;
  w.x = at(p.x, w.b, 0, w.c0, 0, 0), w.dy = at(p.dy, w.b, 0, w.c0, 0, 0);
  w.lam = at(p.lam, w.b, w.d, w.c0, 0, 0), w.gate = at(p.gate, w.b, w.d, w.c0, 0, 0);
  w.taps = at(p.taps, w.b, w.d, w.g, 0, 0);
  w.dlam = at(p.dlam, w.b, w.d, w.c0, 0, 0), w.dgate = at(p.dgate, w.b, w.d, w.c0, 0, 0);
  w.dtaps = at(p.dtaps, w.b, w.d, w.g, 0, 0);
  return w;
}

__device__ __forceinline__ int place_of(const Work& w, const Pixel& pixel) {
  return pixel.row * w.row_step + pixel.column * w.column_step;
}

// Pixels are shared out in runs of 32, in turn, so that a warp's go to one block. A block keeps slots for its own.
template <int SHARES>
struct Shares {
  __device__ __forceinline__ static int owner(const Pixel& pixel) { return pixel.index / 32 % SHARES; }
  __device__ __forceinline__ static int slot(const Pixel& pixel) { return pixel.index / (32 * SHARES) * 32 + pixel.index % 32; }
  __device__ __forceinline__ static int slots(const Params& p) { return (p.height * p.width + 32 * SHARES - 1) / (32 * SHARES) * 32; }

  // Calls use(pixel, slot) for the pixels of share `mine`.
  template <typename Use>
  __device__ __forceinline__ static void for_each(const Params& p, int mine, Use use) {
    const int pixels = p.height * p.width;
#pragma unroll 2
    for (int slot = threadIdx.x; slot < slots(p); slot += THREADS) {
      const int index = (slot / 32 * SHARES + mine) * 32 + slot % 32, row = quotient(index, width_of(p));
      if (index < pixels) use(Pixel{row, index - row * p.width, index, true}, slot);
    }
  }
};
using ImageShares = Shares<SCANS>;
using TapShares = Shares<SHARERS>;

// Where a block keeps what has arrived: of dx [direction][channel][slot], of dw [part][tap][slot].
__device__ __forceinline__ float* dx_at(const Params& p, int d, int c, int slot) {
  return (float*)(shared_memory() + p.knobs[SUMS_AT]) + (d * VECTOR + c) * ImageShares::slots(p) + slot;
}
__device__ __forceinline__ float* dw_at(const Params& p, const Work& work, int part, int k, int slot) {
  return (float*)work.weights + (part * 3 + k) * TapShares::slots(p) + slot;
}

// Channel c of some planes at a place.
__device__ __forceinline__ float* place_at(const Work& w, unsigned char* planes, int c, int index) {
  return (float*)(planes + c * w.plane) + index;
}

struct StoredTaps {
  storage_t of[3];
  __device__ __forceinline__ Taps widened() const { return {widen(of[0]), widen(of[1]), widen(of[2])}; }
};

__device__ __forceinline__ StoredTaps taps_at(const Params& p, const Work& work, const Pixel& pixel) {
  const storage_t* a = work.taps + distance(p.taps, pixel);
  return {__ldg(a), __ldg(a + p.taps.k), __ldg(a + 2 * p.taps.k)};
}

// Does a line before or after a pixel's place exist?
struct Neighbours {
  bool before, after;
};
__device__ __forceinline__ Neighbours neighbours_of(const Params& p, const Work& work, const Pixel& pixel) {
  const int place = work.vertical ? pixel.column : pixel.row, places = work.vertical ? p.width : p.height;
  return {place > 0, place + 1 < places};
}

// Is this line of the image the first of a chunk?
__device__ __forceinline__ bool restarts(const Params& p, const Work& work, const Pixel& pixel) {
  const Scan s = scan_at(p, work.d);
  const int line = s.vertical ? pixel.row : pixel.column, i = s.reversed ? s.lines - 1 - line : line;
  return i == quotient(i, chunk_of(p)) * p.chunk;
}

// Calls load(pixel) for BATCH pixels of this thread, and then use(pixel, what it returned) for those inside the image.
template <typename Loaded, typename Load, typename Use>
__device__ __forceinline__ void for_batches(const Params& p, Load load, Use use) {
  const int rounds = p.knobs[ROUNDS];
#pragma unroll 1
  for (int first = 0; first < rounds; first += BATCH) {
    Loaded loaded[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) loaded[i] = load(pixel_of(p, first + i));
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const Pixel pixel = pixel_of(p, first + i);
      if (pixel.inside) use(pixel, loaded[i]);
    }
  }
}

struct Operands {
  Numbers x, dy;
#if HAS_LAM
  Numbers lam;
#endif
#if HAS_GATE
  Numbers gate;
#endif
  StoredTaps taps;
};

// Sources of states, lam x, and of adjoints, gate dy, and weights.
__device__ __forceinline__ void gather(const Params& p, const Work& work) {
  const auto load = [&](const Pixel& pixel) {
    Operands o;
    o.x = numbers_at(work.x + distance(p.x, pixel), p.x.c);
    o.dy = numbers_at(work.dy + distance(p.dy, pixel), p.dy.c);
#if HAS_LAM
    o.lam = numbers_at(work.lam + distance(p.lam, pixel), p.lam.c);
#endif
#if HAS_GATE
    o.gate = numbers_at(work.gate + distance(p.gate, pixel), p.gate.c);
#endif
    o.taps = taps_at(p, work, pixel);
    return o;
  };
  const auto put = [&](const Pixel& pixel, const Operands& o) {
    const int index = place_of(work, pixel);
#pragma unroll
    for (int c = 0; c < VECTOR; c++) {
      float u = o.x[c], s = o.dy[c];
#if HAS_LAM
      u *= o.lam[c];
#endif
#if HAS_GATE
      s *= o.gate[c];
#endif
      *place_at(work, work.states, c, index) = u;
      *place_at(work, work.adjoints, c, index) = s;
    }
    const Neighbours there = neighbours_of(p, work, pixel);
    const int tap_plane = (work.vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H]) / TAP_PLANES;
    store_taps(work.weights, index, tap_plane, weights_of(o.taps.widened(), there.before, there.after));
    // Adjoints reckon with the weights behind the end of a line, as far as the last lane's places go.
    const int places = work.vertical ? p.width : p.height;
    for (int beyond = there.after ? 0 : places; beyond % PLACES != 0; beyond++)
      store_taps(work.weights, index + 1 + beyond - places, tap_plane, {0.f, 0.f, 0.f});
  };
  for_batches<Operands>(p, load, put);
}

// The gradient of a pixel's taps, from that of their weights.
__device__ __forceinline__ void store_dtaps(const Params& p, const Work& work, const Pixel& pixel, const StoredTaps& stored,
                                            const Taps& dw) {
  const Neighbours there = neighbours_of(p, work, pixel);
  Taps da = {0.f, 0.f, 0.f};
  if (!restarts(p, work, pixel)) {
    const Taps a = stored.widened();
    da = logit_gradient(weights_of(a, there.before, there.after), a, dw, there.before, there.after);
  }
  storage_t* out = work.dtaps + distance(p.dtaps, pixel);
  out[0] = narrow(da.before);
  out[p.dtaps.k] = narrow(da.here);
  out[2 * p.dtaps.k] = narrow(da.after);
}

// dw of this block's channels at a place.
__device__ __forceinline__ Taps weight_gradient(const Params& p, const Work& work, const Pixel& pixel, int index) {
  Taps dw = {0.f, 0.f, 0.f};
  if (restarts(p, work, pixel)) return dw;
  const bool reversed = (direction_at(work.d) & 1) != 0;
  const int pitch = work.vertical ? p.knobs[PITCH_V] : p.knobs[PITCH_H], before = index + (reversed ? pitch : -pitch);
  const Neighbours there = neighbours_of(p, work, pixel);
#pragma unroll
  for (int c = 0; c < VECTOR; c++) {
    const float* h = place_at(work, work.states, c, before);
    const float g = *place_at(work, work.adjoints, c, index);
    dw.here = fmaf(g, h[0], dw.here);
    if (there.before) dw.before = fmaf(g, h[-1], dw.before);
    if (there.after) dw.after = fmaf(g, h[1], dw.after);
  }
  return dw;
}

// Hands on this block's part of dw.
__device__ __forceinline__ void send_dw(const Params& p, const Work& work, const Pixel& pixel, const Taps& dw) {
  float* to = cluster_map(dw_at(p, work, work.sharer, 0, TapShares::slot(pixel)), TapShares::owner(pixel) * SCANS + work.d);
  const int step = TapShares::slots(p);
  to[0] = dw.before, to[step] = dw.here, to[2 * step] = dw.after;
}

// The same of dx.
__device__ __forceinline__ void send_dx(const Params& p, const Work& work, const Pixel& pixel, int index, const float (&dx)[VECTOR]) {
  float* to = FETCH ? nullptr
                    : cluster_map(dx_at(p, work.d, 0, ImageShares::slot(pixel)), work.sharer * SCANS + ImageShares::owner(pixel));
#pragma unroll
  for (int c = 0; c < VECTOR; c++) {
    if (FETCH)
      *place_at(work, work.adjoints, c, index) = dx[c];
    else
      to[c * ImageShares::slots(p)] = dx[c];
  }
}

// Gradients of what each direction has for itself, and this block's parts of the others.
__device__ __forceinline__ void gradients(const Params& p, const Work& work) {
  const auto load = [&](const Pixel& pixel) {
    Operands o;
    o.x = numbers_at(work.x + distance(p.x, pixel), p.x.c);
    o.dy = numbers_at(work.dy + distance(p.dy, pixel), p.dy.c);
#if HAS_LAM
    o.lam = numbers_at(work.lam + distance(p.lam, pixel), p.lam.c);
#endif
    if (SHARERS == 1) o.taps = taps_at(p, work, pixel);
    return o;
  };
  const auto use = [&](const Pixel& pixel, const Operands& o) {
    const int index = place_of(work, pixel);
    if (p.dtaps.data != nullptr) {
      const Taps dw = weight_gradient(p, work, pixel, index);
#if SHARERS > 1
      send_dw(p, work, pixel, dw);
#else
      store_dtaps(p, work, pixel, o.taps, dw);
#endif
    }
    float dlam[VECTOR], dgate[VECTOR], dx[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; c++) {
      float* g = place_at(work, work.adjoints, c, index);
      dlam[c] = *g * o.x[c];
      dgate[c] = *place_at(work, work.states, c, index) * o.dy[c];
#if HAS_LAM
      dx[c] = *g * o.lam[c];
#else
      dx[c] = *g;
#endif
    }
    if (HAS_LAM && p.dlam.data != nullptr) store_numbers(p.dlam, work.dlam + distance(p.dlam, pixel), dlam);
    if (HAS_GATE && p.dgate.data != nullptr) store_numbers(p.dgate, work.dgate + distance(p.dgate, pixel), dgate);
#if SCANS > 1
    if (p.dx.data != nullptr) send_dx(p, work, pixel, index, dx);
#else
    if (p.dx.data != nullptr) store_numbers(p.dx, at(p.dx, work.b, 0, work.c0, pixel.row, pixel.column), dx);
#endif
  };
  for_batches<Operands>(p, load, use);
}

// dx of this block's channels, of its share of the pixels, from all directions in their order.
__device__ __forceinline__ void sum_directions(const Params& p, const Work& work) {
#if FETCH
  const unsigned char* from[SCANS];
#pragma unroll
  for (int d = 0; d < SCANS; d++)
    from[d] = cluster_map(work.states + VECTOR * plane_of(p, vertical_at(d)), work.sharer * SCANS + d);
#endif
  storage_t* to = at(p.dx, work.b, 0, work.c0, 0, 0);
  ImageShares::for_each(p, work.d, [&](const Pixel& pixel, int slot) {
    float dx[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; c++) dx[c] = 0.f;
#pragma unroll
    for (int d = 0; d < SCANS; d++)
#pragma unroll
      for (int c = 0; c < VECTOR; c++) {
#if FETCH
        const int plane = plane_of(p, vertical_at(d)), index = place_of(p, vertical_at(d), pixel);
        dx[c] += *(const float*)(from[d] + c * plane + 4 * index);
#else
        dx[c] += *dx_at(p, d, c, slot);
#endif
      }
    store_numbers(p.dx, to + distance(p.dx, pixel), dx);
  });
}

// Gradients of the taps of this block's share of the pixels, from all its group's channels in their order.
__device__ __forceinline__ void sum_channels(const Params& p, const Work& work) {
  TapShares::for_each(p, work.sharer, [&](const Pixel& pixel, int slot) {
    const StoredTaps taps = taps_at(p, work, pixel);
    Taps dw = {0.f, 0.f, 0.f};
#pragma unroll
    for (int part = 0; part < SHARERS; part++)
      dw.add({*dw_at(p, work, part, 0, slot), *dw_at(p, work, part, 1, slot), *dw_at(p, work, part, 2, slot)});
    store_dtaps(p, work, pixel, taps, dw);
  });
}

// All blocks of the cluster, if it has more than this one.
__device__ __forceinline__ void whole_cluster() {
#if CLUSTER > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
}

KERNEL(THREADS, BLOCKS) resident_straight_backward(CONSTANT_PARAMS p) {
#if CLUSTER > 1
  const int rank = (int)cluster_rank();
#else
  const int rank = 0;
#endif
  unsigned char* shared = held_shared_memory();
  for (int task = blockIdx.x / CLUSTER; task < p.knobs[TASKS]; task += gridDim.x / CLUSTER) {
    const Work work = work_of(p, task, rank, shared);
    gather(p, work);
    __syncthreads();
    const int warp = warp_index();
    if (warp < VECTOR)
      scan<false>(p, work.d, work.states + warp * work.plane, work.weights);
    else if (warp < 2 * VECTOR)
      scan<true>(p, work.d, work.states + warp * work.plane, work.weights);
    // No block reads weights any more, nor sums of the task before.
    whole_cluster();
    gradients(p, work);
    whole_cluster();
    if (SCANS > 1 && p.dx.data != nullptr) sum_directions(p, work);
    if (SHARERS > 1 && p.dtaps.data != nullptr) sum_channels(p, work);
    // What arrived in the place of weights has been read, and nobody ends while others fetch.
    if (SCANS > 1 && FETCH)
      whole_cluster();
    else
      __syncthreads();
  }
}
