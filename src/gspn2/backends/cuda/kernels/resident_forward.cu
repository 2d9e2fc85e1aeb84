// Forward of images that stay in shared memory: operands are read once, scanned in all directions at the same time by a
// warp each, and summed at the end.
//
// A task is an image and some of its channels (`Task`); blocks take one after the other. Its directions are shared out
// to the SPLIT blocks of a cluster. Shared memory of a block:
//   x             a plane for vertical scans, one with rows and columns exchanged for horizontal ones, for each unit
//   directions    each: for every unit the planes of lam and gate, and for every tap group its weights; in scan
//                 coordinates, (line, place) with places adjacent, lines in image order
//   records       raw pixels on their way in (below)
// A scan overwrites lam and gate with its gated state in float32: only its own lane has read them.
//
// RECORDS: lam, gate and taps are views of one tensor whose pixels are dense records (models make it so): its rows are
// copied as they are, whole cache lines, through a ring of RING slabs, which also runs ahead into the next image.
//
// Macros: THREADS, BLOCKS (a multiprocessor), PACK, PLACES, RECORDS, RING, SPLIT.
// Knobs: 0 channels a task, 1 tasks, 2 and 3 pitch of vertical and horizontal lines in units, 4 rows of a slab,
// 5 bytes of a slab, 6 bytes of shared memory before the ring.
#include "resident.cuh"

// Shared memory of one orientation: planes of (line, place).
struct Planes {
  int pitch;      // units from line to line
  int unit;       // bytes of a plane of units
  int taps;       // bytes of the weights of one tap group
  int direction;  // bytes of everything that belongs to one direction
};

#define OPERAND_PLANES (HAS_LAM + HAS_GATE > RESULT_PLANES ? HAS_LAM + HAS_GATE : RESULT_PLANES)

__device__ __forceinline__ Planes planes_of(int lines, int pitch, int units, int groups) {
  const int places = lines * pitch;
  const int unit = (places * (int)sizeof(unit_t) + 15) & ~15;
  const int taps = TAP_PLANES * ((places * (TAP_BYTES / TAP_PLANES) + 15) & ~15);
  return {pitch, unit, taps, units * OPERAND_PLANES * unit + groups * taps};
}

struct Memory {
  unsigned char* base;
  Planes vertical, horizontal;
  int units, groups;
  int x_vertical, x_horizontal, directions;  // byte offsets
};

// Field by field: a reference to either would keep both in memory.
__device__ __forceinline__ Planes planes_for(const Memory& m, bool vertical) {
  const Planes &v = m.vertical, &h = m.horizontal;
  return {vertical ? v.pitch : h.pitch, vertical ? v.unit : h.unit, vertical ? v.taps : h.taps,
          vertical ? v.direction : h.direction};
}

// Directions [first, last) of a block of rank `rank` within its cluster.
struct Range {
  int first, last;
};
__device__ __forceinline__ Range directions_of(const Params& p, int rank) {
  return {rank * p.scans / SPLIT, (rank + 1) * p.scans / SPLIT};
}

__device__ __forceinline__ Memory memory_of(const Params& p, const Range& range) {
  const int channels = p.knobs[0], per_group = p.channels / p.groups;
  Memory m;
  m.base = shared_memory();
  m.units = channels / PACK;
  m.groups = channels > per_group ? channels / per_group : 1;
  m.vertical = planes_of(p.height, p.knobs[2], m.units, m.groups);
  m.horizontal = planes_of(p.width, p.knobs[3], m.units, m.groups);
  bool any_vertical = false, any_horizontal = false;
  for (int d = range.first; d < range.last; d++) {
    if (p.directions[d] < 2)
      any_vertical = true;
    else
      any_horizontal = true;
  }
  m.x_vertical = 0;
  m.x_horizontal = any_vertical ? m.units * m.vertical.unit : 0;
  m.directions = m.x_horizontal + (any_horizontal ? m.units * m.horizontal.unit : 0);
  return m;
}

// Byte offset of direction d of a block whose directions begin with `first`.
__device__ __forceinline__ int offset_of(const Params& p, const Memory& m, int first, int d) {
  int offset = m.directions;
  for (int i = first; i < d; i++) offset += p.directions[i] < 2 ? m.vertical.direction : m.horizontal.direction;
  return offset;
}

