// Small images of two channels that share their taps, as dense records: what forward and backward have in common.
//
// A record is what a mixer makes of a pixel: lam, gate and taps are views of one tensor (B, H, W, record), dense, in that
// order, maybe behind x. A warp copies bundles of pixels as they are, whole cache lines, with those of x (if it is not in
// the record) and in backward of dy, through a ring of its own, and puts them in order from there, a pixel a lane. No warp
// waits for another before all are done, and the rings run ahead into the next image.
//
// A thread has the same pixels before and after the scans, and keeps in registers what only it needs then: ROUNDS bundles
// of a warp are loops of constant length. In order, in float32 and scan coordinates, are only the sources of the scans,
// which these replace by their states: planes of lam x (and in backward of gate dy), one for each channel, and one of
// weights. So channels do not meet, and PACK of them are scanned by a warp.
//
// Macros: THREADS, BLOCKS, SCANS, DIRECTIONS, PLACES as in resident.cuh; PACK (1 or 2)
//         RECORD_X   x comes first in a record
//         COPY       bytes of a copy, 16, 8 or 4, that images and addresses are multiples of
//         ROUNDS     bundles of an image that a warp takes, at most
//         RING       bundles that a warp has on their way
//         PASSES     parts of the directions, one after the other; all vertical or all horizontal if there are two
//         BACKWARD, PLANES (of a direction: sources and weights)
#pragma once
#define ONE 1
#define SPLIT 1
#include "resident_sources.cuh"

#define BUNDLE 32                // pixels
#define PART (SCANS / PASSES)    // directions of a pass
#define TAP_PLANE (PLANES - 1)

// Words of a record, and where its parts begin.
#define RECORD_LAM RECORD_X
#define RECORD_GATE (RECORD_LAM + HAS_LAM * SCANS)
#define RECORD_TAPS (RECORD_GATE + HAS_GATE * SCANS)
#define RECORD_WORDS (RECORD_TAPS + 3 * SCANS / 2)

// Where x and dy of a bundle are, behind its records; bytes.
#define SLOT_X (4 * RECORD_WORDS * BUNDLE)
#define SLOT_DY (SLOT_X + (RECORD_X ? 0 : 4 * BUNDLE))
#define SLOT (SLOT_DY + BACKWARD * 4 * BUNDLE)

__device__ __forceinline__ int pixels_of(const Params& p) { return p.height * p.width; }

// Reading ---------------------------------------------------------------------------------------------------------

// What a warp reads, in the order in which it needs it: for each task of the block, in each pass, its share of the bundles.
struct Stream {
  const unsigned char *records, *x, *dy;  // of the image that is read next, from this lane's copies on, or null
  unsigned char *slots, *copies;          // of this warp; from this lane's copies on
  int task, pass, first;                  // task, pass and pixel to be read next
  int slot;                               // of the bundle to be used next
};

// The first record, or null if these tensors are no such records after all: the plan saw strides, not addresses.
__device__ __forceinline__ const unsigned char* records_of(const Params& p) {
  const u32* first = (const u32*)p.taps.data - RECORD_TAPS;
  bool fine = p.taps.w == 2 * RECORD_WORDS && ((u64)first & (COPY - 1)) == 0;
#if HAS_LAM
  fine = fine && (const u32*)p.lam.data == first + RECORD_LAM;
#endif
#if HAS_GATE
  fine = fine && (const u32*)p.gate.data == first + RECORD_GATE;
#endif
#if RECORD_X
  fine = fine && (const u32*)p.x.data == first;
#endif
  return fine ? (const unsigned char*)first : nullptr;
}

// To the images of the task that is read next.
__device__ __forceinline__ void find_images(const Params& p, Stream& s) {
  const long long first = (long long)s.task * pixels_of(p);
  const int mine = ((int)threadIdx.x & 31) * COPY;
  s.records = records_of(p) + (first * (4 * RECORD_WORDS) + mine);
#if !RECORD_X
  s.x = (const unsigned char*)p.x.data + (first * 4 + mine);
#endif
#if BACKWARD
  s.dy = (const unsigned char*)p.dy.data + (first * 4 + mine);
#endif
}

// This lane's part of `pixels` pixels of WORDS words on their way.
template <int WORDS>
__device__ __forceinline__ void copy_pixels(unsigned char* to, const unsigned char* from, int pixels) {
  const int mine = ((int)threadIdx.x & 31) * COPY, bytes = min(pixels, BUNDLE) * 4 * WORDS;
#pragma unroll
  for (int o = 0; o < 4 * WORDS * BUNDLE; o += 32 * COPY)
    if (mine + o < bytes) copy_async<COPY>(to + o, from + o);
}

