// Right and left: lines are columns, memory runs along the scan. A thread holds HROWS rows, and scans the 16 bytes of each
// that it has just read from a tile in shared memory; the result takes the place of x there. So nothing is transposed,
// and memory sees HPIECE bytes of every row at a time. A warp's tiles are its own: data needs no barrier.
// Threads of one row meet in every line. With several, a warp also holds EDGE rows of its neighbours on either side:
// warps meet every EDGE lines, and a thread's rows do not wait for each other.
#pragma once
#include "lines.cuh"

#if HPIECE
constexpr int VECTOR = 16 / SIZE;          // columns in 16 bytes
constexpr int VECTORS = HPIECE / 16;       // of a row in a tile
constexpr int ROWS = 32 * HROWS;           // of a warp
constexpr int TILE = ROWS * HPIECE;        // bytes of one tensor in a warp's tile
constexpr int HTILE = TENSORS * TILE;
constexpr int SPAN = WARPS > 9 && HROWS == 1 ? 4 : VECTOR;  // columns that a thread takes at once: many warps have few registers
constexpr int SPANS = HPIECE / SIZE / SPAN;
constexpr int AHEAD = HROWS > 1 || WARPS > 9 ? 1 : 8 / SPAN;  // spans between asking for sums and using them
static_assert(HROWS == 1 || EDGE % VECTOR == 0, "warps meet between two spans");

// Where vector v of a row is: permuted so that the vectors of 8 threads, or of 8 rows, meet 8 different groups of banks.
__device__ __forceinline__ int place_of(int row, int v) {
  constexpr int ALIKE = VECTORS * HROWS >= 8 ? HROWS : 8 / VECTORS;
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
      for (int k = 0; k < HROWS; ++k)
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
          *(uint4*)(ring + i * TILE + place_of(threadIdx.x % 32 * HROWS + k, v)) = make_uint4(0, 0, 0, 0);
  }

  // Is there anything of this lane's vectors at column0, and which of its rows has the strip?
  __device__ __forceinline__ bool has_columns(int column0) const { return column0 + lane_vector() * VECTOR < width; }
  // Rows that only this warp holds as its own.
  static __device__ __forceinline__ bool owns(int row_of_warp) { return row_of_warp >= EDGE && row_of_warp < ROWS - EDGE; }

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
      for (int k = 0; k < ROWS / STEP; ++k, from += step) {
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
    for (int k = 0; k < ROWS / STEP; ++k) {
      const int r = lane_row() + k * STEP;
      if (!owns(r) || !strip.owns(warp_row + r)) continue;
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

  // Where span s of this thread's row k is in a tensor's part of a tile.
  __device__ __forceinline__ int place_of_span(int k, int s) const {
    return place_of(threadIdx.x % 32 * HROWS + k, s * SPAN / VECTOR) + s * SPAN % VECTOR * SIZE;
  }
  typedef u32 Words[HROWS][TENSORS][4];
  __device__ __forceinline__ void read_span(Words& words, int tile, int s) const {
#pragma unroll
    for (int k = 0; k < HROWS; ++k) {
      const unsigned char* from = tile_at(tile) + place_of_span(k, s);
#pragma unroll
      for (int i = 0; i < TENSORS; ++i) read_words<SPAN * SIZE / 4>(words[k][i], from + i * TILE);
    }
  }

  // The sums of span n of this thread's rows from `row` on, in scan order; nothing beyond its end.
  typedef u32 Sums[CHANNELS][HROWS][SPAN];
  __device__ __forceinline__ void read_sums(Sums& sums, int row, bool mine, int n) const {
    if (!plane.adds || !mine || n >= all_spans) return;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int k = 0; k < HROWS; ++k) {
        const float* from = plane.sum_at(c, row, column_of_span(n)) + k * 8;
#pragma unroll
        for (int i = 0; i < SPAN; i += 4) {
          const uint4 four = SUMS > 1 ? __ldcs((const uint4*)(from + i)) : __ldcg((const uint4*)(from + i));
          u32* to = sums[c][k] + i;
          to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
      }
  }
  __device__ __forceinline__ int column_of_span(int n) const { return (REVERSED ? all_spans - 1 - n : n) * SPAN; }

  // The columns of a span, one after the other; results are added to `result`.
  typedef float Results[CHANNELS][HROWS][SPAN];
  __device__ __forceinline__ void scan_span(Results& result, Words& words, float (&h)[CHANNELS][HROWS], Edges& edges,
                                              Restarts& restarts, bool inside, bool starts, bool ends) const {
    u32 largest = 0;
#if !PREPARED
#pragma unroll
    for (int i = 0; i < SPAN * SIZE / 4; ++i) {
      if (starts) words[0][0][i] = MISSING;
      if (ends) words[HROWS - 1][TAPS - 1][i] = MISSING;
    }
#endif
#if MAKES_WEIGHTS
#pragma unroll
    for (int k = 0; k < HROWS; ++k) largest = largest_logits<SPAN * SIZE / 4>(words[k], largest);
#endif
    const bool plain = ordinary(largest, inside);
    if (restarts.until >= SPAN) {
      // No line of these restarts, and none has to ask.
      restarts.until -= SPAN;
      if (plain)
        scan_columns<true, false>(result, words, h, edges, restarts);
      else
        scan_columns<false, false>(result, words, h, edges, restarts);
    } else if (plain) {
      scan_columns<true, true>(result, words, h, edges, restarts);
    } else {
      scan_columns<false, true>(result, words, h, edges, restarts);
    }
  }

  template <bool ORDINARY, bool RESTARTS>
  __device__ __forceinline__ void scan_columns(Results& result, const Words& words, float (&h)[CHANNELS][HROWS], Edges& edges,
                                                 Restarts& restarts) const {
    // Threads of one row meet in every line, and make all weights before: they would be on the way of the states.
    constexpr int AT_ONCE = HROWS == 1 ? SPAN : 1;
    Place places[AT_ONCE][HROWS];
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      const int e = REVERSED ? SPAN - 1 - i : i;
      if (i % AT_ONCE == 0)
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
          for (int k = 0; k < HROWS; ++k)
            places[j][k] = unpack<ORDINARY>(words[k], REVERSED ? SPAN - 1 - i - j : i + j);
      const Place(&it)[HROWS] = places[i % AT_ONCE];
      const bool restart = RESTARTS && restarts.next();
      if (HROWS == 1)
        step_meeting(h, it[0], edges, restart, i % 2);
      else
        step(h, it, restart);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int k = 0; k < HROWS; ++k) {
          const float v_out = HAS_GATE ? h[c][k] * it[k].gate[c] : h[c][k];
          float& sum = result[c][k][e];
          sum = SUMS ? sum + v_out : v_out;
        }
    }
  }

  // h <- w h + u of one row a thread.
  static __device__ __forceinline__ void step_meeting(float (&h)[CHANNELS][HROWS], const Place& it, Edges& edges, bool restart,
                                                      int turn) {
    float before[CHANNELS], after[CHANNELS];
    edges.get(before, after, h, turn ^ 1);
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
    edges.put(h, turn);
  }

  // The same of several. What comes from other lanes is added last: it is there last.
  static __device__ __forceinline__ void step(float (&h)[CHANNELS][HROWS], const Place (&it)[HROWS], bool restart) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float before = __shfl_up_sync(0xffffffffu, h[c][HROWS - 1], 1);
      const float after = __shfl_down_sync(0xffffffffu, h[c][0], 1);
      float next[HROWS];
