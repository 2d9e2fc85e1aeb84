// Operands into shared memory, put in order there: forward and backward.
//
// A direction's operands lie in scan coordinates, (line, place) with places adjacent, lines in image order: planes of
// units, UNIT_PLANES for each unit of the task, and the weights of each tap group. Images (x, and dy in backward) are
// there for vertical scans, and with rows and columns exchanged for horizontal ones.
//
// RECORDS: lam, gate and taps are views of one tensor whose pixels are dense records (models make it so). Its rows are
// copied as they are, whole cache lines, slab after slab through a ring of RING.
//
// Macros beyond those of resident.cuh: THREADS, RECORDS, RING, SPLIT (blocks of a cluster that share the directions of
// a task), and of the kernel itself UNIT_PLANES, LAM_PLANE and GATE_PLANE (which of them), IMAGES (1: x, 2: x and dy).
// Knobs: 0 channels a task, 1 tasks, 2 and 3 pitch of vertical and horizontal lines in units, 4 rows of a slab,
// 5 bytes of a slab, 6 bytes of shared memory before the ring.
#pragma once
#include "resident.cuh"

// Shared memory of one orientation: planes of (line, place).
struct Planes {
  int pitch;      // units from line to line
  int unit;       // bytes of a plane of units
  int taps;       // bytes of the weights of one tap group
  int direction;  // bytes of everything that belongs to one direction
};

__device__ __forceinline__ Planes planes_of(int lines, int pitch, int units, int groups) {
  const int places = lines * pitch;
  const int unit = (places * (int)sizeof(unit_t) + 15) & ~15;
  const int taps = TAP_PLANES * ((places * (TAP_BYTES / TAP_PLANES) + 15) & ~15);
  return {pitch, unit, taps, units * UNIT_PLANES * unit + groups * taps};
}

struct Memory {
  unsigned char* base;
  Planes vertical, horizontal;
  int units, groups;
  // Byte offsets. An orientation that no direction needs has no images.
  int vertical_images, horizontal_images, directions;
};

// Field by field: a reference to either would keep both in memory.
__device__ __forceinline__ Planes planes_for(const Memory& m, bool vertical) {
  const Planes &v = m.vertical, &h = m.horizontal;
  return {vertical ? v.pitch : h.pitch, vertical ? v.unit : h.unit, vertical ? v.taps : h.taps,
          vertical ? v.direction : h.direction};
}

// Directions [first, last): part `part` of `parts`.
struct Range {
  int first, last;
};
__device__ __forceinline__ Range directions_of(const Params& p, int part, int parts) {
  return {part * p.scans / parts, (part + 1) * p.scans / parts};
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
  m.vertical_images = 0;
  m.horizontal_images = any_vertical ? IMAGES * m.units * m.vertical.unit : 0;
  m.directions = m.horizontal_images + (any_horizontal ? IMAGES * m.units * m.horizontal.unit : 0);
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
  return {units, units + m.units * UNIT_PLANES * planes.unit, planes.unit, planes.taps, vertical ? planes.pitch : 1,
          vertical ? 1 : planes.pitch, vertical};
}

__device__ __forceinline__ void put_weights(const Params& p, const Target& t, int g, int index, int row, int column, const Taps& a) {
  const int place = t.vertical ? column : row, places = t.vertical ? p.width : p.height;
  store_taps(t.taps + g * t.tap, index, t.tap / TAP_PLANES, weights_of(a, place > 0, place + 1 < places));
}

// A unit of image 0 (x) or 1 (dy).
__device__ __forceinline__ void put_image(const Memory& m, int image, int unit, int row, int column, unit_t value) {
  const int plane = image * m.units + unit;
  if (m.horizontal_images > m.vertical_images)
    ((unit_t*)(m.base + m.vertical_images + plane * m.vertical.unit))[row * m.vertical.pitch + column] = value;
  if (m.directions > m.horizontal_images)
    ((unit_t*)(m.base + m.horizontal_images + plane * m.horizontal.unit))[column * m.horizontal.pitch + row] = value;
}

