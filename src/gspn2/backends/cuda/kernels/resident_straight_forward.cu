// Forward of small images by a block for each direction: operands go straight from the tensors, of any strides, to the
// threads that put them in order, all of a thread's reads on the way together. So few images take little more than one trip
// to memory and the time of their lines.
//
// A task is an image and VECTOR channels of one tap group. The SCANS directions of a task are the blocks of a cluster;
// each hands its gated states to the block that sums these pixels. A thread has the same pixels before and after the scan,
// and keeps their gates in registers.
//
// Macros: THREADS, BLOCKS, SCANS, DIRECTIONS, PLACES as in resident.cuh; WHOLE as in resident_line.cuh; VECTOR, ADJACENT as
//         in resident_straight.cuh
//         ROUNDS   pixels of a thread, at most
//         BATCH    of them whose reads are on the way together
#define STORE_ADJACENT 0
#include "resident_straight.cuh"
#include "resident_alone.cuh"
#include "resident_exchange_ptx.cuh"

// What this block does: channels from c0 of image b, in direction d; and where their tensors begin.
struct Work {
  int b, c0, d;
  const storage_t *x, *lam, *gate, *taps;
};

__device__ __forceinline__ Work work_of(const Params& p, int task, int d) {
  const int b = task / p.knobs[PARTS], c0 = (task - b * p.knobs[PARTS]) * VECTOR;
  const int group = p.groups == 1 ? 0 : c0 / (p.channels / p.groups);
  return {b, c0, d, at(p.x, b, 0, c0, 0, 0), at(p.lam, b, d, c0, 0, 0), at(p.gate, b, d, c0, 0, 0),
          at(p.taps, b, d, group, 0, 0)};
}

struct Operands {
  Numbers x;
#if HAS_LAM
  Numbers lam;
#endif
#if HAS_GATE
  Numbers gate;
#endif
  storage_t taps[3];
};

__device__ __forceinline__ Operands operands_of(const Params& p, const Work& work, const Pixel& pixel) {
  Operands o;
  o.x = numbers_at(work.x + distance(p.x, pixel), p.x.c);
#if HAS_LAM
  o.lam = numbers_at(work.lam + distance(p.lam, pixel), p.lam.c);
#endif
#if HAS_GATE
  o.gate = numbers_at(work.gate + distance(p.gate, pixel), p.gate.c);
#endif
  const storage_t* taps = work.taps + distance(p.taps, pixel);
#pragma unroll
  for (int k = 0; k < 3; k++) o.taps[k] = __ldg(taps + k * p.taps.k);
  return o;
}

// Puts a pixel in order.
__device__ __forceinline__ void put(const Params& p, bool vertical, const Pixel& pixel, const Operands& o,
                                    unsigned char* shared) {
  if (!pixel.inside) return;
  const int index = place_of(p, vertical, pixel), plane = plane_of(p, vertical), taps = vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H];
#pragma unroll
  for (int c = 0; c < VECTOR; c++) {
#if HAS_LAM
    const float u = o.x[c] * o.lam[c];
#else
    const float u = o.x[c];
#endif
    *(float*)(shared + c * plane + 4 * index) = u;
  }
  const int place = vertical ? pixel.column : pixel.row, places = vertical ? p.width : p.height;
  const Taps a = {widen(o.taps[0]), widen(o.taps[1]), widen(o.taps[2])};
  store_taps(shared + VECTOR * plane, index, taps / TAP_PLANES, quick_weights(a, place > 0, place + 1 < places));
}

// States of one channel, in the place of its sources. The operands of the next line are on their way while one is
// computed.
__device__ __forceinline__ void scan_alone(const Params& p, int d, unsigned char* sources, const unsigned char* weights) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  constexpr int TAP = TAP_BYTES / TAP_PLANES;  // bytes of a place in a plane of weights
  const int tap_plane = (s.vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H]) / TAP_PLANES;
  const int pitch = s.vertical ? p.knobs[PITCH_V] : p.knobs[PITCH_H];
  const int step = s.reversed ? -pitch : pitch;
  int at = (s.reversed ? s.lines - 1 : 0) * pitch + held.first;  // place of the next line
  u32 next[PLACES];
  LineTaps next_taps;
  Lane h;
  const auto load = [&]() {
    load_words(sources + 4 * at, next);
#pragma unroll
    for (int k = 0; k < TAP_PLANES; k++) {
      u32 w[TAP_WORDS / TAP_PLANES];
      load_words(weights + TAP * at + k * tap_plane, w);
#pragma unroll
      for (int i = 0; i < TAP_WORDS / TAP_PLANES; i++) next_taps.w[k * (TAP_WORDS / TAP_PLANES) + i] = w[i];
    }
  };
  load();
  int left = s.lines;
  const auto line = [&](auto restart) {
    Lane u;
#pragma unroll
    for (int v = 0; v < PLACES; v++) u[0][v] = __uint_as_float(next[v]);
    const LineTaps taps = next_taps;
    unsigned char* out = sources + 4 * at;
    at += --left > 0 ? step : 0;
    load();
    next_state<decltype(restart)::value>(taps, held, u, h);
    // Lanes behind the end of a line have read what its last lane writes.
    __syncwarp();
    u32 w[PLACES];
#pragma unroll
    for (int v = 0; v < PLACES; v++) w[v] = __float_as_uint(h[0][v]);
    if (held.writes) store_words(out, w);
  };
  while (left > 0) {
    int more = min(p.chunk, left) - 1;
    line(Yes());
#pragma unroll 2
    for (; more > 0; more--) line(No());
  }
}

