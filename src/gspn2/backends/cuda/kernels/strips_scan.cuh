// The warps that scan: a strip of every line, from tiles in shared memory that others bring and take away.
#pragma once
#include "strips_exchange.cuh"
#include "strips_runs.cuh"

template <bool REVERSED>
struct Scanner {
  const Params& p;
  const Runs& runs;
  unsigned char* ring;
  Strip& strip;
  int at[ROWS];       // where this lane's rows are in a tensor's part of a tile, and in results
  bool writes[ROWS];  // its own rows in the plane
  float h[ROWS];
  int until_exchange;
  Restarts restarts;

  typedef u32 Words[TENSORS][ROWS][4];
  typedef u32 Results[ROWS][4];  // y as stored

  __device__ __forceinline__ void start(int own) {
    const int first = (int)threadIdx.x / 32 * own;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      at[k] = opaque(place_of(first + strip.row(k), 0));
      writes[k] = strip.owns(k), h[k] = 0.f;
    }
    restarts = {p.chunk, 0};
  }

  // From where others have left off, as if this warp had come so far itself.
  __device__ __forceinline__ void begin(const Run& run, int cluster) {
    until_exchange = HALO, restarts.until = 0;
    if (!CUT || run.first == 0) return;
    const int columns = runs.columns_before(run.first), since_restart = columns % p.chunk;
    until_exchange = -((columns + VECTOR) / (2 * VECTOR) * 2 * VECTOR) & (HALO - 1);
    restarts.until = since_restart ? p.chunk - since_restart : 0;
    strip.take_over(h, p, cluster);
  }

  __device__ __forceinline__ void read_vectors(Words& words, const unsigned char* tile, int v) const {
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const unsigned char* from = tile + (at[k] ^ v * 16);
#pragma unroll
      for (int i = 0; i < TENSORS; ++i) read_words<4>(words[i][k], from + i * TILE);
    }
  }

  __device__ __forceinline__ void write_vectors(const Results& out, unsigned char* tile, int v) const {
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
      if (writes[k]) write_words<4>(tile + TO_RESULT + (at[k] ^ v * 16), out[k]);
  }

  // The columns of a vector, one after the other.
  template <bool RESTARTS>
  __device__ __forceinline__ void scan_columns(Results& out, const Words& words) {
    float kept[ROWS] = {};  // the column before, which shares a word with this one
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int e = REVERSED ? VECTOR - 1 - i : i;
      scan_column(words, e, RESTARTS && restarts.next());
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        if (SIZE == 4)
          out[k][e * SIZE / 4] = __float_as_uint(h[k]);
        else if (i % 2)
          out[k][e * SIZE / 4] = REVERSED ? stored(h[k], kept[k]) : stored(kept[k], h[k]);
        kept[k] = h[k];
      }
    }
  }

  // One column. What comes from other lanes is added last: it is what the next line waits for.
  __device__ __forceinline__ void scan_column(const Words& words, int e, bool restart) {
    const float before = __shfl_up_sync(0xffffffffu, h[ROWS - 1], 1);
    const float after = __shfl_down_sync(0xffffffffu, h[0], 1);
    float last[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) last[k] = h[k];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      float u = element(words[TAPS][k], e);
      if (HAS_LAM) u *= element(words[TAPS + HAS_LAM][k], e);
      if (restart) {
        h[k] = u;
        continue;
      }
      const Taps w = {element(words[0][k], e), element(words[1][k], e), element(words[2][k], e)};
      float next = fmaf(w.here, last[k], u);
      if (k == 0) {
        next = fmaf(w.after, last[1], next);
        h[k] = fmaf(w.before, before, next);
      } else {
        next = fmaf(w.before, last[k - 1], next);
        h[k] = fmaf(w.after, k + 1 < ROWS ? last[k + 1] : after, next);
      }
    }
  }

  __device__ __forceinline__ void scan_vector(const Words& words, unsigned char* tile, int v) {
    Results out;
    if (restarts.until >= VECTOR) {
      restarts.until -= VECTOR;
      scan_columns<false>(out, words);
    } else {
      scan_columns<true>(out, words);
    }
    write_vectors(out, tile, v);
  }

  // A vector's words are asked for before the one before it is scanned, and during an exchange.
  __device__ __forceinline__ void scan_tile(unsigned char* tile, int vectors) {
    const int first = REVERSED ? vectors - 1 : 0, step = REVERSED ? -1 : 1;
    Words even, odd;
    read_vectors(even, tile, first);
#pragma unroll 1
    for (int i = 0; i < vectors; i += 2) {
      const int v = first + i * step;
      if (until_exchange == 0) {
        strip.exchange(h);
        until_exchange = HALO;
      }
      until_exchange -= 2 * VECTOR;
      const bool more = i + 1 < vectors;
      if (more) read_vectors(odd, tile, v + step);
      scan_vector(even, tile, v);
      if (!more) break;
      if (i + 2 < vectors) read_vectors(even, tile, v + 2 * step);
      scan_vector(odd, tile, v + step);
    }
  }

  __device__ __forceinline__ void scan(int cluster) {
    const int all = runs.tiles();
    Place at_tile = start_of(runs);
    bool begins = true;
#pragma unroll 1
    for (int n = 0; n < all; ++n) {
      if (begins) begin(at_tile.run, cluster);
      const int stage = stage_of(n);
      mbarrier_wait(Shared::full(stage), turn_of(n) & 1);
      scan_tile(ring + stage * STAGE, runs.vectors(at_tile.tile));
      __syncwarp();
      if (arrives(strip.lane)) mbarrier_arrive(Shared::done(stage));
      const bool ends = at_tile.tile + 1 == at_tile.run.end;
      if (CUT && ends && at_tile.run.end < runs.each) strip.hand_over(h, p, cluster + 1);
      begins = at_tile.next(runs);
    }
  }
};