// Operands into shared memory -----------------------------------------------------------------------------------

// Where the operands of one direction go: (row, column) is place row * row_step + column * column_step.
struct Target {
  unsigned char *units, *taps;
  int unit, tap;  // bytes of a plane of units, and of the weights of one tap group
  int row_step, column_step;
  bool vertical;
};

__device__ __forceinline__ Target target_of(const Params& p, const Memory& m, int first, int d) {
  const bool vertical = p.directions[d] < 2;
  const Planes planes = planes_for(m, vertical);
  unsigned char* units = m.base + offset_of(p, m, first, d);
  return {units, units + m.units * OPERAND_PLANES * planes.unit, planes.unit, planes.taps, vertical ? planes.pitch : 1,
          vertical ? 1 : planes.pitch, vertical};
}

__device__ __forceinline__ void put_weights(const Params& p, const Target& t, int g, int index, int row, int column, const Taps& a) {
  const int place = t.vertical ? column : row, places = t.vertical ? p.width : p.height;
  store_taps(t.taps + g * t.tap, index, t.tap / TAP_PLANES, weights_of(a, place > 0, place + 1 < places));
}

__device__ __forceinline__ void put_x(const Memory& m, int unit, int row, int column, unit_t value) {
  if (m.x_horizontal > m.x_vertical)
    ((unit_t*)(m.base + m.x_vertical + unit * m.vertical.unit))[row * m.vertical.pitch + column] = value;
  if (m.directions > m.x_horizontal)
    ((unit_t*)(m.base + m.x_horizontal + unit * m.horizontal.unit))[column * m.horizontal.pitch + row] = value;
}

// x of a task, from any strides.
__device__ __forceinline__ void gather_x(const Params& p, const Memory& m, const Task& task) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width;
  const bool words = paired(p.x);
  for (int unit = 0; unit < m.units; unit++) {
    const storage_t* data = at(p.x, task.b, 0, task.c0 + unit * PACK, 0, 0);
#pragma unroll 4
    for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
      const int row = quotient(pixel, width), column = pixel - row * p.width;
      put_x(m, unit, row, column, load_unit(data + row * p.x.h + column * p.x.w, p.x.c, words));
    }
  }
}

__device__ __forceinline__ void gather_units(const Params& p, const View& v, const Target& t, unsigned char* out, const storage_t* data) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width;
  const bool words = paired(v);
#pragma unroll 4
  for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
    const int row = quotient(pixel, width), column = pixel - row * p.width;
    ((unit_t*)out)[row * t.row_step + column * t.column_step] = load_unit(data + row * v.h + column * v.w, v.c, words);
  }
}

// Everything of a task but x, from any strides.
__device__ void gather(const Params& p, const Memory& m, const Range& range, const Task& task) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width;
  for (int d = range.first; d < range.last; d++) {
    const Target t = target_of(p, m, range.first, d);
    for (int unit = 0; unit < m.units; unit++) {
      unsigned char* out = t.units + unit * OPERAND_PLANES * t.unit;
      const int c = task.c0 + unit * PACK;
#if HAS_LAM
      gather_units(p, p.lam, t, out, at(p.lam, task.b, d, c, 0, 0));
#endif
#if HAS_GATE
      gather_units(p, p.gate, t, out + HAS_LAM * t.unit, at(p.gate, task.b, d, c, 0, 0));
#endif
    }
    for (int g = 0; g < m.groups; g++) {
      const storage_t* data = at(p.taps, task.b, d, task.g0 + g, 0, 0);
#pragma unroll 2
      for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
        const int row = quotient(pixel, width), column = pixel - row * p.width;
        const storage_t* a = data + row * p.taps.h + column * p.taps.w;
        const Taps logits = {widen(__ldg(a)), widen(__ldg(a + p.taps.k)), widen(__ldg(a + 2 * p.taps.k))};
        put_weights(p, t, g, row * t.row_step + column * t.column_step, row, column, logits);
      }
    }
  }
}

#if RECORDS
// The record of a pixel: elements `size`, its bytes, and where in it the operands are (bytes).
struct Record {
  const unsigned char* data;  // of the first pixel of image 0; null: the operands are not in one record
  int bytes, lam, gate, taps, x;  // x < 0: x is elsewhere
};

