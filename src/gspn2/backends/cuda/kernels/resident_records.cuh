// Operands that are records: lam, gate and taps are views of one tensor (B, H, W, record), dense, in that order, maybe
// behind x. Models make them so. The rows of an image are copied as they are, whole cache lines, with those of x (if it
// is not in the record) and in backward of dy, slab after slab through a ring of RING, and put in order from there; the
// ring runs ahead into the next image.
//
// Macros: RECORDS, RECORD_X (x comes first in a record), RING.
#pragma once
#include "resident_memory.cuh"

#if RECORDS
// Elements of a record, and where its parts begin.
#if ONE
#define RECORD_CHANNELS PACK
#define RECORD_GROUPS 1
#else
#define RECORD_CHANNELS p.channels
#define RECORD_GROUPS p.groups
#endif
#define RECORD_LAM (RECORD_X * RECORD_CHANNELS)
#define RECORD_GATE (RECORD_LAM + HAS_LAM * SCANS * RECORD_CHANNELS)
#define RECORD_TAPS (RECORD_GATE + HAS_GATE * SCANS * RECORD_CHANNELS)
#define RECORD_SIZE (RECORD_TAPS + 3 * SCANS * RECORD_GROUPS)

// The first record, or null if these tensors are no such records after all: the plan saw strides, not addresses.
__device__ __forceinline__ const storage_t* records_of(const Params& p) {
  const storage_t* first = p.taps.data - RECORD_TAPS;
  bool fine = p.taps.w == RECORD_SIZE && ((u64)first & 3) == 0;
#if HAS_LAM
  fine = fine && p.lam.data == first + RECORD_LAM;
#endif
#if HAS_GATE
  fine = fine && p.gate.data == first + RECORD_GATE;
#endif
#if RECORD_X
  fine = fine && p.x.data == first;
#endif
  return fine ? first : nullptr;
}

// Rows [first, first + rows) of an image in shared memory; `records` null: they are to be read from the tensors.
struct Slab {
  const storage_t *records, *x, *dy;
  int first, rows;
};

// What a block reads, in the order in which it needs it: for each of its tasks, `rounds` times all rows.
struct Slabs {
  const storage_t* records;
  int rounds, task, round, row, slot;  // to be read next
  int used;                            // slot to be used next
};

template <int SIZE>
__device__ __forceinline__ void copy_run(unsigned char* to, const unsigned char* from, int bytes) {
#pragma unroll 1
  for (int o = threadIdx.x * SIZE; o < bytes; o += THREADS * SIZE) copy_async<SIZE>(to + o, from + o);
}

// `pixels` pixels of `size` elements from pixel `first` of a dense tensor, on their way to `to`.
__device__ __forceinline__ void copy_pixels(unsigned char* to, const storage_t* data, long long first, int pixels, int size) {
  const unsigned char* from = (const unsigned char*)(data + first * size);
  const int bytes = pixels * size * (int)sizeof(storage_t), alignment = (int)(u64)from | bytes;
  if ((alignment & 15) == 0)
    copy_run<16>(to, from, bytes);
  else if ((alignment & 7) == 0)
    copy_run<8>(to, from, bytes);
  else
    copy_run<4>(to, from, bytes);
}

// Where the images of a slab are: x, and dy behind it.
__device__ __forceinline__ int slab_dy(const Params& p) {
  return RECORD_X ? p.knobs[SLAB_X] : (p.knobs[SLAB_X] + p.knobs[SLAB_BYTES]) / 2;
}

__device__ __forceinline__ void read_slab(const Params& p, Slabs& s) {
  if (s.records != nullptr && s.task < p.knobs[TASKS]) {
    const int rows = min(p.knobs[SLAB_ROWS], p.height - s.row), pixels = rows * p.width;
    const long long first = ((long long)s.task * p.height + s.row) * p.width;
    unsigned char* to = shared_memory() + p.knobs[RING_AT] + s.slot * p.knobs[SLAB_BYTES];
    copy_pixels(to, s.records, first, pixels, RECORD_SIZE);
#if !RECORD_X
    copy_pixels(to + p.knobs[SLAB_X], p.x.data, first, pixels, RECORD_CHANNELS);
#endif
#if BACKWARD
    copy_pixels(to + slab_dy(p), p.dy.data, first, pixels, RECORD_CHANNELS);
#endif
    s.row += rows;
    if (s.row == p.height) {
      s.row = 0;
      if (++s.round == s.rounds) s.round = 0, s.task += gridDim.x;
    }
  }
  copy_commit();
  if (++s.slot == RING) s.slot = 0;
}

// Starts reading.
__device__ __forceinline__ Slabs slabs_of(const Params& p, int rounds) {
  Slabs s = {records_of(p), rounds, (int)blockIdx.x, 0, 0, 0, 0};
  for (int n = 0; n < RING - 1; n++) read_slab(p, s);
  return s;
}

