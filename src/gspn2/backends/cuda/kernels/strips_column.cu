// Forward, one direction, right or left, over few planes of which one warp holds a whole column, weights as
// given: a block has a plane, one warp scans, the others copy for it, as in strips.cuh. Without neighbours a
// strip has no halo, exchanges nothing, and its results take the place of x.
//
// Macros beside those of common.cuh:
//   CLUSTER, STRIPS   1 (for strips_common.cuh)
//   COPIERS           copying warps of a block
//   ROWS              neighbouring ones of a lane
//   STAGES            tiles in the ring of a block
// The planner promises whole lanes, rows that are a multiple of ROWS, and restarts between vectors only.
#include "strips_common.cuh"
#include "strips_ptx.cuh"

static_assert(CLUSTER == 1 && STRIPS == 1, "a warp holds a whole line");

constexpr int PIECE = 64;                // bytes of a row in a tile
constexpr int VECTORS = PIECE / 16;      // of a row in a tile
constexpr int COLUMNS = PIECE / SIZE;    // of a tile
constexpr int TILE = 32 * ROWS * PIECE;  // bytes of one tensor
constexpr int STAGE = TENSORS * TILE;

typedef Head<0, 0> Shared;

// Where vector v of a row is: rows that lanes read at a time are beside each other, and vectors permuted, so
// that 8 lanes meet 8 groups of banks; so do two neighbouring rows, which are copied at a time.
// place_of(row, v) = place_of(row, 0) ^ 16 v.
__device__ __forceinline__ int place_of(int row, int v) {
  constexpr int ALIKE = 8 / VECTORS, MASK = VECTORS - 1;
  const int k = row % ROWS, slot = k * 32 + (row / ROWS ^ (k & 1));
  return (slot * VECTORS + (v ^ (slot / ALIKE & MASK))) * 16;
}

// The tiles of a plane, in the order of the scan: that at its right end may have fewer columns.
struct Tiles {
  int count;
  bool reversed;

  __device__ __forceinline__ int column(int tile) const {
    return (reversed ? count - 1 - tile : tile) * COLUMNS;
  }
};

// The warps that copy. A lane has the same vectors of every tile, so that it may ask for the next tile as
// soon as it has taken its results from the last one.
struct Copier {
  static constexpr int STEP = COPIERS * 32 / VECTORS;  // rows from one of a lane's to its next
  static constexpr int ROUNDS = 32 * ROWS / STEP;
  static_assert(STEP % (8 * ROWS) == 0 && 32 * ROWS % STEP == 0, "vectors of a lane are permuted alike");
  static constexpr int ROUND = STEP / ROWS * PIECE;    // bytes from one to the next in a tile

  const Params& p;
  const Tiles& tiles;
  Plane plane;
  unsigned char* ring;
  int row, column;  // of a lane's first vector

  __device__ __forceinline__ void start(int index) {
    row = index / VECTORS, column = index % VECTORS * VECTOR;
    ring += place_of(row, index % VECTORS);
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) plane.from[i] += row * row_step(p, i) + column;
    plane.y += row * p.y.h + column;
  }

  __device__ __forceinline__ void copy_tile(int tile, int stage) const {
    const int first = tiles.column(tile);
    if (first + column >= p.width) return;
    unsigned char* to = ring + stage * STAGE;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k)
#pragma unroll
      for (int i = 0; i < TENSORS; ++i)
        if (row + k * STEP < p.height)
          copy_async_wide(to + i * TILE + k * ROUND, plane.from[i] + k * STEP * row_step(p, i) + first);
  }

  __device__ __forceinline__ void write_tile(int tile, int stage) const {
    const int first = tiles.column(tile);
    if (first + column >= p.width) return;
    const unsigned char* from = ring + stage * STAGE + TAPS * TILE;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k)
      if (row + k * STEP < p.height)
        *(uint4*)(plane.y + k * STEP * p.y.h + first) = *(const uint4*)(from + k * ROUND);
  }

  // The first tile is asked for before the block has met: nobody waits at the barriers before.
  __device__ __forceinline__ void run() const {
    copy_tile(0, 0);
    __syncthreads();
    mbarrier_arrive_copied(Shared::full(0));
#pragma unroll 1
    for (int n = 1; n < min(STAGES, tiles.count); ++n) {
      copy_tile(n, n);
      mbarrier_arrive_copied(Shared::full(n));
    }
    Turn turn;
#pragma unroll 1
    for (int n = 0; n < tiles.count; ++n, turn.next()) {
      mbarrier_wait(Shared::done(turn.stage), turn.parity);
      write_tile(n, turn.stage);
      if (n + STAGES >= tiles.count) continue;
      copy_tile(n + STAGES, turn.stage);
      mbarrier_arrive_copied(Shared::full(turn.stage));
    }
  }
};

// The warp that scans. The words of a vector are read while that before it is scanned, half of them at a
// time.
template <bool REVERSED>
struct Scanner {
  const Params& p;
  int at[ROWS];               // where this lane's rows are in a tensor's part of a tile
  bool writes, starts, ends;  // are this lane's rows of the plane; the first; the last
  float h[ROWS];

  typedef u32 Words[TENSORS * ROWS][4];  // tensor by tensor

  // A vector of the plane, in the order of the scan.
  struct Cursor {
    unsigned char* tile;
    int v;
    Turn turn;

    __device__ __forceinline__ bool ends_tile() const { return v == (REVERSED ? 0 : VECTORS - 1); }
    __device__ __forceinline__ void next(unsigned char* ring) {
      if (!ends_tile()) {
        v += REVERSED ? -1 : 1;
        return;
      }
      v = REVERSED ? VECTORS - 1 : 0;
      turn.next();
      tile = ring + turn.stage * STAGE;
      mbarrier_wait(Shared::full(turn.stage), turn.parity);
    }
  };