// Starts reading the warp's next bundle into a slot.
__device__ __forceinline__ void read_bundle(const Params& p, Stream& s, int slot) {
  if (s.task < p.knobs[TASKS]) {
    unsigned char* to = s.copies + slot * SLOT;
    const int pixels = pixels_of(p) - s.first;
    copy_pixels<RECORD_WORDS>(to, s.records + s.first * (4 * RECORD_WORDS), pixels);
#if !RECORD_X
    copy_pixels<1>(to + SLOT_X, s.x + s.first * 4, pixels);
#endif
#if BACKWARD
    copy_pixels<1>(to + SLOT_DY, s.dy + s.first * 4, pixels);
#endif
    s.first += THREADS;
    if (s.first >= pixels_of(p)) {
      s.first = threadIdx.x & ~31;
      if (++s.pass == PASSES) {
        s.pass = 0, s.task += gridDim.x;
        find_images(p, s);
      }
    }
  }
  copy_commit();
}

// Starts reading.
__device__ __forceinline__ Stream stream_of(const Params& p, unsigned char* shared) {
  unsigned char* slots = shared + p.knobs[RING_AT] + (int)threadIdx.x / 32 * (RING * SLOT);
  Stream s = {nullptr, nullptr, nullptr, slots, slots + ((int)threadIdx.x & 31) * COPY, (int)blockIdx.x, 0,
              (int)threadIdx.x & ~31, 0};
  if (records_of(p) == nullptr || s.first >= pixels_of(p))
    s.task = p.knobs[TASKS];
  else
    find_images(p, s);
#pragma unroll
  for (int slot = 0; slot < RING; slot++) read_bundle(p, s, slot);
  return s;
}

// Brings what will be read of a task into the second-level cache, ahead of the rings. One thread asks, of a warp that does
// not scan if there is one, for few large pieces: each takes long to ask for, whatever its size.
__device__ __forceinline__ void prefetch_task(const Params& p, int task) {
#if COPY == 16 && (defined(GSPN2_EMULATE) || __CUDA_ARCH__ >= 900)
  const unsigned char* records = records_of(p);
  if (records == nullptr || task >= p.knobs[TASKS] || threadIdx.x != THREADS - 32) return;
  const long long first = (long long)task * pixels_of(p);
  bulk_prefetch(records + first * (4 * RECORD_WORDS), pixels_of(p) * 4 * RECORD_WORDS);
  if (!RECORD_X) bulk_prefetch((const u32*)p.x.data + first, pixels_of(p) * 4);
  if (BACKWARD) bulk_prefetch((const u32*)p.dy.data + first, pixels_of(p) * 4);
#endif
}

__device__ __forceinline__ u32 pair_at(const View& v, int b, int d, int row, int column) {
  const storage_t* pair = at(v, b, d, 0, row, column);
  return bits_of(__ldg(pair)) | bits_of(__ldg(pair + v.c)) << 16;
}

// The lane's pixel of tensors of any strides into its place in a slot.
__device__ __forceinline__ void fill_slot(const Params& p, unsigned char* slot, int b, int row, int column) {
  const int lane = threadIdx.x & 31;
  u32* record = (u32*)slot + lane * RECORD_WORDS;
  *(RECORD_X ? record : (u32*)(slot + SLOT_X) + lane) = pair_at(p.x, b, 0, row, column);
#if BACKWARD
  *((u32*)(slot + SLOT_DY) + lane) = pair_at(p.dy, b, 0, row, column);
#endif
#pragma unroll 1
  for (int d = 0; d < SCANS; d++) {
#if HAS_LAM
    record[RECORD_LAM + d] = pair_at(p.lam, b, d, row, column);
#endif
#if HAS_GATE
    record[RECORD_GATE + d] = pair_at(p.gate, b, d, row, column);
#endif
    const storage_t* taps = at(p.taps, b, d, 0, row, column);
#pragma unroll 1
    for (int k = 0; k < 3; k++) ((storage_t*)(record + RECORD_TAPS))[3 * d + k] = __ldg(taps + k * p.taps.k);
  }
}

// What a pixel brings for the directions of a pass: pairs of channels, and pairs of logits.
struct Operands {
  u32 x, dy, lam[PART], gate[PART], taps[3 * PART / 2];
};

// `even`: at a multiple of 8 bytes.
template <int WORDS>
__device__ __forceinline__ void load_run(const u32* p, u32 (&w)[WORDS], bool even) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    if (even && WORDS % 2 == 0) {
      if (i % 2) continue;
      const uint2 pair = *(const uint2*)(p + i);
      w[i] = pair.x, w[i + 1] = pair.y;
    } else {
      w[i] = p[i];
    }
  }
}

__device__ __forceinline__ Operands operands_in(const unsigned char* slot, int pixel, int first) {
  const u32* record = (const u32*)slot + pixel * RECORD_WORDS;
  const bool even = RECORD_WORDS % 2 == 0 && !RECORD_X;
  Operands o;
  o.x = RECORD_X ? record[0] : ((const u32*)(slot + SLOT_X))[pixel];
#if BACKWARD
  o.dy = ((const u32*)(slot + SLOT_DY))[pixel];
#endif
#if HAS_LAM
  load_run(record + RECORD_LAM + first, o.lam, even);
#endif
#if HAS_GATE
  load_run(record + RECORD_GATE + first, o.gate, even);
#endif
  load_run(record + RECORD_TAPS + 3 * first / 2, o.taps, even && PART == SCANS && RECORD_TAPS % 2 == 0);
  return o;
}

