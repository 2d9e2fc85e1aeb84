// Right and left: lines are columns, memory runs along the scan. A thread holds one row, and scans the 16 bytes of it
// that it has just read from a tile in shared memory; the result takes the place of x there. So nothing is transposed,
// and memory sees HPIECE bytes of every row at a time. A warp's tiles are its own: data needs no barrier.
#pragma once
#include "lines.cuh"

#if HPIECE
constexpr int VECTOR = 16 / SIZE;          // columns in 16 bytes
constexpr int VECTORS = HPIECE / 16;       // of a row in a tile
constexpr int TILE = 32 * HPIECE;          // bytes of one tensor in a warp's tile
constexpr int HTILE = TENSORS * TILE;
constexpr int SPAN = WARPS > 9 ? 4 : VECTOR;  // columns that a thread takes at once: many warps have few registers
constexpr int SPANS = HPIECE / SIZE / SPAN;
constexpr int AHEAD = WARPS > 9 ? 1 : 8 / SPAN;  // spans between asking for sums and using them

// Where vector v of a row is: permuted so that 8 rows' vectors meet 8 different groups of banks.
template <int N>
__device__ __forceinline__ int place_of(int row, int v) {
  constexpr int EIGHTH = N >= 8 ? 1 : 8 / N;
  return (row * N + (v ^ (row / EIGHTH & (N < 8 ? N - 1 : 7)))) * 16;
}

template <bool REVERSED>
struct HorizontalScan {
  const Params& p;
  Plane plane;
  unsigned char* ring;
  Strip strip;
  int width, tiles, all_spans;
  int warp_row;  // first row of the warp

  // Lanes go over the vectors of a warp's rows, N to a row: a lane's first row is lane / N, its step 32 / N.
  template <int N, typename Body>
  __device__ __forceinline__ void for_vectors(int columns_of_vector, int column0, Body body) const {
    const int lane = threadIdx.x % 32, v = lane % N;
    if (column0 + v * columns_of_vector >= width) return;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int r = lane / N + k * (32 / N);
      body(k * (32 / N), place_of<N>(r, v), warp_row + r);
    }
  }

  // Elements from row 0, column 0 to this lane's first vector of a tile at column 0.
  template <int N>
  __device__ __forceinline__ long long lane_offset(long long row_step, int columns_of_vector) const {
    const int lane = threadIdx.x % 32;
    return (warp_row + lane / N) * row_step + lane % N * columns_of_vector;
  }

  __device__ __forceinline__ void move_to_lane() {
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) plane.from[i] += lane_offset<VECTORS>(row_step(p, i), VECTOR);
    plane.y += lane_offset<VECTORS>(p.y.h, VECTOR);
  }

  __device__ __forceinline__ unsigned char* tile_at(int tile) const { return ring + tile % HBUFFERS * HTILE; }

  __device__ __forceinline__ void copy_tile(int tile) const {
    unsigned char* to = tile_at(tile);
    const int column0 = column_of(tile);
    for_vectors<VECTORS>(VECTOR, column0, [&](int rows, int place, int row) {
      if (!strip.has(row)) return;
#pragma unroll
      for (int i = 0; i < TENSORS; ++i)
        copy_async_wide(to + i * TILE + place, plane.from[i] + rows * row_step(p, i) + column0);
    });
  }

  __device__ __forceinline__ void write_tile(int tile) const {
    const unsigned char* from = tile_at(tile);
    const int column0 = column_of(tile);
    for_vectors<VECTORS>(VECTOR, column0, [&](int rows, int place, int row) {
      if (!strip.owns(row)) return;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        *(uint4*)(plane.y + c * p.y.c + rows * p.y.h + column0) = *(const uint4*)(from + (3 + c * OWN) * TILE + place);
    });
  }

  // Tiles, and vectors in a tile, in scan order; the last tile of a row may have fewer.
  __device__ __forceinline__ int column_of(int tile) const {
    return (REVERSED ? tiles - 1 - tile : tile) * (HPIECE / SIZE);
  }
  __device__ __forceinline__ int spans_in(int tile) const { return min(SPANS, (width - column_of(tile)) / SPAN); }

  // Where this thread's span s of a row is in a tensor's part of a tile.
  __device__ __forceinline__ int place_of_span(int s) const {
    return place_of<VECTORS>(threadIdx.x % 32, s * SPAN / VECTOR) + s * SPAN % VECTOR * SIZE;
  }
  __device__ __forceinline__ void read_span(u32 (&words)[TENSORS][4], int tile, int s) const {
    const unsigned char* from = tile_at(tile) + place_of_span(s);
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) read_words<SPAN * SIZE / 4>(words[i], from + i * TILE);
  }

  // The sums of span n of this thread's row, in scan order; nothing beyond its end.
  __device__ __forceinline__ void read_sums(u32 (&sums)[CHANNELS][SPAN], int row, int n) const {
    if (!plane.adds || !strip.owns(row) || n >= all_spans) return;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float* from = plane.sum_at(c, row, column_of_span(n));
#pragma unroll
      for (int i = 0; i < SPAN; i += 4) {
        const uint4 four = __ldcg((const uint4*)(from + i));
        sums[c][i] = four.x, sums[c][i + 1] = four.y, sums[c][i + 2] = four.z, sums[c][i + 3] = four.w;
      }
    }
  }
  __device__ __forceinline__ int column_of_span(int n) const { return (REVERSED ? all_spans - 1 - n : n) * SPAN; }

  // One span of this thread's row, added to `result`.
  __device__ __forceinline__ void scan_span(float (&result)[CHANNELS][SPAN], u32 (&words)[TENSORS][4],
                                              float (&h)[CHANNELS][1], Edges& edges, Restarts& restarts, bool inside,
                                              bool starts, bool ends) const {
#pragma unroll
    for (int i = 0; i < SPAN * SIZE / 4; ++i) {
      if (starts) words[0][i] = MISSING;
      if (ends) words[2][i] = MISSING;
    }
    // Weights first: what is between two lines is on the way of the states.
    Place places[SPAN];
    if (ordinary<SPAN * SIZE / 4>(words, inside)) {
#pragma unroll
      for (int e = 0; e < SPAN; ++e) places[e] = unpack<true>(words, e);
    } else {
#pragma unroll
      for (int e = 0; e < SPAN; ++e) places[e] = unpack<false>(words, e);
    }
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      const int e = REVERSED ? SPAN - 1 - i : i;
      const Place& it = places[e];
      float before[CHANNELS], after[CHANNELS];
      edges.get(before, after, h);
      const bool restart = restarts.next();
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        if (restart) {
          h[c][0] = it.u[c];
        } else {
          float next = fmaf(it.w.here, h[c][0], it.u[c]);
          next = fmaf(it.w.before, starts ? 0.f : before[c], next);
          h[c][0] = fmaf(it.w.after, ends ? 0.f : after[c], next);
        }
      }
      edges.put(h);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const float v_out = HAS_GATE ? h[c][0] * it.gate[c] : h[c][0];
        float& sum = result[c][e];
        sum = SUMS ? sum + v_out : v_out;
      }
    }
  }

  __device__ __forceinline__ void write_span(const float (&result)[CHANNELS][SPAN], int row, int tile, int s, int n) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float* sum = result[c];
      if (SUMS && !plane.last) {
        if (!strip.owns(row)) continue;
        float* to = plane.sum_at(c, row, column_of_span(n));
#pragma unroll
        for (int i = 0; i < SPAN; i += 4)
          *(uint4*)(to + i) = make_uint4(__float_as_uint(sum[i]), __float_as_uint(sum[i + 1]), __float_as_uint(sum[i + 2]),
                                         __float_as_uint(sum[i + 3]));
      } else {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < SPAN * SIZE / 4; ++i) out[i] = stored(sum[i * 4 / SIZE], sum[i * 4 / SIZE + (SIZE < 4)]);
        write_words<SPAN * SIZE / 4>(tile_at(tile) + (3 + c * OWN) * TILE + place_of_span(s), out);
      }
    }
  }

  __device__ __forceinline__ void run(const Scan& scan, int rank, [[maybe_unused]] int exchanges) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    strip = strip_of(scan.places, p.knobs[1], rank);
    const int first_row = strip.own_begin - HALO;
    const int threads = threads_for(strip.end - first_row, 1);
    if ((int)threadIdx.x >= threads) return;
    Edges edges;
    edges.start(threads);
    warp_row = first_row + warp * 32;
    const int row = warp_row + lane;
    const bool starts = row == 0, ends = row + 1 == scan.places, inside = strip.has(row);
    ring = shared_memory() + RING + warp * HBUFFERS * HTILE;
    width = p.width;
    constexpr int COLUMNS = HPIECE / SIZE;
    tiles = (width + COLUMNS - 1) / COLUMNS, all_spans = width / SPAN;
    move_to_lane();
