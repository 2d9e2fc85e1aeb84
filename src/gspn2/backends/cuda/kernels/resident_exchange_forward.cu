// Forward of a few small images whose operands are records: lam, gate and taps of all channels and
// directions beside each other, pixel by pixel.
//
// A direction of two channels has a few bytes of each record. Read on their own they cost a request for
// every pixel and operand, and sectors of which most is for others. Here the blocks of a cluster, SCANS
// directions of SHARERS parts of the channels, have two parts to play. As owner of some rows of the image a
// block copies their records as they lie, puts all directions and channels in order, and stores what a scan
// needs into the shared memory of the block that runs it. As the one that runs a scan it stores the states
// of each line into the shared memory of the line's owner, which has the gates, and makes y. Every byte is
// read once, and nobody fetches from another block: stores need no answer.
//
// A plane of sources, or of weights, is made of slots, one for each owner. In a slot the places of a line
// are adjacent: rows of the image for vertical scans, pieces of columns for horizontal ones. So what an
// owner's warp stores for a scan is a run of adjacent words, whichever way that scan goes.
//
// Macros: THREADS, BLOCKS, SCANS, DIRECTIONS, PLACES as in resident.cuh
//         IMAGE_CHANNELS, TAP_GROUPS  of the whole image
//         VECTOR    channels of a block, of one tap group
//         RECORD_X  records begin with x
#define PACK 1
#define ONE 1
#define WHOLE 1
#include "resident_exchange_ptx.cuh"
#include "resident_line.cuh"

// What the plan decided, beside WIDTH_MAGIC of resident.cuh.
enum {
  ROWS, ROWS_MAGIC,                // of an owner
  PIXELS_MAGIC,                    // of an owner's pixels
  SLOT_VERTICAL, SLOT_HORIZONTAL,  // places of a slot
  PLANE,                           // bytes of sources, or of weights of one tap
  COLUMN, ARRIVED,                 // states that arrive: places of a column; bytes of a plane
  // In shared memory. Records come first, weights behind sources.
  X_AT, SOURCES_AT, ARRIVED_AT, BARRIER_AT
};

#define SHARERS (IMAGE_CHANNELS / VECTOR)
#define CLUSTER (SCANS * SHARERS)
constexpr int SIZE = (int)sizeof(storage_t);

// Elements of a record, and where its parts begin.
constexpr int LAM_AT = RECORD_X * IMAGE_CHANNELS;
constexpr int GATE_AT = LAM_AT + HAS_LAM * SCANS * IMAGE_CHANNELS;
constexpr int LOGITS_AT = GATE_AT + HAS_GATE * SCANS * IMAGE_CHANNELS;
constexpr int RECORD = LOGITS_AT + 3 * SCANS * TAP_GROUPS;

// A block: the rows that it owns, from `row`, and the scan that it runs, of channels from c0 in direction d.
struct Block {
  int image, rank, row, d, c0;
  unsigned char* shared;
};

__device__ __forceinline__ Block block_of(const Params& p) {
  const int image = (int)blockIdx.x / CLUSTER, rank = (int)cluster_rank();
  return {image, rank, rank * p.knobs[ROWS], rank % SCANS, rank / SCANS * VECTOR, held_shared_memory()};
}

// Counts the bytes of states that arrive.
__device__ __forceinline__ u64* barrier_of(const Params& p, const Block& me) {
  return (u64*)(me.shared + p.knobs[BARRIER_AT]);
}

__device__ __forceinline__ Divisor rows_of(const Params& p) {
  return {p.knobs[ROWS], (u32)p.knobs[ROWS_MAGIC]};
}
__device__ __forceinline__ Divisor pixels_of(const Params& p) {
  return {p.knobs[ROWS] * p.width, (u32)p.knobs[PIXELS_MAGIC]};
}

__device__ __forceinline__ const storage_t* record_at(const Block& me, int pixel) {
  return (const storage_t*)me.shared + pixel * RECORD;
}