__device__ __forceinline__ Record record_of(const Params& p) {
  const View& v = p.taps;
  const storage_t* first = v.data;
  int elements = p.scans * p.groups * 3;
#if HAS_LAM
  if (p.lam.data < first) first = p.lam.data;
  elements += p.scans * p.channels;
#endif
#if HAS_GATE
  if (p.gate.data < first) first = p.gate.data;
  elements += p.scans * p.channels;
#endif
  const bool x_inside = v.w == elements + p.channels;
  if (x_inside) {
    if (p.x.data < first) first = p.x.data;
    elements += p.channels;
  }
  Record r;
  r.bytes = (int)v.w * (int)sizeof(storage_t);
  r.taps = (int)(v.data - first) * (int)sizeof(storage_t);
  bool inside = v.w == elements && v.data - first < v.w;
#if HAS_LAM
  r.lam = (int)(p.lam.data - first) * (int)sizeof(storage_t);
  inside = inside && p.lam.data - first < v.w;
#endif
#if HAS_GATE
  r.gate = (int)(p.gate.data - first) * (int)sizeof(storage_t);
  inside = inside && p.gate.data - first < v.w;
#endif
  r.x = x_inside ? (int)(p.x.data - first) * (int)sizeof(storage_t) : -1;
  if (x_inside) inside = inside && p.x.data - first < v.w;
  // Words are read out of records.
  int offsets = PACK == 2 && x_inside ? r.x : 0;
#if HAS_LAM && PACK == 2
  offsets |= r.lam;
#endif
#if HAS_GATE && PACK == 2
  offsets |= r.gate;
#endif
  inside = inside && ((offsets | (int)(u64)first) & 3) == 0;
  r.data = inside ? (const unsigned char*)first : nullptr;
  return r;
}

template <int SIZE>
__device__ __forceinline__ void copy_run(unsigned char* to, const unsigned char* from, int bytes) {
  for (int o = threadIdx.x * SIZE; o < bytes; o += THREADS * SIZE) copy_async<SIZE>(to + o, from + o);
}

// Rows [row, row + rows) of an image, dense in memory, on their way to `to`.
__device__ __forceinline__ void copy_rows(const Params& p, const Record& r, unsigned char* to, int b, int row, int rows) {
  const unsigned char* from = r.data + ((long long)b * p.height + row) * p.width * r.bytes;
  const int bytes = rows * p.width * r.bytes;
  const u32 alignment = (u32)(u64)from | (u32)bytes;
  if ((alignment & 15) == 0)
    copy_run<16>(to, from, bytes);
  else if ((alignment & 7) == 0)
    copy_run<8>(to, from, bytes);
  else
    copy_run<4>(to, from, bytes);
}

// Three 16-bit logits at any even offset.
__device__ __forceinline__ Taps logits_at(const unsigned char* p, int offset) {
#if STORAGE == 0
  const float* a = (const float*)(p + offset);
  return {a[0], a[1], a[2]};
#else
  const u32* words = (const u32*)(p + (offset & ~3));
  const int shift = (offset & 2) * 8;
  const u32 low = words[0], high = words[1];
  const u32 pair = __funnelshift_r(low, high, shift);
  return {widen_low(pair), widen_high(pair), widen_low(high >> shift)};
#endif
}

__device__ __forceinline__ unit_t raw_unit(const unsigned char* p) {
  return *(const unit_t*)p;
}

// Puts the rows of a slab in order.
__device__ __forceinline__ void unpack(const Params& p, const Memory& m, const Range& range, const Record& r, const Task& task,
                                       const unsigned char* raw, int row0, int rows) {
  const Divisor width = divisor(p.width);
  const int pixels = rows * p.width;
  for (int d = range.first; d < range.last; d++) {
    const Target t = target_of(p, m, range.first, d);
    for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
      const int line = quotient(pixel, width), column = pixel - line * p.width, row = row0 + line;
      const unsigned char* record = raw + pixel * r.bytes;
      const int index = row * t.row_step + column * t.column_step;
      for (int unit = 0; unit < m.units; unit++) {
        const int channel = (d * p.channels + task.c0 + unit * PACK) * (int)sizeof(storage_t);
        unsigned char* out = t.units + unit * OPERAND_PLANES * t.unit;
#if HAS_LAM
        ((unit_t*)out)[index] = raw_unit(record + r.lam + channel);
#endif
#if HAS_GATE
        ((unit_t*)(out + HAS_LAM * t.unit))[index] = raw_unit(record + r.gate + channel);
#endif
      }
      for (int g = 0; g < m.groups; g++) {
        const int k = (d * p.groups + task.g0 + g) * 3 * (int)sizeof(storage_t);
        put_weights(p, t, g, index, row, column, logits_at(record, r.taps + k));
      }
    }
  }
  if (r.x < 0) return;
  for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
    const int line = quotient(pixel, width), column = pixel - line * p.width;
    for (int unit = 0; unit < m.units; unit++)
      put_x(m, unit, row0 + line, column,
            raw_unit(raw + pixel * r.bytes + r.x + (task.c0 + unit * PACK) * (int)sizeof(storage_t)));
  }
}
#endif

