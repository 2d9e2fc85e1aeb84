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
#define LAM_PLANE 0
#define GATE_PLANE RESULT_PLANES
#define UNIT_PLANES (2 * RESULT_PLANES)
#define IMAGES 2
#include "resident_scan.cuh"

// Scans ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void scan_states(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 0, LAM_PLANE, s.reversed);
  Lane h;
  Line line;
  load_line<HAS_LAM>(c, line);
  int left = s.lines;
  const auto step = [&](auto restart) {
    const Line now = line;
    unsigned char* out = c.units;
    advance(c, --left > 0);
    load_line<HAS_LAM>(c, line);
    state_of_line<HAS_LAM, decltype(restart)::value>(now, held, h);
    __syncwarp();
    if (held.writes) store_result(out, c.unit, h);
  };
  while (left > 0) {
    int more = min(p.chunk, left) - 1;
    step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
  }
}

__device__ __forceinline__ void scan_adjoint(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 1, GATE_PLANE, !s.reversed);
  Lane carried, g;
#pragma unroll
  for (int k = 0; k < PACK; k++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) carried[k][v] = 0.f;
  Line line;
  load_line<HAS_GATE>(c, line);
  int left = s.lines;
  const auto step = [&](auto restart) {
    const Line now = line;
    unsigned char* out = c.units;
    advance(c, --left > 0);
    load_line<HAS_GATE>(c, line);
    adjoint_of_line<HAS_GATE, decltype(restart)::value>(now, held, carried, g);
    __syncwarp();
    if (held.writes) store_result(out, c.unit, g);
  };
  int more = (s.lines - 1) % p.chunk;  // before the restart
  while (left > 0) {
#pragma unroll 2
    for (; more > 0; more--) step(No());
    step(Yes());
    more = p.chunk - 1;
  }
}

// Gradients -----------------------------------------------------------------------------------------------------

// Rows of a task's lam and logits: in memory, or as records in shared memory.
struct Rows {
  int first, count;
  const storage_t* records;  // or null
};

__device__ __forceinline__ float lam_at(const Params& p, const Rows& rows, const Task& task, int d, int c, int row, int column) {
#if RECORDS && HAS_LAM
  if (rows.records != nullptr) {
    const storage_t* record = rows.records + ((row - rows.first) * p.width + column) * RECORD_SIZE;
    return widen(record[RECORD_LAM + d * p.channels + c]);
  }
#endif
  return widen(__ldg(at(p.lam, task.b, d, c, row, column)));
}

__device__ __forceinline__ Taps taps_at(const Params& p, const Rows& rows, const Task& task, int d, int g, int row, int column) {
#if RECORDS
  if (rows.records != nullptr) {
    const storage_t* record = rows.records + ((row - rows.first) * p.width + column) * RECORD_SIZE;
    return logits_at(record, RECORD_TAPS + (d * p.groups + g) * 3);
  }
#endif
  const storage_t* a = at(p.taps, task.b, d, g, row, column);
  return {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
}

// Unit `unit` of image 0 (x) or 1 (dy), as the scans have it.
__device__ __forceinline__ float image_at(const Params& p, const Memory& m, bool vertical, int image, int unit, int index, int c) {
  const int plane = (image * units_of(p) + unit) * (vertical ? p.knobs[UNIT_V] : p.knobs[UNIT_H]);
  const u32 bits = ((const unit_t*)(shared_memory() + (vertical ? m.vertical_images : m.horizontal_images) + plane))[index];
#if PACK == 2
  return c ? widen_high(bits) : widen_low(bits);
#else
  return widen_bits(bits);
#endif
}

// dlam, dgate and the gradient of the taps, of some rows.
__device__ __forceinline__ void scan_gradients(const Params& p, const Memory& m, const Range& range, const Task& task, const Rows& rows) {
  const Divisor chunk = chunk_of(p);
  const int first = rows.first * p.width, last = first + rows.count * p.width;
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
            dlam[k] = g * image_at(p, m, s.vertical, 0, unit, index, k);
            dgate[k] = load_result(h, t.unit, k) * image_at(p, m, s.vertical, 1, unit, index, k);
          }
          if (HAS_LAM && p.dlam.data != nullptr)
            store_unit(at(p.dlam, task.b, d, c, row, column), p.dlam.c, lam_words, dlam);
          if (HAS_GATE && p.dgate.data != nullptr)
            store_unit(at(p.dgate, task.b, d, c, row, column), p.dgate.c, gate_words, dgate);
        }
        if (p.dtaps.data != nullptr) {
          Taps da = {0.f, 0.f, 0.f};
          if (!restart) da = gradient_of(taps_at(p, rows, task, d, task.g0 + group, row, column), dw, has_before, has_after);
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
__device__ __forceinline__ void image_gradient(const Params& p, const Memory& m, const Range& range, const Task& task, const Rows& rows,
                                               bool first_pass, bool last_pass) {
  const int first = rows.first * p.width, last = first + rows.count * p.width;
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
          const float lam = HAS_LAM ? lam_at(p, rows, task, d, task.c0 + unit * PACK + k, row, column) : 1.f;
          sum[k] = fmaf(lam, load_result(g, t.unit, k), sum[k]);
        }
      }
      if (SPLIT == 1 && last_pass)
        put_dx(p, task, unit, row, column, sum);
      else
        store_result_at(kept, sum_plane(p), sum);
    });
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

__device__ __forceinline__ void scan_all(const Params& p, const Memory& m, const Range& range) {
  const int directions = range.last - range.first, scans = 2 * directions;
  for (int item = warp_index(); item < scans * units_of(p); item += THREADS / 32) {
    const int unit = item / scans, d = range.first + item % scans / 2;
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
  const int passes = p.knobs[PASSES];
#if RECORDS
  Slabs slabs = slabs_of(p, 2 * passes);
#endif
  clear_planes(p);

  for (int index = blockIdx.x / SPLIT; index < p.knobs[TASKS]; index += gridDim.x / SPLIT) {
    const Task task = task_of(p, index);
    for (int pass = 0; pass < passes; pass++) {
      const Range range = directions_of(rank * passes + pass, SPLIT * passes);
      const Memory m = memory_of(p, range);
      if (passes > 1) clear_planes(p);  // the planes of the pass before lay elsewhere
      gather_image(p, p.dy, 1, m, task);
      const auto gradients = [&](const Rows& rows) {
        scan_gradients(p, m, range, task, rows);
        if (p.dx.data != nullptr) image_gradient(p, m, range, task, rows, pass == 0, pass + 1 == passes);
      };
#if RECORDS
      const bool records = slabs.records != nullptr;
      if (!RECORD_X || !records) gather_image(p, p.x, 0, m, task);
      if (records)
        for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) { unpack(p, m, range, task, raw, row, rows); });
      else
        gather(p, m, range, task);
#else
      const bool records = false;
      gather_image(p, p.x, 0, m, task);
      gather(p, m, range, task);
      copy_commit();
      copy_wait<0>();
#endif
      __syncthreads();
      scan_all(p, m, range);
      __syncthreads();
#if RECORDS
      if (records)
        for_slabs(p, slabs,
                  [&](const unsigned char* raw, int row, int rows) { gradients({row, rows, (const storage_t*)raw}); });
#endif
      if (!records) gradients({0, p.height, nullptr});
      __syncthreads();
    }
#if SPLIT > 1
    if (p.dx.data != nullptr) {
      cluster_barrier();
      sum_blocks(p, task, rank);
      cluster_barrier();
    }
#endif
  }
#if RECORDS
  copy_wait<0>();
#endif
}
