// Backward of one horizontal scan of planes whose states are at hand: a single walk back. A thread has one row, and the
// blocks of a cluster share the rows of a plane. Warps copy pieces of their rows into tiles of their own, and the
// gradients leave in whole pieces, too: memory is fast only if a row is read in long runs.
//
// Macros: those of planes_backward.cuh, with HORIZONTAL 1, PLACES 1, RAGGED 0 and HAS_HIDDEN 1. SEGMENT is the number of
// lines between exchanges of blocks. And
//   PIECE    bytes of a row in a tile
//   BUFFERS  tiles in a warp's ring
// Knobs are those of planes_backward.cuh, too.
#include "planes_backward_chunk.cuh"

constexpr int VECTORS = PIECE / 16, COLUMNS = PIECE / SIZE;
static_assert(HORIZONTAL && HAS_HIDDEN && N == 1 && S % EACH == 0 && 32 % VECTORS == 0 && VECTORS <= 8, "");
constexpr int UNIT = 32 * PIECE;  // bytes of one operand in a tile
// Of the states there are the rows on either side, too; and a word of each of these rows, with the column that the
// tile's first line in scan order starts from.
constexpr int ENTERING = OPERANDS * UNIT + 2 * PIECE, TILE = ENTERING + (34 * 4 + 15) / 16 * 16;
constexpr int WARP_BYTES = BUFFERS * TILE;
constexpr bool READS_STATES = WANTS_TAPS || (HAS_GATE && WANTS_GATE);

struct Work {
  unsigned char* ring;     // of this warp
  unsigned char** planes;  // of operands, then of gradients in their places: in shared memory, as registers are short
  u64* barriers;           // [2][2]: of what comes from the block before, from the block after
  int lines, tiles;
};

// Tiles are counted in the order of the walk back. The first column of one, and how many it has (whole vectors).
__device__ __forceinline__ int left_of(const Work& w, int tile) { return (REVERSED ? tile : w.tiles - 1 - tile) * COLUMNS; }
__device__ __forceinline__ int columns_of(const Work& w, int tile) { return min(COLUMNS, w.lines - left_of(w, tile)); }

__device__ __forceinline__ unsigned char* tile_at(const Work& w, int tile) { return w.ring + tile % BUFFERS * TILE; }
__device__ __forceinline__ constexpr int unit_at(int op) { return op * UNIT + (op > HIDDEN ? 2 * PIECE : 0); }
// Vector v of a row of a unit: permuted so that 8 rows' vectors meet 8 different groups of banks.
__device__ __forceinline__ int vector_at(int row, int v) {
  constexpr int TOGETHER = 8 / VECTORS;
  return (row * VECTORS + (v ^ row / TOGETHER % VECTORS)) * 16;
}

__device__ __forceinline__ bool is_fetched(const Params& p, int op) { return op == HIDDEN ? READS_STATES : is_read(p, op); }

// Goes over the vectors of a warp's rows, with consecutive lanes on consecutive ones: (row of the warp, vector).
template <typename Body>
__device__ __forceinline__ void for_vectors(const Thread& t, Body body) {
#pragma unroll
  for (int k = 0; k < VECTORS; k++) body(t.lane / VECTORS + k * (32 / VECTORS), t.lane % VECTORS);
}

// The states of the rows next to the warp's, and the column that lines of the tile start from.
__device__ __forceinline__ void fetch_around(const Params& p, const Work& w, const Thread& t, int tile) {
  unsigned char* to = tile_at(w, tile);
  const unsigned char* from = w.planes[HIDDEN];
  const int left = left_of(w, tile), pitch = (int)source_pitch(p, HIDDEN), first = t.begin + t.warp * 32 - 1;
  const auto has_row = [&](int row) { return row >= max(0, t.own_begin - 1) && row < min(t.places, t.own_end + 1); };
  if (t.lane < 2 * VECTORS) {
    const int r = t.lane < VECTORS ? 0 : 33, v = t.lane % VECTORS, row = first + r;
    const bool there = has_row(row) && v * EACH < columns_of(w, tile);
    copy_async_wide(to + unit_at(HIDDEN) + vector_at(r, v), at_row(from, max(row, 0), pitch) + (left + v * EACH) * SIZE,
                    there ? 16 : 0);
  }
  const int column = REVERSED ? left + COLUMNS : left - 4 / SIZE;
  for (int r = t.lane; r < 34; r += 32) {
    const bool there = has_row(first + r) && column >= 0 && column < w.lines;
    copy_async<4>(to + ENTERING + 4 * r, at_row(from, max(first + r, 0), pitch) + column * SIZE, there ? 4 : 0);
  }
}