// body(slab) for each slab of an image.
template <typename Body>
__device__ __forceinline__ void for_slabs(const Params& p, Slabs& s, Body body) {
  for (int row = 0; row < p.height; row += p.knobs[SLAB_ROWS]) {
    copy_wait<RING - 2>();
    __syncthreads();
    read_slab(p, s);  // into the slot that was used before the barrier
    const unsigned char* slot = shared_memory() + p.knobs[RING_AT] + s.used * p.knobs[SLAB_BYTES];
    body(Slab{(const storage_t*)slot, (const storage_t*)(slot + p.knobs[SLAB_X]), (const storage_t*)(slot + slab_dy(p)), row,
              min(p.knobs[SLAB_ROWS], p.height - row)});
    if (++s.used == RING) s.used = 0;
  }
}

// Brings what the slabs of a task will be into the second-level cache, while memory has nothing else to do.
__device__ __forceinline__ void prefetch_task(const Params& p, const Slabs& s, int task) {
  if (s.records == nullptr || task >= p.knobs[TASKS]) return;
  const int pixels = p.height * p.width, bytes = pixels * RECORD_SIZE * (int)sizeof(storage_t);
  const unsigned char* records = (const unsigned char*)(s.records + (long long)task * pixels * RECORD_SIZE);
#pragma unroll 1
  for (int o = threadIdx.x * 128; o < bytes; o += THREADS * 128) prefetch(records + o);
  const int image = pixels * RECORD_CHANNELS * (int)sizeof(storage_t), o = threadIdx.x * 128;
  if (o >= image) return;  // what more there may be of a larger one is little beside the records
  const long long first = (long long)task * pixels * RECORD_CHANNELS;
  if (!RECORD_X) prefetch((const unsigned char*)(p.x.data + first) + o);
  if (BACKWARD) prefetch((const unsigned char*)(p.dy.data + first) + o);
}

// Three logits at an element.
__device__ __forceinline__ Taps logits_at(const storage_t* record, int element) {
#if STORAGE == 0
  return {record[element], record[element + 1], record[element + 2]};
#else
  const u32* words = (const u32*)(record + (element & ~1));
  const int shift = (element & 1) * 16;
  const u32 low = words[0], high = words[1];
  const u32 pair = __funnelshift_r(low, high, shift);
  return {widen_low(pair), widen_high(pair), widen_low(high >> shift)};
#endif
}

// Puts the rows of a slab in order.
__device__ __forceinline__ void unpack(const Params& p, const Memory& m, const Range& range, const Task& task, const Slab& slab) {
  const int first = slab.first * p.width, last = first + slab.rows * p.width;
  for (int d = range.first; d < range.last; d++) {
    const Target t = target_of(p, m, range.first, d);
    for_pixels(p, first, last, [&](int row, int column) {
      const int pixel = row * p.width + column - first, index = row * t.row_step + column * t.column_step;
      const storage_t* record = slab.records + pixel * RECORD_SIZE;
      for (int unit = 0; unit < units_of(p); unit++) {
        unsigned char* out = t.units + unit * UNIT_PLANES * t.unit + index * (int)sizeof(unit_t);
        const int c = task.c0 + unit * PACK, channel = d * p.channels + c;
#if BACKWARD
        float u[PACK], v[PACK], factor[PACK];
        widen_unit(*(const unit_t*)((RECORD_X ? record : slab.x + pixel * p.channels) + c), u);
        widen_unit(*(const unit_t*)(slab.dy + pixel * p.channels + c), v);
#if HAS_LAM
        widen_unit(*(const unit_t*)(record + RECORD_LAM + channel), factor);
        for (int k = 0; k < PACK; k++) u[k] *= factor[k];
#endif
#if HAS_GATE
        widen_unit(*(const unit_t*)(record + RECORD_GATE + channel), factor);
        for (int k = 0; k < PACK; k++) v[k] *= factor[k];
#endif
        store_result_at(out + LAM_PLANE * t.unit, t.unit, u);
        store_result_at(out + GATE_PLANE * t.unit, t.unit, v);
#else
#if HAS_LAM
        *(unit_t*)(out + LAM_PLANE * t.unit) = *(const unit_t*)(record + RECORD_LAM + channel);
#endif
#if HAS_GATE
        *(unit_t*)(out + GATE_PLANE * t.unit) = *(const unit_t*)(record + RECORD_GATE + channel);
#endif
#endif
      }
      for (int g = 0; g < groups_of(p); g++)
        put_weights(p, t, g, row, column, logits_at(record, RECORD_TAPS + (d * p.groups + task.g0 + g) * 3));
    });
  }
#if !BACKWARD
  for_pixels(p, first, last, [&](int row, int column) {
    const int pixel = row * p.width + column - first;
    const storage_t* x = RECORD_X ? slab.records + pixel * RECORD_SIZE : slab.x + pixel * p.channels;
    for (int unit = 0; unit < units_of(p); unit++)
      put_x(p, m, unit, row, column, *(const unit_t*)(x + task.c0 + unit * PACK));
  });
#endif
}
#endif
