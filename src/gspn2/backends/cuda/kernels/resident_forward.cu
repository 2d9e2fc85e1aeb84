// Forward of images that stay in shared memory: operands are read once, scanned in all directions at the same time by a
// warp each, and summed at the end.
//
// A task is an image and some of its channels; blocks take one after the other. Its directions are shared out to the
// blocks of a cluster. A scan overwrites lam and gate with its gated state in float32: only its own lane reads them.
//
// Macros beyond those of resident_operands.cuh: BLOCKS (on a multiprocessor).
#define UNIT_PLANES (HAS_LAM + HAS_GATE > RESULT_PLANES ? HAS_LAM + HAS_GATE : RESULT_PLANES)
#define LAM_PLANE 0
#define GATE_PLANE HAS_LAM
#define IMAGES 1
#include "resident_scan.cuh"

// One direction of one unit of the task, by one warp.
__device__ __forceinline__ void scan(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_of(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, 0, 0, s.reversed);
  Lane h;
  Line line;
  u32 gate[LINE_WORDS];
  load_line<HAS_LAM>(c, line);
#if HAS_GATE
  load_words(c.units + GATE_PLANE * c.unit, gate);
#endif
  int until_restart = 0;
#pragma unroll 2
  for (int i = 0; i < s.lines; i++) {
    const Line now = line;
    unsigned char* out = c.units;
    Lane r;
#if HAS_GATE
    widen_lane(gate, r);
#endif
    if (i + 1 < s.lines) {
      advance(c);
      load_line<HAS_LAM>(c, line);
#if HAS_GATE
      load_words(c.units + GATE_PLANE * c.unit, gate);
#endif
    }
    state_of_line<HAS_LAM>(now, held, until_restart == 0, h);
    until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
#pragma unroll
    for (int k = 0; k < PACK; k++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) r[k][v] = HAS_GATE ? r[k][v] * h[k][v] : h[k][v];
    if (held.any) store_result(out, c.unit, r);
  }
}

// The sum over directions, in their order, by all blocks of the cluster.
__device__ __forceinline__ void sum_directions(const Params& p, const Memory& m, const Task& task, int rank) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width, first = rank * pixels / SPLIT, last = (rank + 1) * pixels / SPLIT;
  const bool words = paired(p.y);
  for (int unit = 0; unit < m.units; unit++) {
    storage_t* y = p.y.data + task.b * p.y.b + (task.c0 + unit * PACK) * p.y.c;
    for (int pixel = first + threadIdx.x; pixel < last; pixel += THREADS) {
      const int row = quotient(pixel, width), column = pixel - row * p.width;
      float sum[PACK];
#pragma unroll
      for (int c = 0; c < PACK; c++) sum[c] = 0.f;
#pragma unroll
      for (int owner = 0; owner < SPLIT; owner++) {
        const Range range = directions_of(p, owner, SPLIT);
#if SPLIT > 1
        const Memory theirs = memory_of(p, range);
        unsigned char* base = cluster_map(theirs.base, owner);
        int offset = theirs.directions;
#else
        unsigned char* base = m.base;
        int offset = m.directions;
#endif
#pragma unroll
        for (int i = 0; i < 4 / SPLIT; i++) {
          const int d = range.first + i;
          if (d >= range.last) break;
          const bool vertical = p.directions[d] < 2;
          const Planes planes = planes_for(m, vertical);
          const int index = vertical ? row * planes.pitch + column : column * planes.pitch + row;
          const unsigned char* from = base + offset + unit * UNIT_PLANES * planes.unit + index * (int)sizeof(unit_t);
#pragma unroll
          for (int c = 0; c < PACK; c++) sum[c] += load_result(from, planes.unit, c);
          offset += planes.direction;
        }
      }
      storage_t* out = y + row * p.y.h + column * p.y.w;
#if PACK == 2
      if (words) {
        *(u32*)out = bits_of(narrow(sum[0])) | bits_of(narrow(sum[1])) << 16;
      } else {
        out[0] = narrow(sum[0]);
        out[p.y.c] = narrow(sum[1]);
      }
#else
      out[0] = narrow(sum[0]);
#endif
    }
  }
}

__device__ __forceinline__ void whole_cluster() {
#if SPLIT > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
}

KERNEL(THREADS, BLOCKS) resident_forward(CONSTANT_PARAMS p) {
#if SPLIT > 1
  const int rank = (int)cluster_rank();
#else
  const int rank = 0;
#endif
  const Range range = directions_of(p, rank, SPLIT);
  const Memory m = memory_of(p, range);
  const int tasks = p.knobs[1], stride = gridDim.x / SPLIT, warp = threadIdx.x / 32;
#if RECORDS
  Slabs slabs = slabs_of(p, 1);
#endif
  if (p.height % PLACES != 0 || p.width % PLACES != 0) clear_planes(p.knobs[6]);
  __syncthreads();

  for (int index = blockIdx.x / SPLIT; index < tasks; index += stride) {
    const Task task = task_of(p, index, p.knobs[0]);
#if RECORDS
    if (slabs.record.data != nullptr) {
      if (slabs.record.x < 0) gather_image(p, p.x, 0, m, task);
      for_slabs(p, slabs, [&](const unsigned char* raw, int row, int rows) {
        unpack(p, m, range, slabs.record, task, raw, row, rows);
      });
    } else
#endif
    {
      gather_image(p, p.x, 0, m, task);
      gather(p, m, range, task);
      __syncthreads();
    }
    const int items = (range.last - range.first) * m.units;
    for (int item = warp; item < items; item += THREADS / 32) {
      const int unit = item / (range.last - range.first);
      scan(p, m, range, range.first + item - unit * (range.last - range.first), unit);
    }
    whole_cluster();
    sum_directions(p, m, task, rank);
    whole_cluster();
  }
#if RECORDS
  copy_wait<0>();
#endif
}
