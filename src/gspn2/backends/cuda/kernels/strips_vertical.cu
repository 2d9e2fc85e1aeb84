// Forward, down or up over few planes: see strips_vertical.cuh.
#include "strips_vertical.cuh"

// The warps that copy. They wait only for warps that scan.
struct Copier {
  static constexpr int VECTORS = ROW / 16, ROUNDS = (VECTORS + 31) / 32;  // of a line of a tensor
  static_assert(LINES % COPIERS == 0, "warps have lines in turn, as many each");

  const Params& p;
  const Lines& lines;
  unsigned char* ring;
  int warp, lane;   // of those that copy
  int first, end;   // columns of the block: the first of a tile may be negative

  // Places outside of the plane hold whatever is there: who is inside looks at nothing of theirs.
  __device__ __forceinline__ bool there(int vector) const {
    return vector < VECTORS && between(first + vector * VECTOR, 0, end);
  }

  // The tensor that operand i of a line is a row of.
  static __device__ __forceinline__ int tensor(int i) { return i < TAPS ? i : TAPS + (i - TAPS) % OWN; }

  __device__ __forceinline__ void run(int first_plane) const {
    const storage_t* next[OPERANDS];
#pragma unroll
    for (int k = 0; k < PLANES; ++k) {
      const Plane plane = plane_of(p, first_plane + k);
#pragma unroll
      for (int i = k == 0 ? 0 : TAPS; i < TENSORS; ++i)
        next[k * OWN + i] = plane.from[i] + lines.row(warp) * row_step(p, i) + first + lane * VECTOR;
    }
    bool copies[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) copies[r] = there(lane + r * 32);
    Turn turn;
#pragma unroll 1
    for (int n = 0; n < lines.tiles(); ++n, turn.next()) {
      if (n >= STAGES) mbarrier_wait(Shared::done(turn.stage), turn.parity ^ 1);
      unsigned char* to = ring + turn.stage * STAGE + warp * OPERANDS * ROW + lane * 16;
#pragma unroll
      for (int i = 0; i < LINES; i += COPIERS) {
        const bool in_plane = n * LINES + i + warp < lines.count;
#pragma unroll
        for (int k = 0; k < OPERANDS; ++k) {
#pragma unroll
          for (int r = 0; r < ROUNDS; ++r)
            if (copies[r] && in_plane)
              copy_async_wide(to + (i * OPERANDS + k) * ROW + r * 512, next[k] + r * 32 * VECTOR);
          next[k] += COPIERS * lines.step(row_step(p, tensor(k)));
        }
      }
      mbarrier_arrive_copied(Shared::full(turn.stage));
    }
  }
};

// The warps that scan. Within a tile the addresses of operands are constants; results go straight to
// memory.
struct Scanner {
  struct Words {
    u32 of[TENSORS][WORDS];
  };

  const Params& p;
  const Lines& lines;
  Strip strip;
  bool writes, starts, ends;  // are this lane's places the strip's own; the first of a line; the last
  storage_t* y;               // this lane's places of the next line
  long long y_step;
  float h[PLACES];

  __device__ __forceinline__ Words read(const unsigned char* tile, int line) const {
    const unsigned char* own = tile + strip.plane * OWN * ROW;
    Words words;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i)
      read_words<WORDS>(words.of[i], (i < TAPS ? tile : own) + (line * OPERANDS + i) * ROW);
    return words;
  }

  // What comes from other lanes is added last: it is what the next line waits for. Taps and states of
  // neighbours that are not there may be anything.
  __device__ __forceinline__ void scan_line(const Words& words, bool restart) {
    const float before = __shfl_up_sync(0xffffffffu, h[PLACES - 1], 1);
    const float after = __shfl_down_sync(0xffffffffu, h[0], 1);
    float next[PLACES];
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
      next[k] = element(words.of[TAPS], k);
      if (HAS_LAM) next[k] *= element(words.of[TENSORS - 1], k);
    }
    if (!restart) {
#pragma unroll
      for (int k = 0; k < PLACES; ++k) {
        next[k] = fmaf(element(words.of[1], k), h[k], next[k]);
        if (k > 0) next[k] = fmaf(element(words.of[0], k), h[k - 1], next[k]);
        if (k + 1 < PLACES) next[k] = fmaf(element(words.of[2], k), h[k + 1], next[k]);
      }
      next[0] = fma_where(!starts, element(words.of[0], 0), before, next[0]);
      next[PLACES - 1] = fma_where(!ends, element(words.of[2], PLACES - 1), after, next[PLACES - 1]);
    }