#if SCANS > 1
// Pixels that a block of the cluster sums, and where it gets their gated states: [direction][channel][pixel].
enum { SHARE_MAGIC = SLAB_ROWS };  // there are no slabs
__device__ __forceinline__ int share_of(const Params& p) { return (p.height * p.width + SCANS - 1) / SCANS; }

__device__ __forceinline__ float* sum_at(const Params& p, int d, int c, int pixel) {
  return (float*)(shared_memory() + p.knobs[SUMS_AT]) + (d * VECTOR + c) * share_of(p) + pixel;
}

__device__ __forceinline__ void hand_over(const Params& p, const Work& work, const Pixel& pixel, const float (&state)[VECTOR]) {
  if (!pixel.inside) return;
  const int share = share_of(p), owner = quotient(pixel.index, {share, (u32)p.knobs[SHARE_MAGIC]});
#pragma unroll
  for (int c = 0; c < VECTOR; c++) *cluster_map(sum_at(p, work.d, c, pixel.index - owner * share), owner) = state[c];
}

// y of this block's share of the pixels: directions in their order.
__device__ __forceinline__ void sum_directions(const Params& p, const Work& work) {
  const int share = share_of(p), first = work.d * share;
#pragma unroll 2
  for (int i = threadIdx.x; i < share && first + i < p.height * p.width; i += THREADS) {
    const int row = quotient(first + i, width_of(p));
    float y[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; c++) {
      y[c] = 0.f;
#pragma unroll
      for (int d = 0; d < SCANS; d++) y[c] += *sum_at(p, d, c, i);
    }
    store_numbers(p.y, at(p.y, work.b, 0, work.c0, row, first + i - row * p.width), y);
  }
}
#endif

// Reads the operands of this thread's pixels and puts them in order; the gates are returned.
__device__ __forceinline__ void gather(const Params& p, const Work& work, bool vertical, unsigned char* shared,
                                       Numbers (&gates)[ROUNDS]) {
#pragma unroll
  for (int first = 0; first < ROUNDS; first += BATCH) {
    Operands operands[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < ROUNDS) operands[i] = operands_of(p, work, pixel_of(p, first + i));
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (first + i >= ROUNDS) continue;
      put(p, vertical, pixel_of(p, first + i), operands[i], shared);
#if HAS_GATE
      gates[first + i] = operands[i].gate;
#endif
    }
  }
}

KERNEL(THREADS, BLOCKS) resident_straight_forward(CONSTANT_PARAMS p) {
#if SCANS > 1
  const int d = (int)cluster_rank();
#else
  const int d = 0;
#endif
  unsigned char* shared = held_shared_memory();
  const bool vertical = vertical_at(d);
  const int plane = plane_of(p, vertical);
  for (int task = blockIdx.x / SCANS; task < p.knobs[TASKS]; task += gridDim.x / SCANS) {
    const Work work = work_of(p, task, d);
#if SCANS > 1
    cluster_has_begun();
#endif
    Numbers gates[ROUNDS];
    gather(p, work, vertical, shared, gates);
    __syncthreads();
    const int c = warp_index();
    if (c < VECTOR) scan_alone(p, d, shared + c * plane, shared + VECTOR * plane);
    __syncthreads();
#if SCANS > 1
    // Nothing is stored in another block before it has begun this task, and so read what it got for the one before.
    cluster_wait_begun();
#endif
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const Pixel pixel = pixel_of(p, round);
      float state[VECTOR];
#pragma unroll
      for (int c = 0; c < VECTOR; c++) {
        state[c] = *(const float*)(shared + c * plane + 4 * place_of(p, vertical, pixel));
#if HAS_GATE
        state[c] *= gates[round][c];
#endif
      }
#if SCANS > 1
      hand_over(p, work, pixel, state);
#else
      if (pixel.inside) store_numbers(p.y, at(p.y, work.b, 0, work.c0, pixel.row, pixel.column), state);
#endif
    }
#if SCANS > 1
    cluster_barrier();
    sum_directions(p, work);
#else
    __syncthreads();
#endif
  }
}
