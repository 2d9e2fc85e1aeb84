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

// Where vector v of a row is: permuted so that the vectors of 8 rows meet 8 different groups of banks.
__device__ __forceinline__ int place_of(int row, int v) {
  constexpr int ALIKE = VECTORS >= 8 ? 1 : 8 / VECTORS;
  return ((row * VECTORS + v) ^ (row / ALIKE & 7)) * 16;
}

template <bool REVERSED>
struct HorizontalScan {
  const Params& p;
  Plane plane;
  unsigned char* ring;
  Strip strip;
  int width, tiles, all_spans;
  int warp_row;  // first row of the warp

  // Lanes go over the vectors of a warp's rows: a lane's first row is lane / VECTORS, its step STEP.
  static constexpr int STEP = 32 / VECTORS;
  static __device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / VECTORS; }
  static __device__ __forceinline__ int lane_vector() { return threadIdx.x % 32 % VECTORS; }

  __device__ __forceinline__ void move_to_lane() {
    const int column = lane_vector() * VECTOR;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) plane.from[i] += (warp_row + lane_row()) * row_step(p, i) + column;
    plane.y += (warp_row + lane_row()) * p.y.h + column;
  }

  __device__ __forceinline__ unsigned char* tile_at(int tile) const { return ring + tile % HBUFFERS * HTILE; }

  // Nothing is copied to rows that are not there. Zeros keep their states finite, so that these, times the weight of a
  // missing neighbour, are nothing.
  __device__ __forceinline__ void clear_rows() const {
#pragma unroll 1
    for (int i = 0; i < HBUFFERS * TENSORS; ++i)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        *(uint4*)(ring + i * TILE + place_of(threadIdx.x % 32, v)) = make_uint4(0, 0, 0, 0);
  }

  // Is there anything of this lane's vectors at column0?
  __device__ __forceinline__ bool has_columns(int column0) const { return column0 + lane_vector() * VECTOR < width; }

  __device__ __forceinline__ void copy_tile(int tile) const {
    unsigned char* to = tile_at(tile);
    const int column0 = column_of(tile);
    if (!has_columns(column0)) return;
    // Addresses go from row to row, tensor by tensor: made anew for each copy, they would be most of the instructions.
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) {
      const storage_t* from = plane.from[i] + column0;
      const long long step = STEP * row_step(p, i);
#pragma unroll
      for (int k = 0; k < VECTORS; ++k, from += step) {
        const int r = lane_row() + k * STEP;
        if (strip.has(warp_row + r)) copy_async_wide(to + i * TILE + place_of(r, lane_vector()), from);
      }
    }
  }

  __device__ __forceinline__ void write_tile(int tile) const {
    const unsigned char* from = tile_at(tile);
    const int column0 = column_of(tile);
    if (!has_columns(column0)) return;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int r = lane_row() + k * STEP;
      if (!strip.owns(warp_row + r)) continue;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        *(uint4*)(plane.y + c * p.y.c + k * STEP * p.y.h + column0) =
            *(const uint4*)(from + (TAPS + c * OWN) * TILE + place_of(r, lane_vector()));
    }
  }

  // Tiles, and vectors in a tile, in scan order; the last tile of a row may have fewer.
  __device__ __forceinline__ int column_of(int tile) const {
    return (REVERSED ? tiles - 1 - tile : tile) * (HPIECE / SIZE);
  }
  __device__ __forceinline__ int spans_in(int tile) const { return min(SPANS, (width - column_of(tile)) / SPAN); }

  // Where this thread's span s of a row is in a tensor's part of a tile.
  __device__ __forceinline__ int place_of_span(int s) const {
    return place_of(threadIdx.x % 32, s * SPAN / VECTOR) + s * SPAN % VECTOR * SIZE;
  }
  typedef u32 Words[TENSORS][4];
  __device__ __forceinline__ void read_span(Words& words, int tile, int s) const {
    const unsigned char* from = tile_at(tile) + place_of_span(s);
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) read_words<SPAN * SIZE / 4>(words[i], from + i * TILE);
  }

  // The sums of span n of this thread's row, in scan order; nothing beyond its end.
  typedef u32 Sums[CHANNELS][SPAN];
  __device__ __forceinline__ void read_sums(Sums& sums, int row, bool mine, int n) const {
    if (!plane.adds || !mine || n >= all_spans) return;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float* from = plane.sum_at(c, row, column_of_span(n));
#pragma unroll
      for (int i = 0; i < SPAN; i += 4) {
        const uint4 four = SUMS > 1 ? __ldcs((const uint4*)(from + i)) : __ldcg((const uint4*)(from + i));
        sums[c][i] = four.x, sums[c][i + 1] = four.y, sums[c][i + 2] = four.z, sums[c][i + 3] = four.w;
      }
    }
  }
  __device__ __forceinline__ int column_of_span(int n) const { return (REVERSED ? all_spans - 1 - n : n) * SPAN; }

  // The columns of a span, one after the other; results are added to `result`.
  typedef float Results[CHANNELS][SPAN];
  __device__ __forceinline__ void scan_span(Results& result, Words& words, float (&h)[CHANNELS][1], Edges<false>& edges,
                                              Restarts& restarts, bool inside, bool starts, bool ends) const {
#if !PREPARED
#pragma unroll
    for (int i = 0; i < SPAN * SIZE / 4; ++i) {
      if (starts) words[0][i] = MISSING;
      if (ends) words[TAPS - 1][i] = MISSING;
    }
#endif
    // Weights first: what is between two lines is on the way of the states. Warps that choose differently have to come
    // to the same barriers: nothing but the weights is there twice.
    Place places[SPAN];
    if (ordinary(MAKES_WEIGHTS ? largest_logits<SPAN * SIZE / 4>(words) : 0, inside)) {
#pragma unroll
      for (int e = 0; e < SPAN; ++e) places[e] = unpack<true>(words, e);
    } else {
#pragma unroll
      for (int e = 0; e < SPAN; ++e) places[e] = unpack<false>(words, e);
    }
    if (restarts.until >= SPAN) {
      // No line of these restarts, and none has to ask.
      restarts.until -= SPAN;
      scan_columns<false>(result, places, h, edges, restarts);
    } else {
      scan_columns<true>(result, places, h, edges, restarts);
    }
  }

  template <bool RESTARTS>
  __device__ __forceinline__ void scan_columns(Results& result, const Place (&places)[SPAN], float (&h)[CHANNELS][1],
                                               Edges<false>& edges, Restarts& restarts) const {
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      const int e = REVERSED ? SPAN - 1 - i : i;
      const Place& it = places[e];
      float before[CHANNELS], after[CHANNELS];
      edges.get(before, after, h, (i + 1) % 2);
      const bool restart = RESTARTS && restarts.next();
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        if (restart) {
          h[c][0] = it.u[c];
        } else {
          float next = fmaf(it.w.here, h[c][0], it.u[c]);
          next = fmaf(it.w.before, before[c], next);
          h[c][0] = fmaf(it.w.after, after[c], next);
        }
      }
      edges.put(h, i % 2);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const float v_out = HAS_GATE ? h[c][0] * it.gate[c] : h[c][0];
        float& sum = result[c][e];
        sum = SUMS ? sum + v_out : v_out;
      }
    }
  }

  __device__ __forceinline__ void write_span(const Results& result, int row, int tile, int s, int n) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float* sum = result[c];
      if (SUMS && !plane.last) {
        float* to = plane.sum_at(c, row, column_of_span(n));
#pragma unroll
        for (int i = 0; i < SPAN; i += 4) {
          const u32* four = (const u32*)sum + i;
          const uint4 all = make_uint4(four[0], four[1], four[2], four[3]);
          if (SUMS > 1)
            store_stream(to + i, all);
          else
            *(uint4*)(to + i) = all;
        }
      } else {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < SPAN * SIZE / 4; ++i) out[i] = stored(sum[i * 4 / SIZE], sum[i * 4 / SIZE + (SIZE < 4)]);
        write_words<SPAN * SIZE / 4>(tile_at(tile) + (TAPS + c * OWN) * TILE + place_of_span(s), out);
      }
    }
  }

  __device__ __forceinline__ void run(const Scan& scan, int rank, [[maybe_unused]] int exchanges) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    strip = strip_of(scan.places, p.knobs[1], rank);
    const int first_row = strip.own_begin - HALO;
    const int threads = threads_for(strip.end - first_row, 1);
    if ((int)threadIdx.x >= threads) return;
    Edges<false> edges;
    edges.start(threads);
    warp_row = first_row + warp * 32;
    const int row = warp_row + lane;
    const bool starts = row == 0, ends = row + 1 == scan.places, inside = strip.has(row), mine = strip.owns(row);
    ring = held_shared_memory() + RING + warp * HBUFFERS * HTILE;
    width = p.width;
    constexpr int COLUMNS = HPIECE / SIZE;
    tiles = (width + COLUMNS - 1) / COLUMNS, all_spans = width / SPAN;
    move_to_lane();
    if (!inside) clear_rows();
    __syncwarp();
#pragma unroll 1
    for (int t = 0; t < HBUFFERS - 1; ++t) {
      if (t < tiles) copy_tile(t);
      copy_commit();
    }
    Sums sums[AHEAD] = {};  // zeros without earlier directions
#if SUMS
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) read_sums(sums[k], row, mine, k);
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
          edges.put(h, 1);
          until_exchange = HALO;
        }
        until_exchange -= SPAN;
#endif
        Words words;
        read_span(words, t, s);
        Results result;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int e = 0; e < SPAN; ++e) {
            result[c][e] = SUMS ? __uint_as_float(sums[0][c][e]) : 0.f;
#pragma unroll
            for (int k = 1; k < AHEAD; ++k) sums[k - 1][c][e] = sums[k][c][e];
          }
        if (SUMS) read_sums(sums[AHEAD - 1], row, mine, n + AHEAD);
        scan_span(result, words, h, edges, restarts, inside, starts, ends);
        if (mine) write_span(result, row, t, s, n);
      }
      __syncwarp();
      if (!SUMS || plane.last) write_tile(t);
      __syncwarp();
    }
    copy_wait<0>();
  }
};
#endif