// Numbers that lie together in shared memory, in words as wide as every pixel's place allows.
template <int COUNT>
__device__ __forceinline__ void read_numbers(const storage_t* p, float (&f)[COUNT]) {
  constexpr int all = SIZE * (COUNT | RECORD | LAM_AT | GATE_AT), lowest = all & -all;
  constexpr int grain = lowest < 16 ? lowest : 16;
  if constexpr (grain < 4) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) f[i] = widen(p[i]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT * SIZE / grain; i++) {
      u32 w[grain / 4];
      load_words((const unsigned char*)p + i * grain, w);
#pragma unroll
      for (int k = 0; k < grain / SIZE; k++) {
        const u32 word = w[k * SIZE / 4];
        f[i * (grain / SIZE) + k] =
            SIZE == 4 ? __uint_as_float(word) : k % 2 ? widen_high(word) : widen_low(word);
      }
    }
  }
}

// Records --------------------------------------------------------------------------------------------------

// The image's first record, or null if these tensors are no records after all: the plan saw strides, not
// addresses.
__device__ __forceinline__ const storage_t* records_of(const Params& p, const Block& me) {
  const storage_t* first = p.taps.data - LOGITS_AT;
  bool fine = ((u64)first & 15) == 0;
#if HAS_LAM
  fine = fine && p.lam.data == first + LAM_AT;
#endif
#if HAS_GATE
  fine = fine && p.gate.data == first + GATE_AT;
#endif
#if RECORD_X
  fine = fine && p.x.data == first;
#endif
  return fine ? first + me.image * p.taps.b : nullptr;
}

__device__ __forceinline__ void copy_run(unsigned char* to, const storage_t* from, int bytes) {
  for (int o = threadIdx.x * 16; o < bytes; o += THREADS * 16)
    copy_async<16>(to + o, (const unsigned char*)from + o);
}

// Element e of a record, wherever it is.
__device__ __forceinline__ storage_t element_at(const Params& p, int image, int e, int row, int column) {
  if (e < LAM_AT) return *at(p.x, image, 0, e, row, column);
  if (e < LOGITS_AT) {
    const int channel = e < GATE_AT ? e - LAM_AT : e - GATE_AT, d = channel / IMAGE_CHANNELS;
    return *at(e < GATE_AT ? p.lam : p.gate, image, d, channel - d * IMAGE_CHANNELS, row, column);
  }
  const int tap = (e - LOGITS_AT) / 3, d = tap / TAP_GROUPS, k = e - LOGITS_AT - 3 * tap;
  return at(p.taps, image, d, tap - d * TAP_GROUPS, row, column)[k * p.taps.k];
}

// This owner's records, and its rows of x, on their way to shared memory.
__device__ __forceinline__ void read_rows(const Params& p, const Block& me) {
  const int pixels = p.knobs[ROWS] * p.width;
  const storage_t* records = records_of(p, me);
  if (records != nullptr) {
    copy_run(me.shared, records + (long long)me.row * p.width * RECORD, pixels * RECORD * SIZE);
  } else {
    for (int i = threadIdx.x; i < pixels * RECORD; i += THREADS) {
      const int pixel = i / RECORD, row = quotient(pixel, width_of(p)), column = pixel - row * p.width;
      ((storage_t*)me.shared)[i] = element_at(p, me.image, i - pixel * RECORD, me.row + row, column);
    }
  }
#if !RECORD_X
  const storage_t* x = at(p.x, me.image, 0, 0, me.row, 0);
  copy_run(me.shared + p.knobs[X_AT], x, pixels * IMAGE_CHANNELS * SIZE);
#endif
}

// To the blocks that scan
// ---------------------------------------------------------------------------------------

// The weights of tap group g of a record in direction d, as scans read them.
struct Weights {
  u32 w[TAP_PLANES];
};

__device__ __forceinline__ Weights weights_at(const storage_t* record, int d, int g, bool has_before,
                                              bool has_after) {
  const storage_t* a = record + LOGITS_AT + (d * TAP_GROUPS + g) * 3;
  const Taps w = weights_of({widen(a[0]), widen(a[1]), widen(a[2])}, has_before, has_after);
#if TAP_PAIR
  return {pack_taps(w)};
#else
  return {__float_as_uint(w.before), __float_as_uint(w.here), __float_as_uint(w.after)};
#endif
}