// Scans ---------------------------------------------------------------------------------------------------------

struct Line {
  u32 x[LINE_WORDS], taps[TAP_WORDS];
#if HAS_LAM
  u32 lam[LINE_WORDS];
#endif
#if HAS_GATE
  u32 gate[LINE_WORDS];
#endif
};

// This lane's part of a scan: where its places of a line begin, in bytes from the line's start counted in units.
struct Cursor {
  unsigned char *x, *units, *taps;
  int unit, tap;                       // bytes from plane to plane, and from tap to tap where they are planes
  int step, tap_step;                  // bytes from line to line in scan order
};

__device__ __forceinline__ void load_line(const Cursor& c, Line& line) {
  load_words(c.x, line.x);
#if HAS_LAM
  load_words(c.units, line.lam);
#endif
#if HAS_GATE
  load_words(c.units + HAS_LAM * c.unit, line.gate);
#endif
#if TAP_PAIR
  load_words(c.taps, line.taps);
#else
#pragma unroll
  for (int k = 0; k < 3; k++) {
    u32 w[TAP_PLANE_WORDS];
    load_words(c.taps + k * c.tap, w);
#pragma unroll
    for (int i = 0; i < TAP_PLANE_WORDS; i++) line.taps[k * TAP_PLANE_WORDS + i] = w[i];
  }
#endif
}

__device__ __forceinline__ void advance(Cursor& c) {
  c.x += c.step;
  c.units += c.step;
  c.taps += c.tap_step;
}

// The state of the next line from h, of the line before.
__device__ __forceinline__ void scan_line(const Line& line, Lane& h, bool restart, bool first_lane, bool last_lane) {
  Lane u;
  widen_lane(line.x, u);
#if HAS_LAM
  Lane lam;
  widen_lane(line.lam, lam);
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) u[c][v] *= lam[c][v];
#endif
  if (!restart) {
    LaneTaps w;
    widen_taps(line.taps, w);
#pragma unroll
    for (int c = 0; c < PACK; c++) {
      float before = __shfl_up_sync(0xffffffffu, h[c][PLACES - 1], 1);
      float after = __shfl_down_sync(0xffffffffu, h[c][0], 1);
      before = first_lane ? 0.f : before;
      after = last_lane ? 0.f : after;
#pragma unroll
      for (int v = 0; v < PLACES; v++) {
        u[c][v] = fmaf(w.here[v], h[c][v], u[c][v]);
        if (v > 0) u[c][v] = fmaf(w.before[v], h[c][v - 1], u[c][v]);
        if (v + 1 < PLACES) u[c][v] = fmaf(w.after[v], h[c][v + 1], u[c][v]);
      }
      u[c][0] = fmaf(w.before[0], before, u[c][0]);
      u[c][PLACES - 1] = fmaf(w.after[PLACES - 1], after, u[c][PLACES - 1]);
    }
  }
#pragma unroll
  for (int c = 0; c < PACK; c++)
#pragma unroll
    for (int v = 0; v < PLACES; v++) h[c][v] = u[c][v];
}

