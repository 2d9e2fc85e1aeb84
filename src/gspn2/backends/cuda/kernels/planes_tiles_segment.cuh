// A segment of a tile in one direction: LINES lines of SIDE places, a lane each. One warp takes it: states
// forward in registers, then back, with all gradients. Rows or columns, first to last or last to first differ
// only in how eight lines' numbers come into registers, and go back.
#pragma once
#include "planes_tiles_words.cuh"

constexpr int SIDE = tiles::SIDE, LINES = tiles::LINES;

// Shared memory of one channel. What gradients there are take the places of lam and gate. Between rows there
// is room for eight rows' vectors to meet all banks.
constexpr int ROW = 2 * SIDE + 16, TENSOR = SIDE * ROW;  // bytes of a tile of 16-bit numbers
constexpr int X = 0, DY = TENSOR, LAM = 2 * TENSOR;      // offsets
constexpr int GATE = LAM + HAS_LAM * SCANS * TENSOR;
constexpr int BORDERS = GATE + HAS_GATE * SCANS * TENSOR;
constexpr int WARPS = 2 * SCANS, BORDER = 4 * (2 * SIDE + 4 * LINES);  // bytes of a warp's borders
constexpr int STAGE = BORDERS + WARPS * BORDER;
// Within borders: lines that enter, and sides before and after.
constexpr int STATE = 0, CARRIED = 4 * SIDE, STATE_SIDES = 8 * SIDE, CARRIED_SIDES = STATE_SIDES + 8 * LINES;
// Tiles of float32 numbers, in which neither rows nor columns meet a bank twice: parts of dx, one for each
// direction.
constexpr int PART_ROW = 4 * SIDE + 4, PART = SIDE * PART_ROW;
// Weights of one warp, for all channels: of each place before and after; and AROUND it, of the place before
// the one after, of the place after the one before (0 outside of the tile). A lane's words of two lines lie
// together. And zeros.
constexpr int AROUND = 4 * SIDE * LINES, WEIGHTS = 2 * AROUND, ZEROS = 4 * LINES;

constexpr int THREADS = 32 * WARPS;

// Gradients: nobody will touch them soon.
template <typename T>
__device__ __forceinline__ void store(void* to, T v) {
  __stcs((T*)to, v);
}

struct Segment {
  int d, half, lane;
  bool vertical, reversed;
  int tile_row, tile_column;  // first row and column of the tile
  u32 restarts;               // lines that start anew; places outside the image do in all of them
  int at;                     // of the lane's numbers in a tile of 16-bit numbers
  int part_at, part_step;     // of line 0 in a tile of float32 numbers; from a line to the next
};

// Line k, counted as the scan takes lines, of the segment's lines as they lie in the image.
__device__ __forceinline__ int in_image(const Segment& s, int k) { return s.reversed ? LINES - 1 - k : k; }

__device__ __forceinline__ void place_in_memory(Segment& s) {
  const int line = s.half * LINES, first = line + in_image(s, 0);
  s.at = s.vertical ? line * ROW + 2 * s.lane : s.lane * ROW + 2 * line;
  s.part_at = s.vertical ? first * PART_ROW + 4 * s.lane : s.lane * PART_ROW + 4 * first;
  s.part_step = (s.vertical ? PART_ROW : 4) * (s.reversed ? -1 : 1);
}

// Numbers as they lie in a row, last to first.
__device__ __forceinline__ Eight turned(const Eight& v) {
  Eight r;
#pragma unroll
  for (int i = 0; i < 4; i++) r.word[i] = __byte_perm(v.word[3 - i], 0, 0x1032);
  return r;
}

template <bool REVERSED>
__device__ __forceinline__ Eight read_columns(const unsigned char* from, int q) {
  Eight v;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const int k = 8 * q + i;
    const u32 even = *(const unsigned short*)(from + (REVERSED ? LINES - 1 - k : k) * ROW);
    const u32 odd = *(const unsigned short*)(from + (REVERSED ? LINES - 2 - k : k + 1) * ROW);
    v.word[i / 2] = __byte_perm(even, odd, 0x5410);
  }
  return v;
}
template <bool REVERSED>
__device__ __forceinline__ void write_columns(unsigned char* to, int q, const Eight& v) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int k = 8 * q + i;
    *(unsigned short*)(to + (REVERSED ? LINES - 1 - k : k) * ROW) =
        (unsigned short)(v.word[i / 2] >> (i & 1) * 16);
  }
}