#pragma unroll
    for (int k = 0; k < PLACES; ++k) h[k] = next[k];
    u32 out[WORDS];
#pragma unroll
    for (int k = 0; k < WORDS; ++k) out[k] = stored(h[k * 4 / SIZE], h[k * 4 / SIZE + (SIZE < 4)]);
    if (writes) write_words<WORDS>(y, out);
    y += y_step;
  }

  // Reads are a line ahead of the scan.
  __device__ __forceinline__ void scan_whole(const unsigned char* tile, bool restart) {
    Words ahead = read(tile, 0);
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      const Words words = ahead;
      if (i + 1 < LINES) ahead = read(tile, i + 1);
      scan_line(words, i == 0 && restart);
    }
  }

  // A tile that ends the plane, or has a restart behind its first line.
  __device__ __forceinline__ void scan_some(const unsigned char* tile, int count, Restarts& restarts) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) scan_line(read(tile, i), restarts.next());
  }

  __device__ __forceinline__ void run(const unsigned char* from) {
    Restarts restarts{p.chunk, 0};
    Turn turn;
    [[maybe_unused]] int until_exchange = HALO;
#pragma unroll 1
    for (int n = 0; n < lines.tiles(); ++n, turn.next()) {
#if HALO
      if (until_exchange == 0) {
        strip.exchange(h);
        until_exchange = HALO;
      }
      until_exchange -= LINES;
#endif
      mbarrier_wait(Shared::full(turn.stage), turn.parity);
      const unsigned char* tile = from + turn.stage * STAGE;
      const int left = lines.count - n * LINES, until = restarts.until == 0 ? p.chunk : restarts.until;
      if (left >= LINES && until >= LINES) {
        scan_whole(tile, restarts.until == 0);
        restarts.until = until - LINES;
      } else {
        scan_some(tile, min(left, LINES), restarts);
      }
      __syncwarp();
      if (arrives(strip.lane)) mbarrier_arrive(Shared::done(turn.stage));
    }
  }
};

// Registers are few without being told: two blocks find room on a multiprocessor.
KERNEL(THREADS, 1) strips_vertical(CONSTANT_PARAMS p) {
  const int rank = CLUSTER > 1 ? (int)cluster_rank() : 0, own = p.knobs[0];
  unsigned char* ring = held_shared_memory() + Shared::BYTES;
  // The same for all lanes, and the compiler knows.
  const int warp = (int)__shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = (int)threadIdx.x % 32;
  const int first_plane = (int)blockIdx.x / CLUSTER * PLANES;
  const Lines lines{p.height, scan_of(p, 0).reversed};
  const int first = rank * ALONG * own - HALO;
  const int end = min(p.width, first + ALONG * own + 2 * HALO);
  const Copier copier{p, lines, ring, warp - STRIPS, lane, first, end};
  if (threadIdx.x == 0) Shared::start_barriers();
  // Barriers of neighbours are there before anybody sends.
  wait_for_everybody();
  if (warp >= STRIPS) {
    copier.run(first_plane);
  } else {
    const Strip strip = strip_of(p.width, own, rank);
    const int place = strip_of_warp(warp) * own + lane * PLACES, column = first + place;
    storage_t* y = plane_of(p, first_plane + strip.plane).y + lines.row(0) * p.y.h + column;
    const bool starts = column == 0, ends = column + PLACES == p.width;
    Scanner scanner{p, lines, strip, strip.owns(), starts, ends, y, lines.step(p.y.h), {}};
    scanner.run(ring + place * SIZE);
  }
  // A neighbour may still send states.
  wait_for_everybody();
}