// Sources lam x of a pixel in direction d.
__device__ __forceinline__ void sources_at(const Params& p, const Block& me, int pixel, int d,
                                           float (&u)[IMAGE_CHANNELS]) {
  const storage_t* record = record_at(me, pixel);
  const storage_t* images = (const storage_t*)(me.shared + p.knobs[X_AT]);
  read_numbers(RECORD_X ? record : images + pixel * IMAGE_CHANNELS, u);
#if HAS_LAM
  float lam[IMAGE_CHANNELS];
  read_numbers(record + LAM_AT + d * IMAGE_CHANNELS, lam);
#pragma unroll
  for (int c = 0; c < IMAGE_CHANNELS; c++) u[c] *= lam[c];
#endif
}

// Hands on all that this owner has. Neighbouring threads have neighbouring places of a line.
__device__ __forceinline__ void spread(const Params& p, const Block& me) {
  constexpr int per_group = IMAGE_CHANNELS / TAP_GROUPS;
  const int pixels = p.knobs[ROWS] * p.width;
#pragma unroll 1
  for (int item = threadIdx.x; item < SCANS * pixels; item += THREADS) {
    const int d = quotient(item, pixels_of(p)), i = item - d * pixels;
    const bool vertical = vertical_at(d);
    const int line = quotient(i, vertical ? width_of(p) : rows_of(p));
    const int place = i - line * (vertical ? p.width : p.knobs[ROWS]);
    const int pixel = vertical ? i : place * p.width + line;
    const int of_line = vertical ? place : me.row + place, places = vertical ? p.width : p.height;
    const int index = me.rank * p.knobs[vertical ? SLOT_VERTICAL : SLOT_HORIZONTAL] + i;
    float u[IMAGE_CHANNELS];
    sources_at(p, me, pixel, d, u);
    Weights weights;
#pragma unroll
    for (int sharer = 0; sharer < SHARERS; sharer++) {
      const int c0 = sharer * VECTOR;
      if (c0 % per_group == 0)
        weights = weights_at(record_at(me, pixel), d, c0 / per_group, of_line > 0, of_line + 1 < places);
      unsigned char* to = cluster_map(me.shared + p.knobs[SOURCES_AT] + 4 * index, sharer * SCANS + d);
#pragma unroll
      for (int c = 0; c < VECTOR; c++) *(float*)(to + c * p.knobs[PLANE]) = u[c0 + c];
#pragma unroll
      for (int k = 0; k < TAP_PLANES; k++) *(u32*)(to + (VECTOR + k) * p.knobs[PLANE]) = weights.w[k];
    }
  }
}

// Scans ----------------------------------------------------------------------------------------------------

// Where the states of channel c of the image in direction d arrive.
__device__ __forceinline__ int arrived_at(const Params& p, int d, int c) {
  return p.knobs[ARRIVED_AT] + (d * IMAGE_CHANNELS + c) * p.knobs[ARRIVED];
}

// A lane's states of a line go to the line's owner; of a column, to the owner of its own places.
template <bool VERTICAL>
struct Arrivals {
  unsigned char* at;  // of the first row of any owner, or of column 0, as they lie in every block
  int owner, step;    // of a column; bytes from a row or column to the next

  __device__ __forceinline__ void store(const Params& p, const Block& me, int line,
                                        const u32 (&w)[PLACES]) const {
    const int to = VERTICAL ? quotient(line, rows_of(p)) : owner;
    unsigned char* out = at + (VERTICAL ? line - to * p.knobs[ROWS] : line) * step;
    store_counted<PLACES>(out, barrier_of(p, me), to, (const float*)w);
  }
};

