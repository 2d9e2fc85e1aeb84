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
constexpr int UNPACKED = WARPS > 9 ? 4 : VECTOR;  // columns at a time: many warps have few registers
constexpr int AHEAD = 8 / VECTOR;  // vectors between asking for sums and using them

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
  int width, tiles, all_vectors;
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
      if (strip.owns(row)) *(uint4*)(plane.y + rows * p.y.h + column0) = *(const uint4*)(from + place);
    });
  }

  // Tiles, and vectors in a tile, in scan order; the last tile of a row may have fewer.
  __device__ __forceinline__ int column_of(int tile) const {
    return (REVERSED ? tiles - 1 - tile : tile) * (HPIECE / SIZE);
  }
  __device__ __forceinline__ int vectors_in(int tile) const {
    return min(VECTORS, (width - column_of(tile) + VECTOR - 1) / VECTOR);
  }
  __device__ __forceinline__ int vector_of(int tile, int i) const { return REVERSED ? vectors_in(tile) - 1 - i : i; }

  __device__ __forceinline__ void read_vector(u32 (&words)[TENSORS][4], int tile, int v) const {
    const unsigned char* from = tile_at(tile) + place_of<VECTORS>(threadIdx.x % 32, v);
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) read_words<4>(words[i], from + i * TILE);
  }

  // The sums of vector n of this thread's row, in scan order; nothing beyond its end.
  __device__ __forceinline__ void read_sums(u32 (&sums)[VECTOR], int row, int n) const {
    if (!plane.adds || !strip.owns(row) || n >= all_vectors) return;
    const float* from = plane.sum_at(row, (REVERSED ? all_vectors - 1 - n : n) * VECTOR);
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
      const uint4 four = __ldcg((const uint4*)(from + i));
      sums[i] = four.x, sums[i + 1] = four.y, sums[i + 2] = four.z, sums[i + 3] = four.w;
    }
  }

  // One vector of this thread's row, added to `result`.
  __device__ __forceinline__ void scan_vector(float (&result)[VECTOR], u32 (&words)[TENSORS][4], float& h, Edges& edges,
                                              Restarts& restarts, bool starts, bool ends) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (starts) words[1][i] = MISSING;
      if (ends) words[3][i] = MISSING;
    }
    // Weights first: what is between two lines is on the way of the states.
    Place places[UNPACKED];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (i % UNPACKED == 0)
#pragma unroll
        for (int k = 0; k < UNPACKED; ++k) places[k] = unpack(words, REVERSED ? VECTOR - 1 - i - k : i + k);
      const int e = REVERSED ? VECTOR - 1 - i : i;
      const Place& it = places[i % UNPACKED];
      float before = __shfl_up_sync(0xffffffffu, h, 1), after = __shfl_down_sync(0xffffffffu, h, 1);
      edges.get(before, after);
      if (restarts.next()) {
        h = it.u;
      } else {
        float next = fmaf(it.w.here, h, it.u);
        next = fmaf(it.w.before, starts ? 0.f : before, next);
        h = fmaf(it.w.after, ends ? 0.f : after, next);
      }
      edges.put(h, h);
      const float v_out = HAS_GATE ? h * it.gate : h;
      result[e] = SUMS ? result[e] + v_out : v_out;
    }
  }

  __device__ __forceinline__ void write_vector(const float (&result)[VECTOR], int row, int tile, int v, int n) const {
    if (SUMS && !plane.last) {
      if (!strip.owns(row)) return;
      float* to = plane.sum_at(row, (REVERSED ? all_vectors - 1 - n : n) * VECTOR);
#pragma unroll
      for (int i = 0; i < VECTOR; i += 4)
        *(uint4*)(to + i) = make_uint4(__float_as_uint(result[i]), __float_as_uint(result[i + 1]),
                                       __float_as_uint(result[i + 2]), __float_as_uint(result[i + 3]));
    } else {
      u32 out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = stored(result[i * 4 / SIZE], result[i * 4 / SIZE + (SIZE < 4)]);
      write_words<4>(tile_at(tile) + place_of<VECTORS>(threadIdx.x % 32, v), out);
    }
  }

  __device__ __forceinline__ void run(const Scan& scan, int rank, Counts counts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    strip = strip_of(scan.places, p.knobs[1], rank);
    const int first_row = strip.own_begin - HALO;
    const int threads = threads_for(strip.end - first_row, 1);
    if ((int)threadIdx.x >= threads) return;
    Edges edges;
    edges.start(counts.posts, threads);
    warp_row = first_row + warp * 32;
    const int row = warp_row + lane;
    const bool starts = row == 0, ends = row + 1 == scan.places, inside = strip.has(row);
    ring = shared_memory() + RING + warp * HBUFFERS * HTILE;
    width = p.width;
    constexpr int COLUMNS = HPIECE / SIZE;
    tiles = (width + COLUMNS - 1) / COLUMNS, all_vectors = (width + VECTOR - 1) / VECTOR;
    move_to_lane();
#pragma unroll 1
    for (int t = 0; t < HBUFFERS - 1; ++t) {
      if (t < tiles) copy_tile(t);
      copy_commit();
    }
    u32 sums[AHEAD][VECTOR];
#if SUMS
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) sums[k][e] = 0;
      read_sums(sums[k], row, k);
    }
#endif
    float h[1] = {0.f};
    Restarts restarts{p.chunk, 0};
    [[maybe_unused]] int until_exchange = HALO;
    int n = 0;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      if (t + HBUFFERS - 1 < tiles) copy_tile(t + HBUFFERS - 1);
      copy_commit();
      copy_wait<HBUFFERS - 1>();
      __syncwarp();
      const int vectors = vectors_in(t);
#pragma unroll 1
      for (int i = 0; i < vectors; ++i, ++n) {
#if CLUSTER > 1
        if (until_exchange == 0) {
          strip.exchange(h, row, counts.exchanges);
          edges.put_again(h[0], h[0]);
          until_exchange = HALO;
        }
        until_exchange -= VECTOR;
#endif
        if (!inside) h[0] = 0.f;
        u32 words[TENSORS][4];  // of rows that are not there: whatever is in the tile
        read_vector(words, t, vector_of(t, i));
        float result[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          result[e] = SUMS ? __uint_as_float(sums[0][e]) : 0.f;
#pragma unroll
          for (int k = 1; k < AHEAD; ++k) sums[k - 1][e] = sums[k][e];
        }
        if (SUMS) read_sums(sums[AHEAD - 1], row, n + AHEAD);
        scan_vector(result, words, h[0], edges, restarts, starts, ends);
        write_vector(result, row, t, vector_of(t, i), n);
      }
      __syncwarp();
      if (!SUMS || plane.last) write_tile(t);
      __syncwarp();
    }
    copy_wait<0>();
  }
};
#endif
