// Forward of images that stay in shared memory: operands are read once, scanned in all directions at the same time by a
// warp each, and summed at the end.
//
// Blocks take one task after the other. A scan overwrites lam and gate with its gated state in float32: only its own lane
// reads them.
//
// Macro of its own: DIRECT, scans write y themselves: there is one direction, vertical, and y consists of planes.
#define UNIT_PLANES (DIRECT || HAS_LAM + HAS_GATE > RESULT_PLANES ? HAS_LAM + HAS_GATE : RESULT_PLANES)
#define LAM_PLANE 0
#define GATE_PLANE HAS_LAM
#define BACKWARD 0
#include "resident_scan.cuh"

// What a line of one direction leaves: its gated state in shared memory, or y.
struct Output {
  storage_t* y;     // this lane's places of the line, if DIRECT
  long long step;   // elements to the line after
};

__device__ __forceinline__ Output output_of(const Params& p, const Task& task, const Scan& s, int unit, int place) {
#if DIRECT
  storage_t* y = at(p.y, task.b, 0, task.c0 + unit, 0, 0) + first_line(p.y, s) + place;
  return {y, line_step(p.y, s)};
#else
  return {nullptr, 0};
#endif
}

#if DIRECT
__device__ __forceinline__ void store_line(storage_t* y, const Lane& r) {
  u32 w[PLACES * (int)sizeof(storage_t) / 4];
#pragma unroll
  for (int i = 0; i < (int)(sizeof(w) / 4); i++)
    w[i] = STORAGE == 0 ? __float_as_uint(r[0][i]) : bits_of(narrow(r[0][2 * i])) | bits_of(narrow(r[0][2 * i + 1])) << 16;
  store_words((unsigned char*)y, w);
}
#endif

// A line's operands as they are stored.
struct Line {
  u32 x[LINE_WORDS];
#if HAS_LAM
  u32 lam[LINE_WORDS];
#endif
#if HAS_GATE
  u32 gate[LINE_WORDS];
#endif
  LineTaps taps;
};

__device__ __forceinline__ void load_line(const Cursor& c, Line& line) {
  load_words(c.x, line.x);
#if HAS_LAM
  load_words(c.units + LAM_PLANE * c.unit, line.lam);
#endif
#if HAS_GATE
  load_words(c.units + GATE_PLANE * c.unit, line.gate);
#endif
  load_taps(c, line.taps);
}

// One direction of one unit of the task, by one warp. The operands of the next line are on their way while one is
// computed.
__device__ __forceinline__ void scan(const Params& p, const Memory& m, const Range& range, const Task& task, int d, int unit) {
  const Scan s = scan_at(p, d);
  const Held held = held_by(s);
  Cursor c = cursor_of(p, m, range, s, d, unit, LAM_PLANE, s.reversed);
  Output output = output_of(p, task, s, unit, held.first);
  Lane h;
  Line line;
  load_line(c, line);
  int left = s.lines;
  const auto step = [&](auto restart) {
    const Line now = line;
#if !DIRECT
    unsigned char* out = c.units;
#endif
    advance(c, --left > 0);
    load_line(c, line);
    Lane u, r;
    widen_lane(now.x, u);
#if HAS_LAM
    Lane lam;
    widen_lane(now.lam, lam);
#pragma unroll
    for (int k = 0; k < PACK; k++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) u[k][v] *= lam[k][v];
#endif
#if HAS_GATE
    widen_lane(now.gate, r);
#endif
    state_of_line<decltype(restart)::value>(now.taps, held, u, h);
#pragma unroll
    for (int k = 0; k < PACK; k++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) r[k][v] = HAS_GATE ? r[k][v] * h[k][v] : h[k][v];
#if DIRECT
    if (held.writes) store_line(output.y, r);
    output.y += output.step;
#else
    __syncwarp();
    if (held.writes) store_result(out, c.unit, r);
#endif
  };
  while (left > 0) {
    int more = min(p.chunk, left) - 1;
    step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
  }
}

#if !DIRECT
// The gated states of a unit at one pixel, summed over directions in their order.
__device__ __forceinline__ void sum_of_pixel(const Params& p, int unit, int row, int column, float (&sum)[PACK]) {
  const int vertical = row * p.knobs[PITCH_V] + column, horizontal = column * p.knobs[PITCH_H] + row;
#pragma unroll
  for (int c = 0; c < PACK; c++) sum[c] = 0.f;
#pragma unroll
  for (int owner = 0; owner < SPLIT; owner++) {
    const Range range = directions_of(owner, SPLIT);
    const Memory m = memory_of(p, range);
    unsigned char* from = shared_memory() + m.directions;
#if SPLIT > 1
    from = cluster_map(from, owner);
#endif
#pragma unroll
    for (int d = 0; d < SCANS; d++) {
      if (d < range.first || d >= range.last) continue;
      const int plane = vertical_at(d) ? p.knobs[UNIT_V] : p.knobs[UNIT_H];
      const int index = unit * UNIT_PLANES * plane + (vertical_at(d) ? vertical : horizontal) * (int)sizeof(unit_t);
#pragma unroll
      for (int c = 0; c < PACK; c++) sum[c] += load_result(from + index, plane, c);
      from += vertical_at(d) ? m.vertical_size : m.horizontal_size;
    }
  }
}

// y of a task; each block of the cluster takes its share of the rows.
__device__ __forceinline__ void sum_directions(const Params& p, const Task& task, int rank) {
  const int first = rank * p.height / SPLIT * p.width, last = (rank + 1) * p.height / SPLIT * p.width;
  const bool words = paired(p.y), wide = two_columns(p, p.y);
  for (int unit = 0; unit < units_of(p); unit++) {
    storage_t* y = at(p.y, task.b, 0, task.c0 + unit * PACK, 0, 0);
    if (wide) {
      for_pixels<2, 2>(p, first, last, [&](int row, int column) {
        float left[PACK], right[PACK];
        sum_of_pixel(p, unit, row, column, left);
        sum_of_pixel(p, unit, row, column + 1, right);
        *(u32*)(y + row * p.y.h + column) = bits_of(narrow(left[0])) | bits_of(narrow(right[0])) << 16;
      });
      continue;
    }
    for_pixels<1, 2>(p, first, last, [&](int row, int column) {
      float sum[PACK];
      sum_of_pixel(p, unit, row, column, sum);
      store_unit(y + row * p.y.h + column * p.y.w, p.y.c, words, sum);
    });
  }
}
#endif

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
  const Range range = directions_of(rank, SPLIT);
  const Memory m = memory_of(p, range);
#if RECORDS
  Slabs slabs = slabs_of(p, 1);
#endif
  clear_planes(p);

  for (int index = blockIdx.x / SPLIT; index < p.knobs[TASKS]; index += gridDim.x / SPLIT) {
    const Task task = task_of(p, index);
#if RECORDS
    if (slabs.records != nullptr) {
      for_slabs(p, slabs, [&](const Slab& slab) { unpack(p, m, range, task, slab); });
      prefetch_task(p, slabs, index + (int)gridDim.x);
    } else
#endif
    {
      gather(p, m, range, task);
      copy_commit();
      copy_wait<0>();
    }
    __syncthreads();
    const int directions = range.last - range.first;
    for (int item = warp_index(); item < directions * units_of(p); item += THREADS / 32)
      scan(p, m, range, task, range.first + item % directions, item / directions);
#if !DIRECT
    whole_cluster();
    sum_directions(p, task, rank);
#endif
    whole_cluster();
  }
#if RECORDS
  copy_wait<0>();
#endif
}
