// Right and left: lines are columns, memory runs along the scan. A thread holds one row, and scans the 16 bytes of it
// that it has just read from a tile in shared memory; the result takes the place of x there. So nothing is transposed,
// and memory sees HPIECE bytes of every row at a time. A warp's tiles are its own: data needs no barrier.
#pragma once
#include "lines.cuh"

#if HPIECE
constexpr int VECTOR = 16 / SIZE;          // columns in 16 bytes
constexpr int VECTORS = HPIECE / 16;       // of a row in a tile
constexpr int TILE = 32 * HPIECE;          // bytes of one tensor in a warp's tile
constexpr int SUM_VECTORS = VECTORS * 4 / SIZE;
constexpr int HTILE = TENSORS * TILE + (SUMS ? TILE * 4 / SIZE : 0);

// Where vector v of a row is: permuted so that 8 rows' vectors meet 8 different groups of banks.
template <int N>
__device__ __forceinline__ int place_of(int row, int v) {
  constexpr int EIGHTH = N >= 8 ? 1 : 8 / N;
  return (row * N + (v ^ (row / EIGHTH & (N < 8 ? N - 1 : 7)))) * 16;
}

template <bool REVERSED>
struct HorizontalScan {
  Plane plane;
  unsigned char* ring;
  long long y_row;
  Strip strip;
  int width, warp_row;  // first row of the warp

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
    for (int i = 0; i < TENSORS; ++i) plane.from[i] += lane_offset<VECTORS>(plane.row[i], VECTOR);
    plane.y += lane_offset<VECTORS>(y_row, VECTOR);
    plane.sums += lane_offset<SUM_VECTORS>(plane.sums_row, 4);
  }

  __device__ __forceinline__ void copy_tile(int tile, int column0) const {
    unsigned char* to = ring + tile % HBUFFERS * HTILE;
    for_vectors<VECTORS>(VECTOR, column0, [&](int rows, int place, int row) {
      if (!strip.has(row)) return;
#pragma unroll
      for (int i = 0; i < TENSORS; ++i)
        copy_async_wide(to + i * TILE + place, plane.from[i] + rows * plane.row[i] + column0);
    });
#if SUMS
    if (plane.adds)
      for_vectors<SUM_VECTORS>(4, column0, [&](int rows, int place, int row) {
        if (!strip.owns(row)) return;  // others' are being written
        copy_async<16>(to + TENSORS * TILE + place, plane.sums + rows * plane.sums_row + column0);
      });
#endif
  }

  __device__ __forceinline__ void write_tile(int tile, int column0) const {
    const unsigned char* from = ring + tile % HBUFFERS * HTILE;
    if (SUMS && !plane.last) {
      for_vectors<SUM_VECTORS>(4, column0, [&](int rows, int place, int row) {
        if (strip.owns(row))
          *(uint4*)(plane.sums + rows * plane.sums_row + column0) = *(const uint4*)(from + TENSORS * TILE + place);
      });
    } else {
      for_vectors<VECTORS>(VECTOR, column0, [&](int rows, int place, int row) {
        if (strip.owns(row)) *(uint4*)(plane.y + rows * y_row + column0) = *(const uint4*)(from + place);
      });
    }
  }

  // 16 bytes of this thread's row: scanned, and the result put in their place.
  __device__ __forceinline__ void scan_vector(unsigned char* tile, int v, float& h, Edges& edges, Restarts& restarts,
                                              bool starts, bool ends) const {
    const int lane = threadIdx.x % 32;
    u32 words[TENSORS][4];
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) read_words<4>(words[i], tile + i * TILE + place_of<VECTORS>(lane, v));
    float result[VECTOR];
#if SUMS
    unsigned char* sums = tile + TENSORS * TILE;
#pragma unroll
    for (int i = 0; i < VECTOR / 4; ++i) {
      u32 four[4] = {0, 0, 0, 0};
      if (plane.adds) read_words<4>(four, sums + place_of<SUM_VECTORS>(lane, v * (4 / SIZE) + i));
#pragma unroll
      for (int e = 0; e < 4; ++e) result[4 * i + e] = __uint_as_float(four[e]);
    }
#endif
    // All weights first: what is between two barriers is on the way of the states.
    Place places[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) places[e] = unpack(words, e, !starts, !ends);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int e = REVERSED ? VECTOR - 1 - i : i;
      const Place& it = places[e];
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
      edges.barrier();
      const float v_out = HAS_GATE ? h * it.gate : h;
      result[e] = SUMS ? result[e] + v_out : v_out;
    }
    if (SUMS && !plane.last) {
#pragma unroll
      for (int i = 0; i < VECTOR / 4; ++i) {
        u32 four[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = __float_as_uint(result[4 * i + e]);
        write_words<4>(tile + TENSORS * TILE + place_of<SUM_VECTORS>(lane, v * (4 / SIZE) + i), four);
      }
    } else {
      u32 out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = stored(result[i * 4 / SIZE], result[i * 4 / SIZE + (SIZE < 4)]);
      write_words<4>(tile + place_of<VECTORS>(lane, v), out);
    }
  }

  __device__ __forceinline__ void run(const Params& p, const Scan& scan, int rank, int exchanges) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    strip = strip_of(scan.places, p.knobs[1], rank);
    const int first_row = strip.own_begin - HALO;
    Edges edges{0, warp, lane, threads_for(strip.end - first_row, 1)};
    if ((int)threadIdx.x >= edges.threads) return;
    warp_row = first_row + warp * 32;
    const int row = warp_row + lane;
    const bool starts = row == 0, ends = row + 1 == scan.places, inside = strip.has(row);
    ring = shared_memory() + RING + warp * HBUFFERS * HTILE;
    y_row = p.y.h, width = p.width;
    constexpr int COLUMNS = HPIECE / SIZE;
    const int tiles = (width + COLUMNS - 1) / COLUMNS;
    auto column_of = [&](int tile) { return (REVERSED ? tiles - 1 - tile : tile) * COLUMNS; };
    move_to_lane();
    edges.start();
    for (int t = 0; t < HBUFFERS - 1; ++t) {
      if (t < tiles) copy_tile(t, column_of(t));
      copy_commit();
    }
    edges.barrier();
    float h[1] = {0.f};
    Restarts restarts{p.chunk, 0};
    [[maybe_unused]] int until_exchange = HALO;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      const int column0 = column_of(t);
      if (HBUFFERS > 1 && t + HBUFFERS - 1 < tiles) copy_tile(t + HBUFFERS - 1, column_of(t + HBUFFERS - 1));
      if (HBUFFERS == 1) copy_tile(t, column0);
      copy_commit();
      copy_wait<HBUFFERS - 1>();
      __syncwarp();
      unsigned char* tile = ring + t % HBUFFERS * HTILE;
      const int vectors = min(VECTORS, (width - column0 + VECTOR - 1) / VECTOR);
#pragma unroll 1
      for (int i = 0; i < vectors; ++i) {
#if CLUSTER > 1
        if (until_exchange == 0) {
          strip.exchange(h, row, exchanges);
          edges.put(h[0], h[0]);
          edges.barrier();
          until_exchange = HALO;
        }
        until_exchange -= VECTOR;
#endif
        if (!inside) h[0] = 0.f;
        scan_vector(tile, REVERSED ? vectors - 1 - i : i, h[0], edges, restarts, starts, ends);
      }
      __syncwarp();
      write_tile(t, column0);
      __syncwarp();
    }
    copy_wait<0>();
  }
};
#endif
