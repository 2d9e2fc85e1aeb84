// Small images of two channels that share their taps, as dense records: what forward and backward have in common.
//
// A record is what a mixer makes of a pixel: lam, gate and taps are views of one tensor (B, H, W, record), dense, in
// that order, maybe behind x. A warp copies bundles of pixels as they are, whole cache lines, with those of x (if it
// is not in the record) and in backward of dy, through a ring of its own, and puts them in order from there, a pixel
// a lane. No warp waits for another before all are done, and the rings run ahead into the next image.
//
// A thread has the same pixels before and after the scans, and keeps in registers what only it needs then: ROUNDS
// bundles of a warp are loops of constant length. In order, in float32 and scan coordinates, are only the sources of
// the scans, which these replace by their states: pairs of lam x (and in backward of gate dy), and weights
// (resident_pair_scan.cuh).
//
// Macros: THREADS, BLOCKS, SCANS, DIRECTIONS, PLACES as in resident.cuh; WHOLE as in resident_line.cuh
//         RECORD_X   x comes first in a record
//         COPY       bytes of a copy, 16, 8 or 4, that images and addresses are multiples of
//         ROUNDS     bundles of an image that a warp takes, at most
//         RING       bundles that a warp has on their way, at most ROUNDS
//         CHUNKED    scans restart within an image
//         PASSES     parts of the directions, one after the other; all vertical or all horizontal if there are two
//         BACKWARD
#pragma once
#include "resident_pair_scan.cuh"

#define BUNDLE 32                // pixels
#define PART (SCANS / PASSES)    // directions of a pass
#define SOURCES (1 + BACKWARD)   // planes of pairs of a direction
#if FIXED
#define FULL (HEIGHT * WIDTH % BUNDLE == 0)                // no bundle is short
#define COMPLETE(round) (((round) + 1) * THREADS <= HEIGHT * WIDTH)  // every thread has a pixel of the image in it
// A thread's pixels are below each other, in the same part of a plane.
#define STRIDED (FULL && THREADS % (PLACES * WIDTH) == 0)
#else
#define FULL 0
#define STRIDED 0
#define COMPLETE(round) false
#endif

// Words of a record, and where its parts begin.
#define RECORD_LAM RECORD_X
#define RECORD_GATE (RECORD_LAM + HAS_LAM * SCANS)
#define RECORD_TAPS (RECORD_GATE + HAS_GATE * SCANS)
#define RECORD_WORDS (RECORD_TAPS + 3 * SCANS / 2)

// Where x and dy of a bundle are, behind its records; bytes.
#define SLOT_X (4 * RECORD_WORDS * BUNDLE)
#define SLOT_DY (SLOT_X + (RECORD_X ? 0 : 4 * BUNDLE))
#define SLOT (SLOT_DY + BACKWARD * 4 * BUNDLE)

// A slot is filled by copies of 32 COPY bytes, all but the last of them from records. The last has the rest of the
// records, x and dy: pieces of several tensors, by lanes.
#define LAST_COPY (SLOT_X / (32 * COPY) * (32 * COPY))
#define ONE_LAST_COPY (SLOT - LAST_COPY <= 32 * COPY)

// Reading ---------------------------------------------------------------------------------------------------------

// This lane's part of a slot's last copy: of records, of x, or of dy.
struct Piece {
  const unsigned char* data;  // of the first pixel of all, where the lane's part begins
  int size, byte;             // bytes of a pixel; where in the tensor's part of the slot the lane's begins
};

__device__ __forceinline__ Piece piece_of(const Params& p) {
  const int at = LAST_COPY + ((int)threadIdx.x & 31) * COPY;
  const bool image = at >= SLOT_X, gradient = BACKWARD && at >= SLOT_DY;
  const int size = image ? 4 : 4 * RECORD_WORDS, byte = at - (gradient ? SLOT_DY : image ? SLOT_X : 0);
  const u32* data = (const u32*)p.taps.data - RECORD_TAPS;
  if (image) data = (const u32*)p.x.data;
#if BACKWARD
  if (gradient) data = (const u32*)p.dy.data;
#endif
  return {(const unsigned char*)data + byte, size, byte};
}