// Lines 8 q to 8 q + 7 of COUNT tensors; the lane's numbers of the segment are from `at` on.
template <int COUNT>
__device__ __forceinline__ void read_lines(const Segment& s, unsigned char* const (&at)[COUNT], int q,
                                           Eight (&v)[COUNT]) {
  if (s.vertical) {
    if (s.reversed)
#pragma unroll
      for (int t = 0; t < COUNT; t++) v[t] = read_columns<true>(at[t], q);
    else
#pragma unroll
      for (int t = 0; t < COUNT; t++) v[t] = read_columns<false>(at[t], q);
  } else {
#pragma unroll
    for (int t = 0; t < COUNT; t++) v[t].read(at[t] + (s.reversed ? LINES / 8 - 1 - q : q) * 16);
    if (s.reversed)
#pragma unroll
      for (int t = 0; t < COUNT; t++) v[t] = turned(v[t]);
  }
}
template <int COUNT>
__device__ __forceinline__ void write_lines(const Segment& s, unsigned char* const (&at)[COUNT], int q,
                                            const Eight (&v)[COUNT]) {
  if (s.vertical) {
    if (s.reversed)
#pragma unroll
      for (int t = 0; t < COUNT; t++) write_columns<true>(at[t], q, v[t]);
    else
#pragma unroll
      for (int t = 0; t < COUNT; t++) write_columns<false>(at[t], q, v[t]);
  } else {
#pragma unroll
    for (int t = 0; t < COUNT; t++)
      *(uint4*)(at[t] + (s.reversed ? LINES / 8 - 1 - q : q) * 16) = (s.reversed ? turned(v[t]) : v[t]).all();
  }
}

__device__ __forceinline__ bool restarts(const Segment& s, int k) { return s.restarts >> k & 1; }

// What a lane needs of one channel in shared memory. Without lam or gate there is something that nobody
// reads.
struct Channel {
  unsigned char *x, *dy, *lam, *gate;  // the lane's numbers of the segment
  unsigned char* part;                 // and of dx, line 0
  const unsigned char* borders;
  const unsigned char*
      messages;  // what is handed back from beside the tile: 0 but for the first and the last lane
  const unsigned char* weights;  // of line 0
};

// Words of two lines, read together: how often shared memory is asked is a limit of this kernel.
struct Two {
  u32 word[2];

  __device__ __forceinline__ void read(const unsigned char* from) {
    const uint2 v = *(const uint2*)from;
    word[0] = v.x, word[1] = v.y;
  }
  __device__ __forceinline__ float number(int k) const { return __uint_as_float(word[k % 2]); }
};

// Weights of the two lines that k is one of.
__device__ __forceinline__ const unsigned char* weights_at(const Channel& c, int k) {
  return c.weights + k / 2 * 8 * SIDE;
}

// What comes in from beside the tile at line k and those after it, for the first and the last lane.
__device__ __forceinline__ const unsigned char* sides_at(const Segment& s, const Channel& c, int k) {
  return c.borders + STATE_SIDES + s.lane / 16 * 4 * LINES + 4 * k;
}

// The states of all lines.
__device__ __forceinline__ void scan(const Segment& s, const Channel& c, float (&h)[LINES]) {
  float last = *(const float*)(c.borders + STATE + 4 * s.lane);
  Two weights, sides;
#pragma unroll
  for (int q = 0; q < LINES / 8; q++) {
    Eight in[2];
    unsigned char* const at[2] = {c.x, HAS_LAM ? c.lam : c.x};
    read_lines<2>(s, at, q, in);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int k = 8 * q + i;
      const float u = HAS_LAM ? in[0][i] * in[1][i] : in[0][i];
      if (k % 2 == 0) weights.read(weights_at(c, k)), sides.read(sides_at(s, c, k));
      const float side = sides.number(k);
      const float before = __shfl_up_sync(~0u, last, 1), after = __shfl_down_sync(~0u, last, 1);
      const u32 pair = weights.word[k % 2];
      const float w_before = low_weight(pair), w_after = high_weight(pair);
      float next = fmaf(1.f - w_before - w_after, last, u);
      next = fmaf(w_after, s.lane == 31 ? side : after, next);
      next = fmaf(w_before, s.lane == 0 ? side : before, next);
      last = restarts(s, k) ? u : next;
      h[k] = last;
    }
  }
}