  __device__ __forceinline__ void start() {
    const int lane = (int)threadIdx.x;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) at[k] = opaque(place_of(lane * ROWS + k, 0)), h[k] = 0.f;
    writes = lane * ROWS < p.height, starts = lane == 0, ends = (lane + 1) * ROWS == p.height;
  }

  // A half of the words of a vector.
  __device__ __forceinline__ void read_half(Words& words, const Cursor& from, int half) const {
    constexpr int HALF = TENSORS * ROWS / 2;
#pragma unroll
    for (int n = half * HALF; n < (half + 1) * HALF; ++n)
      read_words<4>(words[n], from.tile + (at[n % ROWS] ^ from.v * 16) + n / ROWS * TILE);
  }

  // What comes from other lanes is added last: it is what the next line waits for. Taps and states of
  // neighbours that are not there may be anything.
  __device__ __forceinline__ void scan_column(float before, float after, const Taps (&w)[ROWS],
                                              const float (&u)[ROWS]) {
    float next[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      next[k] = fmaf(w[k].here, h[k], u[k]);
      if (k > 0) next[k] = fmaf(w[k].before, h[k - 1], next[k]);
      if (k + 1 < ROWS) next[k] = fmaf(w[k].after, h[k + 1], next[k]);
    }
    next[0] = fma_where(!starts, w[0].before, before, next[0]);
    next[ROWS - 1] = fma_where(!ends, w[ROWS - 1].after, after, next[ROWS - 1]);
#pragma unroll
    for (int k = 0; k < ROWS; ++k) h[k] = next[k];
  }

  // `ahead`: the vector that is read meanwhile, if there are more.
  __device__ __forceinline__ void scan_vector(const Words& words, const Cursor& now, Words& read,
                                              const Cursor& ahead, bool more, bool restart) {
    u32 out[ROWS][4];
    float kept[ROWS] = {};  // the column before, which shares a word with this one
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int e = REVERSED ? VECTOR - 1 - i : i;
      const float before = __shfl_up_sync(0xffffffffu, h[ROWS - 1], 1);
      const float after = __shfl_down_sync(0xffffffffu, h[0], 1);
      // Few, so that shuffles do not queue behind them; in branches, as others are moved to their use.
      if (i % (VECTOR / 2) == 0 && more) read_half(read, ahead, i / (VECTOR / 2));
      Taps w[ROWS];
      float u[ROWS];
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        w[k] = {element(words[k], e), element(words[ROWS + k], e), element(words[2 * ROWS + k], e)};
        u[k] = element(words[TAPS * ROWS + k], e);
        if (HAS_LAM) u[k] *= element(words[(TENSORS - 1) * ROWS + k], e);
      }
      if (i == 0 && restart) {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) h[k] = u[k];
      } else {
        scan_column(before, after, w, u);
      }
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        if (SIZE == 4)
          out[k][e * SIZE / 4] = __float_as_uint(h[k]);
        else if (i % 2)
          out[k][e * SIZE / 4] = REVERSED ? stored(h[k], kept[k]) : stored(kept[k], h[k]);
        kept[k] = h[k];
      }
    }
    if (writes) {
#pragma unroll
      for (int k = 0; k < ROWS; ++k) write_words<4>(now.tile + TAPS * TILE + (at[k] ^ now.v * 16), out[k]);
    }
  }

  __device__ __forceinline__ void run(unsigned char* ring) {
    const int all = p.width / VECTOR;
    Cursor now{ring, REVERSED ? (all - 1) % VECTORS : 0, {}}, ahead = now;
    mbarrier_wait(Shared::full(0), 0);
    Words even, odd;
    read_half(even, now, 0), read_half(even, now, 1);
    int left = all, until = 0;  // vectors of the plane; columns before a restart
    const auto step = [&](Words& words, Words& read) {
      const bool more = --left > 0;
      if (more) ahead.next(ring);
      const bool restart = until == 0;
      until = (restart ? p.chunk : until) - VECTOR;
      scan_vector(words, now, read, ahead, more, restart);
      if (!more || now.ends_tile()) {
        __syncwarp();
        if (arrives((int)threadIdx.x)) mbarrier_arrive(Shared::done(now.turn.stage));
      }
      now = ahead;
    };
#pragma unroll 1
    while (true) {
      step(even, odd);
      if (left == 0) break;
      step(odd, even);
      if (left == 0) break;
    }
  }
};

template <bool REVERSED>
__device__ __forceinline__ void scan_plane(const Params& p, unsigned char* ring) {
  Scanner<REVERSED> scanner{p};
  scanner.start();
  scanner.run(ring);
}

KERNEL(THREADS, 1) strips_column(CONSTANT_PARAMS p) {
  unsigned char* ring = held_shared_memory() + Shared::BYTES;
  // The same for all lanes, and the compiler knows.
  const int warp = (int)__shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const Tiles tiles{(p.width + COLUMNS - 1) / COLUMNS, scan_of(p, 0).reversed};
  if (warp > 0) {
    Copier copier{p, tiles, plane_of(p, (int)blockIdx.x), ring};
    copier.start((int)threadIdx.x - 32);
    copier.run();
    return;
  }
  if (threadIdx.x == 0) Shared::start_barriers();
  __syncthreads();
  if (tiles.reversed)
    scan_plane<true>(p, ring);
  else
    scan_plane<false>(p, ring);
}