// What a warp reads, in the order in which it needs it: for each task of the block, in each pass, ROUNDS bundles, of
// which the last may be short, or nothing.
struct Stream {
  unsigned char* slots;  // of this warp
  u32 pixel;             // of all images: the first of the bundle that is read next
  int left;              // pixels of the image from there on; not above 0 if there are none
  int task, pass;        // to be read next
  int used;              // bytes from the first slot to that of the bundle to be used next
  bool dense;            // do the tensors lie as the plan supposed?
  Piece piece;
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

// To the image that is read next.
__device__ __forceinline__ void find_image(const Params& p, Stream& s) {
  const int begin = (int)threadIdx.x & ~31;
  s.left = s.dense && s.task < p.knobs[TASKS] ? pixels_of(p) - begin : 0;
  s.pixel = (u32)s.task * pixels_of(p) + begin;
}

// This lane's part of a bundle's pixels of WORDS words on their way, up to byte END. All images have less than 2^32
// words (the plan's promise). `complete`: the bundle is not short.
template <int WORDS, int END = 4 * WORDS * BUNDLE>
__device__ __forceinline__ void copy_pixels(unsigned char* to, const u32* data, const Stream& s, bool complete) {
  const int lane = threadIdx.x & 31, mine = lane * COPY, bytes = min(s.left, BUNDLE) * 4 * WORDS;
  const unsigned char* from = (const unsigned char*)(data + (s.pixel * WORDS + lane * (COPY / 4)));
#pragma unroll
  for (int o = 0; o < END; o += 32 * COPY)
    if (complete ? s.left > 0 && (o + 32 * COPY <= END || mine + o < END) : mine + o < bytes)
      copy_async<COPY>(to + mine + o, from + o);
}

// Starts reading the warp's next bundle into a slot: bundle `round` of an image.
__device__ __forceinline__ void read_bundle(const Params& p, Stream& s, unsigned char* slot, int round) {
  const bool complete = FULL || COMPLETE(round);
  const u32* records = (const u32*)p.taps.data - RECORD_TAPS;
  if constexpr (ONE_LAST_COPY) {
    copy_pixels<RECORD_WORDS, LAST_COPY>(slot, records, s, complete);
    // Lanes behind the slot's end are none of it, whatever their piece.
    const int mine = ((int)threadIdx.x & 31) * COPY, pixels = complete ? BUNDLE : min(s.left, BUNDLE);
    if (s.left > 0 && LAST_COPY + mine < SLOT && (complete || s.piece.byte < pixels * s.piece.size))
      copy_async<COPY>(slot + LAST_COPY + mine, s.piece.data + (u64)s.pixel * (u32)s.piece.size);
  } else {
    copy_pixels<RECORD_WORDS>(slot, records, s, complete);
#if !RECORD_X
    copy_pixels<1>(slot + SLOT_X, (const u32*)p.x.data, s, complete);
#endif
#if BACKWARD
    copy_pixels<1>(slot + SLOT_DY, (const u32*)p.dy.data, s, complete);
#endif
  }
  copy_commit();
  if (round + 1 == ROUNDS) {
    if (++s.pass == PASSES) s.pass = 0, s.task += gridDim.x;
    find_image(p, s);
  } else {
    s.left -= THREADS, s.pixel += THREADS;
  }
}

// Starts reading.
__device__ __forceinline__ Stream stream_of(const Params& p, unsigned char* shared) {
  unsigned char* slots = shared + p.knobs[RING_AT] + (int)threadIdx.x / 32 * (RING * SLOT);
  Stream s = {slots, 0, 0, (int)blockIdx.x, 0, 0, records_of(p) != nullptr, piece_of(p)};
  find_image(p, s);
#pragma unroll
  for (int slot = 0; slot < RING; slot++) read_bundle(p, s, s.slots + slot * SLOT, slot);
  return s;
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
  // In backward all registers are taken: rows and columns are found anew.
  const int thread = BACKWARD ? opaque((int)threadIdx.x) : (int)threadIdx.x, index = round * THREADS + thread;
  const bool known = FULL || COMPLETE(round);
  const int within = known ? index : min(index, pixels_of(p) - 1);
#if FIXED
  const int row = (int)((u32)within / WIDTH);
#else
  const int row = quotient(within, width_of(p));
#endif
  return {index, row, within - row * columns_of(p), known || index == within};
}

// Has the warp a bundle in this round?
__device__ __forceinline__ bool has_round(const Params& p, int round) {
  return COMPLETE(round) || round * THREADS + ((int)threadIdx.x & ~31) < pixels_of(p);
}

// The operands of this thread's pixel of a round. The slot is given back.
__device__ __forceinline__ Operands read_pixel(const Params& p, Stream& s, int b, const Pixel& pixel, int round,
                                               int first) {
  unsigned char* slot = s.slots + s.used;
  if (!s.dense)
    fill_slot(p, slot, b, pixel.row, pixel.column);
  else
    copy_wait<RING - 1>();
  __syncwarp();
  // A lane behind the end of the image would read what was not copied.
  const Operands o = operands_in(slot, pixel.inside ? (int)threadIdx.x & 31 : 0, first);
  __syncwarp();
  read_bundle(p, s, slot, (round + RING) % ROUNDS);
  s.used = s.used == (RING - 1) * SLOT ? 0 : s.used + SLOT;
  return o;
}

// A bundle that the warp does not have in this round: its turn all the same.
__device__ __forceinline__ void skip_pixel(const Params& p, Stream& s, int round) {
  read_bundle(p, s, s.slots + s.used, (round + RING) % ROUNDS);
  s.used = s.used == (RING - 1) * SLOT ? 0 : s.used + SLOT;
}

// The axis of direction `first` + k; in two passes it is that of the pass.
__device__ __forceinline__ Axis axis_at(const Params& p, int first, int k) {
  return axis_of(p, PASSES == 1 ? vertical_at(k) : vertical_at(first));
}

// Does direction `first` + k begin at the last line? Known when compiled where both passes have the same order.
__device__ __forceinline__ bool reversed_at(int first, int k) {
  const int here = direction_at(k) & 1, later = direction_at((k + PART) % SCANS) & 1;
  return (PASSES == 1 || here == later || first == 0 ? here : later) != 0;
}

// Bytes from a line's first place to place j, in parts of `part` bytes and items of SIZE.
template <int SIZE>
__device__ __forceinline__ int place_at(int j, int part) {
  return (int)((u32)j % PLACES * part + (u32)j / PLACES * SIZE);
}

// A pixel on an axis; in bytes from the beginning of a plane of pairs, and of weights.
struct Spot {
  int line, place, pair, weight;
  int part;            // the place's part of a plane
  bool before, after;  // which neighbours exist
};

__device__ __forceinline__ Spot spot_of(const Axis& axis, const Pixel& pixel) {
  const int line = axis.vertical ? pixel.row : pixel.column, place = axis.vertical ? pixel.column : pixel.row;
  const int start = line * axis.pitch;
  return {line, place, 8 * start + place_at<8>(place, axis.pairs), 4 * start + place_at<4>(place, axis.weights),
          (int)((u32)place % PLACES), place > 0, place + 1 < axis.places};
}

// A pixel on the axes of a pass's directions.
struct Spots {
  Spot of[PART];
};

// This thread's pixel of the first round.
__device__ __forceinline__ Spots origin_of(const Params& p, int first) {
  Spots spots;
  const Pixel pixel = pixel_of(p, 0);
#pragma unroll
  for (int k = 0; k < PART; k++) spots.of[k] = spot_of(axis_at(p, first, k), pixel);
  return spots;
}

// This thread's pixel of a round: where STRIDED, at constant distances from that of the first.
__device__ __forceinline__ Spots spots_of(const Params& p, const Spots& origin, int first, int round) {
  Spots spots;
#if STRIDED
  constexpr int STEP = THREADS / WIDTH;
  const int rows = round * STEP;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Axis axis = axis_at(p, first, k);
    const Spot from = origin.of[k];
    const int items = axis.vertical ? rows * axis.pitch : rows / PLACES;
    const bool above = round > 0, below = (round + 1) * STEP < HEIGHT;  // is there a row, whatever the thread?
    spots.of[k] = {from.line + (axis.vertical ? rows : 0),
                   from.place + (axis.vertical ? 0 : rows),
                   from.pair + 8 * items,
                   from.weight + 4 * items,
                   from.part,
                   from.before || (!axis.vertical && above),
                   axis.vertical ? from.after : below || from.place + rows + 1 < HEIGHT};
  }
#else
  const Pixel pixel = pixel_of(p, round);
#pragma unroll
  for (int k = 0; k < PART; k++) spots.of[k] = spot_of(axis_at(p, first, k), pixel);
#endif
  return spots;
}