#pragma unroll
      for (int k = 0; k < HROWS; ++k) {
        next[k] = fmaf(it[k].w.here, h[c][k], it[k].u[c]);
        if (k > 0) next[k] = fmaf(it[k].w.before, h[c][k > 0 ? k - 1 : 0], next[k]);
        if (k < HROWS - 1) next[k] = fmaf(it[k].w.after, h[c][k < HROWS - 1 ? k + 1 : 0], next[k]);
      }
      next[0] = fmaf(it[0].w.before, before, next[0]);
      next[HROWS - 1] = fmaf(it[HROWS - 1].w.after, after, next[HROWS - 1]);
#pragma unroll
      for (int k = 0; k < HROWS; ++k) h[c][k] = restart ? it[k].u[c] : next[k];
    }
  }

  __device__ __forceinline__ void write_span(const Results& result, int row, int tile, int s, int n) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int k = 0; k < HROWS; ++k) {
        const float* sum = result[c][k];
        if (SUMS && !plane.last) {
          float* to = plane.sum_at(c, row, column_of_span(n)) + k * 8;
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
          write_words<SPAN * SIZE / 4>(tile_at(tile) + (TAPS + c * OWN) * TILE + place_of_span(k, s), out);
        }
      }
  }

  __device__ __forceinline__ void run(const Scan& scan, int rank, [[maybe_unused]] int exchanges) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    strip = strip_of(scan.places, p.knobs[1], rank);
    const int first_row = strip.own_begin - HALO;
    const int threads = threads_for((strip.end - first_row + ROWS - 2 * EDGE - 1) / (ROWS - 2 * EDGE) * 32, 1);
    if ((int)threadIdx.x >= threads) return;
    Edges edges;
    edges.start(threads);
    warp_row = first_row + warp * (ROWS - 2 * EDGE) - EDGE;
    const int row = warp_row + lane * HROWS;  // the first of this thread's: all are in the strip, or none
    const bool starts = row == 0, ends = row + HROWS == scan.places, inside = strip.has(row);
    const bool holds = owns(lane * HROWS), mine = holds && strip.owns(row);
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
    float h[CHANNELS][HROWS] = {};
    Restarts restarts{p.chunk, 0};
    [[maybe_unused]] int until_exchange = HALO, until_renewed = EDGE;
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
#if HROWS > 1
        if (until_renewed == 0) {
          edges.renew(h, lane * HROWS, warp > 0, (int)threadIdx.x / 32 + 1 < threads / 32);
          until_renewed = EDGE;
        }
        until_renewed -= SPAN;
#endif
#if CLUSTER > 1
        if (until_exchange == 0) {
          strip.exchange(h, row, holds, exchanges);
          if (HROWS == 1) edges.put(h, 1);
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
          for (int k = 0; k < HROWS; ++k)
#pragma unroll
            for (int e = 0; e < SPAN; ++e) {
              result[c][k][e] = SUMS ? __uint_as_float(sums[0][c][k][e]) : 0.f;
#pragma unroll
              for (int l = 1; l < AHEAD; ++l) sums[l - 1][c][k][e] = sums[l][c][k][e];
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
