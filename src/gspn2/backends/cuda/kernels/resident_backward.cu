// Backward of images that stay in shared memory.
//
// The state h and its adjoint g do not depend on each other: each direction is scanned by two warps at the same time,
// one for h, from lam and x, one for g, from gate and dy. What follows from both is no scan and is done by all threads:
//   dlam = g x,  dgate = h dy,  dx = sum over directions of lam g,  dw_k[i, j] = sum over channels of g[i, j] h[i-1, j+k]
// and the gradient of logits from dw. lam and logits are read a second time for it, mostly from the second-level cache.
//
// A task is an image and whole tap groups of it; blocks take one after the other. Its directions are shared out to the
// blocks of a cluster, and those of a block to passes, as they fit. h takes the place of lam in shared memory, and g that
// of gate.
//
// Macros beyond those of resident_operands.cuh: BLOCKS (on a multiprocessor).
// Knobs beyond those: 7 passes, 8 byte offset of the float32 sums of dx over directions, behind
// the planes (there if passes or SPLIT are above 1).
#define LAM_PLANE 0
#define GATE_PLANE RESULT_PLANES
#define UNIT_PLANES (2 * RESULT_PLANES)
#define IMAGES 2
#include "resident_scan.cuh"

// Scans ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void scan_states(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_of(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 0, LAM_PLANE, s.reversed);
  Lane h;
  Line line;
  load_line<HAS_LAM>(c, line);
  int until_restart = 0;
#pragma unroll 2
  for (int i = 0; i < s.lines; i++) {
    const Line now = line;
    unsigned char* out = c.units;
    if (i + 1 < s.lines) {
      advance(c);
      load_line<HAS_LAM>(c, line);
    }
    state_of_line<HAS_LAM>(now, held, until_restart == 0, h);
    until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
    if (held.any) store_result(out, c.unit, h);
  }
}

__device__ __forceinline__ void scan_adjoint(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_of(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 1, GATE_PLANE, !s.reversed);
  Lane carried, g;
#pragma unroll
  for (int k = 0; k < PACK; k++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) carried[k][v] = 0.f;
  Line line;
  load_line<HAS_GATE>(c, line);
  int until_restart = (s.lines - 1) % p.chunk;
#pragma unroll 2
  for (int i = 0; i < s.lines; i++) {
    const Line now = line;
    unsigned char* out = c.units;
    if (i + 1 < s.lines) {
      advance(c);
      load_line<HAS_GATE>(c, line);
    }
    adjoint_of_line<HAS_GATE>(now, held, until_restart == 0, carried, g);
    until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
    if (held.any) store_result(out, c.unit, g);
  }
}

// Gradients -----------------------------------------------------------------------------------------------------

// Rows of a task's lam and logits: in memory, or as records in shared memory.
struct Rows {
  int row, count;
#if RECORDS
  const unsigned char* raw;  // or null
  const Record* record;
#endif
};

__device__ __forceinline__ float lam_at(const Params& p, const Rows& rows, const Task& task, int d, int c, int row, int column) {
#if RECORDS
  if (rows.raw != nullptr) {
    const unsigned char* record = rows.raw + ((row - rows.row) * p.width + column) * rows.record->bytes + rows.record->lam;
    return widen(((const storage_t*)record)[d * p.channels + c]);
  }
#endif
  return widen(__ldg(at(p.lam, task.b, d, c, row, column)));
}