// One direction of one unit of the task, by one warp.
__device__ __forceinline__ void scan(const Params& p, const Memory& m, const Range& range, int d, int unit) {
  const Scan s = scan_of(p, d);
  const Planes planes = planes_for(m, s.vertical);
  const int lane = threadIdx.x & 31, last = (s.places - 1) / PLACES, mine = min(lane, last) * PLACES;
  const int group = m.groups == 1 ? 0 : unit * m.groups / m.units;
  const int start = (s.reversed ? s.lines - 1 : 0) * planes.pitch + mine, step = s.reversed ? -planes.pitch : planes.pitch;
  const int tap_size = TAP_PAIR ? 4 : (int)sizeof(storage_t), unit_size = (int)sizeof(unit_t);
  unsigned char* base = m.base + offset_of(p, m, range.first, d);
  Cursor c;
  c.x = m.base + (s.vertical ? m.x_vertical : m.x_horizontal) + unit * planes.unit + start * unit_size;
  c.units = base + unit * OPERAND_PLANES * planes.unit + start * unit_size;
  c.taps = base + m.units * OPERAND_PLANES * planes.unit + group * planes.taps + start * tap_size;
  c.unit = planes.unit;
  c.tap = planes.taps / TAP_PLANES;
  c.step = step * unit_size;
  c.tap_step = step * tap_size;
  // Places behind the end of the line, in the last lane: zero, whatever their neighbours hold.
  const bool ragged = s.places % PLACES != 0;
  const int beyond = lane == last ? s.places - mine : PLACES;

  Lane h;
  Line line;
  load_line(c, line);
  int until_restart = 0;
#pragma unroll 2
  for (int i = 0; i < s.lines; i++) {
    const Line now = line;
    unsigned char* out = c.units;
    if (i + 1 < s.lines) {
      advance(c);
      load_line(c, line);
    }
    scan_line(now, h, until_restart == 0, lane == 0, lane >= last);
    until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
    if (ragged) {
#pragma unroll
      for (int k = 0; k < PACK; k++)
#pragma unroll
        for (int v = 1; v < PLACES; v++) h[k][v] = v < beyond ? h[k][v] : 0.f;
    }
    Lane r;
#if HAS_GATE
    widen_lane(now.gate, r);
#endif
#pragma unroll
    for (int k = 0; k < PACK; k++)
#pragma unroll
      for (int v = 0; v < PLACES; v++) r[k][v] = HAS_GATE ? r[k][v] * h[k][v] : h[k][v];
    if (lane <= last) store_result(out, c.unit, r);
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
        const Range range = directions_of(p, owner);
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
          const unsigned char* from = base + offset + unit * OPERAND_PLANES * planes.unit + index * (int)sizeof(unit_t);
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
  const Range range = directions_of(p, rank);
  const Memory m = memory_of(p, range);
  const int tasks = p.knobs[1], stride = gridDim.x / SPLIT, warp = threadIdx.x / 32;
#if RECORDS
  const Record record = record_of(p);
  const int slab_rows = p.knobs[4], slabs = (p.height + slab_rows - 1) / slab_rows;
  unsigned char* ring = m.base + p.knobs[6];
  // The slabs of this block's tasks, numbered through.
  const int total = ((tasks - (int)blockIdx.x + stride - 1) / stride) * slabs;
  const auto fetch = [&](int n) {
    if (n < total && record.data != nullptr) {
      const Task task = task_of(p, blockIdx.x + n / slabs * stride, p.knobs[0]);
      const int row = n % slabs * slab_rows;
      copy_rows(p, record, ring + n % RING * p.knobs[5], task.b, row, min(slab_rows, p.height - row));
    }
    copy_commit();
  };
  for (int n = 0; n < RING; n++) fetch(n);
  int slab = 0;
#endif
  // Lanes read whole groups of places: what lies behind the end of a line must count as 0.
  for (int i = threadIdx.x * 4; i < p.knobs[6]; i += THREADS * 4) *(u32*)(m.base + i) = 0u;
  __syncthreads();

  for (int index = blockIdx.x / SPLIT; index < tasks; index += stride) {
    const Task task = task_of(p, index, p.knobs[0]);
#if RECORDS
    if (record.data != nullptr) {
      if (record.x < 0) gather_x(p, m, task);
      for (int k = 0; k < slabs; k++, slab++) {
        copy_wait<RING - 1>();
        __syncthreads();
        const int row = k * slab_rows;
        unpack(p, m, range, record, task, ring + slab % RING * p.knobs[5], row, min(slab_rows, p.height - row));
        __syncthreads();
        fetch(slab + RING);
      }
    } else
#endif
    {
      gather_x(p, m, task);
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
