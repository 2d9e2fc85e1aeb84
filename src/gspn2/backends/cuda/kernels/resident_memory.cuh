// Shared memory of a task, and its operands put in order there from tensors of any strides.
//
// What belongs to a direction lies in scan coordinates, (line, place) with places adjacent, lines in image order:
// UNIT_PLANES planes of units for each unit of the task, and the weights of each tap group.
//   forward   units: lam, gate, which a scan replaces by its gated state. x is there, too: for vertical scans, and with
//             rows and columns exchanged for horizontal ones.
//   backward  results: lam x, which a scan replaces by the state, and gate dy, replaced by the adjoint.
//
// Macros of the kernel itself: BACKWARD, UNIT_PLANES; LAM_PLANE and GATE_PLANE, the first of each.
#pragma once
#include "resident.cuh"

// Byte offsets. An orientation that no direction needs has no x.
struct Memory {
  int vertical_x, horizontal_x, directions;
  int vertical_size, horizontal_size;  // of all that belongs to one direction
};

__device__ __forceinline__ Memory memory_of(const Params& p, const Range& range) {
  const int units = units_of(p), groups = groups_of(p);
  bool vertical = false, horizontal = false;
#pragma unroll
  for (int d = 0; d < SCANS; d++) {
    if (d < range.first || d >= range.last) continue;
    if (vertical_at(d))
      vertical = true;
    else
      horizontal = true;
  }
  Memory m;
  m.vertical_x = 0;
  m.horizontal_x = vertical && !BACKWARD ? units * p.knobs[UNIT_V] : 0;
  m.directions = m.horizontal_x + (horizontal && !BACKWARD ? units * p.knobs[UNIT_H] : 0);
  m.vertical_size = units * UNIT_PLANES * p.knobs[UNIT_V] + groups * p.knobs[TAPS_V];
  m.horizontal_size = units * UNIT_PLANES * p.knobs[UNIT_H] + groups * p.knobs[TAPS_H];
  return m;
}

// Of direction d, where those of the block begin with `first`.
__device__ __forceinline__ int offset_of(const Memory& m, int first, int d) {
  int offset = m.directions;
#pragma unroll
  for (int i = 0; i < SCANS; i++)
    if (i >= first && i < d) offset += vertical_at(i) ? m.vertical_size : m.horizontal_size;
  return offset;
}

// Where the operands of one direction go: (row, column) is place row * row_step + column * column_step.
struct Target {
  unsigned char *units, *taps;
  int unit, tap;  // bytes of a plane of units, and of the weights of one tap group
  int row_step, column_step;
  bool vertical;
};

__device__ __forceinline__ Target target_of(const Params& p, const Memory& m, int first, int d) {
  const bool vertical = vertical_at(d);
  const int unit = vertical ? p.knobs[UNIT_V] : p.knobs[UNIT_H];
  unsigned char* units = shared_memory() + offset_of(m, first, d);
  return {units,
          units + units_of(p) * UNIT_PLANES * unit,
          unit,
          vertical ? p.knobs[TAPS_V] : p.knobs[TAPS_H],
          vertical ? p.knobs[PITCH_V] : 1,
          vertical ? 1 : p.knobs[PITCH_H],
          vertical};
}

// Lanes read whole groups of places: what lies behind the end of a line has to count as 0, and stays so, because scans
// write zeros there.
__device__ __forceinline__ void clear_planes(const Params& p) {
  if (p.height % PLACES == 0 && p.width % PLACES == 0) return;
  for (int i = threadIdx.x * 16; i < p.knobs[SUMS_AT]; i += THREADS * 16) *(uint4*)(shared_memory() + i) = make_uint4(0, 0, 0, 0);
  __syncthreads();
}

// The weights of a place, from taps as stored.
__device__ __forceinline__ void put_weights(const Params& p, const Target& t, int g, int row, int column, const Taps& a) {
  const int place = t.vertical ? column : row, places = t.vertical ? p.width : p.height;
  const Taps w = weights_of(a, place > 0, place + 1 < places);
  store_taps(t.taps + g * t.tap, row * t.row_step + column * t.column_step, t.tap / TAP_PLANES, w);
}

// body(row, column) for the pixels [first, last) of an image, every STEP-th, shared out to the threads of the block. A
// width that is not a multiple of STEP has STEP 1. UNROLL of a thread's turns have their reads on the way together.
template <int STEP = 1, int UNROLL = 1, typename Body>
__device__ __forceinline__ void for_pixels(const Params& p, int first, int last, Body body) {
  const Divisor width = width_of(p);
#pragma unroll UNROLL
  for (int pixel = first + threadIdx.x * STEP; pixel < last; pixel += THREADS * STEP) {
    const int row = quotient(pixel, width);
    body(row, pixel - row * p.width);
  }
}