__device__ __forceinline__ Taps taps_at(const Params& p, const Rows& rows, const Task& task, int d, int g, int row, int column) {
#if RECORDS
  if (rows.raw != nullptr) {
    const unsigned char* record = rows.raw + ((row - rows.row) * p.width + column) * rows.record->bytes;
    return logits_at(record, rows.record->taps + (d * p.groups + g) * 3 * (int)sizeof(storage_t));
  }
#endif
  const storage_t* a = at(p.taps, task.b, d, g, row, column);
  return {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
}

// Unit `unit` of image 0 (x) or 1 (dy), as the scans have it.
__device__ __forceinline__ float image_at(const Memory& m, bool vertical, int image, int unit, int index, int c) {
  const Planes planes = planes_for(m, vertical);
  const unsigned char* plane =
      m.base + (vertical ? m.vertical_images : m.horizontal_images) + (image * m.units + unit) * planes.unit;
  const u32 bits = ((const unit_t*)plane)[index];
#if PACK == 2
  return c ? widen_high(bits) : widen_low(bits);
#else
  return widen_bits(bits);
#endif
}

__device__ __forceinline__ storage_t* address(const View& v, int b, int d, int c, int row, int column) {
  return (storage_t*)at(v, b, d, c, row, column);
}

// dlam, dgate and the gradient of the taps, of some rows.
__device__ __forceinline__ void scan_gradients(const Params& p, const Memory& m, const Range& range, const Task& task, const Rows& rows) {
  const Divisor width = divisor(p.width), chunk = divisor(p.chunk);
  const int pixels = rows.count * p.width, per_group = m.units / m.groups, size = (int)sizeof(unit_t);
  for (int d = range.first; d < range.last; d++) {
    const Scan s = scan_of(p, d);
    const Target t = target_of(p, m, range.first, d);
    const int to_previous = (s.reversed ? 1 : -1) * (s.vertical ? t.row_step : t.column_step) * size;
    for (int group = 0; group < m.groups; group++) {
      for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
        const int row = rows.row + quotient(pixel, width), column = pixel - (row - rows.row) * p.width;
        const int line = s.vertical ? row : column, place = s.vertical ? column : row;
        const int index = row * t.row_step + column * t.column_step, i = s.reversed ? s.lines - 1 - line : line;
        const bool restart = i == quotient(i, chunk) * p.chunk;
        const bool has_before = place > 0, has_after = place + 1 < s.places;
        Taps dw = {0.f, 0.f, 0.f};
        for (int unit = group * per_group; unit < (group + 1) * per_group; unit++) {
          const unsigned char* h = t.units + unit * UNIT_PLANES * t.unit + index * size;
          const unsigned char* previous = h + to_previous;
#pragma unroll
          for (int k = 0; k < PACK; k++) {
            const int c = task.c0 + unit * PACK + k;
            const float g = load_result(h + GATE_PLANE * t.unit, t.unit, k);
            if (!restart) {
              dw.here = fmaf(g, load_result(previous, t.unit, k), dw.here);
              if (has_before) dw.before = fmaf(g, load_result(previous - size, t.unit, k), dw.before);
              if (has_after) dw.after = fmaf(g, load_result(previous + size, t.unit, k), dw.after);
            }
#if HAS_LAM
            if (p.dlam.data != nullptr)
              *address(p.dlam, task.b, d, c, row, column) = narrow(g * image_at(m, s.vertical, 0, unit, index, k));
#endif
#if HAS_GATE
            if (p.dgate.data != nullptr)
              *address(p.dgate, task.b, d, c, row, column) =
                  narrow(load_result(h, t.unit, k) * image_at(m, s.vertical, 1, unit, index, k));
#endif
          }
        }
        if (p.dtaps.data != nullptr) {
          Taps da = {0.f, 0.f, 0.f};
          if (!restart) da = tap_gradient(taps_at(p, rows, task, d, task.g0 + group, row, column), dw, has_before, has_after);
          storage_t* out = address(p.dtaps, task.b, d, task.g0 + group, row, column);
          out[0] = narrow(da.before);
          out[p.dtaps.k] = narrow(da.here);
          out[2 * p.dtaps.k] = narrow(da.after);
        }
      }
    }
  }
}

// Planes of the float32 sums of dx, in (row, column).
__device__ __forceinline__ int sum_plane(const Params& p) { return (p.height * p.width * (int)sizeof(unit_t) + 15) & ~15; }

__device__ __forceinline__ unsigned char* sum_at(const Params& p, unsigned char* base, int unit, int pixel) {
  return base + p.knobs[8] + unit * RESULT_PLANES * sum_plane(p) + pixel * (int)sizeof(unit_t);
}

__device__ __forceinline__ void put_dx(const Params& p, const Task& task, int unit, int row, int column, const float (&sum)[PACK]) {
#pragma unroll
  for (int k = 0; k < PACK; k++) *address(p.dx, task.b, 0, task.c0 + unit * PACK + k, row, column) = narrow(sum[k]);
}

// dx of some rows: the sum over the directions of this pass, after those of the passes before.
__device__ __forceinline__ void image_gradient(const Params& p, const Memory& m, const Range& range, const Task& task, const Rows& rows,
                                               bool first_pass, bool last_pass) {
  const Divisor width = divisor(p.width);
  const int pixels = rows.count * p.width;
  for (int unit = 0; unit < m.units; unit++)
    for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
      const int row = rows.row + quotient(pixel, width), column = pixel - (row - rows.row) * p.width;
      unsigned char* kept = sum_at(p, m.base, unit, row * p.width + column);
      float sum[PACK];
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = first_pass ? 0.f : load_result(kept, sum_plane(p), k);
      for (int d = range.first; d < range.last; d++) {
        const Target t = target_of(p, m, range.first, d);
        const unsigned char* g = t.units + (unit * UNIT_PLANES + GATE_PLANE) * t.unit +
                                 (row * t.row_step + column * t.column_step) * (int)sizeof(unit_t);
#pragma unroll
        for (int k = 0; k < PACK; k++) {
          const float lam = HAS_LAM ? lam_at(p, rows, task, d, task.c0 + unit * PACK + k, row, column) : 1.f;
          sum[k] = fmaf(lam, load_result(g, t.unit, k), sum[k]);
        }
      }
      if (SPLIT == 1 && last_pass)
        put_dx(p, task, unit, row, column, sum);
      else
        store_result_at(kept, sum_plane(p), sum);
    }
}