// Bytes from the pair at a place to those at its neighbours.
struct Neighbours {
  int before, after;
};

__device__ __forceinline__ Neighbours neighbours_of(const Axis& axis, const Spot& spot) {
  const int around = (PLACES - 1) * axis.pairs - 8;  // from a lane's first place to the one before
  const int before = spot.part > 0 ? -axis.pairs : around, after = spot.part < PLACES - 1 ? axis.pairs : -around;
  return {spot.before ? before : 0, spot.after ? after : 0};
}

// Bytes of a plane of pairs, and of all planes of a direction.
__device__ __forceinline__ int plane_of(const Axis& axis) { return PLACES * axis.pairs; }
__device__ __forceinline__ int planes_of(const Axis& axis) { return PLACES * (SOURCES * axis.pairs + axis.weights); }

// Where the planes of direction `first` + k begin, in bytes.
__device__ __forceinline__ int planes_at(const Params& p, int first, int k) {
  if (PASSES > 1) return k * planes_of(axis_at(p, first, 0));
  int offset = 0;
#pragma unroll
  for (int i = 0; i < PART; i++)
    if (i < k) offset += planes_of(axis_at(p, first, i));
  return offset;
}

__device__ __forceinline__ Taps logits_of(const u32 (&taps)[3 * PART / 2], int k) {
  const auto logit = [&](int e) { return e % 2 ? widen_high(taps[e / 2]) : widen_low(taps[e / 2]); };
  return {logit(3 * k), logit(3 * k + 1), logit(3 * k + 2)};
}