__device__ __forceinline__ void fetch(const Params& p, const Work& w, const Thread& t, int tile) {
  const int left = left_of(w, tile), columns = columns_of(w, tile);
#pragma unroll
  for (int op = 0; op < OPERANDS; op++) {
    if (!is_fetched(p, op)) continue;
    // Rows beyond a block's own are scanned along, but their gradients are for the block that owns them. Of their
    // states the next one on either side is looked at.
    const bool scanned = op >= TAPS && op < HIDDEN;
    const int begin = scanned ? t.begin : op == HIDDEN ? t.own_begin - 1 : t.own_begin;
    const int end = scanned ? t.end : op == HIDDEN ? min(t.places, t.own_end + 1) : t.own_end;
    unsigned char* to = tile_at(w, tile) + unit_at(op);
    const unsigned char* from = w.planes[op] + left * SIZE;
    const int pitch = source_pitch(p, op);
    for_vectors(t, [&](int r, int v) {
      const int row = t.begin + t.warp * 32 + r;
      const bool there = row >= begin && row < end && v * EACH < columns;
      copy_async_wide(to + vector_at(r + (op == HIDDEN), v), at_row(from, row, pitch) + v * 16, there ? 16 : 0);
    });
  }
  if (READS_STATES) fetch_around(p, w, t, tile);
}

// The gradients of a tile, to where they belong. Not as streams: the other half of a line of the cache follows soon.
__device__ __forceinline__ void write_tile(const Params& p, const Work& w, const Thread& t, int tile) {
  const int left = left_of(w, tile), columns = columns_of(w, tile);
#pragma unroll
  for (int op = 0; op < OPERANDS; op++) {
    if (!is_wanted(p, op)) continue;
    const unsigned char* from = tile_at(w, tile) + unit_at(op);
    unsigned char* to = w.planes[OPERANDS + op] + left * SIZE;
    const int pitch = sink_pitch(p, op);
    for_vectors(t, [&](int r, int v) {
      const int row = t.begin + t.warp * 32 + r;
      Packed<EACH> packed;
      read_words(packed.words, from + vector_at(r, v));
      if (row >= t.own_begin && row < t.own_end && v * EACH < columns) write_words(at_row(to, row, pitch) + v * 16, packed.words);
    });
  }
}

// States of the rows around a thread's: [0] before, [1] after; and the words that hold the column before the first in
// scan order: [0] before, [1] here, [2] after.
struct Around {
  Packed<EACH> row[2];
  u32 entering[3];
};

__device__ __forceinline__ void read_states(const Work& w, const Thread& t, int tile, int q, Chunk& c, Around& around) {
  const unsigned char* from = tile_at(w, tile);
  const unsigned char* states = from + unit_at(HIDDEN);
  read_words(around.row[0].words, states + vector_at(t.lane, q));
  read_words(c.operand[HIDDEN].row[0].words, states + vector_at(t.lane + 1, q));
  read_words(around.row[1].words, states + vector_at(t.lane + 2, q));
  const int next = REVERSED ? q + 1 : q - 1;
#pragma unroll
  for (int i = 0; i < 3; i++)
    around.entering[i] = *(const u32*)(next < 0 || next >= VECTORS ? from + ENTERING + 4 * (t.lane + i)
                                                                   : states + vector_at(t.lane + i, next) + (REVERSED ? 0 : 12));
}

__device__ __forceinline__ void read_vector(const Params& p, const Work& w, const Thread& t, int tile, int q, Chunk& c,
                                            Around& around) {
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (op != HIDDEN && is_fetched(p, op))
      read_words(c.operand[op].row[0].words, tile_at(w, tile) + unit_at(op) + vector_at(t.lane, q));
  if (READS_STATES) read_states(w, t, tile, q, c, around);
}

__device__ __forceinline__ void write_vector(const Params& p, const Work& w, const Thread& t, int tile, int q, const Chunk& c) {
#pragma unroll
  for (int op = 0; op < OPERANDS; op++)
    if (is_wanted(p, op)) write_words(tile_at(w, tile) + unit_at(op) + vector_at(t.lane, q), c.operand[op].row[0].words);
}

// The gradients of the taps of element e, from g and the states of the line before.
__device__ __forceinline__ void put_tap_gradients(const Thread& t, Chunk& c, const Around& around, int e, const float (&g)[N],
                                                  const Weighed (&weight)[N], bool restart) {
  Taps dw[N] = {}, da[N] = {};
  if (!restart) {
    const int from = REVERSED ? e + 1 : e - 1;
    float h[3];
    if (from >= 0 && from < EACH) {
      h[0] = around.row[0][from], h[1] = c.at(HIDDEN, 0, from), h[2] = around.row[1][from];
    } else {
#pragma unroll
      for (int i = 0; i < 3; i++) h[i] = element(around.entering + i, REVERSED ? 0 : 4 / SIZE - 1);
    }
    const float here[N] = {h[1]};
    weight_gradients(dw, g, here, {t.has_before ? h[0] : 0.f, t.has_after ? h[2] : 0.f});
    tap_gradients(t, dw, weight, da);
  }
  put_taps(c, e, da);
}