#if !BACKWARD
__device__ __forceinline__ void put_x(const Params& p, const Memory& m, int unit, int row, int column, unit_t value) {
  unsigned char *vertical = shared_memory() + m.vertical_x + unit * p.knobs[UNIT_V],
                *horizontal = shared_memory() + m.horizontal_x + unit * p.knobs[UNIT_H];
  if (m.horizontal_x > m.vertical_x) ((unit_t*)vertical)[row * p.knobs[PITCH_V] + column] = value;
  if (m.directions > m.horizontal_x) ((unit_t*)horizontal)[column * p.knobs[PITCH_H] + row] = value;
}
#endif

// Two 16-bit columns can be read as a word, in every row and plane.
__device__ __forceinline__ bool two_columns(const Params& p, const View& v) {
  return STORAGE != 0 && PACK == 1 && v.w == 1 && p.width % 2 == 0 &&
         (((u64)v.data >> 1 | (u64)v.b | (u64)v.d | (u64)v.c | (u64)v.k | (u64)v.h) & 1) == 0;
}

// body(row, column, unit) for one channel or pair of channels of an image at `data`.
template <typename Body>
__device__ __forceinline__ void for_units(const Params& p, const View& v, const storage_t* data, Body body) {
  if (two_columns(p, v)) {
    for_pixels<2, 4>(p, 0, p.height * p.width, [&](int row, int column) {
      const u32 word = __ldg((const u32*)(data + row * v.h + column));
      body(row, column, (unit_t)(word & 0xffffu));
      body(row, column + 1, (unit_t)(word >> 16));
    });
    return;
  }
  const bool words = paired(v);
  for_pixels<1, 4>(p, 0, p.height * p.width, [&](int row, int column) {
    body(row, column, load_unit(data + row * v.h + column * v.w, v.c, words));
  });
}

// Copies a plane of one channel to vertical lines as it is, in the background, if that can be done.
__device__ __forceinline__ bool copy_plane(const Params& p, const View& v, const storage_t* data, unsigned char* to) {
#if RECORDS || PACK == 2
  return false;
#else
  const int bytes = p.height * p.width * (int)sizeof(storage_t);
  if (v.w != 1 || v.h != p.width || p.knobs[PITCH_V] != p.width || ((bytes | (int)(u64)data) & 15) != 0)
    return false;
  for (int o = threadIdx.x * 16; o < bytes; o += THREADS * 16) copy_async<16>(to + o, (const unsigned char*)data + o);
  return true;
#endif
}

#if !BACKWARD
__device__ __forceinline__ void gather_x(const Params& p, const Memory& m, const Task& task) {
  for (int unit = 0; unit < units_of(p); unit++) {
    const storage_t* data = at(p.x, task.b, 0, task.c0 + unit * PACK, 0, 0);
    if (m.directions == m.horizontal_x && copy_plane(p, p.x, data, shared_memory() + unit * p.knobs[UNIT_V])) continue;
    for_units(p, p.x, data, [&](int row, int column, unit_t value) { put_x(p, m, unit, row, column, value); });
  }
}

// lam or gate of one unit in direction d, into the plane at `out`.
__device__ __forceinline__ void gather_factor(const Params& p, const View& v, const Target& t, unsigned char* out,
                                              const storage_t* data) {
  if (t.vertical && copy_plane(p, v, data, out)) return;
  for_units(p, v, data, [&](int row, int column, unit_t value) {
    ((unit_t*)out)[row * t.row_step + column * t.column_step] = value;
  });
}
#else
// The product of an image with lam or gate, or the image alone, of one unit in direction d; into the results at `out`.
template <bool FACTOR>
__device__ __forceinline__ void gather_product(const Params& p, const View& v, const View& factor, const Target& t, unsigned char* out,
                                               const Task& task, int d, int unit) {
  const int c = task.c0 + unit * PACK;
  const storage_t *image = at(v, task.b, 0, c, 0, 0), *factors = FACTOR ? at(factor, task.b, d, c, 0, 0) : nullptr;
  const bool words = paired(v), factor_words = FACTOR && paired(factor);
  for_pixels<1, 4>(p, 0, p.height * p.width, [&](int row, int column) {
    float product[PACK], by[PACK];
    widen_unit(load_unit(image + row * v.h + column * v.w, v.c, words), product);
    if (FACTOR) {
      widen_unit(load_unit(factors + row * factor.h + column * factor.w, factor.c, factor_words), by);
#pragma unroll
      for (int k = 0; k < PACK; k++) product[k] *= by[k];
    }
    store_result_at(out + (row * t.row_step + column * t.column_step) * (int)sizeof(unit_t), t.unit, product);
  });
}
#endif

