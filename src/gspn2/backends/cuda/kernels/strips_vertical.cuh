// One direction, down or up, over few planes, weights as given: warps that scan, and warps that copy for
// them, as in strips.cuh; but lines are rows, and so short, in time, that a scanning warp does nothing but
// scan.
//
// A line is cut into strips, one for each scanning warp of a cluster. A lane holds PLACES neighbouring
// places: two shuffles serve them all, and within a line none waits for another. A strip has HALO places of
// its neighbours on either side. What it computes there goes wrong by one place a line, from the outside;
// every HALO lines strips send each other the right states. So no line has a barrier, and a warp waits for
// data at tiles only, which others have brought long before.
//
// Macros beside those of common.cuh:
//   CLUSTER    blocks that share the lines of a plane (1: none)
//   PLANES     of a block, channels of one group: they share its tiles of taps, which are copied once for all
//   STRIPS     scanning warps of a block: those of its first plane, then those of the next
//   COPIERS    copying warps of a block
//   PLACES     of a lane
//   HALO       places of neighbours on either side, and lines between exchanges; 0 for a single strip
//   LINES      of a tile
//   STAGES     tiles in the ring of a block
// Knobs: 0 places of a strip, its own.
#pragma once
#include "strips_common.cuh"
#include "strips_ptx.cuh"

constexpr int ALONG = STRIPS / PLANES;        // strips of a line in a block
constexpr int OWN = TENSORS - TAPS;           // tensors of a plane beside taps
constexpr int OPERANDS = TAPS + PLANES * OWN;

static_assert(STRIPS == ALONG * PLANES, "as many strips for every plane");
static_assert(PLACES * SIZE <= 16 && (PLACES & PLACES - 1) == 0, "a lane reads its places together");
static_assert(HALO > 0 ? PLACES <= 4 : CLUSTER * ALONG == 1, "strips exchange states, a lane's together");

constexpr int WORDS = PLACES * SIZE / 4;      // of a lane's places of a line
constexpr int MOST = 32 * PLACES - 2 * HALO;  // places of a strip, its own, at most

// Of a scanning warp: which of the block's planes it has, and which of the block's strips of a line.
__device__ __forceinline__ int plane_of_warp(int warp) { return PLANES == 1 ? 0 : warp / ALONG; }
__device__ __forceinline__ int strip_of_warp(int warp) { return PLANES == 1 ? warp : warp % ALONG; }

// A tile: LINES rows of each operand, places of the block with HALO more on either side. Taps come first,
// then what each plane has of its own.
constexpr int ROW = (ALONG * MOST + 2 * HALO) * SIZE;  // bytes
constexpr int STAGE = LINES * OPERANDS * ROW;
static_assert(ROW % 16 == 0 && HALO % LINES == 0, "rows are copied in vectors; exchanges come between tiles");

// States from neighbours: [strip][turn][side][place]. A barrier for each strip, turn and side.
typedef Head<STRIPS * 2 * 2 * HALO, STRIPS * 2 * 2> Shared;

// The part of a line that a warp holds. Places are counted from the first of these: HALO are the strip's
// before it, then come its own. All are multiples of PLACES: those of a lane are on one side of every border.
struct Strip {
  int plane;                // of the block's
  int number, own, after;   // among all of a line; places of its own; places of the strip after it
  int lane;
  int count;                // of exchanges so far

  __device__ __forceinline__ int place() const { return lane * PLACES; }
  __device__ __forceinline__ bool owns() const { return place() >= HALO && place() < HALO + own; }

  // Two sets of states take turns, as a neighbour may already send the next while these are read. It does not
  // send those after these before it has what this strip sends next.
  __device__ __forceinline__ void exchange(float (&h)[PLACES]) {
    const int turn = count & 1;
    const u32 parity = count >> 1 & 1;
    ++count;
    const int set = set_of(number, turn, 0);  // what the strip before sends; then the strip after
    u64* bar = Shared::state_barriers() + set;
    const bool has_before = number > 0, has_after = after > 0;
    if (arrives(lane)) {
      if (has_before && !near(number - 1)) arrive_expect(bar, 4 * HALO, lane);
      if (has_after && !near(number + 1)) arrive_expect(bar + 1, 4 * after, lane);
    }
    const int o = place() - HALO;
    if (has_before && o >= 0 && o < HALO) send(h, number - 1, set_of(number - 1, turn, 1), o);
    if (has_after && o >= own - HALO && o < own)
      send(h, number + 1, set_of(number + 1, turn, 0), o - (own - HALO));
    __syncwarp();
    if (arrives(lane)) {
      if (has_before && near(number - 1)) mbarrier_arrive(Shared::state_barriers() + set_of(number - 1, turn, 1));
      if (has_after && near(number + 1)) mbarrier_arrive(Shared::state_barriers() + set_of(number + 1, turn, 0));
    }
    const float* from = Shared::states() + set * HALO;
    if (has_before) {
      mbarrier_wait(bar, parity);
      if (place() < HALO) receive(h, from + place());
    }
    if (has_after) {
      mbarrier_wait(bar + 1, parity);
      if (o >= own && o < own + after) receive(h, from + HALO + o - own);
    }
    // All have read before any sends again.
    __syncwarp();
  }

  // side: 0 if the sender comes before the receiver.
  __device__ __forceinline__ int set_of(int to, int turn, int side) const {
    return ((plane * ALONG + to % ALONG) * 2 + turn) * 2 + side;
  }
  // In the same block states are stored, and the sender arrives for all of them; to another block each one
  // counts.
  __device__ __forceinline__ bool near(int to) const {
    return CLUSTER == 1 || to / ALONG == number / ALONG;
  }

  __device__ __forceinline__ void send(const float (&states)[PLACES], int to, int set, int at) const {
    float* there = Shared::states() + set * HALO + at;
#if CLUSTER > 1
    if (!near(to)) {
      store_counted<PLACES>(there, Shared::state_barriers() + set, to / ALONG, states);
      return;
    }
#endif
    u32 words[PLACES];
#pragma unroll
    for (int k = 0; k < PLACES; ++k) words[k] = __float_as_uint(states[k]);
    write_words<PLACES>(there, words);
  }

  static __device__ __forceinline__ void receive(float (&states)[PLACES], const float* from) {
    u32 words[PLACES];
    read_words<PLACES>(words, from);
#pragma unroll
    for (int k = 0; k < PLACES; ++k) states[k] = __uint_as_float(words[k]);
  }
};

__device__ __forceinline__ Strip strip_of(int places, int own, int rank) {
  const int warp = (int)threadIdx.x / 32, number = rank * ALONG + strip_of_warp(warp), left = places - number * own;
  return {plane_of_warp(warp), number, min(own, left), max(0, min(HALO, left - own)), (int)threadIdx.x % 32, 0};
}

// The lines of a plane, in the order of the scan, and the tiles that they are in.
struct Lines {
  int count;
  bool reversed;

  __device__ __forceinline__ int tiles() const { return (count + LINES - 1) / LINES; }
  __device__ __forceinline__ long long row(int line) const { return reversed ? count - 1 - line : line; }
  __device__ __forceinline__ long long step(long long row_step) const {
    return reversed ? -row_step : row_step;
  }
};