#if SPLIT > 1
// dx from what the blocks of the cluster summed, in their order; each block takes its share of the pixels.
__device__ __forceinline__ void sum_blocks(const Params& p, const Memory& m, const Task& task, int rank) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width, first = rank * pixels / SPLIT, last = (rank + 1) * pixels / SPLIT;
  for (int unit = 0; unit < m.units; unit++)
    for (int pixel = first + threadIdx.x; pixel < last; pixel += THREADS) {
      const int row = quotient(pixel, width), column = pixel - row * p.width;
      float sum[PACK];
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = 0.f;
#pragma unroll
      for (int owner = 0; owner < SPLIT; owner++) {
        const unsigned char* from = sum_at(p, cluster_map(m.base, owner), unit, pixel);
#pragma unroll
        for (int k = 0; k < PACK; k++) sum[k] += load_result(from, sum_plane(p), k);
      }
      put_dx(p, task, unit, row, column, sum);
    }
}
#endif

__device__ __forceinline__ void gradients(const Params& p, const Memory& m, const Range& range, const Task& task, const Rows& rows,
                                          bool first_pass, bool last_pass) {
  scan_gradients(p, m, range, task, rows);
  if (p.dx.data != nullptr) image_gradient(p, m, range, task, rows, first_pass, last_pass);
}

__device__ __forceinline__ void scan_all(const Params& p, const Memory& m, const Range& range) {
  const int directions = range.last - range.first, items = 2 * directions * m.units;
  for (int item = threadIdx.x / 32; item < items; item += THREADS / 32) {
    const int unit = item / (2 * directions), d = range.first + (item - unit * 2 * directions) / 2;
    if (item % 2)
      scan_adjoint(p, m, range, d, unit);
    else
      scan_states(p, m, range, d, unit);
  }
}

KERNEL(THREADS, BLOCKS) resident_backward(CONSTANT_PARAMS p) {
#if SPLIT > 1
  const int rank = (int)cluster_rank();
#else
  const int rank = 0;
#endif
  const int passes = p.knobs[7];
#if RECORDS
  Slabs slabs = slabs_of(p, 2 * passes);
#endif
  const bool ragged = p.height % PLACES != 0 || p.width % PLACES != 0;
  if (ragged) clear_planes(p.knobs[8]);
  __syncthreads();

  for (int index = blockIdx.x / SPLIT; index < p.knobs[1]; index += gridDim.x / SPLIT) {
    const Task task = task_of(p, index, p.knobs[0]);
    for (int pass = 0; pass < passes; pass++) {
      const Range range = directions_of(p, rank * passes + pass, SPLIT * passes);
      const Memory m = memory_of(p, range);
      if (passes > 1 && ragged) {  // the planes of the pass before lay elsewhere
        clear_planes(p.knobs[8]);
        __syncthreads();
      }
      gather_image(p, p.dy, 1, m, task);
#if RECORDS
      const Record& record = slabs.record;
      if (record.data == nullptr || record.x < 0)
#endif
        gather_image(p, p.x, 0, m, task);
#if RECORDS
      if (record.data != nullptr)
        for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) {
          unpack(p, m, range, record, task, raw, row, rows);
        });
      else
#endif
        gather(p, m, range, task);
      __syncthreads();
      scan_all(p, m, range);
      __syncthreads();
#if RECORDS
      if (record.data != nullptr)
        for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) {
          gradients(p, m, range, task, {row, rows, raw, &record}, pass == 0, pass + 1 == passes);
        });
      else
        gradients(p, m, range, task, {0, p.height, nullptr, nullptr}, pass == 0, pass + 1 == passes);
#else
      gradients(p, m, range, task, {0, p.height}, pass == 0, pass + 1 == passes);
#endif
      __syncthreads();
    }
#if SPLIT > 1
    if (p.dx.data != nullptr) {
      cluster_barrier();
      sum_blocks(p, memory_of(p, {0, 0}), task, rank);
      cluster_barrier();
    }
#endif
  }
#if RECORDS
  copy_wait<0>();
#endif
}