// Pixels ----------------------------------------------------------------------------------------------------------

struct Pixel {
  int index, row, column;
  bool inside;  // of the image; a thread that is not looks at the last pixel
};

// This thread's pixel of a round.
__device__ __forceinline__ Pixel pixel_of(const Params& p, int round) {
  const int index = round * THREADS + threadIdx.x, within = min(index, pixels_of(p) - 1), row = quotient(within, width_of(p));
  return {index, row, within - row * p.width, index == within};
}

// Has the warp a bundle in this round?
__device__ __forceinline__ bool has_round(const Params& p, int round) {
  return round * THREADS + ((int)threadIdx.x & ~31) < pixels_of(p);
}

// The operands of this thread's pixel of a round. The slot is given back.
__device__ __forceinline__ Operands read_pixel(const Params& p, Stream& s, int b, const Pixel& pixel, int first) {
  unsigned char* slot = s.slots + s.slot * SLOT;
  if (s.records == nullptr)
    fill_slot(p, slot, b, pixel.row, pixel.column);
  else
    copy_wait<RING - 1>();
  __syncwarp();
  // A lane behind the end of the image would read what was not copied.
  const Operands o = operands_in(slot, pixel.inside ? (int)threadIdx.x & 31 : 0, first);
  __syncwarp();
  read_bundle(p, s, s.slot);
  if (++s.slot == RING) s.slot = 0;
  return o;
}

// The axis of a direction, and a pixel on it.
struct Axis {
  bool vertical;
  int lines, places, plane, pitch;  // bytes of a plane and of a line
};

// Of direction `first` + k; in two passes it is that of the pass.
__device__ __forceinline__ Axis axis_at(const Params& p, int first, int k) {
  const bool vertical = PASSES == 1 ? vertical_at(k) : vertical_at(first);
  return {vertical, vertical ? p.height : p.width, vertical ? p.width : p.height, plane_of(p, vertical),
          4 * (vertical ? p.knobs[PITCH_V] : p.knobs[PITCH_H])};
}

struct Spot {
  int line, place, offset;  // in a plane, bytes
  bool before, after;       // which neighbours exist
};

__device__ __forceinline__ Spot spot_of(const Axis& axis, const Pixel& pixel) {
  const int line = axis.vertical ? pixel.row : pixel.column, place = axis.vertical ? pixel.column : pixel.row;
  return {line, place, line * axis.pitch + 4 * place, place > 0, place + 1 < axis.places};
}

// The planes of direction `first` + k, in bytes.
__device__ __forceinline__ int planes_at(const Params& p, int first, int k) {
  if (PASSES > 1) return k * PLANES * plane_of(p, vertical_at(first));
  int offset = 0;
#pragma unroll
  for (int i = 0; i < PART; i++)
    if (i < k) offset += PLANES * plane_of(p, vertical_at(i));
  return offset;
}

__device__ __forceinline__ Taps logits_of(const u32 (&taps)[3 * PART / 2], int k) {
  const auto logit = [&](int e) { return e % 2 ? widen_high(taps[e / 2]) : widen_low(taps[e / 2]); };
  return {logit(3 * k), logit(3 * k + 1), logit(3 * k + 2)};
}

// The weights of a pixel's directions as words.
__device__ __forceinline__ void weigh(const Params& p, const Operands& o, const Pixel& pixel, int first, u32 (&weights)[PART]) {
  bool fine = true;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Spot spot = spot_of(axis_at(p, first, k), pixel);
    weights[k] = pack_taps(plain_weights(logits_of(o.taps, k), spot.before, spot.after, fine));
  }
  if (fine) return;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Spot spot = spot_of(axis_at(p, first, k), pixel);
    weights[k] = pack_taps(weights_of(logits_of(o.taps, k), spot.before, spot.after));
  }
}

// Both channels of a word, times those of another if FACTOR, to a place of two planes.
template <bool FACTOR>
__device__ __forceinline__ void put_product(unsigned char* out, int plane, u32 word, u32 factor) {
  *(float*)out = FACTOR ? widen_low(word) * widen_low(factor) : widen_low(word);
  *(float*)(out + plane) = FACTOR ? widen_high(word) * widen_high(factor) : widen_high(word);
}

// Lanes read whole groups of places, and adjoints of a place reckon with the weights behind it: they are zero behind the
// end of a line.
__device__ __forceinline__ void clear_planes(const Params& p, unsigned char* shared) {
  if (p.height % PLACES == 0 && p.width % PLACES == 0) return;
  for (int i = threadIdx.x * 16; i < p.knobs[RING_AT]; i += THREADS * 16) *(uint4*)(shared + i) = make_uint4(0, 0, 0, 0);
  __syncthreads();
}