// States of this block's channel c. The operands of the next line are on their way while one is computed.
template <bool VERTICAL>
__device__ __forceinline__ void scan(const Params& p, const Block& me, int c) {
  const Scan s = scan_at(p, me.d);
  const Held held = held_by(s);
  // Rows are adjacent through all slots. A column has a piece in each.
  const int owner = VERTICAL ? 0 : quotient(held.first, rows_of(p));
  const int place = held.first - owner * p.knobs[ROWS];
  const Arrivals<VERTICAL> arrivals = {me.shared + arrived_at(p, me.d, me.c0 + c) + 4 * place, owner,
                                       4 * (VERTICAL ? p.width : p.knobs[COLUMN])};
  const int bytes = 4 * (VERTICAL ? p.width : p.knobs[ROWS]), forth = s.reversed ? -1 : 1;
  int line = s.reversed ? s.lines - 1 : 0, left = s.lines;
  int offset = 4 * (owner * p.knobs[SLOT_HORIZONTAL] + place) + line * bytes;
  const unsigned char* sources = me.shared + p.knobs[SOURCES_AT] + c * p.knobs[PLANE];
  const unsigned char* weights = me.shared + p.knobs[SOURCES_AT] + VECTOR * p.knobs[PLANE];
  u32 next[PLACES];
  LineTaps next_taps;
  Lane h;
  const auto load = [&]() {
    load_words(sources + offset, next);
#pragma unroll
    for (int k = 0; k < TAP_PLANES; k++) {
      u32 w[PLACES];
      load_words(weights + k * p.knobs[PLANE] + offset, w);
#pragma unroll
      for (int v = 0; v < PLACES; v++) next_taps.w[k * PLACES + v] = w[v];
    }
  };
  load();
  const auto step = [&](auto restart) {
    Lane u;
#pragma unroll
    for (int v = 0; v < PLACES; v++) u[0][v] = __uint_as_float(next[v]);
    const LineTaps taps = next_taps;
    const int now = line;
    line += forth;
    offset += --left > 0 ? forth * bytes : 0;
    load();
    state_of_line<decltype(restart)::value>(taps, held, u, h);
    u32 w[PLACES];
#pragma unroll
    for (int v = 0; v < PLACES; v++) w[v] = __float_as_uint(h[0][v]);
    if (held.writes) arrivals.store(p, me, now, w);
  };
  while (left > 0) {
    int more = min(p.chunk, left) - 1;
    step(Yes());
#pragma unroll 2
    for (; more > 0; more--) step(No());
  }
}

// y --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_numbers(const View& v, storage_t* out, const float (&f)[VECTOR]) {
#if STORAGE != 0 && VECTOR % 2 == 0
  if (paired(v)) {
#pragma unroll
    for (int c = 0; c < VECTOR; c += 2) *(u32*)(out + c) = narrow_pair(f[c], f[c + 1]);
    return;
  }
#endif
#pragma unroll
  for (int c = 0; c < VECTOR; c++) out[c * v.c] = narrow(f[c]);
}

// y of this owner's rows: directions in their order.
__device__ __forceinline__ void sum_directions(const Params& p, const Block& me) {
  const int pixels = p.knobs[ROWS] * p.width;
#pragma unroll 1
  for (int item = threadIdx.x; item < SHARERS * pixels; item += THREADS) {
    const int part = quotient(item, pixels_of(p)), pixel = item - part * pixels, c0 = part * VECTOR;
    const int row = quotient(pixel, width_of(p)), column = pixel - row * p.width;
    float gate[SCANS][VECTOR], y[VECTOR];
#if HAS_GATE
#pragma unroll
    for (int d = 0; d < SCANS; d++)
      read_numbers(record_at(me, pixel) + GATE_AT + d * IMAGE_CHANNELS + c0, gate[d]);
#endif
    // Warps that do not scan have got as far as this when the last state arrives.
    mbarrier_wait(barrier_of(p, me), 0);
#pragma unroll
    for (int d = 0; d < SCANS; d++) {
      const int place = vertical_at(d) ? pixel : column * p.knobs[COLUMN] + row;
#pragma unroll
      for (int c = 0; c < VECTOR; c++) {
        const float h = *(const float*)(me.shared + arrived_at(p, d, c0 + c) + 4 * place);
        const float gated = HAS_GATE ? gate[d][c] * h : h;
        y[c] = d == 0 ? gated : y[c] + gated;
      }
    }
    store_numbers(p.y, at(p.y, me.image, 0, c0, me.row + row, column), y);
  }
}

KERNEL(THREADS, BLOCKS) resident_exchange_forward(CONSTANT_PARAMS p) {
  const Block me = block_of(p);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier_of(p, me), 1);
    mbarrier_arrive_expect(barrier_of(p, me), SCANS * IMAGE_CHANNELS * 4 * p.knobs[ROWS] * p.width);
    mbarrier_init_fence();
  }
  __syncwarp();
  cluster_has_begun();
  read_rows(p, me);
  copy_commit();
  // Nothing is stored in another block before it has begun.
  cluster_wait_begun();
  copy_wait<0>();
  __syncthreads();
  spread(p, me);
  cluster_barrier();
  const int c = warp_index();
  if (c < VECTOR) {
    if (vertical_at(me.d))
      scan<true>(p, me, c);
    else
      scan<false>(p, me, c);
  }
  sum_directions(p, me);
}