// Gradients of the weights of a line, summed over channels. A lane adds up what its own state is a factor of:
// 0 the weight before of the place after, 1 its own, 2 the weight after of the place before. So g is all that
// neighbours tell each other. At the ends of the tile, where there is no such place, the numbers are of the
// lane's own place: 2 the weight before of the first, 0 the weight after of the last.
struct WeightSums {
  float v[3][LINES];

  __device__ __forceinline__ void add(const Segment& s, int k, float g_before, float g, float g_after,
                                      float state, float side) {
    v[0][k] = fmaf(g_after, s.lane == 31 ? side : state, v[0][k]);
    v[1][k] = fmaf(g, state, v[1][k]);
    v[2][k] = fmaf(g_before, s.lane == 0 ? side : state, v[2][k]);
  }
};

// What line k hands to the line before. Outside of the tile a place's weights count as 0 here.
__device__ __forceinline__ float hand_back(const Segment& s, int k, u32 pair, u32 around, float message,
                                           float g_before, float g, float g_after) {
  const float here = 1.f - low_weight(pair) - high_weight(pair);
  const float next = fmaf(low_weight(around), g_before, fmaf(here, g, message));
  return restarts(s, k) ? 0.f : fmaf(high_weight(around), g_after, next);
}

// All gradients, from the last line to the first.
__device__ __forceinline__ void walk_back(const Segment& s, const Channel& c, WeightSums& sums,
                                          const float (&h)[LINES]) {
  float carried = *(const float*)(c.borders + CARRIED + 4 * s.lane);
  unsigned char* part = c.part + (LINES - 1) * s.part_step;
  Two pairs, around, messages;
#pragma unroll
  for (int q = LINES / 8 - 1; q >= 0; q--) {
    Eight in[4], out[2];
    unsigned char* const at[4] = {HAS_LAM ? c.lam : c.x, HAS_GATE ? c.gate : c.dy, c.x, c.dy};
    read_lines<4>(s, at, q, in);
    const Eight &lam = in[0], &gate = in[1], &x = in[2], &dy = in[3];
    float later_g = 0.f;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
      const int k = 8 * q + i;
      if (k % 2 == 1) pairs.read(weights_at(c, k)), around.read(weights_at(c, k) + AROUND);
      // Those of a line are with the line before.
      if (k == LINES - 1 || (k > 0 && k % 2 == 0)) messages.read(c.messages + (k - 1) / 2 * 8);
      const float g = HAS_GATE ? fmaf(gate[i], dy[i], carried) : dy[i] + carried;
      const float state = k > 0 ? h[k > 0 ? k - 1 : 0] : *(const float*)(c.borders + STATE + 4 * s.lane);
      *(float*)part = HAS_LAM ? g * lam[i] : g;
      part -= s.part_step;
      const float g_before = __shfl_up_sync(~0u, g, 1), g_after = __shfl_down_sync(~0u, g, 1);
      sums.add(s, k, g_before, g, g_after, state, *(const float*)sides_at(s, c, k));
      if (k > 0)
        carried = hand_back(s, k, pairs.word[k % 2], around.word[k % 2], messages.number(k - 1), g_before, g,
                            g_after);
      if (i % 2 == 0) {
        out[0].word[i / 2] = packed(g * x[i], later_g * x[i + 1]);
        out[1].word[i / 2] = packed(h[k] * dy[i], h[k + 1] * dy[i + 1]);
      }
      later_g = g;
    }
    if constexpr (HAS_LAM && HAS_GATE) {
      unsigned char* const to[2] = {c.lam, c.gate};
      write_lines<2>(s, to, q, out);
    } else if constexpr (HAS_LAM || HAS_GATE) {
      unsigned char* const to[1] = {HAS_LAM ? c.lam : c.gate};
      const Eight one[1] = {out[HAS_LAM ? 0 : 1]};
      write_lines<1>(s, to, q, one);
    }
  }
}