// One line: column e of the vector.
__device__ __forceinline__ void back_line(const Params& p, Thread& t, Chunk& c, const Around& around, int e, bool restart,
                                          float (&carried)[N]) {
  float g[N];
  Weighed weight[N];
  Shown shown = {0.f, 0.f};
  const float h[N] = {HAS_GATE && WANTS_GATE ? c.at(HIDDEN, 0, e) : 0.f};
  state_gradient(t, c, e, h, carried, g);
  carried[0] = 0.f;
  if (!restart) {
    weight[0] = weigh({c.at(TAPS, 0, e), c.at(TAPS + 1, 0, e), c.at(TAPS + 2, 0, e)}, t.has_before, t.has_after);
    shown = carry_line(carried, g, weight);
  }
  publish(t, shown);
  if (WANTS_TAPS) put_tap_gradients(t, c, around, e, g, weight, restart);
  put_product_gradients(p, c, e, g);
  const Edges from = settle(t, shown);
  carried[0] += from.before + from.after;
}

#if SPLIT
// What lines hand on, of the rows that other blocks own: each comes with its share of a count that the receiver waits
// for. Two sets take turns, so that nobody needs to say that it has read.
__device__ __forceinline__ void exchange(const Params& p, const Work& w, const Thread& t, float (&carried)[N], int count) {
  const u32 parity = count >> 1 & 1;
  float* mail = t.mail + (count & 1) * 2 * HALO;
  u64* barriers = w.barriers + (count & 1) * 2;
  const bool has_before = t.strip > 0, has_after = t.strip + 1 < strips_of(p);
  if (threadIdx.x == 0) {
    if (has_before) mbarrier_arrive_expect(barriers, 4 * HALO);
    if (has_after) mbarrier_arrive_expect(barriers + 1, 4 * (t.end - t.own_end));
  }
  const int after_begin = t.place - t.own_begin, before_end = t.own_end - t.place;
  if (t.own && has_before && after_begin < HALO)
    store_counted<1>(mail + HALO + after_begin, barriers + 1, cluster_rank() - 1, carried);
  if (t.own && has_after && before_end <= HALO) store_counted<1>(mail + HALO - before_end, barriers, cluster_rank() + 1, carried);
  if (t.alive && !t.own) {
    const bool before = t.place < t.own_begin;
    mbarrier_wait(barriers + !before, parity);
    carried[0] = mail[before ? t.place - t.begin : HALO + t.place - t.own_end];
  }
  __syncwarp();
}
#endif

__device__ __forceinline__ Work work_of(const Params& p, const Scan& scan, const Thread& t) {
  Work w;
  w.ring = shared_memory() + t.warp * WARP_BYTES;
  w.barriers = (u64*)(t.mail + 4 * HALO);
  w.planes = (unsigned char**)(w.barriers + 4);
  w.lines = scan.lines;
  w.tiles = (scan.lines + COLUMNS - 1) / COLUMNS;
  for (int op = threadIdx.x; op < OPERANDS; op += blockDim.x) {
    w.planes[op] = (unsigned char*)source_of(p, op, t.b, t.group, t.channel);
    w.planes[OPERANDS + op] = is_wanted(p, op) ? sink_of(p, op, t.b, t.group, t.channel) : nullptr;
  }
#if SPLIT
  if (threadIdx.x < 4) mbarrier_init(w.barriers + threadIdx.x, 1);
  mbarrier_init_fence();
#endif
  return w;
}

__device__ __forceinline__ void walk_back(const Params& p, const Work& w, Thread& t) {
  float carried[N] = {0.f};
  int phase = (w.lines - 1) % p.chunk;
  [[maybe_unused]] int until_exchange = S, exchanges = 0;
  for (int tile = 0; tile < BUFFERS - 1; tile++) {
    if (tile < w.tiles) fetch(p, w, t, tile);
    copy_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < w.tiles; tile++) {
    if (tile + BUFFERS - 1 < w.tiles) fetch(p, w, t, tile + BUFFERS - 1);
    copy_commit();
    copy_wait<BUFFERS - 1>();
    __syncwarp();
    const int vectors = columns_of(w, tile) / EACH;
#pragma unroll 1
    for (int i = 0; i < vectors; i++) {
#if SPLIT
      if (until_exchange == 0) {
        exchange(p, w, t, carried, exchanges++);
        until_exchange = S;
      }
      until_exchange -= EACH;
#endif
      const int q = REVERSED ? i : vectors - 1 - i;
      Chunk c;
      Around around;
      read_vector(p, w, t, tile, q, c, around);
#pragma unroll
      for (int k = EACH - 1; k >= 0; k--) {
        back_line(p, t, c, around, REVERSED ? EACH - 1 - k : k, phase == 0, carried);
        phase = phase == 0 ? p.chunk - 1 : phase - 1;
      }
      write_vector(p, w, t, tile, q, c);
    }
    __syncwarp();
    write_tile(p, w, t, tile);
    __syncwarp();
  }
}

KERNEL(THREADS, MIN_BLOCKS) planes_backward_pieces(CONSTANT_PARAMS p) {
  const Scan scan = scan_of(p, p.knobs[0]);
  const int warps = blockDim.x / 32;
  float* edges = (float*)(shared_memory() + warps * WARP_BYTES);
  Thread t = thread_of(p, scan, threadIdx.x, edges);
  for (int i = threadIdx.x; i < 4 * (warps + 2); i += blockDim.x) edges[i] = 0.f;
  const Work w = work_of(p, scan, t);
  cluster_meets();  // every block is there, with its barriers, before another one writes into its memory
  walk_back(p, w, t);
}
