// Gradients from states and adjoints in shared memory, by all threads.
#pragma once
#include "resident_logits.cuh"
#include "resident_scan.cuh"

#if !RECORDS
// Rows of an image that are to be read from the tensors (resident_records.cuh has those in shared memory).
struct Slab {
  const storage_t *records, *x, *dy;
  int first, rows;
};
#endif

__device__ __forceinline__ float lam_at(const Params& p, const Slab& slab, const Task& task, int d, int c, int row, int column) {
#if RECORDS && HAS_LAM
  if (slab.records != nullptr)
    return widen(slab.records[((row - slab.first) * p.width + column) * RECORD_SIZE + RECORD_LAM + d * p.channels + c]);
#endif
  return widen(__ldg(at(p.lam, task.b, d, c, row, column)));
}

__device__ __forceinline__ float x_at(const Params& p, const Slab& slab, const Task& task, int c, int row, int column) {
#if RECORDS
  const int pixel = (row - slab.first) * p.width + column;
  if (slab.records != nullptr) return widen(RECORD_X ? slab.records[pixel * RECORD_SIZE + c] : slab.x[pixel * p.channels + c]);
#endif
  return widen(__ldg(at(p.x, task.b, 0, c, row, column)));
}

__device__ __forceinline__ float dy_at(const Params& p, const Slab& slab, const Task& task, int c, int row, int column) {
#if RECORDS
  if (slab.records != nullptr) return widen(slab.dy[((row - slab.first) * p.width + column) * p.channels + c]);
#endif
  return widen(__ldg(at(p.dy, task.b, 0, c, row, column)));
}