#if STORAGE == 1
// Halves of the logits: sigmoid(a) = (1 + tanh(a / 2)) / 2.
__device__ __forceinline__ void halve(const u32 (&taps)[3 * PART / 2], u32 (&halves)[3 * PART / 2]) {
#pragma unroll
  for (int i = 0; i < 3 * PART / 2; i++) halves[i] = halved_pair(taps[i]);
}

// Packed weights from halves of the logits, by the hardware's tanh. Its error is small beside 1, but not beside small
// sigmoids: `fine` becomes false where all three are, or one is a NaN.
// `rest`: what is missing from the sigmoids to 1.
__device__ __forceinline__ u32 quick_weights(const Taps& half, bool has_before, bool has_after, bool& fine,
                                             Taps& rest) {
  const float before = has_before ? 1.f + tanh_fast(half.before) : 0.f;
  const float after = has_after ? 1.f + tanh_fast(half.after) : 0.f;
  // A little more than 1: whatever rounding does to the others, something is left for this one.
  const float here = 1.00000381f + tanh_fast(half.here), sum = before + after + here;
  fine = fine && sum >= 0.5f;
  rest = {fmaf(before, -0.5f, 1.f), fmaf(here, -0.5f, 1.f), fmaf(after, -0.5f, 1.f)};
  const float scale = reciprocal(sum);
  return halves_toward_zero(before * scale, after * scale);
}
#endif

// The weights of a pixel's directions as words. `taps` becomes what gradients of the logits take besides: for bfloat16
// 1 - sigmoid(a) as float16, else the logits.
__device__ __forceinline__ void weigh(const Operands& o, const Spots& spots, u32 (&weights)[PART],
                                      u32 (&taps)[3 * PART / 2]) {
  bool fine = true;
#if STORAGE == 1
  u32 halves[3 * PART / 2];
  halve(o.taps, halves);
  float rest[3 * PART];
#endif
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Spot& spot = spots.of[k];
#if STORAGE == 1
    Taps of;
    weights[k] = quick_weights(logits_of(halves, k), spot.before, spot.after, fine, of);
    rest[3 * k] = of.before, rest[3 * k + 1] = of.here, rest[3 * k + 2] = of.after;
#else
    weights[k] = pack_taps(plain_weights(logits_of(o.taps, k), spot.before, spot.after, fine));
#endif
  }
#pragma unroll
  for (int i = 0; i < 3 * PART / 2; i++) {
#if STORAGE == 1
    const __half2 pair = __floats2half2_rn(rest[2 * i], rest[2 * i + 1]);
    taps[i] = *(const u32*)&pair;
#else
    taps[i] = o.taps[i];
#endif
  }
  if (fine) return;
#pragma unroll
  for (int k = 0; k < PART; k++) {
    const Spot& spot = spots.of[k];
    weights[k] = pack_taps(weights_of(logits_of(o.taps, k), spot.before, spot.after));
  }
}

// Both channels of a word, times those of another if FACTOR.
template <bool FACTOR>
__device__ __forceinline__ float2 product(u32 word, u32 factor) {
  return make_float2(FACTOR ? widen_low(word) * widen_low(factor) : widen_low(word),
                     FACTOR ? widen_high(word) * widen_high(factor) : widen_high(word));
}

// Lanes read whole groups of places, and adjoints of a place reckon with the weights behind it: they are zero behind
// the end of a line.
__device__ __forceinline__ void clear_planes(const Params& p, unsigned char* shared) {
#if !WHOLE
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x * 16; i < p.knobs[RING_AT]; i += THREADS * 16) *(uint4*)(shared + i) = zero;
  __syncthreads();
#endif
}
