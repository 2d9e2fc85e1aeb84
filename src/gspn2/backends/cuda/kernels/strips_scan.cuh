// The warps that scan: a strip of every line, from tiles in shared memory that others bring and take away.
#pragma once
#include "strips_exchange.cuh"

template <bool REVERSED>
struct Scanner {
  const Params& p;
  const Tiles& tiles;
  unsigned char* ring;
  Strip& strip;
  int at[ROWS];       // where this lane's rows are in a tensor's part of a tile, and in results
  bool writes[ROWS];  // its own rows in the plane

  typedef u32 Words[TENSORS][ROWS][4];
  typedef u32 Results[ROWS][4];  // y as stored

  __device__ __forceinline__ void start(int own) {
    const int first = threadIdx.x / 32 * own;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      at[k] = place_of(first + strip.row(k), 0);
      writes[k] = strip.owns(k);
    }
  }

  __device__ __forceinline__ void read_vectors(Words& words, int stage, int v) const {
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const unsigned char* from = ring + (stage + (at[k] ^ v * 16));
#pragma unroll
      for (int i = 0; i < TENSORS; ++i) read_words<4>(words[i][k], from + i * TILE);
    }
  }

  __device__ __forceinline__ void write_vectors(const Results& out, int stage, int v) const {
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
      if (writes[k]) write_words<4>(ring + (stage + TO_RESULT + (at[k] ^ v * 16)), out[k]);
  }

  // The columns of a vector, one after the other.
  template <bool RESTARTS>
  __device__ __forceinline__ void scan_columns(Results& out, const Words& words, float (&h)[ROWS],
                                               Restarts& restarts) const {
    float kept[ROWS] = {};  // the column before, which shares a word with this one
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int e = REVERSED ? VECTOR - 1 - i : i;
      scan_column(h, words, e, RESTARTS && restarts.next());
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
  __device__ __forceinline__ void scan_column(float (&h)[ROWS], const Words& words, int e,
                                              bool restart) const {
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

  __device__ __forceinline__ void run() {
    const int all = tiles.all();
    float h[ROWS] = {};
    Restarts restarts{p.chunk, 0};
    int tile = 0, until_exchange = HALO;
#pragma unroll 1
    for (int n = 0; n < all; ++n) {
      const int stage = tiles.stage(n), vectors = tiles.vectors(tile);
      mbarrier_wait(full_barrier(stage), tiles.turn(n) & 1);
#pragma unroll 1
      for (int i = 0; i < vectors; ++i) {
        const int v = REVERSED ? vectors - 1 - i : i;
        if (until_exchange == 0) {
          strip.exchange(h);
          until_exchange = HALO;
        }
        until_exchange -= VECTOR;
        Words words;
        Results out;
        read_vectors(words, stage * STAGE, v);
        if (restarts.until >= VECTOR) {
          restarts.until -= VECTOR;
          scan_columns<false>(out, words, h, restarts);
        } else {
          scan_columns<true>(out, words, h, restarts);
        }
        write_vectors(out, stage * STAGE, v);
      }
      __syncwarp();
      if (strip.lane == 0) mbarrier_arrive(done_barrier(stage));
      if (++tile == tiles.each) tile = 0, until_exchange = HALO, restarts.until = 0;
    }
  }
};