// The weights of tap group g, from taps at `data`.
__device__ __forceinline__ void gather_taps(const Params& p, const Target& t, int g, const storage_t* data) {
  const View& v = p.taps;
#if !NORMALIZE
  if (t.vertical) {
    bool copied = true;
#pragma unroll
    for (int k = 0; k < 3; k++)
      copied = copied && copy_plane(p, v, data + k * v.k, t.taps + g * t.tap + k * (t.tap / TAP_PLANES));
    if (copied) return;
  }
#endif
  if (two_columns(p, v)) {
    for_pixels<2, 2>(p, 0, p.height * p.width, [&](int row, int column) {
      const storage_t* a = data + row * v.h + column;
      const u32 before = __ldg((const u32*)a), here = __ldg((const u32*)(a + v.k)), after = __ldg((const u32*)(a + 2 * v.k));
      put_weights(p, t, g, row, column, {widen_low(before), widen_low(here), widen_low(after)});
      put_weights(p, t, g, row, column + 1, {widen_high(before), widen_high(here), widen_high(after)});
    });
    return;
  }
  for_pixels<1, 2>(p, 0, p.height * p.width, [&](int row, int column) {
    const storage_t* a = data + row * v.h + column * v.w;
    put_weights(p, t, g, row, column, {widen(__ldg(a)), widen(__ldg(a + v.k)), widen(__ldg(a + 2 * v.k))});
  });
}

#if !BACKWARD
// All operands of one channel in direction d, two columns at a time, with all reads of a thread on the way together. They
// have to have `two_columns`. x is read here if there is no other direction.
__device__ __forceinline__ void gather_pairs(const Params& p, const Memory& m, const Target& t, const Task& task, int d) {
  const storage_t* x = at(p.x, task.b, 0, task.c0, 0, 0);
  const storage_t* taps = at(p.taps, task.b, d, task.g0, 0, 0);
#if HAS_LAM
  const storage_t* lam = at(p.lam, task.b, d, task.c0, 0, 0);
#endif
#if HAS_GATE
  const storage_t* gate = at(p.gate, task.b, d, task.c0, 0, 0);
#endif
  for_pixels<2, 2>(p, 0, p.height * p.width, [&](int row, int column) {
    const storage_t* a = taps + row * p.taps.h + column;
    const u32 before = __ldg((const u32*)a), here = __ldg((const u32*)(a + p.taps.k)), after = __ldg((const u32*)(a + 2 * p.taps.k));
    const auto put = [&](int plane, u32 pair) {
      unit_t* out = (unit_t*)(t.units + plane * t.unit) + row * t.row_step + column * t.column_step;
      out[0] = (unit_t)(pair & 0xffffu);
      out[t.column_step] = (unit_t)(pair >> 16);
    };
#if HAS_LAM
    put(LAM_PLANE, __ldg((const u32*)(lam + row * p.lam.h + column)));
#endif
#if HAS_GATE
    put(GATE_PLANE, __ldg((const u32*)(gate + row * p.gate.h + column)));
#endif
    if (SCANS == 1) {
      const u32 pair = __ldg((const u32*)(x + row * p.x.h + column));
      put_x(p, m, 0, row, column, (unit_t)(pair & 0xffffu));
      put_x(p, m, 0, row, column + 1, (unit_t)(pair >> 16));
    }
    put_weights(p, t, 0, row, column, {widen_low(before), widen_low(here), widen_low(after)});
    put_weights(p, t, 0, row, column + 1, {widen_high(before), widen_high(here), widen_high(after)});
  });
}
#endif

// All operands of a task. Copies in the background have to be waited for.
__device__ __forceinline__ void gather(const Params& p, const Memory& m, const Range& range, const Task& task) {
#if !BACKWARD
  const bool pairs = ONE && two_columns(p, p.x) && two_columns(p, p.taps) && (!HAS_LAM || two_columns(p, p.lam)) &&
                     (!HAS_GATE || two_columns(p, p.gate));
  if (SCANS > 1 || !pairs || vertical_at(0)) gather_x(p, m, task);
#endif
  for (int d = range.first; d < range.last; d++) {
    const Target t = target_of(p, m, range.first, d);
#if !BACKWARD
    if (pairs && !t.vertical) {
      gather_pairs(p, m, t, task, d);
      continue;
    }
#endif
    for (int unit = 0; unit < units_of(p); unit++) {
      unsigned char* out = t.units + unit * UNIT_PLANES * t.unit;
#if BACKWARD
      gather_product<HAS_LAM>(p, p.x, p.lam, t, out + LAM_PLANE * t.unit, task, d, unit);
      gather_product<HAS_GATE>(p, p.dy, p.gate, t, out + GATE_PLANE * t.unit, task, d, unit);
#else
      const int c = task.c0 + unit * PACK;
#if HAS_LAM
      gather_factor(p, p.lam, t, out + LAM_PLANE * t.unit, at(p.lam, task.b, d, c, 0, 0));
#endif
#if HAS_GATE
      gather_factor(p, p.gate, t, out + GATE_PLANE * t.unit, at(p.gate, task.b, d, c, 0, 0));
#endif
#endif
    }
    for (int g = 0; g < groups_of(p); g++) gather_taps(p, t, g, at(p.taps, task.b, d, task.g0 + g, 0, 0));
  }
}