#pragma unroll 1
    for (int t = 0; t < HBUFFERS - 1; ++t) {
      if (t < tiles) copy_tile(t);
      copy_commit();
    }
    u32 sums[AHEAD][CHANNELS][SPAN] = {};  // zeros without earlier directions
#if SUMS
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) read_sums(sums[k], row, k);
#endif
    float h[CHANNELS][1] = {};
    Restarts restarts{p.chunk, 0};
    [[maybe_unused]] int until_exchange = HALO;
    int n = 0;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      if (t + HBUFFERS - 1 < tiles) copy_tile(t + HBUFFERS - 1);
      copy_commit();
      copy_wait<HBUFFERS - 1>();
      __syncwarp();
      const int spans = spans_in(t);
#pragma unroll 1
      for (int i = 0; i < spans; ++i, ++n) {
        const int s = REVERSED ? spans - 1 - i : i;
#if CLUSTER > 1
        if (until_exchange == 0) {
          strip.exchange(h, row, exchanges);
          edges.put(h);
          until_exchange = HALO;
        }
        until_exchange -= SPAN;
#endif
        if (!inside)
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) h[c][0] = 0.f;
        u32 words[TENSORS][4];  // of rows that are not there: whatever is in the tile
        read_span(words, t, s);
        float result[CHANNELS][SPAN];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int e = 0; e < SPAN; ++e) {
            result[c][e] = SUMS ? __uint_as_float(sums[0][c][e]) : 0.f;
#pragma unroll
            for (int k = 1; k < AHEAD; ++k) sums[k - 1][c][e] = sums[k][c][e];
          }
        if (SUMS) read_sums(sums[AHEAD - 1], row, n + AHEAD);
        scan_span(result, words, h, edges, restarts, inside, starts, ends);
        write_span(result, row, t, s, n);
      }
      __syncwarp();
      if (!SUMS || plane.last) write_tile(t);
      __syncwarp();
    }
    copy_wait<0>();
  }
};
#endif