__device__ __forceinline__ Taps taps_at(const Params& p, const Slab& slab, const Task& task, int d, int g, int row, int column) {
#if RECORDS
  if (slab.records != nullptr) {
    const storage_t* record = slab.records + ((row - slab.first) * p.width + column) * RECORD_SIZE;
    return logits_at(record, RECORD_TAPS + (d * p.groups + g) * 3);
  }
#endif
  const storage_t* a = at(p.taps, task.b, d, g, row, column);
  return {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
}

// dlam, dgate and the gradient of the taps, of some rows.
__device__ __forceinline__ void scan_gradients(const Params& p, const Memory& m, const Range& range, const Task& task, const Slab& slab) {
  const Divisor chunk = chunk_of(p);
  const int first = slab.first * p.width, last = first + slab.rows * p.width;
  const int per_group = units_of(p) / groups_of(p), size = (int)sizeof(unit_t);
  const bool lam_words = HAS_LAM && paired(p.dlam), gate_words = HAS_GATE && paired(p.dgate);
  for (int d = range.first; d < range.last; d++) {
    const Scan s = scan_at(p, d);
    const Target t = target_of(p, m, range.first, d);
    const int to_previous = (s.reversed ? 1 : -1) * (s.vertical ? t.row_step : t.column_step) * size;
    for (int group = 0; group < groups_of(p); group++) {
      for_pixels(p, first, last, [&](int row, int column) {
        const int line = s.vertical ? row : column, place = s.vertical ? column : row;
        const int index = row * t.row_step + column * t.column_step, i = s.reversed ? s.lines - 1 - line : line;
        const bool restart = i == quotient(i, chunk) * p.chunk;
        const bool has_before = place > 0, has_after = place + 1 < s.places;
        Taps dw = {0.f, 0.f, 0.f};
        for (int unit = group * per_group; unit < (group + 1) * per_group; unit++) {
          const unsigned char* h = t.units + unit * UNIT_PLANES * t.unit + index * size;
          const unsigned char* previous = h + to_previous;
          const int c = task.c0 + unit * PACK;
          float dlam[PACK], dgate[PACK];
#pragma unroll
          for (int k = 0; k < PACK; k++) {
            const float g = load_result(h + GATE_PLANE * t.unit, t.unit, k);
            if (!restart) {
              dw.here = fmaf(g, load_result(previous, t.unit, k), dw.here);
              if (has_before) dw.before = fmaf(g, load_result(previous - size, t.unit, k), dw.before);
              if (has_after) dw.after = fmaf(g, load_result(previous + size, t.unit, k), dw.after);
            }
            dlam[k] = HAS_LAM ? g * x_at(p, slab, task, c + k, row, column) : 0.f;
            dgate[k] = HAS_GATE ? load_result(h, t.unit, k) * dy_at(p, slab, task, c + k, row, column) : 0.f;
          }
          if (HAS_LAM && p.dlam.data != nullptr)
            store_unit(at(p.dlam, task.b, d, c, row, column), p.dlam.c, lam_words, dlam);
          if (HAS_GATE && p.dgate.data != nullptr)
            store_unit(at(p.dgate, task.b, d, c, row, column), p.dgate.c, gate_words, dgate);
        }
        if (p.dtaps.data != nullptr) {
          Taps da = {0.f, 0.f, 0.f};
          if (!restart)
            da = gradient_of(t.taps + group * t.tap, index, taps_at(p, slab, task, d, task.g0 + group, row, column), dw, has_before,
                             has_after);
          storage_t* out = at(p.dtaps, task.b, d, task.g0 + group, row, column);
          out[0] = narrow(da.before);
          out[p.dtaps.k] = narrow(da.here);
          out[2 * p.dtaps.k] = narrow(da.after);
        }
      });
    }
  }
}

// Planes of the float32 sums of dx, in (row, column).
__device__ __forceinline__ int sum_plane(const Params& p) { return (p.height * p.width * (int)sizeof(unit_t) + 15) & ~15; }

__device__ __forceinline__ unsigned char* sum_at(const Params& p, int unit, int row, int column) {
  return shared_memory() + p.knobs[SUMS_AT] + unit * RESULT_PLANES * sum_plane(p) + (row * p.width + column) * (int)sizeof(unit_t);
}

__device__ __forceinline__ void put_dx(const Params& p, const Task& task, int unit, int row, int column, const float (&sum)[PACK]) {
  store_unit(at(p.dx, task.b, 0, task.c0 + unit * PACK, row, column), p.dx.c, paired(p.dx), sum);
}

// dx of some rows: the sum over the directions of this pass, after those of the passes before.
__device__ __forceinline__ void image_gradient(const Params& p, const Memory& m, const Range& range, const Task& task, const Slab& slab,
                                               bool first_pass, bool last_pass) {
  const int first = slab.first * p.width, last = first + slab.rows * p.width;
  for (int unit = 0; unit < units_of(p); unit++)
    for_pixels(p, first, last, [&](int row, int column) {
      unsigned char* kept = sum_at(p, unit, row, column);
      float sum[PACK];
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = first_pass ? 0.f : load_result(kept, sum_plane(p), k);
      for (int d = range.first; d < range.last; d++) {
        const Target t = target_of(p, m, range.first, d);
        const unsigned char* g = t.units + (unit * UNIT_PLANES + GATE_PLANE) * t.unit +
                                 (row * t.row_step + column * t.column_step) * (int)sizeof(unit_t);
#pragma unroll
        for (int k = 0; k < PACK; k++) {
          const float lam = HAS_LAM ? lam_at(p, slab, task, d, task.c0 + unit * PACK + k, row, column) : 1.f;
          sum[k] = fmaf(lam, load_result(g, t.unit, k), sum[k]);
        }
      }
      if (SPLIT == 1 && last_pass)
        put_dx(p, task, unit, row, column, sum);
      else
        store_result_at(kept, sum_plane(p), sum);
    });
}

__device__ __forceinline__ void gradients(const Params& p, const Memory& m, const Range& range, const Task& task, const Slab& slab,
                                          bool first_pass, bool last_pass) {
  scan_gradients(p, m, range, task, slab);
  if (p.dx.data != nullptr) image_gradient(p, m, range, task, slab, first_pass, last_pass);
}

#if SPLIT > 1
// dx from what the blocks of the cluster summed, in their order; each block takes its share of the pixels.
__device__ __forceinline__ void sum_blocks(const Params& p, const Task& task, int rank) {
  const int pixels = p.height * p.width;
  for (int unit = 0; unit < units_of(p); unit++)
    for_pixels(p, rank * pixels / SPLIT, (rank + 1) * pixels / SPLIT, [&](int row, int column) {
      float sum[PACK];
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = 0.f;
#pragma unroll
      for (int owner = 0; owner < SPLIT; owner++) {
        const unsigned char* from = cluster_map(sum_at(p, unit, row, column), owner);
#pragma unroll
        for (int k = 0; k < PACK; k++) sum[k] += load_result(from, sum_plane(p), k);
      }
      put_dx(p, task, unit, row, column, sum);
    });
}
#endif