// An image of a task, from any strides.
__device__ __forceinline__ void gather_image(const Params& p, const View& v, int image, const Memory& m, const Task& task) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width;
  const bool words = paired(v);
  for (int unit = 0; unit < m.units; unit++) {
    const storage_t* data = at(v, task.b, 0, task.c0 + unit * PACK, 0, 0);
#pragma unroll 4
    for (int pixel = threadIdx.x; pixel < pixels; pixel += THREADS) {
      const int row = quotient(pixel, width), column = pixel - row * p.width;
      put_image(m, image, unit, row, column, load_unit(data + row * v.h + column * v.w, v.c, words));
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

// Everything of a task but images, from any strides.
__device__ void gather(const Params& p, const Memory& m, const Range& range, const Task& task) {
  const Divisor width = divisor(p.width);
  const int pixels = p.height * p.width;
  for (int d = range.first; d < range.last; d++) {
    const Target t = target_of(p, m, range.first, d);
    for (int unit = 0; unit < m.units; unit++) {
      unsigned char* out = t.units + unit * UNIT_PLANES * t.unit;
      const int c = task.c0 + unit * PACK;
#if HAS_LAM
      gather_units(p, p.lam, t, out + LAM_PLANE * t.unit, at(p.lam, task.b, d, c, 0, 0));
#endif
#if HAS_GATE
      gather_units(p, p.gate, t, out + GATE_PLANE * t.unit, at(p.gate, task.b, d, c, 0, 0));
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
        unsigned char* out = t.units + unit * UNIT_PLANES * t.unit;
#if HAS_LAM
        ((unit_t*)(out + LAM_PLANE * t.unit))[index] = raw_unit(record + r.lam + channel);
#endif
#if HAS_GATE
        ((unit_t*)(out + GATE_PLANE * t.unit))[index] = raw_unit(record + r.gate + channel);
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
      put_image(m, 0, unit, row0 + line, column,
                raw_unit(raw + pixel * r.bytes + r.x + (task.c0 + unit * PACK) * (int)sizeof(storage_t)));
  }
}

// What a block reads of records, in the order in which it needs it: for each of its tasks, `rounds` times all rows.
struct Slabs {
  Record record;
  int rows, each, rounds, total;  // rows of a slab, slabs of an image, of all tasks
  int next;                       // to be used
};

__device__ __forceinline__ void fetch_slab(const Params& p, const Slabs& s, int n) {
  if (n < s.total && s.record.data != nullptr) {
    const int round = n / s.each, row = (n - round * s.each) * s.rows;
    const int index = blockIdx.x / SPLIT + round / s.rounds * (int)(gridDim.x / SPLIT);
    const Task task = task_of(p, index, p.knobs[0]);
    copy_rows(p, s.record, shared_memory() + p.knobs[6] + n % RING * p.knobs[5], task.b, row, min(s.rows, p.height - row));
  }
  copy_commit();
}

// Starts reading.
__device__ __forceinline__ Slabs slabs_of(const Params& p, int rounds) {
  Slabs s;
  const int stride = gridDim.x / SPLIT, first = blockIdx.x / SPLIT;
  s.record = record_of(p);
  s.rows = p.knobs[4];
  s.each = (p.height + s.rows - 1) / s.rows;
  s.rounds = rounds;
  s.total = (p.knobs[1] - first + stride - 1) / stride * rounds * s.each;
  s.next = 0;
  for (int n = 0; n < RING; n++) fetch_slab(p, s, n);
  return s;
}

// body(raw, row, rows) for each slab of one round. Begins and ends with the block at a barrier.
template <typename Body>
__device__ __forceinline__ void for_slabs(const Params& p, Slabs& s, Body body) {
  for (int k = 0; k < s.each; k++, s.next++) {
    copy_wait<RING - 1>();
    __syncthreads();
    body(shared_memory() + p.knobs[6] + s.next % RING * p.knobs[5], k * s.rows, min(s.rows, p.height - k * s.rows));
    __syncthreads();
    fetch_slab(p, s, s.next + RING);
  }
}
#endif

// Lanes read whole groups of places: what lies behind the end of a line has to count as 0, and stays so, because scans
// write zeros there.
__device__ __forceinline__ void clear_planes(int bytes) {
  for (int i = threadIdx.x * 4; i < bytes; i += THREADS * 4) *(u32*)(shared_memory() + i) = 0u;
}
